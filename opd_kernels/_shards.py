"""Reading vocabulary-parallel rows: each rank its own columns, then one exchange."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from opd_kernels import _collectives, _ops, backends
from opd_kernels._arguments import (
    Allowed,
    Reading,
    Tail,
    allowed_ids,
    compute_dtype,
    divisor,
    no_tail,
    wide_dtype,
)
from opd_kernels._linear_autograd import GatherDot, HeadRows, Rows
from opd_kernels._ordering import first_places, in_order, repeats
from opd_kernels._shard_autograd import LogitRows, Merged, ReducedGradient
from opd_kernels.backends import plain
from opd_kernels.distributed import Sharded
from opd_kernels.head import LinearLogits, as_autocast, head_as_operand, in_autocast

__all__ = ["attached", "gathered", "read", "values_of_head"]


def read(
    source: Sharded, reading: Reading, backend: str, *, joined: bool = False, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``_ops.read_linear`` returns, of rows whose columns lie on several ranks.

    One collective: each rank's K best, its values at the listed ids, and the log-sum-exp and
    entropy of its other columns. Where the listed ids are ``joined`` to the K best, they are
    outside of neither. With ``exact`` a head's values are not rounded as its product is, which
    still orders the K best.
    """
    found = _read_part(source, reading, backend, joined, exact)
    mask = reading.allowed.mask
    listed, tail = reading.listed, reading.tail
    *parts, at_listed = _collectives.exchanged(source.shard, found[:2] + found[3:], found[2])
    candidates, values, tails, entropies, unrounded = parts
    summed = tail.width > 0 and tail.ids is None  # what is not selected is in the tail
    candidates, values = (x.movedim(0, -2).flatten(-2) for x in (candidates, values))
    ids, values = in_order(candidates, values, candidates.shape[-1] if summed else reading.k)
    if listed is not None:
        outside = (listed < 0) | (listed >= min(_reach(reading), source.vocab))
        if mask is not None:
            outside = outside | ~mask[..., None]
        at_listed = at_listed.masked_fill(outside, -torch.inf)
    k = reading.k
    best, at_best = ids[..., :k].contiguous(), values[..., :k].contiguous()
    if unrounded.numel():
        at_best = _values_of(best, candidates, unrounded.movedim(0, -2).flatten(-2))
    if not tail.width:
        return best, at_best, at_listed, tails[0], entropies[0]
    tails, entropies = tails.movedim(0, -1), entropies.movedim(0, -1)
    if summed:
        lost = values[..., k:].to(tails.dtype) / divisor(tail.temperature, tails.dtype)
        if joined and listed is not None:
            kept = (ids[..., k:, None] == listed[..., None, :]).any(-1)
            lost = lost.masked_fill(kept, -torch.inf)
        tails = torch.cat((tails, lost), -1)
        if tail.with_entropy:
            entropies = torch.nn.functional.pad(entropies, (0, lost.shape[-1]))
    rest, entropy = _joined(tails, entropies if tail.with_entropy else None)
    if mask is not None:
        rest, entropy = (x.masked_fill(~mask, 0) if x.numel() else x for x in (rest, entropy))
    return best, at_best, at_listed, rest, entropy


def _values_of(ids: Tensor, candidates: Tensor, values: Tensor) -> Tensor:
    """The values of ids that are among the candidates, -inf where an id is -1."""
    candidates, order = candidates.sort(-1)
    places = torch.searchsorted(candidates, ids).clamp(max=max(candidates.shape[-1] - 1, 0))
    return values.gather(-1, order.gather(-1, places)).masked_fill(ids < 0, -torch.inf)


