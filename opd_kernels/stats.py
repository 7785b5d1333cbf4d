"""What to watch while distilling: how much probability the support holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opd_kernels._arguments import Allowed, Objective, Temperature, compute_dtype, unpack_bitmap
from opd_kernels._ordering import repeats
from opd_kernels.backends import plain
from opd_kernels.head import LinearLogits, as_autocast
from opd_kernels.support import TopK

__all__ = ["Stats"]


class Stats(NamedTuple):
    """Detached per-row tensors (...), 0 in masked rows.

    ``teacher_mass`` and ``student_mass``: what the full distributions softmax(t / T') and
    softmax(z / T) hold on the support, in [0, 1] up to rounding, float32 (float64 of float64). For
    a ``TopK`` teacher the mass is taken at its own ``temperature``, that of its ``logsumexp``, and
    NaN without one. ``valid_k``: int64, how many entries of the support are present. An id listed
    twice counts twice in ``valid_k`` and once in the masses.

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
    allowed: Allowed,
    objective: Objective,
    vocab_size: int | None,
) -> Stats:
    """Stats of one call; absent entries of ``support``, the teacher's, are not yet marked.

    The full distributions run over the first ``vocab_size`` ids of their own side, or all.
    """
    limit, banned, mask = allowed
    present = (support.ids >= 0) & (support.ids < limit) & (support.logits != -torch.inf)
    ids = torch.where(present, support.ids, 0).long()
    if banned is not None:
        present = present & ~unpack_bitmap(banned, limit)[ids]
    if mask is not None:
        present = present & mask[..., None]
    counted = present & ~repeats(torch.where(present, ids, -1))

    def mass_of(logits: Tensor | LinearLogits, temperature: Temperature) -> Tensor:
        if isinstance(logits, LinearLogits):
            return _head_mass(logits, vocab_size, ids, counted, temperature, mask)
        return _mass(logits[..., :vocab_size], ids, counted, temperature, mask)

    if isinstance(teacher, TopK):
        scaled = support.logits / teacher.temperature
        teacher_mass = _given_mass(scaled, teacher.logsumexp, counted, mask)
    else:
        teacher_mass = mass_of(teacher, objective.teacher_temperature)
    return Stats(teacher_mass, mass_of(student, objective.temperature), present.sum(-1))


def _mass(
    logits: Tensor,
    ids: Tensor,
    counted: Tensor,
    temperature: Temperature,
    mask: Tensor | None,
    shape: plain.Shape | None = None,
) -> Tensor:
    """What softmax(logits / T) holds on the counted ids of each row."""

    def reduce(rows: Tensor, temperatures: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
        rows = rows if shape is None else plain.shaped(rows, *shape)
        # The maximum is subtracted before dividing: rows / T alone may overflow.
        scaled = rows - rows.amax(-1, keepdim=True)
        # Under vmap a mapped tensor cannot be written into one that is not mapped.
        scaled = scaled / temperatures if plain.mapped() else scaled.div_(temperatures)
        return torch.where(counted, scaled.softmax(-1).gather(-1, ids), 0).sum(-1)

    return plain.reduce_rows(reduce, logits, mask, _per_row(temperature, logits), ids, counted)


def _head_mass(
    head: LinearLogits,
    vocab_size: int | None,
    ids: Tensor,
    counted: Tensor,
    temperature: Temperature,
    mask: Tensor | None,
) -> Tensor:
    """``_mass`` of a head's logits, a few rows at a time."""
    rows, (hidden, weight, bias) = head.shape, as_autocast(head.hidden, head.weight, head.bias)
    weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    shape = (head.scale, head.softcap)
    if plain.mapped():
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return _mass(logits, ids, counted, temperature, mask, shape)
    ids, counted = (entries.reshape(-1, entries.shape[-1]) for entries in (ids, counted))
    value, values = temperature
    values = None if values is None else values.reshape(-1)
    out = hidden.new_zeros(rows.numel(), dtype=compute_dtype(hidden))
    for piece, logits, piece_mask in plain.head_logits(hidden, weight, bias, mask):
        some = Temperature(value, None if values is None else values[piece])
        out[piece] = _mass(logits, ids[piece], counted[piece], some, piece_mask, shape)
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


def _per_row(temperature: Temperature, logits: Tensor) -> Tensor:
    """Temperatures (..., 1) in the dtype of the arithmetic."""
    dtype = compute_dtype(logits)
    if temperature.rows is not None:
        return temperature.rows.to(dtype)[..., None]
    return logits.new_ones((), dtype=dtype).mul(temperature.value).expand(*logits.shape[:-1], 1)
