"""The expected results of a case in float64, and how far a correct result may be from them.

It works row by row and shares no code with the package. Budgets are first-order forward error
bounds of float32 (float64) arithmetic on the given, already rounded inputs, plus one rounding to
the gradient's dtype; see ``_row_oracle`` for ``topk_rkl`` and ``members`` for ``topk_divergence``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opd_kernels.support import TopK
from opd_kernels.testing.arithmetic import WIDE_UNIT, Arithmetic, sum_depth
from opd_kernels.testing.heads import Gradient, logits_of, rounded, through_head
from opd_kernels.testing.inputs import Inputs
from opd_kernels.testing.rows import RowResult, best, family_row


@dataclass
class Expected:
    """The expected results in float64, and how far a correct result may be from them."""

    loss: np.ndarray  # scalar or per row, as the reduction says
    loss_budget: np.ndarray
    # (gradient, budget) by name: "student", or "hidden", "weight" and "bias"; and "row_weight".
    grads: dict[str, tuple[np.ndarray, np.ndarray]]
    support: np.ndarray  # ids in selection order, -1 where there are fewer


def oracle(inputs: Inputs) -> Expected:
    """The specification row by row in float64, with budgets; reads the unmasked rows only."""
    options = inputs.options
    student = inputs.student.detach().cpu()
    rows, vocab = student.shape[:-1], student.shape[-1]
    count = math.prod(rows)
    arithmetic = torch.finfo(torch.float64 if inputs.wide else torch.float32)
    numeric = Arithmetic(arithmetic.eps / 2, float(arithmetic.tiny), float(arithmetic.max))
    unit, tiny, _ = numeric
    # A head is computed in float32, whatever the teacher's dtype is.
    head_wide = inputs.head is not None and inputs.head.hidden.dtype == torch.float64
    head_arithmetic = torch.finfo(torch.float64 if head_wide else torch.float32)
    head_numeric = Arithmetic(
        head_arithmetic.eps / 2, float(head_arithmetic.tiny), float(head_arithmetic.max)
    )
    # Full softmaxes are those of whole logits.
    full = inputs.family.get("outside", "renormalize") != "renormalize"
    logits = logits_of(inputs, head_numeric.unit, whole=full)

    mask = flat(options["mask"], count, True).astype(bool)
    weight = np.where(mask, flat(options["weight"], count, 1.0), 0.0)
    student_t = flat(options["temperature"], count, 1.0)
    teacher_t = flat(options.get("teacher_temperature", options["temperature"]), count, 1.0)
    upstream = np.where(mask, flat(inputs.upstream, count, 1.0), 0.0)
    allowed = allowed_ids(inputs)
    factor = _row_factors(inputs, mask)

    support = np.full((count, inputs.k), -1, dtype=np.int64)
    loss, loss_budget = np.zeros(count), np.zeros(count)
    grad, grad_budget = np.zeros((count, vocab)), np.zeros((count, vocab))
    # For each id: how many entries it has, and the sum of their gradients' absolute values.
    repeats, size = np.zeros((count, vocab)), np.zeros((count, vocab))
    for row in range(count):
        if not mask[row]:
            continue
        index = np.unravel_index(row, rows)
        temperatures = student_t[row], teacher_t[row]
        errors = logits.error[row]
        row_result = family_row if inputs.family else _reverse_kl_row
        numbers = row_result(inputs, index, allowed, errors, temperatures, numeric)
        ids, support[row] = numbers.ids, numbers.selected
        loss[row], loss_budget[row] = numbers.loss, numbers.loss_budget
        scale = weight[row] * upstream[row] * factor
        with np.errstate(all="ignore"):
            if numbers.background is not None:
                grad[row] = np.where(numbers.background == 0, 0.0, scale * numbers.background)
                budget = abs(scale) * numbers.background_budget + 8 * unit * abs(grad[row]) + tiny
                budget = np.where((numbers.background_budget == 0) | (scale == 0), 0.0, budget)
                grad_budget[row] = np.nan_to_num(budget, nan=np.inf, posinf=np.inf)
                size[row], repeats[row] = abs(grad[row]), numbers.background != 0
            np.add.at(grad[row], ids, scale * numbers.grad)
            np.add.at(size[row], ids, abs(scale * numbers.grad))
            np.add.at(repeats[row], ids, 1)
            budget = abs(scale) * (numbers.grad_budget + 8 * unit * abs(numbers.grad))
            np.add.at(grad_budget[row], ids, np.nan_to_num(budget + tiny, posinf=np.inf))
    with np.errstate(all="ignore"):
        if inputs.head is None:
            grad_budget = rounded(grad, grad_budget, student.dtype)
            grads = {"student": (grad.reshape(student.shape), grad_budget.reshape(student.shape))}
        else:
            whole = full and inputs.family["background"] == "exact"
            found = Gradient(grad, grad_budget, size, repeats)
            number = ~np.isnan(loss)
            grads = through_head(inputs, found, logits, number, mask, head_numeric, whole=whole)
        weight_grad = loss * upstream * factor
        size_of_loss = np.where(np.isinf(loss), 0.0, abs(loss))
        weight_budget = (loss_budget + 8 * unit * size_of_loss) * abs(upstream * factor) + tiny
        weight_budget = rounded(weight_grad, weight_budget, torch.float32)
        weight_budget = np.where(np.isinf(loss_budget), np.inf, weight_budget)
        weighted, weighted_budget = (
            loss * weight,
            loss_budget * abs(weight) + 4 * unit * size_of_loss * abs(weight),
        )
    total, total_budget = weighted, weighted_budget
    if options["reduction"] != "none":
        depth = math.ceil(math.log2(max(count, 2))) + 4
        with np.errstate(all="ignore"):
            summed = weighted_budget.sum() + depth * unit * abs(weighted).sum()
            total, total_budget = np.array(weighted.sum() * factor), np.array(summed * abs(factor))
    else:
        total, total_budget = total.reshape(rows), total_budget.reshape(rows)
    grads["row_weight"] = weight_grad.reshape(rows), weight_budget.reshape(rows)
    return Expected(total, total_budget + tiny, grads, support.reshape(*rows, inputs.k))


def _reverse_kl_row(
    inputs: Inputs,
    index: tuple[Any, ...],
    allowed: np.ndarray,
    z_error: np.ndarray,
    temperatures: tuple[float, float],
    numeric: Arithmetic,
) -> RowResult:
    """The renormalised reverse KL's results of an unmasked row, whose budgets are the tightest."""
    teacher = inputs.teacher
    if isinstance(teacher, TopK):
        ids = teacher.ids.cpu()[index].long().numpy()
        values = teacher.logits.detach().cpu()[index].double().numpy()
        inside = (ids >= 0) & (ids < len(allowed))
        selected = np.where(inside & allowed[np.where(inside, ids, 0)], ids, -1)
    else:
        row = teacher.detach().cpu()[index].double().numpy()
        selected = best(row, allowed, inputs.k)
        values = np.where(selected < 0, -np.inf, row[selected])
    used = (selected >= 0) & (values != -np.inf)
    ids, t = selected[used], values[used]
    z, z_error = inputs.student.detach().cpu()[index].double().numpy()[ids], z_error[ids]
    found = _row_oracle(z, z_error, t, *temperatures, numeric)
    return RowResult(selected, found.loss, found.loss_budget, ids, found.grad, found.grad_budget)


