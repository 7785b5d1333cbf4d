"""Cases, a float64 oracle and error budgets: what it takes to check a build of this package.

A ``Case`` is a few numbers and names, so that a failing one can be printed and run again::

    from opd_kernels.testing import Case, check
    check(Case(rows=(2,), student_vocab=70, teacher_vocab=70, k=5), backend="cpu")

``make_inputs`` turns it into tensors, ``oracle`` computes what must come out, row by row and
independently of the package's own code, and ``check`` compares. Budgets are first-order forward
error bounds of float32 (float64) arithmetic on the given, already rounded inputs, plus one rounding
to the gradient's dtype; see ``_row_oracle``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_kernels.losses import topk_rkl
from opd_kernels.selection import select_topk
from opd_kernels.support import TopK

CONTENTS = (
    "normal",
    "equal",
    "ascending",
    "descending",
    "clustered",
    "quantised",
    "half_neg_inf",
    "neg_inf",
    "nan",
    "pos_inf",
    "zeros",
    "extreme",
    "offset",
)
LAYOUTS = ("contiguous", "sliced", "transposed", "expanded")
TEACHERS = ("logits", "topk_int32", "topk_int64")
MASKS = ("none", "bool", "integer", "all", "nothing")
TEMPERATURES = ("one", "float", "scalar", "rows")
WEIGHTS = ("none", "uniform", "poisoned")
BANS = ("none", "few", "half", "outside", "all")
NORMALIZERS = ("none", "float", "tensor")
UPSTREAMS = ("one", "stride0", "random", "zero")


@dataclass(frozen=True)
class Case:
    """One call of ``topk_rkl``, described by names and a seed."""

    rows: tuple[int, ...] = (3,)
    student_vocab: int = 64
    teacher_vocab: int = 64
    k: int = 8
    student_dtype: str = "float32"
    teacher_dtype: str = "float32"
    student_content: str = "normal"
    teacher_content: str = "normal"
    student_layout: str = "contiguous"
    teacher_layout: str = "contiguous"
    teacher: str = "logits"
    mask: str = "none"
    temperature: str = "one"
    teacher_temperature: str | None = None
    weight: str = "none"
    banned: str = "none"
    vocab_size: int | None = None
    reduction: str = "mean"
    normalizer: str = "none"
    upstream: str = "one"
    inplace: bool = False
    seed: int = 0


@dataclass
class Inputs:
    """The tensors of a case and the keyword arguments of the call."""

    student: Tensor
    teacher: Tensor | TopK
    k: int
    options: dict[str, Any] = field(default_factory=dict)
    upstream: Tensor | None = None


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """The case's tensors, the same ones every time."""
    generator = torch.Generator().manual_seed(case.seed)
    student = _logits(case, "student", generator)
    teacher: Tensor | TopK = _logits(case, "teacher", generator)
    if case.teacher != "logits":
        teacher = _support(case, generator)
    options: dict[str, Any] = {"reduction": case.reduction}
    options["mask"] = _mask(case, generator)
    options["temperature"] = _temperature(case, case.temperature, generator)
    if case.teacher_temperature is not None:
        options["teacher_temperature"] = _temperature(case, case.teacher_temperature, generator)
    options["weight"] = _weight(case, options["mask"], generator)
    options["banned_ids"] = _banned(case, generator)
    options["vocab_size"] = case.vocab_size
    if case.normalizer != "none":
        value = float(torch.rand((), generator=generator)) * 10 + 0.5
        options["normalizer"] = value if case.normalizer == "float" else torch.tensor(value)
    upstream = _upstream(case, options["mask"], generator)
    if not isinstance(teacher, TopK):
        _poison_masked_rows(teacher, options["mask"])
    _poison_masked_rows(student, options["mask"])

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, (Tensor, TopK)) else value

    if torch.device(device).type == "cpu":
        return Inputs(student, teacher, case.k, options, upstream)
    options = {name: move(value) for name, value in options.items()}
    return Inputs(move(student), move(teacher), case.k, options, move(upstream))


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
        total = np.array(weighted.sum() * factor)
        total_budget = np.array(
            (weighted_budget.sum() + depth * unit * abs(weighted).sum()) * abs(factor)
        )
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


