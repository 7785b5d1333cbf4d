"""The formulas of a row: what its K entries, and what lies beyond them, give to loss and gradient.

With a = log p of the student and b = log q of the teacher at an entry, each part of a divergence
has a value there and a slope, the derivative of the value by a:

    part           value      slope                with  l = a - b
    reverse        p l        p (l + 1)                  A = a - m = -log1p(beta expm1(-l))
    forward        q (-l)     -q                         B = b - m = -log1p((1 - beta) expm1(l))
    skew_reverse   p A        p (A + 1 - w)              w = (1 - beta) e^A
    skew_forward   q B        -q w

``stop_ratio`` leaves out the 1 of reverse. ``log_ratio_clip`` clamps l, -l, A and B; beyond, their
derivative is 0. ``logp_floor`` clamps a and b before anything else; below, slopes are 0.

Let c be the sum of all slopes of a row. The loss's derivative by the student's logit z_j is

    (slope_j - c p_j) / T  at an entry        factor e^(z_j / T - logsumexp)  elsewhere

where T factor is 0 if p is normalised over the entries, else -c, and slope / p of the tail more if
the tail is an entry. Everything is float64 (float32 on devices without it): late in training p is
nearly q, and l is a small difference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opd_kernels._arguments import Objective, Temperature, wide_dtype
from opd_kernels.divergences import Divergence

NEVER = float("-inf")


class Terms(NamedTuple):
    """What entries give, (..., K) each; ``relative`` is slope / p, also where p is 0."""

    value: Tensor
    slope: Tensor
    relative: Tensor


def wide(x: Tensor) -> Tensor:
    """As float64, or float32 on devices that lack it."""
    return x.to(wide_dtype(x.device))


def per_row(temperature: Temperature) -> float | Tensor:
    """What divides the entries (..., K) of all rows."""
    value, rows = temperature
    return value if rows is None else wide(rows[..., None])


def log_softmax(
    x: Tensor, temperature: Temperature, tail: Tensor | None = None, count: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(log softmax of x / T, what the tail holds as a log-prob, the log-sum-exp).

    The log-sum-exp (..., 1) is over the first ``count`` of x, or all, and the ``tail`` (..., 1),
    itself one. -inf stays. What is finite stays so: a span that overflows never makes inf - inf.
    The maximum is subtracted before dividing, because x / T alone may overflow.
    """
    divisor, summed = per_row(temperature), x[..., :count]
    top = summed.amax(-1, keepdim=True)
    top = top.masked_fill(top == NEVER, 0)
    offset = top / divisor
    total = ((summed - top) / divisor).exp().sum(-1, keepdim=True).log()
    rest = torch.full_like(total, NEVER) if tail is None else tail - offset
    total = torch.logaddexp(total, rest)
    log_p = ((x - top) / divisor - total).clamp(torch.finfo(x.dtype).min, 0)
    return log_p.masked_fill(x == NEVER, NEVER), (rest - total).clamp(max=0), total + offset


def terms(a: Tensor, b: Tensor, objective: Objective) -> Terms:
    """Value and slope of entries, weighted; where b is -inf an entry is absent and has 0."""
    divergence, beta = objective.divergence, objective.divergence.beta
    reverse, forward, skew_reverse, skew_forward = weights(objective)
    a, b, live = _floored(a, b, divergence)
    present = b != NEVER
    a, b = torch.where(present, a, 0), torch.where(present, b, 0)
    p, q, ratio = a.exp(), b.exp(), a - b
    total = Terms(*(torch.zeros_like(p) for _ in Terms._fields))

    def add(weight: float | Tensor, value: Tensor, slope: Tensor, relative: Tensor) -> None:
        nonlocal total
        parts = zip(total, (value, slope, relative), strict=True)
        total = Terms(*(so_far + times(weight, part) for so_far, part in parts))

    if _used(reverse):
        r, inside = clipped(ratio, divergence)
        relative = r if divergence.stop_ratio else r + inside
        add(reverse, times(p, r), times(p, relative), relative)
    if _used(forward):
        r, inside = clipped(-ratio, divergence)
        add(forward, times(q, r), -q * inside, -times(inside, (-ratio).exp()))
    if _used(skew_reverse) or _used(skew_forward):
        a_m = -_log_mixed(beta, -ratio)
        b_m = -_log_mixed(1 - beta, ratio, beta)
        share = (1 - beta) * a_m.exp()
        r, inside = clipped(a_m, divergence)
        relative = r + inside * (1 - share)
        add(skew_reverse, times(p, r), times(p, relative), relative)
        r, inside = clipped(b_m, divergence)
        add(skew_forward, times(q, r), -q * inside * share, -inside * (1 - beta) * b_m.exp())
    if objective.outside == "generalize":
        balance = reverse - forward
        add(balance, q - p, -p, -torch.ones_like(p))
    value, slope, relative = (torch.where(present, part, 0) for part in total)
    return Terms(value, times(live, slope), times(live, relative))


