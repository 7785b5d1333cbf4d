"""The pipeline of a loss: select the support, gather the student's values, compute the divergence.

The fused operator does all three where both sides are logits and nobody asks for the support.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from opd_kernels import _checks, _ops, debugging
from opd_kernels._arguments import Allowed, Tail, Tails, compute_dtype, no_tail, unpack_bitmap
from opd_kernels._autograd import FullDivergence, GatherDot, Request, TopKReverseKL
from opd_kernels.backends import plain
from opd_kernels.divergences import RENORMALIZE
from opd_kernels.head import LinearLogits, as_autocast
from opd_kernels.options import Call
from opd_kernels.selection import select
from opd_kernels.support import TopK


class RowLosses(NamedTuple):
    """Per-row losses (...); ids and gradient entries (..., K) of the logits they are computed from.

    ``support`` is the one they are of, if it was asked for.
    """

    loss: Tensor
    ids: Tensor
    entry_grad: Tensor
    support: TopK | None
    allowed: Allowed


def row_losses(
    student: Tensor | LinearLogits,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None,
    call: Call,
    with_support: bool,
    depth: int,
) -> RowLosses:
    """The loss of each row; masked rows have 0. The user's code is ``depth`` frames above."""
    k, limit = _support_size(student, teacher, k, call.support)
    simple = not (call.full or call.with_token or call.support == "student")
    if not simple:
        _check_sources(student, teacher, call)
    _warn_about_losses(k, call, depth + 3)
    device, backend, objective = student.device, call.backend, call.objective
    allowed = call.allowed(limit, device)
    simple = simple and not with_support
    if simple and isinstance(teacher, Tensor) and isinstance(student, Tensor):
        request = Request(None, allowed, objective, call.inplace, backend)
        loss, ids, entry_grad = TopKReverseKL.apply(student, teacher.detach(), k, request)
        return RowLosses(loss, ids, entry_grad, None, allowed)
    ids, values, tails = find_support(student, teacher, k, allowed, call)
    if isinstance(student, LinearLogits):
        logits, slots = _gathered(student, ids, values, allowed, backend)
        among_slots = allowed._replace(limit=ids.shape[-1], banned=None)
        request = Request(slots, among_slots, objective, False, backend)
    else:
        logits = student
        request = Request(ids, allowed, objective, call.inplace, backend)
    if tails is None:
        loss, found, entry_grad = TopKReverseKL.apply(logits, values, k, request)
    else:
        loss, found, entry_grad, *_ = FullDivergence.apply(logits, values, request, tails)
    support = TopK(ids[..., :k], values[..., :k]) if with_support else None
    return RowLosses(loss, found, entry_grad, support, allowed)


def check_teacher(
    teacher: object, k: int | None, rows: torch.Size, device: torch.device
) -> Tensor | TopK | LinearLogits:
    """The teacher, once it fits the student's rows and k."""
    if isinstance(teacher, TopK):
        teacher.check()
        shape, tensor = teacher.shape, teacher.ids
    elif isinstance(teacher, LinearLogits):
        shape, tensor = teacher.shape, teacher.hidden
    elif isinstance(teacher, Tensor):
        tensor = _checks.check_logits(teacher, "teacher")
        shape = tensor.shape[:-1]
    else:
        raise TypeError(
            f"teacher is a {type(teacher).__name__}, expected a tensor of logits (..., V), a TopK "
            "or a LinearLogits"
        )
    _checks.check_same_rows(rows, shape)
    _checks.check_same_device(tensor, device, "teacher")
    if isinstance(teacher, TopK):
        _checks.check_k_matches(k, teacher.k)
    elif k is not None:
        _checks.check_k(k, vocab_of(teacher))
    return teacher


