"""Operators that PyTorch knows by name: schemas, shapes for tracing, dispatch to a backend.

They are registered with ``torch.library`` define/impl/fake. Autograd is outside, in ``_autograd``,
so that ``torch.func`` works and a call costs microseconds. A backend is chosen when an operator
runs, never while it is traced.

``OPERATORS``, at the end, has one record for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opd_kernels import backends, debugging
from opd_kernels._arguments import (
    Allowed,
    Background,
    Head,
    Objective,
    Tail,
    Tails,
    Temperature,
    compute_dtype,
    wide_dtype,
)
from opd_kernels._checks import (
    ID_DTYPES,
    check_bias,
    check_bitmap,
    check_entries_dtype,
    check_logits,
    check_row_shape,
    check_same_device,
    check_same_entries,
    check_same_rows,
    check_upstream_dtype,
)
from opd_kernels._library import Operator, register
from opd_kernels.backends import plain

_LOST_GRAPH = (
    "{} cannot be differentiated twice: its gradient is computed in forward and held constant, and "
    "torch {} would return the gradient of this compiled function without a graph; leave out "
    "create_graph=True, or build the loss from torch.topk, gather and log_softmax"
)


def _select(
    logits: Tensor, k: int, allowed: Allowed, tail: Tail, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_allowed(allowed, logits, logits.shape[-1])
    if debugging.ON:
        debugging.check_select(logits, allowed)
    listed = _listed(k, tail)
    module = backends.resolve(backend, logits.device, (logits.dtype,), listed, allowed.limit)
    if not tail.width:
        return *module.select(logits, k, allowed), _nothing_of(logits), _nothing_of(logits)
    _check_tail(tail, logits)
    if debugging.ON:
        debugging.check_row(logits, "teacher logits", tail.width, allowed.mask)
    *selected, sums, entropy = module.select_with_tail(logits, k, allowed, tail)
    return *selected, sums, _nothing_of(logits) if entropy is None else entropy


def _select_fake(
    logits: Tensor, k: int, allowed: Allowed, tail: Tail, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids = logits.new_empty((*logits.shape[:-1], k), dtype=torch.int32)
    return ids, torch.empty_like(ids, dtype=compute_dtype(logits)), *_tail_fake(logits, tail)


def _listed(k: int, tail: Tail) -> int:
    """How many ids a row has, selected or left out of the tail: with a token one more than k."""
    return k if tail.ids is None or not tail.width else max(k, tail.ids.shape[-1])


def _select_linear(
    head: Head, k: int, allowed: Allowed, tail: Tail, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``select`` on the logits of a head, which are computed a few rows at a time."""
    hidden, weight, bias, scale, softcap = head
    limit, banned, mask = allowed
    _check_head(hidden, weight, bias, allowed)
    if debugging.ON:
        debugging.check_head(head, allowed)
    module = backends.resolve(backend, hidden.device, (hidden.dtype,), _listed(k, tail), limit)
    ids = hidden.new_full((*hidden.shape[:-1], k), -1, dtype=torch.int32)
    values = hidden.new_full(ids.shape, -torch.inf, dtype=compute_dtype(hidden))
    sums, entropy = _tail_results(hidden, tail)
    out_ids, out_values = ids.view(-1, k), values.view(-1, k)
    for piece, logits, piece_mask, part in _head_pieces(head, mask, tail, max(limit, tail.width)):
        which = Allowed(limit, banned, piece_mask)
        if tail.width and not _reshapes(head):
            # Of the logits while they are in the cache.
            out_ids[piece], picked, *found = module.select_with_tail(logits, k, which, part)
        else:
            out_ids[piece], picked = module.select(logits, k, which)
            found = []
            if tail.width:
                part = part if part.ids is not None else part._replace(ids=out_ids[piece])
                shaped = _shaped_pieces(head, logits)
                found = [*module.tail_logsumexp(shaped, piece_mask, part)]
        out_values[piece] = plain.shaped(picked, scale, softcap)
        _write_tails(piece, found, sums, entropy)
    if debugging.ON:
        debugging.check_selected(values, mask)
    return ids, values, sums, entropy


