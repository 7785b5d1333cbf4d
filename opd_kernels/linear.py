"""The loss where the student is hidden states and a head, and full softmaxes are wanted.

One pass over the head's logits finds a few of each row, those that are listed, and the log-sum-exp
of all others, the tail. With the tail as one more logit these are a row of their own, whose softmax
is the full one: the losses on logits take it as it is.

Where the loss is reduced to one number, the pass can compute the head's gradient as well.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opd_kernels import _ops
from opd_kernels._arguments import (
    Allowed,
    Question,
    Reading,
    Tail,
    Tails,
    Temperature,
    Wanted,
    allowed_ids,
    compute_dtype,
    divisor,
    no_tail,
    wide_dtype,
)
from opd_kernels._autograd import BackgroundLoss, Request, Token
from opd_kernels._linear_autograd import HeadLoss, Rows
from opd_kernels._ordering import first_places, repeats
from opd_kernels._shards import attached
from opd_kernels.distributed import Parted
from opd_kernels.head import LinearLogits, as_autocast, head_as_operand
from opd_kernels.options import Call
from opd_kernels.sides import Support, read_side, values_at
from opd_kernels.stats import Side


class Found(NamedTuple):
    """Losses (...), token log-probs (...), what is known of the student, and what is added.

    ``gradient`` is a scalar 0 with the gradient of the reduced loss, where that is not the losses'.
    """

    loss: Tensor
    logprobs: Tensor | None
    side: Side
    gradient: Tensor | None = None


def losses_of_head(
    student: Parted, support: Support, k: int, allowed: Allowed, call: Call
) -> Found:
    """The losses of a support whose student is a head."""
    width = call.range(student.vocab)
    ids, values = support.entries()
    listed = _listed(support, width, call)
    if isinstance(student, LinearLogits) and _computes_gradient(student, values, call):
        return _in_one_pass(student, support, listed, k, allowed, call)
    side = _read(student, support, listed, k, allowed, call)
    outside = (listed < 0) | (listed >= width)
    if side.repeated is not None:
        outside = outside | side.repeated
    unique = listed.masked_fill(outside, -1).to(torch.int32)
    row, middle = _row(student, unique, side, width, call)
    if call.background == "sampled":  # a token that does not exist makes its row NaN
        row = row + torch.where(_invalid(listed, call.mask), torch.nan, 0.0).to(row.dtype)
    count = ids.shape[-1]
    if side.repeated is None:
        places = torch.arange(count, dtype=torch.int32, device=ids.device).expand(ids.shape)
    else:
        places = first_places(listed)
    taken = allowed_ids(ids, allowed)
    if call.objective.outside == "sample":
        taken = torch.cat((taken[..., :-1], ids[..., -1:] >= 0), -1)
    # What a teacher gives ids that take no part is its tail's, so these stay ids, beyond the row.
    slots = places[..., :count] + torch.where(taken, 0, row.shape[-1])
    slots = slots.masked_fill(ids < 0, -1)
    everything = Allowed(row.shape[-1], None, call.mask)
    request = Request(slots, everything, call.objective, False, call.backend)
    tails = None
    if call.full:
        assert support.teacher.tail is not None
        tails = Tails(support.teacher.tail, None, row.shape[-1])
    token: Token | None = None
    if call.with_logprobs:
        place = places[..., -1].masked_fill(listed[..., -1] < 0, -1)  # which makes its row NaN
        token = _token(side, place, middle, count, row.shape[-1], call)
    loss, logprobs, *_ = BackgroundLoss.apply(row, values, request, tails, token)
    return Found(loss, logprobs if call.with_logprobs else None, side)


def token_logprobs_of_head(head: Parted, ids: Tensor, width: int, call: Call) -> Tensor:
    """Log-probs (...) of one id of each row, (..., 1), NaN where it is -1; 0 in masked rows."""
    temperature = call.objective.temperature
    everything = Allowed(width, None, call.mask)
    reading = Reading(0, everything, Tail(width, temperature, ids, False), ids)
    side = read_side(head, reading, call.backend)
    row, middle = _row(head, ids, side, width, call)
    slots = torch.where(ids < 0, -1, 0).to(torch.int32)
    request = Request(slots, Allowed(2, None, call.mask), call.objective, False, call.backend)
    token = _token(side, slots[..., 0], middle, 1, 2, call)
    return BackgroundLoss.apply(row, None, request, None, token)[1]


def _row(head: Parted, ids: Tensor, side: Side, width: int, call: Call) -> tuple[Tensor, Tensor]:
    """``compressed`` of what was read at the ids, each once or -1, with the head's gradients."""
    assert side.values is not None
    assert side.tail is not None
    temperature, sampled = call.objective.temperature, call.background == "sampled"
    values = side.values.masked_fill(ids < 0, -torch.inf)  # listed twice, or no id
    rows = Rows(ids, values, side.tail, temperature, width, call.mask, sampled)
    z, tail = attached(head, rows, call.inplace, call.backend)
    return compressed(z, tail, ids, temperature)


def compressed(
    values: Tensor, tail: Tensor, ids: Tensor, temperature: Temperature
) -> tuple[Tensor, Tensor]:
    """(rows (..., C + 1) of the logits at the ids, each relative to the largest; that (..., 1)).

    The last is T times the tail. Ids of -1 are absent.
    """
    values = values.masked_fill(ids < 0, -torch.inf)
    middle = values.detach().amax(-1, keepdim=True)
    middle = middle.masked_fill(middle == -torch.inf, 0)
    wide = wide_dtype(values.device)
    rest = tail.to(wide)[..., None] * divisor(temperature, wide) - middle.to(wide)
    return torch.cat((values - middle, rest.to(values.dtype)), -1), middle


