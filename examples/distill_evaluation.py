"""What the demo is judged by: divergences on fixed held-out sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
            logits,
            teacher_logits,
            k,
            mask=chunk.mask,
            reduction="none",
            return_stats=("student_mass", "teacher_mass"),
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
