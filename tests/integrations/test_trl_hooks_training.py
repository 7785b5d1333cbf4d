"""A step of TRL's GKD, GOLD, SDFT and SDPO trainers with the hooks, beside one written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="what is replaced is TRL's")

from datasets import Dataset
from tiny_trl import (
    PROMPTS,
    K,
    assert_same_parameters,
    fixed_response,
    hand_written_step,
    llama,
    logged,
    sequences,
    tokenizer,
)
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer, sdft_trainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer, sdpo_trainer

from opd_kernels import topk_divergence
from opd_kernels.integrations.trl import use_topk_loss

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
RATE, ACCUMULATED = 0.5, 2
OPTIONS = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": ACCUMULATED,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
SELF = {
    "distillation_mode": "topk_logits",
    "distillation_topk": K,
    "teacher_model_kind": "live",
    "num_generations": 2,
    "max_completion_length": 8,
}


# GKD and GOLD, on given responses.


def responses() -> Dataset:
    """Prompts with the responses of ``tiny_trl``, tokenized."""
    return Dataset.from_list(
        [
            {
                "prompt": tokenizer().decode(prompt),
                "input_ids": prompt + response,
                "attention_mask": [1] * len(prompt + response),
                "completion_mask": [0] * len(prompt) + [1] * len(response),
            }
            for prompt, response in sequences(PROMPTS[:4])
        ]
    )


def two_models(trainer: Any, config: Any, folder: Path, **options: Any) -> Any:
    args = config(str(folder), **OPTIONS | {"lmbda": 0.0, "temperature": 1.0} | options)
    data = {"train_dataset": responses(), "processing_class": tokenizer()}
    trained = trainer(llama(0), llama(1, hidden_size=24), args, **data)
    trained.train()
    return trained


@pytest.mark.parametrize(("beta", "divergence"), [(0.5, "jsd"), (1.0, "reverse_kl")])
@pytest.mark.parametrize(
    ("trainer", "config", "counted"),
    [(GKDTrainer, GKDConfig, 1), (GOLDTrainer, GOLDConfig, ACCUMULATED)],
)
def test_a_step_on_two_models_is_the_hand_written_one(
    tmp_path: Path, trainer: Any, config: Any, counted: int, beta: float, divergence: str
) -> None:
    student, teacher = llama(0), llama(1, hidden_size=24)
    chosen = {"divergence": divergence, "outside": "renormalize", "support": "student"}
    loss, expected = hand_written_step(student, teacher, rate=RATE / counted, **chosen)
    with use_topk_loss(trainer, K, outside="renormalize", support="student"):
        trained = two_models(trainer, config, tmp_path, beta=beta)
    assert logged(trained, "loss") == pytest.approx([loss / counted], rel=1e-5)
    assert_same_parameters(trained.model, expected)


def test_trls_gold_counts_a_label_once_per_accumulated_batch(tmp_path: Path) -> None:
    """Its loader repeats a step's batch for every part of it, and the trainer counts them all."""
    whole, parts = (
        two_models(
            GOLDTrainer,
            GOLDConfig,
            tmp_path,
            gradient_accumulation_steps=steps,
            per_device_train_batch_size=4 // steps,
        )
        for steps in (1, ACCUMULATED)
    )
    assert logged(parts, "loss")[0] == pytest.approx(logged(whole, "loss")[0] / ACCUMULATED)


# SDFT and SDPO, whose teacher is the student with a longer prompt.


def fixed(trainer: Any) -> Any:
    """Rollouts do not depend on the student, and batches are kept."""

    class Fixed(trainer):
        def __init__(self, *args: Any, **options: Any) -> None:
            self.batches: list[dict[str, Tensor]] = []
            super().__init__(*args, **options)

        def _generate(self, prompt_ids: list) -> tuple[list, list]:
            return prompt_ids, [fixed_response(list(prompt)) for prompt in prompt_ids]

        def _compute_self_distillation_loss(self, model: Any, inputs: Any, logits: Any) -> Tensor:
            self.batches.append(inputs)
            return super()._compute_self_distillation_loss(model, inputs, logits)

    return Fixed


def rewards(completions: list[str], **_: Any) -> list[float]:
    """By the first word, so that one of two prompts has a demonstration."""
    return [float(completion.split()[0] > "w3") for completion in completions]