def _joined(tails: Tensor, entropies: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy of a row from those of its parts (..., C)."""
    whole = tails.logsumexp(-1)
    if entropies is None:
        return whole, tails.new_empty(0)
    log_shares = (tails - whole[..., None]).masked_fill(tails == -torch.inf, 0)
    shares = log_shares.exp().masked_fill(tails == -torch.inf, 0)
    return whole, (shares * (entropies - log_shares)).sum(-1)


def _read_part(
    source: Sharded, reading: Reading, backend: str, joined: bool, exact: bool
) -> tuple[Tensor, ...]:
    """This rank's share of what is read: ids of the whole vocabulary, 0 at listed ids elsewhere.

    The last are the K best values again, as ``exact`` ones.
    """
    k, allowed, tail, listed = reading
    exact = exact and isinstance(source.part, LinearLogits)
    if not source.below(_reach(reading)):
        _look_for(backend, source, max(k, 0 if listed is None else listed.shape[-1], 1))
        found = _no_part(source, reading)
        return *found, found[1] if exact else found[1].new_empty(0)
    kept, width = min(k, source.columns), source.below(tail.width)
    here = None if listed is None else source.local(listed)
    of_tail = no_tail()
    if width:
        at_ids = None if tail.ids is None else source.local(tail.ids)
        of_tail = Tail(width, tail.temperature, at_ids, tail.with_entropy)
    asked = Reading(kept, source.allowed(allowed), of_tail, here)
    read_once = _joined_apart if joined and width and here is not None else _local
    ids, values, at_listed, *sums = read_once(source.part, asked, backend)
    unrounded = values.new_empty(0)
    if exact:
        assert isinstance(source.part, LinearLogits)
        unrounded, at_listed = _exact(source.part, ids, here, allowed.mask, backend)
    ids = (ids + source.shard.start).masked_fill_(ids < 0, -1)
    if kept < k:
        ids = torch.nn.functional.pad(ids, (0, k - kept), value=-1)
        values = torch.nn.functional.pad(values, (0, k - kept), value=-torch.inf)
        if exact:
            unrounded = torch.nn.functional.pad(unrounded, (0, k - kept), value=-torch.inf)
    if here is not None:
        at_listed = at_listed.masked_fill(here < 0, 0)
    return ids, values, at_listed, *(sums if width else _no_sums(source, tail)), unrounded


def _exact(
    head: LinearLogits,
    ids: Tensor,
    listed: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The head's values at both ids, from products of their own."""
    wanted = ids if listed is None else torch.cat((ids, listed), -1)
    values = values_of_head(head, wanted, Allowed(head.vocab, None, mask), backend)
    return values[..., : ids.shape[-1]], values[..., ids.shape[-1] :]


def values_of_head(head: LinearLogits, ids: Tensor, allowed: Allowed, backend: str) -> Tensor:
    """A head's logits at the ids, not rounded, -inf where an id takes no part; no gradients."""
    bias = None if head.bias is None else head.bias.detach()
    hidden, weight = head.hidden.detach(), head.weight.detach()
    values, slots = _ops.gather_dot(hidden, weight, bias, ids, allowed, backend)
    values = plain.shaped(values, head.scale, head.softcap)
    return values.masked_fill(slots < 0, -torch.inf)


def _no_part(source: Sharded, reading: Reading) -> tuple[Tensor, ...]:
    """``_read_part`` of a rank that holds nothing of what is read."""
    rows, k = source.shape, reading.k
    ids = torch.full((*rows, k), -1, dtype=torch.int32, device=source.device)
    values = torch.full((*rows, k), -torch.inf, dtype=source.dtype, device=source.device)
    count = 0 if reading.listed is None else reading.listed.shape[-1]
    return ids, values, values.new_zeros((*rows, count)), *_no_sums(source, reading.tail)


def _no_sums(source: Sharded, tail: Tail) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy of no columns, as far as they are asked for."""
    rest = torch.full(
        source.shape if tail.width else (0,),
        -torch.inf,
        dtype=wide_dtype(source.device),
        device=source.device,
    )
    return rest, rest.new_zeros(rest.shape if tail.with_entropy else (0,))


def _look_for(backend: str, source: Sharded, k: int, *, hidden: bool = False) -> None:
    """Raises on a rank without columns what a backend raises on the others, lest it wait for them.

    One that is not asked for by name serves every call.
    """
    if backend != backends.AUTO and not torch.compiler.is_compiling():
        backends.resolve(backend, source.device, (source.tensor.dtype,), k, hidden=hidden)


def _reach(reading: Reading) -> int:
    """Below which ids anything is read."""
    return max(reading.allowed.limit, reading.tail.width)


def _local(part: Tensor | LinearLogits, reading: Reading, backend: str) -> tuple[Tensor, ...]:
    """What ``_ops.read_linear`` returns, of this rank's columns alone."""
    k, allowed, tail, listed = reading
    if isinstance(part, LinearLogits):
        if k or tail.width or listed is None:
            return _ops.read_linear(head_as_operand(part), reading, backend)
        head = in_autocast(part)
        everything = Allowed(_reach(reading), None, allowed.mask)
        at_listed = values_of_head(head, listed, everything, backend)
        none = at_listed.new_empty(0)
        return listed[..., :0], at_listed[..., :0], at_listed, none, none
    logits, nothing = part.detach(), part.new_empty(0)
    at_listed = sums = entropy = nothing
    rows = part.shape[:-1]
    ids = torch.empty((*rows, 0), dtype=torch.int32, device=part.device)
    values = ids.to(compute_dtype(part))
    if k:
        with_tail = tail.width and tail.ids is None
        ids, values, sums, entropy = _ops.select(
            logits, k, allowed, tail if with_tail else no_tail(), backend
        )
    if listed is not None:
        everything = Allowed(_reach(reading), None, allowed.mask)
        at_listed, slots = _ops.gather(logits, listed, everything, backend)
        at_listed = at_listed.masked_fill(slots < 0, -torch.inf)
    if tail.width and tail.ids is not None:
        sums, entropy = _ops.tail_logsumexp(logits, allowed.mask, tail, backend)
    return ids, values, at_listed, sums, entropy


def _joined_apart(
    part: Tensor | LinearLogits, reading: Reading, backend: str
) -> tuple[Tensor, ...]:
    """``_local`` whose tail is outside of the listed ids as well: that takes a second read.

    It reads the listed logits, as far as the tail goes: the K best may end before.
    """
    tail, listed = reading.tail, reading.listed
    assert listed is not None
    ids, values, *_ = _local(part, reading._replace(tail=no_tail(), listed=None), backend)
    tail = tail._replace(ids=torch.cat((ids, listed), -1))
    return ids, values, *_local(part, Reading(0, reading.allowed, tail, listed), backend)[2:]


def gathered(
    source: Sharded,
    ids: Tensor,
    known: Tensor | None,
    allowed: Allowed,
    repeated: bool,
    inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(logits at the ids with their gradients, slots): of a row's support, K numbers a row.

    Slot k is the place where id k is first, or -1 where it takes no part. Only ids that may be
    ``repeated`` are there twice. One collective, or none where the logits are ``known``.
    """
    inside = allowed_ids(ids, allowed)
    places = torch.arange(ids.shape[-1], dtype=torch.int32, device=ids.device).expand(ids.shape)
    if repeated:
        places = first_places(ids)
    slots = places.masked_fill(~inside, -1)
    # What takes no part is not read: a softcap's slope would make its gradient NaN.
    here, part = source.local(ids.masked_fill(~inside, -1)), source.part
    mine = Allowed(source.columns, None, allowed.mask)
    if isinstance(part, LinearLogits):
        hidden = _reduced(source, part.hidden)
        if source.columns:
            z, found = GatherDot.apply(hidden, part.weight, part.bias, here, mine, backend)
            z = plain.shaped(z.masked_fill(found < 0, 0), part.scale, part.softcap)
        else:
            _look_for(backend, source, ids.shape[-1], hidden=True)
            z = _nothing(source, hidden).expand(ids.shape)
        if known is None:
            (merged,) = _collectives.exchanged(source.shard, (), z.detach())
        else:
            merged = known.masked_fill(~inside, 0)
        return Merged.apply(z, merged, here), slots
    if known is not None:
        merged = known.masked_fill(~inside, 0)
    else:
        if source.columns:
            z, found = _ops.gather(part.detach(), here, mine, backend)
            z = z.masked_fill(found < 0, 0)
        else:
            _look_for(backend, source, ids.shape[-1])
            z = torch.zeros(ids.shape, dtype=source.dtype, device=source.device)
        (merged,) = _collectives.exchanged(source.shard, (), z)
    if repeated:  # their gradient is that of the first
        here = here.masked_fill(repeats(ids), -1)
    rows = Rows(here, merged, None, None, 0, allowed.mask, False)
    values, _ = LogitRows.apply(part, rows, inplace, backend)
    return values, slots


def _nothing(source: Sharded, hidden: Tensor) -> Tensor:
    """Zeros (..., 1) that depend on a head without columns, whose rank adds up gradients as all."""
    assert isinstance(source.part, LinearLogits)
    zeros = hidden[..., :0].sum(-1, keepdim=True, dtype=source.dtype)
    for empty in (source.part.weight, source.part.bias):
        if empty is not None:
            zeros = zeros + empty[:0].sum(dtype=source.dtype)  # a shard of padding has rows
    return zeros


def attached(
    source: Sharded | LinearLogits, rows: Rows, inplace: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """What a read has found, (values, tail), with the gradients of what was read."""
    if isinstance(source, LinearLogits):
        hidden, weight, bias = as_autocast(source.hidden, source.weight, source.bias)
        return HeadRows.apply(hidden, weight, bias, rows, source.scale, source.softcap, backend)
    part = source.part
    rows = rows._replace(ids=source.local(rows.ids), width=source.below(rows.width))
    if isinstance(part, LinearLogits):
        hidden = _reduced(source, part.hidden)
        head = LinearLogits._unchecked(hidden, part.weight, part.bias, part.softcap, part.scale)
        return attached(head, rows, inplace, backend)
    return LogitRows.apply(part, rows, inplace, backend)


def _reduced(source: Sharded, hidden: Tensor) -> Tensor:
    """The hidden states, whose gradient is summed over the group."""
    shard = source.shard
    if not shard.reduce_hidden_grad or shard.ranks == 1 or not hidden.requires_grad:
        return hidden
    return ReducedGradient.apply(hidden, functools.partial(_collectives.whole_gradient, shard))
