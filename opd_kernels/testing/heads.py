"""Hidden states and a head: what its logits, and gradients through it, may be off by."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from opd_kernels.testing.arithmetic import Arithmetic
from opd_kernels.testing.inputs import Head, Inputs


class Logits(NamedTuple):
    """For each logit z: its error bound, the slope dz / d(W h + b), and the slope's error bound.

    All are (N, V).
    """

    error: np.ndarray
    slope: np.ndarray
    slope_error: np.ndarray


class Gradient(NamedTuple):
    """A gradient of logits (N, V) with a bound on its error.

    An id that a row lists ``repeats`` times has that many terms. They may cancel; ``size`` is the
    sum of their absolute values.
    """

    grad: np.ndarray
    budget: np.ndarray
    size: np.ndarray
    repeats: np.ndarray


def logits_of(inputs: Inputs, unit: float, *, whole: bool) -> Logits:
    """Bounds for the student's logits.

    In any order, a sum of H products is off by at most (H + 1) u times the sum of absolute values.
    If ``whole`` logits are computed, the framework rounds them to the head's dtype, and perhaps
    before it adds the bias, too. tanh and its derivative 1 - tanh^2 are taken to be off by 4 u.
    """
    head, shape = inputs.head, (math.prod(inputs.student.shape[:-1]), inputs.student.shape[-1])
    if head is None:
        return Logits(np.zeros(shape), np.ones(shape), np.zeros(shape))
    hidden = head.hidden.detach().double().cpu().reshape(shape[0], head.weight.shape[1])
    weight = head.weight.detach().double().cpu()
    bias = np.zeros(shape[1]) if head.bias is None else head.bias.detach().double().cpu().numpy()
    assert inputs.ranked is not None
    raw = inputs.ranked.detach().double().cpu().reshape(shape).numpy()
    with np.errstate(all="ignore"):
        size = (hidden.abs() @ weight.abs().t()).numpy() + abs(bias)
        error = np.zeros(shape) if head.exact else (hidden.shape[1] + 2) * unit * size
        info = torch.finfo(head.hidden.dtype)
        if whole and not head.exact:
            added = abs(raw - bias) if head.bias is not None else 0.0
            error = error + info.eps / 2 * (abs(raw) + added) + info.smallest_normal * info.eps
        error = np.where(np.isfinite(raw), error, 0.0) * head.scale
    z = abs(inputs.student.detach().double().cpu().reshape(shape).numpy())
    finite = np.where(np.isfinite(z), z, 0.0)
    if head.scale != 1 or not head.exact:
        error = error + 2 * unit * finite
    if head.softcap is None:
        return Logits(error, np.full(shape, head.scale), np.full(shape, 2 * unit * head.scale))
    tanh = z / head.softcap
    tanh_error = np.minimum(error / head.softcap, 1) + 4 * unit
    slope_error = head.scale * (2 * tanh * tanh_error + 8 * unit)
    return Logits(error + 8 * unit * finite, head.scale * (1 - tanh**2), slope_error)


def through_head(
    inputs: Inputs,
    found: Gradient,
    logits: Logits,
    lossless: np.ndarray,
    rows: np.ndarray,
    numeric: Arithmetic,
    *,
    whole: bool,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(gradient, budget) of hidden states, weight and bias from those of the logits.

    ``lossless`` says of which rows (N,) the loss is a number, ``rows`` which are not masked. With
    ``whole`` gradients these are rounded to the head's dtype and multiplied as matrices.
    """
    head = inputs.head
    assert head is not None
    unit, tiny, _ = numeric
    grad, budget, size, repeats = found
    with np.errstate(all="ignore"):
        # Logits that take no part may be NaN.
        used = (grad != 0) | (budget != 0)
        slope, slope_error = (np.where(used, x, 0.0) for x in (logits.slope, logits.slope_error))
        budget = budget * slope + size * (slope_error + unit) + np.where(used, tiny, 0.0)
        grad, size = grad * slope, size * slope
        # If gradients overflow, these are inf - inf or inf * 0.
        lost = np.isnan(grad + size + budget) & lossless[:, None]
        grad, size = np.where(lost, 0.0, grad), np.where(lost, 0.0, size)
        budget = np.where(lost, np.inf, budget)
        if whole:
            budget = np.where(used, rounded(grad, budget, head.hidden.dtype), budget)
    grads = _products(head, Gradient(grad, budget, size, repeats), numeric)
    if whole:
        _add_matrix_products(inputs, grad == 0, grads, rows)
    return grads


