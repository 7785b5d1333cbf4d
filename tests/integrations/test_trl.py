"""``TopKDistillationTrainer``: TRL's training with this loss, beside hand-written loops."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.utils import _to_kwargs
from torch.utils._pytree import tree_leaves

pytest.importorskip("trl", reason="the trainer needs TRL")

import tiny_trl
from datasets import Dataset
from ranks import leave
from tiny_trl import (
    PROMPTS,
    SMALL,
    WORDS,
    K,
    V,
    assert_same_parameters,
    config,
    hand_written_loss,
    hand_written_step,
    llama,
    logged,
    sequences,
    tokenizer,
    trainer,
)
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from opd_kernels.integrations.trl import TopKDistillationTrainer
from opd_kernels.integrations.trl import trainer as adapter

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "logits"])
@pytest.mark.parametrize(("size", "steps"), [(4, 1), (2, 2), (1, 4)])
def test_a_step_is_that_of_one_batch_however_it_is_accumulated(
    tmp_path: Path, size: int, steps: int, hidden: bool
) -> None:
    student, teacher = llama(0), llama(1, hidden_size=24)
    expected_loss, expected = hand_written_step(student, teacher)
    args = config(
        tmp_path,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        shuffle_dataset=False,
        use_hidden_states=hidden,
    )
    trained = trainer(student, teacher, args)
    trained.train()
    assert logged(trained, "loss") == pytest.approx([expected_loss], rel=1e-4)
    assert_same_parameters(student, expected)


def train_on_a_rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
    }
    args = config(folder, per_device_train_batch_size=1, shuffle_dataset=False)
    trained = trainer(llama(0), llama(1, hidden_size=24), args)
    trained.train()
    if rank == 0:
        assert trained.accelerator.num_processes == 2
        measured = {name: logged(trained, name) for name in ("loss", "student_mass", "valid_k")}
        torch.save((trained.model.state_dict(), measured), folder / "result.pt")
    leave()


def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    student, teacher = llama(0), llama(1, hidden_size=24)
    expected_loss, expected = hand_written_step(student, teacher)
    alone = trainer(student, teacher, config(tmp_path, shuffle_dataset=False))
    alone.train()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_on_a_rank, (port, tmp_path), nprocs=2)
    parameters, measured = torch.load(tmp_path / "result.pt")
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, expected[name].detach(), rtol=1e-4, atol=2e-6)
    assert measured["loss"] == pytest.approx([expected_loss], rel=1e-4)
    assert measured["student_mass"] == pytest.approx(logged(alone, "student_mass"), rel=0.05)
    assert measured["valid_k"] == [K]


def test_the_loss_runs_in_wrappers_that_handle_arguments_as_ddp_does_on_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = trainer(llama(0), llama(1), config(tmp_path))
    redirect = trained._forward_redirection

    def redirected(wrapped: Any, unwrapped: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        moved, named = _to_kwargs(args, kwargs, torch.device("cpu"), False)
        assert not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        return redirect(wrapped, unwrapped, method, *moved[0], **named[0])

    monkeypatch.setattr(trained, "_forward_redirection", redirected)
    trained.train()
    assert logged(trained, "loss")[0] > 0


def test_the_teacher_stays_as_it_was(tmp_path: Path) -> None:
    teacher = llama(1)
    before = copy.deepcopy(teacher.state_dict())
    trainer(llama(0), teacher, config(tmp_path)).train()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "logits"])
def test_options_reach_the_loss(tmp_path: Path, hidden: bool) -> None:
    student, teacher = llama(0), llama(1)
    options = {"k": 4, "temperature": 0.7, "teacher_temperature": 1.3, "vocab_size": 50}
    banned = [3, 7, 11]
    _, expected = hand_written_step(student, teacher, banned_ids=banned, **options)
    args = config(
        tmp_path, shuffle_dataset=False, use_hidden_states=hidden, banned_ids=banned, **options
    )
    trainer(student, teacher, args).train()
    assert_same_parameters(student, expected)


MEMBERS: dict[str, dict[str, str]] = {
    "truncate": {"outside": "truncate", "divergence": "forward_kl"},
    "renormalize": {"outside": "renormalize"},
    "forward bucket": {"outside": "bucket", "divergence": "forward_kl"},
    "generalize": {"outside": "generalize"},
    "sample": {"outside": "sample"},
    "student": {"support": "student", "outside": "renormalize"},
    "student bucket": {"support": "student", "outside": "bucket", "divergence": "jsd"},
}


@pytest.mark.parametrize("name", MEMBERS)
def test_members_of_the_family_are_those_of_topk_divergence(tmp_path: Path, name: str) -> None:
    member = MEMBERS[name]
    student, teacher = llama(0), llama(1, vocab_size=V + 8)
    shared = {"temperature": 0.7, "teacher_temperature": 1.3, "k": 4, "banned_ids": [3, 7, 11]}
    # What is sampled is any of the student's ids.
    shared["vocab_size"] = V if name == "sample" else 60
    expected_loss, expected = hand_written_step(student, teacher, **shared, **member)
    chosen = {"loss" if key == "outside" else key: value for key, value in member.items()}
    for hidden, stats_steps in ((True, 0), (True, 1), (False, 1)):
        args = config(
            tmp_path,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            shuffle_dataset=False,
            use_hidden_states=hidden,
            stats_steps=stats_steps,
            top_p=1.0,
            top_k=0,
            **shared,
            **chosen,
        )
        trained = trainer(copy.deepcopy(student), teacher, args)
        trained.train()
        assert logged(trained, "loss") == pytest.approx([expected_loss], rel=1e-4)
        assert_same_parameters(trained.model, expected)


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "logits"])
@pytest.mark.parametrize(("student_size", "teacher_size"), [(64, 80), (80, 64)])
def test_vocabularies_may_have_different_sizes(
    tmp_path: Path, student_size: int, teacher_size: int, hidden: bool
) -> None:
    student, teacher = llama(0, vocab_size=student_size), llama(1, vocab_size=teacher_size)
    _, expected = hand_written_step(student, teacher, vocab_size=student_size)
    args = config(tmp_path, shuffle_dataset=False, use_hidden_states=hidden)
    trainer(student, teacher, args).train()
    assert_same_parameters(student, expected)


FEW = 40  # ids of a teacher that has fewer than there are words


def reads_few(teacher: Any) -> Any:
    """The teacher, with another id that it has in place of those that it lacks."""
    return lambda tokens: teacher(tokens.masked_fill(tokens >= FEW, 7))


def after_unknown(response: list[int]) -> list[bool]:
    return [all(token < FEW for token in response[:at]) for at in range(len(response))]


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "logits"])
def test_what_follows_a_token_that_the_teacher_lacks_takes_no_part(
    tmp_path: Path, hidden: bool
) -> None:
    responses = [response for _, response in sequences(PROMPTS[:4])]
    counted = [after_unknown(response) for response in responses]
    assert [True, False, False, False] in counted
    assert any(response[-1] >= FEW and all(after_unknown(response)) for response in responses)
    kept, total = sum(map(sum, counted)), sum(map(len, counted))
    student, teacher = llama(0), llama(1, vocab_size=FEW)
    loss, expected = hand_written_step(student, reads_few(teacher), counted=after_unknown)
    args = config(tmp_path, shuffle_dataset=False, use_hidden_states=hidden)
    trained = trainer(student, teacher, args)
    with pytest.warns(
        UserWarning, match=r"has token (4|5|6)\d, and the teacher has 40 ids; what foll"
    ):
        trained.train()
    assert logged(trained, "loss") == pytest.approx([loss], rel=1e-4)
    assert_same_parameters(student, expected)
    assert logged(trained, "masked_fraction") == pytest.approx([1 - kept / total])


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "logits"])
@pytest.mark.parametrize("options", [{}, {"vocab_size": 50}], ids=["teacher", "vocab_size"])
def test_sampled_tokens_that_a_side_lacks_make_no_nan(
    tmp_path: Path, hidden: bool, options: dict
) -> None:
    def counted(response: list[int]) -> list[bool]:
        known = [token < options.get("vocab_size", V) for token in response]
        return [a and b for a, b in zip(known, after_unknown(response), strict=True)]

    student, teacher = llama(0), llama(1, vocab_size=FEW)
    _, expected = hand_written_step(
        student, reads_few(teacher), counted=counted, outside="sample", **options
    )
    args = config(
        tmp_path,
        shuffle_dataset=False,
        use_hidden_states=hidden,
        loss="sample",
        top_p=1.0,
        top_k=0,
        **options,
    )
    with pytest.warns(UserWarning, match="and the teacher has 40 ids"):
        trainer(student, teacher, args).train()
    assert_same_parameters(student, expected)


def test_a_padding_token_that_the_teacher_lacks_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_trl, "fixed_response", lambda prompt: [3 + len(prompt), 9, 4])
    student, teacher = llama(0), llama(1, vocab_size=FEW)
    _, expected = hand_written_step(student, teacher)
    padded = tokenizer()
    padded.pad_token = WORDS[V - 1]
    assert padded.pad_token_id >= FEW
    args = config(tmp_path, shuffle_dataset=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a sequence has token")
        trainer(student, teacher, args, processing_class=padded).train()
    assert_same_parameters(student, expected)


def test_prompts_that_the_teacher_cannot_read_are_refused(tmp_path: Path) -> None:
    trained = trainer(llama(0), llama(1, vocab_size=FEW), config(tmp_path), ["w1 w60 w2"] * 8)
    with (
        pytest.warns(UserWarning, match="has token 63, and the teacher has 40 ids"),
        pytest.raises(ValueError, match=r"all of the batch's \d+ response tokens follow one that"),
    ):
        trained.train()


def test_stop_ids_of_generation_configs_are_compared(tmp_path: Path) -> None:
    student, teacher = llama(0), llama(1)
    student.generation_config.eos_token_id = [1, 40]
    options = {"teacher_processing_class": tokenizer()}
    with pytest.warns(UserWarning, match=r"those of one alone \(40\) are masked and banned"):
        trainer(student, teacher, config(tmp_path), **options)
    teacher.generation_config.eos_token_id = [40, 1]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="student and teacher")
        trainer(student, teacher, config(tmp_path), **options)


@pytest.mark.parametrize(
    ("make", "settings", "options"),
    [
        (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 2.0, "head_dim": 8}),
        (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 0.25}),
        (CohereForCausalLM, CohereConfig, {"logit_scale": 4.0}),
        (PhiForCausalLM, PhiConfig, {}),
    ],
    ids=["gemma2", "granite", "cohere", "phi"],
)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_scaled_capped_and_biased_heads_count_as_the_model_has_them(
    tmp_path: Path, make: Any, settings: Any, options: dict, role: str
) -> None:
    torch.manual_seed(2)
    special = make(settings(**SMALL | options))
    if special.lm_head.bias is not None:
        torch.nn.init.normal_(special.lm_head.bias)
    pair = (special, llama(1)) if role == "student" else (llama(0), special)
    _, expected = hand_written_step(*pair)
    trainer(*pair, config(tmp_path, shuffle_dataset=False)).train()
    assert_same_parameters(pair[0], expected, 1e-5)


def gpt2(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    tokens = {"vocab_size": V, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(initializer_range=0.3, **sizes, **tokens, **rates))


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "logits"])
def test_absolute_positions_do_not_count_the_padding(tmp_path: Path, hidden: bool) -> None:
    student, teacher = gpt2(0), gpt2(1)
    _, expected = hand_written_step(student, teacher)
    args = config(tmp_path, shuffle_dataset=False, use_hidden_states=hidden)
    trainer(student, teacher, args).train()
    assert_same_parameters(student, expected, 1e-5)


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "logits"])
def test_all_that_the_loss_gets_lies_where_the_students_head_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: bool
) -> None:
    student, devices = llama(0), set()

    def loss(*values: Any, **options: Any) -> Tensor:
        leaves = tree_leaves((values, options))
        devices.update(leaf.device.type for leaf in leaves if isinstance(leaf, Tensor))
        return sum(parameter.sum() for parameter in student.parameters())

    own_logits = adapter.own_logits
    moved = {"topk_divergence": loss}
    moved["own_logits"] = lambda model, sequences, keep: own_logits(model, sequences, keep).to(
        "meta" if model is student else "cpu"
    )
    for name, function in moved.items():
        monkeypatch.setattr(adapter, name, function)
    of = adapter.model_head
    head = dataclasses.replace(of(student, "student"), weight=torch.empty(V, 32, device="meta"))
    args = config(tmp_path, use_hidden_states=hidden, stats_steps=0)
    trained = trainer(student, llama(1), args)
    monkeypatch.setattr(
        adapter, "model_head", lambda model, role: head if role == "student" else of(model, role)
    )
    trained._heads_are_checked = True
    trained.train()
    assert devices == {"meta"}


def test_tokens_of_tools_take_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = llama(0), llama(1)
    generate = adapter.DistillationTrainer._generate_and_score_completions

    def with_tools(self: Any, inputs: Any) -> dict[str, Any]:
        batch = generate(self, inputs)
        batch["tool_mask"] = batch["completion_mask"].clone()
        batch["tool_mask"][:, 1] = 0
        return batch

    monkeypatch.setattr(adapter.DistillationTrainer, "_generate_and_score_completions", with_tools)
    _, expected = hand_written_step(
        student, teacher, counted=lambda response: [at != 1 for at in range(len(response))]
    )
    trainer(student, teacher, config(tmp_path, shuffle_dataset=False)).train()
    assert_same_parameters(student, expected)


class DoublesItsLogits(LlamaForCausalLM):
    """A model whose configuration does not say what its forward does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_head_that_is_not_what_the_config_says_is_refused(tmp_path: Path, role: str) -> None:
    torch.manual_seed(2)
    special = DoublesItsLogits(LlamaConfig(**SMALL))
    pair = (special, llama(1)) if role == "student" else (llama(0), special)
    with pytest.raises(
        ValueError, match=f"the {role}'s output head.*logits.*use_hidden_states=False"
    ):
        trainer(*pair, config(tmp_path)).train()
    _, expected = hand_written_step(*pair)
    args = config(tmp_path, shuffle_dataset=False, use_hidden_states=False)
    trainer(*pair, args).train()
    assert_same_parameters(pair[0], expected)