def _support_size(
    student: Tensor | LinearLogits,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None,
    support: str,
) -> tuple[int, int]:
    """(k, limit): entries of a row, and below which ids they are."""
    vocab = vocab_of(student)
    if isinstance(teacher, TopK):
        return teacher.k, vocab
    selected_from = vocab if support == "student" else vocab_of(teacher)
    if k is None:
        k = min(_checks.DEFAULT_K, selected_from)
    elif support == "student":
        _checks.check_k(k, selected_from, "student")
    return k, min(vocab, vocab_of(teacher))


def _check_sources(
    student: Tensor | LinearLogits, teacher: Tensor | TopK | LinearLogits, call: Call
) -> None:
    """Raises unless both sides have what the loss needs of them."""
    outside = call.objective.outside
    if call.support == "student" and isinstance(teacher, TopK):
        raise ValueError(
            "support=\"student\" needs the teacher's values at the student's ids, and teacher is a "
            "TopK of its own; pass the teacher's logits or a LinearLogits, or leave support out if "
            "the TopK's ids are the student's"
        )
    if isinstance(teacher, TopK) and call.with_token and teacher.token_logits is None:
        what = "include_token=True" if call.include_token else f"outside={outside!r}"
        raise ValueError(
            f"{what} needs the teacher's value at the sampled token, and this TopK has no "
            "token_logits; pass token_ids to select_topk or TopK.from_logprobs"
        )
    if not call.full:
        return
    if isinstance(student, LinearLogits):
        raise ValueError(
            f"outside={outside!r} needs the student's full log-sum-exp, and student is hidden "
            'states and a head; pass its logits, or outside="renormalize"'
        )
    if isinstance(teacher, LinearLogits):
        selected = ", or select_topk(teacher, k, with_logsumexp=True)"
        if call.support == "student":
            selected = ""
        raise ValueError(
            f"outside={outside!r} needs the teacher's full log-sum-exp, and teacher is hidden "
            f"states and a head; pass its logits{selected}"
        )
    if isinstance(teacher, TopK):
        _check_full_support(teacher, call)


def _check_full_support(teacher: TopK, call: Call) -> None:
    """Raises unless a TopK says what its entries hold of the full softmax, at T'."""
    outside = call.objective.outside
    if teacher.logsumexp is None and teacher.tail_logsumexp is None:
        raise ValueError(
            f"outside={outside!r} needs the teacher's full log-sum-exp, and this TopK has neither "
            "logsumexp nor tail_logsumexp; TopK.from_logprobs and "
            "select_topk(..., with_logsumexp=True) give it"
        )
    given = call.teacher_temperature
    if isinstance(given, Tensor) or given != teacher.temperature:
        shown = "a tensor" if isinstance(given, Tensor) else given
        raise ValueError(
            f"teacher_temperature is {shown} and the TopK's log-sum-exp is of temperature "
            f"{teacher.temperature}; outside={outside!r} needs both the same: pass "
            f"teacher_temperature={teacher.temperature}, or a TopK of that temperature"
        )


class _Support(NamedTuple):
    """Ids and the teacher's values (..., K), with the sampled token's last if it takes part.

    ``tails`` are the log-sum-exps outside of the ids, or None if nobody needs them.
    """

    ids: Tensor
    values: Tensor
    tails: Tails | None


