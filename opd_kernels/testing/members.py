"""Every member of the divergence family on one row, in float64, and bounds on the errors of others.

With a = log p, b = log q, l = a - b and m = log(beta q + (1 - beta) p), each entry has a value and
a slope, its derivative by a; c is the sum of the slopes::

    dL/dz_j = (slope_j - c p_j) / T  on the entries,    alpha p_j / T  elsewhere

Bounds are first-order forward error bounds in arithmetic of unit roundoff u:

- An exponent s = (x - max) / T is off by 3 u |s| (difference, division, T's own rounding); the
  maximum is that of the entries, or of entries and tail. exp and log add 2 u each. A sum of n terms
  adds (log2 n + 1) u.
- A tail, the log-sum-exp outside of the support, may be a sum of groups with a maximum each, of up
  to 32 terms one after the other. It is off by what its terms are, 8 u, 3 u |s| and, as x / T and
  max / T may be rounded each on its own, u (|x| + |max|) / T, and by the sums.
- l is a difference of values, rounded once, and the logarithm of the normalisers' ratio, for which
  ``_log_ratio_errors`` follows both ways to compute it.
- From there the bounds follow the formulas term by term. p is the same in a slope and in c p, and
  all p add up to 1: an error of p matters where the slope by p is not c.
- Values are continuous where a log ratio is clipped or a log-prob is floored, slopes are not. If
  such an edge is as near as the error, a slope is right on either side: the jump is in its bound.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from opd_kernels.testing.arithmetic import WIDE_UNIT, Arithmetic, sum_depth

NEVER = -np.inf
# Below this a float32 exponential may be 0.
_VANISHING = 1e-37
# By how much a tail's slope may exceed its p before the background is relative to the tail.
_FAR_TAIL = 1e25


class Side(NamedTuple):
    """One side of a row."""

    values: np.ndarray  # logits at the entries
    errors: np.ndarray  # bounds on their errors
    temperature: float
    # The log-sum-exp of logits / T outside of the entries, and a bound on its error. None if the
    # probabilities are those of the entries alone.
    tail: float | None = None
    tail_error: float = 0.0
    token: float | None = None  # the logit of a sampled token that is not an entry
    token_error: float = 0.0


class Member(NamedTuple):
    """What is computed on the entries."""

    weights: tuple[float, float, float, float]  # of reverse, forward, skew reverse, skew forward
    beta: float = 0.5
    stop_ratio: bool = False
    clip: float = np.inf
    floor: float = NEVER
    outside: str = "renormalize"


class Numbers(NamedTuple):
    """A row's loss, the gradient at its entries, the token's last, and outside of them.

    Outside it is scale p_j + share e^(z_j / T - tail), which is share p_j / p of the tail, and
    log p_j = z_j / T - logsumexp. Each with a bound on its error.
    """

    loss: float
    loss_budget: float
    grad: np.ndarray
    grad_budget: np.ndarray
    scale: float = 0.0
    scale_budget: float = 0.0
    share: float = 0.0
    share_budget: float = 0.0
    logsumexp: float = 0.0
    logsumexp_error: float = 0.0
    largest_factor: float = 0.0  # what multiplies p_j, as one number


def numbers(student: Side, teacher: Side, member: Member, arithmetic: Arithmetic) -> Numbers:
    """The numbers of a row without NaN and +inf, of which both sides have a finite value."""
    with np.errstate(all="ignore"):
        unit, tiny, largest = arithmetic
        found = _numbers(student, teacher, member, unit, tiny)
        # What float64 loses here: more, where the loss is next to nothing.
        exact = student._replace(
            errors=np.zeros(len(student.errors)), tail_error=0.0, token_error=0.0
        )
        own = _numbers(exact, teacher._replace(tail_error=0.0), member, WIDE_UNIT, 0.0)
        budgets = {
            name: np.nan_to_num(
                getattr(found, name) + getattr(own, name), nan=np.inf, posinf=np.inf
            )
            for name in Numbers._fields
            if name.endswith(("_budget", "_error"))
        }
        found = found._replace(**budgets)
        if not _span(student, teacher, found) < largest / 8 or _lost(student) or _lost(teacher):
            found = _overflown(found)
    return found


def _lost(side: Side) -> bool:
    """Whether a tail of huge logits has no digits left, as the float64 that it travels in."""
    if side.tail is None:
        return False
    finite = [abs(x) for x in (side.tail, *(side.values / side.temperature)) if x > NEVER]
    largest = max(finite, default=0.0)
    return bool(WIDE_UNIT * largest > 1e-3)


def _span(student: Side, teacher: Side, found: Numbers) -> float:
    """The largest number on the way to the results; NaN if there is a NaN."""
    sizes = [abs(found.grad).max(initial=0.0), abs(found.scale), found.logsumexp]
    sizes += [] if found.loss == np.inf else [abs(found.loss)]
    for side in (student, teacher):
        spread = [*side.values, *([] if side.token is None else [side.token])]
        finite = np.array([x for x in spread if x > NEVER])
        sizes += [(finite.max() - finite.min()) / side.temperature if len(finite) else 0.0]
        if side.tail is not None and side.tail > NEVER and len(finite):
            sizes += [abs(side.tail - finite / side.temperature).max()]
    return float(np.max(np.abs(sizes)))


def _overflown(found: Numbers) -> Numbers:
    """Results whose span overflows, in float64 perhaps here too: inf is allowed, NaN is not."""
    changed = {
        name: np.nan_to_num(value, nan=0.0) if name in ("loss", "grad", "scale", "share") else value
        for name, value in found._asdict().items()
    }
    changed |= {"loss_budget": np.inf, "scale_budget": np.inf}
    changed |= {"grad_budget": np.full(len(found.grad), np.inf)}
    return found._replace(**changed)


class _Logs(NamedTuple):
    """Log-probs of one side, of the entries, the token and the tail, and bounds on their errors.

    ``exponents`` are relative to the largest entry. ``inputs`` is the part of an error that comes
    from the values themselves.
    """

    log: np.ndarray
    error: np.ndarray
    exponents: np.ndarray
    inputs: np.ndarray
    shift: float  # the largest exponent
    log_sum: float  # of e^(exponent - shift), over entries and tail
    sum_error: float  # relative
    logsumexp: float


def _logs(side: Side, unit: float) -> _Logs:
    values, errors, t = side.values, side.errors / side.temperature, side.temperature
    finite = values[values > NEVER]
    top = finite.max() if len(finite) else 0.0
    exponents = (values - top) / t
    own = 3 * unit * abs(exponents)
    summed = [True] * len(values)
    if side.token is not None:
        at = (side.token - top) / t
        exponents, errors = np.append(exponents, at), np.append(errors, side.token_error / t)
        own, summed = np.append(own, 3 * unit * abs(at)), [*summed, False]
    if side.tail is not None:
        # The tail and max / T, of which it is taken off, may have another rounding of T each.
        error = side.tail_error + 2 * unit * (abs(side.tail) + abs(top / t))
        exponents, errors = np.append(exponents, side.tail - top / t), np.append(errors, error)
        own, summed = np.append(own, 0.0), [*summed, True]
    counted = np.array(summed, dtype=bool)
    shift = float(exponents[counted].max())
    shifted = exponents - shift
    exp = np.where(counted, np.exp(shifted), 0.0)
    total = exp.sum()
    log_sum = float(np.log(total))
    present = exponents > NEVER
    each = np.where(present, np.maximum(own, 3 * unit * abs(shifted)) + errors, 0.0)
    sum_error = float((exp * (each + 2 * unit)).sum() / total + sum_depth(len(exp)) * unit)
    log = shifted - log_sum
    error = each + sum_error + 2 * unit * abs(log_sum) + unit * np.where(present, abs(log), 0.0)
    errors = np.where(present, errors, 0.0)
    return _Logs(
        log, error, exponents, errors, shift, log_sum, sum_error, shift + log_sum + top / t
    )


def _log_ratio_errors(
    p: _Logs, q: _Logs, counted: np.ndarray, same: bool, unit: float
) -> np.ndarray:
    """Bounds on the errors of l = d - log(sum e^s / sum e^u), d = s - u, of two rows of exponents.

    In float64 l is the difference of two logarithms. In float32 d is a difference in float64,
    rounded once. If both sides have the same temperature, they have the same rounding of 1 / T.

    A term e^u (e^d - 1) is off by its factors' errors or, where |d| > 1/2, by those of e^s and e^u.
    If the sum of their absolute values is below a quarter of sum e^u, their sum gives the
    logarithm; if not, the logarithm is the difference of two. The exponents' maximum may be that of
    the entries, or of entries and tail; both are followed.
    """
    if unit <= WIDE_UNIT:
        return p.error + q.error
    live, listed = p.log > NEVER, q.log > NEVER
    s, u = np.where(live, p.exponents, 0.0), np.where(listed, q.exponents, 0.0)
    d = s - u
    d_error = p.inputs + q.inputs + 4 * WIDE_UNIT * (abs(s) + abs(u)) + 2 * unit * abs(d)
    if not same:
        d_error = d_error + unit * (abs(s) + abs(u))
    d_error = np.where(live & listed, d_error, 0.0)
    p_share, q_share = (np.where(counted, np.exp(side.log), 0.0) for side in (p, q))
    moved = float((p_share * d_error).sum())

    depth = sum_depth(len(d))
    error = 0.0
    for s_shift, u_shift in {(0.0, 0.0), (p.shift, q.shift)}:
        student_log, teacher_log = p.shift + p.log_sum - s_shift, q.shift + q.log_sum - u_shift
        logs = 3 * unit * (abs(student_log) + abs(teacher_log))
        apart = p.sum_error + q.sum_error + logs
        # Everything in units of sum e^u.
        ratio = np.exp(student_log - teacher_log)
        e_s, here = p_share * ratio, d - s_shift + u_shift
        change = np.where(live & listed, q_share * np.expm1(here), e_s - q_share)
        q_error = 3 * unit * abs(u - u_shift) + 2 * unit
        own = abs(change) * (q_error + 5 * unit)
        direct = e_s * (3 * unit * abs(s - s_shift) + 2 * unit + p.inputs)
        direct = direct + q_share * (q_error + q.inputs)
        near = live & listed & (abs(here) <= 0.499)
        terms = float(np.where(near, own, own + direct).sum())
        size, total = float(abs(change).sum()), float(change.sum())
        summed = terms + depth * unit * size + abs(total) * (q.sum_error + 2 * unit)
        close = summed / max(1 + total, 0.25) + 3 * unit * abs(np.log1p(max(total, -0.75)))
        doubt = size / 1000 + terms + ratio * moved
        error = max(
            error,
            close if size - doubt < 0.25 else 0.0,
            apart if not size + doubt < 0.25 else 0.0,
        )
    return d_error + error + moved


class _Parts(NamedTuple):
    """Of each entry, with bounds: value, slope, and the slope by p where the entry is the tail.

    The latter is per_p + share / p. Of the slope, p factor has the error of p, which is the same
    wherever p is; ``rest_error`` is that of all else.
    """

    value: np.ndarray
    value_error: np.ndarray
    slope: np.ndarray
    slope_error: np.ndarray
    per_p: np.ndarray
    per_p_error: np.ndarray
    share: np.ndarray
    share_error: np.ndarray
    factor: np.ndarray
    factor_error: np.ndarray
    rest_error: np.ndarray


def _numbers(student: Side, teacher: Side, member: Member, unit: float, tiny: float) -> Numbers:
    """The numbers of a row, and bounds for arithmetic of that unit."""
    t, outside = student.temperature, member.outside
    p_logs, q_logs = _logs(student, unit), _logs(teacher, unit)
    count, has_token = len(student.values), student.token is not None
    size = len(p_logs.log)
    is_tail = np.zeros(size, dtype=bool)
    is_tail[count + has_token :] = True
    is_token = np.zeros(size, dtype=bool)
    is_token[count : count + has_token] = True
    same = t == teacher.temperature
    ratio_error = _log_ratio_errors(p_logs, q_logs, ~is_token, same, unit)
    p_error = np.expm1(np.minimum(p_logs.error + 2 * unit, 700))
    p = np.exp(p_logs.log)

    parts = _parts(p_logs, q_logs, ratio_error, member, unit, tiny)
    # An entry is absent where the teacher gives it probability 0.
    used = (q_logs.log > NEVER) & ~is_token & (~is_tail | (outside == "bucket"))
    columns = [np.where(used, column, 0.0) for column in parts]
    value, value_error, slope, slope_error, per_p, per_p_error, share, share_error = columns[:8]
    factor, factor_error, rest_error = columns[8:]
    if outside == "generalize":
        w = member.weights[0] - member.weights[1]
        sides = _Floored.of(p_logs, q_logs, ratio_error, member.floor, unit, tiny)
        both = sides.p_error + sides.q_error + 2 * unit * (sides.p + sides.q)
        value = value + np.where(used, w * (sides.q - sides.p), 0.0)
        value_error = value_error + np.where(used, abs(w) * both, 0.0)
        slope = slope - np.where(used & sides.live, w * sides.p, 0.0)
        factor = factor - np.where(used, w, 0.0)
        off = sides.p_error + 2 * unit * sides.p + np.where(sides.switched, sides.p, 0.0)
        slope_error = slope_error + np.where(used, abs(w) * off, 0.0)
    if outside == "sample":
        sides = _Floored.of(p_logs, q_logs, ratio_error, member.floor, unit, tiny)
        ratio = _clipped(sides.ratio, sides.ratio_error, member.clip)
        w, token = member.weights[0], is_token & (q_logs.log > NEVER)
        value, value_error, slope, slope_error = _sampled(sides, ratio, token, used, w, unit)
        factor = np.where(used, w * ratio.value, 0.0)
        factor_error = np.where(used, abs(w) * ratio.error + 2 * unit * abs(factor), 0.0)
        rest_error = np.where(is_token, slope_error, 0.0)

    depth = sum_depth(size)
    loss, c = float(value.sum()), float(slope.sum())
    loss_budget = float(value_error.sum() + (depth + 2) * unit * abs(value[value < np.inf]).sum())
    if (np.isinf(value) & (np.exp(q_logs.log) < _VANISHING)).any():
        loss_budget = np.inf  # 0 where q is 0 in float32, inf where it is not
    # A slope may be split into what it is where p = q, p times a sum of weights, and a rest.
    split = 8 * unit * sum(abs(weight) for weight in member.weights)
    rounding = (depth + 2) * unit * abs(slope).sum() + split
    c_error = float(slope_error.sum() + rounding)
    p_off = np.minimum(p * p_error, 1.0)
    budget = slope_error + abs(c) * p_off
    if member.floor == NEVER:
        # p has one error, and the probabilities of all entries and the tail add up to 1. So an
        # error of p matters where the factor differs from c.
        off = _times(p_off, abs(factor - c)) + _times(p, factor_error) + rest_error
        normalised = float(off[~is_token].sum() + rest_error[is_token].sum())
        c_error = min(c_error, normalised + abs(c) * (depth + 4) * unit + float(rounding))
        budget = np.where(is_token, budget, np.minimum(budget, off))
    grad = (slope - c * p) / t
    budget = budget + p * (c_error + split) + 4 * unit * (abs(slope) + abs(c * p))
    budget = budget + tiny * (1 + abs(c))
    at = ~is_tail
    dead = (p_logs.log == NEVER) & (slope == 0) & (slope_error <= 0)
    found = Numbers(loss, loss_budget, grad[at], np.where(dead, 0.0, budget / t)[at])
    if outside == "renormalize":
        return found

    tail_p, tail_share = float(per_p[is_tail].sum()), float(share[is_tail].sum())
    # A tail of a smaller p has a background that is relative to the tail.
    by_p = min(abs(tail_share) / max(float(p[is_tail].sum()), 1e-300), _FAR_TAIL)
    scale_size = abs(tail_p) + abs(c)
    return found._replace(
        scale=(tail_p - c) / t,
        scale_budget=(float(per_p_error[is_tail].sum()) + c_error + 4 * unit * scale_size) / t,
        share=tail_share / t,
        share_budget=(float(share_error[is_tail].sum()) + 4 * unit * abs(tail_share)) / t,
        logsumexp=p_logs.logsumexp,
        logsumexp_error=p_logs.sum_error + 2 * unit * abs(p_logs.log_sum),
        largest_factor=(scale_size + by_p) / t,
    )


class _Clipped(NamedTuple):
    """A log ratio's clamp, 1 where it is inside of the clip, and bounds on both errors."""

    value: np.ndarray
    error: np.ndarray
    inside: np.ndarray
    jump: np.ndarray  # 1 where the other side of the edge is as near as the error


