"""The mathematics in plain PyTorch: the specification, and the backend that runs anywhere.

One row is one token. With student logits z, teacher logits t and the support S, the teacher's K
best allowed ids:

    p = softmax(z[S] / T)    q = softmax(t[S] / T')    l = log p - log q
    L = sum over S of p l    dL/dz_v = p_v (l_v - L) / T  for v in S, 0 elsewhere

Every backend has three primitives: ``select``, ``divergence`` and ``scatter``. ``scatter_`` writes
into given memory and ``scatter_add_`` adds to it. ``gather_dot`` and its two gradients are for
students that are hidden states and a head. Shapes: student (..., V), teacher (..., V_t) or
(..., K), ids int32 (..., K), hidden (..., H), weight (V, H), everything per row (...).

Arithmetic is float32, or float64 where an input is. It is float64 for a row's K entries: late in
training p is nearly q, and l is a small difference of large logarithms. Temporaries are as large as
the logits. This module is for reading, for checking, for float64 and for K above what the kernels
take.

Source: arXiv 2603.25562, teacher top-K local support matching.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

NEVER = float("-inf")
# Gathered rows of a head are widened in pieces of this many elements.
_PIECE_ELEMENTS = 1 << 22


def refusal(device: torch.device, dtypes: tuple[torch.dtype, ...], k: int, vocab: int = 0) -> None:
    """The reference serves every device, dtype and K."""


def select(
    logits: Tensor, k: int, limit: int, banned: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The k best ids of [0, limit) in order of (value descending, id ascending), and their values.

    A stable sort: ties go to the lower id, -0 equals +0, NaN ranks highest. Where fewer than k can
    be selected, and in masked rows, the id is -1 and the value -inf.
    """
    values = logits[..., :limit].to(compute_dtype(logits))
    ids = torch.arange(values.shape[-1], device=logits.device)
    if banned is not None:
        # Banned columns go last, so that a stable sort puts them behind every other -inf.
        excluded = unpack_bitmap(banned, values.shape[-1])
        ids = torch.argsort(excluded, stable=True)
        values = values.masked_fill(excluded, NEVER)[..., ids]
        ids = torch.where(excluded[ids], -1, ids)
    # Some devices sort by bits, so every NaN and every zero gets the same bits.
    keys = torch.where(values.isnan(), torch.nan, values + 0.0)
    order = torch.sort(keys, dim=-1, descending=True, stable=True).indices[..., :k]
    values, ids = values.gather(-1, order), ids[order]
    missing = k - values.shape[-1]
    if missing > 0:
        values = torch.nn.functional.pad(values, (0, missing), value=NEVER)
        ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
    if mask is not None:
        values = values.masked_fill(~mask[..., None], NEVER)
        ids = ids.masked_fill(~mask[..., None], -1)
    return ids.to(torch.int32), values.contiguous()


