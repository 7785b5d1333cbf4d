"""The mathematics in plain PyTorch: the specification, and the backend that runs anywhere.

One row is one token. With student logits z, teacher logits t and the support S, the teacher's K
best allowed ids, the paper's loss is

    p = softmax(z[S] / T)    q = softmax(t[S] / T')    l = log p - log q
    L = sum over S of p l    dL/dz_v = p_v (l_v - L) / T  for v in S, 0 elsewhere

and ``opd_kernels.reference.divergence`` has the formulas of the whole family.

A loss is a pipeline of entries: ``select`` the support, ``gather`` the student's values there,
``entry_divergence``, ``scatter`` the gradient. ``select_divergence`` is the first three at once.
Losses of full softmaxes need the log-sum-exp outside of the support on both sides as well, its
*tail*: ``select_with_tail`` or ``tail_logsumexp``, ``full_divergence``, ``scatter_background``.
``scatter_`` and ``scatter_background_`` write into given memory, ``scatter_add_`` adds to it.
``gather_dot`` and its two gradients are for students that are hidden states and a head.

Shapes: student (..., V), teacher (..., V_t) or (..., K), ids int32 (..., K), hidden (..., H),
weight (V, H), everything per row (...).

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

from opd_kernels._arguments import (
    Allowed,
    Background,
    Objective,
    Tail,
    Tails,
    Temperature,
    compute_dtype,
    unpack_bitmap,
    wide_dtype,
)
from opd_kernels._ordering import repeats
from opd_kernels.backends import plain
from opd_kernels.reference.divergence import (
    NEVER,
    centred,
    log_softmax,
    per_row,
    sampled_terms,
    terms,
    wide,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Gathered rows of a head are widened in pieces of this many elements.
_PIECE_ELEMENTS = 1 << 22
# A slope is so many times p where p has next to no digits in float32.
_FAR_TAIL = 1e25


def refusal(
    device: torch.device, dtypes: tuple[torch.dtype, ...], k: int, vocab: int = 0
) -> str | None:
    """The reference serves every device, and every floating dtype and K that there is."""
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"{dtype} is not float16, bfloat16, float32 or float64"
    return f"k is {k}, allowed is 1 or more" if k < 1 else None


def select(logits: Tensor, k: int, allowed: Allowed) -> tuple[Tensor, Tensor]:
    """The k best allowed ids in order of (value descending, id ascending), and their values.

    A stable sort: ties go to the lower id, -0 equals +0, NaN ranks highest. Where fewer than k can
    be selected, and in masked rows, the id is -1 and the value -inf.
    """
    limit, banned, mask = allowed
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


def gather(student: Tensor, ids: Tensor, allowed: Allowed) -> tuple[Tensor, Tensor]:
    """The student's values at the ids, and the slots (..., K).

    Slot k is k, or -1 where the id takes no part; the value is 0 there. With the slots as ids, the
    values are a student with a vocabulary of K.
    """
    ids = _allowed_ids(ids, allowed)
    values = student.gather(-1, ids.clamp(min=0).long()).to(compute_dtype(student))
    return _with_slots(values, ids)


def select_with_tail(
    logits: Tensor, k: int, allowed: Allowed, tail: Tail
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``select``, and ``tail_logsumexp`` without the tail's ids or those that are selected."""
    ids, values = select(logits, k, allowed)
    tail = tail if tail.ids is not None else tail._replace(ids=ids)
    return ids, values, *tail_logsumexp(logits, allowed.mask, tail)