@dataclass
class _RowNumbers:
    loss: float
    loss_budget: float
    grad: np.ndarray
    grad_budget: np.ndarray


def _row_oracle(
    z: np.ndarray,
    z_error: np.ndarray,
    t: np.ndarray,
    student_t: float,
    teacher_t: float,
    numeric: Arithmetic,
) -> _RowNumbers:
    """One row on its present entries: loss, gradient, and first-order bounds on their errors.

    u is the unit roundoff and ``z_error`` the error of z. A scaled logit s = (z - max) / T adds
    3 u |s| (difference, division, T's own rounding). exp and log add 2 u each. A sum over K
    entries, pairwise or better, adds (log2 K + 1) u. ``_log_ratio_errors`` bounds the error of
    log p - log q. From there the bounds follow the formulas term by term.
    """
    nothing = np.zeros(len(z))
    if len(z) == 0:
        return _RowNumbers(0.0, 0.0, nothing, nothing)
    if np.isnan(z).any() or np.isnan(t).any() or (z == np.inf).any() or (t == np.inf).any():
        return _RowNumbers(np.nan, np.inf, nothing + np.nan, nothing + np.inf)
    if (z == -np.inf).all():
        return _RowNumbers(0.0, 0.0, nothing, nothing)
    with np.errstate(all="ignore"):
        return _finite_row_oracle(z, z_error, t, student_t, teacher_t, numeric)


