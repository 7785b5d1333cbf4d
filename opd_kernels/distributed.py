"""Vocabulary-parallel rows: ``VocabShard``, and every collective that there is.

Each rank of a group holds some columns of the same rows. A rank reads its own columns with the
kernels, the ranks exchange a few numbers of each row, and from there on all of them compute the
same. So a loss is replicated, and a rank's gradient is that of its own columns: backward exchanges
nothing but the gradient of hidden states.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from opd_kernels import _checks, _ops, debugging
from opd_kernels._arguments import (
    Allowed,
    Reading,
    Tail,
    allowed_ids,
    compute_dtype,
    divisor,
    no_tail,
    pack_bitmap,
    unpack_bitmap,
    wide_dtype,
)
from opd_kernels._linear_autograd import GatherDot, HeadRows, Rows
from opd_kernels._ordering import first_places, in_order, repeats
from opd_kernels._shard_autograd import LogitRows, Merged, ReducedGradient
from opd_kernels.backends import plain
from opd_kernels.head import LinearLogits, as_autocast, head_as_operand
from opd_kernels.support import TopK

__all__ = ["Sharded", "VocabShard"]

# Its name from torch 2.13 on, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class VocabShard:
    """Which columns of the vocabulary this rank holds, and with whom it shares the rest.

    The columns are [``start``, ``start`` + the tensor's width): of logits (..., width), of a head
    weight (width, H). The ranks of ``group`` (None: the default group) hold the same rows, and
    together each id in [0, ``vocab_size``) once. Columns from ``vocab_size`` on are padding and
    take no part. A rank may hold none.

    ``reduce_hidden_grad``: the gradient of hidden states is summed over the group, as a
    column-parallel linear layer does. False leaves each rank its own part, for who sums it later
    (sequence parallelism, say).

    Example::

        rank, size = dist.get_rank(group), dist.get_world_size(group)
        shard = VocabShard(rank * logits.shape[-1], vocab_size, group)
        loss = topk_rkl(logits, teacher_logits, 32, vocab_shard=shard)
    """

    start: int
    vocab_size: int
    group: dist.ProcessGroup | None = None
    reduce_hidden_grad: bool = True

    def __post_init__(self) -> None:
        """Checks the numbers, and that the group may be one."""
        _checks.check_int(self.start, "VocabShard start")
        _checks.check_vocab_size(self.vocab_size, "VocabShard vocab_size")
        _checks.check_flag(self.reduce_hidden_grad, "VocabShard reduce_hidden_grad")
        if self.start < 0:
            raise ValueError(f"VocabShard start is {self.start}, allowed is 0 or more")
        if self.group is not None:
            _check_group(self.group)

    @property
    def ranks(self) -> int:
        """How many ranks share the vocabulary."""
        return dist.get_world_size(self.group)


def _check_group(group: object) -> None:
    """A process group that this rank is in."""
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "VocabShard group is one without this rank, as new_group returns it there; pass the "
            "group of the ranks that hold the same rows"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"VocabShard group is a {type(group).__name__}, expected a ProcessGroup or None; of a "
            "DeviceMesh of one dimension pass .get_group()"
        )


@dataclass(frozen=True, eq=False)
class Sharded:
    """Logits of which this rank holds some columns: ``part`` (..., width), and which they are."""

    part: Tensor | LinearLogits
    shard: VocabShard

    @property
    def shape(self) -> torch.Size:
        """Leading shape: one element per row."""
        part = self.part
        return part.shape if isinstance(part, LinearLogits) else part.shape[:-1]

    @property
    def vocab(self) -> int:
        """The whole vocabulary."""
        return self.shard.vocab_size

    @property
    def columns(self) -> int:
        """How many columns of the vocabulary are here, without padding."""
        return self.below(self.vocab)

    @property
    def tensor(self) -> Tensor:
        """The logits or the hidden states."""
        return self.part.hidden if isinstance(self.part, LinearLogits) else self.part

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.part.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the arithmetic."""
        return compute_dtype(self.tensor)

    @property
    def width(self) -> int:
        """How many columns are here."""
        return self.part.vocab if isinstance(self.part, LinearLogits) else self.part.shape[-1]

    def below(self, limit: int) -> int:
        """How many of the columns are of ids below ``limit``."""
        return max(min(min(limit, self.vocab) - self.shard.start, self.width), 0)

    def local(self, ids: Tensor) -> Tensor:
        """The ids as columns of this rank, int32, -1 for those of other ranks."""
        columns = ids.clamp(min=-1) - self.shard.start
        outside = (columns < 0) | (columns >= self.columns)
        return columns.masked_fill(outside, -1).to(torch.int32)

    def allowed(self, allowed: Allowed) -> Allowed:
        """What may enter a support, of this rank's columns."""
        limit, start = self.below(allowed.limit), self.shard.start
        if allowed.banned is None:
            return allowed._replace(limit=limit)
        banned = unpack_bitmap(allowed.banned, allowed.limit)[start : start + limit]
        ids = torch.arange(limit, device=banned.device).masked_fill(~banned, -1)
        return allowed._replace(limit=limit, banned=pack_bitmap(ids, limit))


def of_shards(source: object) -> bool:
    """Whether it is logits of which this rank holds columns, no head."""
    return isinstance(source, Sharded) and isinstance(source.part, Tensor)


# What a side's rows are read from. Without logits (..., V) one pass finds all that is wanted.
Parted = LinearLogits | Sharded
Source = Tensor | Parted


def as_shards(
    student: Source, teacher: Any, shard: object, teacher_shard: object
) -> tuple[Source, Any]:
    """Both sides with the columns that are here, once they fit."""
    student = sharded(student, shard, "vocab_shard")
    teacher = from_dtensor(teacher, "teacher")
    if isinstance(teacher, TopK):
        if teacher_shard is not None:
            raise ValueError(
                "teacher is a TopK, whose ids and logits are whole on every rank; leave "
                "teacher_vocab_shard out"
            )
        return student, teacher
    if isinstance(teacher, Sharded) or not (teacher_shard is None or teacher_shard == "whole"):
        return student, sharded(teacher, teacher_shard, "teacher_vocab_shard")
    if not isinstance(student, Sharded):
        if teacher_shard is None:
            return student, teacher
        raise ValueError('teacher_vocab_shard="whole" goes with a vocab_shard; leave it out')
    if teacher_shard == "whole":
        return student, _columns_of(teacher, student.shard)
    teacher = sharded(teacher, student.shard, "vocab_shard")
    if teacher.width != student.width:
        raise ValueError(
            f"teacher has {teacher.width} columns on this rank and the student {student.width}; "
            'without a shard of its own it is split alike. Pass teacher_vocab_shard="whole" for a '
            "teacher that is whole on every rank, or the VocabShard of its own columns"
        )
    return student, teacher


def sharded(source: Any, shard: object, name: str) -> Any:
    """Logits or a head of which ``shard`` says which columns are here; None: all."""
    if shard is None:
        return source
    if isinstance(source, Sharded):
        raise ValueError(
            f"{name} goes with plain tensors, and a DTensor knows which columns it holds; leave it "
            "out, or pass .to_local()"
        )
    if not isinstance(shard, VocabShard):
        expected = "a VocabShard or None"
        raise TypeError(f"{name} is a {type(shard).__name__}, expected {expected}")
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{name} needs a process group; call torch.distributed.init_process_group first"
        )
    if not isinstance(source, LinearLogits):
        source = _checks.check_logits(source, "logits", least=0)
    return Sharded(source, shard)