def _select_linear_fake(
    head: Head, k: int, allowed: Allowed, tail: Tail, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _select_fake(head.hidden, k, allowed, tail, backend)


def _tail_logsumexp(
    logits: Tensor, mask: Tensor | None, tail: Tail, backend: str
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy outside of the tail's ids."""
    if tail.ids is None:
        raise ValueError("the tail has no ids, expected those that it leaves out")
    _check_tail(tail, logits)
    _check_mask(mask, logits)
    if debugging.ON:
        debugging.check_row(logits, "logits", tail.width, mask)
    sums, entropy = _tail_module(backend, logits, tail).tail_logsumexp(logits, mask, tail)
    return sums, _nothing_of(logits) if entropy is None else entropy


def _tail_fake(logits: Tensor, tail: Tail) -> tuple[Tensor, Tensor]:
    sums = _wide_rows(logits) if tail.width else _nothing_of(logits)
    return sums, _wide_rows(logits) if tail.width and tail.with_entropy else _nothing_of(logits)


def _tail_logsumexp_fake(
    logits: Tensor, mask: Tensor | None, tail: Tail, backend: str
) -> tuple[Tensor, Tensor]:
    return _tail_fake(logits, tail._replace(width=1))


def _tail_logsumexp_linear(
    head: Head, mask: Tensor | None, tail: Tail, backend: str
) -> tuple[Tensor, Tensor]:
    """``tail_logsumexp`` on the logits of a head, which are computed a few rows at a time."""
    hidden, weight, bias, *_ = head
    _check_head(hidden, weight, bias, Allowed(0, None, mask))
    if tail.ids is None:
        raise ValueError("the tail has no ids, expected those that it leaves out")
    _check_tail(tail, hidden, weight.shape[0])
    if debugging.ON:
        debugging.check_head(head, Allowed(tail.width, None, mask))
    module = _tail_module(backend, hidden, tail)
    sums, entropy = _tail_results(hidden, tail)
    for piece, logits, piece_mask, part in _head_pieces(head, mask, tail, tail.width):
        found = module.tail_logsumexp(_shaped_pieces(head, logits), piece_mask, part)
        _write_tails(piece, found, sums, entropy)
    return sums, entropy


def _tail_logsumexp_linear_fake(
    head: Head, mask: Tensor | None, tail: Tail, backend: str
) -> tuple[Tensor, Tensor]:
    return _tail_fake(head.hidden, tail._replace(width=1))


def _tail_module(backend: str, logits: Tensor, tail: Tail) -> Any:
    assert tail.ids is not None
    return backends.resolve(backend, logits.device, (logits.dtype,), tail.ids.shape[-1])


def _tail_results(hidden: Tensor, tail: Tail) -> tuple[Tensor, Tensor]:
    """Memory for the tails of a head's logits, 0 in rows that are left out."""
    sums, entropy = _tail_fake(hidden, tail)
    return sums.zero_(), entropy.zero_()


def _write_tails(
    piece: slice | Tensor, found: Sequence[Tensor | None], sums: Tensor, entropy: Tensor
) -> None:
    """Writes what was found for some rows, if anything was asked for."""
    for out, some in zip((sums, entropy), found, strict=False):
        if some is not None:
            out.view(-1)[piece] = some


def _head_pieces(
    head: Head, mask: Tensor | None, tail: Tail, width: int
) -> Iterator[tuple[slice | Tensor, Tensor, Tensor | None, Tail]]:
    """(rows, the head's logits below a width, mask, tail) of a few rows at a time."""
    hidden, weight, bias, *_ = head
    ids = None if tail.ids is None else tail.ids.reshape(-1, tail.ids.shape[-1])
    value, rows = tail.temperature
    rows = None if rows is None else rows.reshape(-1)
    weight, bias = weight[:width], None if bias is None else bias[:width]
    for piece, logits, piece_mask in plain.head_logits(hidden, weight, bias, mask):
        temperature = Temperature(value, None if rows is None else rows[piece])
        listed = None if ids is None else ids[piece]
        yield piece, logits, piece_mask, tail._replace(temperature=temperature, ids=listed)


def _reshapes(head: Head) -> bool:
    return head.scale != 1 or head.softcap is not None


def _shaped_pieces(head: Head, logits: Tensor) -> Tensor:
    """Logits with scale and softcap, in float32: they would be rounded once more."""
    if not _reshapes(head):
        return logits
    return plain.shaped(logits.to(compute_dtype(logits)), head.scale, head.softcap)


def _wide_rows(logits: Tensor) -> Tensor:
    """Memory for a sum of each row."""
    return logits.new_empty(logits.shape[:-1], dtype=wide_dtype(logits.device))


def _nothing_of(logits: Tensor) -> Tensor:
    """In place of sums that nobody asked for: no element in each row."""
    return logits.new_empty((*logits.shape[:-1], 0), dtype=wide_dtype(logits.device))


def _gather(student: Tensor, ids: Tensor, allowed: Allowed, backend: str) -> tuple[Tensor, Tensor]:
    _check_allowed(allowed, student, student.shape[-1])
    _check_ids(ids, (*student.shape[:-1], ids.shape[-1]), student)
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
    _check_sides(student, teacher, allowed, objective)
    _check_ids(ids, teacher.shape, student)
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
    _check_sides(student, teacher, allowed, objective)
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
    _check_sides(student, teacher, allowed, objective)
    _check_ids(ids, teacher.shape, student)
    _check_sums(tails.teacher, "the teacher's tail", student)
    _check_sums(tails.student, "the student's tail", student)
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
    return loss, out_ids, grad, torch.empty_like(loss), _wide_rows(student)


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
    out: Tensor,
    entry_grad: Tensor,
    ids: Tensor,
    upstream: Tensor,
    background: Background,
    backend: str,
) -> None:
    """The dense gradient, written over what ``out`` holds: zeros or the background, and entries."""
    _refuse_lost_graph("topk_rkl")
    _check_device(out, "out", ids)
    if out.shape[:-1] != ids.shape[:-1]:
        raise ValueError(
            f"out has shape {tuple(out.shape)}, expected the entries' leading shape "
            f"{tuple(ids.shape[:-1])}"
        )
    if background.factors is None:
        module = _scatter_backend(backend, entry_grad, ids, upstream, out.dtype)
        module.scatter_(out, entry_grad, ids, upstream)
    else:
        _check_background(background, out)
        module = _scatter_backend(backend, entry_grad, ids, upstream, out.dtype, full=True)
        module.scatter_background_(out, entry_grad, ids, upstream, background)
    _tell_autograd(out)


def _scatter_background(
    entry_grad: Tensor, ids: Tensor, upstream: Tensor, background: Background, backend: str
) -> Tensor:
    """``scatter`` over a background: in shape and dtype the gradient of the background's logits."""
    _refuse_lost_graph("topk_divergence")
    logits = background.logits
    if logits is None:
        raise ValueError("logits are None, expected those that the background is made of")
    _check_background(background, logits)
    _check_device(logits, "logits", ids)
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
    _check_device(out, "out", ids)
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
    _check_device(entry_grad, "entry_grad", ids)
    _check_device(upstream, "upstream", ids)
    dtypes, k = (dtype, entry_grad.dtype), ids.shape[-1]
    if full:
        k = max(k - 1, 1)  # a sampled token is one entry more than a support has
    return backends.resolve(backend, ids.device, dtypes, k)


def _gather_dot(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    allowed: Allowed,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``gather`` on the logits of a head, of which no others are computed."""
    _check_head(hidden, weight, bias, allowed)
    _check_device(ids, "ids", hidden)
    _check_width(ids)
    if debugging.ON:
        debugging.check_gather(hidden, weight, bias, ids, allowed)
    dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
    module = backends.resolve_linear(backend, hidden.device, dtypes, ids.shape[-1])
    return module.gather_dot(hidden, weight, bias, ids, allowed)


def _gather_dot_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    allowed: Allowed,
    backend: str,
) -> tuple[Tensor, Tensor]:
    logits = hidden.new_empty(ids.shape, dtype=compute_dtype(hidden, weight))
    return logits, torch.empty_like(logits, dtype=torch.int32)


def _gather_dot_hidden(
    upstream: Tensor, ids: Tensor, weight: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    module = _gradient_backend(backend, upstream, ids, weight, dtype)
    return module.gather_dot_hidden(upstream, ids, weight, dtype)


def _gather_dot_hidden_fake(
    upstream: Tensor, ids: Tensor, weight: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    return weight.new_empty((*ids.shape[:-1], weight.shape[1]), dtype=dtype)


def _gather_dot_weight(
    upstream: Tensor, ids: Tensor, hidden: Tensor, vocab: int, dtype: torch.dtype, backend: str
) -> Tensor:
    module = _gradient_backend(backend, upstream, ids, hidden, dtype)
    return module.gather_dot_weight(upstream, ids, hidden, vocab, dtype)


def _gather_dot_weight_fake(
    upstream: Tensor, ids: Tensor, hidden: Tensor, vocab: int, dtype: torch.dtype, backend: str
) -> Tensor:
    return hidden.new_empty((vocab, hidden.shape[-1]), dtype=dtype)


def _gradient_backend(
    backend: str, upstream: Tensor, ids: Tensor, factor: Tensor, dtype: torch.dtype
) -> backends.LinearBackend:
    """The backend, once dtypes and devices are known to fit. ``factor``: hidden or weight."""
    check_upstream_dtype(upstream)
    _check_device(upstream, "upstream", ids)
    _check_device(factor, "hidden states or weight", ids)
    _refuse_lost_graph("linear_topk_rkl")
    dtypes = (upstream.dtype, factor.dtype, dtype)
    return backends.resolve_linear(backend, ids.device, dtypes, ids.shape[-1])


# Kernels take addresses. What they would read is checked here, whoever calls.


def _check_rows(tensor: Tensor | None, name: str, logits: Tensor) -> None:
    """Raises unless ``tensor`` has one element per row, on the logits' device."""
    if tensor is not None:
        check_row_shape(tensor, logits.shape[:-1], name)
        check_same_device(tensor, logits.device, name)


def _check_sums(tensor: Tensor | None, name: str, logits: Tensor) -> None:
    """Raises unless ``tensor`` has a floating number per row."""
    _check_rows(tensor, name, logits)
    if tensor is not None and not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating dtype")


def _check_device(tensor: Tensor | None, name: str, other: Tensor) -> None:
    """Raises unless ``tensor`` is on the device of ``other``."""
    if tensor is not None and tensor.device != other.device:
        check_same_device(tensor, other.device, name, "the other tensors are")


def _check_ids(ids: Tensor, shape: Sequence[int], student: Tensor) -> None:
    """Raises unless the ids of a given support are integers of that shape."""
    _check_device(ids, "ids", student)
    if ids.shape != tuple(shape):
        raise ValueError(f"ids have shape {tuple(ids.shape)}, expected {tuple(shape)}")
    if ids.dtype not in ID_DTYPES:
        raise TypeError(f"ids have dtype {ids.dtype}, allowed are int32 and int64")
    _check_width(ids)


def _check_width(ids: Tensor) -> None:
    """Raises unless a support has entries: kernels are compiled for 1 or more."""
    if ids.shape[-1] == 0:
        raise ValueError(f"ids have shape {tuple(ids.shape)}, expected 1 or more per row")


def _check_allowed(allowed: Allowed, logits: Tensor, vocab: int) -> None:
    """Raises unless the mask has the logits' rows and the limit lies in vocabulary and bitmap."""
    limit, banned, mask = allowed
    if not 0 <= limit <= vocab:
        raise ValueError(f"limit is {limit}, allowed is 0 to the vocabulary of {vocab}")
    _check_mask(mask, logits)
    if banned is not None:
        check_bitmap(banned, limit)
        check_same_device(banned, logits.device, "banned")


def _check_mask(mask: Tensor | None, logits: Tensor) -> None:
    """Raises unless there is no mask, or a flag for each row."""
    _check_rows(mask, "mask", logits)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}, expected bool")


def _check_tail(tail: Tail, logits: Tensor, vocab: int | None = None) -> None:
    """Raises unless a tail lies in the vocabulary and what it has per row has the logits' rows."""
    vocab = logits.shape[-1] if vocab is None else vocab
    if not 0 <= tail.width <= vocab:
        raise ValueError(f"width is {tail.width}, allowed is 0 to the vocabulary of {vocab}")
    _check_rows(tail.temperature.rows, "temperature", logits)
    if tail.ids is not None:
        _check_ids(tail.ids, (*logits.shape[:-1], tail.ids.shape[-1]), logits)


def _check_sides(student: Tensor, teacher: Tensor, allowed: Allowed, objective: Objective) -> None:
    """Raises unless student, teacher and what belongs to their rows fit together."""
    check_same_rows(student.shape[:-1], teacher.shape[:-1])
    _check_allowed(allowed, student, student.size(-1))
    _check_device(teacher, "teacher", student)
    _check_rows(objective.temperature.rows, "temperature", student)
    _check_rows(objective.teacher_temperature.rows, "teacher_temperature", student)
    if objective.weights is not None:
        check_row_shape(objective.weights, torch.Size((*student.shape[:-1], 4)), "weights")
        check_same_device(objective.weights, student.device, "weights")
        if not objective.weights.dtype.is_floating_point:
            raise TypeError(
                f"weights have dtype {objective.weights.dtype}, expected a floating one"
            )


def _check_background(background: Background, out: Tensor) -> None:
    """Raises unless a background has the rows of the gradient ``out``, and logits of its width."""
    if background.logsumexp is None:
        raise ValueError("logsumexp is None, expected one per row beside factors")
    if not 1 <= background.limit <= out.shape[-1]:
        raise ValueError(
            f"limit is {background.limit}, allowed is 1 to the vocabulary of {out.shape[-1]}"
        )
    for name in ("factors", "logsumexp"):
        _check_sums(getattr(background, name), name, out)
    _check_rows(background.temperature.rows, "temperature", out)
    logits = background.logits
    if logits is not None:
        _check_device(logits, "logits", out)
        check_row_shape(logits, out.shape, "logits", "the gradient's")
        check_logits(logits, "logits")


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, allowed: Allowed) -> None:
    """Raises unless a head's parts and what belongs to its rows fit together."""
    _check_device(weight, "weight", hidden)
    if bias is not None:
        check_bias(bias, weight)
        _check_device(bias, "bias", hidden)
    _check_allowed(allowed, hidden, weight.shape[0])


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