def _invalid(listed: Tensor, mask: Tensor | None) -> Tensor:
    """Whether the last id, the sampled token's, is none, (..., 1)."""
    invalid = listed[..., -1:] < 0
    return invalid if mask is None else invalid & mask[..., None]


def _listed(support: Support, width: int, call: Call) -> Tensor:
    """The ids (..., C) whose logits are wanted of the student: the support's, and the token's."""
    ids = support.ids
    if not call.lists_token:
        return ids
    assert call.token_ids is not None
    token = call.token_ids
    token = torch.where((token < 0) | (token >= width), -1, token)[..., None]
    return torch.cat((ids, token.to(ids.dtype)), -1)


def _read(
    student: Parted,
    support: Support,
    listed: Tensor,
    k: int,
    allowed: Allowed,
    call: Call,
) -> Side:
    """The student's logits at the listed ids and its tail, from as few reads as there can be."""
    width, known = call.range(student.vocab), support.student
    watched = call.wants("student_entropy") or call.wants("overlap")
    repeated: Tensor | None = None
    if support.repeats or listed is not support.ids:
        repeated = repeats(listed) & (listed >= 0)
    if known.values is not None and known.values.shape == listed.shape:
        return known._replace(repeated=repeated)
    if call.student_logsumexp is not None and not watched:
        return _from_logsumexp(student, listed, repeated, width, call)
    reading = _reading(listed, k, width, allowed, call)
    return read_side(student, reading, call.backend)._replace(repeated=repeated)


def _reading(listed: Tensor, k: int, width: int, allowed: Allowed, call: Call) -> Reading:
    """What one pass finds: the tail, and the student's own best ids for the overlap."""
    temperature, entropy = call.objective.temperature, call.wants("student_entropy")
    best = k if call.wants("overlap") and call.support == "teacher" else 0
    return Reading(best, allowed, Tail(width, temperature, listed, entropy), listed)


def _from_logsumexp(
    student: Parted, listed: Tensor, repeated: Tensor | None, width: int, call: Call
) -> Side:
    """The tail as what the listed ids leave of a log-sum-exp that is given, 2^-24 of it or more."""
    assert call.student_logsumexp is not None
    values = values_at(student, listed, Allowed(width, None, call.mask), call.backend)
    wide = wide_dtype(values.device)
    whole = call.student_logsumexp.detach().to(wide)
    scaled = values.to(wide) / divisor(call.objective.temperature, wide)
    # -inf has no mass, in a row of only -inf either.
    shares = (scaled - whole[..., None]).exp().masked_fill(scaled == -torch.inf, 0)
    if repeated is not None:
        shares = shares.masked_fill(repeated, 0)
    tail = whole + torch.log1p(-shares.sum(-1).clamp(max=1 - 2.0**-24))
    if call.mask is not None:
        tail = tail.masked_fill(~call.mask, 0)
    return Side(values=values, tail=tail, repeated=repeated)


def _token(side: Side, place: Tensor, middle: Tensor, count: int, width: int, call: Call) -> Token:
    """The sampled token, at a place of rows whose logits are relative to ``middle`` (..., 1)."""
    shares = side._replace(temperature=call.objective.temperature).with_shares().shares
    assert shares is not None
    log_probs, total = shares
    shift = middle.to(total.dtype) / divisor(call.objective.temperature, total.dtype)
    return Token(place, log_probs[..., :count], total - shift[..., 0], width)


def _computes_gradient(student: LinearLogits, teacher: Tensor, call: Call) -> bool:
    """Whether the pass over the head's logits makes its gradient, in forward.

    It has to know the upstream gradient of each row but for a factor. In float16 that factor, a
    loss scale, is what keeps the gradient from vanishing. A teacher in float64, ``teacher``, wants
    the loss of a narrower head in float64, which that pass does not have.
    """
    tensors = (student.hidden, student.weight, student.bias)
    dtype = as_autocast(student.hidden.new_empty(0))[0].dtype
    return (
        call.full
        and call.background == "exact"
        and call.reduction != "none"
        and call.support == "teacher"
        and not call.with_logprobs
        and call.student_logsumexp is None
        and dtype != torch.float16
        and (teacher.dtype != torch.float64 or dtype == torch.float64)
        and torch.is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in tensors)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def _in_one_pass(
    student: LinearLogits, support: Support, listed: Tensor, k: int, allowed: Allowed, call: Call
) -> Found:
    """The losses, and the gradient of what they are reduced to."""
    ids, values = support.entries()
    width = call.range(student.vocab)
    assert support.teacher.tail is not None
    reading = Reading(0, allowed, no_tail(), None)
    if call.watches("student") or call.wants("overlap"):
        reading = _reading(listed, k, width, allowed, call)
    question = Question(ids, values, call.objective, Tails(support.teacher.tail, None, width))
    hidden, weight, bias = as_autocast(student.hidden, student.weight, student.bias)
    wanted = Wanted(
        hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
    )
    factors = call.factors(student.shape, compute_dtype(hidden, values), student.device)
    loss, best, _, at_listed, tail, entropy, *grads = _ops.linear_divergence(
        head_as_operand(student), reading, question, factors, wanted, call.backend
    )
    gradient = HeadLoss.apply(hidden, weight, bias, grads, loss)
    side = Side()
    if reading.tail.width:
        side = Side(
            values=at_listed,
            tail=tail,
            entropy=entropy if reading.tail.with_entropy else None,
            best=best if reading.k else None,
            repeated=repeats(listed) & (listed >= 0),
        )
    return Found(loss, None, side, gradient)