def divergence(
    student: Tensor,
    teacher: Tensor,
    teacher_ids: Tensor | None,
    k: int,
    limit: int,
    banned: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (...), ids (..., K) and entry gradients (..., K) of the renormalised reverse KL.

    In the returned ids every id occurs once: gradients of repeated ids are added into the first,
    and absent entries are -1 with gradient 0.
    """
    dtype = compute_dtype(student, teacher)
    if teacher_ids is None:
        ids, values = select(teacher, k, limit, banned, mask)
    else:
        ids, values = _allowed_ids(teacher_ids, limit, banned, mask), teacher
    present = (ids >= 0) & (values != NEVER)
    ids = torch.where(present, ids, -1)
    t = torch.where(present, _wide(values), NEVER)
    z = _wide(student.gather(-1, ids.clamp(min=0).long()))
    z = torch.where(present, z, NEVER)

    student_t = _per_row(temperature)
    log_p = _log_softmax(z, student_t)
    log_ratio = log_p - _log_softmax(t, _per_row(teacher_temperature))
    p = log_p.exp()
    # p = 0 contributes 0 whatever log_ratio is: 0 * inf must not become NaN.
    loss = torch.where(p == 0, 0, p * log_ratio).sum(-1, keepdim=True)
    grad = torch.where(p == 0, 0, p * (log_ratio - loss) / student_t)
    grad = _finite(grad, grad.dtype)

    empty = (z == NEVER).all(-1, keepdim=True)
    poisoned = (present & ~((z < torch.inf) & (t < torch.inf))).any(-1, keepdim=True)
    loss = loss.masked_fill(empty, 0).masked_fill(poisoned, torch.nan)
    grad = grad.masked_fill(empty, 0).masked_fill(poisoned, torch.nan).masked_fill(~present, 0)
    if teacher_ids is not None:
        ids, grad = _merge_duplicates(ids, grad)
    return loss.squeeze(-1).to(dtype), ids, _finite(grad, dtype)


def scatter(
    entry_grad: Tensor, ids: Tensor, upstream: Tensor, width: int, dtype: torch.dtype
) -> Tensor:
    """The dense gradient (..., V): upstream * entry gradient at the ids, 0 elsewhere."""
    out = torch.empty(*ids.shape[:-1], width, dtype=dtype, device=ids.device)
    scatter_(out, entry_grad, ids, upstream)
    return out


def scatter_(out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor) -> None:
    """As ``scatter``, written over what ``out`` holds."""
    present = ids >= 0
    values = torch.where(present, upstream[..., None] * entry_grad, 0).to(out.dtype)
    # Absent entries add 0 to id 0; present ids are unique, so nothing is rounded twice.
    out.zero_().scatter_add_(-1, ids.clamp(min=0).long(), values)


def scatter_add_(out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor) -> None:
    """As ``scatter``, added to what ``out`` holds and rounded once; other elements are not touched.

    Ids outside [0, V) are absent. Every other id occurs in its row once.
    """
    dtype = compute_dtype(out, entry_grad)
    present = (ids >= 0) & (ids < out.shape[-1])
    *rows, _ = present.nonzero(as_tuple=True)
    places = (*rows, ids[present].long())
    added = (upstream[..., None].to(dtype) * entry_grad)[present]
    out[places] = (out[places].to(dtype) + added).to(out.dtype)


def gather_dot(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    limit: int,
    banned: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The head's logits at the ids: z_k = W[id_k] . h + b[id_k], and the slots (..., K).

    Slot k is k, or -1 where the id takes no part; z_k is 0 there. With the slots as ids, z is a
    student with a vocabulary of K.
    """
    ids = _allowed_ids(ids, limit, banned, mask)
    dtype, present = compute_dtype(hidden, weight), ids >= 0
    logits = torch.empty(ids.shape, dtype=dtype, device=ids.device)
    for piece in _pieces(ids, hidden.shape[-1]):
        piece_ids = ids[piece].clamp(min=0).long()
        z = (weight[piece_ids].to(dtype) * hidden[..., None, :].to(dtype)).sum(-1)
        logits[piece] = z if bias is None else z + bias[piece_ids].to(dtype)
    slots = torch.arange(ids.shape[-1], dtype=torch.int32, device=ids.device)
    return torch.where(present, logits, 0), torch.where(present, slots, -1)


def gather_dot_hidden(upstream: Tensor, ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """dL/dh = sum over k of dL/dz_k W[id_k], over the k whose dL/dz_k is not 0."""
    out = upstream.new_zeros((*ids.shape[:-1], weight.shape[1]), dtype=compute_dtype(upstream))
    for piece in _pieces(ids, weight.shape[1]):
        factor = upstream[piece][..., None]
        piece_ids = torch.where(upstream[piece] == 0, 0, ids[piece]).long()
        out += torch.where(factor == 0, 0, factor * weight[piece_ids].to(out.dtype)).sum(-2)
    return out.to(dtype)


def gather_dot_weight(
    upstream: Tensor, ids: Tensor, hidden: Tensor, vocab: int, dtype: torch.dtype
) -> Tensor:
    """dL/dW[v] = sum of dL/dz_k h over the rows and k with id_k = v whose dL/dz_k is not 0."""
    width = hidden.shape[-1]
    out = upstream.new_zeros((vocab, width), dtype=compute_dtype(upstream))
    for piece in _pieces(ids, width):
        factor = upstream[piece][..., None]
        piece_ids = torch.where(upstream[piece] == 0, 0, ids[piece]).long().flatten()
        terms = torch.where(factor == 0, 0, factor * hidden[..., None, :].to(out.dtype))
        # The one that is deterministic on the device.
        if out.device.type == "cpu":
            out.index_add_(0, piece_ids, terms.reshape(-1, width))
        else:
            out.index_put_((piece_ids,), terms.reshape(-1, width), accumulate=True)
    return out.to(dtype)


def _pieces(ids: Tensor, width: int) -> Iterator[tuple[Any, ...]]:
    """Slices of the K entries of all rows, with about _PIECE_ELEMENTS gathered elements each."""
    k = ids.shape[-1]
    step = max(1, _PIECE_ELEMENTS // max(ids.shape[:-1].numel() * width, 1))
    return ((..., slice(start, start + step)) for start in range(0, k, step))


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def unpack_bitmap(bitmap: Tensor, width: int) -> Tensor:
    """Bool (width,) of a uint8 bitmap, bit b of byte i standing for id 8 i + b."""
    bits = torch.arange(8, device=bitmap.device, dtype=torch.uint8)
    return ((bitmap[:, None] >> bits) & 1).flatten()[:width].bool()


def _allowed_ids(ids: Tensor, limit: int, banned: Tensor | None, mask: Tensor | None) -> Tensor:
    """A given support's ids as int32, -1 for those that take no part."""
    allowed = (ids >= 0) & (ids < limit)
    if banned is not None:
        excluded = unpack_bitmap(banned, limit)
        allowed &= ~excluded[torch.where(allowed, ids, 0).long()]
    if mask is not None:
        allowed &= mask[..., None]
    return torch.where(allowed, ids, -1).to(torch.int32)


def _wide(x: Tensor) -> Tensor:
    """As float64, or float32 on devices that lack it."""
    return x.float() if x.device.type == "mps" else x.double()


def _per_row(temperature: float | Tensor) -> float | Tensor:
    return _wide(temperature[..., None]) if isinstance(temperature, Tensor) else temperature


def _log_softmax(x: Tensor, temperature: float | Tensor) -> Tensor:
    """log softmax(x / T), kept finite so that an overflowing span never makes inf - inf.

    The maximum is subtracted before dividing: x / T alone may overflow.
    """
    top = x.amax(-1, keepdim=True)
    scaled = (x - top.masked_fill(top == NEVER, 0)) / temperature
    return (scaled - scaled.exp().sum(-1, keepdim=True).log()).clamp(min=torch.finfo(x.dtype).min)


def _finite(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts to a dtype; infinities become its largest numbers."""
    largest = torch.finfo(dtype).max
    return grad.clamp(-largest, largest).to(dtype)


def _merge_duplicates(ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Adds gradients of equal ids into the first occurrence; the others become absent."""
    ordered, order = torch.sort(ids, dim=-1, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    segment = first.long().cumsum(-1) - 1
    sums = torch.zeros_like(grad).scatter_add_(-1, segment, grad.gather(-1, order))
    merged = torch.where(first, sums.gather(-1, segment), 0)
    kept = torch.where(first, ordered, -1)
    return torch.empty_like(ids).scatter_(-1, order, kept), torch.empty_like(grad).scatter_(
        -1, order, merged
    )
