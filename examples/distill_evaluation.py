"""What the demo measures: divergences on fixed held-out sequences, and the time of the loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

import torch
from smollm2 import Responses, response_logits
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from opd_kernels import topk_rkl

CHUNK = 8  # sequences scored at once: a full-vocabulary fp32 tensor is about 100 MB then


class HeldOut:
    """Responses that stay the same before and after training, with the teacher's logits."""

    def __init__(self, sequences: Responses, teacher: PreTrainedModel, dtype: torch.dtype) -> None:
        """Score the sequences with the teacher, once."""
        self.sequences = sequences
        self.chunks = [sequences[i : i + CHUNK] for i in range(0, len(sequences), CHUNK)]
        with torch.no_grad():
            self.teacher_logits = [response_logits(teacher, c, dtype) for c in self.chunks]


def sequence_mean(rows: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, T) over each sequence's unmasked positions, (B,)."""
    return torch.where(mask, rows, 0.0).sum(1) / mask.sum(1)


@torch.no_grad()
def evaluate(
    student: PreTrainedModel, held_out: HeldOut, k: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Per-sequence means (B,) over response tokens, by metric.

    ``reverse_kl`` is KL(student || teacher) and ``forward_kl`` KL(teacher || student), both over
    the full vocabulary; ``student_mass`` and ``teacher_mass`` are what the full distributions hold
    on the teacher's top `k`; ``loss`` is `topk_rkl`.
    """
    parts = []
    for chunk, teacher_logits in zip(held_out.chunks, held_out.teacher_logits, strict=True):
        logits = response_logits(student, chunk, dtype)
        loss, stats = topk_rkl(
            logits, teacher_logits, k, mask=chunk.mask, reduction="none", return_stats=True
        )
        log_p = logits.float().log_softmax(-1)
        log_q = teacher_logits.float().log_softmax(-1)
        rows = {
            "reverse_kl": F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1),
            "forward_kl": F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1),
            "student_mass": stats.student_mass,
            "teacher_mass": stats.teacher_mass,
            "loss": loss,
        }
        parts.append({name: sequence_mean(row, chunk.mask) for name, row in rows.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@dataclass
class Verdict:
    """Whether a per-sequence figure clearly fell, by a paired comparison."""

    relative: float  # fall of the mean, as a fraction of the mean before
    standard_errors: float  # fall of the mean, in standard errors of the paired differences

    MIN_RELATIVE: ClassVar[float] = 0.05
    MIN_STANDARD_ERRORS: ClassVar[float] = 3.0

    @classmethod
    def compare(cls, before: Tensor, after: Tensor) -> Verdict:
        """Judge two (B,) tensors that hold the same sequences in the same order, B >= 2."""
        fall = (before - after).double()
        error = fall.std().item() / math.sqrt(len(fall))
        mean = fall.mean().item()
        return cls(mean / before.double().mean().item(), mean / max(error, 1e-12))

    @property
    def clear(self) -> bool:
        """Whether both thresholds are met."""
        return (
            self.relative >= self.MIN_RELATIVE and self.standard_errors >= self.MIN_STANDARD_ERRORS
        )


def careful_eager(student_logits: Tensor, teacher_logits: Tensor, k: int) -> Tensor:
    """The same loss per row in eager PyTorch, with fp32 copies of K entries a row only."""
    values, ids = torch.topk(teacher_logits, k)
    log_p = student_logits.gather(-1, ids).float().log_softmax(-1)
    log_q = values.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass
class Timing:
    """Forward plus backward of the loss alone, on one training batch of logits."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fused: float  # seconds, median
    eager: float  # seconds, median
    checked: int  # rows whose loss and gradient were compared
    agree: bool


def time_loss(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, k: int, repeats: int = 9
) -> Timing:
    """Time `topk_rkl` beside `careful_eager`, alternating, after comparing what they return."""

    def fused_rows(logits: Tensor) -> Tensor:
        return topk_rkl(logits, teacher_logits, k, mask=mask, reduction="none")

    def fused_mean(logits: Tensor) -> Tensor:
        return topk_rkl(logits, teacher_logits, k, mask=mask)

    def eager_rows(logits: Tensor) -> Tensor:
        return torch.where(mask, careful_eager(logits, teacher_logits, k), 0.0)

    def eager_mean(logits: Tensor) -> Tensor:
        return eager_rows(logits).sum() / mask.sum()

    leaf = student_logits.detach().requires_grad_()
    # torch.topk breaks a tie at the edge of the support as it likes: both answers are right there.
    top = torch.topk(teacher_logits, k + 1).values
    untied = mask & (top[..., k - 1] > top[..., k])
    results = []
    for rows in (fused_rows(leaf), eager_rows(leaf)):
        (gradient,) = torch.autograd.grad(rows.sum(), leaf)
        results.append((rows.detach()[untied], gradient[untied].float()))
    (fused_loss, fused_gradient), (eager_loss, eager_gradient) = results
    # Gradients were rounded to the logits' dtype, 8 bits of mantissa for bf16.
    agree = torch.allclose(fused_loss, eager_loss, rtol=1e-4, atol=1e-5) and torch.allclose(
        fused_gradient, eager_gradient, rtol=2**-7, atol=1e-6
    )
    seconds: dict[Callable[[Tensor], Tensor], list[float]] = {fused_mean: [], eager_mean: []}
    for _ in range(repeats):
        for loss, times in seconds.items():
            start = time.perf_counter()
            torch.autograd.grad(loss(leaf), leaf)
            times.append(time.perf_counter() - start)
    return Timing(
        shape=tuple(student_logits.shape),
        dtype=student_logits.dtype,
        fused=median(seconds[fused_mean]),
        eager=median(seconds[eager_mean]),
        checked=int(untied.sum()),
        agree=agree,
    )