def from_dtensor(source: Any, name: str, inplace: object = False) -> Any:
    """A DTensor of logits, or a head of DTensors, as the columns that are here; else as it is.

    One dimension of its mesh shards the vocabulary. The rows that the others shard or replicate are
    as local as those of plain tensors, and the gradient has the DTensor's placements.
    """
    if isinstance(source, LinearLogits) and _checks.is_dtensor(source.weight):
        return _head_from_dtensors(source)
    if not _checks.is_dtensor(source):
        return source
    placements = source.placements
    last = (source.ndim - 1, -1)
    # Not is_shard(), which does not know of strided shards in every torch.
    over = [i for i, placement in enumerate(placements) if getattr(placement, "dim", None) in last]
    partial = any(placement.is_partial() for placement in placements)
    shard = sys.modules["torch.distributed.tensor"].Shard
    if partial or len(over) != 1 or type(placements[over[0]]) is not shard:
        raise ValueError(f"{name} is a DTensor, {_checks.DTENSOR_LOGITS}")
    if inplace:
        raise ValueError(
            "inplace_grad=True would overwrite a DTensor's memory where autograd does not see "
            "it; leave it out, or pass .to_local() and vocab_shard"
        )
    local = _checks.check_logits(source.to_local(), name, least=0)
    return Sharded(local, _shard_of(source, over[0], source.shape[-1]))