def test_a_head_that_is_sharded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = llama(0)
    empty = torch.nn.Linear(32, V, bias=False)
    empty.weight = torch.nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it
    monkeypatch.setattr(student, "get_output_embeddings", lambda: empty)
    with pytest.raises(ValueError, match=r"student's output head.*use_hidden_states=False"):
        trainer(student, llama(1), config(tmp_path)).train()


def test_masked_tokens_take_no_part_at_their_first_occurrence(tmp_path: Path) -> None:
    student, teacher = llama(0), llama(1)
    responses = [response for _, response in sequences(PROMPTS[:4])]
    masked = [responses[0][0], responses[1][1], 1]

    def counted(response: list[int]) -> list[bool]:
        return [t not in masked or t in response[:at] for at, t in enumerate(response)]

    kept = sum(sum(counted(response)) for response in responses)
    total = sum(map(len, responses))
    assert 0 < kept < total
    _, expected = hand_written_step(student, teacher, counted=counted)
    words = [WORDS[i] for i in masked[:2]]
    args = config(tmp_path, shuffle_dataset=False, masked_tokens=words, masked_ids=[1])
    trained = trainer(student, teacher, args)
    trained.train()
    assert_same_parameters(student, expected)
    assert logged(trained, "masked_fraction") == pytest.approx([1 - kept / total])


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "logits"])
def test_statistics_of_the_tokens_that_count_are_logged_every_stats_steps(
    tmp_path: Path, hidden: bool
) -> None:
    student, teacher = llama(0), llama(1)
    rows_of: dict[str, list[Tensor]] = {name: [] for name in adapter.LOGGED}
    for prompt, response in sequences(PROMPTS[:4]):
        whole = torch.tensor([prompt + response])
        rows = slice(len(prompt) - 1, -1)
        with torch.no_grad():
            q = teacher(whole).logits[0, rows].softmax(-1)
            p = student(whole).logits[0, rows].softmax(-1)
        ids, own = q.topk(K).indices, p.topk(K).indices
        rows_of["student_mass"].append(p.gather(-1, ids).sum(-1))
        rows_of["teacher_mass"].append(q.gather(-1, ids).sum(-1))
        rows_of["overlap"].append((ids[:, :, None] == own[:, None]).any(-1).float().mean(-1))
        rows_of["student_entropy"].append(-(p * p.log()).sum(-1))
        rows_of["valid_k"].append(torch.full((len(response),), float(K)))
    # One micro-batch, whose shorter responses are padded: the mean is over the tokens that count.
    args = config(
        tmp_path,
        shuffle_dataset=False,
        max_steps=3,
        stats_steps=2,
        use_hidden_states=hidden,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
    )
    trained = trainer(student, teacher, args)
    trained.train()
    for name, rows in rows_of.items():
        assert logged(trained, name)[0] == pytest.approx(torch.cat(rows).mean().item(), rel=1e-4)
    for name in adapter.LOGGED:
        assert all(math.isfinite(value) for value in logged(trained, name))
    assert [entry["step"] for entry in trained.state.log_history if "valid_k" in entry] == [1, 3]
    assert "entropy" not in trained.state.log_history[0]
    assert "teacher_entropy" not in trained.state.log_history[0]