_TAIL = "Tensor tail, Tensor entropy"
_SELECTED = f"Tensor ids, Tensor values, {_TAIL}"
_DIVERGENCE = "Tensor loss, Tensor ids, Tensor entry_grad"
_FULL_DIVERGENCE = f"{_DIVERGENCE}, Tensor factors, Tensor logsumexp"
_GATHERED = "Tensor values, Tensor slots"
_GRADIENT = "Tensor grad"

OPERATORS = {
    "select": Operator(_select, _select_fake, _SELECTED, by_rows=True),
    "select_linear": Operator(_select_linear, _select_linear_fake, _SELECTED, by_rows=True),
    "tail_logsumexp": Operator(_tail_logsumexp, _tail_logsumexp_fake, _TAIL, by_rows=True),
    "tail_logsumexp_linear": Operator(
        _tail_logsumexp_linear, _tail_logsumexp_linear_fake, _TAIL, by_rows=True
    ),
    "gather": Operator(_gather, _gather_fake, _GATHERED, by_rows=True),
    "gather_dot": Operator(_gather_dot, _gather_dot_fake, _GATHERED, by_rows=True),
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
    "gather_dot_hidden": Operator(_gather_dot_hidden, _gather_dot_hidden_fake, _GRADIENT),
    "gather_dot_weight": Operator(_gather_dot_weight, _gather_dot_weight_fake, _GRADIENT),
}
_CALLS = {name: register(name, record) for name, record in OPERATORS.items()}

select = _CALLS["select"]
select_linear = _CALLS["select_linear"]
tail_logsumexp = _CALLS["tail_logsumexp"]
tail_logsumexp_linear = _CALLS["tail_logsumexp_linear"]
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
