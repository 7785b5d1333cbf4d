"""What a loss reads before it computes: the support, and each side's row, once.

The side that the support is selected from is read in the same pass for whatever else is wanted of
it. The other one is read after that, if at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opd_kernels import _ops, debugging
from opd_kernels._arguments import (
    Allowed,
    Reading,
    Tail,
    Tails,
    Temperature,
    allowed_ids,
    compute_dtype,
    no_tail,
)
from opd_kernels._autograd import Token
from opd_kernels._ordering import repeats
from opd_kernels._shards import values_of_head
from opd_kernels.distributed import Parted, Sharded, Source
from opd_kernels.head import in_autocast
from opd_kernels.options import Call
from opd_kernels.selection import read, select, vocab_of
from opd_kernels.stats import Side, Stats, measure
from opd_kernels.support import TopK


class Support(NamedTuple):
    """Ids and the teacher's values (..., K), with the sampled token's last if it takes part.

    The sides' sums are outside of the first ``inside`` ids; None where nobody needs them.
    ``invalid`` (..., 1) says in which rows the sampled token does not exist; it has id -1 there.
    ``repeats``: an id may be there twice, unlike in a selection. ``known`` (..., K): the student's
    logits at the ids, where the ranks of a shard have exchanged them already.
    """

    ids: Tensor
    values: Tensor
    inside: int
    student: Side
    teacher: Side
    invalid: Tensor | None = None
    repeats: bool = True
    known: Tensor | None = None

    def entries(self) -> tuple[Tensor, Tensor]:
        """Ids and values as the loss takes them: a token that does not exist makes its row NaN."""
        if self.invalid is None:
            return self.ids, self.values
        last = self.ids[..., -1:].masked_fill(self.invalid, 0)
        return torch.cat((self.ids[..., :-1], last), -1), self.values.masked_fill(
            self.invalid, torch.nan
        )

    def tails(self, width: int) -> Tails:
        """What the divergence of full softmaxes gets."""
        assert self.teacher.tail is not None
        return Tails(self.teacher.tail, self.student.tail, width)


class _Picked(NamedTuple):
    """A support, and what the reads that found it have found besides.

    ``at_token`` is the teacher's value at the sampled token, ``student_at_token`` the student's.
    """

    ids: Tensor
    values: Tensor
    student: Side = Side()
    teacher: Side = Side()
    known: Tensor | None = None
    at_token: Tensor | None = None
    student_at_token: Tensor | None = None


def find_support(
    student: Source,
    teacher: Source | TopK,
    k: int,
    allowed: Allowed,
    call: Call,
) -> Support:
    """The support, selected or given; nothing differentiates through it.

    Each side is read once, unless a token joins the support: that leaves the tails, but of a shard,
    whose ranks have one exchange in any case. A student's head whose tail the loss wants is left to
    the loss, but for a support that it selects.
    """
    width = call.range(vocab_of(student))
    if debugging.on_outside_of_operators():
        _look_at_student(student, allowed, call, width)
    if (
        call.full
        and isinstance(teacher, Tensor)
        and isinstance(student, Tensor)
        and compute_dtype(student, teacher) == torch.float64
    ):
        student, teacher = student.detach().double(), teacher.double()  # both tails in float64
    if isinstance(teacher, TopK):
        picked = _given(student, teacher, allowed, call)
    elif call.support == "student":
        picked = _picked_by_student(student, teacher, k, allowed, call)
    else:
        picked = _picked_by_teacher(teacher, k, allowed, call, width)
    invalid: Tensor | None = None
    if call.with_token:
        ids, values, invalid = _with_token(
            teacher, picked.ids, picked.values, picked.at_token, allowed, call, width
        )
        picked = picked._replace(ids=ids, values=values)
    if picked.student_at_token is not None:
        picked = _listing_token(picked, call)
    ids, values, mine, yours, known, *_ = picked
    inside = ids.shape[-1] if _joins(call) else k
    if isinstance(teacher, TopK):
        if call.full:
            yours = Side(tail=_given_tail(teacher, ids, values, call))
    elif yours.tail is None and yours.values is None:
        yours = _read(teacher, "teacher", k, ids[..., :inside], inside, allowed, call)
    # Where the loss wants a head's tail, it reads the head itself.
    apart = not isinstance(student, Tensor) and call.needs_tails
    needed = call.watches("student") or call.support == "teacher"
    if mine.tail is None and needed and not apart:
        listed = ids if isinstance(student, Sharded) else ids[..., :inside]
        mine = _read(student, "student", k, listed, inside, allowed, call)
        if isinstance(student, Sharded) and mine.values is not None:
            known = mine.values
            mine = mine._replace(values=mine.values[..., :inside])
    if known is not None and invalid is not None:  # a row that is NaN anyway
        known = known.masked_fill(invalid, 0)
    given = isinstance(teacher, TopK) or call.with_token
    return Support(ids, values, inside, mine, yours, invalid, given, known)


def _joins(call: Call) -> bool:
    """Whether a sampled token is outside of the tails."""
    return call.full and call.include_token


def _given(student: Source, teacher: TopK, allowed: Allowed, call: Call) -> _Picked:
    """The teacher's own support."""
    ids, values = _adjacent(teacher.ids), _adjacent(teacher.logits.detach())
    if debugging.on_outside_of_operators():
        debugging.check_support(ids, values, vocab_of(student), allowed.mask)
        _look_at_fields(teacher, allowed, call)
    return _Picked(ids, values)