def self_distilled(trainer: Any, config: Any, folder: Path, student: Any, **options: Any) -> Any:
    args = config(str(folder), **OPTIONS | SELF | options)
    data = Dataset.from_list([{"prompt": p, "privileged_context": "w20 w21"} for p in PROMPTS])
    funcs = {"reward_funcs": rewards} if trainer is SDPOTrainer else {}
    trained = fixed(trainer)(
        student, args=args, train_dataset=data, processing_class=tokenizer(), **funcs
    )
    trained.train()
    return trained


def by_hand(model: Any, batch: dict[str, Tensor], **chosen: Any) -> Tensor:
    """The mean over a batch's sequences of the means over their tokens, without padding."""
    total = torch.zeros(())
    for i, completion_mask in enumerate(batch["completion_mask"].bool()):
        if "self_distillation_mask" in batch and not batch["self_distillation_mask"][i]:
            continue
        response = batch["completion_ids"][i][completion_mask]
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        told = batch["teacher_input_ids"][i][batch["teacher_attention_mask"][i].bool()]
        with torch.no_grad():
            teacher = model(told[None]).logits[:, -len(response) - 1 : -1]
        logits = model(torch.cat([prompt, response])[None]).logits[:, -len(response) - 1 : -1]
        total = total + topk_divergence(
            logits, teacher, K, support="student", backend="reference", **chosen
        )
    return total / len(batch["completion_mask"])


CHOICES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"distillation_alpha": 0.5, "distillation_add_tail": True},
        {"divergence": "jsd", "outside": "bucket"},
    ),
    (
        {"distillation_alpha": 1.0, "temperature": 0.8},
        {"divergence": "reverse_kl", "outside": "renormalize", "temperature": 0.8},
    ),
]


@pytest.mark.parametrize(("options", "chosen"), CHOICES)
@pytest.mark.parametrize(
    ("trainer", "config"), [(SDFTTrainer, SDFTConfig), (SDPOTrainer, SDPOConfig)]
)
def test_a_step_on_one_model_is_the_hand_written_one(
    tmp_path: Path, trainer: Any, config: Any, options: dict[str, Any], chosen: dict[str, Any]
) -> None:
    student = llama(0)
    written = copy.deepcopy(student)
    with use_topk_loss(trainer):
        trained = self_distilled(trainer, config, tmp_path, student, **options)
    assert len(trained.batches) == ACCUMULATED
    loss = sum(by_hand(written, batch, **chosen) for batch in trained.batches) / ACCUMULATED
    loss.backward()
    with torch.no_grad():
        for parameter in written.parameters():
            parameter -= RATE * parameter.grad
    assert logged(trained, "loss") == pytest.approx([loss.item()], rel=1e-5)
    assert loss > 1e-3
    assert_same_parameters(trained.model, dict(written.named_parameters()))


@pytest.mark.parametrize(
    ("trainer", "config", "module", "options"),
    [
        (SDFTTrainer, SDFTConfig, sdft_trainer, {}),
        (SDPOTrainer, SDPOConfig, sdpo_trainer, {"distillation_weight": 0.5}),
    ],
)
def test_stale_rollouts_are_weighted_as_by_trl(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainer: Any,
    config: Any,
    module: Any,
    options: dict[str, Any],
) -> None:
    options = {"num_iterations": 2, "max_steps": 2, "distillation_is_clip": 1.5} | options
    calls: list[str] = []

    def counted(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **given: Any) -> Tensor:
            calls.append("TRL")
            return own(*args, **given)

        return call

    name = "compute_topk_self_distillation_loss"
    monkeypatch.setattr(module, name, counted(getattr(module, name)))
    start = llama(0)
    trls = self_distilled(trainer, config, tmp_path, copy.deepcopy(start), **options)
    by_trl = len(calls)
    assert by_trl >= 2
    assert all("old_per_token_logps" in batch for batch in trls.batches)
    monkeypatch.undo()
    with use_topk_loss(trainer):
        trained = self_distilled(trainer, config, tmp_path, copy.deepcopy(start), **options)
    assert len(calls) == by_trl
    assert logged(trained, "loss") == pytest.approx(logged(trls, "loss"), rel=1e-4)
    assert_same_parameters(trained.model, dict(trls.model.named_parameters()), 1e-5)
