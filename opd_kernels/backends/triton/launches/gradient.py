"""Launches that write or change a dense gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opd_kernels._arguments import Background
from opd_kernels.backends.triton import configs
from opd_kernels.backends.triton import scatter as _scatter
from opd_kernels.backends.triton.launches import common


def scatter(
    entry_grad: Tensor, ids: Tensor, upstream: Tensor, width: int, dtype: torch.dtype
) -> Tensor:
    """The dense gradient; see ``opd_kernels.reference.scatter``."""
    out = common.empty((*ids.shape[:-1], width), dtype, ids.device)
    scatter_(out, entry_grad, ids, upstream)
    return out


def scatter_(out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor) -> None:
    """As ``scatter``, written over what ``out`` holds."""
    width, k = out.shape[-1], ids.shape[-1]
    chunk = 16 // out.element_size()
    pieces = -(-(width + chunk - 1) // (configs.PIECE_BYTES // out.element_size()))
    for part, entries in _gradient_parts(out, entry_grad, ids, upstream):
        _scatter.scatter_kernel[(part.shape[:-1].numel(), pieces)](
            part, *entries, width, k, *common.row_strides(part),
            configs.PIECE_BYTES // out.element_size(), configs.tile(out.element_size()),
            configs.k_pad(k), **common.options(configs.WARPS),
        )  # fmt: skip


def scatter_add_(out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor) -> None:
    """As ``scatter``, added to what ``out`` holds."""
    width, k = out.shape[-1], ids.shape[-1]
    for part, entries in _gradient_parts(out, entry_grad, ids, upstream):
        _scatter.add_kernel[(part.shape[:-1].numel(),)](
            part, *entries, width, k, *common.row_strides(part), configs.k_pad(k),
            **common.options(configs.WARPS),
        )  # fmt: skip


def scatter_background(
    entry_grad: Tensor, ids: Tensor, upstream: Tensor, background: Background
) -> Tensor:
    """The dense gradient over a background; see ``opd_kernels.reference.scatter_background``."""
    logits = background.logits
    if logits is None:
        raise ValueError("a background in memory of its own needs its logits")
    out = common.empty(logits.shape, logits.dtype, logits.device)
    scatter_background_(out, entry_grad, ids, upstream, background)
    return out


def scatter_background_(
    out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor, background: Background
) -> None:
    """As ``scatter_background``, written over what ``out`` holds."""
    factors, logsumexp, limit, logits, temperature = background
    if factors is None or logsumexp is None:
        raise ValueError("a background has factors and log-sum-exps")
    logits = out if logits is None else logits
    if logits.dtype != out.dtype or logits.shape != out.shape:
        raise ValueError("the logits and their gradient differ in dtype or shape")
    if entry_grad.shape != ids.shape or not ids.shape[:-1] == out.shape[:-1] == upstream.shape:
        raise ValueError("ids and entry gradients are not (rows, k)")
    value, rows = common.temperature(temperature)
    entries = (ids.contiguous(), entry_grad.contiguous())
    per_row = (
        upstream.to(torch.float32).contiguous(),
        factors.to(torch.float32).contiguous(),
        logsumexp.to(torch.float64).contiguous(),
        rows,
    )
    width, k, itemsize = out.shape[-1], ids.shape[-1], out.element_size()
    piece = configs.PIECE_BYTES // itemsize
    with common.current(out.device):
        for index in common.parts(out, logits):
            part, part_logits, *others = common.indexed(index, out, logits, *entries, *per_row)
            if part.numel() == 0:
                continue
            grid = (part.shape[:-1].numel(), -(-(width + 16 // itemsize - 1) // piece))
            _scatter.background_kernel[grid](
                part, part_logits, *others, value, width, limit, k,
                *common.row_strides(part), *common.row_strides(part_logits),
                common.aligned_alike(part, part_logits), piece, configs.tile(itemsize),
                configs.k_pad(k), configs.STAGES, **common.options(configs.WARPS),
            )  # fmt: skip


def _gradient_parts(
    out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """(rows of the gradient, (ids, entry gradients, upstream) of these rows) for each launch."""
    if entry_grad.shape != ids.shape or not ids.shape[:-1] == out.shape[:-1] == upstream.shape:
        raise ValueError("ids and entry gradients are not (rows, k)")
    ids, entry_grad = ids.contiguous(), entry_grad.contiguous()
    upstream = upstream.to(torch.float32).contiguous()
    with common.current(out.device):
        for index in common.parts(out):
            part, *entries = common.indexed(index, out, ids, entry_grad, upstream)
            if part.numel() > 0:
                yield part, tuple(entries)