def _picked_by_teacher(
    teacher: Source, k: int, allowed: Allowed, call: Call, width: int
) -> _Picked:
    """The teacher's k best."""
    joined = _joins(call) and isinstance(teacher, Sharded)
    tail = no_tail() if _joins(call) and not joined else _tail(teacher, "teacher", call)
    listed = None
    if call.with_token and not isinstance(teacher, Tensor):
        listed = _existing(call, width)
    ids, values, at_token, *sums = select(
        teacher, k, allowed, tail, call.backend, listed, joined=joined
    )
    return _Picked(ids, values, teacher=_side(tail, sums), at_token=at_token)


def _picked_by_student(
    student: Source, teacher: Source, k: int, allowed: Allowed, call: Call
) -> _Picked:
    """The student's k best, and the teacher's values there.

    The ranks of a shard exchange all that the loss wants of the student's entries here.
    """
    apart, width = isinstance(student, Sharded), call.range(vocab_of(student))
    tail = no_tail() if _joins(call) and not apart else _tail(student, "student", call)
    token = _existing(call, width) if call.with_token else None
    listed = _existing(call, width) if apart and (token is not None or call.lists_token) else None
    ids, z, at_listed, *sums = select(
        student, k, allowed, tail, call.backend, listed,
        joined=listed is not None and call.needs_tails, exact=not call.needs_tails,
    )  # fmt: skip
    mine, yours, at_token = _side(tail, sums), Side(), None
    # Without a tail a head's entries are computed again: the product has rounded these.
    if apart or (not isinstance(student, Tensor) and tail.width):
        mine = mine._replace(values=z)
    if isinstance(teacher, Sharded) or (
        not isinstance(teacher, Tensor) and _tail(teacher, "teacher", call).width
    ):
        wanted = ids if token is None else torch.cat((ids, token.to(ids.dtype)), -1)
        inside = wanted.shape[-1] if _joins(call) else k
        yours = _read(teacher, "teacher", k, wanted, inside, allowed, call)
        assert yours.values is not None
        values, at_token = yours.values[..., :k], yours.values[..., k:]
        values = values.masked_fill(~allowed_ids(ids, allowed), -torch.inf)
    else:
        values = values_at(teacher, ids, allowed, call.backend)
    return _Picked(ids, values, mine, yours, z if apart else None, at_token, at_listed)


def _listing_token(picked: _Picked, call: Call) -> _Picked:
    """With the student's value at the sampled token as often as the loss lists it."""
    known, token = picked.known, picked.student_at_token
    assert known is not None
    assert token is not None
    if call.with_token:  # as an entry, which it is not where its id is -1
        known = torch.cat((known, token.masked_fill(picked.ids[..., -1:] < 0, -torch.inf)), -1)
    mine = picked.student
    if call.needs_tails:
        mine = mine._replace(values=torch.cat((known, token), -1) if call.lists_token else known)
    return picked._replace(student=mine, known=known)


def _existing(call: Call, width: int) -> Tensor:
    """The sampled tokens (..., 1), -1 where there is no such id."""
    assert call.token_ids is not None
    token = call.token_ids
    return torch.where((token < 0) | (token >= width), -1, token)[..., None]


def _tail(source: Source, side: str, call: Call) -> Tail:
    """What is summed of a side beyond its support, in the pass that selects it or on its own.

    The divergence reads the student's row by itself where nothing else does.
    """
    read_anyway = side == "teacher" or call.support == side or call.wants("overlap")
    if not (call.watches(side) or (call.full and read_anyway)):
        return no_tail()
    objective = call.objective
    temperature = objective.temperature
    if side == "teacher":
        temperature = objective.teacher_temperature
    return Tail(call.range(vocab_of(source)), temperature, None, call.wants(f"{side}_entropy"))