def check(case: Case, backend: str | None = None, device: torch.device | str = "cpu") -> None:
    """Raises ``AssertionError`` where a backend's result for the case is not within its budget."""
    inputs = make_inputs(case, device)
    expected = oracle(inputs)
    if case.teacher == "logits":
        _check_selection(inputs, expected, backend)

    leaf = inputs.student.requires_grad_()
    student = leaf * 1 if case.inplace else leaf
    weight = inputs.options["weight"]
    if weight is not None:
        weight.requires_grad_()
    k = inputs.k if case.teacher == "logits" else None
    loss = topk_rkl(
        student, inputs.teacher, k, inplace_grad=case.inplace, backend=backend, **inputs.options
    )
    assert isinstance(loss, Tensor)
    upstream = inputs.upstream if case.reduction == "none" else None
    wanted = [leaf] if weight is None else [leaf, weight]
    grads = torch.autograd.grad(loss, wanted, upstream)

    _check_close(loss, expected.loss, expected.loss_budget, f"loss of {case}")
    assert grads[0].dtype == leaf.dtype, f"gradient has dtype {grads[0].dtype}, logits {leaf.dtype}"
    _check_close(grads[0], expected.grad, expected.grad_budget, f"gradient of {case}")
    assert bool((grads[0].cpu()[torch.from_numpy(expected.grad_budget == 0)] == 0).all())
    if weight is not None:
        _check_close(grads[1], expected.weight_grad, expected.weight_budget, f"weight's of {case}")


def _check_selection(inputs: Inputs, expected: Expected, backend: str | None) -> None:
    """Ids and values exactly those of a stable sort."""
    assert isinstance(inputs.teacher, Tensor)
    options = {name: inputs.options[name] for name in ("mask", "banned_ids", "vocab_size")}
    if inputs.student.shape[-1] < inputs.teacher.shape[-1]:
        limits = [inputs.student.shape[-1], options["vocab_size"]]
        options["vocab_size"] = min(limit for limit in limits if limit is not None)
    topk = select_topk(inputs.teacher, inputs.k, backend=backend, **options)
    ids = topk.ids.cpu().numpy()
    assert np.array_equal(ids, expected.support), f"ids {ids}, expected {expected.support}"
    teacher = inputs.teacher.detach().cpu().to(topk.logits.dtype)
    values = teacher.gather(-1, torch.from_numpy(expected.support).clamp(min=0))
    values = values.masked_fill(torch.from_numpy(expected.support) < 0, -torch.inf)
    assert torch.equal(topk.logits.cpu().nan_to_num(nan=7e7), values.nan_to_num(nan=7e7)), (
        f"values {topk.logits}, expected {values}"
    )


def _check_close(actual: Tensor, expected: np.ndarray, budget: np.ndarray, what: str) -> None:
    got = actual.detach().double().cpu().numpy()
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    with np.errstate(all="ignore"):
        wrong = ~(abs(got - expected) <= budget) & ~(np.isnan(got) & np.isnan(expected))
        wrong &= ~(got == expected)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.size} outside the budget, first at {at}: got "
            f"{got[at]!r}, expected {expected[at]!r} within {budget[at]:.3g}"
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


def _logits(case: Case, side: str, generator: torch.Generator) -> Tensor:
    """Logits of a side with the wanted content, dtype and strides."""
    vocab = case.student_vocab if side == "student" else case.teacher_vocab
    content = case.student_content if side == "student" else case.teacher_content
    layout = case.student_layout if side == "student" else case.teacher_layout
    dtype = getattr(torch, case.student_dtype if side == "student" else case.teacher_dtype)
    rows = case.rows
    if layout == "expanded" and rows and not (side == "student" and case.inplace):
        base = _fill(content, (1, *rows[1:], vocab), dtype, generator)
        return base.expand(*rows, vocab)
    values = _fill(content, (*rows, vocab), dtype, generator)
    if layout == "sliced":  # rows further apart than they are long, and misaligned
        padded = torch.full((*rows, vocab + 3), torch.nan, dtype=dtype)
        padded[..., 1:-2] = values
        return padded[..., 1:-2]
    if layout == "transposed" and len(rows) > 1:
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    return values


