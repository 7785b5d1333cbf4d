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

from opd_kernels import backends
from opd_kernels.api import linear_topk_rkl, topk_divergence, topk_rkl
from opd_kernels.head import LinearLogits
from opd_kernels.selection import select_topk
from opd_kernels.support import TopK
from opd_kernels.testing.inputs import Case, Inputs, make_inputs
from opd_kernels.testing.oracle import Expected, oracle
from opd_kernels.testing.watched import check_watched

__all__ = [
    "Case",
    "Expected",
    "Inputs",
    "check",
    "make_inputs",
    "oracle",
    "results",
    "selected",
    "serves",
]


def check(case: Case, backend: str | None = None, device: torch.device | str = "cpu") -> None:
    """Raises ``AssertionError`` where a backend's result for the case is not within its budget."""
    inputs = make_inputs(case, device)
    expected = oracle(inputs)
    if isinstance(inputs.teacher, Tensor) and case.support == "teacher":
        _check_selection(inputs, expected, backend)
    leaves, loss, grads = results(case, inputs, backend)
    _check_close(loss, expected.loss, expected.loss_budget, f"loss of {case}")
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        wanted, budget = expected.grads[name]
        assert grad.dtype == leaf.dtype, f"{name}: gradient has dtype {grad.dtype}"
        # If something overflows, gradients other than the student logits' may be inf - inf or
        # inf * 0.
        may_be_nan = budget == np.inf if name != "student" else False
        _check_close(grad, wanted, budget, f"gradient for {name} of {case}", may_be_nan)
        if name != "row_weight":
            assert bool((grad.cpu()[torch.from_numpy(budget == 0)] == 0).all()), f"{name}: not 0"
    if case.watched:
        check_watched(case, inputs, expected, backend)


def serves(case: Case, backend: str, device: torch.device | str = "cpu") -> bool:
    """Whether a backend takes a case; one that does not raises."""
    module = backends.load(backend)
    if case.hidden and not backends.takes_hidden_states(backend):
        return False
    dtypes = tuple(getattr(torch, name) for name in (case.student_dtype, case.teacher_dtype))
    return module.refusal(torch.device(device), dtypes, case.k, case.teacher_vocab) is None


def results(
    case: Case, inputs: Inputs, backend: str | None
) -> tuple[dict[str, Tensor], Tensor, tuple[Tensor, ...]]:
    """(tensors that get a gradient, the loss, the gradients)."""
    leaves = _leaves(case, inputs)
    for leaf in leaves.values():
        leaf.requires_grad_()
    loss = _call(case, inputs, backend)
    upstream = inputs.upstream if case.reduction == "none" else None
    return leaves, loss, torch.autograd.grad(loss, list(leaves.values()), upstream)


def selected(inputs: Inputs, backend: str | None) -> TopK:
    """The teacher's support."""
    options = {name: inputs.options[name] for name in ("mask", "banned_ids", "vocab_size")}
    assert isinstance(inputs.teacher, Tensor)
    if inputs.student.shape[-1] < inputs.teacher.shape[-1]:
        limits = [inputs.student.shape[-1], options["vocab_size"]]
        options["vocab_size"] = min(limit for limit in limits if limit is not None)
    teacher = inputs.teacher if inputs.teacher_head is None else inputs.teacher_head
    return select_topk(teacher, inputs.k, backend=backend, **options)


def _leaves(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The tensors that get a gradient, by name."""
    leaves = {"student": inputs.student, "row_weight": inputs.options["weight"]}
    if inputs.head is not None:
        leaves["student"] = None
        leaves["hidden"] = inputs.head.hidden
        if not case.frozen:
            leaves |= {"weight": inputs.head.weight, "bias": inputs.head.bias}
    return {name: leaf for name, leaf in leaves.items() if leaf is not None}


def _call(case: Case, inputs: Inputs, backend: str | None) -> Tensor:
    """The loss."""
    teacher = inputs.teacher if inputs.teacher_head is None else inputs.teacher_head
    k = None if isinstance(teacher, TopK) else inputs.k
    if inputs.head is not None and inputs.family:
        parts = inputs.head
        linear = LinearLogits(parts.hidden, parts.weight, parts.bias, parts.softcap, parts.scale)
        return topk_divergence(
            linear, teacher, k, backend=backend, **inputs.options, **inputs.family
        )
    if inputs.head is not None:
        head = inputs.head
        return linear_topk_rkl(
            head.hidden,
            head.weight,
            teacher,
            k,
            student_bias=head.bias,
            logit_scale=head.scale,
            logit_softcap=head.softcap,
            backend=backend,
            **inputs.options,
        )
    assert not isinstance(teacher, LinearLogits)
    student = inputs.student * 1 if case.inplace else inputs.student
    if inputs.family:
        return topk_divergence(
            student,
            teacher,
            k,
            inplace_grad=case.inplace,
            backend=backend,
            **inputs.options,
            **inputs.family,
        )
    return topk_rkl(
        student, teacher, k, inplace_grad=case.inplace, backend=backend, **inputs.options
    )


def _check_selection(inputs: Inputs, expected: Expected, backend: str | None) -> None:
    """Ids and values exactly those of a stable sort."""
    assert isinstance(inputs.teacher, Tensor)
    topk = selected(inputs, backend)
    ids = topk.ids.cpu().numpy()
    assert np.array_equal(ids, expected.support), f"ids {ids}, expected {expected.support}"
    values = inputs.teacher.detach().cpu().to(topk.logits.dtype)
    values = values.gather(-1, torch.from_numpy(expected.support).clamp(min=0))
    values = values.masked_fill(torch.from_numpy(expected.support) < 0, -torch.inf)
    assert torch.equal(topk.logits.cpu().nan_to_num(nan=7e7), values.nan_to_num(nan=7e7)), (
        f"values {topk.logits}, expected {values}"
    )


def _check_close(
    actual: Tensor,
    expected: np.ndarray,
    budget: np.ndarray,
    label: str,
    may_be_nan: np.ndarray | bool = False,
) -> None:
    got = actual.detach().double().cpu().numpy()
    assert got.shape == expected.shape, f"{label}: shape {got.shape}, expected {expected.shape}"
    with np.errstate(all="ignore"):
        wrong = ~(abs(got - expected) <= budget) & ~(np.isnan(got) & np.isnan(expected))
        wrong &= ~((got == expected) | (np.isnan(got) & may_be_nan))
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{label}: {int(wrong.sum())} of {wrong.size} outside the budget, first at {first}: "
            f"got {got[first]!r}, expected {expected[first]!r} within {budget[first]:.3g}"
        )