def test_no_statistics_are_measured_where_stats_steps_is_0(tmp_path: Path) -> None:
    trained = trainer(llama(0), llama(1), config(tmp_path, stats_steps=0))
    trained.train()
    assert not logged(trained, "student_mass")


def full_reverse_kl(student: Any, teacher: Any) -> float:
    total, tokens = 0.0, 0
    for prompt, response in sequences(PROMPTS):
        whole, rows = torch.tensor([prompt + response]), slice(len(prompt) - 1, -1)
        with torch.no_grad():
            p = student(whole).logits[0, rows].log_softmax(-1)
            q = teacher(whole).logits[0, rows].log_softmax(-1)
        total += (p.exp() * (p - q)).sum().item()
        tokens += len(response)
    return total / tokens


def generating(
    student: Any, teacher: Any, args: Any, prompts: list[str] = PROMPTS
) -> TopKDistillationTrainer:
    """Rollouts are the student's own, as TRL samples them."""
    data = Dataset.from_dict({"prompt": prompts})
    return TopKDistillationTrainer(
        student, teacher, args, train_dataset=data, processing_class=tokenizer()
    )


# What is outside of 16 of 64 ids is half of the bucket's loss, and falls more slowly.
@pytest.mark.parametrize(("loss", "share"), [("renormalize", 0.6), ("bucket", 0.85)])
def test_the_students_divergence_from_the_teacher_falls(
    tmp_path: Path, loss: str, share: float
) -> None:
    teacher = llama(1)
    student = copy.deepcopy(teacher)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    before = full_reverse_kl(student, teacher)
    options = {"max_steps": 40, "optim": "adamw_torch", "learning_rate": 1e-2, "k": 16}
    args = config(tmp_path, loss=loss, **options)
    trained = generating(student, teacher, args)
    assert trained.generation_config.top_p == 0.9
    trained.train()
    losses = logged(trained, "loss")
    assert sum(losses[-5:]) < share * sum(losses[:5])
    assert full_reverse_kl(student, teacher) < 0.8 * before


