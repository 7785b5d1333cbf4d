"""What to watch while distilling: how much probability the support holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opd_kernels.reference import compute_dtype
from opd_kernels.support import TopK

__all__ = ["Stats"]

# Rows are upcast in pieces of this many elements, so that no float32 copy of the logits exists.
_CHUNK_ELEMENTS = 1 << 22


class Stats(NamedTuple):
    """Detached per-row tensors (...), 0 in masked rows.

    ``teacher_mass`` and ``student_mass``: what the full distributions softmax(t / T') and
    softmax(z / T) hold on the support, in [0, 1] up to rounding. For a ``TopK`` teacher the mass is
    taken at temperature 1, where its ``logsumexp`` is, and NaN without one. ``valid_k``: int64, how
    many entries of the support are present. An id listed twice counts once in the masses.

    The renormalised objective leaves ``student_mass`` free: watch it.
    """

    teacher_mass: Tensor
    student_mass: Tensor
    valid_k: Tensor


@torch.no_grad()
def measure(
    student: Tensor,
    teacher: Tensor | TopK,
    support: TopK,
    *,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    limit: int,
    vocab_size: int | None,
    mask: Tensor | None,
    banned: Tensor | None,
) -> Stats:
    """Stats of one call; ``support`` is the teacher's, before absent entries are told apart."""
    present = (support.ids >= 0) & (support.ids < limit) & (support.logits != -torch.inf)
    if banned is not None:
        ids = torch.where(present, support.ids, 0).long()
        present &= ((banned[ids // 8] >> (ids % 8).to(torch.uint8)) & 1) == 0
    if mask is not None:
        present &= mask[..., None]
    unique = present & ~_repeats(torch.where(present, support.ids, -1))
    ids = torch.where(present, support.ids, 0).long()

    dtype = compute_dtype(student)
    student_width = student.shape[-1] if vocab_size is None else min(student.shape[-1], vocab_size)
    student_mass = _mass(
        student.gather(-1, ids).to(dtype),
        unique,
        temperature,
        row_logsumexp(student, temperature, student_width, mask),
    )
    if isinstance(teacher, TopK):
        logsumexp, teacher_temperature = teacher.logsumexp, 1.0
    else:
        width = teacher.shape[-1] if vocab_size is None else min(teacher.shape[-1], vocab_size)
        logsumexp = row_logsumexp(teacher, teacher_temperature, width, mask)
    if logsumexp is None:
        teacher_mass = torch.full_like(student_mass, torch.nan)
        if mask is not None:
            teacher_mass = teacher_mass.masked_fill(~mask, 0)
    else:
        teacher_mass = _mass(support.logits, unique, teacher_temperature, logsumexp)
    return Stats(teacher_mass, student_mass, present.sum(-1))


def row_logsumexp(
    logits: Tensor, temperature: float | Tensor, width: int, mask: Tensor | None
) -> Tensor:
    """log sum exp(logits / T) over [0, width) of each row, float32 (float64); 0 in masked rows."""
    dtype = compute_dtype(logits)
    rows = logits[..., :width]
    out = torch.zeros(rows.shape[:-1], dtype=dtype, device=logits.device)
    if rows.numel() == 0:
        return out
    per_row = isinstance(temperature, Tensor)
    temperatures = (
        temperature.expand(out.shape)
        if isinstance(temperature, Tensor)
        else out.new_tensor(temperature).expand(out.shape)
    )
    del per_row
    if rows.ndim == 1:
        piece = rows.to(dtype) / temperatures
        out = torch.logsumexp(piece, -1)
    else:
        step = max(1, _CHUNK_ELEMENTS // (rows[0].numel()))
        for start in range(0, rows.shape[0], step):
            piece = rows[start : start + step].to(dtype)
            piece = piece / temperatures[start : start + step, ..., None].to(dtype)
            out[start : start + step] = torch.logsumexp(piece, -1)
    return out if mask is None else out.masked_fill(~mask, 0)


def _mass(
    values: Tensor, counted: Tensor, temperature: float | Tensor, logsumexp: Tensor
) -> Tensor:
    """Sum over the counted entries of exp(value / T - logsumexp)."""
    if isinstance(temperature, Tensor):
        temperature = temperature[..., None]
    probabilities = (values / temperature - logsumexp[..., None]).exp()
    return torch.where(counted, probabilities, 0).sum(-1)


def _repeats(ids: Tensor) -> Tensor:
    """True at every later occurrence of an id in its row."""
    ordered, order = torch.sort(ids, dim=-1, stable=True)
    repeat = torch.zeros_like(ordered, dtype=torch.bool)
    repeat[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return torch.empty_like(repeat).scatter_(-1, order, repeat)
