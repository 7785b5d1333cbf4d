"""Cases, a float64 oracle and error budgets: what it takes to check a build of this package.

A ``Case`` is a few numbers and names, so that a failing one can be printed and run again::

    from opd_kernels.testing import Case, check
    check(Case(rows=(2,), student_vocab=70, teacher_vocab=70, k=5), backend="cpu")

``make_inputs`` turns it into tensors, ``oracle`` computes what must come out and within which
budget, and ``check`` compares.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from opd_kernels.losses import topk_rkl
from opd_kernels.selection import select_topk
from opd_kernels.testing.inputs import Case, Inputs, make_inputs
from opd_kernels.testing.oracle import Expected, oracle

__all__ = ["Case", "Expected", "Inputs", "check", "make_inputs", "oracle"]


def check(case: Case, backend: str | None = None, device: torch.device | str = "cpu") -> None:
    """Raises ``AssertionError`` where a backend's result for the case is not within its budget."""
    inputs = make_inputs(case, device)
    expected = oracle(inputs)
    if case.teacher == "logits":
        _check_selection(inputs, expected, backend)

    leaf = inputs.student.requires_grad_()
    student = leaf * 1 if case.inplace else leaf
    weight = inputs.options["weight"]
    if weight is not None:
        weight.requires_grad_()
    k = inputs.k if case.teacher == "logits" else None
    loss = topk_rkl(
        student, inputs.teacher, k, inplace_grad=case.inplace, backend=backend, **inputs.options
    )
    assert isinstance(loss, Tensor)
    upstream = inputs.upstream if case.reduction == "none" else None
    wanted = [leaf] if weight is None else [leaf, weight]
    grads = torch.autograd.grad(loss, wanted, upstream)

    _check_close(loss, expected.loss, expected.loss_budget, f"loss of {case}")
    assert grads[0].dtype == leaf.dtype, f"gradient has dtype {grads[0].dtype}, logits {leaf.dtype}"
    _check_close(grads[0], expected.grad, expected.grad_budget, f"gradient of {case}")
    assert bool((grads[0].cpu()[torch.from_numpy(expected.grad_budget == 0)] == 0).all())
    if weight is not None:
        _check_close(grads[1], expected.weight_grad, expected.weight_budget, f"weight's of {case}")


def _check_selection(inputs: Inputs, expected: Expected, backend: str | None) -> None:
    """Ids and values exactly those of a stable sort."""
    assert isinstance(inputs.teacher, Tensor)
    options = {name: inputs.options[name] for name in ("mask", "banned_ids", "vocab_size")}
    if inputs.student.shape[-1] < inputs.teacher.shape[-1]:
        limits = [inputs.student.shape[-1], options["vocab_size"]]
        options["vocab_size"] = min(limit for limit in limits if limit is not None)
    topk = select_topk(inputs.teacher, inputs.k, backend=backend, **options)
    ids = topk.ids.cpu().numpy()
    assert np.array_equal(ids, expected.support), f"ids {ids}, expected {expected.support}"
    teacher = inputs.teacher.detach().cpu().to(topk.logits.dtype)
    values = teacher.gather(-1, torch.from_numpy(expected.support).clamp(min=0))
    values = values.masked_fill(torch.from_numpy(expected.support) < 0, -torch.inf)
    assert torch.equal(topk.logits.cpu().nan_to_num(nan=7e7), values.nan_to_num(nan=7e7)), (
        f"values {topk.logits}, expected {values}"
    )


def _check_close(actual: Tensor, expected: np.ndarray, budget: np.ndarray, what: str) -> None:
    got = actual.detach().double().cpu().numpy()
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    with np.errstate(all="ignore"):
        wrong = ~(abs(got - expected) <= budget) & ~(np.isnan(got) & np.isnan(expected))
        wrong &= ~(got == expected)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.size} outside the budget, first at {at}: got "
            f"{got[at]!r}, expected {expected[at]!r} within {budget[at]:.3g}"
        )
