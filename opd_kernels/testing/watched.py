"""What a call returns beside the loss, against float64: statistics and log-probs of tokens."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opd_kernels.api import topk_divergence
from opd_kernels.head import LinearLogits
from opd_kernels.stats import NAMES
from opd_kernels.support import TopK
from opd_kernels.testing.arithmetic import WIDE_UNIT, Arithmetic, sum_depth
from opd_kernels.testing.heads import Gradient, logits_of, rounded, through_head
from opd_kernels.testing.inputs import Case, Inputs
from opd_kernels.testing.oracle import Expected, allowed_ids, flat
from opd_kernels.testing.rows import best

# Terms of a sum that kernels may add one after the other.
_GROUP = 32


class Softmax(NamedTuple):
    """A row's full softmax at a temperature, and by how much its logarithms may be off."""

    log_p: np.ndarray
    error: np.ndarray
    entropy: float
    entropy_error: float
    logsumexp: float

    def mass(self, ids: np.ndarray) -> tuple[float, float]:
        """(what it holds on the ids, a bound on the error)."""
        p = np.exp(self.log_p[ids])
        off = np.where(p > 0, p * np.expm1(np.minimum(self.error[ids], 700)), 0.0)
        return float(p.sum()), float(off.sum())


def softmax(
    row: np.ndarray, t: float, unit: float, errors: np.ndarray | float = 0.0
) -> Softmax | None:
    """None where the row, with ``errors``, is no distribution."""
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
        each = each + errors / t
        p = exp / total
        depth = unit * (min(len(row), _GROUP) + sum_depth(len(row)))
        log_p = below - np.log(total)
        error = np.nan_to_num(each + (p * each).sum() + depth, nan=np.inf)
        terms = np.where(p > 0, p * log_p, 0.0)
        off = p * (error + depth) * (1 + np.where(p > 0, abs(log_p), 0.0))
    entropy = -float(terms.sum())
    bound = float(np.nan_to_num(off.sum(), nan=np.inf)) + 4 * unit * entropy
    return Softmax(log_p, error, entropy, bound, float(top / t + np.log(total)))


class _Watched(NamedTuple):
    """What a call returns beside the loss, and the gradients of its log-probs."""

    tokens: Tensor
    upstream: Tensor  # of the log-probs
    found: dict[str, np.ndarray]
    grads: dict[str, Tensor]


def check_watched(case: Case, inputs: Inputs, expected: Expected, backend: str | None) -> None:
    """Raises ``AssertionError`` unless statistics and log-probs are within their budgets."""
    watched = _watched(case, inputs, backend)
    shape = (math.prod(inputs.student.shape[:-1]), inputs.student.shape[-1])
    unit = _unit(inputs)
    logits = logits_of(inputs, unit, whole=True)
    mask = flat(inputs.options["mask"], shape[0], True).astype(bool)
    grad, budget, number = np.zeros(shape), np.zeros(shape), np.ones(shape[0], dtype=bool)
    for row in range(shape[0]):
        index = np.unravel_index(row, inputs.student.shape[:-1])
        got = {name: float(values[row]) for name, values in watched.found.items()}
        token, factor = int(watched.tokens.cpu()[index]), float(watched.upstream[index])
        if mask[row]:
            wanted, slopes = _row(inputs, expected, index, row, token, factor, logits.error[row])
            grad[row], budget[row] = slopes
            number[row] = not math.isnan(wanted["log-prob"][0])
        else:
            wanted = dict.fromkeys(got, (math.nan, 0.0)) | {"log-prob": (0.0, 0.0)}
        for name, (value, off) in wanted.items():
            if name in got and name != "mask":
                _check(got[name], value, off, f"{name} of row {row} of {case}")
    if inputs.head is None:
        wanted_grads = {"student": (grad, rounded(grad, budget, inputs.student.dtype))}
    else:
        used = (grad != 0) | (budget != 0)
        wide = torch.finfo(torch.float64 if unit == WIDE_UNIT else torch.float32)
        numeric = Arithmetic(unit, float(wide.tiny), float(wide.max))
        found = Gradient(grad, budget, abs(grad), used.astype(float))
        wanted_grads = through_head(inputs, found, logits, number, mask, numeric, whole=True)
    for name, got_grad in watched.grads.items():
        _check_slopes(got_grad, *wanted_grads[name], f"{name} of {case}")


