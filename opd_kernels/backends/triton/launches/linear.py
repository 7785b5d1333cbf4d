"""Launches of a head's logits at the ids, and of their two gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_kernels._arguments import Allowed
from opd_kernels.backends.triton import configs
from opd_kernels.backends.triton import linear as _linear
from opd_kernels.backends.triton.launches import common


def gather_dot(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, allowed: Allowed
) -> tuple[Tensor, Tensor]:
    """The head's logits at the ids and the slots; see ``opd_kernels.reference.gather_dot``."""
    limit, banned, mask = common.contiguous(allowed)
    k, width = ids.shape[-1], hidden.shape[-1]
    logits = common.empty(ids.shape, torch.float32, ids.device)
    slots = common.empty(ids.shape, torch.int32, ids.device)
    ids, bias = ids.contiguous(), None if bias is None else bias.contiguous()
    if configs.SORTED_DOTS and 0 < ids.numel() < configs.MAX_SORTED:
        with common.current(ids.device):
            allowed = Allowed(limit, banned, mask)
            _sorted_dots(hidden, weight, bias, ids, allowed, logits, slots)
        return logits, slots
    block_k, block_h = configs.dots(k, width, weight.element_size())
    with common.current(ids.device):
        for index in common.parts(hidden):
            part, part_ids, part_mask, *outputs = common.indexed(
                index, hidden, ids, mask, logits, slots
            )
            count = part.shape[:-1].numel()
            if count == 0:
                continue
            _linear.gather_dot_kernel[(count * -(-k // block_k),)](
                part, weight, bias, part_ids, banned, part_mask, *outputs,
                limit, k, width, weight.stride(0), *common.row_strides(part),
                block_k, block_h, configs.STAGES, **common.options(configs.WARPS),
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
    keys = common.empty((entries,), torch.int32, ids.device)
    flat, options = (-(-entries // configs.FLAT),), common.options(configs.WARPS)
    _linear.entry_keys_kernel[flat](
        ids, banned, mask, keys, slots, limit, k, entries, configs.FLAT, **options
    )
    sorted_keys, order = torch.sort(keys, stable=True)
    unit, offsets = _row_offsets(hidden)
    rows = offsets[order // k]
    itemsize = max(hidden.element_size(), weight.element_size())
    run, columns = configs.sorted_dots(offsets.numel(), width, itemsize)
    slices = -(-width // columns)
    sums = common.empty((slices, entries), torch.float32, ids.device)
    _linear.sorted_dot_kernel[(-(-entries // run), slices)](
        sorted_keys, order, rows, hidden, weight, sums,
        limit, entries, width, weight.stride(0), unit, run, columns, **common.options(1),
    )  # fmt: skip
    _linear.add_slices_kernel[flat](
        sums, keys, bias, logits, limit, entries, slices, configs.FLAT, **options
    )


def gather_dot_hidden(upstream: Tensor, ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The hidden states' gradient; see ``opd_kernels.reference.gather_dot_hidden``."""
    k, (vocab, width) = ids.shape[-1], weight.shape
    out = common.empty((*ids.shape[:-1], width), dtype, ids.device)
    block_k, block_h = configs.row_sums(width, weight.element_size(), configs.HIDDEN_GRAD_ROWS)
    if out.numel() > 0:
        with common.current(ids.device):
            _linear.hidden_grad_kernel[(ids.shape[:-1].numel() * -(-width // block_h),)](
                upstream.to(torch.float32).contiguous(), ids.contiguous(), weight, out,
                vocab, k, width, weight.stride(0),
                block_k, block_h, configs.STAGES, **common.options(configs.WARPS),
            )  # fmt: skip
    return out


def gather_dot_weight(
    upstream: Tensor, ids: Tensor, hidden: Tensor, vocab: int, dtype: torch.dtype
) -> Tensor:
    """The weight's gradient; see ``opd_kernels.reference.gather_dot_weight``.

    Further memory: about 30 bytes an entry, and 32 MB for segments that hold whole chunks.
    """
    width = hidden.shape[-1]
    out = common.empty((vocab, width), dtype, ids.device)
    if out.numel() == 0:
        return out
    with common.current(ids.device):
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
        tiles, options = -(-width // block_h), common.options(warps)
        chunk = configs.chunk(keys.numel(), width)
        chunks = keys.numel() // chunk
        sums = common.empty((chunks, width), torch.float32, ids.device)
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
    merged = common.merged(tensor)
    unit = math.gcd(*(stride for _, stride in merged)) or 16  # 0 is a multiple of everything
    offsets = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for size, stride in merged:
        steps = torch.arange(size, dtype=torch.int64, device=tensor.device)
        offsets = offsets[..., None] + steps * (stride // unit)
    return unit, offsets.flatten()
