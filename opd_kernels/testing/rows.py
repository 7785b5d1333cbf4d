"""One row of a case of the divergence family: its entries, its tails, and its results."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opd_kernels.support import TopK
from opd_kernels.testing.arithmetic import WIDE_UNIT, Arithmetic, sum_depth
from opd_kernels.testing.inputs import Inputs
from opd_kernels.testing.members import NEVER, Member, Numbers, Side, numbers

# A served support without its tail's log-sum-exp is taken to have at least this much there.
LEAST_SERVED_TAIL = 2.0**-24
# Terms of a tail that may be summed one after the other.
_GROUP = 32


class RowResult(NamedTuple):
    """A row's results for an upstream gradient of 1.

    ``ids`` may repeat: gradients of repeated ids add up. ``background`` and its budget are (V,), 0
    at the entries, or None where there is none.
    """

    selected: np.ndarray  # (K,) the support in selection order, -1 where there are fewer
    loss: float
    loss_budget: float
    ids: np.ndarray
    grad: np.ndarray
    grad_budget: np.ndarray
    background: np.ndarray | None = None
    background_budget: np.ndarray | None = None


class _Entries(NamedTuple):
    """The present entries, and the sampled token where it is none of them.

    ``joined`` is the token that may have joined the listed ids, present or not, and its value.
    """

    ids: np.ndarray
    teacher: np.ndarray
    token: int | None
    token_value: float
    joined: tuple[int, float] | None
    listed: bool  # whether there are any, present or not
    poisoned: bool  # the token is no id of the student's


def family_row(
    inputs: Inputs,
    index: tuple[Any, ...],
    allowed: np.ndarray,
    z_error: np.ndarray,
    temperatures: tuple[float, float],
    arithmetic: Arithmetic,
) -> RowResult:
    """The results of the unmasked row at ``index`` of the leading dimensions."""
    member = _member(inputs, index)
    widths = _widths(inputs)
    z = inputs.student.detach().cpu()[index].double().numpy()
    listed, values, teacher_row = _listed(inputs, index, allowed)
    entries = _entries(inputs, index, allowed, listed, values, teacher_row, widths)
    ids, t = entries.ids, entries.teacher
    token: dict[str, float] = {}
    teacher_token = {} if entries.token is None else {"token": entries.token_value}
    known, sampled = _known_of_head(inputs, index, listed, widths[0])
    if member.outside != "renormalize" and inputs.head is not None:
        # A row of logits relative to the largest one, and its tail, is what the loss is made of.
        with np.errstate(all="ignore"):
            top = abs(z[known] - z[known].max(initial=NEVER))
        z_error = z_error.copy()
        z_error[known] += arithmetic.unit * np.where(np.isfinite(top), top, 0.0)
    if entries.token is not None:
        token = {"token": float(z[entries.token]), "token_error": z_error[entries.token]}
    student = Side(z[ids], z_error[ids], temperatures[0], **token)
    teacher = Side(t, np.zeros(len(t)), temperatures[1], **teacher_token)
    at = ids if entries.token is None else np.append(ids, entries.token)
    full = member.outside != "renormalize"
    if full:
        row, off = z[: widths[0]], z_error[: widths[0]]
        if _takes_logsumexp(inputs):
            whole = inputs.family["student_logsumexp"].dtype
            whole_unit = float(torch.finfo(whole).eps) / 2
            tail = _left(row, off, known, ids, temperatures[0], arithmetic.unit, whole_unit)
        else:
            tail = _tail(row, ids, temperatures[0], arithmetic.unit, off)
        student = student._replace(tail=tail[0], tail_error=tail[1])
        if isinstance(inputs.teacher, TopK):
            joined = entries.joined if inputs.family["include_token"] else None
            tail = _served_tail(
                inputs.teacher, index, ids, joined, temperatures[1], arithmetic.unit
            )
            if np.isnan(tail[0]) and not entries.listed and not _takes_token(inputs):
                tail = 0.0, 0.0  # the whole of a row that a server gave no entries for
        else:
            tail = _tail(teacher_row[: widths[1]], ids, temperatures[1], arithmetic.unit)
        teacher = teacher._replace(tail=tail[0], tail_error=tail[1])

    nothing = np.zeros(len(at))
    poisoned = entries.poisoned or (sampled is not None and not 0 <= sampled < widths[0])
    if poisoned or any(_poisoned(side) for side in (student, teacher)):
        nan, inf = nothing + np.nan, nothing + np.inf
        if not full:
            if entries.poisoned:
                # A token that is no id stands at id 0, and makes all of the row's entries NaN.
                with_token = np.append(listed, 0)
                at = with_token[[0 <= i < len(allowed) and allowed[i] for i in with_token]]
            value = np.nan if len(at) else 0.0
            nan, inf = np.full(len(at), np.nan), np.full(len(at), np.inf)
            return RowResult(listed, value, np.inf if len(at) else 0.0, at, nan, inf)
        background = np.zeros(len(z))
        background[: widths[0]] = np.nan
        if sampled is not None:
            background[~np.isin(np.arange(len(z)), known)] = 0.0
        background[at] = 0.0
        budget = np.where(np.isnan(background), np.inf, 0.0)
        return RowResult(listed, np.nan, np.inf, at, nan, inf, background, budget)
    if any(_empty(side) for side in (student, teacher)):
        zeros = np.zeros(len(z)) if full else None
        return RowResult(listed, 0.0, 0.0, at, nothing, nothing, zeros, zeros)
    found = numbers(student, teacher, member, arithmetic)
    result = RowResult(listed, found.loss, found.loss_budget, at, found.grad, found.grad_budget)
    if not full:
        return result
    background, budget = _background(z, z_error, widths[0], at, student, found, arithmetic)
    if sampled is not None:
        others = ~np.isin(np.arange(len(z)), known)
        background, budget = (np.where(others, 0.0, x) for x in (background, budget))
        if sampled not in listed:
            rest = _tail(row, known[known != sampled], temperatures[0], arithmetic.unit)[0]
            at_token = _at_token(z[sampled], z_error[sampled], rest, student, found, arithmetic)
            background[sampled], budget[sampled] = at_token
    return result._replace(background=background, background_budget=budget)


def _known_of_head(
    inputs: Inputs, index: tuple[Any, ...], listed: np.ndarray, width: int
) -> tuple[np.ndarray, int | None]:
    """(ids whose logits are computed apart from a head's others, the token that stands for these).

    The latter may be no id; it is None for an exact background.
    """
    known, family = set(listed.tolist()), inputs.family
    sampled = None
    if family["background"] == "sampled":
        sampled = int(family["token_ids"].cpu()[index])
        known.add(sampled)
    if _takes_token(inputs):
        known.add(int(family["token_ids"].cpu()[index]))
    return np.array(sorted(i for i in known if 0 <= i < width), dtype=np.int64), sampled


def _takes_logsumexp(inputs: Inputs) -> bool:
    """Whether the student's is given, and not found on the way to the student's support."""
    family = inputs.family
    found = family["support"] == "student" and family["background"] == "exact"
    return family.get("student_logsumexp") is not None and (_takes_token(inputs) or not found)


def _takes_token(inputs: Inputs) -> bool:
    return bool(inputs.family["include_token"]) or inputs.family["outside"] == "sample"


def _member(inputs: Inputs, index: tuple[Any, ...]) -> Member:
    divergence = inputs.family["divergence"]

    def weight(value: Any) -> float:
        return float(value.detach().cpu()[index] if isinstance(value, Tensor) else value)

    return Member(
        (
            weight(divergence.reverse),
            weight(divergence.forward),
            weight(divergence.skew_reverse),
            weight(divergence.skew_forward),
        ),
        divergence.beta,
        divergence.stop_ratio,
        np.inf if divergence.log_ratio_clip is None else divergence.log_ratio_clip,
        NEVER if divergence.logp_floor is None else divergence.logp_floor,
        inputs.family["outside"],
    )


def _widths(inputs: Inputs) -> tuple[int, int]:
    """One past the last id of each side's full distribution; a served one is not known."""
    limit = inputs.options["vocab_size"]
    student, teacher = inputs.student.shape[-1], inputs.teacher
    other = student if isinstance(teacher, TopK) else teacher.shape[-1]
    return (student, other) if limit is None else (min(student, limit), min(other, limit))


def _listed(
    inputs: Inputs, index: tuple[Any, ...], allowed: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, the teacher's values there, the teacher's row) before anything is absent."""
    teacher = inputs.teacher
    if isinstance(teacher, TopK):
        ids = teacher.ids.cpu()[index].long().numpy()
        return ids, teacher.logits.detach().cpu()[index].double().numpy(), np.zeros(0)
    row = teacher.detach().cpu()[index].double().numpy()
    side = row
    if inputs.family["support"] == "student":
        side = inputs.student.detach().cpu()[index].double().numpy()
    ids = best(side, allowed, inputs.k)
    return ids, np.where(ids < 0, NEVER, row[ids]), row


def best(row: np.ndarray, allowed: np.ndarray, k: int) -> np.ndarray:
    """The k best allowed ids, value descending, id ascending, NaN first; -1 if there are fewer."""
    candidates = np.flatnonzero(allowed)
    values = row[candidates]
    is_nan = np.isnan(values)
    order = np.lexsort((candidates, np.where(is_nan, 0.0, -values), ~is_nan))[:k]
    ids = np.full(k, -1)
    ids[: len(order)] = candidates[order]
    return ids


def _entries(
    inputs: Inputs,
    index: tuple[Any, ...],
    allowed: np.ndarray,
    ids: np.ndarray,
    values: np.ndarray,
    teacher_row: np.ndarray,
    widths: tuple[int, int],
) -> _Entries:
    """Which of the listed entries are present, and what becomes of the sampled token."""
    family = inputs.family

    def is_allowed(i: int) -> bool:
        return bool(0 <= i < len(allowed) and allowed[i])

    kept: list[tuple[int, float]] = []
    found: set[int] = set()
    for i, value in zip(ids.tolist(), values.tolist(), strict=True):
        repeated = family["outside"] != "renormalize" and i in found
        if is_allowed(i) and value != NEVER and not repeated:
            kept.append((i, value))
            found.add(i)
    token, token_value, joined, poisoned = None, NEVER, None, False
    sampled = family["outside"] == "sample"
    if _takes_token(inputs):
        y = int(family["token_ids"].cpu()[index])
        poisoned = not 0 <= y < widths[0]
        if not poisoned and y not in found:
            if isinstance(inputs.teacher, TopK):
                given = inputs.teacher.token_logits
                assert given is not None
                token_value = float(given.detach().cpu()[index])
            elif y < widths[1]:
                token_value = float(teacher_row[y])
            joined = y, token_value
            if sampled:
                token = y
            elif is_allowed(y) and token_value != NEVER:
                kept.append((y, token_value))
    present = np.array([i for i, _ in kept], dtype=np.int64)
    kept_values = np.array([value for _, value in kept])
    listed = bool(((ids >= 0) & (values != NEVER)).any())
    return _Entries(present, kept_values, token, token_value, joined, listed, poisoned)


def _tail(
    row: np.ndarray, ids: np.ndarray, t: float, unit: float, errors: np.ndarray | float = 0.0
) -> tuple[float, float]:
    """(log-sum-exp of row / t outside of the ids, a bound on its error, given the row's)."""
    rest = np.ones(len(row), dtype=bool)
    rest[ids] = False
    x, off = row[rest], np.broadcast_to(errors, row.shape)[rest]
    if np.isnan(x).any() or (x == np.inf).any():
        return np.nan, np.inf
    x, off = x[x > NEVER], off[x > NEVER]
    if not len(x):
        return NEVER, 0.0
    top = x.max()
    with np.errstate(all="ignore"):
        exp = np.exp((x - top) / t)
        total = exp.sum()
        each = 8 * unit + unit * (3 * (top - x) + abs(x) + abs(top)) / t + off / t
        error = (exp * each).sum() / total
        depth = min(len(x), _GROUP) + sum_depth(len(x))
        return float(top / t + np.log(total)), float(error + depth * unit)


def _left(
    row: np.ndarray,
    errors: np.ndarray,
    known: np.ndarray,
    ids: np.ndarray,
    t: float,
    unit: float,
    whole_unit: float,
) -> tuple[float, float]:
    """``_tail`` as what known logits leave of a given log-sum-exp, of which at least 2^-24 stays.

    The rest has the error of what they hold, which is relative to everything, and that of the
    log-sum-exp's own rounding.
    """
    whole, _ = _tail(row, ids[:0], t, unit)
    if not whole < np.inf or whole == NEVER:
        return whole, np.inf if np.isnan(whole) else 0.0
    with np.errstate(all="ignore"):
        rounding = whole_unit * abs(whole)
        x = row[known] / t
        exponents = errors[known] / t + rounding + 8 * WIDE_UNIT * (abs(x) + abs(whole) + 1)
        off = float(np.where(x > NEVER, np.exp(x - whole) * np.expm1(exponents), 0.0).sum())
        share = float(np.exp(_tail(row, known, t, unit)[0] - whole))
        kept = max(share, LEAST_SERVED_TAIL)
        ends = [max(share + sign * off, LEAST_SERVED_TAIL) for sign in (-1, 1)]
        error = max(abs(np.log(end / kept)) for end in ends) + rounding
        # In the softmax it is a logit of its own, beside those that are known and no entries.
        absent = np.setdiff1d(known, ids)
        rest = np.append(row[absent] / t, whole + np.log(kept))
        each = np.append(errors[absent] / t, error)
        each, rest = each[rest > NEVER], rest[rest > NEVER]
        top = rest.max()
        exp = np.exp(rest - top)
        each = each + 8 * unit + unit * (3 * (top - rest) + abs(rest) + abs(top))
        error = float((exp * each).sum() / exp.sum() + sum_depth(len(exp)) * unit)
        return float(top + np.log(exp.sum())), error


def _served_tail(
    teacher: TopK,
    index: tuple[Any, ...],
    present: np.ndarray,
    joined: tuple[int, float] | None,
    t: float,
    unit: float,
) -> tuple[float, float]:
    """The same of a served support: what it says of the rest, and of its entries the absent ones.

    Without a tail it is what the log-sum-exp leaves, at least 2^-24 of the whole. A token that
    joins the entries leaves the tail, of which at least 2^-24 stays.
    """
    ids = teacher.ids.cpu()[index].long().numpy()
    values = teacher.logits.detach().cpu()[index].double().numpy()
    first: dict[int, float] = {}
    for i, value in zip(ids.tolist(), values.tolist(), strict=True):
        if i >= 0 and value != NEVER and i not in first:
            first[i] = value
    with np.errstate(all="ignore"):
        if teacher.tail_logsumexp is not None:
            tail = float(teacher.tail_logsumexp.detach().cpu()[index])
        else:
            assert teacher.logsumexp is not None
            whole = float(teacher.logsumexp.detach().cpu()[index])
            held = np.exp(np.array(list(first.values())) / t - whole).sum()
            tail = whole + np.log(np.maximum(1 - held, LEAST_SERVED_TAIL))
        lost = 0.0
        if joined is not None and joined[0] not in first:
            share = np.minimum(np.exp(joined[1] / t - tail), 1 - LEAST_SERVED_TAIL)
            # 1 - share has float64's rounding of the share, and of its exponent.
            lost = float(16 * WIDE_UNIT * (1 + abs(tail)) / (1 - share))
            tail += float(np.log1p(-share))
            first[joined[0]] = joined[1]
    absent = np.array([value for i, value in first.items() if i not in present])
    if np.isnan(absent).any() or (absent == np.inf).any() or np.isnan(tail) or tail == np.inf:
        return np.nan, np.inf
    rest = np.append(absent / t, tail)
    top = rest.max()
    if top == NEVER:
        return NEVER, 0.0
    with np.errstate(all="ignore"):
        error = unit * (4 + 3 * abs(rest[rest > NEVER]).max()) if len(absent) else 0.0
        return float(top + np.log(np.exp(rest - top).sum())), float(error + lost)


def _values(side: Side) -> np.ndarray:
    others = [x for x in (side.tail, side.token) if x is not None]
    return np.append(side.values, others)


def _poisoned(side: Side) -> bool:
    values = _values(side)
    return bool(np.isnan(values).any() or (values == np.inf).any())


def _empty(side: Side) -> bool:
    summed = _values(side._replace(token=None))
    return bool((summed == NEVER).all())


def _background(
    z: np.ndarray,
    z_error: np.ndarray,
    width: int,
    entries: np.ndarray,
    student: Side,
    found: Numbers,
    arithmetic: Arithmetic,
) -> tuple[np.ndarray, np.ndarray]:
    """(gradient, bound on its error) of every id that is no entry."""
    (unit, tiny, _), t, tail = arithmetic, student.temperature, student.tail
    assert tail is not None
    inside = np.arange(len(z)) < width
    inside[entries] = False
    inside &= z > NEVER
    with np.errstate(all="ignore"):
        x = np.where(inside, z, 0.0) / t
        p = np.exp(x - found.logsumexp)
        of_tail = np.exp(x - tail) if found.share else np.zeros(len(z))
        grad = found.scale * p + found.share * of_tail
        largest = abs(np.where(inside, z, 0.0)).max(initial=0.0) / t
        off = 3 * unit * (abs(x) + largest + abs(found.logsumexp)) + 2 * unit
        if z_error.any():  # relative to the tail, of logits that are computed once more
            off = off + np.where(inside, z_error, 0.0) / t + student.tail_error
        off = np.expm1(np.minimum(off + found.logsumexp_error, 700))
        budget = abs(found.scale) * np.minimum(p * off, 1.0) + p * found.scale_budget
        budget += of_tail * (abs(found.share) * off + found.share_budget) + 4 * unit * abs(grad)
        budget += tiny * (1 + found.largest_factor)
        budget = np.nan_to_num(budget, nan=np.inf, posinf=np.inf)
    return np.where(inside, np.nan_to_num(grad), 0.0), np.where(inside, budget, 0.0)


def _at_token(
    z: float, z_error: float, rest: float, student: Side, found: Numbers, arithmetic: Arithmetic
) -> tuple[float, float]:
    """(gradient, bound on its error) at a token that stands for all logits of which none is known.

    The exact gradient is a factor times p there, so this is the factor: their gradients' sum by the
    sum of their p. ``rest`` is their log-sum-exp.
    """
    (unit, tiny, _), t, tail = arithmetic, student.temperature, student.tail
    assert tail is not None
    with np.errstate(all="ignore"):
        by_tail = found.share * np.exp(found.logsumexp - tail) if found.share else 0.0
        size = abs(found.scale) + abs(by_tail)
        off = unit * (abs(z / t) + abs(tail) + abs(found.logsumexp)) + 2 * unit
        off = 3 * off + z_error / t + student.tail_error + found.logsumexp_error
        budget = found.scale_budget + found.share_budget * np.exp(found.logsumexp - tail)
        budget += size * np.expm1(np.minimum(2 * off, 700)) + 8 * unit * size
        # The sums are of float32, in which small numbers are lost.
        budget += tiny * (1 + found.largest_factor) / np.exp(rest - found.logsumexp)
        return float(np.nan_to_num(found.scale + by_tail)), float(np.nan_to_num(budget, nan=np.inf))
