"""What to watch while distilling: how much probability the support holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack

from opd_kernels._ordering import repeats
from opd_kernels.head import LinearLogits, as_autocast, head_logits, shaped
from opd_kernels.reference import compute_dtype, unpack_bitmap
from opd_kernels.support import TopK

__all__ = ["Stats"]

# Rows are upcast in pieces of this many elements, so that no float32 copy of the logits exists.
_PIECE_ELEMENTS = 1 << 22


# Scale and softcap of a head. Without defaults, which torch.compile would not treat as constants.
Shape = tuple[float, float | None]


class Stats(NamedTuple):
    """Detached per-row tensors (...), 0 in masked rows.

    ``teacher_mass`` and ``student_mass``: what the full distributions softmax(t / T') and
    softmax(z / T) hold on the support, in [0, 1] up to rounding, float32 (float64 of float64). For
    a ``TopK`` teacher the mass is taken at temperature 1, where its ``logsumexp`` is, and NaN
    without one. ``valid_k``: int64, how many entries of the support are present. An id listed twice
    counts twice in ``valid_k`` and once in the masses.

    NaN or +inf anywhere in a row makes its mass NaN, unlike the loss, which only sees the support.
    A student row of only -inf has no distribution, so its mass is NaN.

    The loss does not see ``student_mass``, because both sides are renormalised: watch it.
    """

    teacher_mass: Tensor
    student_mass: Tensor
    valid_k: Tensor


@torch.no_grad()
def measure(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits | TopK,
    support: TopK,
    *,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    limit: int,
    vocab_size: int | None,
    mask: Tensor | None,
    banned: Tensor | None,
) -> Stats:
    """Stats of one call; absent entries of ``support``, the teacher's, are not yet marked."""
    present = (support.ids >= 0) & (support.ids < limit) & (support.logits != -torch.inf)
    ids = torch.where(present, support.ids, 0).long()
    if banned is not None:
        present = present & ~unpack_bitmap(banned, limit)[ids]
    if mask is not None:
        present = present & mask[..., None]
    counted = present & ~repeats(torch.where(present, ids, -1))

    def mass_of(logits: Tensor | LinearLogits, temperature: float | Tensor) -> Tensor:
        if isinstance(logits, LinearLogits):
            return _head_mass(logits, vocab_size, ids, counted, temperature, mask)
        return _mass(logits[..., :vocab_size], ids, counted, temperature, mask)

    if isinstance(teacher, TopK):
        teacher_mass = _given_mass(support.logits, teacher.logsumexp, counted, mask)
    else:
        teacher_mass = mass_of(teacher, teacher_temperature)
    return Stats(teacher_mass, mass_of(student, temperature), present.sum(-1))


def row_logsumexp(
    logits: Tensor,
    width: int,
    mask: Tensor | None,
    shape: Shape | None = None,
) -> Tensor:
    """log sum exp over [0, width) of each row, float32 (float64); 0 in masked rows."""

    def reduce(rows: Tensor) -> Tensor:
        return (rows if shape is None else shaped(rows, *shape)).logsumexp(-1)

    return _reduce_rows(reduce, logits[..., :width], mask)


def _mass(
    logits: Tensor,
    ids: Tensor,
    counted: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    shape: Shape | None = None,
) -> Tensor:
    """What softmax(logits / T) holds on the counted ids of each row."""

    def reduce(rows: Tensor, temperatures: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
        rows = rows if shape is None else shaped(rows, *shape)
        # The maximum is subtracted before dividing: rows / T alone may overflow.
        scaled = rows - rows.amax(-1, keepdim=True)
        # Under vmap a mapped tensor cannot be written into one that is not mapped.
        scaled = scaled / temperatures if _mapped() else scaled.div_(temperatures)
        return torch.where(counted, scaled.softmax(-1).gather(-1, ids), 0).sum(-1)

    return _reduce_rows(reduce, logits, mask, _per_row(temperature, logits), ids, counted)


def _head_mass(
    head: LinearLogits,
    vocab_size: int | None,
    ids: Tensor,
    counted: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
) -> Tensor:
    """``_mass`` of a head's logits, a few rows at a time."""
    rows, (hidden, weight, bias) = head.shape, as_autocast(head.hidden, head.weight, head.bias)
    weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    shape = (head.scale, head.softcap)
    if _mapped():
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return _mass(logits, ids, counted, temperature, mask, shape)
    ids, counted = (entries.reshape(-1, entries.shape[-1]) for entries in (ids, counted))
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(rows).reshape(-1)
    out = hidden.new_zeros(rows.numel(), dtype=compute_dtype(hidden))
    for piece, logits, piece_mask in head_logits(hidden, weight, bias, mask):
        piece_t = temperature[piece] if isinstance(temperature, Tensor) else temperature
        out[piece] = _mass(logits, ids[piece], counted[piece], piece_t, piece_mask, shape)
    return out.view(rows)


def _given_mass(
    values: Tensor, logsumexp: Tensor | None, counted: Tensor, mask: Tensor | None
) -> Tensor:
    """The mass of a given support's values by their full log-sum-exp; NaN without one."""
    dtype = compute_dtype(values)
    if logsumexp is None:
        mass = values.new_full(values.shape[:-1], torch.nan, dtype=dtype)
        return mass if mask is None else mass.masked_fill(~mask, 0)
    shares = (values.to(dtype) - logsumexp[..., None].to(dtype)).exp()
    return torch.where(counted, shares, 0).sum(-1)


def _per_row(temperature: float | Tensor, logits: Tensor) -> Tensor:
    """Temperatures (..., 1) in the dtype of the arithmetic."""
    dtype, rows = compute_dtype(logits), logits.shape[:-1]
    if isinstance(temperature, Tensor):
        return temperature.to(dtype).expand(rows)[..., None]
    return logits.new_ones((), dtype=dtype).mul(temperature).expand(*rows, 1)


def _reduce_rows(
    reduce: Callable[..., Tensor], logits: Tensor, mask: Tensor | None, *per_row: Tensor
) -> Tensor:
    """reduce(rows in the dtype of the arithmetic, *per_row of these rows), piece by piece.

    Masked rows are 0. On the CPU they are not read; elsewhere leaving them out would synchronise.
    Under vmap all rows are one piece: mapped tensors cannot be indexed by a mask or written to.
    """
    if _mapped():
        found = reduce(logits.to(compute_dtype(logits)), *per_row)
        return found if mask is None else found.masked_fill(~mask, 0)
    out = logits.new_zeros(logits.shape[:-1], dtype=compute_dtype(logits))
    kept: Any = ...
    for piece in _pieces(logits.shape):
        if mask is not None and mask.device.type == "cpu" and not torch.compiler.is_compiling():
            kept = mask[piece]
        rows = logits[piece][kept].to(out.dtype)
        out[piece][kept] = reduce(rows, *(tensor[piece][kept] for tensor in per_row))
    return out if mask is None else out.masked_fill(~mask, 0)


def _mapped() -> bool:
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