def _read(
    source: Source,
    side: str,
    k: int,
    listed: Tensor,
    inside: int,
    allowed: Allowed,
    call: Call,
) -> Side:
    """One read of a side, whose support is given: its tail, and its own best ids for overlap.

    The tail is outside of the first ``inside`` ids. Of a head, the logits at all of them as well.
    """
    tail = _tail(source, side, call)._replace(ids=listed[..., :inside])
    best = k if side != call.support and call.wants("overlap") else 0
    wanted = isinstance(source, Sharded) and side == "teacher" != call.support
    if not (tail.width or best or wanted):
        return Side()
    if not isinstance(source, Tensor):
        exact = side == "student" and not call.needs_tails
        return read_side(source, Reading(best, allowed, tail, listed), call.backend, exact=exact)
    if best:
        found, _, _, *sums = select(source, k, allowed, tail, call.backend)
        return _side(tail, sums)._replace(best=found)
    return _side(tail, _ops.tail_logsumexp(source.detach(), allowed.mask, tail, call.backend))


def read_side(source: Parted, reading: Reading, backend: str, *, exact: bool = False) -> Side:
    """A side whose logits are a head's or lie on several ranks, from one pass over them."""
    best, _, values, *sums = read(source, reading, backend, exact=exact)
    return _side(reading.tail, sums)._replace(values=values, best=best if reading.k else None)


def _side(tail: Tail, sums: Sequence[Tensor]) -> Side:
    """A side of (log-sum-exp, entropy), as far as they were asked for."""
    if not tail.width:
        return Side()
    logsumexp, entropy = sums
    return Side(tail=logsumexp, entropy=entropy if tail.with_entropy else None)


def watched(
    student: Source,
    teacher: Source | TopK,
    support: Support,
    allowed: Allowed,
    call: Call,
) -> tuple[Side, Side]:
    """(student, teacher) with their values at the support, where these are wanted."""
    ids, values = (x[..., : support.inside] for x in (support.ids, support.values))
    mine, yours, given = support.student, support.teacher, support.repeats
    if call.watches("student"):
        mine = mine._replace(temperature=call.objective.temperature)
        if mine.values is None:
            everything = Allowed(call.range(vocab_of(student)), None, allowed.mask)
            mine = mine._replace(values=values_at(student, ids, everything, call.backend))
        if mine.repeated is None and given:
            mine = mine._replace(repeated=repeats(ids) & (ids >= 0))
    if call.watches("teacher"):
        there = torch.where(values == -torch.inf, -1, ids)
        yours = yours._replace(
            temperature=call.objective.teacher_temperature,
            values=values,
            repeated=repeats(there) & (there >= 0) if given else None,
        )
    if isinstance(teacher, TopK) and call.watches("teacher"):
        # At its own temperature, which is that of its sums. These are without a token that joins.
        tail = None if teacher.tail_logsumexp is None else teacher.tail()
        whole = None if teacher.logsumexp is None else teacher.logsumexp.detach()
        repeated = None if yours.repeated is None else yours.repeated[..., : teacher.k]
        yours = yours._replace(
            temperature=Temperature(teacher.temperature),
            values=values[..., : teacher.k],
            repeated=repeated,
            tail=tail,
            logsumexp=whole,
        )
    if call.watches("student"):
        mine = mine.with_shares()
    if call.watches("teacher"):
        yours = yours.with_shares()
    return mine, yours


def token_of(student: Source, side: Side, allowed: Allowed, call: Call) -> Token:
    """What the log-prob of the sampled token is made of."""
    assert call.token_ids is not None
    width = call.range(vocab_of(student))
    if debugging.on_outside_of_operators():
        debugging.check_tokens(call.token_ids, width, allowed.mask)
    assert side.shares is not None
    return Token(call.token_ids, *side.shares, width)


def stats_of(
    ids: Tensor,
    values: Tensor,
    sides: tuple[Side, Side],
    allowed: Allowed,
    names: tuple[str, ...],
    *,
    repeated: bool,
) -> Stats:
    """The named statistics of the support, whose ids may be ``repeated``."""
    present = allowed_ids(ids, allowed) & (values != -torch.inf)
    if allowed.mask is not None:
        present = present & allowed.mask[..., None]
    unique = present & ~repeats(torch.where(present, ids, -1)) if repeated else present
    return measure(names, ids, present, unique, sides, allowed.mask)


