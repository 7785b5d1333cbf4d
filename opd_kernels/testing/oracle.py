"""What must come out of a case, in float64, and how far from it a correct result may be.

Row by row and independent of the package's own code. Budgets are first-order forward error bounds
of float32 (float64) arithmetic on the given, already rounded inputs, plus one rounding to the
gradient's dtype; see ``_row_oracle``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_kernels.support import TopK
from opd_kernels.testing.inputs import Inputs


@dataclass
class Expected:
    """What must come out, in float64, and how far from it a correct result may be."""

    loss: np.ndarray  # scalar or per row, as reduction says
    loss_budget: np.ndarray
    grad: np.ndarray  # as the student's logits
    grad_budget: np.ndarray
    weight_grad: np.ndarray
    weight_budget: np.ndarray
    support: np.ndarray  # ids in selection order, -1 where there are fewer


def oracle(inputs: Inputs) -> Expected:
    """The specification row by row in float64, with budgets; reads the unmasked rows only."""
    options = inputs.options
    student, teacher = inputs.student.detach().cpu(), inputs.teacher
    rows, vocab = student.shape[:-1], student.shape[-1]
    count = math.prod(rows)
    wide = student.dtype == torch.float64 or _teacher_dtype(teacher) == torch.float64
    unit = 2.0**-53 if wide else 2.0**-24
    tiny = float(torch.finfo(torch.float64 if wide else torch.float32).tiny)
    largest = float(torch.finfo(torch.float64 if wide else torch.float32).max)

    mask = _flat(options["mask"], count, True).astype(bool)
    weight = np.where(mask, _flat(options["weight"], count, 1.0), 0.0)
    student_t = _flat(options["temperature"], count, 1.0)
    teacher_t = _flat(options.get("teacher_temperature", options["temperature"]), count, 1.0)
    upstream = np.where(mask, _flat(inputs.upstream, count, 1.0), 0.0)
    allowed = _allowed_ids(inputs)
    factor = _row_factors(inputs, mask)

    support = np.full((count, inputs.k), -1, dtype=np.int64)
    loss, loss_budget = np.zeros(count), np.zeros(count)
    grad, grad_budget = np.zeros((count, vocab)), np.zeros((count, vocab))
    for row in range(count):
        if not mask[row]:
            continue
        at = np.unravel_index(row, rows)
        ids, values = _row_support(teacher, at, allowed, inputs.k)
        support[row] = ids
        used = (ids >= 0) & (values != -np.inf)
        ids, t = ids[used], values[used]
        z = student[at].double().numpy()[ids]
        numbers = _row_oracle(z, t, student_t[row], teacher_t[row], unit, tiny, largest)
        loss[row], loss_budget[row] = numbers.loss, numbers.loss_budget
        scale = weight[row] * upstream[row] * factor
        with np.errstate(all="ignore"):
            np.add.at(grad[row], ids, scale * numbers.grad)
            budget = abs(scale) * (numbers.grad_budget + 8 * unit * abs(numbers.grad))
            np.add.at(grad_budget[row], ids, np.nan_to_num(budget + tiny, posinf=np.inf))
    with np.errstate(all="ignore"):
        grad_budget += _rounding(grad, student.dtype)
        weight_grad = loss * upstream * factor
        weight_budget = (loss_budget + 8 * unit * abs(loss)) * abs(upstream * factor) + tiny
        weight_budget += _rounding(weight_grad, torch.float32)
        weighted, weighted_budget = (
            loss * weight,
            loss_budget * abs(weight) + 4 * unit * abs(loss * weight),
        )
    total, total_budget = weighted, weighted_budget
    if options["reduction"] != "none":
        depth = math.ceil(math.log2(max(count, 2))) + 4
        with np.errstate(all="ignore"):
            summed = weighted_budget.sum() + depth * unit * abs(weighted).sum()
            total, total_budget = np.array(weighted.sum() * factor), np.array(summed * abs(factor))
    else:
        total, total_budget = total.reshape(rows), total_budget.reshape(rows)
    return Expected(
        total,
        total_budget + tiny,
        grad.reshape(student.shape),
        grad_budget.reshape(student.shape),
        weight_grad.reshape(rows),
        weight_budget.reshape(rows),
        support.reshape(*rows, inputs.k),
    )


@dataclass
class _RowNumbers:
    loss: float
    loss_budget: float
    grad: np.ndarray
    grad_budget: np.ndarray


def _row_oracle(
    z: np.ndarray,
    t: np.ndarray,
    student_t: float,
    teacher_t: float,
    unit: float,
    tiny: float,
    largest: float,
) -> _RowNumbers:
    """One row on its present entries: loss, gradient, and first-order bounds on their errors.

    u is the unit roundoff. A scaled logit s = (z - max) / T carries 3 u |s| (difference, division,
    T's own rounding); exp and log add 2 u each; a sum over K entries, pairwise or better, adds
    (log2 K + 1) u. From there the bounds follow the formulas term by term.
    """
    nothing = np.zeros(len(z))
    if len(z) == 0:
        return _RowNumbers(0.0, 0.0, nothing, nothing)
    if np.isnan(z).any() or np.isnan(t).any() or (z == np.inf).any() or (t == np.inf).any():
        return _RowNumbers(np.nan, np.inf, nothing + np.nan, nothing + np.inf)
    if (z == -np.inf).all():
        return _RowNumbers(0.0, 0.0, nothing, nothing)
    with np.errstate(all="ignore"):
        return _finite_row_oracle(z, t, student_t, teacher_t, unit, tiny, largest)


def _finite_row_oracle(
    z: np.ndarray,
    t: np.ndarray,
    student_t: float,
    teacher_t: float,
    unit: float,
    tiny: float,
    largest: float,
) -> _RowNumbers:
    nothing = np.zeros(len(z))
    depth = math.ceil(math.log2(max(len(z), 2))) + 1
    log_p, log_p_error, p_span = _log_softmax(z, student_t, unit, depth)
    log_q, log_q_error, q_span = _log_softmax(t, teacher_t, unit, depth)
    p = np.exp(log_p)
    live = z != -np.inf
    ratio = nothing.copy()
    ratio[live] = log_p[live] - log_q[live]
    loss = float((p * ratio)[live].sum())
    grad = np.where(live, p * (ratio - loss) / student_t, 0.0)

    log_p_error = np.where(live, log_p_error, 0.0)
    p_error = np.minimum(log_p_error + 2 * unit, 1.0)  # relative
    ratio_error = log_p_error + log_q_error + unit * abs(ratio)
    loss_budget = float(
        (p * ((p_error + unit) * abs(ratio) + ratio_error)).sum()
        + depth * unit * (p * abs(ratio)).sum()
        + unit * abs(loss)
        + tiny * abs(ratio).sum()
    )
    grad_budget = (
        p * ((p_error + 4 * unit) * abs(ratio - loss) + ratio_error + loss_budget)
        + tiny * (1 + abs(ratio - loss))
    ) / student_t
    grad_budget = np.where(live, grad_budget, 0.0)
    if not max(p_span, q_span, abs(grad).max(), abs(loss)) < largest / 8:
        # The span overflows, in float64 perhaps here too: inf is allowed, NaN is not, and entries
        # of no weight stay 0.
        loss, loss_budget = float(np.nan_to_num(loss)), np.inf
        grad, grad_budget = np.nan_to_num(grad), np.where(live, np.inf, 0.0)
    return _RowNumbers(loss, loss_budget, grad, grad_budget)


def _log_softmax(
    x: np.ndarray, temperature: float, unit: float, depth: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """log softmax(x / T), a bound on its error, and the largest finite |s|."""
    finite = x != -np.inf
    s = (x - x.max()) / temperature
    exp = np.exp(s)
    log_sum = math.log(exp.sum())
    s_error = 3 * unit * np.where(finite, abs(s), 0.0)
    sum_error = float((exp * (s_error + 2 * unit)).sum() / exp.sum()) + depth * unit
    log_x = s - log_sum
    error = s_error + sum_error + 2 * unit * abs(log_sum) + unit * np.where(finite, abs(log_x), 0.0)
    return log_x, error, float(abs(s[finite]).max())


def _row_support(
    teacher: Tensor | TopK, at: tuple[Any, ...], allowed: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, values) of a row, -1 and -inf where there are fewer than k."""
    if isinstance(teacher, TopK):
        ids = teacher.ids.cpu()[at].long().numpy()
        values = teacher.logits.detach().cpu()[at].double().numpy()
        inside = (ids >= 0) & (ids < len(allowed))
        keep = inside & allowed[np.where(inside, ids, 0)]
        return np.where(keep, ids, -1), values
    row = teacher.detach().cpu()[at].double().numpy()
    candidates = np.flatnonzero(allowed)
    values = row[candidates]
    is_nan = np.isnan(values)
    order = np.lexsort((candidates, np.where(is_nan, 0.0, -values), ~is_nan))[:k]
    ids, picked = np.full(k, -1), np.full(k, -np.inf)
    ids[: len(order)], picked[: len(order)] = candidates[order], values[order]
    return ids, picked


def _allowed_ids(inputs: Inputs) -> np.ndarray:
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
    """What the reduction divides a row's loss by, as a factor."""
    if inputs.options["reduction"] != "mean":
        return 1.0
    normalizer = inputs.options.get("normalizer")
    return 1.0 / (max(int(mask.sum()), 1) if normalizer is None else float(normalizer))


def _flat(value: Any, count: int, default: float) -> np.ndarray:
    """Float64 (count,) of a scalar, a per-row tensor or None."""
    if value is None:
        return np.full(count, default, dtype=np.float64)
    if isinstance(value, Tensor):
        value = value.detach().double().cpu().numpy()
    return np.broadcast_to(np.asarray(value, dtype=np.float64).reshape(-1), (count,))


def _rounding(grad: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Half a unit in the last place of a gradient's dtype; nothing where the gradient is 0."""
    info = torch.finfo(dtype)
    rounding = abs(grad) * info.eps / 2 + info.smallest_normal * info.eps / 2
    rounding = np.where(abs(grad) > info.max * 0.99, np.inf, rounding)
    return np.where(grad == 0, 0.0, rounding)


def _teacher_dtype(teacher: Tensor | TopK) -> torch.dtype:
    return teacher.logits.dtype if isinstance(teacher, TopK) else teacher.dtype
