"""What every launch needs: memory, strides and rows as the kernels take them, launch options."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from opd_kernels._arguments import Allowed, Temperature
from opd_kernels.backends.triton import configs

DEVICES = ("cuda", "xpu")


def options(warps: int) -> dict[str, Any]:
    """Launch options. Without fused multiply-adds all GPUs give the same bits."""
    chosen: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
    if torch.version.hip is None and torch.version.xpu is None:
        chosen["maxnreg"] = configs.registers(warps)
    return chosen


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for what kernels write. It is allocated here alone, so that tests can replace it."""
    return torch.empty(shape, dtype=dtype, device=device)


def contiguous(allowed: Allowed) -> tuple[int, Tensor | None, Tensor | None]:
    """(limit, bitmap, mask) as the kernels take them."""
    limit, banned, mask = allowed
    return limit, banned, None if mask is None else mask.contiguous()


def temperature(temperature: Temperature) -> tuple[float, Tensor | None]:
    """(float, per-row tensor or None) as the kernels take it."""
    value, rows = temperature
    return value, None if rows is None else rows.to(torch.float32).contiguous()


def merged(tensor: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions; those that one stride can walk are merged."""
    found: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return found


def parts(*tensors: Tensor) -> list[tuple[int, ...]]:
    """Indices into the leading dimensions under which every tensor has at most two left.

    A kernel walks two strides. Only exotic views need more than the one empty index.
    """
    if all(len(merged(tensor)) <= 2 for tensor in tensors):
        return [()]
    return [
        (i, *rest)
        for i in range(tensors[0].shape[0])
        for rest in parts(*(tensor[i] for tensor in tensors))
    ]


def indexed(index: tuple[int, ...], *tensors: Any) -> tuple[Any, ...]:
    """Each tensor at an index; None stays None."""
    if not index:
        return tensors
    return tuple(None if tensor is None else tensor[index] for tensor in tensors)


def row_strides(tensor: Tensor) -> tuple[int, int, int]:
    """(rows of the inner leading dimension, stride of the outer, stride of the inner)."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError("the elements of a row must be adjacent (last stride 1)")
    outer, inner = [(1, 0), (1, 0), *merged(tensor)][-2:]
    return inner[0], outer[1], inner[1]


def aligned(logits: Tensor) -> bool:
    """Whether every row starts on a multiple of 16 bytes."""
    offsets = [stride * logits.element_size() for _, stride in merged(logits)]
    return all(offset % 16 == 0 for offset in [logits.data_ptr(), *offsets])


def aligned_alike(one: Tensor, other: Tensor) -> bool:
    """Whether each row of one tensor starts as far from 16 bytes as that of the other."""
    strides = zip(one.shape[:-1], one.stride(), other.stride(), strict=False)
    offsets = [(a - b) * one.element_size() for size, a, b in strides if size > 1]
    return all(offset % 16 == 0 for offset in [one.data_ptr() - other.data_ptr(), *offsets])


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensors' device the current one, on which Triton launches."""
    if device.type not in DEVICES:
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs at least at once; 1 under the interpreter."""
    if device.type not in DEVICES:
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count
