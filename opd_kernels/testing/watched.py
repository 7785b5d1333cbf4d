"""What a call returns beside the loss, against float64: statistics and log-probs of tokens."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from opd_kernels.api import topk_divergence
from opd_kernels.support import TopK
from opd_kernels.testing.arithmetic import WIDE_UNIT, sum_depth
from opd_kernels.testing.inputs import Case, Inputs
from opd_kernels.testing.oracle import Expected, allowed_ids, flat, rounded
from opd_kernels.testing.rows import best

# Terms of a sum that kernels may add one after the other.
_GROUP = 32


class Softmax(NamedTuple):
    """A row's full softmax at a temperature, and by how much its logarithms may be off."""

    log_p: np.ndarray
    error: np.ndarray
    entropy: float
    entropy_error: float

    def mass(self, ids: np.ndarray) -> tuple[float, float]:
        """(what it holds on the ids, a bound on the error)."""
        p = np.exp(self.log_p[ids])
        off = np.where(p > 0, p * np.expm1(np.minimum(self.error[ids], 700)), 0.0)
        return float(p.sum()), float(off.sum())


def softmax(row: np.ndarray, t: float, unit: float) -> Softmax | None:
    """None where the row is no distribution."""
    if not len(row) or np.isnan(row).any() or not np.isfinite(row.max()) or not np.isfinite(t):
        return None
    top = row.max()
    with np.errstate(all="ignore"):
        if not np.isfinite(top / t):  # beyond float64
            return None
    with np.errstate(all="ignore"):
        below = (row - top) / t
        exp = np.exp(below)
        total = exp.sum()
        size = np.where(np.isfinite(row), abs(row), 0.0)
        each = (
            8 * unit + unit * (3 * np.where(np.isfinite(row), top - row, 0) + size + abs(top)) / t
        )
        p = exp / total
        depth = unit * (min(len(row), _GROUP) + sum_depth(len(row)))
        log_p = below - np.log(total)
        error = np.nan_to_num(each + (p * each).sum() + depth, nan=np.inf)
        terms = np.where(p > 0, p * log_p, 0.0)
        off = p * (error + depth) * (1 + np.where(p > 0, abs(log_p), 0.0))
    entropy = -float(terms.sum())
    bound = float(np.nan_to_num(off.sum(), nan=np.inf)) + 4 * unit * entropy
    return Softmax(log_p, error, entropy, bound)


def check_watched(case: Case, inputs: Inputs, expected: Expected, backend: str | None) -> None:
    """Raises ``AssertionError`` unless statistics and log-probs are within their budgets."""
    student = inputs.student.detach().requires_grad_()
    rows = student.shape[:-1]
    generator = torch.Generator().manual_seed(case.seed)
    tokens = torch.randint(-1, student.shape[-1] + 1, rows, generator=generator)
    upstream = torch.randn(rows, generator=generator)
    options = {
        name: value
        for name, value in {**inputs.options, **inputs.family}.items()
        if name not in ("weight", "reduction", "normalizer")
    }
    given = options.pop("token_ids", None)
    tokens = tokens.to(student.device) if given is None else given
    k = None if isinstance(inputs.teacher, TopK) else inputs.k
    _, logprobs, stats = topk_divergence(
        student,
        inputs.teacher,
        k,
        token_ids=tokens,
        return_stats=True,
        return_token_logprobs=True,
        backend=backend,
        **options,
    )
    (grad,) = torch.autograd.grad(logprobs, student, upstream.to(student.device))

    found = {
        name: value.detach().double().cpu().flatten() for name, value in stats._asdict().items()
    }
    found["log-prob"] = logprobs.detach().double().cpu().flatten()
    grad = grad.double().cpu().reshape(-1, grad.shape[-1])
    mask = flat(inputs.options["mask"], math.prod(rows), True).astype(bool)
    for number in range(math.prod(rows)):
        index = np.unravel_index(number, rows)
        got = {name: float(values[number]) for name, values in found.items()}
        token, factor = int(tokens.cpu()[index]), float(upstream[index])
        if mask[number]:
            wanted, slopes = _row(inputs, expected, index, number, token, factor)
        else:
            wanted = dict.fromkeys(got, (math.nan, 0.0)) | {"log-prob": (0.0, 0.0)}
            slopes = np.zeros(grad.shape[-1]), np.zeros(grad.shape[-1])
        for name, (value, budget) in wanted.items():
            if name != "mask":
                _check(got[name], value, budget, f"{name} of row {number} of {case}")
        _check_slopes(grad[number].numpy(), *slopes, student.dtype, f"row {number} of {case}")


