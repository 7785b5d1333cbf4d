"""``TopKDistillationTrainer``: TRL's training with this loss, beside hand-written loops."""

from __future__ import annotations

import copy
import math
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from teacher_http import Teacher, model_logprobs, serving
from torch import Tensor
from torch.distributed.utils import _to_kwargs
from torch.utils._pytree import tree_leaves

from opd_kernels import topk_rkl

pytest.importorskip("trl", reason="the trainer needs TRL")

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
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
    PreTrainedTokenizerFast,
)
from trl import DistillationConfig

from opd_kernels.integrations.server import (
    TeacherServer,
    TeacherServerError,
    TeacherUnavailableError,
)
from opd_kernels.integrations.trl import TopKDistillationConfig, TopKDistillationTrainer
from opd_kernels.integrations.trl import trainer as adapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

V, K = 64, 6
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(V - 3))]
PROMPTS = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10", "w11", "w12 w13", "w14", "w15 w16"]
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.3,
}


@pytest.fixture(autouse=True)
def _one_thread(threads: int) -> Iterator[None]:
    torch.set_num_threads(1)  # the tensors are tiny
    with torch.random.fork_rng(devices=[]):
        yield


def tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def llama(seed: int, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SMALL | options))


def config(folder: Path, **options: Any) -> TopKDistillationConfig:
    defaults = {
        "k": K,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 8,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "stats_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return TopKDistillationConfig(str(folder), **defaults | options)


def fixed_response(prompt: list[int]) -> list[int]:
    """A response that depends on its prompt alone; lengths differ, the last token may be eos."""
    generator = torch.Generator().manual_seed(sum(prompt))
    length = 2 + sum(prompt) % 5
    tokens = torch.randint(3, V, (length,), generator=generator).tolist()
    return [*tokens[:-1], 1] if length % 2 else tokens


class WithFixedResponses(TopKDistillationTrainer):
    """Rollouts do not depend on the student."""

    def _generate_single_turn(self, prompt_ids: list, *_: Any) -> list[list[int]]:
        return [fixed_response(list(prompt)) for prompt in prompt_ids]


def trainer(
    student: Any, teacher: Any, args: Any, prompts: list[str] = PROMPTS, **options: Any
) -> TopKDistillationTrainer:
    options = {"processing_class": tokenizer()} | options
    data = Dataset.from_dict({"prompt": prompts})
    return WithFixedResponses(student, teacher, args, train_dataset=data, **options)


def sequences(prompts: list[str]) -> list[tuple[list[int], list[int]]]:
    ids = [tokenizer()(prompt)["input_ids"] for prompt in prompts]
    return [(prompt, fixed_response(prompt)) for prompt in ids]


def hand_written_loss(
    student: Any,
    teacher: Any,
    prompts: list[str],
    counted: Callable[[list[int]], list[bool]] = lambda response: [True] * len(response),
    **options: Any,
) -> tuple[Tensor, int]:
    """(loss, tokens): a mean over all counted tokens, one sequence at a time, without padding."""
    total, tokens = torch.zeros(()), 0
    for prompt, response in sequences(prompts):
        whole = torch.tensor([prompt + response])
        with torch.no_grad():
            teacher_logits = teacher(whole).logits
        mask = torch.zeros(1, whole.shape[1], dtype=torch.bool)
        mask[0, len(prompt) - 1 : -1] = torch.tensor(counted(response))
        total = total + topk_rkl(
            student(whole).logits,
            teacher_logits,
            mask=mask,
            reduction="sum",
            backend="reference",
            **{"k": K} | options,
        )
        tokens += int(mask.sum())
    return total / tokens, tokens


def hand_written_step(
    student: Any, teacher: Any, prompts: list[str] = PROMPTS[:4], rate: float = 0.5, **options: Any
) -> tuple[float, dict[str, Tensor]]:
    """(loss, parameters after a step of SGD) of one batch of all prompts."""
    student = copy.deepcopy(student)
    loss, _ = hand_written_loss(student, teacher, prompts, **options)
    loss.backward()
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    return loss.item(), dict(student.named_parameters())


def assert_same_parameters(
    model: Any, expected: dict[str, Tensor], tolerance: float = 2e-6
) -> None:
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), expected[name].detach(), rtol=1e-4, atol=tolerance, msg=name
        )