def _finite_row_oracle(
    z: np.ndarray,
    z_error: np.ndarray,
    t: np.ndarray,
    student_t: float,
    teacher_t: float,
    numeric: Arithmetic,
) -> _RowNumbers:
    unit, tiny, largest = numeric
    nothing = np.zeros(len(z))
    p_side = _softmax(z, z_error, student_t, unit)
    q_side = _softmax(t, nothing, teacher_t, unit)
    p = np.exp(p_side.log)
    live = z != -np.inf
    ratio = nothing.copy()
    ratio[live] = p_side.log[live] - q_side.log[live]
    loss = float((p * ratio)[live].sum())
    grad = np.where(live, p * (ratio - loss) / student_t, 0.0)
    numbers = _RowNumbers(loss, 0.0, grad, nothing)

    sides = _softmax(z, nothing, student_t, WIDE_UNIT), _softmax(t, nothing, teacher_t, WIDE_UNIT)
    # The result's budget, and what float64 loses here: more, where the loss is next to nothing.
    budgets = [
        _row_budgets(numbers, ratio, (p_side, q_side), (student_t, teacher_t), unit, tiny),
        _row_budgets(numbers, ratio, sides, (student_t, teacher_t), WIDE_UNIT, 0.0),
    ]
    loss_budget = sum(loss_error for loss_error, _ in budgets)
    grad_budget = np.where(live, sum(grad_error for _, grad_error in budgets), 0.0)
    # A span that overflows float64 makes NaN, which max() would pass over.
    if not np.max([p_side.span, q_side.span, abs(grad).max(), abs(loss)]) < largest / 8:
        # The span overflows, in float64 perhaps here too: inf is allowed, NaN is not, and entries
        # of no weight stay 0.
        loss, loss_budget = float(np.nan_to_num(loss)), np.inf
        grad, grad_budget = np.nan_to_num(grad), np.where(live, np.inf, 0.0)
    return _RowNumbers(loss, loss_budget, grad, grad_budget)


def _row_budgets(
    numbers: _RowNumbers,
    ratio: np.ndarray,
    sides: tuple[_Softmax, _Softmax],
    temperatures: tuple[float, float],
    unit: float,
    tiny: float,
) -> tuple[float, np.ndarray]:
    """Bounds on the errors of a row's loss and gradient in arithmetic of that unit."""
    (p_side, q_side), (student_t, teacher_t) = sides, temperatures
    p, loss = np.exp(p_side.log), numbers.loss
    depth = sum_depth(len(p))
    live = p_side.live
    p_error = np.where(live, np.minimum(p_side.log_error + 2 * unit, 1.0), 0.0)  # relative
    errors = _log_ratio_errors(p_side, q_side, student_t == teacher_t, unit)
    ratio_error = errors.entries + unit * abs(ratio)
    loss_budget = float(
        (p * ((p_error + 2 * unit) * (abs(ratio) + errors.entries))).sum()
        + errors.mean
        + depth * unit * (p * abs(ratio)).sum()
        + unit * abs(loss)
        + tiny * abs(ratio).sum()
    )
    grad_budget = (
        p * ((p_error + 4 * unit) * abs(ratio - loss) + ratio_error + loss_budget)
        + tiny * (1 + abs(ratio - loss))
    ) / student_t
    return loss_budget, grad_budget


@dataclass
class _Softmax:
    """A side of a row: s = (x - max) / T, log softmax, and bounds on the errors of both."""

    live: np.ndarray  # where x is not -inf
    scaled: np.ndarray
    scaled_error: np.ndarray
    input_error: np.ndarray  # the part of it that comes from x
    log: np.ndarray
    log_error: np.ndarray
    log_sum: float
    sum_error: float  # relative

    @property
    def span(self) -> float:
        """The largest |s| of finite x, which may be inf."""
        return float(abs(self.scaled[self.live]).max())


def _softmax(x: np.ndarray, x_error: np.ndarray, temperature: float, unit: float) -> _Softmax:
    finite = x != -np.inf
    s = (x - x.max()) / temperature
    exp = np.exp(s)
    log_sum = math.log(exp.sum())
    input_error = np.where(finite, (x_error + x_error[x.argmax()]) / temperature, 0.0)
    s_error = np.where(finite, 3 * unit * abs(s) + x_error / temperature, 0.0)
    sum_error = float((exp * (s_error + 2 * unit)).sum() / exp.sum())
    sum_error += sum_depth(len(x)) * unit
    log_x = s - log_sum
    error = s_error + sum_error + 2 * unit * abs(log_sum) + unit * np.where(finite, abs(log_x), 0.0)
    return _Softmax(finite, s, s_error, input_error, log_x, error, log_sum, sum_error)


