"""Tiny pairs for ``TopKDistillationTrainer``, and its steps written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opd_kernels import topk_divergence
from opd_kernels.integrations.trl import TopKDistillationConfig, TopKDistillationTrainer

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
        total = total + topk_divergence(
            student(whole).logits,
            teacher_logits,
            mask=mask,
            token_ids=F.pad(whole[:, 1:], (0, 1)),
            reduction="sum",
            backend="reference",
            **{"k": K, "outside": "bucket"} | options,
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