def _clipped(x: np.ndarray, error: np.ndarray, clip: float) -> _Clipped:
    inside = (abs(x) <= clip).astype(float)
    if clip == np.inf:
        return _Clipped(x, error, inside, np.zeros(len(x)))
    near = (abs(abs(x) - clip) <= error + 1e-6 * clip).astype(float)
    return _Clipped(np.clip(x, -clip, clip), np.where(inside + near > 0, error, 0.0), inside, near)


def _times(factor: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The product, 0 where the factor is."""
    return np.where(factor == 0, 0.0, factor * value)


def _floored(logs: _Logs, floor: float, unit: float) -> tuple[np.ndarray, np.ndarray]:
    """max(log, floor), and a bound on its error."""
    log, error = logs.log, logs.error
    if floor > NEVER:
        log, error = np.maximum(log, floor), np.where(log >= floor, error, unit * abs(floor))
    return log, error


def _parts(
    p_logs: _Logs,
    q_logs: _Logs,
    ratio_error: np.ndarray,
    member: Member,
    unit: float,
    tiny: float,
) -> _Parts:
    """The weighted parts of all that has a log-prob."""
    sides = _Floored.of(p_logs, q_logs, ratio_error, member.floor, unit, tiny)
    nothing = np.zeros(len(p_logs.log))
    total = _Parts(*(nothing for _ in _Parts._fields))
    makers = (_reverse, _forward, _skew_reverse, _skew_forward)
    for weight, maker in zip(member.weights, makers, strict=True):
        if weight == 0:
            continue
        part = maker(sides, member, unit)
        scaled = _Parts(*(weight * column for column in part))
        errors = {"rest_error": abs(scaled.rest_error) + 2 * unit * abs(scaled.slope)}
        for name in ("value", "slope", "per_p", "share", "factor"):
            column = getattr(scaled, name)
            rounding = 2 * unit * np.where(np.isfinite(column), abs(column), 0.0)
            errors[f"{name}_error"] = abs(getattr(scaled, f"{name}_error")) + rounding
        scaled = scaled._replace(**errors)
        total = _Parts(*(x + y for x, y in zip(total, scaled, strict=True)))
    # Below the floor slopes are 0, and on either side of it where it is near.
    changed = {}
    for name in ("slope", "per_p", "share"):
        whole, error = getattr(total, name), getattr(total, f"{name}_error")
        changed[name] = np.where(sides.live, whole, 0.0)
        error = np.where(sides.live | sides.switched, error, 0.0)
        changed[f"{name}_error"] = error + np.where(sides.switched, abs(whole), 0.0)
    gone = p_logs.log == NEVER
    for name in ("per_p", "per_p_error", "share", "share_error"):
        changed[name] = np.where(gone, 0.0, changed[name])
    return total._replace(**changed)


class _Floored(NamedTuple):
    """Floored probabilities, the log ratio l, and bounds on their errors."""

    p: np.ndarray
    p_error: np.ndarray
    q: np.ndarray
    q_error: np.ndarray
    ratio: np.ndarray
    ratio_error: np.ndarray
    live: np.ndarray  # whether the student's is not below the floor
    switched: np.ndarray  # whether it may be on the other side

    @classmethod
    def of(
        cls,
        p_logs: _Logs,
        q_logs: _Logs,
        ratio_error: np.ndarray,
        floor: float,
        unit: float,
        tiny: float,
    ) -> _Floored:
        (a, a_error), (b, b_error) = (_floored(logs, floor, unit) for logs in (p_logs, q_logs))
        if floor > NEVER:
            ratio_error = np.maximum(ratio_error, a_error + b_error)
        ratio = np.where(b == NEVER, 0.0, a - b)
        bounded = np.isfinite(ratio)
        return cls(
            np.exp(a),
            _exp_error(a, a_error, unit, tiny),
            np.exp(b),
            _exp_error(b, b_error, unit, tiny),
            ratio,
            np.where(bounded, ratio_error + unit * abs(np.where(bounded, ratio, 0.0)), 0.0),
            p_logs.log >= floor,
            (abs(p_logs.log - floor) <= p_logs.error) & (floor > NEVER),
        )


def _exp_error(log: np.ndarray, error: np.ndarray, unit: float, tiny: float) -> np.ndarray:
    """A bound on the error of a probability: it is exactly 0 if its logarithm is -inf."""
    relative = np.expm1(np.minimum(error + 2 * unit, 700))
    return np.where(log == NEVER, 0.0, np.minimum(np.exp(log) * relative + tiny, 1.0))


def _of_p(sides: _Floored, ratio: _Clipped, factor: np.ndarray, error: np.ndarray) -> _Parts:
    """Value p ratio, slope p factor."""
    p, p_error = sides.p, sides.p_error
    nothing = np.zeros(len(p))
    return _Parts(
        _times(p, ratio.value),
        _times(p_error, abs(ratio.value)) + _times(p, ratio.error),
        _times(p, factor),
        _times(p_error, abs(factor)) + _times(p, error),
        factor,
        error,
        nothing,
        nothing,
        factor,
        error,
        nothing,
    )


def _reverse(sides: _Floored, member: Member, unit: float) -> _Parts:
    ratio = _clipped(sides.ratio, sides.ratio_error, member.clip)
    if member.stop_ratio:
        return _of_p(sides, ratio, ratio.value, ratio.error)
    factor = ratio.value + ratio.inside
    return _of_p(sides, ratio, factor, ratio.error + ratio.jump + 2 * unit)


def _forward(sides: _Floored, member: Member, unit: float) -> _Parts:
    ratio = _clipped(-sides.ratio, sides.ratio_error, member.clip)
    q, nothing = sides.q, np.zeros(len(sides.q))
    value = _times(q, ratio.value)
    error = _times(sides.q_error, abs(ratio.value)) + _times(q, ratio.error)
    slope, slope_error = -q * ratio.inside, sides.q_error + q * ratio.jump
    # By p, q / p is off by what the log ratio is.
    share_error = np.minimum(q * (np.expm1(np.minimum(sides.ratio_error, 700)) + ratio.jump), 1.0)
    share_error = share_error + sides.q_error
    return _Parts(
        value,
        np.where(np.isinf(value), 0.0, error),
        slope,
        slope_error,
        nothing,
        nothing,
        slope,
        share_error,
        nothing,
        nothing,
        slope_error,
    )


class _Mixture(NamedTuple):
    """a - m and b - m, and the shares of both sides in the mixture m, with bounds."""

    student: np.ndarray
    student_error: np.ndarray
    teacher: np.ndarray
    teacher_error: np.ndarray
    student_share: np.ndarray  # (1 - beta) e^(a - m)
    teacher_share: np.ndarray
    share_error: np.ndarray  # of both: they add up to 1

    @classmethod
    def of(cls, ratio: np.ndarray, error: np.ndarray, beta: float, unit: float) -> _Mixture:
        # 1 - beta has the rounding of beta, relative to what is left.
        rounding = unit * (4 + beta / (1 - beta))
        near = abs(ratio) < 30
        small = np.where(near, ratio, 0.0)
        student = np.where(
            near,
            -np.log1p(beta * np.expm1(-small)),
            -np.logaddexp(np.log1p(-beta), np.log(beta) - ratio),
        )
        teacher = np.where(
            near,
            -np.log1p((1 - beta) * np.expm1(small)),
            -np.logaddexp(np.log(beta), np.log1p(-beta) + ratio),
        )
        student_share, teacher_share = (1 - beta) * np.exp(student), beta * np.exp(teacher)

        # log(1 + x), x with a relative error: x / (1 + x) is 1 - e^(a - m), or 1 - e^(b - m).
        def evaluated(log: np.ndarray) -> np.ndarray:
            return rounding * abs(1 - np.exp(log)) + 2 * unit * np.where(log > NEVER, abs(log), 0.0)

        student_error = np.minimum(teacher_share, 1) * error + evaluated(student)
        teacher_error = np.minimum(student_share, 1) * error + evaluated(teacher)
        share_error = student_share * teacher_share * error + rounding
        return cls(
            student,
            student_error,
            teacher,
            teacher_error,
            student_share,
            teacher_share,
            share_error,
        )


def _skew_reverse(sides: _Floored, member: Member, unit: float) -> _Parts:
    mixture = _Mixture.of(sides.ratio, sides.ratio_error, member.beta, unit)
    ratio = _clipped(mixture.student, mixture.student_error, member.clip)
    factor = ratio.value + ratio.inside * mixture.teacher_share
    error = ratio.error + mixture.share_error + ratio.jump * mixture.teacher_share
    return _of_p(sides, ratio, factor, error + 2 * unit * abs(ratio.value))


def _skew_forward(sides: _Floored, member: Member, unit: float) -> _Parts:
    mixture = _Mixture.of(sides.ratio, sides.ratio_error, member.beta, unit)
    ratio = _clipped(mixture.teacher, mixture.teacher_error, member.clip)
    q, nothing, share = sides.q, np.zeros(len(sides.q)), mixture.student_share
    off = mixture.share_error + ratio.jump * share
    # q (1 - beta) p / e^m by p is (1 - beta) e^(b - m).
    per_p = (1 - member.beta) * np.exp(mixture.teacher)
    per_p_error = per_p * (mixture.teacher_error + 8 * unit + ratio.jump)
    per_p_error = per_p_error + unit * member.beta * np.exp(mixture.teacher)
    slope_error = sides.q_error * share + q * off
    return _Parts(
        _times(q, ratio.value),
        _times(sides.q_error, abs(ratio.value)) + _times(q, ratio.error),
        -q * ratio.inside * share,
        slope_error,
        -ratio.inside * per_p,
        per_p_error,
        nothing,
        nothing,
        nothing,
        nothing,
        slope_error,
    )


def _sampled(
    sides: _Floored,
    ratio: _Clipped,
    token: np.ndarray,
    used: np.ndarray,
    weight: float,
    unit: float,
) -> tuple[np.ndarray, ...]:
    """Value and slope of each entry with bounds: p l on the support and l at the token."""
    part = _of_p(sides, ratio, ratio.value, ratio.error)
    value = weight * np.where(token, ratio.value, np.where(used, part.value, 0.0))
    error = np.where(token, ratio.error, np.where(used, part.value_error, 0.0))
    error = abs(weight) * error + 2 * unit * abs(value)
    slope = np.where(sides.live, value, 0.0)
    slope_error = np.where(sides.live | sides.switched, error, 0.0)
    return value, error, slope, slope_error + np.where(sides.switched, abs(value), 0.0)