def _row(
    inputs: Inputs, expected: Expected, index: Any, number: int, token: int, factor: float
) -> tuple[dict[str, tuple[float, float]], tuple[np.ndarray, np.ndarray]]:
    """Of an unmasked row: (value, budget) by name, (gradient, budget) of the log-prob."""
    count = math.prod(inputs.student.shape[:-1])
    unit = torch.finfo(torch.float64 if inputs.student.dtype == torch.float64 else torch.float32)
    narrow, tiny = unit.eps / 2, float(unit.tiny)
    z = inputs.student.detach().cpu()[index].double().numpy()
    limit = inputs.options["vocab_size"]
    width = len(z) if limit is None else min(len(z), limit)
    t = float(flat(inputs.options["temperature"], count, 1.0)[number])
    p = softmax(z[:width], t, narrow)

    allowed = allowed_ids(inputs)
    if isinstance(inputs.teacher, TopK):
        listed = inputs.teacher.ids.cpu()[index].long().numpy()
        values = inputs.teacher.logits.detach().cpu()[index].double().numpy()
        other = z
    else:
        teacher = inputs.teacher.detach().cpu()[index].double().numpy()
        listed = expected.support.reshape(count, -1)[number]
        values = np.where(listed < 0, -np.inf, teacher[listed])
        other = teacher if inputs.family.get("support") == "student" else z
    known = np.array([0 <= i < len(allowed) and bool(allowed[i]) for i in listed.tolist()], bool)
    present = listed[known & (values != -np.inf)]
    support = np.unique(present)
    shared = np.intersect1d(support, best(other, allowed, inputs.k))
    wanted = {
        "valid_k": (float(len(present)), 0.0),
        "overlap": (len(shared) / max(len(support), 1), 2.0**-22),
        **_sums("student", p, support),
    }
    if not isinstance(inputs.teacher, TopK):
        temperatures = inputs.options.get("teacher_temperature", inputs.options["temperature"])
        teacher_t = float(flat(temperatures, count, 1.0)[number])
        row = teacher if limit is None else teacher[:limit]
        wide = inputs.teacher.dtype == torch.float64
        theirs = softmax(row, teacher_t, WIDE_UNIT if wide else 2.0**-24)
        wanted |= _sums("teacher", theirs, support)

    nan, inside = np.full(len(z), np.nan), np.arange(len(z)) < width
    if p is None or not 0 <= token < width:
        wanted["log-prob"] = math.nan, 0.0
        return wanted, (np.where(inside, nan, 0.0), np.zeros(len(z)))
    value, off = float(p.log_p[token]), float(p.error[token])
    wanted["log-prob"] = value, off + 4 * narrow * (abs(value) if value > -np.inf else 0.0)
    if value < -float(unit.max):
        wanted["log-prob"] = value, math.inf
    grad, budget = np.zeros(len(z)), np.zeros(len(z))
    with np.errstate(all="ignore"):
        share = np.exp(p.log_p)
        grad[:width] = -factor * share / t
        grad[token] = -factor * math.expm1(min(value, 0.0)) / t
        budget[:width] = abs(factor) / t * share * np.expm1(np.minimum(p.error, 700))
        budget[:width] += 8 * narrow * abs(grad[:width]) + tiny * (1 + abs(factor) / t)
    return wanted, (grad, np.nan_to_num(budget, nan=np.inf))


def _sums(side: str, p: Softmax | None, support: np.ndarray) -> dict[str, tuple[float, float]]:
    if p is None:
        return {f"{side}_mass": (math.nan, 0.0), f"{side}_entropy": (math.nan, 0.0)}
    mass, error = p.mass(support)
    return {
        f"{side}_mass": (mass, error + 2.0**-22 * mass + 1e-37),
        f"{side}_entropy": (p.entropy, p.entropy_error + 1e-37),
    }


def _check_slopes(
    got: np.ndarray, wanted: np.ndarray, budget: np.ndarray, dtype: torch.dtype, label: str
) -> None:
    """The gradient of a row's log-prob."""
    budget = rounded(wanted, budget, dtype)
    off = abs(got - wanted)
    wrong = ~(off <= budget) & ~(np.isnan(wanted) & np.isnan(got))
    assert not wrong.any(), (
        f"gradient of the log-prob in {label}, at {np.flatnonzero(wrong)[0]}: "
        f"off by {off[wrong][0]:.3g}, budget {budget[wrong][0]:.3g}"
    )


def _check(got: float, wanted: float, budget: float, label: str) -> None:
    same = got == wanted or (math.isnan(got) and math.isnan(wanted))
    assert same or abs(got - wanted) <= budget or budget == math.inf, (
        f"{label}: got {got!r}, expected {wanted!r} within {budget:.3g}"
    )
