"""Operators that PyTorch knows by name: schemas, shapes for tracing, dispatch to a backend.

They are registered with ``torch.library`` define/impl/fake. Autograd is outside, in ``_autograd``,
so that ``torch.func`` works and a call costs microseconds. A backend is chosen when an operator
runs, never while it is traced.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opd_kernels import backends, debugging
from opd_kernels._checks import (
    check_bias,
    check_bitmap,
    check_buffer,
    check_entries_dtype,
    check_row_shape,
    check_same_device,
    check_same_entries,
    check_upstream_dtype,
)
from opd_kernels.head import head_logits, shaped
from opd_kernels.reference import compute_dtype
from opd_kernels.stats import row_logsumexp

_LIBRARY = torch.library.Library("opd_kernels", "DEF")
_LOST_GRAPH = (
    "{} cannot be differentiated twice: its gradient is computed in forward and held constant, and "
    "torch {} would return the gradient of this compiled function without a graph; leave out "
    "create_graph=True, or build the loss from torch.topk, gather and log_softmax"
)
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
    "select_linear": "(Tensor hidden, Tensor weight, Tensor? bias, float scale, float? softcap,"
    " SymInt k, SymInt limit, Tensor? banned, Tensor? mask, bool with_logsumexp, str backend)"
    " -> (Tensor ids, Tensor values, Tensor logsumexp)",
    "gather_dot": "(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, SymInt limit,"
    " Tensor? banned, Tensor? mask, str backend) -> (Tensor logits, Tensor slots)",
    "gather_dot_hidden": "(Tensor upstream, Tensor ids, Tensor weight, ScalarType dtype,"
    " str backend) -> Tensor",
    "gather_dot_weight": "(Tensor upstream, Tensor ids, Tensor hidden, SymInt vocab,"
    " ScalarType dtype, str backend) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=_TAGS)

select = torch.ops.opd_kernels.select.default
divergence = torch.ops.opd_kernels.divergence.default
scatter = torch.ops.opd_kernels.scatter.default
scatter_ = torch.ops.opd_kernels.scatter_.default
scatter_add_ = torch.ops.opd_kernels.scatter_add_.default
select_linear = torch.ops.opd_kernels.select_linear.default
gather_dot = torch.ops.opd_kernels.gather_dot.default
gather_dot_hidden = torch.ops.opd_kernels.gather_dot_hidden.default
gather_dot_weight = torch.ops.opd_kernels.gather_dot_weight.default


def _select(
    logits: Tensor, k: int, limit: int, banned: Tensor | None, mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    _check_rows(mask, "mask", logits)
    _check_banned(banned, limit, logits)
    if debugging.ON:
        debugging.check_select(logits, limit, banned, mask)
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
    _check_rows(mask, "mask", student)
    _check_rows(row_temperature, "row_temperature", student)
    _check_rows(row_teacher_temperature, "row_teacher_temperature", student)
    _check_device(teacher, "teacher", student)
    _check_device(teacher_ids, "teacher_ids", student)
    _check_banned(banned, limit, student)
    student_t = temperature if row_temperature is None else row_temperature
    teacher_t = teacher_temperature if row_teacher_temperature is None else row_teacher_temperature
    if debugging.ON:
        debugging.check_divergence(
            student, teacher, teacher_ids, limit, banned, mask, student_t, teacher_t
        )
    vocab = limit if teacher_ids is None else 0
    module = backends.resolve(backend, student.device, (student.dtype, teacher.dtype), k, vocab)
    return module.divergence(
        student, teacher, teacher_ids, k, limit, banned, mask, student_t, teacher_t
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
    _refuse_lost_graph("topk_rkl")
    module = _scatter_backend(backend, entry_grad, ids, upstream, dtype)
    return module.scatter(entry_grad, ids, upstream, width, dtype)


def _scatter_fake(
    entry_grad: Tensor, ids: Tensor, upstream: Tensor, width: int, dtype: torch.dtype, backend: str
) -> Tensor:
    return entry_grad.new_empty((*ids.shape[:-1], width), dtype=dtype)


def _scatter_inplace(
    out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor, backend: str
) -> None:
    _refuse_lost_graph("topk_rkl")
    module = _scatter_backend(backend, entry_grad, ids, upstream, out.dtype)
    _check_device(out, "out", ids)
    module.scatter_(out, entry_grad, ids, upstream)
    _tell_autograd(out)


def _scatter_add(
    out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor, backend: str
) -> None:
    module = _scatter_backend(backend, entry_grad, ids, upstream, out.dtype)
    _check_device(out, "out", ids)
    if debugging.ON:
        debugging.check_scatter_add(out, entry_grad, ids, upstream)
    module.scatter_add_(out, entry_grad, ids, upstream)
    _tell_autograd(out)


def _check_rows(tensor: Tensor | None, name: str, logits: Tensor) -> None:
    """Raises unless ``tensor`` has one element per row, on the logits' device.

    Kernels take addresses, so they would read beyond the end of a shorter one.
    """
    if tensor is not None:
        check_row_shape(tensor, logits.shape[:-1], name)
        check_same_device(tensor, logits.device, name)


def _check_device(tensor: Tensor | None, name: str, other: Tensor) -> None:
    """Raises unless ``tensor`` is on the device of ``other``."""
    if tensor is not None and tensor.device != other.device:
        check_same_device(tensor, other.device, name, "the other tensors are")


def _check_banned(banned: Tensor | None, limit: int, other: Tensor) -> None:
    """Raises unless it is a bitmap up to the limit, on another tensor's device."""
    if banned is not None:
        check_bitmap(banned, limit)
        check_same_device(banned, other.device, "banned")


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    limit: int,
    banned: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Raises unless a head's parts and what belongs to its rows fit together."""
    _check_device(weight, "weight", hidden)
    if bias is not None:
        check_bias(bias, weight)
        _check_device(bias, "bias", hidden)
    _check_rows(mask, "mask", hidden)
    _check_banned(banned, limit, hidden)


