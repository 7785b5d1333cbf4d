"""``select_topk`` and ``score_ids``: a support as a value of its own, to cache or to send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opd_kernels import _checks, _ops
from opd_kernels._arguments import Allowed, Reading, Tail, Temperature, no_tail
from opd_kernels._collectives import agree
from opd_kernels._ordering import repeats
from opd_kernels._shards import read as read_shards
from opd_kernels.distributed import (
    Parted,
    Sharded,
    Source,
    VocabShard,
    from_dtensor,
    sharded,
)
from opd_kernels.head import LinearLogits, head_as_operand
from opd_kernels.options import allowed, backend_name, bool_mask
from opd_kernels.support import TopK

__all__ = ["score_ids", "select_topk"]


@torch.no_grad()
def select_topk(
    logits: Tensor | LinearLogits,
    k: int,
    *,
    mask: Tensor | None = None,
    banned_ids: Sequence[int] | Tensor | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    token_ids: Tensor | None = None,
    top_p: float | None = None,
    with_logsumexp: bool = False,
    vocab_shard: VocabShard | None = None,
    backend: str | None = None,
) -> TopK:
    """The k best ids of each row and their logits, exactly.

    Order: (value descending, id ascending); ties go to the lower id, -0 equals +0, NaN ranks
    highest. With ``top_p`` an entry stays only where those before it hold less than ``top_p`` of
    the whole softmax. With a row's logits t, the entries i = 1, 2, ... in order, and
    W = min(V, vocab_size)::

        i stays if i = 1 or sum over j < i of exp(t_j / temperature - logsumexp) < top_p

        logsumexp      = log sum over [0, W) of exp(t / temperature)
        tail_logsumexp = log sum over [0, W) without the entries that stay

    Shapes and dtypes: logits (..., V), float16, bfloat16, float32 or float64, last stride 1;
    or ``LinearLogits``, whose rows are computed a few hundred at a time and not kept;
    returns ids int32 and logits float32 (float64 for float64), both (..., k). Only ids in
    [0, W) that are not in ``banned_ids`` can be selected; where fewer than k can be, beyond
    ``top_p``, and in rows whose ``mask`` is False (not read), the id is -1 and the logit -inf.

    - ``with_logsumexp`` and ``top_p`` add ``logsumexp`` and ``tail_logsumexp`` (...), float64
      (float32 on devices without it), 0 in masked rows. Banned ids are in both. The tail is summed
      by itself, so it keeps its digits where the entries hold nearly everything. Kernels add
      exponentials in float32: their sums, and where ``top_p`` cuts, are right to a relative 1e-5.
    - ``temperature``, a float above 0, is that of these sums and of ``top_p``. It divides no logit
      that is returned. ``torch.compile`` takes it as a constant.
    - ``token_ids`` int32 or int64 (...), the sampled tokens, adds ``token_logits`` (...), in the
      dtype of the logits that are returned: t at that id, which may be banned; NaN where it is
      outside [0, W) (labels of -100) and in masked rows. Of ``LinearLogits`` it is rounded as
      the head's product is.

    A row with NaN or +inf has no nucleus: with ``top_p`` its best entry alone stays.

    ``vocab_shard``: ``logits``, or the head, are this rank's columns of the vocabulary; all ranks
    get the same result, that of the whole rows (a 0 is +0). V is the shard's ``vocab_size``. One
    collective. Logits may be a DTensor, as in ``topk_rkl``.

    Gradients: none. Memory: the outputs (with log-sum-exps: at most a copy of a few rows in their
    dtype; ``LinearLogits``: its workspace).

    Errors: ``ValueError`` for k outside [1, V], a last stride other than 1, a mask or token ids of
    another shape or device, a temperature that is not above 0, ``top_p`` outside (0, 1], a backend
    that cannot serve the call; ``TypeError`` for other types and dtypes.

    Example::

        support = select_topk(teacher_logits, 32, token_ids=tokens, top_p=0.95)
        loss = topk_rkl(student_logits, support)
    """
    source, rows, vocab = _source(logits, vocab_shard)
    device = source.device
    _checks.check_k(k, vocab)
    _checks.check_vocab_size(vocab_size)
    _checks.check_flag(with_logsumexp, "with_logsumexp")
    _checks.check_factor(temperature, "temperature")
    _check_top_p(top_p)
    if token_ids is not None:
        _checks.check_token_ids(token_ids, rows, device)
    backend = backend_name(backend)
    mask = bool_mask(mask, rows, device)
    which = allowed(vocab, vocab_size, banned_ids, mask, device)
    summed = with_logsumexp or top_p is not None
    agree(
        [("logits", source)],
        {"k": k, "sums": summed, "token_ids": token_ids is not None, "vocab_size": vocab_size},
    )
    tail = no_tail()
    if summed:
        tail = Tail(which.limit, Temperature(float(temperature)))
    tokens: Tensor | None = None
    if token_ids is not None:
        outside = (token_ids < 0) | (token_ids >= which.limit)
        tokens = token_ids.masked_fill(outside, -1)[..., None]
    ids, values, at_tokens, rest, _ = select(source, k, which, tail, backend, tokens)
    given = {}
    if at_tokens is not None:
        assert tokens is not None
        missing = tokens < 0 if mask is None else (tokens < 0) | ~mask[..., None]
        given["token_logits"] = at_tokens.masked_fill(missing, torch.nan).squeeze(-1)
    if summed:
        scaled = values.to(rest.dtype) / temperature
        given["logsumexp"] = torch.logaddexp(scaled.logsumexp(-1), rest)
        if top_p is not None and top_p < 1:
            inside = _nucleus(scaled, rest, top_p)
            left_out = scaled.masked_fill(inside, -torch.inf)
            rest = torch.logaddexp(left_out.logsumexp(-1), rest)
            ids, values = ids.where(inside, -1), values.where(inside, -torch.inf)
        given["tail_logsumexp"] = rest
    return TopK(ids, values, **given, temperature=temperature)


@torch.no_grad()
def score_ids(
    logits: Tensor | LinearLogits,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    token_ids: Tensor | None = None,
    vocab_shard: VocabShard | None = None,
    backend: str | None = None,
) -> TopK:
    """The logits at given ids of each row, and the log-sum-exps of the whole row and of the rest.

    It is what a teacher does for a support that the student has chosen. With a row's logits t and
    W = min(V, vocab_size)::

        logsumexp      = log sum over [0, W) of exp(t / temperature)
        tail_logsumexp = log sum over [0, W) without the ids
        log q          = t[ids] / temperature - logsumexp

    Shapes and dtypes: ``logits`` (..., V), float16, bfloat16, float32 or float64, last stride 1, or
    ``LinearLogits``, whose rows are computed a few hundred at a time and not kept; ``ids`` int32 or
    int64 (..., K), in any order. Returns ids int32 and logits float32 (float64 for float64), both
    (..., K), in the given order, and the log-sum-exps (...), float64 (float32 on devices without
    it). An id outside of [0, W) becomes -1 with logit -inf, and so do all of a row whose ``mask``
    is False, which is not read and has log-sum-exps 0. A repeated id counts once in the rest.

    ``temperature`` is that of the sums and divides no logit that is returned; ``token_ids`` adds
    ``token_logits``: both as in ``select_topk``, and so are the precision and ``vocab_shard``.

    Gradients: none. Memory: the outputs; for ``LinearLogits`` its workspace.

    Errors: ``ValueError`` for shapes and devices that do not fit, a temperature that is not above
    0, a backend that cannot serve the call; ``TypeError`` for other types and dtypes.

    Example::

        chosen = select_topk(student_logits.detach(), 32)
        teacher_support = score_ids(teacher_logits, chosen.ids)
        loss = topk_divergence(student_logits, teacher_support, outside="bucket")
    """
    source, rows, vocab = _source(logits, vocab_shard)
    device = source.device
    ids = _checks.check_given_ids(ids, rows, device)
    _checks.check_vocab_size(vocab_size)
    _checks.check_factor(temperature, "temperature")
    if token_ids is not None:
        _checks.check_token_ids(token_ids, rows, device)
    mask = bool_mask(mask, rows, device)
    backend = backend_name(backend)
    width = vocab if vocab_size is None else min(vocab, vocab_size)
    k = ids.shape[-1]
    agree(
        [("logits", source)],
        {"ids": k, "token_ids": token_ids is not None, "vocab_size": vocab_size},
    )
    given = _inside(ids, width, mask)
    listed = given
    if token_ids is not None:
        listed = torch.cat((given, _inside(token_ids[..., None], width, mask)), -1)
    tail = Tail(width, Temperature(float(temperature)), given, False)
    values, rest = read_at(source, listed, Allowed(width, None, mask), tail, backend)
    fields = {}
    if token_ids is not None:
        fields["token_logits"] = values[..., k].masked_fill(listed[..., k] < 0, torch.nan)
    values = values[..., :k].contiguous()
    once = values.masked_fill(repeats(given) & (given >= 0), -torch.inf)
    whole = torch.logaddexp((once.to(rest.dtype) / temperature).logsumexp(-1), rest)
    if mask is not None:
        whole = whole.masked_fill(~mask, 0)
    return TopK(
        given,
        values,
        logsumexp=whole,
        tail_logsumexp=rest,
        temperature=temperature,
        **fields,
    )


def _inside(ids: Tensor, width: int, mask: Tensor | None) -> Tensor:
    """The ids as int32, -1 for those outside of [0, width) and in masked rows."""
    outside = (ids < 0) | (ids >= width)
    if mask is not None:
        outside = outside | ~mask[..., None]
    return ids.masked_fill(outside, -1).to(torch.int32)


def read(
    source: Parted, reading: Reading, backend: str, *, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``_ops.read_linear`` returns: everything that is asked for, from one pass.

    ``exact`` values are those of ``read_shards``.
    """
    if isinstance(source, Sharded):
        return read_shards(source, reading, backend, exact=exact)
    return _ops.read_linear(head_as_operand(source), reading, backend)