def _fill(
    content: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Values that find bugs; each kind has broken a selection or a softmax somewhere."""
    normal = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    chance = torch.rand(shape, generator=generator)
    ramp = torch.linspace(-8, 8, shape[-1], dtype=torch.float64).expand(shape)
    if content == "equal":
        values = torch.full(shape, 1.25, dtype=torch.float64)
    elif content == "ascending":
        values = ramp.clone()
    elif content == "descending":
        values = -ramp
    elif content == "clustered":
        near = (torch.arange(shape[-1]) // 50) % 4 == 1
        values = torch.where(near, normal * 0.01 + 9, normal)
    elif content == "quantised":
        values = (normal / 2).round()
    elif content == "half_neg_inf":
        values = normal.masked_fill(chance < 0.5, -torch.inf)
    elif content == "neg_inf":
        values = torch.full(shape, -torch.inf, dtype=torch.float64)
    elif content == "nan":
        signed = torch.where(torch.rand(shape, generator=generator) < 0.5, torch.nan, -torch.nan)
        values = torch.where(chance < 0.02, signed.double(), normal)
    elif content == "pos_inf":
        values = normal.masked_fill(chance < 0.02, torch.inf)
    elif content == "zeros":
        values = torch.where(chance < 0.5, 0.0, -0.0).double()
    elif content == "extreme":
        largest = torch.finfo(dtype).max
        values = torch.where(chance < 0.1, largest, torch.where(chance > 0.9, -largest, normal))
    elif content == "offset":
        values = normal + 200
    else:
        values = normal
    return values.to(dtype)


def _support(case: Case, generator: torch.Generator) -> TopK:
    """A support as servers and caches hand it over: any order, duplicates, bad ids, -inf."""
    shape = (*case.rows, case.k)
    ids = torch.randint(0, case.student_vocab, shape, generator=generator)
    chance = torch.rand(shape, generator=generator)
    ids = ids.masked_fill(chance < 0.1, -1).masked_fill(chance > 0.95, case.student_vocab + 3)
    if case.teacher == "topk_int64":
        ids = torch.where((chance > 0.90) & (chance < 0.95), ids + 2**32, ids)
    else:
        ids = ids.to(torch.int32)
    content = case.teacher_content
    logits = _fill(content, shape, getattr(torch, case.teacher_dtype), generator)
    return TopK(ids, logits)


def _mask(case: Case, generator: torch.Generator) -> Tensor | None:
    chance = torch.rand(case.rows, generator=generator)
    masks = {
        "none": None,
        "bool": chance < 0.6,
        "integer": (chance < 0.6).long() * 3,
        "all": torch.ones(case.rows, dtype=torch.bool),
        "nothing": torch.zeros(case.rows, dtype=torch.bool),
    }
    return masks[case.mask]


def _temperature(case: Case, kind: str, generator: torch.Generator) -> float | Tensor:
    values = torch.rand(case.rows, generator=generator) * 3 + 0.2
    one = float(torch.rand((), generator=generator)) * 3 + 0.2
    kinds: dict[str, float | Tensor] = {
        "one": 1.0,
        "float": one,
        "scalar": torch.tensor(one),
        "rows": values,
    }
    return kinds[kind]


def _weight(case: Case, mask: Tensor | None, generator: torch.Generator) -> Tensor | None:
    values = torch.rand(case.rows, generator=generator) * 2
    if case.weight == "none":
        return None
    if case.weight == "poisoned" and mask is not None:
        values = values.masked_fill(mask == 0, torch.nan)
    return values


def _banned(case: Case, generator: torch.Generator) -> list[int] | Tensor | None:
    vocab = case.teacher_vocab
    permutation = torch.randperm(vocab, generator=generator)
    if case.banned == "none":
        return None
    if case.banned == "few":
        return [int(i) for i in permutation[:3]]
    if case.banned == "half":
        return permutation[: vocab // 2].to(torch.int32)
    if case.banned == "all":
        return torch.arange(vocab)
    return [-1, vocab + 5, 2**40]


def _upstream(case: Case, mask: Tensor | None, generator: torch.Generator) -> Tensor | None:
    if case.reduction != "none":
        return None
    dtype = (
        torch.float64 if "float64" in (case.student_dtype, case.teacher_dtype) else torch.float32
    )
    if case.upstream == "random":
        values = torch.randn(case.rows, generator=generator, dtype=dtype)
        return values if mask is None else values.masked_fill(mask == 0, torch.nan)
    value = {"one": 1.0, "stride0": 1.5, "zero": 0.0}[case.upstream]
    if case.upstream == "stride0":
        return torch.tensor(value, dtype=dtype).expand(case.rows)
    return torch.full(case.rows, value, dtype=dtype)


def _poison_masked_rows(logits: Tensor, mask: Tensor | None) -> None:
    """NaN in rows that must not be read, where the memory is the row's own."""
    if mask is not None and 0 not in logits.stride() and logits.numel():
        logits[mask == 0] = torch.nan