class _RatioErrors(NamedTuple):
    """Bounds on the error of log p - log q: of each entry, and of their mean under p.

    The mean is the error of the loss. It is far smaller where errors of d cancel in it.
    """

    entries: np.ndarray
    mean: float


def _log_ratio_errors(
    p_side: _Softmax, q_side: _Softmax, same_temperature: bool, unit: float
) -> _RatioErrors:
    """log p - log q = d - log(sum e^s / sum e^u), with s and u the scaled logits and d = s - u.

    In float64 it is the difference of two logarithms. In float32 d is a difference in float64,
    rounded once. If the temperatures are equal, both sides have the same rounding of 1 / T. A term
    c = e^u (e^d - 1) is off by its factors' errors or, where |d| > 1/2, by those of e^s and e^u. If
    the sum of |c| is below a quarter of sum e^u, the sum of c gives the logarithm; if not, the
    logarithm is the difference of two.

    In the first case an error of d moves the logarithm by p times itself. So it leaves the mean, up
    to second order.
    """
    p, q = np.exp(p_side.log), np.exp(q_side.log)
    depth, live = sum_depth(len(p)), p_side.live
    s, u = (np.where(live, side.scaled, 0.0) for side in (p_side, q_side))
    if unit <= WIDE_UNIT:
        both = np.where(live, p_side.log_error + q_side.log_error, 0.0)
        return _RatioErrors(both, float((p * both).sum()))
    d = s - u
    d_error = p_side.input_error + 4 * WIDE_UNIT * (abs(s) + abs(u)) + 2 * unit * abs(d)
    if not same_temperature:
        d_error += unit * (abs(s) + abs(u))
    d_error = np.where(live, d_error, 0.0)

    # Everything in units of sum e^u.
    change = np.where(live, q * np.expm1(d), -q)
    q_error = 3 * unit * abs(q_side.scaled) + 2 * unit
    e_s = q * np.exp(d)
    direct = abs(d) > 0.499  # or may be
    own_error = abs(change) * (q_error + 5 * unit)
    direct_error = np.where(live, e_s * (p_side.scaled_error + 2 * unit), 0.0) + q * q_error
    own_error = np.where(live & ~direct, own_error, own_error + direct_error)
    size, total = abs(change).sum(), change.sum()
    own = own_error.sum() + depth * unit * size + abs(total) * (q_side.sum_error + 2 * unit)
    close = (
        own / (1 + total) + 3 * unit * abs(np.log1p(total)),
        float((p * (np.where(direct, d_error, 0.0) + d_error**2)).sum()),
    )
    logs = abs(p_side.log_sum) + abs(q_side.log_sum)
    apart = (p_side.sum_error + q_side.sum_error + 3 * unit * logs, float((p * d_error).sum()))
    doubt = size / 1000 + own + (e_s * d_error).sum()
    possible = [close] * bool(size - doubt < 0.25) + [apart] * (not size + doubt < 0.25)
    entries = d_error + max(log_error for log_error, _ in possible) + float((p * d_error).sum())
    return _RatioErrors(
        np.where(live, entries, 0.0), max(log_error + mean for log_error, mean in possible)
    )


def allowed_ids(inputs: Inputs) -> np.ndarray:
    """Bool, one per id below the limit: whether it may enter the support."""
    limits = [inputs.student.shape[-1]]
    if isinstance(inputs.teacher, Tensor):
        limits.append(inputs.teacher.shape[-1])
    if inputs.options["vocab_size"] is not None:
        limits.append(inputs.options["vocab_size"])
    allowed = np.ones(min(limits), dtype=bool)
    banned = inputs.options["banned_ids"]
    if banned is not None:
        ids = np.asarray(banned.cpu() if isinstance(banned, Tensor) else banned, dtype=np.int64)
        allowed[ids[(ids >= 0) & (ids < len(allowed))]] = False
    return allowed


def _row_factors(inputs: Inputs, mask: np.ndarray) -> float:
    """The factor of a row's loss in the reduction: 1 / what it divides by."""
    if inputs.options["reduction"] != "mean":
        return 1.0
    normalizer = inputs.options.get("normalizer")
    return 1.0 / (max(int(mask.sum()), 1) if normalizer is None else float(normalizer))


def flat(value: Any, count: int, default: float) -> np.ndarray:
    """Float64 (count,) of a scalar, a per-row tensor or None."""
    if value is None:
        return np.full(count, default, dtype=np.float64)
    if isinstance(value, Tensor):
        value = value.detach().double().cpu().numpy()
    return np.broadcast_to(np.asarray(value, dtype=np.float64).reshape(-1), (count,))
