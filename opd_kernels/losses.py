"""``topk_rkl``: validate, call the operator row by row, reduce."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from opd_kernels import _checks, _ops, debugging
from opd_kernels import stats as _stats
from opd_kernels._autograd import TopKReverseKL, anchor_of
from opd_kernels.backends import AUTO
from opd_kernels.head import LinearLogits
from opd_kernels.selection import ban_bitmap, bool_mask, recordable
from opd_kernels.stats import Stats
from opd_kernels.support import TopK

__all__ = ["topk_rkl"]

DEFAULT_K = 32  # arXiv 2603.25562


@overload
def topk_rkl(
    student_logits: Tensor,
    teacher: Tensor | TopK,
    k: int | None = None,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    banned_ids: Sequence[int] | Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    inplace_grad: bool = False,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def topk_rkl(
    student_logits: Tensor,
    teacher: Tensor | TopK,
    k: int | None = None,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    banned_ids: Sequence[int] | Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    inplace_grad: bool = False,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Stats]: ...


def topk_rkl(
    student_logits: Tensor,
    teacher: Tensor | TopK,
    k: int | None = None,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    banned_ids: Sequence[int] | Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    inplace_grad: bool = False,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Stats]:
    """Renormalised reverse KL of the student to the teacher on the teacher's top-K support.

    With student logits z, teacher logits t and S the teacher's k best allowed ids of a row::

        p = softmax(z[S] / T)    q = softmax(t[S] / T')    L = sum over S of p (log p - log q)
        dL/dz_v = p_v (log p_v - log q_v - L) / T  for v in S, 0 elsewhere

    Shapes and dtypes: ``student_logits`` (..., V) and ``teacher``, either logits (..., V_t) or a
    ``TopK`` (..., K), with the same leading shape: one row per token, no causal shift inside.
    float16, bfloat16, float32 or float64; leading dimensions may have any strides, the last must
    have stride 1. Arithmetic is float32 (float64 where an input is); the loss is float32 (float64).

    Args:
        student_logits: what gets the gradient.
        teacher: constant; its logits, or a support that was selected before or by a server.
        k: size of the support; 32 for logits (the paper's), the width of a ``TopK``.
        temperature: T, divides both sides' logits; a float or a constant tensor per row. There is
            no T squared factor. A float outside (0, inf) raises; in a tensor, and under
            ``torch.compile``, where checking would synchronise or recompile, it makes NaN.
        teacher_temperature: T' where the teacher's differs.
        mask: bool or integer per row; False or 0: the row has loss 0 and gradient 0, whatever it
            holds, and kernels do not read it.
        weight: floating factor per row, multiplies the loss; differentiable.
        banned_ids: ids that never enter the support, a sequence or an int tensor on the device.
        vocab_size: only ids below it can enter the support; for padded vocabularies.
        reduction: "none" gives the loss per row, "sum", or "mean", which divides by ``normalizer``
            or, without one, by the number of unmasked rows (at least 1), not by the weights' sum.
        normalizer: a number or 0-d tensor, for instance the global token count. Its value is not
            looked at: clamp a count that may be 0.
        inplace_grad: let backward write the gradient into the memory of ``student_logits``, whose
            values are gone then. Another function of the logits whose backward needs their values
            afterwards gets PyTorch's error about in-place modification. Refused for leaves, views
            of leaves and rows that overlap. A compiled function plans memory itself: no effect
            there.
        return_stats: also return ``Stats``: full softmaxes in plain PyTorch, many times the cost of
            the loss, so not for every step.
        backend: "cpu", "triton" or "reference"; None picks the best for the device. One that is
            named is used or raises.

    Gradients: ``student_logits`` (in its dtype) and ``weight``. Kept for backward: 8 bytes per row
    and entry; the logits only with ``inplace_grad``. Differentiating twice raises ``RuntimeError``.

    Absent entries (id -1, outside the vocabulary, banned, or teacher -inf) take no part. A student
    value of -inf has p = 0. NaN or +inf at an entry that takes part makes its row NaN and no other.
    The loss is never clamped: rounding may make it about -1e-7.

    Errors: ``ValueError`` or ``TypeError`` for shapes, devices, dtypes and values that are not
    allowed, ``ValueError`` for DTensors. k = 1 warns: one renormalised entry has loss and gradient
    0. Values of tensors are not looked at, but for ``OPD_KERNELS_DEBUG=1`` or ``debug()``, which
    raise with the first bad row.

    Example::

        logits = student(input_ids).logits                      # (B, T, V)
        with torch.no_grad():
            teacher_logits = teacher(input_ids).logits
        mask = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))  # position t predicts t + 1
        loss = topk_rkl(logits, teacher_logits, k=32, mask=mask)
        loss.backward()

    Source: arXiv 2603.25562, teacher top-K local support matching.
    """
    _checks.check_logits(student_logits, "student_logits")
    _checks.check_vocab_size(vocab_size)
    _checks.check_flag(inplace_grad, "inplace_grad")
    _checks.check_flag(return_stats, "return_stats")
    _checks.check_backend(backend)
    rows, device = student_logits.shape[:-1], student_logits.device
    backend = AUTO if backend is None else backend
    if isinstance(teacher, TopK):
        values, ids, k, limit = given_support(teacher, k, rows, student_logits.shape[-1], device)
    else:
        values, ids = teacher_logits(teacher, rows, device), None
        k, limit = support_size(k, student_logits.shape[-1], values.shape[-1])
    if vocab_size is not None:
        limit = min(limit, vocab_size)
    mask = bool_mask(mask, rows, device)
    if teacher_temperature is None:
        teacher_temperature = temperature
    call = Call(
        rows, device, k, mask, temperature, teacher_temperature, weight, reduction, normalizer
    )
    banned = None if banned_ids is None else ban_bitmap(banned_ids, limit, device)
    if return_stats and ids is None:
        # Statistics need the support: select it first, then use it as a given one.
        ids, values = _ops.select(values, k, limit, banned, mask, backend)
    inplace = inplace_grad and not torch.compiler.is_compiling()
    loss = call.loss(student_logits, values, ids, limit, banned, inplace, backend)
    if ids is None or not return_stats:
        return loss
    stats = _stats.measure(
        student_logits.detach(),
        teacher,
        TopK(ids, values),
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        limit=limit,
        vocab_size=vocab_size,
        mask=mask,
        banned=banned,
    )
    return loss, stats


class Call:
    """The options of a loss, besides student and teacher: checked, in the operators' form."""

    def __init__(
        self,
        rows: torch.Size,
        device: torch.device,
        k: int,
        mask: Tensor | None,
        temperature: float | Tensor,
        teacher_temperature: float | Tensor,
        weight: Tensor | None,
        reduction: str,
        normalizer: float | Tensor | None,
    ) -> None:
        _checks.check_reduction(reduction, normalizer, device)
        if k == 1:
            _warn_about_one_entry()
        if weight is not None:
            _checks.check_weight(weight, rows, device)
        self._student_t = _temperature(temperature, rows, device, "temperature")
        self._teacher_t = _temperature(teacher_temperature, rows, device, "teacher_temperature")
        self._k, self._mask, self._weight = k, mask, weight
        self._reduction, self._normalizer = reduction, normalizer
        if debugging.on_outside_of_operators():
            debugging.check_call(temperature, teacher_temperature, weight, normalizer, mask)

    def loss(
        self,
        student: Tensor,
        values: Tensor,
        ids: Tensor | None,
        limit: int,
        banned: Tensor | None,
        inplace: bool,
        backend: str,
    ) -> Tensor:
        """The reduced loss of a student's logits to a teacher's, or to its values at ``ids``."""
        (student_t, student_ts), (teacher_t, teacher_ts) = self._student_t, self._teacher_t
        loss, _, _ = TopKReverseKL.apply(
            student,
            anchor_of(student),
            values,
            ids,
            self._mask,
            student_ts,
            teacher_ts,
            banned,
            student_t,
            teacher_t,
            self._k,
            limit,
            inplace,
            backend,
        )
        return reduce_rows(loss, self._weight, self._mask, self._reduction, self._normalizer)


