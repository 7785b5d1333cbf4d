"""The pipeline of a loss: select the support, gather the student's values, compute the divergence.

The fused operator does all three where both sides are logits and nobody asks for the support.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from opd_kernels import _checks
from opd_kernels._arguments import Allowed
from opd_kernels._autograd import GatherDot, Request, TopKReverseKL
from opd_kernels.backends import plain
from opd_kernels.head import LinearLogits
from opd_kernels.options import Call
from opd_kernels.selection import select
from opd_kernels.support import TopK


class RowLosses(NamedTuple):
    """Per-row losses (...); ids and gradient entries (..., K) of the logits they are computed from.

    ``support`` is the one they are of, if it was asked for.
    """

    loss: Tensor
    ids: Tensor
    entry_grad: Tensor
    support: TopK | None
    allowed: Allowed


def row_losses(
    student: Tensor | LinearLogits,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None,
    call: Call,
    with_support: bool,
    depth: int,
) -> RowLosses:
    """The loss of each row; masked rows have 0. The user's code is ``depth`` frames above."""
    vocab = student.vocab if isinstance(student, LinearLogits) else student.shape[-1]
    device, backend = student.device, call.backend
    k, limit = _support_size(teacher, k, vocab)
    if k == 1:
        _warn_about_one_entry(depth + 3)
    allowed = call.allowed(limit, device)
    if isinstance(teacher, Tensor) and isinstance(student, Tensor) and not with_support:
        request = Request(None, allowed, call.objective, call.inplace, backend)
        loss, ids, entry_grad = TopKReverseKL.apply(student, teacher.detach(), k, request)
        return RowLosses(loss, ids, entry_grad, None, allowed)
    if isinstance(teacher, TopK):
        ids, values = _adjacent(teacher.ids), _adjacent(teacher.logits.detach())
    else:
        ids, values, _ = select(teacher, k, allowed, False, backend)
    if isinstance(student, LinearLogits):
        logits, slots = _gathered(student, ids, values, allowed, backend)
        among_slots = allowed._replace(limit=k, banned=None)
        request = Request(slots, among_slots, call.objective, False, backend)
    else:
        logits = student
        request = Request(ids, allowed, call.objective, call.inplace, backend)
    loss, found, entry_grad = TopKReverseKL.apply(logits, values, k, request)
    support = TopK(ids, values) if with_support else None
    return RowLosses(loss, found, entry_grad, support, allowed)


def check_teacher(
    teacher: object, k: int | None, rows: torch.Size, device: torch.device
) -> Tensor | TopK | LinearLogits:
    """The teacher, once it fits the student's rows and k."""
    if isinstance(teacher, TopK):
        teacher.check()
        shape, tensor = teacher.shape, teacher.ids
    elif isinstance(teacher, LinearLogits):
        shape, tensor = teacher.shape, teacher.hidden
    elif isinstance(teacher, Tensor):
        tensor = _checks.check_logits(teacher, "teacher")
        shape = tensor.shape[:-1]
    else:
        raise TypeError(
            f"teacher is a {type(teacher).__name__}, expected a tensor of logits (..., V), a TopK "
            "or a LinearLogits"
        )
    _checks.check_same_rows(rows, shape)
    _checks.check_same_device(tensor, device, "teacher")
    if isinstance(teacher, TopK):
        _checks.check_k_matches(k, teacher.k)
    elif k is not None:
        _checks.check_k(k, _vocab_of(teacher))
    return teacher


def _vocab_of(teacher: Tensor | LinearLogits) -> int:
    return teacher.vocab if isinstance(teacher, LinearLogits) else teacher.shape[-1]


def _support_size(
    teacher: Tensor | TopK | LinearLogits, k: int | None, vocab: int
) -> tuple[int, int]:
    """(k, limit): entries of a row, and below which ids they are."""
    if isinstance(teacher, TopK):
        return teacher.k, vocab
    teacher_vocab = _vocab_of(teacher)
    k = min(_checks.DEFAULT_K, teacher_vocab) if k is None else k
    return k, min(vocab, teacher_vocab)


def _gathered(
    student: LinearLogits, ids: Tensor, values: Tensor, allowed: Allowed, backend: str
) -> tuple[Tensor, Tensor]:
    """(the student's logits at the ids, their slots)."""
    # An entry of value -inf is absent: its row of the head is not read, and a softcap's slope
    # cannot make its gradient NaN.
    ids = torch.where(values == -torch.inf, -1, ids)
    logits, slots = GatherDot.apply(
        student.hidden, student.weight, student.bias, ids, allowed, backend
    )
    return plain.shaped(logits, student.scale, student.softcap), slots


def _adjacent(entries: Tensor) -> Tensor:
    """K entries per row with last stride 1; a support is small enough to copy."""
    return entries if entries.shape[-1] == 1 or entries.stride(-1) == 1 else entries.contiguous()


def _warn_about_one_entry(stacklevel: int) -> None:
    if torch.compiler.is_compiling():
        return
    warnings.warn(
        "k=1: a support of one entry renormalises to probability 1 on both sides, so the loss and "
        "its gradient are identically 0; use k=2 or more (the paper's is 32)",
        stacklevel=stacklevel,
    )
