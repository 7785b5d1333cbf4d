"""``EntryGradient``: the loss's gradient as its K entries a row, for another loss's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from typing_extensions import Unpack

from opd_kernels import _checks, _ops, debugging
from opd_kernels.api import spelled
from opd_kernels.entries import check_teacher, row_losses
from opd_kernels.head import LinearLogits
from opd_kernels.options import Options, RowOptions, backend_name, check_names, resolve
from opd_kernels.support import TopK

__all__ = ["EntryGradient"]


@dataclass(frozen=True, eq=False)
class EntryGradient:
    """The gradient of a top-K loss: K entries of each row, 0 elsewhere.

    With g the derivative of the total by the loss of a row::

        dL/dz[id_j] = g entry_grad_j    for every present entry j of a row

    ``EntryGradient.of`` computes one; ``ids`` and ``entry_grad`` are what ``TopKReverseKL.apply``
    returns besides the loss.

    It is for a trainer that makes the dense gradient of another loss itself, in an autograd
    Function of its own or from detached logits. In all other cases add the losses and let autograd
    add the gradients.

    Shapes and dtypes: ``ids`` int32 and ``entry_grad`` float32 or float64, both (..., K). Entries
    whose id is -1 or outside [0, V) are ignored, even if their factor is NaN. All other ids of a
    row must be different, as those of ``of`` are. If a row repeats an id, parts of its gradient may
    be lost.

    Gradients: none, and no argument may require one. Memory: at most copies of (..., K).

    Errors: ``ValueError`` for shapes, devices and strides that do not fit, rows that overlap,
    arguments that require grad, a backend that cannot serve the call; ``TypeError`` for dtypes.

    Example::

        logits = torch.randn(8, 1000)
        labels, teacher_logits = torch.randint(1000, (8,)), torch.randn(8, 1000)
        grad = logits.softmax(-1)
        grad[torch.arange(8), labels] -= 1  # of the cross entropy, summed over the rows
        losses, gradient = EntryGradient.of(logits, teacher_logits, 32)
        gradient.add_to_(grad)

    Source: arXiv 2603.25562, teacher top-K local support matching; the gradient of its loss.
    """

    ids: Tensor
    entry_grad: Tensor

    @staticmethod
    def of(
        student: Tensor,
        teacher: Tensor | TopK | LinearLogits,
        k: int | None = None,
        **options: Unpack[RowOptions],
    ) -> tuple[Tensor, EntryGradient]:
        """(loss of each row, its gradient) of ``topk_rkl``, whose arguments it takes.

        ``student`` is logits. The losses carry no gradient. What multiplies or reduces losses
        belongs into ``upstream``: weight, reduction and normalizer are refused, and so is
        inplace_grad.
        """
        student = _checks.check_logits(student, "student")
        check_names(options, "EntryGradient.of", RowOptions)
        rows, device = student.shape[:-1], student.device
        checked = check_teacher(teacher, k, rows, device)
        call = resolve(cast(Options, options), rows, device)
        losses = row_losses(student.detach(), checked, k, call, depth=1)
        return losses.loss, EntryGradient(losses.ids, losses.entry_grad)

    def add_to_(
        self, grad: Tensor, upstream: Tensor | None = None, *, backend: str | None = None
    ) -> Tensor:
        """Adds it to a dense gradient in place, without a second (N, V); returns ``grad``.

        ``grad`` (..., V), float16, bfloat16, float32 or float64, any leading strides, last stride
        1; ``upstream``, g, floating, one per row (...), or None for ones. Only K elements of each
        row are read and written. The sum is computed in float32 (float64 where ``grad`` or
        ``entry_grad`` is) and rounded once to the dtype of ``grad``. ``backend`` is as for
        ``topk_rkl``. Autograd is told that ``grad`` has changed.
        """
        grad = _checks.check_buffer(grad)
        upstream, backend = self._checked(grad, "grad", upstream, backend)
        _ops.scatter_add_(grad, self.entry_grad, self.ids, upstream, backend)
        return grad

    def dense(
        self,
        vocab_size: int,
        dtype: torch.dtype = torch.float32,
        upstream: Tensor | None = None,
        *,
        backend: str | None = None,
    ) -> Tensor:
        """The gradient (..., vocab_size), rounded once to ``dtype``; the rest is as ``add_to_``."""
        _checks.check_int(vocab_size, "vocab_size")
        _checks.check_vocab_size(vocab_size)
        if dtype not in _checks.LOGIT_DTYPES:
            allowed = ", ".join(str(some).removeprefix("torch.") for some in _checks.LOGIT_DTYPES)
            raise TypeError(f"dtype is {dtype}, allowed are {allowed}")
        upstream, backend = self._checked(self.ids, "ids", upstream, backend)
        if debugging.on_outside_of_operators():
            known = f"vocab_size is {vocab_size}"
            debugging.check_scatter(vocab_size, known, self.entry_grad, self.ids, upstream)
        return _ops.scatter(self.entry_grad, self.ids, upstream, vocab_size, dtype, backend)

    def _checked(
        self, rows: Tensor, name: str, upstream: Tensor | None, backend: str | None
    ) -> tuple[Tensor, str]:
        """(upstream, the backend's name), once everything fits ``rows`` (..., any), so named."""
        ids = _checks.check_entries(self.ids, "ids", rows, name)
        entry_grad = _checks.check_entries(self.entry_grad, "entry_grad", rows, name)
        _checks.check_same_entries(ids, entry_grad)
        if upstream is None:
            upstream = entry_grad.new_ones(ids.shape[:-1])
        else:
            upstream = _checks.check_upstream(upstream, rows, name)
        return upstream, backend_name(backend)


torch.serialization.add_safe_globals([EntryGradient])
EntryGradient.of.__signature__ = spelled(EntryGradient.of, RowOptions)  # type: ignore[attr-defined]