def given_support(
    teacher: TopK, k: int | None, rows: torch.Size, vocab: int, device: torch.device
) -> tuple[Tensor, Tensor, int, int]:
    """(values, ids, k, limit) of a ``TopK`` teacher."""
    teacher.check()
    _checks.check_same_rows(rows, teacher.shape)
    _checks.check_same_device(teacher.ids, device, "teacher")
    _checks.check_k_matches(k, teacher.k)
    return _adjacent(teacher.logits.detach()), _adjacent(teacher.ids), teacher.k, vocab


def teacher_logits(teacher: object, rows: torch.Size, device: torch.device) -> Tensor:
    """The teacher's logits, checked and detached."""
    if isinstance(teacher, LinearLogits):
        raise TypeError(
            "teacher is a LinearLogits, which linear_topk_rkl takes; for a student that is logits "
            "pass select_topk(teacher, k)"
        )
    if not isinstance(teacher, Tensor):
        raise TypeError(
            f"teacher is a {type(teacher).__name__}, expected a tensor of logits (..., V), a TopK "
            "or, for linear_topk_rkl, a LinearLogits"
        )
    logits = _checks.check_logits(teacher, "teacher").detach()
    _checks.check_same_rows(rows, logits.shape[:-1])
    _checks.check_same_device(logits, device, "teacher")
    return logits