def read_at(
    logits: Source, ids: Tensor, allowed: Allowed, tail: Tail, backend: str
) -> tuple[Tensor, Tensor]:
    """(logits at the ids, -inf where an id is none; the tail's log-sum-exp), from one read."""
    if not isinstance(logits, Tensor):
        _, _, values, rest, _ = read(logits, Reading(0, allowed, tail, ids), backend)
        return values, rest
    values, slots = _ops.gather(logits.detach(), ids, allowed, backend)
    rest, _ = _ops.tail_logsumexp(logits.detach(), allowed.mask, tail, backend)
    return values.masked_fill(slots < 0, -torch.inf), rest


def _source(logits: object, shard: VocabShard | None) -> tuple[Source, torch.Size, int]:
    """(what is read, its rows, its vocabulary), once it fits."""
    logits = from_dtensor(logits, "logits")
    if not isinstance(logits, (LinearLogits, Sharded)):
        logits = _checks.check_logits(logits, "logits", least=1 if shard is None else 0)
    source = sharded(logits, shard, "vocab_shard")
    rows = source.shape[:-1] if isinstance(source, Tensor) else source.shape
    return source, rows, vocab_of(source)


def vocab_of(side: Source | TopK) -> int:
    """The width of logits; that of a support."""
    if isinstance(side, TopK):
        return side.k
    return side.shape[-1] if isinstance(side, Tensor) else side.vocab