def _unit(inputs: Inputs) -> float:
    """The unit roundoff of the student's softmax."""
    student = inputs.student if inputs.head is None else inputs.head.hidden
    return WIDE_UNIT if student.dtype == torch.float64 else 2.0**-24


def _watched(case: Case, inputs: Inputs, backend: str | None) -> _Watched:
    """Calls for statistics and log-probs, of random tokens if the case has none."""
    rows, vocab = inputs.student.shape[:-1], inputs.student.shape[-1]
    generator = torch.Generator().manual_seed(case.seed)
    tokens = torch.randint(-1, vocab + 1, rows, generator=generator).to(inputs.student.device)
    upstream = torch.randn(rows, generator=generator)
    options = {
        name: value
        for name, value in {**inputs.options, **inputs.family}.items()
        if name not in ("weight", "reduction", "normalizer", "background")
    }
    given = options.pop("token_ids", None)
    tokens = tokens if given is None else given
    leaves: dict[str, Tensor]
    student: Tensor | LinearLogits
    if inputs.head is None:
        student = inputs.student.detach().requires_grad_()
        leaves = {"student": student}
    else:
        head = inputs.head
        hidden, weight = head.hidden.detach(), head.weight.detach()
        bias = None if head.bias is None else head.bias.detach()
        student = LinearLogits(hidden, weight, bias, head.softcap, head.scale)
        chosen = {"hidden": hidden} if case.frozen else vars(student)
        leaves = {name: x for name, x in chosen.items() if isinstance(x, Tensor)}
        for leaf in leaves.values():
            leaf.requires_grad_()
    # With these two a head is read although its log-sum-exp is given. The overlap is of logits
    # that have an exact order.
    left_out = set()
    if case.logsumexp != "none":
        left_out = {"student_entropy", "overlap"}
    elif inputs.head is not None and not inputs.head.exact:
        left_out = {"overlap"}
    teacher = inputs.teacher if inputs.teacher_head is None else inputs.teacher_head
    _, logprobs, stats = topk_divergence(
        student,
        teacher,
        None if isinstance(teacher, TopK) else inputs.k,
        token_ids=tokens,
        return_stats=tuple(name for name in NAMES if name not in left_out),
        return_token_logprobs=True,
        backend=backend,
        **options,
    )
    grads = torch.autograd.grad(logprobs, list(leaves.values()), upstream.to(logprobs.device))
    named = {name: value for name, value in stats._asdict().items() if value is not None}
    found = {
        name: value.detach().double().cpu().flatten().numpy()
        for name, value in {**named, "log-prob": logprobs}.items()
    }
    return _Watched(tokens, upstream, found, dict(zip(leaves, grads, strict=True)))