def values_at(source: Source, ids: Tensor, allowed: Allowed, backend: str) -> Tensor:
    """The logits at the ids, -inf where an id takes no part."""
    allowed = allowed._replace(limit=min(allowed.limit, vocab_of(source)))
    if isinstance(source, Sharded):
        _, _, values, *_ = read(source, Reading(0, allowed, no_tail(), ids), backend)
        return values.masked_fill(~allowed_ids(ids, allowed), -torch.inf)
    if not isinstance(source, Tensor):
        return values_of_head(in_autocast(source), ids, allowed, backend)
    values, slots = _ops.gather(source.detach(), ids, allowed, backend)
    return values.masked_fill(slots < 0, -torch.inf)


def _with_token(
    teacher: Source | TopK,
    ids: Tensor,
    values: Tensor,
    at_token: Tensor | None,
    allowed: Allowed,
    call: Call,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and values with the sampled token's as one more, and where it does not exist.

    Its id is -1 there, and where it is in the support.
    """
    assert call.token_ids is not None
    token = call.token_ids[..., None]
    if debugging.on_outside_of_operators():
        debugging.check_tokens(call.token_ids, width, allowed.mask)
    everything = Allowed(width, None, allowed.mask)
    if isinstance(teacher, TopK):
        assert teacher.token_logits is not None
        value = teacher.token_logits.detach()[..., None].to(values.dtype)
    elif at_token is not None and at_token.shape[-1]:
        value = at_token
    else:
        value = values_at(teacher, token, everything, call.backend).to(values.dtype)
    outside = (token < 0) | (token >= width)
    known = (ids == token) & (values != -torch.inf) & ~outside
    if not call.include_token:
        known &= allowed_ids(ids, allowed)
    known = known.any(-1, keepdim=True)
    absent = known | outside
    values = torch.cat((values, value.masked_fill(absent, -torch.inf)), -1)
    return torch.cat((ids, token.masked_fill(absent, -1).to(ids.dtype)), -1), values, outside


def _look_at_student(student: Source, allowed: Allowed, call: Call, width: int) -> None:
    """Debugging: the student's logits that are read, by its name."""
    whole = call.full or call.watches("student")
    used = Allowed(width, None, allowed.mask) if whole else allowed
    if isinstance(student, Sharded):
        used, student = student.allowed(used), student.part
    if isinstance(student, Tensor):
        debugging.check_student(student, used)
    elif whole or call.wants("overlap") or call.support == "student":
        debugging.check_student_head(student.hidden, student.weight, student.bias, used)


def _look_at_fields(teacher: TopK, allowed: Allowed, call: Call) -> None:
    """Debugging: the fields per row fit the entries."""
    ids, logits, mask = teacher.ids, teacher.logits, allowed.mask
    if call.full and teacher.logsumexp is not None:
        debugging.check_shares(ids, logits, teacher.logsumexp, teacher.temperature, mask)
    if call.with_token:
        assert call.token_ids is not None
        assert teacher.token_logits is not None
        debugging.check_token_logits(call.token_ids, teacher.token_logits, ids, logits, mask)


def _given_tail(teacher: TopK, ids: Tensor, values: Tensor, call: Call) -> Tensor:
    """A given support's tail, a number where the row has no entries.

    Servers and ``TopK.pad`` give no log-sum-exp there. The tail is the whole row then, so the loss
    is 0 whatever it is; unless the sampled token takes part, whose share is unknown.
    """
    tail = teacher.tail()
    if not call.with_token:
        tail = tail.masked_fill(~(tail < torch.inf) & ~teacher.present, 0)
    return _without_token(tail, ids, values, teacher.temperature) if _joins(call) else tail


def _without_token(tail: Tensor, ids: Tensor, values: Tensor, temperature: float) -> Tensor:
    """A given support's tail without the last of its entries, at least 2^-24 of itself."""
    share = (values[..., -1].to(tail.dtype) / temperature - tail).exp()
    share = share.masked_fill(ids[..., -1] < 0, 0)
    return tail + torch.log1p(-share.clamp(max=1 - 2.0**-24))


def _adjacent(entries: Tensor) -> Tensor:
    """K entries per row with last stride 1; a support is small enough to copy."""
    return entries if entries.shape[-1] == 1 or entries.stride(-1) == 1 else entries.contiguous()
