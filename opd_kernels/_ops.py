"""Operators that PyTorch knows by name: schemas, shapes for tracing, dispatch to a backend.

Registered with ``torch.library`` define/impl/fake; autograd lives outside, in ``_autograd``, so
that ``torch.func`` works and a call costs microseconds. A backend is chosen when an operator runs,
never while it is traced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_kernels import backends
from opd_kernels.reference import compute_dtype

_LIBRARY = torch.library.Library("opd_kernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_SCHEMAS = {
    "select": "(Tensor logits, SymInt k, SymInt limit, Tensor? banned, Tensor? mask, str backend)"
    " -> (Tensor ids, Tensor values)",
    "divergence": "(Tensor student, Tensor teacher, Tensor? teacher_ids, SymInt k, SymInt limit,"
    " Tensor? banned, Tensor? mask, float temperature, Tensor? row_temperature,"
    " float teacher_temperature, Tensor? row_teacher_temperature, str backend)"
    " -> (Tensor loss, Tensor ids, Tensor entry_grad)",
    "scatter": "(Tensor entry_grad, Tensor ids, Tensor upstream, SymInt width, ScalarType dtype,"
    " str backend) -> Tensor",
    "scatter_": "(Tensor(a!) out, Tensor entry_grad, Tensor ids, Tensor upstream, str backend)"
    " -> ()",
    "scatter_add_": "(Tensor(a!) out, Tensor entry_grad, Tensor ids, Tensor upstream, str backend)"
    " -> ()",
}
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=_TAGS)

select = torch.ops.opd_kernels.select.default
divergence = torch.ops.opd_kernels.divergence.default
scatter = torch.ops.opd_kernels.scatter.default
scatter_ = torch.ops.opd_kernels.scatter_.default
scatter_add_ = torch.ops.opd_kernels.scatter_add_.default


def _select(
    logits: Tensor, k: int, limit: int, banned: Tensor | None, mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    module = backends.resolve(backend, logits.device, (logits.dtype,), k, limit)
    return module.select(logits, k, limit, banned, mask)


def _select_fake(
    logits: Tensor, k: int, limit: int, banned: Tensor | None, mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-1], k)
    ids = logits.new_empty(shape, dtype=torch.int32)
    return ids, logits.new_empty(shape, dtype=compute_dtype(logits))


def _divergence(
    student: Tensor,
    teacher: Tensor,
    teacher_ids: Tensor | None,
    k: int,
    limit: int,
    banned: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    row_temperature: Tensor | None,
    teacher_temperature: float,
    row_teacher_temperature: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    vocab = limit if teacher_ids is None else 0
    module = backends.resolve(backend, student.device, (student.dtype, teacher.dtype), k, vocab)
    return module.divergence(
        student,
        teacher,
        teacher_ids,
        k,
        limit,
        banned,
        mask,
        temperature if row_temperature is None else row_temperature,
        teacher_temperature if row_teacher_temperature is None else row_teacher_temperature,
    )


def _divergence_fake(
    student: Tensor, teacher: Tensor, teacher_ids: Tensor | None, k: int, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = student.shape[:-1], compute_dtype(student, teacher)
    ids = student.new_empty((*rows, k), dtype=torch.int32)
    return student.new_empty(rows, dtype=dtype), ids, torch.empty_like(ids, dtype=dtype)


def _scatter(
    entry_grad: Tensor, ids: Tensor, upstream: Tensor, width: int, dtype: torch.dtype, backend: str
) -> Tensor:
    module = _scatter_backend(backend, ids, entry_grad, dtype)
    return module.scatter(entry_grad, ids, upstream, width, dtype)


def _scatter_fake(
    entry_grad: Tensor, ids: Tensor, upstream: Tensor, width: int, dtype: torch.dtype, backend: str
) -> Tensor:
    return entry_grad.new_empty((*ids.shape[:-1], width), dtype=dtype)


def _scatter_inplace(
    out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor, backend: str
) -> None:
    module = _scatter_backend(backend, ids, entry_grad, out.dtype)
    module.scatter_(out, entry_grad, ids, upstream)
    _tell_autograd(out)


def _scatter_add(
    out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor, backend: str
) -> None:
    module = _scatter_backend(backend, ids, entry_grad, out.dtype)
    module.scatter_add_(out, entry_grad, ids, upstream)
    _tell_autograd(out)


def _tell_autograd(out: Tensor) -> None:
    """Kernels write through a pointer, which autograd does not see."""
    torch.autograd.graph.increment_version(out)


def _scatter_backend(
    backend: str, ids: Tensor, entry_grad: Tensor, dtype: torch.dtype
) -> backends.Backend:
    return backends.resolve(backend, ids.device, (dtype, entry_grad.dtype), ids.shape[-1])


for _name, _impl, _fake in (
    ("select", _select, _select_fake),
    ("divergence", _divergence, _divergence_fake),
    ("scatter", _scatter, _scatter_fake),
    ("scatter_", _scatter_inplace, lambda *_: None),
    ("scatter_add_", _scatter_add, lambda *_: None),
):
    _LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"opd_kernels::{_name}", _fake, lib=_LIBRARY)