def tail_logsumexp(logits: Tensor, mask: Tensor | None, tail: Tail) -> tuple[Tensor, Tensor | None]:
    """(log-sum-exp, entropy or None) of x / T over the ids in [0, width) not listed, float64.

    Ids outside of that range name nothing. Masked rows have 0. It is summed directly: 1 minus what
    the listed ids hold would lose a small tail. The entropy is that of the tail's own softmax, in
    nats; 0 where nothing is left.
    """
    width, (value, rows), ids, with_entropy = tail
    assert ids is not None
    temperatures = () if rows is None else (rows,)

    def scaled(logits: Tensor, ids: Tensor, *temperatures: Tensor) -> Tensor:
        listed = (ids >= 0) & (ids < width)
        places = torch.where(listed, ids, width).long()  # one more column, which is cut off
        logits = torch.nn.functional.pad(logits, (0, 1)).scatter(-1, places, NEVER)
        divisor = wide(temperatures[0])[..., None] if temperatures else value
        return logits[..., :width] / divisor

    def logsumexp(*rows: Tensor) -> Tensor:
        return scaled(*rows).logsumexp(-1)

    def entropy(*rows: Tensor) -> Tensor:
        x = scaled(*rows)
        total = x.logsumexp(-1, keepdim=True)
        log_p = x - torch.where(total == NEVER, 0, total)
        return -torch.where(log_p == NEVER, 0, log_p.exp() * log_p).sum(-1)

    logits, given = logits[..., :width], (ids, *temperatures)
    dtype = wide_dtype(logits.device)
    sums = plain.reduce_rows(logsumexp, logits, mask, *given, dtype=dtype)
    if not with_entropy:
        return sums, None
    return sums, plain.reduce_rows(entropy, logits, mask, *given, dtype=dtype)