def support_size(k: int | None, vocab: int, teacher_vocab: int) -> tuple[int, int]:
    """(k, limit) of a support that is selected from logits; only ids below ``limit`` are."""
    k = min(DEFAULT_K, teacher_vocab) if k is None else k
    _checks.check_k(k, teacher_vocab)
    return k, min(vocab, teacher_vocab)


def _warn_about_one_entry() -> None:
    if torch.compiler.is_compiling():
        return
    warnings.warn(
        "k=1: a support of one entry renormalises to probability 1 on both sides, so the loss and "
        "its gradient are identically 0; use k=2 or more (the paper's is 32)",
        stacklevel=4,
    )


def _adjacent(entries: Tensor) -> Tensor:
    """K entries per row with last stride 1; a support is small enough to copy."""
    return entries if entries.shape[-1] == 1 or entries.stride(-1) == 1 else entries.contiguous()


def _temperature(
    temperature: float | Tensor, rows: torch.Size, device: torch.device, name: str
) -> tuple[float, Tensor | None]:
    """(float, per-row tensor or None) as the operator takes it."""
    if isinstance(temperature, Tensor):
        _checks.check_temperature_tensor(temperature, rows, device, name)
        return 1.0, _allowed_or_nan(temperature).expand(rows)
    _checks.check_number(temperature, name)
    if torch.compiler.is_compiling():
        # torch.compile guards on the value of an operator's float argument, so a schedule would
        # recompile at every step. A float in plain arithmetic becomes an input of the graph.
        tensor = torch.ones((), dtype=torch.float64, device=device) * temperature
        return 1.0, _allowed_or_nan(tensor).expand(rows)
    _checks.check_temperature_value(temperature, name)
    return float(temperature), None


def _allowed_or_nan(temperature: Tensor) -> Tensor:
    """NaN, and so a NaN loss, where the temperature is not allowed: no check has seen its value."""
    if temperature.dtype != torch.float64:  # the bounds are float32's
        temperature = temperature.float()
    allowed = (temperature >= _checks.LEAST_TEMPERATURE) & (
        temperature <= _checks.LARGEST_TEMPERATURE
    )
    return torch.where(allowed, temperature, torch.nan)


def reduce_rows(
    loss: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
) -> Tensor:
    """Weights and reduces per-row losses. Masked rows stay exactly 0, whatever their weight."""
    if weight is not None:
        loss = loss * recordable(weight).to(loss.dtype)
        if mask is not None:
            loss = torch.where(mask, loss, 0)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    if isinstance(normalizer, Tensor):
        return total / recordable(normalizer).to(total.dtype)
    if normalizer is not None:
        return total / float(normalizer)  # an int may be beyond int64
    return total / (max(loss.numel(), 1) if mask is None else mask.sum().clamp(min=1))