def find_support(
    student: Tensor | LinearLogits,
    teacher: Tensor | TopK | LinearLogits,
    k: int,
    allowed: Allowed,
    call: Call,
) -> _Support:
    """The support, selected or given; nothing differentiates through it."""
    full, joined, backend = call.full, call.include_token, call.backend
    temperature, teacher_temperature, *_ = call.objective
    width = call.range(vocab_of(student))
    if (
        full
        and isinstance(teacher, Tensor)
        and isinstance(student, Tensor)
        and compute_dtype(student, teacher) == torch.float64
    ):
        student, teacher = student.detach().double(), teacher.double()  # both tails in float64
    mine, theirs = no_tail(), no_tail()
    student_tail: Tensor | None = None
    teacher_tail: Tensor | None = None
    if full and not joined:  # a token that joins the support leaves the tails
        mine = Tail(width, temperature)
        theirs = Tail(call.range(vocab_of(teacher)), teacher_temperature)
    if isinstance(teacher, TopK):
        ids, values = _adjacent(teacher.ids), _adjacent(teacher.logits.detach())
        if debugging.on_outside_of_operators():
            _look_at_fields(teacher, allowed, call)
        teacher_tail = _given_tail(teacher, call) if full else None
    elif call.support == "student":
        ids, _, student_tail = select(student, k, allowed, mine, backend)
        values = _values_at(teacher, ids, allowed, backend)
    else:
        ids, values, teacher_tail = select(teacher, k, allowed, theirs, backend)
    if call.with_token:
        ids, values = _with_token(teacher, ids, values, allowed, call, width)
    if not full:
        return _Support(ids, values, None)
    if joined:
        student_tail = None
    if isinstance(teacher, TopK):
        assert teacher_tail is not None
        if joined:
            teacher_tail = _without_token(teacher_tail, ids, values, teacher.temperature)
    elif joined or teacher_tail is None:
        assert isinstance(teacher, Tensor)
        beside = ids if joined else ids[..., :k]
        over = Tail(call.range(vocab_of(teacher)), teacher_temperature)
        teacher_tail = _ops.tail_logsumexp(teacher.detach(), beside, allowed.mask, over, backend)
    return _Support(ids, values, Tails(teacher_tail, student_tail, width))


def _values_at(
    source: Tensor | LinearLogits, ids: Tensor, allowed: Allowed, backend: str
) -> Tensor:
    """The logits at the ids, -inf where an id takes no part."""
    allowed = allowed._replace(limit=min(allowed.limit, vocab_of(source)))
    if isinstance(source, Tensor):
        values, slots = _ops.gather(source.detach(), ids, allowed, backend)
    else:
        hidden, weight, bias = as_autocast(source.hidden, source.weight, source.bias)
        bias = None if bias is None else bias.detach()
        values, slots = _ops.gather_dot(
            hidden.detach(), weight.detach(), bias, ids, allowed, backend
        )
        values = plain.shaped(values, source.scale, source.softcap)
    return values.masked_fill(slots < 0, -torch.inf)


