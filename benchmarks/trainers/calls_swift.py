"""ms-swift's GKD step with a local teacher: its top-K of whole logits, its loss, a backward.

ms-swift selects in one call and computes the loss in another; so do adapter and bare calls. One
fused call for both, which its convention leaves no room for, took 0.86 of the adapter's time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from swift.rlhf_trainers import gkd_loss as peer
from swift.rlhf_trainers.gkd_loss import TeacherOutput

from opd_kernels import jsd, select_topk, topk_divergence
from opd_kernels.integrations import swift

if TYPE_CHECKING:
    from __main__ import Shape

BETA = 0.5


def calls(shape: Shape) -> dict[str, Callable[[], object]]:
    """Every row counts."""
    torch.manual_seed(0)
    size = (1, shape.rows, shape.vocab)
    student = torch.randn(size, dtype=shape.dtype, requires_grad=True)
    whole = torch.randn(size, dtype=shape.dtype)
    labels = torch.ones(1, shape.rows, dtype=torch.long)
    own_loss, own_topk = peer.gkd_loss, TeacherOutput.to_topk
    swift.install()
    new_topk = TeacherOutput.to_topk

    def step(
        loss: Callable[..., tuple[torch.Tensor, torch.Tensor]], topk: Callable[..., object]
    ) -> object:
        teacher = TeacherOutput(full_logits=whole, labels=labels.clone())
        total, count = loss(student, topk(teacher, shape.k), labels, BETA, 1.0)
        return torch.autograd.grad(total / count, student)

    def bare() -> object:
        mask = labels != -100
        support = select_topk(whole, shape.k, mask=mask)
        loss = topk_divergence(student, support, divergence=jsd(BETA), mask=mask)
        return torch.autograd.grad(loss, student)

    return {
        "the trainer's own": lambda: step(own_loss, own_topk),
        "adapter": lambda: step(swift.gkd_loss, new_topk),
        "bare call": bare,
    }
