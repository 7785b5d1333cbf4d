"""``select_topk``: the teacher's support as a value of its own, to cache or to send."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_kernels import _checks, _ops
from opd_kernels._arguments import Allowed, Head, Tail, Temperature, no_tail
from opd_kernels.backends import plain
from opd_kernels.head import LinearLogits, as_autocast
from opd_kernels.options import allowed, backend_name, bool_mask
from opd_kernels.support import TopK

__all__ = ["select_topk"]


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

    Gradients: none. Memory: the outputs (with log-sum-exps: at most a copy of a few rows in their
    dtype; ``LinearLogits``: its workspace).

    Errors: ``ValueError`` for k outside [1, V], a last stride other than 1, a mask or token ids of
    another shape or device, a temperature that is not above 0, ``top_p`` outside (0, 1], a backend
    that cannot serve the call; ``TypeError`` for other types and dtypes.

    Example::

        support = select_topk(teacher_logits, 32, token_ids=tokens, top_p=0.95)
        loss = topk_rkl(student_logits, support)
    """
    if isinstance(logits, LinearLogits):
        rows, vocab = logits.shape, logits.vocab
    else:
        *_, vocab = _checks.check_logits(logits, "logits").shape
        rows = logits.shape[:-1]
    device = logits.device
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
    tail = no_tail()
    if summed:
        tail = Tail(which.limit, Temperature(float(temperature)))
    ids, values, rest, _ = select(logits, k, which, tail, backend)
    given = {}
    if token_ids is not None:
        # A token need not be one that can be selected.
        given["token_logits"] = _logits_at(logits, token_ids, which._replace(banned=None), backend)
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


def _logits_at(
    logits: Tensor | LinearLogits, token_ids: Tensor, allowed: Allowed, backend: str
) -> Tensor:
    """The logits (...) at one id per row; NaN where it is not allowed."""
    ids = token_ids[..., None]
    if isinstance(logits, Tensor):
        values, slots = _ops.gather(logits.detach(), ids, allowed, backend)
    else:
        head = _head(logits)
        ids = ids.clamp(min=-1)  # labels of -100 are no error in debugging mode
        values, slots = _ops.gather_dot(head.hidden, head.weight, head.bias, ids, allowed, backend)
        # The head's own product, which gave the entries, is rounded to its dtype.
        values = plain.shaped(
            values.to(head.hidden.dtype).to(values.dtype), head.scale, head.softcap
        )
    return torch.where(slots < 0, torch.nan, values).squeeze(-1)


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


def select(
    logits: Tensor | LinearLogits, k: int, allowed: Allowed, tail: Tail, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, values, the tail, its entropy) of the k best; no tail unless it is asked for."""
    if isinstance(logits, Tensor):
        return _ops.select(logits.detach(), k, allowed, tail, backend)
    return _ops.select_linear(_head(logits), k, allowed, tail, backend)


def tail_of(
    logits: Tensor | LinearLogits, mask: Tensor | None, tail: Tail, backend: str
) -> tuple[Tensor, Tensor]:
    """(log-sum-exp, entropy) outside of the tail's ids."""
    if isinstance(logits, Tensor):
        return _ops.tail_logsumexp(logits.detach(), mask, tail, backend)
    return _ops.tail_logsumexp_linear(_head(logits), mask, tail, backend)


def _head(logits: LinearLogits) -> Head:
    """A head as operators take it, in autocast's dtype where that is on."""
    # Checked again: autocast may have allowed mixed dtypes there and be off here.
    _checks.check_head(logits.hidden, logits.weight, logits.bias, "LinearLogits ")
    hidden, weight, bias = as_autocast(logits.hidden, logits.weight, logits.bias)
    bias = None if bias is None else bias.detach()
    return Head(hidden.detach(), weight.detach(), bias, logits.scale, logits.softcap)
