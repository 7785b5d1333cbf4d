"""Launches that read rows of logits: for the k best, for a tail, or at given ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd_kernels._arguments import Allowed, Tail
from opd_kernels.backends.triton import configs
from opd_kernels.backends.triton import gather as _gather
from opd_kernels.backends.triton import select as _select
from opd_kernels.backends.triton import tail as _tail
from opd_kernels.backends.triton.launches import common


def select(logits: Tensor, k: int, allowed: Allowed) -> tuple[Tensor, Tensor]:
    """The k best ids and their values; see ``opd_kernels.reference.select``."""
    limit, banned, mask = common.contiguous(allowed)
    rows = logits.shape[:-1]
    ids = common.empty((*rows, k), torch.int32, logits.device)
    values = common.empty((*rows, k), torch.float32, logits.device)
    with common.current(logits.device):
        for index in common.parts(logits):
            part, part_mask, part_ids, part_values = common.indexed(
                index, logits, mask, ids, values
            )
            count = part.shape[:-1].numel()
            if count == 0:
                continue
            keys, config, streamed = stream(part, k, limit, part_mask)
            _select.select_kernel[(count,)](
                part, banned, part_mask, keys, part_ids, part_values, limit, k,
                *common.row_strides(part),
                streamed, config.group, config.groups_pad, config.clan, config.k_pad, config.tile,
                configs.STAGES, **common.options(config.warps),
            )  # fmt: skip
    return ids, values


def gather(student: Tensor, ids: Tensor, allowed: Allowed) -> tuple[Tensor, Tensor]:
    """The student's values at the ids and the slots; see ``opd_kernels.reference.gather``."""
    limit, banned, mask = common.contiguous(allowed)
    k = ids.shape[-1]
    values = common.empty(ids.shape, torch.float32, ids.device)
    slots = common.empty(ids.shape, torch.int32, ids.device)
    tile = configs.gathered(k)
    with common.current(ids.device):
        for index in common.parts(student, ids):
            part, part_ids, part_mask, *outputs = common.indexed(
                index, student, ids, mask, values, slots
            )
            if part_ids.numel() == 0:
                continue
            count = part.shape[:-1].numel()
            _gather.gather_kernel[(-(-count // tile[0]),)](
                part, part_ids, banned, part_mask, *outputs,
                limit, count, k, *common.row_strides(part), *common.row_strides(part_ids),
                *tile, **common.options(configs.WARPS),
            )  # fmt: skip
    return values, slots


def select_with_tail(
    logits: Tensor, k: int, allowed: Allowed, tail: Tail
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``select`` and a tail; see ``opd_kernels.reference.select_with_tail``."""
    limit, banned, mask = common.contiguous(allowed)
    rows, itemsize = logits.shape[:-1], logits.element_size()
    ids = common.empty((*rows, k), torch.int32, logits.device)
    values = common.empty((*rows, k), torch.float32, logits.device)
    listed, value, temperatures, *results = _tail_arguments(tail, logits)
    left_out = k if listed is None else listed.shape[-1]
    with common.current(logits.device):
        for index in common.parts(logits):
            part, part_mask, part_temperatures, part_listed, *part_results = common.indexed(
                index, logits, mask, temperatures, listed, ids, values, *results
            )
            count = part.shape[:-1].numel()
            if count == 0:
                continue
            config = configs.tail_selection(k, limit, itemsize, common.aligned(part))
            # The selection changes the keys of groups with banned ids or ids beyond its limit.
            apart = config.group != configs.TAIL_GROUP or banned is not None or limit != tail.width
            programs, memory, streamed = _stream_sums(
                part, tail, max(limit, tail.width), part_mask, part_temperatures,
                group=config.group, apart=apart, warps=config.warps if configs.walks(k) else None,
            )  # fmt: skip
            left_pad, block = configs.left_out(left_out, config.warps)
            _tail.select_tail_kernel[(programs,)](
                part, banned, part_mask, part_temperatures, part_listed, *memory,
                *_listing(programs, left_pad, part.device), *part_results,
                value, count, limit, tail.width, k, left_out, *common.row_strides(part),
                streamed, config.group, config.groups_pad, config.clan, config.k_pad, config.tile,
                configs.STAGES, configs.TAIL_GROUP, left_pad, block, configs.TAIL_LANES,
                configs.walks(k), **common.options(config.warps),
            )  # fmt: skip
    return ids, values, *results


def tail_logsumexp(logits: Tensor, mask: Tensor | None, tail: Tail) -> tuple[Tensor, Tensor | None]:
    """The tail of a given support; see ``opd_kernels.reference.tail_logsumexp``."""
    mask = None if mask is None else mask.contiguous()
    listed, value, temperatures, *results = _tail_arguments(tail, logits)
    left_out = listed.shape[-1]
    warps = configs.tail_warps(left_out)
    left_pad, block = configs.left_out(left_out, warps)
    with common.current(logits.device):
        for index in common.parts(logits):
            part, part_mask, part_temperatures, part_listed, *part_results = common.indexed(
                index, logits, mask, temperatures, listed, *results
            )
            count = part.shape[:-1].numel()
            if count == 0:
                continue
            programs, (_, *memory), streamed = _stream_sums(
                part,
                tail,
                tail.width,
                part_mask,
                part_temperatures,
                group=None,
                apart=True,
                warps=warps,
            )
            _tail.tail_kernel[(programs,)](
                part, part_mask, part_temperatures, part_listed, *memory,
                *_listing(programs, left_pad, part.device), *part_results,
                value, count, tail.width, left_out, *common.row_strides(part),
                streamed, configs.tile(part.element_size(), warps), configs.STAGES,
                configs.TAIL_GROUP, left_pad, block, configs.TAIL_LANES, **common.options(warps),
            )  # fmt: skip
    return results[0], results[1]


def stream(
    logits: Tensor, k: int, limit: int, mask: Tensor | None
) -> tuple[Tensor, configs.Selection, bool]:
    """(memory for group keys, configuration, whether the keys are already written).

    They are if there are so few rows that several programs stream each of them.
    """
    rows, itemsize = logits.shape[:-1].numel(), logits.element_size()
    config = configs.selection(k, limit, itemsize, common.aligned(logits))
    dtype = torch.int32 if itemsize == 4 else torch.int16
    keys = common.empty((rows, configs.keys_stride(limit, config.group)), dtype, logits.device)
    tile = configs.tile(itemsize)
    pieces = configs.pieces(rows, -(-limit // tile), common.multiprocessors(logits.device))
    if pieces > 1:
        _select.group_maxima_kernel[(rows, pieces)](
            logits, mask, keys, limit, *common.row_strides(logits), config.group, tile,
            configs.STAGES, **common.options(configs.WARPS),
        )  # fmt: skip
    return keys, config, pieces > 1


def _tail_arguments(tail: Tail, logits: Tensor) -> tuple[Any, ...]:
    """(ids, temperature, per-row temperatures, memory for the log-sum-exps and entropies)."""
    rows, device = logits.shape[:-1], logits.device
    return (
        None if tail.ids is None else tail.ids.contiguous(),
        *common.temperature(tail.temperature),
        common.empty(rows, torch.float64, device),
        common.empty(rows, torch.float64, device) if tail.with_entropy else None,
    )


def _listing(programs: int, left_pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for a list of the groups that hold ids which a tail leaves out."""
    return (
        common.empty((programs, left_pad), torch.int32, device),
        common.empty((programs, left_pad), torch.int64, device),
    )


def _stream_sums(
    logits: Tensor,
    tail: Tail,
    width: int,
    mask: Tensor | None,
    temperatures: Tensor | None,
    *,
    group: int | None,
    apart: bool,
    warps: int | None,
) -> tuple[int, tuple[Tensor | None, ...], bool]:
    """As ``stream``: (programs, memory for keys, maxima, sums and moments, whether it is written).

    The memory is a program's, of ``warps`` warps. Rows that are streamed here have a program each,
    and so have all without ``warps``. Without a ``group`` nothing is selected, and there are no
    keys. The maxima have memory ``apart`` where the keys cannot serve as maxima.
    """
    rows, itemsize, device = logits.shape[:-1].numel(), logits.element_size(), logits.device
    multiprocessors, tile = common.multiprocessors(device), configs.tile(itemsize)
    pieces = configs.pieces(rows, -(-width // tile), multiprocessors)
    programs = rows
    if pieces == 1 and warps is not None:
        programs = configs.tail_programs(rows, warps, multiprocessors)
    groups = (programs, configs.keys_stride(width, configs.TAIL_GROUP))
    key = torch.int32 if itemsize == 4 else torch.int16
    memory = (
        None
        if group is None
        else common.empty((programs, configs.keys_stride(width, group)), key, device),
        common.empty(groups, key, device) if apart else None,
        common.empty(groups, torch.float32, device),
        common.empty(groups, torch.float32, device) if tail.with_entropy else None,
    )
    if pieces > 1:
        _tail.group_sums_kernel[(rows, pieces)](
            logits, mask, temperatures, *memory, tail.temperature.value, width,
            *common.row_strides(logits), group or configs.TAIL_GROUP, configs.TAIL_GROUP, tile,
            configs.STAGES, **common.options(configs.WARPS),
        )  # fmt: skip
    return programs, memory, pieces > 1
