"""verl's forward KL with its metrics, its adapter, and a bare call with the same statistics.

verl runs under autocast. That of GPUs computes ``log_softmax`` in float32, that of CPUs does not:
here it is as on GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"

import torch
from torch.nn.functional import log_softmax

from opd_kernels import TopK, topk_divergence
from opd_kernels.integrations import verl

if TYPE_CHECKING:
    from __main__ import Shape

OWN, OURS = "forward_kl_topk", "opd_topk_forward_kl_truncate"
FLOOR = -10.0  # verl's default
AS_ON_GPUS = mock.patch(
    "torch.nn.functional.log_softmax", partial(log_softmax, dtype=torch.float32)
)


def calls(shape: Shape) -> dict[str, Callable[[], object]]:
    """The rows are packed, as under FSDP; autocast as in verl's engine."""
    from verl.trainer.distillation import losses
    from verl.workers.config import DistillationConfig, DistillationLossConfig

    verl.register()
    torch.manual_seed(0)
    rows, vocab, k, dtype = shape
    logprobs, ids = torch.randn(rows, vocab).mul_(3).log_softmax(-1).topk(k)
    student = torch.randn(1, rows, vocab).to(dtype).requires_grad_()
    ends = torch.tensor([0, rows // 3, rows])
    names = ("teacher_logprobs", "teacher_ids")
    data: dict[str, Any] = {
        name: torch.nested.nested_tensor_from_jagged(values, ends)
        for name, values in zip(names, (logprobs, ids.int()), strict=True)
    }
    data["distillation_only"] = True
    upstream = torch.full((1, rows), 1 / rows)

    def trained(mode: str, name: str) -> Callable[[], object]:
        loss = DistillationLossConfig(
            loss_mode=mode, topk=k, use_policy_gradient=False, log_prob_min_clamp=FLOOR
        )
        config = DistillationConfig(distillation_loss=loss)

        def call() -> object:
            with torch.autocast("cpu", torch.bfloat16), AS_ON_GPUS:
                found = losses.compute_topk_loss(
                    SimpleNamespace(strategy="fsdp2"), config, data, student, "thd"
                )
            return found, torch.autograd.grad(found[name], student, upstream)

        return call

    def bare() -> object:
        teacher = TopK.from_tensors(logprobs[None], ids[None])
        loss, stats = topk_divergence(
            student,
            teacher,
            divergence=verl.MODES[OURS].divergence._replace(logp_floor=FLOOR),
            outside="truncate",
            reduction="none",
            return_stats=("teacher_mass", "student_mass", "overlap", "valid_k"),
        )
        return stats, torch.autograd.grad(loss, student, upstream)

    return {
        "the trainer's own": trained(OWN, "distillation_losses"),
        "adapter": trained(OURS, verl.LOSSES),
        "bare call": bare,
    }