def select_divergence(
    student: Tensor, teacher: Tensor, k: int, allowed: Allowed, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """``entry_divergence`` on the support that ``select`` finds in the teacher's logits."""
    ids, values = select(teacher, k, allowed)
    loss, ids, grad = _renormalised(student, values, ids, objective)
    return loss, ids, _finite(grad, loss.dtype)


def entry_divergence(
    student: Tensor, teacher: Tensor, ids: Tensor, allowed: Allowed, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (...), ids (..., K) and entry gradients (..., K), both sides normalised over the ids.

    ``teacher`` holds its values at the ids. In the returned ids every id occurs once: gradients of
    repeated ids are added into the first, and absent entries are -1 with gradient 0.
    """
    loss, ids, grad = _renormalised(student, teacher, _allowed_ids(ids, allowed), objective)
    ids, grad = _merge_duplicates(ids, grad)
    return loss, ids, _finite(grad, loss.dtype)


def _renormalised(
    student: Tensor, values: Tensor, ids: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """``entry_divergence``; gradients of repeated ids are not added yet."""
    ids, z, t = _entries(student, values, ids)
    log_p, *_ = log_softmax(z, objective.temperature)
    log_q, *_ = log_softmax(t, objective.teacher_temperature)
    value, slope, _ = centred(terms(log_p, log_q, objective), log_p, objective)
    grad = (slope - log_p.exp() * slope.sum(-1, keepdim=True)) / per_row(objective.temperature)
    nothing = (z == NEVER).all(-1, keepdim=True)
    poisoned = _poisoned(ids, z, t)
    loss, grad = _judged(nothing, poisoned, objective, value.sum(-1, keepdim=True), grad)
    return loss[..., 0].to(compute_dtype(student, values)), ids, grad.masked_fill(ids < 0, 0)


def full_divergence(
    student: Tensor,
    teacher: Tensor,
    ids: Tensor,
    allowed: Allowed,
    objective: Objective,
    tails: Tails,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``entry_divergence`` of full softmaxes, which are normalised over entries and tails.

    Returns (loss, ids, entry gradients, factors, log-sum-exps of the student, or of its tail where
    the factor is relative to that). The last two, one per row, make the gradient elsewhere. An id
    that is listed again is absent. With outside="sample" the last id is the sampled token's, or -1
    where the token is in the support.
    """
    sample, bucket = objective.outside == "sample", objective.outside == "bucket"
    count, dtype, mask = ids.shape[-1] - sample, compute_dtype(student, teacher), allowed.mask
    known = _allowed_ids(ids, allowed)
    if sample:  # a token may have been sampled although it is banned
        token = _allowed_ids(ids[..., -1:], Allowed(tails.width, None, mask))
        known = torch.cat((known[..., :-1], token), -1)
    listed = torch.where(teacher == NEVER, -1, ids)[..., :count]
    repeat = torch.nn.functional.pad(repeats(listed) & (listed >= 0), (0, int(sample)))
    found, z, t = _entries(student, teacher, torch.where(repeat, -1, known))
    absent = torch.where((found >= 0) | repeat, -1, ids)[..., :count]
    # Also where it is given: the absent ids would have to join that one.
    over = Tail(tails.width, objective.temperature, found[..., :count], False)
    tail_s = tail_logsumexp(student, mask, over)[0][..., None]
    rest = torch.where(absent >= 0, wide(teacher)[..., :count], NEVER)
    tail_t = _rejoined(tails.teacher, rest, objective.teacher_temperature)

    log_p, rest_p, total_s = log_softmax(z, objective.temperature, tail_s, count)
    log_q, rest_q, total_t = log_softmax(t, objective.teacher_temperature, tail_t, count)
    reference = total_s
    if sample:
        value, slope = sampled_terms(log_p, log_q, objective)
        background = -slope.sum(-1, keepdim=True)
    elif bucket:
        log_p_and_tail = torch.cat((log_p, rest_p), -1)
        log_q_and_tail = torch.cat((log_q, rest_q), -1)
        found_terms = terms(log_p_and_tail, log_q_and_tail, objective)
        value, slope, relative = centred(found_terms, log_p_and_tail, objective)
        share, c = relative[..., -1:], slope.sum(-1, keepdim=True)
        # Where p of the tail is next to nothing, the background is relative to the tail.
        far, empty = ~(share.abs() <= _FAR_TAIL), tail_s == NEVER
        of_tail = slope[..., -1:] - c * log_p_and_tail[..., -1:].exp()
        background = torch.where(far, torch.where(empty, 0, of_tail), share - c)
        reference = torch.where(far & ~empty, tail_s, total_s)
    else:
        value, slope, _ = terms(log_p, log_q, objective)
        background = -slope.sum(-1, keepdim=True)
    temperature, c = per_row(objective.temperature), slope.sum(-1, keepdim=True)
    grad = (slope[..., : ids.shape[-1]] - c * log_p.exp()) / temperature

    nothing = (total_s == NEVER) | (total_t == NEVER)
    poisoned = _poisoned(found, z, t) | ~(tail_s < torch.inf) | ~(tail_t < torch.inf)
    if mask is not None:
        nothing, poisoned = nothing | ~mask[..., None], poisoned & mask[..., None]
    loss, grad, factors = _judged(
        nothing, poisoned, objective, value.sum(-1, keepdim=True), grad, background / temperature
    )
    grad = _finite(grad.masked_fill(found < 0, 0), dtype)
    loss, factors = loss[..., 0].to(dtype), _finite(factors[..., 0], dtype)
    return loss, found, grad, factors, reference[..., 0].masked_fill(nothing[..., 0], 0)


def _entries(student: Tensor, teacher: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, student's and teacher's values there), -1 and -inf where an entry is absent."""
    present = (ids >= 0) & (teacher != NEVER)
    ids = torch.where(present, ids, -1)
    z = wide(student.gather(-1, ids.clamp(min=0).long()))
    return ids, torch.where(present, z, NEVER), torch.where(present, wide(teacher), NEVER)


def _rejoined(tail: Tensor, values: Tensor, temperature: Temperature) -> Tensor:
    """A tail (..., 1) that also holds these values."""
    return torch.logaddexp(
        wide(tail)[..., None], (values / per_row(temperature)).logsumexp(-1, keepdim=True)
    )


def _poisoned(ids: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Whether an entry of the row is NaN or +inf, (..., 1)."""
    return ((ids >= 0) & ~((z < torch.inf) & (t < torch.inf))).any(-1, keepdim=True)


def _judged(
    nothing: Tensor, poisoned: Tensor, objective: Objective, *results: Tensor
) -> Iterator[Tensor]:
    """Results of rows: 0 where there is nothing to compute, NaN where an entry is.

    A temperature that is not allowed is NaN and makes its row NaN. Other NaN are differences of
    what overflowed; no input is NaN there.
    """
    sides = per_row(objective.temperature), per_row(objective.teacher_temperature)
    known = (sides[0] == sides[0]) & (sides[1] == sides[1])
    return (
        x.masked_fill(x.isnan() & known | nothing, 0).masked_fill(poisoned, torch.nan)
        for x in results
    )


def scatter(
    entry_grad: Tensor, ids: Tensor, upstream: Tensor, width: int, dtype: torch.dtype
) -> Tensor:
    """The dense gradient (..., V): upstream * entry gradient at the ids, 0 elsewhere.

    Ids outside [0, V) are absent.
    """
    out = torch.empty(*ids.shape[:-1], width, dtype=dtype, device=ids.device)
    scatter_(out, entry_grad, ids, upstream)
    return out


def scatter_(out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor) -> None:
    """As ``scatter``, written over what ``out`` holds."""
    present = (ids >= 0) & (ids < out.shape[-1])
    values = torch.where(present, upstream[..., None] * entry_grad, 0).to(out.dtype)
    # Absent entries add 0 to id 0; present ids are unique, so nothing is rounded twice.
    out.zero_().scatter_add_(-1, torch.where(present, ids, 0).long(), values)


def scatter_background(
    entry_grad: Tensor, ids: Tensor, upstream: Tensor, background: Background
) -> Tensor:
    """The dense gradient over a background, of the shape and dtype of the background's logits."""
    logits = background.logits
    assert logits is not None
    out = logits.new_empty(logits.shape)
    scatter_background_(out, entry_grad, ids, upstream, background)
    return out


def scatter_background_(
    out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor, background: Background
) -> None:
    """As ``scatter_``, over a background: factor * p in place of zeros, p = exp(z / T - logsumexp).

    z are the background's logits, or what ``out`` holds; p is 0 from the background's limit on.
    """
    factors, logsumexp, limit, logits, temperature = background
    assert factors is not None
    assert logsumexp is not None
    z = wide(out if logits is None else logits)[..., :limit]
    p = (z / per_row(temperature) - wide(logsumexp)[..., None]).clamp(max=0).exp()
    # Finite, unless it is NaN, so that a p of 0 gives 0.
    scaled = _finite(wide(upstream) * wide(factors), wide_dtype(out.device))
    scaled = torch.where(factors == 0, 0, scaled)[..., None]
    values = torch.where(scaled == 0, 0, scaled * p)
    width = out.shape[-1]
    # Absent entries go to one more column, which is cut off.
    grad = torch.nn.functional.pad(values, (0, width + 1 - values.shape[-1]))
    places = torch.where((ids < 0) | (ids >= width), width, ids).long()
    grad.scatter_(-1, places, (upstream[..., None] * entry_grad).to(grad.dtype))
    out.copy_(grad[..., :width])


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
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, allowed: Allowed
) -> tuple[Tensor, Tensor]:
    """The head's logits at the ids: z_k = W[id_k] . h + b[id_k], and the slots, as ``gather``."""
    ids, dtype = _allowed_ids(ids, allowed), compute_dtype(hidden, weight)
    logits = torch.empty(ids.shape, dtype=dtype, device=ids.device)
    for piece in _pieces(ids, hidden.shape[-1]):
        piece_ids = ids[piece].clamp(min=0).long()
        z = (weight[piece_ids].to(dtype) * hidden[..., None, :].to(dtype)).sum(-1)
        logits[piece] = z if bias is None else z + bias[piece_ids].to(dtype)
    return _with_slots(logits, ids)


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


def _allowed_ids(ids: Tensor, allowed: Allowed) -> Tensor:
    """A given support's ids as int32, -1 for those that take no part."""
    limit, banned, mask = allowed
    known = (ids >= 0) & (ids < limit)
    if banned is not None:
        excluded = unpack_bitmap(banned, limit)
        known &= ~excluded[torch.where(known, ids, 0).long()]
    if mask is not None:
        known &= mask[..., None]
    return torch.where(known, ids, -1).to(torch.int32)


def _with_slots(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(values, slots) of entries, 0 and -1 where the id is."""
    slots = torch.arange(ids.shape[-1], dtype=torch.int32, device=ids.device)
    return torch.where(ids < 0, 0, values), torch.where(ids < 0, -1, slots)


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
