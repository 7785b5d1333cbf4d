"""What the backends of compiled modules share: tensors as the modules' structs.

A struct holds addresses: what it was made of must outlive the call.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refused(dtypes: tuple[torch.dtype, ...], k: int, max_k: int) -> str | None:
    """Why no compiled module can serve a call, or None."""
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"{dtype} is not float16, bfloat16 or float32; backend='reference' takes it"
    if k > max_k:
        return f"k is {k}, above {max_k}; backend='reference' takes it"
    return None


@functools.cache
def name(dtype: torch.dtype) -> str:
    """A dtype as the modules know it."""
    return str(dtype).removeprefix("torch.")


def rows(module: Any, tensor: Tensor) -> Any:
    """A tensor of rows, with any leading strides."""
    return module.Rows(tensor.data_ptr(), name(tensor.dtype), tuple(tensor.shape), tensor.stride())


def allowed(module: Any, limit: int, banned: Tensor | None, mask: Tensor | None, count: int) -> Any:
    """What may enter the support of ``count`` rows; the mask is contiguous."""
    if mask is not None and (mask.dtype != torch.bool or mask.numel() != count):
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}, expected bool for {count} rows"
        )
    if banned is not None and banned.nbytes * 8 < limit:
        raise ValueError(f"the bitmap of banned ids has {banned.nbytes * 8} bits for {limit} ids")
    return module.Allowed(
        limit,
        banned=0 if banned is None else banned.data_ptr(),
        mask=0 if mask is None else mask.data_ptr(),
    )


def row_values(temperature: float | Tensor) -> float | Tensor:
    """Per-row temperatures as the kernels read them."""
    if isinstance(temperature, Tensor):
        return temperature.to(torch.float32).contiguous()
    return temperature


def temperature(module: Any, values: float | Tensor) -> Any:
    """One side's temperature, from ``row_values``."""
    if isinstance(values, Tensor):
        return module.Temperature(1.0, values.data_ptr())
    return module.Temperature(values)


def scatter_inputs(
    out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(entry gradients, ids, upstream gradients) as the kernels read them."""
    counts = {ids.shape[:-1].numel(), out.shape[:-1].numel()}
    if counts != {upstream.numel()} or entry_grad.shape != ids.shape:
        raise ValueError("ids and entry gradients are not (rows, k)")
    return entry_grad.contiguous(), ids.contiguous(), upstream.to(torch.float32).contiguous()
