"""Operators that PyTorch knows by name: schemas, shapes for tracing, dispatch to a backend.

They are registered with ``torch.library`` define/impl/fake. Autograd is outside, in ``_autograd``,
so that ``torch.func`` works and a call costs microseconds. A backend is chosen when an operator
runs, never while it is traced.

``OPERATORS``, at the end, has one record for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd_kernels import _linear_ops, backends, debugging
from opd_kernels._arguments import (
    Allowed,
    Background,
    Objective,
    Tail,
    Tails,
    compute_dtype,
)
from opd_kernels._checks import (
    check_entries_dtype,
    check_row_shape,
    check_same_entries,
)
from opd_kernels._library import Operator, register
from opd_kernels._operands import (
    check_allowed,
    check_background,
    check_device,
    check_ids,
    check_mask,
    check_sides,
    check_sums,
    check_tail,
    listed_by,
    nothing_of,
    refuse_lost_graph,
    tail_fake,
    wide_rows,
)


def _select(
    logits: Tensor, k: int, allowed: Allowed, tail: Tail, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_allowed(allowed, logits, logits.shape[-1])
    if debugging.ON:
        debugging.check_select(logits, allowed)
    listed = listed_by(k, tail)
    module = backends.resolve(backend, logits.device, (logits.dtype,), listed, allowed.limit)
    if not tail.width:
        return *module.select(logits, k, allowed), nothing_of(logits), nothing_of(logits)
    check_tail(tail, logits)
    if debugging.ON:
        debugging.check_row(logits, "teacher logits", tail.width, allowed.mask)
    *selected, sums, entropy = module.select_with_tail(logits, k, allowed, tail)
    return *selected, sums, nothing_of(logits) if entropy is None else entropy


def _select_fake(
    logits: Tensor, k: int, allowed: Allowed, tail: Tail, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids = logits.new_empty((*logits.shape[:-1], k), dtype=torch.int32)
    return ids, torch.empty_like(ids, dtype=compute_dtype(logits)), *tail_fake(logits, tail)


def _tail_logsumexp(
    logits: Tensor, mask: Tensor | None, tail: Tail, backend: str
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy outside of the tail's ids."""
    if tail.ids is None:
        raise ValueError("the tail has no ids, expected those that it leaves out")
    check_tail(tail, logits)
    check_mask(mask, logits)
    if debugging.ON:
        debugging.check_row(logits, "logits", tail.width, mask)
    sums, entropy = _tail_module(backend, logits, tail).tail_logsumexp(logits, mask, tail)
    return sums, nothing_of(logits) if entropy is None else entropy


def _tail_logsumexp_fake(
    logits: Tensor, mask: Tensor | None, tail: Tail, backend: str
) -> tuple[Tensor, Tensor]:
    return tail_fake(logits, tail._replace(width=1))


def _tail_module(backend: str, logits: Tensor, tail: Tail) -> Any:
    assert tail.ids is not None
    return backends.resolve(backend, logits.device, (logits.dtype,), tail.ids.shape[-1])


def _gather(student: Tensor, ids: Tensor, allowed: Allowed, backend: str) -> tuple[Tensor, Tensor]:
    check_allowed(allowed, student, student.shape[-1])
    check_ids(ids, (*student.shape[:-1], ids.shape[-1]), student)
    module = backends.resolve(backend, student.device, (student.dtype,), ids.shape[-1])
    return module.gather(student, ids, allowed)


def _gather_fake(
    student: Tensor, ids: Tensor, allowed: Allowed, backend: str
) -> tuple[Tensor, Tensor]:
    values = student.new_empty(ids.shape, dtype=compute_dtype(student))
    return values, torch.empty_like(values, dtype=torch.int32)


