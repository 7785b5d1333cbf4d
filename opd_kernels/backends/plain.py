"""What no kernel does, in plain PyTorch: a head run by pieces of rows, reductions of whole rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack

from opd_kernels._arguments import compute_dtype

# Memory for the logits of a few rows. On GPUs the matrix product is compute-bound from about 500
# rows on; re-reading the weight for each piece is hidden.
WORKSPACE_BYTES = {"cpu": 64 << 20}
GPU_WORKSPACE_BYTES = 256 << 20
# Rows of a matrix product's tile, of which a piece has a multiple.
TILE_ROWS = 128
# Rows are upcast in pieces of this many elements, so that no float32 copy of the logits exists.
_PIECE_ELEMENTS = 1 << 22
# Scale and softcap of a head. Without defaults, which torch.compile would not treat as constants.
Shape = tuple[float, float | None]


def shaped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """cap(scale * logits), differentiable."""
    if scale != 1:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def slope(logits: Tensor, scale: float, softcap: float | None) -> Tensor | float:
    """The derivative of ``shaped`` at what it returned."""
    return scale if softcap is None else (1 - (logits / softcap).square()) * scale


def pieces(count: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Iterator[slice]:
    """Slices of rows whose logits fit the workspace."""
    nbytes = WORKSPACE_BYTES.get(device.type, GPU_WORKSPACE_BYTES)
    rows = max(nbytes // (max(vocab, 1) * dtype.itemsize) // TILE_ROWS, 1) * TILE_ROWS
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
) -> Iterator[tuple[slice | Tensor, Tensor, Tensor | None]]:
    """Yields (rows, their logits, their mask); rows count over all leading dimensions.

    On the CPU masked rows are left out. Elsewhere that would synchronise, so their mask is yielded.
    One workspace holds the logits: the next rows overwrite it.
    """
    hidden = hidden.reshape(-1, hidden.shape[-1])
    mask = None if mask is None else mask.reshape(-1)
    kept: Tensor | None = None
    if mask is not None and mask.device.type == "cpu" and not torch.compiler.is_compiling():
        kept, mask = mask.nonzero().squeeze(-1), None
    count, vocab = hidden.shape[0] if kept is None else len(kept), weight.shape[0]
    memory: Tensor | None = None
    for piece in pieces(count, vocab, hidden.dtype, hidden.device):
        rows = piece if kept is None else kept[piece]
        if memory is None:
            memory = hidden.new_empty(piece.stop, vocab)
        logits = memory[: piece.stop - piece.start]
        if bias is None:
            torch.mm(hidden[rows], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[rows], weight.t(), out=logits)
        yield rows, logits, None if mask is None else mask[rows]


def head_columns(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (columns, the logits there) of hidden states (rows, H), in one workspace."""
    count, vocab = hidden.shape[0], weight.shape[0]
    nbytes = WORKSPACE_BYTES.get(hidden.device.type, GPU_WORKSPACE_BYTES)
    most = max(nbytes // (max(count, 1) * hidden.dtype.itemsize) // TILE_ROWS, 1) * TILE_ROWS
    # Of one size, but for the last: as many pieces in less memory.
    tiles = -(-vocab // TILE_ROWS)
    step = -(-tiles // -(-vocab // most)) * TILE_ROWS if vocab else most
    memory = hidden.new_empty(count * min(step, vocab))
    for start in range(0, vocab if count else 0, step):
        columns = slice(start, min(start + step, vocab))
        width = columns.stop - start
        logits = memory[: count * width].view(count, width)
        if bias is None:
            torch.mm(hidden, weight[columns].t(), out=logits)
        else:
            torch.addmm(bias[columns], hidden, weight[columns].t(), out=logits)
        yield columns, logits


def kept_rows(
    tensor: Tensor, mask: Tensor | None, *, leave_out: bool = True
) -> tuple[Tensor, slice | Tensor]:
    """(the rows that count, which these are), of all leading dimensions in one.

    On the CPU masked rows are left out. Elsewhere that would synchronise, so they are 0.
    """
    flat = tensor.reshape(-1, tensor.shape[-1])
    if mask is None:
        return flat, slice(None)
    mask = mask.reshape(-1)
    if leave_out and mask.device.type == "cpu":
        kept = mask.nonzero().squeeze(-1)
        return flat[kept], kept
    return flat.masked_fill(~mask[:, None], 0), slice(None)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b; a product of a narrower dtype is rounded to it once."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
        return
    step = max(1, _PIECE_ELEMENTS // max(out.shape[1], 1))
    for start in range(0, out.shape[0], step):
        out[start : start + step] += a[start : start + step] @ b


def logsumexp(
    logits: Tensor,
    width: int,
    mask: Tensor | None,
    shape: Shape | None = None,
) -> Tensor:
    """log sum exp over [0, width) of each row, float32 (float64); 0 in masked rows."""

    def reduce(rows: Tensor) -> Tensor:
        return (rows if shape is None else shaped(rows, *shape)).logsumexp(-1)

    return reduce_rows(reduce, logits[..., :width], mask)


def reduce_rows(
    reduce: Callable[..., Tensor],
    logits: Tensor,
    mask: Tensor | None,
    *per_row: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """reduce(rows in ``dtype``, or that of the arithmetic, *per_row of these rows), by pieces.

    Masked rows are 0. On the CPU they are not read; elsewhere leaving them out would synchronise.
    Under vmap all rows are one piece: mapped tensors cannot be indexed by a mask or written to.
    """
    dtype = compute_dtype(logits) if dtype is None else dtype
    if mapped():
        found = reduce(logits.to(dtype), *per_row)
        return found if mask is None else found.masked_fill(~mask, 0)
    out = logits.new_zeros(logits.shape[:-1], dtype=dtype)
    kept: Any = ...
    for piece in _pieces(logits.shape):
        if mask is not None and mask.device.type == "cpu" and not torch.compiler.is_compiling():
            kept = mask[piece]
        rows = logits[piece][kept].to(out.dtype)
        out[piece][kept] = reduce(rows, *(tensor[piece][kept] for tensor in per_row))
    return out if mask is None else out.masked_fill(~mask, 0)


def mapped() -> bool:
    """Whether this runs under vmap."""
    if not torch._C._are_functorch_transforms_active():
        return False
    # torch.compile knows that there are transforms, but not which.
    return torch.compiler.is_compiling() or any(
        level.key() == TransformType.Vmap for level in get_interpreter_stack() or ()
    )


def _pieces(shape: torch.Size) -> Iterator[tuple[int | slice, ...]]:
    """Indices of leading dimensions that cut (..., V) into views of about _PIECE_ELEMENTS.

    One piece under torch.compile, which fuses the upcast and would unroll the loop.
    """
    if len(shape) == 1 or torch.compiler.is_compiling():
        yield ()
        return
    inner = max(1, shape[1:].numel())
    if inner > _PIECE_ELEMENTS and len(shape) > 2:
        for i in range(shape[0]):
            yield from ((i, *rest) for rest in _pieces(shape[1:]))
        return
    step = max(1, _PIECE_ELEMENTS // inner)
    yield from ((slice(start, start + step),) for start in range(0, shape[0], step))