def _products(
    head: Head, found: Gradient, numeric: Arithmetic
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Those of the logits before scale and softcap, times weight, hidden states and 1."""
    unit, tiny, largest = numeric
    grad, budget, size, repeats = found
    hidden = head.hidden.detach().double().cpu().numpy().reshape(len(grad), head.weight.shape[1])
    weight = head.weight.detach().double().cpu().numpy()
    rows, ids = np.nonzero((grad != 0) | (budget != 0))
    factor, error, magnitude = (x[rows, ids][:, None] for x in (grad, budget, size))
    error = np.where(abs(factor) > largest / 8, np.inf, error)

    def summed(to: np.ndarray, count: int, terms: np.ndarray, dtype: torch.dtype) -> Any:
        shape = (count, terms.shape[1])
        total, bound = np.zeros(shape), np.zeros(shape)
        terms_of = np.bincount(to, repeats[rows, ids], minlength=count)[:, None] + 3
        with np.errstate(all="ignore"):
            products = np.where(factor == 0, 0.0, factor * terms)  # terms of factor 0 are not read
            np.add.at(total, to, products)
            sizes = np.where(magnitude == 0, 0.0, magnitude * abs(terms))
            np.add.at(bound, to, terms_of[to] * unit * sizes + error * abs(terms))
            np.add.at(bound, to, tiny)
            bound = np.nan_to_num(bound, nan=np.inf, posinf=np.inf)
            poisoned = np.bincount(to, np.isnan(factor[:, 0]), minlength=count)[:, None] > 0
            total = np.where(np.isnan(total) & ~poisoned & np.isinf(bound), 0.0, total)
            return total, rounded(total, bound, dtype)

    dtype = head.weight.dtype
    hidden_grad, hidden_budget = summed(rows, len(grad), weight[ids], head.hidden.dtype)
    bias_grad, bias_budget = summed(ids, len(weight), np.ones((len(ids), 1)), dtype)
    return {
        "hidden": (
            hidden_grad.reshape(head.hidden.shape),
            hidden_budget.reshape(head.hidden.shape),
        ),
        "weight": summed(ids, len(weight), hidden[rows], dtype),
        "bias": (bias_grad[:, 0], bias_budget[:, 0]),
    }


def _add_matrix_products(
    inputs: Inputs,
    zero: np.ndarray,
    grads: dict[str, tuple[np.ndarray, np.ndarray]],
    rows: np.ndarray,
) -> None:
    """In a product of matrices, 0 times what is no finite number is NaN, as in PyTorch's linear."""
    head, limit = inputs.head, inputs.options["vocab_size"]
    assert head is not None
    vocab, size = head.weight.shape
    width = vocab if limit is None else min(vocab, limit)
    hidden = head.hidden.detach().double().cpu().numpy().reshape(-1, size)
    weight = head.weight.detach().double().cpu().numpy()
    zero = zero & rows[:, None] & (np.arange(vocab) < width)
    for name, zeros, factor in (("hidden", zero, weight), ("weight", zero.T, hidden)):
        at = zeros.astype(float) @ ~np.isfinite(factor) > 0
        for values, number in zip(grads[name], (np.nan, np.inf), strict=True):
            values.reshape(-1, size)[at] = number


def rounded(grad: np.ndarray, budget: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The budget after rounding to a gradient's dtype: half a unit in the last place more, nothing
    where the gradient is 0, and inf where the dtype may overflow."""
    info = torch.finfo(dtype)
    rounding = abs(grad) * info.eps / 2 + info.smallest_normal * info.eps / 2
    rounding = np.where(abs(grad) + budget > info.max * 0.99, np.inf, rounding)
    return budget + np.where((grad == 0) & (budget == 0), 0.0, rounding)