def test_half_precision_and_checkpointing_as_trl_has_them_by_default(tmp_path: Path) -> None:
    student = llama(0)
    expected_loss, _ = hand_written_step(student, llama(1))
    args = config(tmp_path, bf16=None, shuffle_dataset=False)
    assert args.bf16
    assert args.gradient_checkpointing
    seen = []
    student.model.layers[0].mlp.register_forward_hook(
        lambda _, __, output: seen.append((output.dtype, torch.is_grad_enabled()))
    )
    trained = trainer(student, llama(1), args)
    trained.train()
    assert (torch.bfloat16, True) in seen
    assert logged(trained, "loss") == pytest.approx([expected_loss], rel=0.05)
    assert logged(trained, "grad_norm")[0] > 0


def test_every_parameter_gets_a_gradient_under_autocast_from_the_first_step(tmp_path: Path) -> None:
    student = llama(0)
    before = copy.deepcopy(student.state_dict())
    args = config(tmp_path, bf16=True, max_steps=1)
    trainer(student, llama(1), args).train()
    still = [n for n, value in student.state_dict().items() if torch.equal(value, before[n])]
    assert not still


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    options |= {"learning_rate": 1e-2, "max_steps": 4}
    prompts = 2 * PROMPTS  # one epoch: TRL's sampler starts anew on resumption
    whole = llama(0)
    generating(whole, llama(1), config(tmp_path / "whole", **options), prompts).train()
    resumed = llama(0)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    generating(resumed, llama(1), config(tmp_path / "resumed", **options), prompts).train(
        resume_from_checkpoint=str(checkpoint)
    )
    assert_same_parameters(resumed, dict(whole.named_parameters()), 0.0)
    untrained = dict(llama(0).named_parameters())
    assert not torch.equal(whole.lm_head.weight, untrained["lm_head.weight"])