def logged(trained: TopKDistillationTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trained.state.log_history if name in entry]


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
    torch.distributed.destroy_process_group()


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


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "logits"])
@pytest.mark.parametrize(("student_size", "teacher_size"), [(64, 80), (80, 64)])
def test_vocabularies_may_have_different_sizes(
    tmp_path: Path, student_size: int, teacher_size: int, hidden: bool
) -> None:
    student, teacher = llama(0, vocab_size=student_size), llama(1, vocab_size=teacher_size)
    _, expected = hand_written_step(student, teacher, vocab_size=64)
    args = config(tmp_path, shuffle_dataset=False, use_hidden_states=hidden)
    trainer(student, teacher, args).train()
    assert_same_parameters(student, expected)


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
    moved = {"linear_topk_rkl": loss, "topk_rkl": loss}
    moved["own_logits"] = lambda model, sequences: own_logits(model, sequences).to(
        "meta" if model is student else "cpu"
    )
    for name, function in moved.items():
        monkeypatch.setattr(adapter, name, function)
    head = adapter.Head.of(student, "student")._replace(weight=torch.empty(V, 32, device="meta"))
    of = adapter.Head.of
    args = config(tmp_path, use_hidden_states=hidden, stats_steps=0)
    trained = trainer(student, llama(1), args)
    monkeypatch.setattr(
        adapter.Head, "of", lambda model, role: head if role == "student" else of(model, role)
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
    with pytest.raises(ValueError, match=f"the {role}'s logits.*use_hidden_states=False"):
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


def test_masses_are_logged_every_stats_steps(tmp_path: Path) -> None:
    student, teacher = llama(0), llama(1)
    masses = []
    for prompt, response in sequences(PROMPTS[:4]):
        whole = torch.tensor([prompt + response])
        rows = slice(len(prompt) - 1, -1)
        with torch.no_grad():
            q = teacher(whole).logits[0, rows].softmax(-1)
            p = student(whole).logits[0, rows].softmax(-1)
        ids = q.topk(K).indices
        masses.append(torch.stack([p.gather(-1, ids).sum(-1), q.gather(-1, ids).sum(-1)]))
    expected = torch.cat(masses, 1).mean(1)
    args = config(tmp_path, shuffle_dataset=False, max_steps=3, stats_steps=2)
    trained = trainer(student, teacher, args)
    trained.train()
    student_mass, teacher_mass = logged(trained, "student_mass"), logged(trained, "teacher_mass")
    # Two micro-batches of the first step have unequal lengths: the mean is of their means.
    assert student_mass[0] == pytest.approx(expected[0].item(), rel=0.05)
    assert teacher_mass[0] == pytest.approx(expected[1].item(), rel=0.05)
    assert [entry["step"] for entry in trained.state.log_history if "valid_k" in entry] == [1, 3]
    assert logged(trained, "valid_k") == [K, K]
    assert "entropy" not in trained.state.log_history[0]


def test_no_masses_are_measured_where_stats_steps_is_0(tmp_path: Path) -> None:
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


def test_the_students_divergence_from_the_teacher_falls(tmp_path: Path) -> None:
    teacher = llama(1)
    student = copy.deepcopy(teacher)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    before = full_reverse_kl(student, teacher)
    args = config(tmp_path, max_steps=40, optim="adamw_torch", learning_rate=1e-2, k=16)
    trained = generating(student, teacher, args)
    assert trained.generation_config.top_p == 0.9
    trained.train()
    losses = logged(trained, "loss")
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
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


# --- a teacher behind a server


@pytest.fixture
def served() -> Iterator[tuple[Teacher, LlamaForCausalLM]]:
    model = llama(1).eval()
    with serving(model_logprobs(model)) as teacher:
        yield teacher, model


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "logits"])
@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_a_server_gives_the_gradients_of_the_teacher_in_process(
    tmp_path: Path, served: tuple[Teacher, Any], api: str, hidden: bool
) -> None:
    teacher, model = served
    student = llama(0)
    expected_loss, expected = hand_written_step(student, model)
    args = config(
        tmp_path,
        shuffle_dataset=False,
        use_hidden_states=hidden,
        teacher_server_url=teacher.url,
        teacher_server_model="teacher",
        teacher_server_api=api,
    )
    trained = trainer(student, None, args)
    trained.train()
    assert logged(trained, "loss") == pytest.approx([expected_loss], rel=1e-4)
    assert_same_parameters(student, expected)
    assert len(teacher.requests) == 4  # each sequence of the step once
    assert 0 < logged(trained, "teacher_mass")[0] <= 1


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_temperatures_apply_to_a_servers_log_probs(
    tmp_path: Path, served: tuple[Teacher, Any], api: str
) -> None:
    teacher, model = served
    student = llama(0)
    options = {"temperature": 0.7, "teacher_temperature": 1.3}
    _, expected = hand_written_step(student, model, **options)
    args = config(
        tmp_path,
        shuffle_dataset=False,
        teacher_server_url=teacher.url,
        teacher_server_api=api,
        **options,
    )
    trainer(student, None, args).train()
    assert_same_parameters(student, expected)