def _with_token(
    teacher: Tensor | TopK | LinearLogits,
    ids: Tensor,
    values: Tensor,
    allowed: Allowed,
    call: Call,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Ids and values with the sampled token's as one more; -1 where it is in the support."""
    assert call.token_ids is not None
    token = call.token_ids[..., None]
    if debugging.on_outside_of_operators():
        debugging.check_tokens(call.token_ids, width, allowed.mask)
    everything = Allowed(width, None, allowed.mask)
    if isinstance(teacher, TopK):
        assert teacher.token_logits is not None
        value = teacher.token_logits.detach()[..., None].to(values.dtype)
    else:
        value = _values_at(teacher, token, everything, call.backend).to(values.dtype)
    outside = (token < 0) | (token >= width)
    known = (ids == token) & (values != -torch.inf) & ~outside
    if not call.include_token:
        known &= _allowed_ids(ids, allowed)
    known = known.any(-1, keepdim=True)
    # A token that does not exist makes its row NaN.
    values = torch.cat((values, value.masked_fill(known, -torch.inf)), -1)
    token = token.masked_fill(known, -1).masked_fill(outside, 0)
    return torch.cat((ids, token.to(ids.dtype)), -1), values.masked_fill(outside, torch.nan)


def _allowed_ids(ids: Tensor, allowed: Allowed) -> Tensor:
    """Whether an id may be in the support."""
    inside = (ids >= 0) & (ids < allowed.limit)
    if allowed.banned is None:
        return inside
    banned = unpack_bitmap(allowed.banned, allowed.limit)
    return inside & ~banned[torch.where(inside, ids, 0).long()]


def _look_at_fields(teacher: TopK, allowed: Allowed, call: Call) -> None:
    """Debugging: the fields per row fit the entries."""
    ids, logits, mask = teacher.ids, teacher.logits, allowed.mask
    if call.full and teacher.logsumexp is not None:
        debugging.check_shares(ids, logits, teacher.logsumexp, teacher.temperature, mask)
    if call.with_token:
        assert call.token_ids is not None
        assert teacher.token_logits is not None
        debugging.check_token_logits(call.token_ids, teacher.token_logits, ids, logits, mask)


def _given_tail(teacher: TopK, call: Call) -> Tensor:
    """A given support's tail, a number where the row has no entries.

    Servers and ``TopK.pad`` give no log-sum-exp there. The tail is the whole row then, so the loss
    is 0 whatever it is; unless the sampled token takes part, whose share is unknown.
    """
    tail = teacher.tail()
    return tail if call.with_token else tail.masked_fill(~(tail < torch.inf) & ~teacher.present, 0)


def _without_token(tail: Tensor, ids: Tensor, values: Tensor, temperature: float) -> Tensor:
    """A given support's tail without the last of its entries, at least 2^-24 of itself."""
    share = (values[..., -1].to(tail.dtype) / temperature - tail).exp()
    share = share.masked_fill(ids[..., -1] < 0, 0)
    return tail + torch.log1p(-share.clamp(max=1 - 2.0**-24))


def vocab_of(side: Tensor | TopK | LinearLogits) -> int:
    """The width of logits; that of a support."""
    if isinstance(side, TopK):
        return side.k
    return side.vocab if isinstance(side, LinearLogits) else side.shape[-1]


def _gathered(
    student: LinearLogits, ids: Tensor, values: Tensor, allowed: Allowed, backend: str
) -> tuple[Tensor, Tensor]:
    """(the student's logits at the ids, their slots)."""
    # An entry of value -inf is absent: its row of the head is not read, and a softcap's slope
    # cannot make its gradient NaN.
    ids = torch.where(values == -torch.inf, -1, ids)
    logits, slots = GatherDot.apply(
        student.hidden, student.weight, student.bias, ids, allowed, backend
    )
    return plain.shaped(logits, student.scale, student.softcap), slots


def _adjacent(entries: Tensor) -> Tensor:
    """K entries per row with last stride 1; a support is small enough to copy."""
    return entries if entries.shape[-1] == 1 or entries.stride(-1) == 1 else entries.contiguous()


def _warn_about_losses(k: int, call: Call, stacklevel: int) -> None:
    """Warns of losses that are 0 or that are known to fail."""
    if torch.compiler.is_compiling():
        return
    outside = call.objective.outside
    if k == 1 and outside == RENORMALIZE and not call.include_token:
        warnings.warn(
            "k=1: a support of one entry renormalises to probability 1 on both sides, so the loss "
            "and its gradient are identically 0; use k=2 or more (the paper's is 32)",
            stacklevel=stacklevel,
        )
    weights = call.divergence[:4]
    if not any(isinstance(weight, Tensor) or weight for weight in weights):
        warnings.warn(
            "all weights of the divergence are 0, so the loss and its gradient are 0; set one, as "
            "in Divergence(reverse=1.0)",
            stacklevel=stacklevel,
        )
    if outside == "truncate" and (isinstance(weights[0], Tensor) or weights[0]):
        _warn_about_collapse(stacklevel + 1)


@functools.cache
def _warn_about_collapse(stacklevel: int) -> None:
    """Once: a loss that pushes probability off the support."""
    warnings.warn(
        'reverse KL with outside="truncate" falls as the student leaves the support (its least '
        "value is at a mass of Q / e there), and training with it is known to collapse; use "
        'outside="bucket", "generalize" or "sample"',
        stacklevel=stacklevel,
    )
