"""Every collective of vocabulary-parallel rows, and what the ranks have to agree on before one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opd_kernels import debugging
from opd_kernels.backends import plain
from opd_kernels.distributed import Sharded, VocabShard, of_shards

__all__ = ["agree", "exchanged", "whole_gradient"]

# Its name from torch 2.13 on, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
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
    groups = tuple(side.shard.group or dist.group.WORLD for _, side in shards)
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


def exchanged(shard: VocabShard, parts: Sequence[Tensor], own: Tensor) -> list[Tensor]:
    """Each part of every rank, (ranks, ...), and what the ranks own, at most one of them each.

    An element of ``own`` is 0 on all ranks but one, so the sum is that rank's, whatever it is.
    Without parts, or with empty ones, that is an all-reduce, else it rides along as bits.
    """
    if shard.ranks == 1:
        return [*(part[None] for part in parts), own]
    if not any(part.numel() for part in parts):
        # Of floats: inductor cannot write the sum of their bits into a view of them.
        return [*(part.new_empty(shard.ranks, *part.shape) for part in parts), _sum(shard, own)]
    tensors = (*parts, own)
    words = [tensor.contiguous().view(-1).view(torch.int32) for tensor in tensors]
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


def whole_gradient(shard: VocabShard, part: Tensor) -> Tensor:
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
