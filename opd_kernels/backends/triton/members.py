"""The members of the divergence family: what an entry adds to the loss, and its slope.

``csrc/common/members.h`` has the table of values and slopes, and says what an entry's rest is and
why it is computed without a difference of large terms. The functions here take blocks of entries,
or one entry as a scalar. ``member`` is (reverse, forward, skew reverse, skew forward, beta, 1 -
beta, clip). REVERSE, FORWARD and SKEW say which of the weights may differ from 0.
"""

import triton
import triton.language as tl

from opd_kernels.backends.triton.mathematics import (
    exp,
    expm1,
    expm1_near_zero,
    finite,
    log,
    log1p,
    scalar,
)

_LEAST = tl.constexpr(1.1754943508222875e-38)
_HALF_STEP = tl.constexpr(2.0**-24)


@triton.jit
def row_member(
    weights_ptr, row, reverse, forward, skew_reverse, skew_forward, beta, clip
):  # fmt: skip
    """The member of a row, whose weights are its own if there is memory of them."""
    reverse, forward = scalar(reverse), scalar(forward)
    skew_reverse, skew_forward = scalar(skew_reverse), scalar(skew_forward)
    beta, clip = scalar(beta), scalar(clip)
    if weights_ptr is not None:
        weights_ptr += 4 * row
        reverse, forward = tl.load(weights_ptr), tl.load(weights_ptr + 1)
        skew_reverse, skew_forward = tl.load(weights_ptr + 2), tl.load(weights_ptr + 3)
    # As floats, both shares stay above 0.
    other = tl.maximum(1.0 - beta, _HALF_STEP)
    beta = tl.maximum(beta, _LEAST)
    return reverse, forward, skew_reverse, skew_forward, beta, other, clip


@triton.jit
def kappa_of(member, REVERSE: tl.constexpr, FORWARD: tl.constexpr, SKEW: tl.constexpr,
             STOP: tl.constexpr, OUTSIDE: tl.constexpr):  # fmt: skip
    """A slope over p where p is q."""
    reverse, forward, skew_reverse, skew_forward, beta, other, _ = member
    kappa = 0.0
    if REVERSE and not STOP:
        kappa += reverse
    if FORWARD:
        kappa -= forward
    if SKEW:
        kappa += beta * skew_reverse - other * skew_forward
    if OUTSIDE == "generalize":
        kappa -= balance_of(member, REVERSE, FORWARD)
    return kappa


@triton.jit
def balance_of(member, REVERSE: tl.constexpr, FORWARD: tl.constexpr):
    """Factor of the sum of q - p over the support that "generalize" adds."""
    balance = 0.0
    if REVERSE:
        balance += member[0]
    if FORWARD:
        balance -= member[1]
    return balance


@triton.jit
def exp_change(p, q, log_ratio):
    """p - q = q (e^l - 1), without cancellation where the log ratio l is small."""
    return tl.where(tl.abs(log_ratio) <= 0.5, q * expm1_near_zero(log_ratio), p - q)


@triton.jit
def clamped(ratio, clip):
    """A log ratio within [-clip, clip]."""
    return tl.minimum(tl.maximum(ratio, -clip), clip)


@triton.jit
def terms(p, q, log_ratio, member,
          REVERSE: tl.constexpr, FORWARD: tl.constexpr, SKEW: tl.constexpr,
          STOP: tl.constexpr, OUTSIDE: tl.constexpr):  # fmt: skip
    """(value, rest, rest / p), without what "generalize" adds to the latter.

    An entry of 0 adds nothing, whatever its log ratio is; its rest / p is finite or infinite.
    """
    reverse, forward, skew_reverse, skew_forward, beta, other, clip = member
    value, rest, relative = 0.0, 0.0, 0.0
    inside = tl.abs(log_ratio) <= clip
    if REVERSE:
        ratio = clamped(log_ratio, clip)
        value += _weighted(reverse, tl.where(p > 0, p * ratio, 0.0))
        if not STOP:
            ratio = tl.where(inside, ratio, ratio - 1.0)
        rest += _weighted(reverse, tl.where(p > 0, p * ratio, 0.0))
        relative += _weighted(reverse, ratio)
    if FORWARD:
        value += _weighted(forward, tl.where(q > 0, q * clamped(-log_ratio, clip), 0.0))
        rest += _weighted(forward, tl.where(inside, exp_change(p, q, log_ratio), p))
        if OUTSIDE == "bucket":
            relative += _weighted(forward, tl.where(inside, -expm1(-log_ratio), 1.0))
    if SKEW:
        log_p, log_q, change_p, change_q = _mixture(log_ratio, beta, other)
        value += _weighted(skew_reverse, tl.where(p > 0, p * clamped(log_p, clip), 0.0))
        value += _weighted(skew_forward, tl.where(q > 0, q * clamped(log_q, clip), 0.0))
        # w of the table is (1 - beta) e^A, and p e^B is q e^A.
        own = tl.where(tl.abs(log_p) <= clip, log_p - other * change_p, clamped(log_p, clip) - beta)
        skews = _weighted(skew_reverse, own)
        own = other * tl.where(tl.abs(log_q) <= clip, -change_q, 1.0)
        skews += _weighted(skew_forward, own)
        rest += tl.where(p > 0, p * skews, 0.0)
        relative += skews
    if OUTSIDE == "generalize":
        value -= _weighted(balance_of(member, REVERSE, FORWARD), exp_change(p, q, log_ratio))
    return value, finite(rest), relative


@triton.jit
def _weighted(weight, x):
    """weight x, 0 where the weight is, even if x is infinite."""
    return tl.where(weight != 0, weight * x, 0.0)


@triton.jit
def _mixture(log_ratio, beta, other):
    """A and B, and e^A - 1 and e^B - 1. Nothing overflows, on either side of p = q.

    With 1 for the larger of p and q and e^s for the other, the mixture is ``whole``; the logarithms
    keep their digits however small a share is.
    """
    above = log_ratio >= 0
    s = -tl.abs(log_ratio)
    exponential, change = exp(s), expm1(s)
    smaller, larger = tl.where(above, beta, other), tl.where(above, other, beta)  # their shares
    own = smaller * change
    near = own > -0.5
    whole = tl.where(near, 1.0 + own, larger + smaller * exponential)
    log_larger = -tl.where(near, log1p(own), log(whole))
    far = larger * tl.div_rn(-change, exponential)  # e^-s whole - 1
    log_smaller = tl.where(far < 1, -log1p(far), log_larger + s)
    own = tl.div_rn(-own, whole)
    change = tl.div_rn(larger * change, whole)
    return (
        tl.where(above, log_larger, log_smaller),
        tl.where(above, log_smaller, log_larger),
        tl.where(above, own, change),
        tl.where(above, change, own),
    )
