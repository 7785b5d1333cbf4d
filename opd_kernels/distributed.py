"""Vocabulary-parallel rows: ``VocabShard``, and which columns of both sides a rank holds.

Each rank of a group holds some columns of the same rows. A rank reads its own columns with the
kernels, the ranks exchange a few numbers of each row (``_shards``), and from there on all of them
compute the same. So a loss is replicated, and a rank's gradient is that of its own columns:
backward exchanges nothing but the gradient of hidden states.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from opd_kernels import _checks
from opd_kernels._arguments import (
    Allowed,
    compute_dtype,
    pack_bitmap,
    unpack_bitmap,
)
from opd_kernels.head import LinearLogits
from opd_kernels.support import TopK

__all__ = ["Sharded", "VocabShard"]


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
