"""NeMo-RL's mixed KL of a micro-batch, with its formula restated for the trainer's own."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from opd_kernels import TopK, mixed, topk_divergence
from opd_kernels.integrations.nemo_rl import DistillationLossFn


def restated(logits: Tensor, data: dict[str, Tensor], toks: Tensor) -> tuple[Tensor, dict]:
    """What NeMo-RL's loss computes of whole logits, in its order and dtypes."""
    student = logits.to(torch.float32).gather(-1, data["teacher_topk_indices"])
    logp = student.log_softmax(-1)[:, :-1]
    logq = data["teacher_topk_logits"].to(torch.float32).log_softmax(-1)[:, :-1]
    p, q = logp.exp(), logq.exp()
    rows = (0.5 * q * (logq - logp) + 0.5 * p * (logp - logq)).sum(-1)
    mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
    loss = (rows * mask).sum() / (toks + 1e-8)
    return loss, {"loss": loss.item(), "num_valid_samples": len(logits)}


def calls(shape: Any) -> dict[str, Callable[[], object]]:
    """Forward and backward of one sequence of ``rows`` positions."""
    torch.manual_seed(0)
    logits = (2 * torch.randn(1, shape.rows, shape.vocab)).to(shape.dtype).requires_grad_()
    entries, ids = (2 * torch.randn(1, shape.rows, shape.vocab)).topk(shape.k)
    data = {
        "input_ids": torch.zeros(1, shape.rows, dtype=torch.long),
        "token_mask": torch.ones(1, shape.rows, dtype=torch.long),
        "sample_mask": torch.ones(1),
        "teacher_topk_logits": entries,
        "teacher_topk_indices": ids,
    }
    toks = torch.tensor(shape.rows - 1.0)
    loss_fn = DistillationLossFn(
        SimpleNamespace(kl_type="mixed", mixed_kl_weight=0.5, zero_outside_topk=False)
    )
    teacher, mask = TopK(ids, entries), (torch.arange(shape.rows) < shape.rows - 1)[None]

    def own() -> object:
        loss, _ = restated(logits, data, toks)
        return torch.autograd.grad(loss, logits)

    def adapter() -> object:
        loss, _ = loss_fn(logits, data, None, toks)
        return torch.autograd.grad(loss, logits)

    def bare() -> object:
        loss = topk_divergence(logits, teacher, divergence=mixed(), mask=mask, normalizer=toks)
        return torch.autograd.grad(loss, logits)

    return {"the trainer's own": own, "adapter": adapter, "bare call": bare}
