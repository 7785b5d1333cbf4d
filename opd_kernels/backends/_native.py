"""What the backends of compiled modules share: they turn tensors into the modules' structs.

A backend passes its module; ``launch(name, device, **arguments)``, which calls one of its
functions; and ``empty``, which allocates. A struct holds addresses, so the tensors that it was made
of have to outlive the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Launch = Callable[..., None]
Empty = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]


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
    """The modules' name of a dtype."""
    return str(dtype).removeprefix("torch.")


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a result."""
    return torch.empty(shape, dtype=dtype, device=device)


def select(
    module: Any,
    launch: Launch,
    empty: Empty,
    logits: Tensor,
    k: int,
    limit: int,
    banned: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The k best ids and their values; see ``opd_kernels.reference.select``."""
    rows, device = logits.shape[:-1], logits.device
    ids = empty((*rows, k), torch.int32, device)
    values = empty((*rows, k), torch.float32, device)
    mask = None if mask is None else mask.contiguous()
    launch(
        "select",
        device,
        logits=_rows(module, logits),
        allowed=_allowed(module, limit, banned, mask, rows.numel()),
        k=k,
        ids=ids.data_ptr(),
        values=values.data_ptr(),
    )
    return ids, values


def divergence(
    module: Any,
    launch: Launch,
    empty: Empty,
    student: Tensor,
    teacher: Tensor,
    teacher_ids: Tensor | None,
    k: int,
    limit: int,
    banned: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, ids and entry gradients; see ``opd_kernels.reference.divergence``."""
    rows, device = student.shape[:-1], student.device
    loss = empty(rows, torch.float32, device)
    ids = empty((*rows, k), torch.int32, device)
    entry_grad = empty((*rows, k), torch.float32, device)
    mask = None if mask is None else mask.contiguous()
    temperature, teacher_temperature = _float32(temperature), _float32(teacher_temperature)
    launch(
        "divergence",
        device,
        student=_rows(module, student),
        teacher=_rows(module, teacher),
        ids=None if teacher_ids is None else _rows(module, teacher_ids),
        allowed=_allowed(module, limit, banned, mask, rows.numel()),
        k=k,
        temperature=_temperature(module, temperature),
        teacher_temperature=_temperature(module, teacher_temperature),
        loss=loss.data_ptr(),
        out_ids=ids.data_ptr(),
        entry_grad=entry_grad.data_ptr(),
    )
    return loss, ids, entry_grad


def scatter(
    module: Any,
    launch: Launch,
    out: Tensor,
    entry_grad: Tensor,
    ids: Tensor,
    upstream: Tensor,
    mode: str,
) -> None:
    """Writes entries: into zeros ("assign"), after zeros ("clear") or added to ``out`` ("add")."""
    counts = {ids.shape[:-1].numel(), out.shape[:-1].numel()}
    if counts != {upstream.numel()} or entry_grad.shape != ids.shape:
        raise ValueError("ids and entry gradients are not (rows, k)")
    ids, entry_grad = ids.contiguous(), entry_grad.contiguous()
    upstream = upstream.to(torch.float32).contiguous()
    launch(
        "scatter",
        out.device,
        out=_rows(module, out),
        ids=ids.data_ptr(),
        entry_grad=entry_grad.data_ptr(),
        upstream=upstream.data_ptr(),
        k=ids.shape[-1],
        mode=mode,
    )


def gather_dot(
    module: Any,
    launch: Launch,
    empty: Empty,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    limit: int,
    banned: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The head's logits at the ids; see ``opd_kernels.reference.gather_dot``."""
    device = hidden.device
    logits, slots = (empty(ids.shape, dtype, device) for dtype in (torch.float32, torch.int32))
    mask = None if mask is None else mask.contiguous()
    bias = None if bias is None else bias.contiguous()
    launch(
        "gather_dot",
        device,
        hidden=_rows(module, hidden),
        weight=_rows(module, weight),
        bias=0 if bias is None else bias.data_ptr(),
        bias_dtype=name(torch.float32 if bias is None else bias.dtype),
        ids=_rows(module, ids),
        allowed=_allowed(module, limit, banned, mask, ids.shape[:-1].numel()),
        k=ids.shape[-1],
        logits=logits.data_ptr(),
        slots=slots.data_ptr(),
    )
    return logits, slots


def gather_dot_gradient(
    module: Any,
    launch: Launch,
    of: str,
    out: Tensor,
    upstream: Tensor,
    ids: Tensor,
    **factor: Tensor,
) -> Tensor:
    """The gradient of "hidden" or of "weight", written into ``out``.

    ``factor`` is the other one: the weight or the hidden states. For the gradient of the weight
    ``out`` holds zeros.
    """
    if upstream.shape != ids.shape:
        raise ValueError("ids and upstream gradients are not (rows, k)")
    upstream = upstream.contiguous()
    launch(
        f"gather_dot_{of}",
        out.device,
        upstream=upstream.data_ptr(),
        ids=_rows(module, ids),
        k=ids.shape[-1],
        out=_rows(module, out),
        **{name: _rows(module, tensor) for name, tensor in factor.items()},
    )
    return out


def _rows(module: Any, tensor: Tensor) -> Any:
    return module.Rows(tensor.data_ptr(), name(tensor.dtype), tuple(tensor.shape), tensor.stride())


def _allowed(
    module: Any, limit: int, banned: Tensor | None, mask: Tensor | None, count: int
) -> Any:
    if mask is not None and (mask.dtype != torch.bool or mask.numel() != count):
        shape = tuple(mask.shape)
        raise ValueError(f"mask is {mask.dtype} {shape}, expected bool for {count} rows")
    if banned is not None and banned.nbytes * 8 < limit:
        raise ValueError(f"the bitmap of banned ids has {banned.nbytes * 8} bits for {limit} ids")
    return module.Allowed(
        limit,
        banned=0 if banned is None else banned.data_ptr(),
        mask=0 if mask is None else mask.data_ptr(),
    )


def _float32(temperature: float | Tensor) -> float | Tensor:
    """Per-row temperatures as the kernels read them."""
    if isinstance(temperature, Tensor):
        return temperature.to(torch.float32).contiguous()
    return temperature


def _temperature(module: Any, temperature: float | Tensor) -> Any:
    if isinstance(temperature, Tensor):
        return module.Temperature(1.0, temperature.data_ptr())
    return module.Temperature(temperature)