def _check_entries(entry_grad: Tensor, ids: Tensor, upstream: Tensor) -> None:
    """Raises unless dtypes, shapes and devices are those the loss saved: hooks may change them."""
    check_entries_dtype(ids, "ids")
    check_entries_dtype(entry_grad, "entry_grad")
    check_same_entries(ids, entry_grad)
    check_row_shape(upstream, ids.shape[:-1], "upstream", "the entries'")
    _check_device(entry_grad, "entry_grad", ids)
    _check_device(upstream, "upstream", ids)


def _refuse_lost_graph(function: str) -> None:
    """Raises where ``create_graph=True`` would silently give a gradient without a graph.

    This happens before torch 2.13, in compiled functions that save no input with a gradient
    (github.com/pytorch/pytorch/issues/181581). Only such functions run these operators in a
    backward pass with gradients enabled; an autograd.Function disables them.
    """
    if torch.is_grad_enabled() and torch._C._current_graph_task_id() >= 0:
        raise RuntimeError(_LOST_GRAPH.format(function, torch.__version__))


def _tell_autograd(out: Tensor) -> None:
    """Bumps the version counter: autograd does not see a kernel write through a pointer."""
    torch.autograd.graph.increment_version(out)


def _scatter_backend(
    backend: str, entry_grad: Tensor, ids: Tensor, upstream: Tensor, dtype: torch.dtype
) -> backends.Backend:
    _check_entries(entry_grad, ids, upstream)
    return backends.resolve(backend, ids.device, (dtype, entry_grad.dtype), ids.shape[-1])