def test_evaluation_of_one_batch_is_the_mean_over_its_tokens(tmp_path: Path) -> None:
    student, teacher = llama(0), llama(1)
    expected, _ = hand_written_loss(student, teacher, PROMPTS[:4])
    data = Dataset.from_dict({"prompt": PROMPTS[:4]})
    args = config(tmp_path, per_device_eval_batch_size=4)
    metrics = trainer(student, teacher, args, eval_dataset=data).evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_other_tokenizers_warn_with_the_comparison(tmp_path: Path) -> None:
    other = tokenizer([*WORDS[:10], "x", *WORDS[11:]])
    with pytest.warns(UserWarning, match="different tokenizers"):
        trainer(llama(0), llama(1), config(tmp_path), teacher_processing_class=other)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="student and teacher")
        trainer(llama(0), llama(1), config(tmp_path), teacher_processing_class=tokenizer())


def test_a_teacher_by_name_is_loaded_in_its_dtype_with_its_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    llama(1).bfloat16().save_pretrained(folder)
    tokenizer([*WORDS[:10], "x", *WORDS[11:]]).save_pretrained(folder)
    with pytest.warns(UserWarning, match="different tokenizers"):
        trained = trainer(llama(0), None, config(tmp_path, teacher_model_name_or_path=str(folder)))
    assert trained.teacher_model.dtype == torch.bfloat16
    trained.train()
    assert math.isfinite(logged(trained, "loss")[0])


def test_a_peft_student_trains_its_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters need PEFT")
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    student, teacher = llama(0), llama(1)
    expected_loss, _ = hand_written_step(student, teacher)
    trained = trainer(
        student, teacher, config(tmp_path, shuffle_dataset=False), peft_config=adapters
    )
    trained.train()
    # LoRA starts as the identity, so the first loss is the base model's.
    assert logged(trained, "loss") == pytest.approx([expected_loss], rel=1e-4)
    moved = [n for n, p in trained.model.named_parameters() if "lora_B" in n and p.any()]
    assert len(moved) == 4