def _head_from_dtensors(head: LinearLogits) -> Sharded:
    """This rank's rows of the weight; DTensors sum what the ranks' parts of a gradient are."""
    tensors = sys.modules["torch.distributed.tensor"]
    hidden, weight = cast(Any, head.hidden), cast(Any, head.weight)
    bias = cast(Any, head.bias)
    _checks.check_head(hidden, weight, bias, "LinearLogits ")
    dim = _checks.vocabulary_dimension(hidden, weight, bias, "LinearLogits ")
    to_hidden, to_weight = list(hidden.placements), list(weight.placements)
    to_hidden[dim] = tensors.Partial()
    for other, placement in enumerate(hidden.placements):
        if not placement.is_replicate():  # other rows, so another part of the weight's gradient
            to_weight[other] = tensors.Partial()
    local = LinearLogits._unchecked(
        hidden.to_local(grad_placements=to_hidden),
        weight.to_local(grad_placements=to_weight),
        None if bias is None else bias.to_local(grad_placements=to_weight),
        head.softcap,
        head.scale,
    )
    return Sharded(local, _shard_of(weight, dim, head.vocab, reduce_hidden_grad=False))


def _shard_of(tensor: Any, dim: int, vocab: int, *, reduce_hidden_grad: bool = True) -> VocabShard:
    """The columns that are here of a DTensor whose vocabulary a dimension of the mesh shards."""
    mesh = tensor.device_mesh
    step = -(-vocab // mesh.size(dim))  # as Shard splits; the last ranks may hold fewer or none
    start = min(mesh.get_local_rank(dim) * step, vocab)
    return VocabShard(start, vocab, mesh.get_group(dim), reduce_hidden_grad)


def widened(student: Source, teacher: Source | TopK) -> tuple[Source, Source | TopK]:
    """Logits in float64 if a side is, so that the sums of both sides are."""
    tensors = [
        side if isinstance(side, Tensor) else side.logits if isinstance(side, TopK) else side.tensor
        for side in (student, teacher)
        if not isinstance(side, LinearLogits)
    ]
    if compute_dtype(*tensors) != torch.float64:
        return student, teacher
    return _wide(student), _wide(teacher)


def _wide(side: Any) -> Any:
    """A shard of logits in float64; anything else as it is."""
    if not of_shards(side):
        return side
    return Sharded(side.part.double(), side.shard)


def _columns_of(whole: Any, shard: VocabShard) -> Sharded:
    """This rank's share of what is whole on every rank, so that each reads a part."""
    vocab = whole.vocab if isinstance(whole, LinearLogits) else whole.shape[-1]
    step = -(-vocab // shard.ranks)
    start = min(dist.get_rank(shard.group) * step, vocab)
    mine = slice(start, min(start + step, vocab))
    part = whole
    if isinstance(whole, LinearLogits):
        bias = None if whole.bias is None else whole.bias[mine]
        part = LinearLogits._unchecked(
            whole.hidden, whole.weight[mine], bias, whole.softcap, whole.scale
        )
    else:
        part = whole[..., mine]
    return Sharded(part, VocabShard(start, vocab, shard.group))


_AGREED: set[tuple[object, ...]] = set()


def agree(sides: Sequence[tuple[str, object]], call: Mapping[str, object]) -> None:
    """Raises on every rank unless the ranks' columns and calls fit; once for each kind of call.

    It is what keeps a mistake on one rank from blocking the others in a collective. Its own is
    small, and has the same size for every call. A mistake that comes later, other rows or
    columns say, is found while debugging, which looks at every call.
    """
    shards = [(name, side) for name, side in sides if isinstance(side, Sharded)]
    if not shards:
        return
    if plain.mapped():
        raise ValueError(
            "rows whose columns lie on several ranks do not work under vmap; pass the mapped "
            "dimension as one more leading dimension"
        )
    if torch.compiler.is_compiling():
        return
    shard = shards[0][1].shard
    facts: dict[str, object] = dict(call)
    for name, side in sides:
        facts[f"{name} kind"] = type(side.part if isinstance(side, Sharded) else side).__name__
        facts[f"{name} vocab_size"] = side.vocab if isinstance(side, Sharded) else None
        facts[f"{name} dtype"] = side.dtype if isinstance(side, Sharded) else None
        if isinstance(side, Sharded) and not of_shards(side):
            facts[f"{name} reduce_hidden_grad"] = side.shard.reduce_hidden_grad
    # Nothing of this rank alone: all ranks look, or none does.
    groups = tuple(side.shard.group for _, side in shards)
    key = (groups, shard.ranks, tuple(facts.values()))
    if key in _AGREED and not debugging.on_outside_of_operators():
        return
    ranks = [sorted(dist.get_process_group_ranks(group)) for group in groups]
    if ranks[0] != ranks[-1]:
        raise ValueError(
            f"student and teacher are sharded over different ranks, {ranks[0]} and {ranks[-1]}; "
            "shard both over one group, or over groups of the same ranks"
        )
    columns = tuple((side.shard.start, side.columns) for _, side in shards)
    mine = (columns, {**facts, "rows": tuple(shards[0][1].shape)})
    everyone: list[Any] = [None] * shard.ranks
    _run(shard, lambda: dist.all_gather_object(everyone, mine, group=shard.group))
    _check_agreement(everyone, [name for name, _ in shards], [side.vocab for _, side in shards])
    _AGREED.add(key)


def _check_agreement(
    everyone: Sequence[tuple[tuple[tuple[int, int], ...], dict[str, object]]],
    names: Sequence[str],
    vocabs: Sequence[int],
) -> None:
    """Every rank has the same call, and each column is on one rank."""
    first = everyone[0][1]
    for rank, (_, facts) in enumerate(everyone):
        for name, value in facts.items():
            if value != first.get(name):
                raise ValueError(
                    f"{name} is {first.get(name)} on rank 0 and {value} on rank {rank} of the "
                    "VocabShard's group; pass the same on all of them"
                )
    for place, (name, vocab) in enumerate(zip(names, vocabs, strict=True)):
        end = 0
        for start, count, rank in sorted(
            (*columns[place], rank) for rank, (columns, _) in enumerate(everyone)
        ):
            if count and start != end:
                what = "overlap" if start < end else "leave a gap"
                raise ValueError(
                    f"the {name}'s columns {what}: rank {rank} begins at {start}, those before it "
                    f"end at {end}; check VocabShard start and the width of the tensors"
                )
            end += count
        if end != vocab:
            raise ValueError(
                f"the {name}'s columns end at {end}, and VocabShard vocab_size is {vocab}; each id "
                "below it has to be on one rank"
            )


def read(
    source: Sharded, reading: Reading, backend: str, *, joined: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``_ops.read_linear`` returns, of rows whose columns lie on several ranks.

    One collective: each rank's K best, its values at the listed ids, and the log-sum-exp and
    entropy of its other columns. Where the listed ids are ``joined`` to the K best, they are
    outside of neither.
    """
    found = _read_part(source, reading, backend, joined)
    mask = reading.allowed.mask
    listed, tail = reading.listed, reading.tail
    *parts, at_listed = _exchanged(source.shard, found[:2] + found[3:], found[2])
    ids, values, tails, entropies = parts
    summed = tail.width > 0 and tail.ids is None  # what is not selected is in the tail
    ids, values = (x.movedim(0, -2).flatten(-2) for x in (ids, values))
    ids, values = in_order(ids, values, ids.shape[-1] if summed else reading.k)
    if listed is not None:
        outside = (listed < 0) | (listed >= min(_reach(reading), source.vocab))
        if mask is not None:
            outside = outside | ~mask[..., None]
        at_listed = at_listed.masked_fill(outside, -torch.inf)
    k = reading.k
    if not tail.width:
        return ids[..., :k], values[..., :k], at_listed, tails[0], entropies[0]
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
    return ids[..., :k].contiguous(), values[..., :k].contiguous(), at_listed, rest, entropy


def _joined(tails: Tensor, entropies: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy of a row from those of its parts (..., C)."""
    whole = tails.logsumexp(-1)
    if entropies is None:
        return whole, tails.new_empty(0)
    log_shares = (tails - whole[..., None]).masked_fill(tails == -torch.inf, 0)
    shares = log_shares.exp().masked_fill(tails == -torch.inf, 0)
    return whole, (shares * (entropies - log_shares)).sum(-1)


def _read_part(source: Sharded, reading: Reading, backend: str, joined: bool) -> tuple[Tensor, ...]:
    """This rank's share of what is read: ids of the whole vocabulary, 0 at listed ids elsewhere."""
    k, allowed, tail, listed = reading
    if not source.below(_reach(reading)):
        return _no_part(source, reading)
    kept, width = min(k, source.columns), source.below(tail.width)
    here = None if listed is None else source.local(listed)
    of_tail = no_tail()
    if width:
        at_ids = None if tail.ids is None else source.local(tail.ids)
        of_tail = Tail(width, tail.temperature, at_ids, tail.with_entropy)
    asked = Reading(kept, source.allowed(allowed), of_tail, here)
    read_once = _joined_apart if joined and width and here is not None else _local
    ids, values, at_listed, *sums = read_once(source.part, asked, backend)
    ids = (ids + source.shard.start).masked_fill_(ids < 0, -1)
    if kept < k:
        ids = torch.nn.functional.pad(ids, (0, k - kept), value=-1)
        values = torch.nn.functional.pad(values, (0, k - kept), value=-torch.inf)
    if here is not None:
        at_listed = at_listed.masked_fill(here < 0, 0)
    return ids, values, at_listed, *(sums if width else _no_sums(source, tail))


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


def _reach(reading: Reading) -> int:
    """Below which ids anything is read."""
    return max(reading.allowed.limit, reading.tail.width)


def _local(part: Tensor | LinearLogits, reading: Reading, backend: str) -> tuple[Tensor, ...]:
    """What ``_ops.read_linear`` returns, of this rank's columns alone."""
    if isinstance(part, LinearLogits):
        return _ops.read_linear(head_as_operand(part), reading, backend)
    k, allowed, tail, listed = reading
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
    """``_local`` whose tail is outside of the listed ids as well: that takes a second read."""
    tail, listed = reading.tail, reading.listed
    assert listed is not None
    ids, values, at_listed, *_ = _local(part, reading._replace(tail=no_tail()), backend)
    tail = tail._replace(ids=torch.cat((ids, listed), -1))
    rest = Reading(0, reading.allowed, tail, None)
    return ids, values, at_listed, *_local(part, rest, backend)[3:]


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
            own = z.detach().masked_fill(found < 0, 0)
        else:
            z = _nothing(source, hidden).expand(ids.shape)
            own = z.detach()
        merged = Merged.apply(z, *_exchanged(source.shard, (), own), here)
        return plain.shaped(merged, part.scale, part.softcap), slots
    if known is not None and known.shape == ids.shape:
        merged = known.masked_fill(~inside, 0)
    else:
        if source.columns:
            z, found = _ops.gather(part.detach(), here, mine, backend)
            z = z.masked_fill(found < 0, 0)
        else:
            z = torch.zeros(ids.shape, dtype=source.dtype, device=source.device)
        (merged,) = _exchanged(source.shard, (), z)
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
    return ReducedGradient.apply(hidden, functools.partial(_whole_gradient, shard))


def _exchanged(shard: VocabShard, parts: Sequence[Tensor], own: Tensor) -> list[Tensor]:
    """Each part of every rank, (ranks, ...), and what the ranks own, at most one of them each.

    An element of ``own`` is 0 on all ranks but one, so the sum is that rank's, whatever it is.
    Without parts that is an all-reduce, else it rides along as bits.
    """
    if shard.ranks == 1:
        return [*(part[None] for part in parts), own]
    if not parts:
        # Of floats: inductor cannot write the sum of their bits into a view of them.
        return [_sum(shard, own)]
    tensors = (*parts, own)
    words = [tensor.reshape(-1).view(torch.int32) for tensor in tensors]
    everywhere = _gather(shard, torch.cat(words)).split([len(some) for some in words], -1)
    found = [
        _words_as(some, tensor).view(shard.ranks, *tensor.shape)
        for some, tensor in zip(everywhere[:-1], parts, strict=True)
    ]
    owned = everywhere[-1].sum(0, dtype=torch.int32)
    return [*found, owned.view(own.dtype).reshape(own.shape)]


def _words_as(words: Tensor, part: Tensor) -> Tensor:
    """(ranks, words) in the dtype of a part; copied where its elements have two words."""
    if not part.numel():
        return part.new_empty(0)
    if part.element_size() > words.element_size():
        words = words.clone(memory_format=torch.contiguous_format)
    return words.view(part.dtype)


def _gather(shard: VocabShard, words: Tensor) -> Tensor:
    """(ranks, words): those of all ranks."""
    everywhere = words.new_empty(shard.ranks * len(words))
    _run(shard, lambda: _all_gather(everywhere, words, group=shard.group))
    return everywhere.view(shard.ranks, -1)


def _whole_gradient(shard: VocabShard, part: Tensor) -> Tensor:
    """The gradient of hidden states, of which each rank's columns have made a part."""
    return _sum(shard, part)


def _sum(shard: VocabShard, values: Tensor) -> Tensor:
    """The sum over the ranks."""
    values = values.clone(memory_format=torch.contiguous_format)
    _run(shard, lambda: dist.all_reduce(values, group=shard.group))
    return values


def _run(shard: VocabShard, collective: Callable[[], object]) -> None:
    """Runs a collective; says what may be wrong where it fails."""
    if torch.compiler.is_compiling():
        collective()
        return
    try:
        collective()
    except RuntimeError as error:
        raise RuntimeError(
            f"a collective over the {shard.ranks} ranks of a VocabShard failed on rank "
            f"{dist.get_rank(shard.group)}: another rank has raised or left, or passed other rows, "
            "k or options; look at the first error of any rank"
        ) from error
