"""Launches of divergences: on the support that a teacher's logits give, or on a given one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from opd_kernels._arguments import Allowed, Objective, Tail, Tails
from opd_kernels.backends.triton import configs
from opd_kernels.backends.triton import divergence as _divergence
from opd_kernels.backends.triton import full as _full
from opd_kernels.backends.triton.launches import common, selection
from opd_kernels.divergences import reverse_kl


def select_divergence(
    student: Tensor, teacher: Tensor, k: int, allowed: Allowed, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Both steps in one kernel; see ``opd_kernels.reference.select_divergence``.

    Two kernels for members other than the reverse KL.
    """
    if not _is_reverse_kl(objective):
        ids, values = selection.select(teacher, k, allowed)
        return _member_divergence(student, values, ids, allowed._replace(banned=None), objective)
    limit, banned, mask = common.contiguous(allowed)
    results = _divergence_results((*student.shape[:-1], k), student.device)
    temperature, teacher_temperature, *_ = objective
    student_t, student_ts = common.temperature(temperature)
    teacher_t, teacher_ts = common.temperature(teacher_temperature)
    with common.current(student.device):
        for index in common.parts(student, teacher):
            part, part_teacher, part_mask, *row_values = common.indexed(
                index, student, teacher, mask, student_ts, teacher_ts
            )
            count = part.shape[:-1].numel()
            if count == 0:
                continue
            keys, config, streamed = selection.stream(part_teacher, k, limit, part_mask)
            _divergence.logits_divergence_kernel[(count,)](
                part, part_teacher, banned, part_mask, *row_values, keys,
                *common.indexed(index, *results),
                student_t, teacher_t, limit, k,
                *common.row_strides(part), *common.row_strides(part_teacher),
                streamed, config.group, config.groups_pad, config.clan, config.k_pad, config.tile,
                configs.STAGES, **common.options(config.warps),
            )  # fmt: skip
    return results


def entry_divergence(
    student: Tensor, teacher: Tensor, ids: Tensor, allowed: Allowed, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and entry gradients on given ids; see ``opd_kernels.reference.entry_divergence``."""
    if not _is_reverse_kl(objective):
        return _member_divergence(student, teacher, ids, allowed, objective)
    limit, banned, mask = common.contiguous(allowed)
    k = ids.shape[-1]
    results = _divergence_results((*student.shape[:-1], k), student.device)
    temperature, teacher_temperature, *_ = objective
    student_t, student_ts = common.temperature(temperature)
    teacher_t, teacher_ts = common.temperature(teacher_temperature)
    teacher, ids = teacher.contiguous(), ids.contiguous()
    with common.current(student.device):
        for index in common.parts(student):
            part, part_teacher, part_ids, part_mask, *row_values = common.indexed(
                index, student, teacher, ids, mask, student_ts, teacher_ts
            )
            count = part.shape[:-1].numel()
            if count == 0:
                continue
            _divergence.support_divergence_kernel[(count,)](
                part, part_teacher, part_ids, banned, part_mask, *row_values,
                *common.indexed(index, *results),
                student_t, teacher_t, limit, k, *common.row_strides(part),
                *configs.entries(k), **common.options(configs.entry_warps(k)),
            )  # fmt: skip
    return results


def _member_divergence(
    student: Tensor, teacher: Tensor, ids: Tensor, allowed: Allowed, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """``entry_divergence`` of any member."""
    limit, banned, mask = allowed
    k = ids.shape[-1]
    results = _divergence_results((*student.shape[:-1], k), student.device)
    values, rows = _objective(objective)
    given = (teacher.contiguous(), ids.contiguous())
    mask = None if mask is None else mask.contiguous()
    with common.current(student.device):
        for index in common.parts(student):
            part, part_values, part_ids, part_mask, *part_rows = common.indexed(
                index, student, *given, mask, *rows
            )
            count = part.shape[:-1].numel()
            if count == 0:
                continue
            _full.member_divergence_kernel[(count,)](
                part, part_values, part_ids, banned, part_mask, *part_rows,
                *common.indexed(index, *results), *values, limit, k, *common.row_strides(part),
                *_present(objective), *configs.entries(k), **common.options(configs.entry_warps(k)),
            )  # fmt: skip
    return results


def full_divergence(
    student: Tensor,
    teacher: Tensor,
    ids: Tensor,
    allowed: Allowed,
    objective: Objective,
    tails: Tails,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, ids, entry gradients, factors, log-sum-exps).

    See ``opd_kernels.reference.full_divergence``. A student's tail that is not given is summed
    first, by a kernel of its own.
    """
    limit, banned, mask = common.contiguous(allowed)
    k, device = ids.shape[-1], student.device
    support = k - 1 if objective.outside == "sample" else k
    student_tail = tails.student
    if student_tail is None:
        over = Tail(tails.width, objective.temperature, ids[..., :support])
        student_tail, _ = selection.tail_logsumexp(student, mask, over)
    results = (
        *_divergence_results((*student.shape[:-1], k), device),
        common.empty(student.shape[:-1], torch.float32, device),
        common.empty(student.shape[:-1], torch.float64, device),
    )
    values, rows = _objective(objective)
    sums = [tail.to(torch.float64).contiguous() for tail in (student_tail, tails.teacher)]
    given = (teacher.contiguous(), ids.contiguous())
    with common.current(device):
        for index in common.parts(student):
            part, part_values, part_ids, part_mask, *part_rows = common.indexed(
                index, student, *given, mask, *rows, *sums
            )
            count = part.shape[:-1].numel()
            if count == 0:
                continue
            _full.full_divergence_kernel[(count,)](
                part, part_values, part_ids, banned, part_mask, *part_rows,
                *common.indexed(index, *results), *values, limit, tails.width, k,
                *common.row_strides(part),
                objective.outside, *_present(objective), *configs.entries(k),
                **common.options(configs.entry_warps(k)),
            )  # fmt: skip
    return results


def _divergence_results(
    entries: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the loss, the ids and the entry gradients."""
    return (
        common.empty(entries[:-1], torch.float32, device),
        common.empty(entries, torch.int32, device),
        common.empty(entries, torch.float32, device),
    )


def _is_reverse_kl(objective: Objective) -> bool:
    """Whether a renormalised divergence is that of ``topk_rkl``, whatever the unused beta is."""
    return objective.weights is None and objective.divergence._replace(beta=0.5) == reverse_kl()


def _objective(objective: Objective) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    """(numbers, per-row tensors) as the kernels of all members take them."""
    temperature, teacher_temperature, divergence, weights, _ = objective
    value, rows = common.temperature(temperature)
    teacher_value, teacher_rows = common.temperature(teacher_temperature)
    *numbers, _, clip, floor = divergence
    edges = (math.inf if clip is None else clip, -math.inf if floor is None else floor)
    weights = None if weights is None else weights.to(torch.float32).contiguous()
    return (value, teacher_value, *numbers, *edges), (rows, teacher_rows, weights)


def _present(objective: Objective) -> tuple[bool, bool, bool, bool, bool]:
    """Which parts a member may have: (reverse, forward, a skew, a stopped ratio, a floor)."""
    reverse, forward, *skews = objective.divergence[:4]
    stop_ratio = objective.divergence.stop_ratio
    floored = objective.divergence.logp_floor is not None
    if objective.outside == "sample":
        return True, False, False, True, floored
    if objective.weights is not None:
        return True, True, True, stop_ratio, floored
    others = bool(forward != 0), any(bool(weight != 0) for weight in skews)
    return bool(reverse != 0) or not any(others), *others, stop_ratio, floored