def centred(terms: Terms, log_p: Tensor, objective: Objective) -> Terms:
    """The terms with slopes that are small where p is nearly q.

    A multiple of p, added to all slopes, changes no gradient as long as p sums to 1: over the
    entries, or over the entries and the tail.
    """
    reverse, forward, skew_reverse, skew_forward = weights(objective)
    beta = objective.divergence.beta
    own = 0 if objective.divergence.stop_ratio else reverse
    constant = own - forward + beta * skew_reverse - (1 - beta) * skew_forward
    value, slope, relative = terms
    return Terms(value, slope - constant * log_p.exp(), relative - constant)


def sampled_terms(a: Tensor, b: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """(value, slope) of the reverse KL's estimate; the last entry is the token's that was sampled.

    The token stands for all that is not on the support: value and slope are l there, p l elsewhere.
    The slopes are those of policy gradients, whose mean over y ~ p is the full reverse KL's
    gradient, not derivatives of the value.
    """
    weight, *_ = weights(objective)
    floored_a, floored_b, live = _floored(a, b, objective.divergence)
    present = floored_b != NEVER
    ratio = torch.where(present, floored_a - floored_b, 0)
    r, _ = clipped(ratio, objective.divergence)
    factor = torch.cat((floored_a[..., :-1].exp(), torch.ones_like(a[..., -1:])), -1)
    value = torch.where(present, times(weight, times(factor, r)), 0)
    return value, times(live, value)


def weights(objective: Objective) -> tuple[float | Tensor, ...]:
    """The divergence's four weights, numbers or (..., 1)."""
    if objective.weights is None:
        return objective.divergence[:4]
    return wide(objective.weights)[..., None, :].unbind(-1)


def _log_mixed(share: float, x: Tensor, rest: float | None = None) -> Tensor:
    """log(share e^x + rest), where rest is 1 - share, or what 1 - share was rounded from."""
    rest = 1 - share if rest is None else rest
    change = share * torch.expm1(x)
    rest_and_share = x.new_tensor((rest, share)).log()
    # Where e^x overflows, or nothing but a rounded share is left, the logarithms are added.
    added = torch.logaddexp(rest_and_share[0], rest_and_share[1] + x)
    return torch.where((change > -0.5) & (x < 30), torch.log1p(change), added)


def clipped(ratio: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """(the clamped log ratio, its derivative by the unclamped one)."""
    clip = divergence.log_ratio_clip
    if clip is None:
        return ratio, torch.ones_like(ratio)
    return ratio.clamp(-clip, clip), (ratio.abs() <= clip).to(ratio.dtype)


def times(factor: float | Tensor, x: Tensor) -> Tensor:
    """factor x; 0 where the factor is 0, also where x is infinite."""
    if isinstance(factor, Tensor):
        return torch.where(factor == 0, 0, factor * x)
    return factor * x if factor else torch.zeros_like(x)


def _floored(a: Tensor, b: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, derivative of a by the unclamped one); b of an absent entry stays -inf."""
    floor = divergence.logp_floor
    if floor is None:
        return a, b, torch.ones_like(a)
    kept = torch.where(b == NEVER, b, b.clamp(min=floor))
    return a.clamp(min=floor), kept, (a >= floor).to(a.dtype)


def _used(weight: float | Tensor) -> bool:
    return isinstance(weight, Tensor) or weight != 0
