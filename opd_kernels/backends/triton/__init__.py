"""The Triton backend: allocates, chooses configurations and launches, on any GPU Triton reaches.

Under ``TRITON_INTERPRET=1``, set before the import, it takes CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from opd_kernels._arguments import Allowed, Objective, Temperature
from opd_kernels.backends.triton import configs

try:
    import triton

    from opd_kernels.backends.triton import divergence as _divergence
    from opd_kernels.backends.triton import gather as _gather
    from opd_kernels.backends.triton import linear as _linear
    from opd_kernels.backends.triton import scatter as _scatter
    from opd_kernels.backends.triton import select as _select

    _MISSING: str | None = None
    _INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError as error:
    _MISSING = (
        f"triton is missing ({error}); pip install 'triton>=3.6' (torch's CUDA builds bring it)"
    )
    _INTERPRETED = False

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DEVICES = ("cuda", "xpu")


def unavailable() -> str | None:
    """Why triton cannot be used, and what would bring it; None if it can."""
    return _MISSING


def refusal(
    device: torch.device, dtypes: tuple[torch.dtype, ...], k: int, vocab: int = 0
) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if _MISSING is not None:
        return _MISSING
    if device.type not in DEVICES and not _INTERPRETED:
        return f"the tensors are on {device}, and it runs on GPUs"
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"{dtype} is not float16, bfloat16 or float32; backend='reference' takes it"
    if k > configs.K_MAX:
        return f"k is {k}, above {configs.K_MAX}; backend='reference' takes it"
    return None


def select(logits: Tensor, k: int, allowed: Allowed) -> tuple[Tensor, Tensor]:
    """The k best ids and their values; see ``opd_kernels.reference.select``."""
    limit, banned, mask = _contiguous(allowed)
    rows = logits.shape[:-1]
    ids = _empty((*rows, k), torch.int32, logits.device)
    values = _empty((*rows, k), torch.float32, logits.device)
    with _current(logits.device):
        for index in _parts(logits):
            part, part_mask, part_ids, part_values = _indexed(index, logits, mask, ids, values)
            count = part.shape[:-1].numel()
            if count == 0:
                continue
            keys, config, streamed = _stream(part, k, limit, part_mask)
            _select.select_kernel[(count,)](
                part, banned, part_mask, keys, part_ids, part_values, limit, k, *_row_strides(part),
                streamed, config.group, config.groups_pad, config.clan, config.k_pad, config.tile,
                configs.STAGES, **_options(config.warps),
            )  # fmt: skip
    return ids, values


def gather(student: Tensor, ids: Tensor, allowed: Allowed) -> tuple[Tensor, Tensor]:
    """The student's values at the ids and the slots; see ``opd_kernels.reference.gather``."""
    limit, banned, mask = _contiguous(allowed)
    k = ids.shape[-1]
    values = _empty(ids.shape, torch.float32, ids.device)
    slots = _empty(ids.shape, torch.int32, ids.device)
    tile = configs.gathered(k)
    with _current(ids.device):
        for index in _parts(student, ids):
            part, part_ids, part_mask, *outputs = _indexed(index, student, ids, mask, values, slots)
            if part_ids.numel() == 0:
                continue
            count = part.shape[:-1].numel()
            _gather.gather_kernel[(-(-count // tile[0]),)](
                part, part_ids, banned, part_mask, *outputs,
                limit, count, k, *_row_strides(part), *_row_strides(part_ids),
                *tile, **_options(configs.WARPS),
            )  # fmt: skip
    return values, slots


def select_divergence(
    student: Tensor, teacher: Tensor, k: int, allowed: Allowed, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Both steps in one kernel; see ``opd_kernels.reference.select_divergence``."""
    limit, banned, mask = _contiguous(allowed)
    results = _divergence_results((*student.shape[:-1], k), student.device)
    temperature, teacher_temperature, *_ = objective
    student_t, student_ts = _temperature(temperature)
    teacher_t, teacher_ts = _temperature(teacher_temperature)
    with _current(student.device):
        for index in _parts(student, teacher):
            part, part_teacher, part_mask, *row_values = _indexed(
                index, student, teacher, mask, student_ts, teacher_ts
            )
            count = part.shape[:-1].numel()
            if count == 0:
                continue
            keys, config, streamed = _stream(part_teacher, k, limit, part_mask)
            _divergence.logits_divergence_kernel[(count,)](
                part, part_teacher, banned, part_mask, *row_values, keys,
                *_indexed(index, *results),
                student_t, teacher_t, limit, k, *_row_strides(part), *_row_strides(part_teacher),
                streamed, config.group, config.groups_pad, config.clan, config.k_pad, config.tile,
                configs.STAGES, **_options(config.warps),
            )  # fmt: skip
    return results


def entry_divergence(
    student: Tensor, teacher: Tensor, ids: Tensor, allowed: Allowed, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and entry gradients on given ids; see ``opd_kernels.reference.entry_divergence``."""
    limit, banned, mask = _contiguous(allowed)
    k = ids.shape[-1]
    results = _divergence_results((*student.shape[:-1], k), student.device)
    temperature, teacher_temperature, *_ = objective
    student_t, student_ts = _temperature(temperature)
    teacher_t, teacher_ts = _temperature(teacher_temperature)
    teacher, ids = teacher.contiguous(), ids.contiguous()
    with _current(student.device):
        for index in _parts(student):
            part, part_teacher, part_ids, part_mask, *row_values = _indexed(
                index, student, teacher, ids, mask, student_ts, teacher_ts
            )
            count = part.shape[:-1].numel()
            if count == 0:
                continue
            _divergence.support_divergence_kernel[(count,)](
                part, part_teacher, part_ids, banned, part_mask, *row_values,
                *_indexed(index, *results),
                student_t, teacher_t, limit, k, *_row_strides(part),
                *configs.entries(k), **_options(configs.entry_warps(k)),
            )  # fmt: skip
    return results


def scatter(
    entry_grad: Tensor, ids: Tensor, upstream: Tensor, width: int, dtype: torch.dtype
) -> Tensor:
    """The dense gradient; see ``opd_kernels.reference.scatter``."""
    out = _empty((*ids.shape[:-1], width), dtype, ids.device)
    scatter_(out, entry_grad, ids, upstream)
    return out


def scatter_(out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor) -> None:
    """As ``scatter``, written over what ``out`` holds."""
    width, k = out.shape[-1], ids.shape[-1]
    chunk = 16 // out.element_size()
    pieces = -(-(width + chunk - 1) // (configs.PIECE_BYTES // out.element_size()))
    for part, entries in _gradient_parts(out, entry_grad, ids, upstream):
        _scatter.scatter_kernel[(part.shape[:-1].numel(), pieces)](
            part, *entries, width, k, *_row_strides(part),
            configs.PIECE_BYTES // out.element_size(), configs.tile(out.element_size()),
            configs.k_pad(k), **_options(configs.WARPS),
        )  # fmt: skip


def scatter_add_(out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor) -> None:
    """As ``scatter``, added to what ``out`` holds."""
    width, k = out.shape[-1], ids.shape[-1]
    for part, entries in _gradient_parts(out, entry_grad, ids, upstream):
        _scatter.add_kernel[(part.shape[:-1].numel(),)](
            part, *entries, width, k, *_row_strides(part), configs.k_pad(k),
            **_options(configs.WARPS),
        )  # fmt: skip


def gather_dot(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, allowed: Allowed
) -> tuple[Tensor, Tensor]:
    """The head's logits at the ids and the slots; see ``opd_kernels.reference.gather_dot``."""
    limit, banned, mask = _contiguous(allowed)
    k, width = ids.shape[-1], hidden.shape[-1]
    logits = _empty(ids.shape, torch.float32, ids.device)
    slots = _empty(ids.shape, torch.int32, ids.device)
    ids, bias = ids.contiguous(), None if bias is None else bias.contiguous()
    if configs.SORTED_DOTS and 0 < ids.numel() < configs.MAX_SORTED:
        with _current(ids.device):
            allowed = Allowed(limit, banned, mask)
            _sorted_dots(hidden, weight, bias, ids, allowed, logits, slots)
        return logits, slots
    block_k, block_h = configs.dots(k, width, weight.element_size())
    with _current(ids.device):
        for index in _parts(hidden):
            part, part_ids, part_mask, *outputs = _indexed(index, hidden, ids, mask, logits, slots)
            count = part.shape[:-1].numel()
            if count == 0:
                continue
            _linear.gather_dot_kernel[(count * -(-k // block_k),)](
                part, weight, bias, part_ids, banned, part_mask, *outputs,
                limit, k, width, weight.stride(0), *_row_strides(part),
                block_k, block_h, configs.STAGES, **_options(configs.WARPS),
            )  # fmt: skip
    return logits, slots


def _sorted_dots(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    allowed: Allowed,
    logits: Tensor,
    slots: Tensor,
) -> None:
    """Computes logits and slots in the order of sorted ids.

    It needs about 30 bytes an entry for the sort, and 4 for each slice of columns.
    """
    limit, banned, mask = allowed
    entries, k, width = ids.numel(), ids.shape[-1], hidden.shape[-1]
    keys = _empty((entries,), torch.int32, ids.device)
    flat, options = (-(-entries // configs.FLAT),), _options(configs.WARPS)
    _linear.entry_keys_kernel[flat](
        ids, banned, mask, keys, slots, limit, k, entries, configs.FLAT, **options
    )
    sorted_keys, order = torch.sort(keys, stable=True)
    unit, offsets = _row_offsets(hidden)
    rows = offsets[order // k]
    itemsize = max(hidden.element_size(), weight.element_size())
    run, columns = configs.sorted_dots(offsets.numel(), width, itemsize)
    slices = -(-width // columns)
    sums = _empty((slices, entries), torch.float32, ids.device)
    _linear.sorted_dot_kernel[(-(-entries // run), slices)](
        sorted_keys, order, rows, hidden, weight, sums,
        limit, entries, width, weight.stride(0), unit, run, columns, **_options(1),
    )  # fmt: skip
    _linear.add_slices_kernel[flat](
        sums, keys, bias, logits, limit, entries, slices, configs.FLAT, **options
    )


def gather_dot_hidden(upstream: Tensor, ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The hidden states' gradient; see ``opd_kernels.reference.gather_dot_hidden``."""
    k, (vocab, width) = ids.shape[-1], weight.shape
    out = _empty((*ids.shape[:-1], width), dtype, ids.device)
    block_k, block_h = configs.row_sums(width, weight.element_size(), configs.HIDDEN_GRAD_ROWS)
    if out.numel() > 0:
        with _current(ids.device):
            _linear.hidden_grad_kernel[(ids.shape[:-1].numel() * -(-width // block_h),)](
                upstream.to(torch.float32).contiguous(), ids.contiguous(), weight, out,
                vocab, k, width, weight.stride(0),
                block_k, block_h, configs.STAGES, **_options(configs.WARPS),
            )  # fmt: skip
    return out


def gather_dot_weight(
    upstream: Tensor, ids: Tensor, hidden: Tensor, vocab: int, dtype: torch.dtype
) -> Tensor:
    """The weight's gradient; see ``opd_kernels.reference.gather_dot_weight``.

    Further memory: about 30 bytes an entry, and 32 MB for segments that hold whole chunks.
    """
    width = hidden.shape[-1]
    out = _empty((vocab, width), dtype, ids.device)
    if out.numel() == 0:
        return out
    with _current(ids.device):
        keys, factors, rows = _sorted_entries(upstream, ids, vocab)
        bounds = torch.arange(vocab + 1, dtype=torch.int32, device=ids.device)
        segments = torch.searchsorted(keys, bounds, out_int32=True)
        unit, offsets = _row_offsets(hidden)
        rows = offsets[rows]
        warps = configs.WEIGHT_GRAD_WARPS
        block_k, block_h = configs.row_sums(
            width, hidden.element_size(), configs.WEIGHT_GRAD_ROWS, warps
        )
        tile = (width, unit, block_k, block_h)
        tiles, options = -(-width // block_h), _options(warps)
        chunk = configs.chunk(keys.numel(), width)
        chunks = keys.numel() // chunk
        sums = _empty((chunks, width), torch.float32, ids.device)
        if chunks > 0:
            _linear.chunk_sums_kernel[(chunks, tiles)](
                keys, factors, rows, hidden, sums, vocab, chunk, *tile,
                configs.STAGES, **options,
            )  # fmt: skip
        _linear.weight_grad_kernel[(vocab, tiles)](
            segments, factors, rows, hidden, sums, out, chunk, *tile, **options
        )
    return out


def _sorted_entries(upstream: Tensor, ids: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, upstream, rows) of all entries, sorted by id stably; absent ones last.

    An entry is absent, and its id ``vocab``, if it has no id or if its upstream is 0.
    """
    if ids.numel() >= 1 << 31:
        raise ValueError(
            f"{ids.numel()} ids in one call, the weight's gradient takes up to {(1 << 31) - 1}: "
            "pass fewer rows at a time, or backend='reference'"
        )
    present = (upstream != 0) & (ids >= 0) & (ids < vocab)
    keys = torch.where(present, ids, vocab).to(torch.int32).flatten()
    keys, order = torch.sort(keys, stable=True)
    factors = upstream.to(torch.float32).flatten()[order]
    return keys, factors, order // ids.shape[-1]


def _row_offsets(tensor: Tensor) -> tuple[int, Tensor]:
    """(unit in elements, each row's offset in units).

    Kernels are compiled for units that are a multiple of 16, or not; if so, they load 16 bytes at
    once.
    """
    merged = _merged(tensor)
    unit = math.gcd(*(stride for _, stride in merged)) or 16  # 0 is a multiple of everything
    offsets = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for size, stride in merged:
        steps = torch.arange(size, dtype=torch.int64, device=tensor.device)
        offsets = offsets[..., None] + steps * (stride // unit)
    return unit, offsets.flatten()


def _gradient_parts(
    out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """(rows of the gradient, (ids, entry gradients, upstream) of these rows) for each launch."""
    if entry_grad.shape != ids.shape or not ids.shape[:-1] == out.shape[:-1] == upstream.shape:
        raise ValueError("ids and entry gradients are not (rows, k)")
    ids, entry_grad = ids.contiguous(), entry_grad.contiguous()
    upstream = upstream.to(torch.float32).contiguous()
    with _current(out.device):
        for index in _parts(out):
            part, *entries = _indexed(index, out, ids, entry_grad, upstream)
            if part.numel() > 0:
                yield part, tuple(entries)


def _stream(
    logits: Tensor, k: int, limit: int, mask: Tensor | None
) -> tuple[Tensor, configs.Selection, bool]:
    """(memory for group keys, configuration, whether the keys are already written).

    They are if there are so few rows that several programs stream each of them.
    """
    rows, itemsize = logits.shape[:-1].numel(), logits.element_size()
    config = configs.selection(k, limit, itemsize, _aligned(logits))
    dtype = torch.int32 if itemsize == 4 else torch.int16
    keys = _empty((rows, configs.keys_stride(limit, config.group)), dtype, logits.device)
    tile = configs.tile(itemsize)
    pieces = configs.pieces(rows, -(-limit // tile), _multiprocessors(logits.device))
    if pieces > 1:
        _select.group_maxima_kernel[(rows, pieces)](
            logits, mask, keys, limit, *_row_strides(logits), config.group, tile, configs.STAGES,
            **_options(configs.WARPS),
        )  # fmt: skip
    return keys, config, pieces > 1


def _options(warps: int) -> dict[str, Any]:
    """Launch options. Without fused multiply-adds all GPUs give the same bits."""
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
    if torch.version.hip is None and torch.version.xpu is None:
        options["maxnreg"] = configs.registers(warps)
    return options


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _divergence_results(
    entries: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the loss, the ids and the entry gradients."""
    return (
        _empty(entries[:-1], torch.float32, device),
        _empty(entries, torch.int32, device),
        _empty(entries, torch.float32, device),
    )


def _contiguous(allowed: Allowed) -> tuple[int, Tensor | None, Tensor | None]:
    """(limit, bitmap, mask) as the kernels take them."""
    limit, banned, mask = allowed
    return limit, banned, None if mask is None else mask.contiguous()


def _temperature(temperature: Temperature) -> tuple[float, Tensor | None]:
    """(float, per-row tensor or None) as the kernels take it."""
    value, rows = temperature
    return value, None if rows is None else rows.to(torch.float32).contiguous()


def _merged(tensor: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions; those that one stride can walk are merged."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def _parts(*tensors: Tensor) -> list[tuple[int, ...]]:
    """Indices into the leading dimensions under which every tensor has at most two left.

    A kernel walks two strides. Only exotic views need more than the one empty index.
    """
    if all(len(_merged(tensor)) <= 2 for tensor in tensors):
        return [()]
    return [
        (i, *rest)
        for i in range(tensors[0].shape[0])
        for rest in _parts(*(tensor[i] for tensor in tensors))
    ]


def _indexed(index: tuple[int, ...], *tensors: Any) -> tuple[Any, ...]:
    """Each tensor at an index; None stays None."""
    if not index:
        return tensors
    return tuple(None if tensor is None else tensor[index] for tensor in tensors)


def _row_strides(tensor: Tensor) -> tuple[int, int, int]:
    """(rows of the inner leading dimension, stride of the outer, stride of the inner)."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError("the elements of a row must be adjacent (last stride 1)")
    merged = [(1, 0), (1, 0), *_merged(tensor)][-2:]
    return merged[1][0], merged[0][1], merged[1][1]


def _aligned(logits: Tensor) -> bool:
    """Whether every row starts on a multiple of 16 bytes."""
    offsets = [stride * logits.element_size() for _, stride in _merged(logits)]
    return all(offset % 16 == 0 for offset in [logits.data_ptr(), *offsets])


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensors' device the current one, on which Triton launches."""
    if device.type not in DEVICES:
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type not in DEVICES:
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count
