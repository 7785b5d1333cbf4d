"""Megatron-LM's ``topk_kl_div`` with its ghost token: restated, it is in no package; one rank."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_kernels import TopK, topk_divergence
from opd_kernels.integrations import megatron

sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))
from cached_logits import as_megatron


def calls(shape: Any) -> dict[str, Callable[[], object]]:
    """Forward and backward of each, on logits (S, 1, V) and float16 log-probs (S, 1, K)."""
    generator = torch.Generator().manual_seed(0)

    def random() -> Tensor:
        return 2 * torch.randn(shape.rows, 1, shape.vocab, generator=generator)

    student = random().to(shape.dtype).requires_grad_()
    logprobs, ids = random().log_softmax(-1).topk(shape.k)
    logprobs = logprobs.half()
    loss_mask = torch.ones(1, shape.rows)
    topk = TopK(ids, logprobs, logsumexp=torch.zeros(shape.rows, 1))

    def graded(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, student)

    def masked(losses: Tensor) -> Tensor:
        return (losses.view(-1).float() * loss_mask.view(-1)).sum()

    def bare() -> Tensor:
        return topk_divergence(
            student, topk, divergence="forward_kl", outside="bucket", reduction="sum"
        )

    return {
        "the trainer's own": lambda: graded(masked(as_megatron(student, logprobs, ids))),
        "adapter": lambda: graded(
            masked(megatron.topk_kl_div(student, logprobs, ids, 1, 0, None, True))
        ),
        "bare call": lambda: graded(bare()),
    }