def _entry_divergence(
    student: Tensor,
    teacher: Tensor,
    ids: Tensor,
    allowed: Allowed,
    objective: Objective,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_sides(student, teacher, allowed, objective)
    check_ids(ids, teacher.shape, student)
    if debugging.ON:
        debugging.check_divergence(student, teacher, ids, allowed, objective)
    dtypes = (student.dtype, teacher.dtype)
    module = backends.resolve(backend, student.device, dtypes, ids.shape[-1])
    return module.entry_divergence(student, teacher, ids, allowed, objective)


def _entry_divergence_fake(
    student: Tensor,
    teacher: Tensor,
    ids: Tensor,
    allowed: Allowed,
    objective: Objective,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _select_divergence_fake(student, teacher, ids.shape[-1], allowed, objective, backend)


def _select_divergence(
    student: Tensor, teacher: Tensor, k: int, allowed: Allowed, objective: Objective, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``select``, ``gather`` and ``entry_divergence`` at once, with the same bits."""
    check_sides(student, teacher, allowed, objective)
    if allowed.limit > teacher.size(-1):
        raise ValueError(
            f"limit is {allowed.limit}, allowed is 0 to the teacher's vocabulary of "
            f"{teacher.shape[-1]}"
        )
    if debugging.ON:
        debugging.check_divergence(student, teacher, None, allowed, objective)
    dtypes = (student.dtype, teacher.dtype)
    module = backends.resolve(backend, student.device, dtypes, k, allowed.limit)
    return module.select_divergence(student, teacher, k, allowed, objective)


def _select_divergence_fake(
    student: Tensor, teacher: Tensor, k: int, allowed: Allowed, objective: Objective, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = student.shape[:-1], compute_dtype(student, teacher)
    ids = student.new_empty((*rows, k), dtype=torch.int32)
    return student.new_empty(rows, dtype=dtype), ids, torch.empty_like(ids, dtype=dtype)


def _full_divergence(
    student: Tensor,
    teacher: Tensor,
    ids: Tensor,
    allowed: Allowed,
    objective: Objective,
    tails: Tails,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``entry_divergence`` of full softmaxes, and what makes the gradient beyond the entries."""
    check_sides(student, teacher, allowed, objective)
    check_ids(ids, teacher.shape, student)
    check_sums(tails.teacher, "the teacher's tail", student)
    check_sums(tails.student, "the student's tail", student)
    if not allowed.limit <= tails.width <= student.shape[-1]:
        raise ValueError(
            f"width is {tails.width}, allowed is the limit of {allowed.limit} to the vocabulary of "
            f"{student.shape[-1]}"
        )
    if debugging.ON:
        debugging.check_divergence(student, teacher, ids, allowed, objective)
        debugging.check_row(student, "student", tails.width, allowed.mask)
    dtypes = (student.dtype, teacher.dtype)
    module = backends.resolve(backend, student.device, dtypes, ids.shape[-1])
    return module.full_divergence(student, teacher, ids, allowed, objective, tails)


def _full_divergence_fake(
    student: Tensor,
    teacher: Tensor,
    ids: Tensor,
    allowed: Allowed,
    objective: Objective,
    tails: Tails,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, out_ids, grad = _select_divergence_fake(
        student, teacher, ids.shape[-1], allowed, objective, backend
    )
    return loss, out_ids, grad, torch.empty_like(loss), wide_rows(student)


def _scatter(
    entry_grad: Tensor, ids: Tensor, upstream: Tensor, width: int, dtype: torch.dtype, backend: str
) -> Tensor:
    refuse_lost_graph("topk_rkl")
    module = _scatter_backend(backend, entry_grad, ids, upstream, dtype)
    return module.scatter(entry_grad, ids, upstream, width, dtype)


def _scatter_fake(
    entry_grad: Tensor, ids: Tensor, upstream: Tensor, width: int, dtype: torch.dtype, backend: str
) -> Tensor:
    return entry_grad.new_empty((*ids.shape[:-1], width), dtype=dtype)


def _scatter_inplace(
    out: Tensor,
    entry_grad: Tensor,
    ids: Tensor,
    upstream: Tensor,
    background: Background,
    backend: str,
) -> None:
    """The dense gradient, written over what ``out`` holds: zeros or the background, and entries."""
    refuse_lost_graph("topk_rkl")
    check_device(out, "out", ids)
    if out.shape[:-1] != ids.shape[:-1]:
        raise ValueError(
            f"out has shape {tuple(out.shape)}, expected the entries' leading shape "
            f"{tuple(ids.shape[:-1])}"
        )
    if background.factors is None:
        module = _scatter_backend(backend, entry_grad, ids, upstream, out.dtype)
        module.scatter_(out, entry_grad, ids, upstream)
    else:
        check_background(background, out)
        module = _scatter_backend(backend, entry_grad, ids, upstream, out.dtype, full=True)
        module.scatter_background_(out, entry_grad, ids, upstream, background)
    _tell_autograd(out)


def _scatter_background(
    entry_grad: Tensor, ids: Tensor, upstream: Tensor, background: Background, backend: str
) -> Tensor:
    """``scatter`` over a background: in shape and dtype the gradient of the background's logits."""
    refuse_lost_graph("topk_divergence")
    logits = background.logits
    if logits is None:
        raise ValueError("logits are None, expected those that the background is made of")
    check_background(background, logits)
    check_device(logits, "logits", ids)
    module = _scatter_backend(backend, entry_grad, ids, upstream, logits.dtype, full=True)
    return module.scatter_background(entry_grad, ids, upstream, background)


def _scatter_background_fake(
    entry_grad: Tensor, ids: Tensor, upstream: Tensor, background: Background, backend: str
) -> Tensor:
    logits = background.logits
    assert logits is not None
    return logits.new_empty(logits.shape)


def _scatter_add(
    out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor, backend: str
) -> None:
    module = _scatter_backend(backend, entry_grad, ids, upstream, out.dtype)
    check_device(out, "out", ids)
    if debugging.ON:
        known = f"grad has a vocabulary of {out.shape[-1]}"
        debugging.check_scatter(out.shape[-1], known, entry_grad, ids, upstream)
    module.scatter_add_(out, entry_grad, ids, upstream)
    _tell_autograd(out)


def _nothing(*_: Any) -> None:
    """Shapes of an operator that returns none."""


def _scatter_backend(
    backend: str,
    entry_grad: Tensor,
    ids: Tensor,
    upstream: Tensor,
    dtype: torch.dtype,
    *,
    full: bool = False,
) -> Any:
    """The backend, once dtypes, shapes and devices are known to fit: hooks may change them."""
    check_entries_dtype(ids, "ids")
    check_entries_dtype(entry_grad, "entry_grad")
    check_same_entries(ids, entry_grad)
    check_row_shape(upstream, ids.shape[:-1], "upstream", "the entries'")
    check_device(entry_grad, "entry_grad", ids)
    check_device(upstream, "upstream", ids)
    dtypes, k = (dtype, entry_grad.dtype), ids.shape[-1]
    if full:
        k = max(k - 1, 1)  # a sampled token is one entry more than a support has
    return backends.resolve(backend, ids.device, dtypes, k)


def _tell_autograd(out: Tensor) -> None:
    """Bumps the version counter: autograd does not see a kernel write through a pointer."""
    torch.autograd.graph.increment_version(out)


_TAIL = "Tensor tail, Tensor entropy"
_SELECTED = f"Tensor ids, Tensor values, {_TAIL}"
_DIVERGENCE = "Tensor loss, Tensor ids, Tensor entry_grad"
_FULL_DIVERGENCE = f"{_DIVERGENCE}, Tensor factors, Tensor logsumexp"
_GATHERED = "Tensor values, Tensor slots"
_GRADIENT = "Tensor grad"

OPERATORS = {
    "select": Operator(_select, _select_fake, _SELECTED, by_rows=True),
    "tail_logsumexp": Operator(_tail_logsumexp, _tail_logsumexp_fake, _TAIL, by_rows=True),
    "gather": Operator(_gather, _gather_fake, _GATHERED, by_rows=True),
    "entry_divergence": Operator(
        _entry_divergence, _entry_divergence_fake, _DIVERGENCE, by_rows=True
    ),
    "select_divergence": Operator(
        _select_divergence, _select_divergence_fake, _DIVERGENCE, by_rows=True
    ),
    "full_divergence": Operator(
        _full_divergence, _full_divergence_fake, _FULL_DIVERGENCE, by_rows=True
    ),
    "scatter": Operator(_scatter, _scatter_fake, _GRADIENT, by_rows=True),
    "scatter_background": Operator(
        _scatter_background, _scatter_background_fake, _GRADIENT, by_rows=True
    ),
    "scatter_": Operator(_scatter_inplace, _nothing, ""),
    "scatter_add_": Operator(_scatter_add, _nothing, "", by_rows=True),
} | _linear_ops.OPERATORS
_CALLS = {name: register(name, record) for name, record in OPERATORS.items()}

select = _CALLS["select"]
tail_logsumexp = _CALLS["tail_logsumexp"]
gather = _CALLS["gather"]
gather_dot = _CALLS["gather_dot"]
entry_divergence = _CALLS["entry_divergence"]
select_divergence = _CALLS["select_divergence"]
full_divergence = _CALLS["full_divergence"]
scatter = _CALLS["scatter"]
scatter_background = _CALLS["scatter_background"]
scatter_ = _CALLS["scatter_"]
scatter_add_ = _CALLS["scatter_add_"]
gather_dot_hidden = _CALLS["gather_dot_hidden"]
gather_dot_weight = _CALLS["gather_dot_weight"]
read_linear = _CALLS["read_linear"]
linear_divergence = _CALLS["linear_divergence"]
linear_gradient = _CALLS["linear_gradient"]