def _nucleus(scaled: Tensor, tail: Tensor, top_p: float) -> Tensor:
    """Bool (..., k): the first entry, and those before which less than ``top_p`` lies.

    ``scaled`` are the k best t / T in order, ``tail`` the log-sum-exp of all others.
    """
    # Relative to the best one: the sums of equal logits are exact then.
    best = scaled[..., :1].clamp(min=torch.finfo(scaled.dtype).min)
    shares = (scaled - best).exp()
    whole = shares.sum(-1, keepdim=True) + (tail[..., None] - best).exp()
    inside = _sums_before(shares) < top_p * whole
    first = torch.arange(scaled.shape[-1], device=scaled.device) == 0
    return inside | first


def _sums_before(shares: Tensor) -> Tensor:
    """The sum of the elements before each one in its row; torch.cumsum may vary on GPUs."""
    sums, step = torch.nn.functional.pad(shares[..., :-1], (1, 0)), 1
    while step < shares.shape[-1]:
        sums = sums + torch.nn.functional.pad(sums[..., :-step], (step, 0))
        step *= 2
    return sums


def _check_top_p(top_p: object) -> None:
    """A share in (0, 1], or None."""
    if top_p is None:
        return
    if isinstance(top_p, Tensor):
        raise TypeError("top_p is a Tensor, expected a number in (0, 1]; pass .item()")
    _checks.check_number(top_p, "top_p", "a number in (0, 1] or None")
    if not 0 < top_p <= 1:  # type: ignore[operator]
        raise ValueError(
            f"top_p is {top_p}, allowed is above 0 to 1, the share of the teacher's probability "
            "that the entries hold"
        )


class Selected(NamedTuple):
    """The k best of each row, the logits at the ids that were listed, and the tail's sums."""

    ids: Tensor
    values: Tensor
    listed: Tensor | None
    tail: Tensor
    entropy: Tensor


def select(
    logits: Source,
    k: int,
    allowed: Allowed,
    tail: Tail,
    backend: str,
    listed: Tensor | None = None,
    *,
    joined: bool = False,
    exact: bool = False,
) -> Selected:
    """The k best and what else is asked for; a head's logits are computed once.

    A logit at a listed id is -inf where the id is outside of [0, limit) and [0, tail's width). The
    tail of a shard leaves out listed ids that are ``joined`` to the k best, and its values may be
    ``exact``.
    """
    if isinstance(logits, Sharded):
        reading = Reading(k, allowed, tail, listed)
        ids, values, found, *sums = read_shards(
            logits, reading, backend, joined=joined, exact=exact
        )
        return Selected(ids, values, None if listed is None else found, *sums)
    if not isinstance(logits, Tensor):
        ids, values, found, *sums = read(logits, Reading(k, allowed, tail, listed), backend)
        return Selected(ids, values, None if listed is None else found, *sums)
    ids, values, *sums = _ops.select(logits.detach(), k, allowed, tail, backend)
    if listed is None:
        return Selected(ids, values, None, *sums)
    everything = Allowed(max(allowed.limit, tail.width), None, allowed.mask)
    found, slots = _ops.gather(logits.detach(), listed, everything, backend)
    return Selected(ids, values, found.masked_fill(slots < 0, -torch.inf), *sums)