def _select_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    k: int,
    limit: int,
    banned: Tensor | None,
    mask: Tensor | None,
    with_logsumexp: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``select`` on the logits of a head, which are computed a few rows at a time."""
    _check_head(hidden, weight, bias, limit, banned, mask)
    if debugging.ON:
        debugging.check_head(hidden, weight, bias, limit, banned, mask)
    rows, dtype = hidden.shape[:-1], compute_dtype(hidden)
    module = backends.resolve(backend, hidden.device, (hidden.dtype,), k, limit)
    ids = hidden.new_full((*rows, k), -1, dtype=torch.int32)
    values = hidden.new_full((*rows, k), -torch.inf, dtype=dtype)
    logsumexp = hidden.new_zeros(rows if with_logsumexp else 0, dtype=dtype)
    out_ids, out_values, out_sums = ids.view(-1, k), values.view(-1, k), logsumexp.view(-1)
    weight, bias = weight[:limit], None if bias is None else bias[:limit]
    for piece, logits, piece_mask in head_logits(hidden, weight, bias, mask):
        out_ids[piece], picked = module.select(logits, k, limit, banned, piece_mask)
        out_values[piece] = shaped(picked, scale, softcap)
        if with_logsumexp:
            out_sums[piece] = row_logsumexp(logits, limit, piece_mask, (scale, softcap))
    if debugging.ON:
        debugging.check_selected(values, mask)
    return ids, values, logsumexp


def _select_linear_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    k: int,
    limit: int,
    banned: Tensor | None,
    mask: Tensor | None,
    with_logsumexp: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = hidden.shape[:-1], compute_dtype(hidden)
    ids = hidden.new_empty((*rows, k), dtype=torch.int32)
    sums = hidden.new_empty(rows if with_logsumexp else (0,), dtype=dtype)
    return ids, torch.empty_like(ids, dtype=dtype), sums


def _gather_dot(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    limit: int,
    banned: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_head(hidden, weight, bias, limit, banned, mask)
    _check_device(ids, "ids", hidden)
    if debugging.ON:
        debugging.check_gather(hidden, weight, bias, ids, limit, banned, mask)
    dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
    module = backends.resolve_linear(backend, hidden.device, dtypes, ids.shape[-1])
    return module.gather_dot(hidden, weight, bias, ids, limit, banned, mask)


def _gather_dot_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    logits = hidden.new_empty(ids.shape, dtype=compute_dtype(hidden, weight))
    return logits, torch.empty_like(logits, dtype=torch.int32)


def _gather_dot_hidden(
    upstream: Tensor, ids: Tensor, weight: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    check_upstream_dtype(upstream)
    _check_device(upstream, "upstream", ids)
    _check_device(weight, "weight", ids)
    dtypes = (upstream.dtype, weight.dtype, dtype)
    _refuse_lost_graph("linear_topk_rkl")
    module = backends.resolve_linear(backend, ids.device, dtypes, ids.shape[-1])
    return module.gather_dot_hidden(upstream, ids, weight, dtype)


def _gather_dot_hidden_fake(
    upstream: Tensor, ids: Tensor, weight: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    return weight.new_empty((*ids.shape[:-1], weight.shape[1]), dtype=dtype)


def _gather_dot_weight(
    upstream: Tensor, ids: Tensor, hidden: Tensor, vocab: int, dtype: torch.dtype, backend: str
) -> Tensor:
    check_upstream_dtype(upstream)
    _check_device(upstream, "upstream", ids)
    _check_device(hidden, "hidden", ids)
    dtypes = (upstream.dtype, hidden.dtype, dtype)
    _refuse_lost_graph("linear_topk_rkl")
    module = backends.resolve_linear(backend, ids.device, dtypes, ids.shape[-1])
    return module.gather_dot_weight(upstream, ids, hidden, vocab, dtype)


def _gather_dot_weight_fake(
    upstream: Tensor, ids: Tensor, hidden: Tensor, vocab: int, dtype: torch.dtype, backend: str
) -> Tensor:
    return hidden.new_empty((vocab, hidden.shape[-1]), dtype=dtype)


def _on_one_device(fake: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """Shapes for tracing, of tensors that lie on one device.

    One meta tensor is enough for the dispatcher to trace a call, whose results would then be
    memory that nobody has written.
    """

    @functools.wraps(fake)
    def checked(*args: Any, **kwargs: Any) -> Any:
        named = dict(zip(names, args, strict=False)) | kwargs
        tensors = {name: arg for name, arg in named.items() if isinstance(arg, Tensor)}
        first = next(iter(tensors.values()))
        for name, tensor in tensors.items():
            _check_device(tensor, name, first)
        return fake(*args, **kwargs)

    return checked


for _name, _impl, _fake in (
    ("select", _select, _select_fake),
    ("divergence", _divergence, _divergence_fake),
    ("scatter", _scatter, _scatter_fake),
    ("scatter_", _scatter_inplace, lambda *_: None),
    ("scatter_add_", _scatter_add, lambda *_: None),
    ("select_linear", _select_linear, _select_linear_fake),
    ("gather_dot", _gather_dot, _gather_dot_fake),
    ("gather_dot_hidden", _gather_dot_hidden, _gather_dot_hidden_fake),
    ("gather_dot_weight", _gather_dot_weight, _gather_dot_weight_fake),
):
    _LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")
    _traced = _on_one_device(_fake, tuple(inspect.signature(_impl).parameters))
    torch.library.register_fake(f"opd_kernels::{_name}", _traced, lib=_LIBRARY)


def _select_vmap(
    info: Any, in_dims: tuple[int | None, ...], logits: Tensor, *rest: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """A mapped dimension is one more leading dimension."""
    k, limit, banned, mask, backend = rest
    if in_dims[3] is not None:
        raise ValueError("banned_ids cannot be mapped by vmap; pass one list for all")
    logits, mask = leading(logits, in_dims[0], info), leading(mask, in_dims[4], info)
    return select(logits, k, limit, banned, mask, backend), (0, 0)


def _select_linear_vmap(
    info: Any, in_dims: tuple[int | None, ...], hidden: Tensor, *rest: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """A mapped dimension is one more leading dimension; the head is not mapped."""
    *middle, mask, with_logsumexp, backend = rest
    if any(dim is not None for dim in (*in_dims[1:3], in_dims[7])):
        raise ValueError("a head and banned_ids cannot be mapped by vmap; pass one for all")
    hidden, mask = leading(hidden, in_dims[0], info), leading(mask, in_dims[8], info)
    results = select_linear(hidden, *middle, mask, with_logsumexp, backend)
    return results, (0, 0, 0 if with_logsumexp else None)


def _scatter_add_vmap(
    info: Any, in_dims: tuple[int | None, ...], out: Tensor, *rest: Any
) -> tuple[None, None]:
    """A mapped dimension is one more leading dimension; ``out`` must be mapped, without overlap."""
    if in_dims[0] is None:
        raise ValueError("grad is not mapped by vmap, but what is added to it is; map grad as well")
    *entries, backend = rest
    out = check_buffer(leading(out, in_dims[0], info))
    rows = (leading(arg, dim, info) for arg, dim in zip(entries, in_dims[1:4], strict=True))
    scatter_add_(out, *rows, backend)
    return None, None


torch.library.register_vmap("opd_kernels::select", _select_vmap, lib=_LIBRARY)
torch.library.register_vmap("opd_kernels::scatter_add_", _scatter_add_vmap, lib=_LIBRARY)
torch.library.register_vmap("opd_kernels::select_linear", _select_linear_vmap, lib=_LIBRARY)


def leading(arg: Any, dim: int | None, info: Any) -> Any:
    """The mapped dimension moved to the front, or added there without a copy."""
    if arg is None:
        return None
    if dim is None:
        return arg.expand(info.batch_size, *arg.shape)
    return arg.movedim(dim, 0)
