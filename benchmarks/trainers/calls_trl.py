"""TRL's SDFT and SDPO: the student's K best, renormalised, JSD; the loss of each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trl.experimental.sdft.loss_utils import compute_topk_self_distillation_loss

from opd_kernels import jsd, topk_divergence
from opd_kernels.integrations.trl import topk_self_distillation_loss


def calls(shape: Any) -> dict[str, Callable[[], object]]:
    """Forward and backward by TRL's function, by the one in its place, and by the loss itself."""
    generator = torch.Generator().manual_seed(0)

    def logits(scale: float) -> Tensor:
        drawn = torch.randn(shape.rows, shape.vocab, generator=generator)
        return (scale * drawn).to(shape.dtype)

    student, teacher = logits(2.0).requires_grad_(), logits(2.0)
    options = {
        "distillation_topk": shape.k,
        "distillation_alpha": 0.5,
        "distillation_add_tail": False,
    }

    def graded(rows: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(rows().mean(), student)

    return {
        "the trainer's own": graded(
            lambda: compute_topk_self_distillation_loss(student, teacher, **options)
        ),
        "adapter": graded(lambda: topk_self_distillation_loss(student, teacher, **options)),
        "bare call": graded(
            lambda: topk_divergence(
                student,
                teacher,
                shape.k,
                divergence=jsd(0.5),
                support="student",
                reduction="none",
            )
        ),
    }