def test_images_with_a_server_are_refused(
    tmp_path: Path, served: tuple[Teacher, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = adapter.DistillationTrainer._generate_and_score_completions
    monkeypatch.setattr(
        adapter.DistillationTrainer,
        "_generate_and_score_completions",
        lambda self, inputs: generate(self, inputs) | {"pixel_values": torch.zeros(4, 3, 8, 8)},
    )
    args = config(tmp_path, teacher_server_url=served[0].url)
    with pytest.raises(ValueError, match="has images"):
        trainer(llama(0), None, args).train()


def test_options_reach_the_servers_client(tmp_path: Path, served: tuple[Teacher, Any]) -> None:
    teacher, _ = served
    options = {"teacher_server_url": teacher.url, "teacher_server_timeout": 0.2}
    teacher.script = [1.0]
    args = config(tmp_path, teacher_server_retries=0, **options)
    with pytest.raises(TeacherUnavailableError, match="timed out"):
        trainer(llama(0), None, args).train()
    teacher.script, teacher.most_at_once = [0.05] * 4, 0
    args = config(tmp_path, teacher_server_parallel=1, **options)
    trainer(llama(0), None, args).train()
    assert teacher.most_at_once == 1


def test_masked_tokens_take_no_part_with_a_server(
    tmp_path: Path, served: tuple[Teacher, Any]
) -> None:
    teacher, model = served
    student = llama(0)
    _, expected = hand_written_step(
        student, model, counted=lambda response: [token != 1 for token in response]
    )
    args = config(tmp_path, shuffle_dataset=False, masked_ids=[1])
    server = TeacherServer(teacher.url, k=K)
    trainer(student, None, args, teacher_server=server).train()
    assert_same_parameters(student, expected)


def test_a_position_without_entries_raises(tmp_path: Path, served: tuple[Teacher, Any]) -> None:
    teacher, _ = served

    def forget(answer: dict) -> dict:
        answer["choices"][0]["prompt_logprobs"][-1] = None
        return answer

    teacher.change = forget
    server = TeacherServer(teacher.url, k=K)
    with pytest.raises(TeacherServerError, match=r"no 6 entries for 4 of \d+ response tokens"):
        trainer(llama(0), None, config(tmp_path), teacher_server=server).train()


def test_masking_failures_leaves_out_what_failed_and_divides_by_the_rest(
    tmp_path: Path, served: tuple[Teacher, Any]
) -> None:
    teacher, model = served
    student = llama(0)
    _, expected = hand_written_step(student, model, PROMPTS[1:4])
    teacher.script = [(500, "broken")]
    server = TeacherServer(teacher.url, k=K, retries=0, parallel=1, on_failure="mask")
    args = config(tmp_path, shuffle_dataset=False)
    with pytest.warns(UserWarning, match="left out 1 of 4 .*sequence 0.*broken"):
        trainer(student, None, args, teacher_server=server).train()
    assert_same_parameters(student, expected)


@pytest.mark.parametrize("behind", ["in process", "behind a server"])
def test_the_example_runs(
    tmp_path: Path,
    served: tuple[Teacher, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    behind: str,
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "examples")
    import distill_trl

    teacher, _ = served
    teacher.logprobs = model_logprobs(distill_trl.tiny_model(2))
    server = ["--teacher-server", teacher.url] if behind == "behind a server" else []
    options = ["--batch", "2", "--accumulation", "2", "--k", "8", "--masked-tokens", "<eos>"]
    distill_trl.main(["--smoke", "--output", str(tmp_path), *options, *server])
    assert len(teacher.requests) == (12 if server else 0)
    assert "student_mass" in capsys.readouterr().out
    LlamaForCausalLM.from_pretrained(tmp_path)


def test_the_example_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "examples")
    import distill_trl

    with pytest.raises(SystemExit):
        distill_trl.main(["--student", "somewhere"])
    assert "--dataset, --teacher or --teacher-server is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        distill_trl.main(["--smoke", "--teacher", "a", "--teacher-server", "http://b"])
    assert "--teacher and --teacher-server are both given" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        distill_trl.main(["--smoke", "--teacher", "a", "--teacher-model", "b"])
    assert "--teacher-model needs --teacher-server" in capsys.readouterr().err


def test_a_batch_of_which_nothing_is_scored_raises_even_where_failures_are_masked(
    tmp_path: Path, served: tuple[Teacher, Any]
) -> None:
    teacher, _ = served
    teacher.script = [(500, "broken")] * 4
    server = TeacherServer(teacher.url, k=K, retries=0, on_failure="mask")
    trained = trainer(llama(0), None, config(tmp_path), teacher_server=server)
    with (
        pytest.warns(UserWarning, match="left out 4 of 4"),
        pytest.raises(TeacherServerError, match=r"none of the batch's \d+ response tokens"),
    ):
        trained.train()


@pytest.mark.parametrize("options", [{"banned_ids": [*range(40)]}, {"vocab_size": 40}, {}])
def test_entries_of_a_server_that_are_not_replaced_are_told(
    tmp_path: Path, served: tuple[Teacher, Any], options: dict
) -> None:
    args = config(tmp_path, teacher_server_url=served[0].url, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained = trainer(llama(0), None, args)
        trained.train()
    told = any("dropped and not replaced" in str(warning.message) for warning in caught)
    assert told == bool(options)
    assert (logged(trained, "valid_k")[0] < K) == bool(options)


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.5}, "beta is 0.5"),
        ({"k": 1}, "k is 1"),
        ({"k": 2.5}, "k is 2.5, expected an int"),
        ({"stats_steps": "8"}, "stats_steps is '8', expected an int"),
        ({"masked_tokens": "<"}, "masked_tokens is '<', expected a list"),
        ({"stats_steps": -1}, "stats_steps is -1"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"masked_ids": [3, -1]}, "masked_ids has -1"),
        ({"banned_ids": [-100, 3]}, "banned_ids has -100"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"teacher_temperature": 0.0}, "teacher_temperature is 0.0"),
        ({"teacher_server_model": "x"}, "teacher_server_model needs teacher_server_url"),
        ({"teacher_server_retries": 9}, "teacher_server_retries needs teacher_server_url"),
    ],
)
def test_options_that_are_not_allowed(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_defaults_are_the_papers() -> None:
    args = TopKDistillationConfig("unused", use_cpu=True)
    assert (args.k, args.temperature, args.top_p) == (32, 1.0, 0.9)


def test_one_teacher_and_no_more(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="given as nothing"):
        trainer(llama(0), None, config(tmp_path))
    server = TeacherServer("http://127.0.0.1:9", k=K)
    with pytest.raises(ValueError, match="teacher_model and teacher_server,"):
        trainer(llama(0), llama(1), config(tmp_path), teacher_server=server)
    named = config(tmp_path, teacher_model_name_or_path="somewhere")
    with pytest.raises(ValueError, match=r"teacher_model and args\.teacher_model_name_or_path,"):
        trainer(llama(0), llama(1), named)
    both = config(tmp_path, teacher_server_url="http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"teacher_server and args\.teacher_server_url,"):
        trainer(llama(0), None, both, teacher_server=server)
    with pytest.raises(ValueError, match=r"asks for 6 entries, args\.k is 7"):
        trainer(llama(0), None, config(tmp_path, k=7), teacher_server=server)


@pytest.mark.parametrize(
    "options",
    [{"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, {"teacher_model_revision": "main"}],
)
def test_options_for_loading_are_refused_beside_a_teacher_that_is_loaded(
    tmp_path: Path, options: dict
) -> None:
    with pytest.raises(ValueError, match="loaded by name, teacher_model is given"):
        trainer(llama(0), llama(1), config(tmp_path, **options))


def test_a_teacher_that_shares_what_the_student_trains_is_refused(tmp_path: Path) -> None:
    student, teacher = llama(0), llama(1)
    with pytest.raises(ValueError, match=r"shares \d+ parameters with the student"):
        trainer(student, student, config(tmp_path))
    student.lm_head = teacher.lm_head
    with pytest.raises(ValueError, match=r"shares 1 parameters.*lm_head\.weight"):
        trainer(student, teacher, config(tmp_path))
    student.lm_head.requires_grad_(False)
    trainer(student, teacher, config(tmp_path))
    assert student.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"k": 60}, 50),
        ({"k": 47, "banned_ids": [3, 3, 7, 49, 50, 63, 1000]}, 47),
        ({"k": 48, "banned_ids": [3, 3, 7, 49, 50, 63, 1000]}, 47),
        ({"k": 10, "vocab_size": 9}, 9),
        ({"banned_ids": [*range(V)]}, 0),
    ],
)
def test_a_k_beyond_the_ids_that_can_be_selected_is_refused_before_any_step(
    tmp_path: Path, options: dict, allowed: int
) -> None:
    teacher, args = llama(1, vocab_size=50), config(tmp_path, **options)
    if args.k <= allowed:
        trainer(llama(0), teacher, args)
        return
    with pytest.raises(ValueError, match=f"k is {args.k}, allowed is at most {allowed},"):
        trainer(llama(0), teacher, args)


def test_another_config_is_refused(tmp_path: Path) -> None:
    plain = DistillationConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="a DistillationConfig, expected a TopKDistillationConfig"):
        trainer(llama(0), llama(1), plain)


def test_a_trl_without_the_hooks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(adapter.DistillationTrainer, "_get_last_hidden_state")
    with pytest.raises(ImportError, match=r"has no .*_get_last_hidden_state.*install trl==1.16.0"):
        trainer(llama(0), llama(1), config(tmp_path))


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