def _row(
    inputs: Inputs,
    expected: Expected,
    index: Any,
    number: int,
    token: int,
    factor: float,
    errors: np.ndarray,
) -> tuple[dict[str, tuple[float, float]], tuple[np.ndarray, np.ndarray]]:
    """Of an unmasked row: (value, budget) by name, (gradient, budget) of the log-prob."""
    count = math.prod(inputs.student.shape[:-1])
    narrow = _unit(inputs)
    unit = torch.finfo(torch.float64 if narrow == WIDE_UNIT else torch.float32)
    tiny = float(unit.tiny)
    z = inputs.student.detach().cpu()[index].double().numpy()
    limit = inputs.options["vocab_size"]
    width = len(z) if limit is None else min(len(z), limit)
    t = float(flat(inputs.options["temperature"], count, 1.0)[number])
    p = softmax(z[:width], t, narrow, errors[:width])
    if p is not None and inputs.head is not None:
        p = _of_head(inputs, p, errors[:width] / t)

    allowed = allowed_ids(inputs)
    if isinstance(inputs.teacher, TopK):
        listed = inputs.teacher.ids.cpu()[index].long().numpy()
        values = inputs.teacher.logits.detach().cpu()[index].double().numpy()
        other = z
    else:
        teacher = inputs.teacher.detach().cpu()[index].double().numpy()
        listed = expected.support.reshape(count, -1)[number]
        values = np.where(listed < 0, -np.inf, teacher[listed])
        other = z
        if inputs.ranked is not None:
            other = inputs.ranked.detach().cpu()[index].double().numpy()
        if inputs.family.get("support") == "student":
            other = teacher
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
        source = inputs.teacher if inputs.teacher_head is None else inputs.teacher_head.hidden
        wide = source.dtype == torch.float64
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
        if inputs.head is not None:  # what a given log-sum-exp leaves is all that is not listed
            rest = np.setdiff1d(np.arange(width), np.append(support, token))
            budget[rest] += abs(factor) / t * _left_over(inputs, p, errors[:width] / t)
    return wanted, (grad, np.nan_to_num(budget, nan=np.inf))


def _of_head(inputs: Inputs, p: Softmax, errors: np.ndarray) -> Softmax:
    """With the errors of a head's tail, which is computed apart from the logits beside it.

    It may have that of any logit, twice in backward. If it is what the listed logits leave of a
    log-sum-exp, their sum is off by theirs and by the least that is left, 2^-24.
    """
    off = 2 * errors[np.exp(p.log_p) > 0].max(initial=0.0) + _left_over(inputs, p, errors)
    return p._replace(error=p.error + off)


def _left_over(inputs: Inputs, p: Softmax, errors: np.ndarray) -> float:
    """How far the tail's share may be off as what the listed logits leave of a given sum."""
    given = inputs.family.get("student_logsumexp")
    if given is None:
        return 0.0
    rounding = float(torch.finfo(given.dtype).eps) / 2 * abs(p.logsumexp)
    return float((np.exp(p.log_p) * np.expm1(np.minimum(errors, 700))).sum()) + 2.0**-24 + rounding


def _sums(side: str, p: Softmax | None, support: np.ndarray) -> dict[str, tuple[float, float]]:
    if p is None:
        return {f"{side}_mass": (math.nan, 0.0), f"{side}_entropy": (math.nan, 0.0)}
    mass, error = p.mass(support)
    return {
        f"{side}_mass": (mass, error + 2.0**-22 * mass + 1e-37),
        f"{side}_entropy": (p.entropy, p.entropy_error + 1e-37),
    }


def _check_slopes(got: Tensor, wanted: np.ndarray, budget: np.ndarray, label: str) -> None:
    """The gradient of the log-probs."""
    found = got.double().cpu().numpy().reshape(wanted.shape)
    with np.errstate(all="ignore"):
        off = abs(found - wanted)
        wrong = ~(off <= budget) & ~(np.isnan(wanted) & np.isnan(found))
        wrong &= ~((found == wanted) | (np.isnan(found) & (budget == np.inf)))
    assert not wrong.any(), (
        f"gradient of the log-prob for {label}, at {np.argwhere(wrong)[0]}: "
        f"off by {off[wrong][0]:.3g}, budget {budget[wrong][0]:.3g}"
    )


def _check(got: float, wanted: float, budget: float, label: str) -> None:
    same = got == wanted or (math.isnan(got) and math.isnan(wanted))
    assert same or abs(got - wanted) <= budget or budget == math.inf, (
        f"{label}: got {got!r}, expected {wanted!r} within {budget:.3g}"
    )
