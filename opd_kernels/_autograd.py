"""Autograd around the operators: gradients are computed in forward and scattered in backward.

What is kept between them: ids and entry gradients, 8 bytes * N * K (12 in float64), and with
``inplace`` the student logits, whose memory the gradient takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opd_kernels import _ops
from opd_kernels._checks import check_inplace

__all__ = ["TopKReverseKL"]


class _Complete(inspect.BoundArguments):
    """All parameters by position: there is nothing to look up."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012

    def apply_defaults(self) -> None:
        pass


class _Signature(inspect.Signature):
    def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        if kwargs or len(args) != len(self.parameters):
            return super().bind(*args, **kwargs)
        bound = _Complete(self, dict(zip(self.parameters, args, strict=True)))
        bound.args = args
        return bound


def _signed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Spares ``Function.apply`` to inspect and bind the signature anew at every call: 30 µs."""
    parameters = inspect.signature(forward).parameters.values()
    forward.__signature__ = _Signature(list(parameters))  # type: ignore[attr-defined]
    return forward


class TopKReverseKL(torch.autograd.Function):
    """Per-row renormalised reverse KL over the teacher's top-K support.

    ``apply`` returns ``(loss, ids, entry_grad)``: loss (...) with a gradient for ``student``, and
    the constant support ids and gradient entries (..., K). ``anchor`` is an empty tensor that
    depends on the student, see ``anchor_of``; it ties a second differentiation to the refusal.
    """

    @staticmethod
    @_signed
    def forward(
        student: Tensor,
        anchor: Tensor,
        teacher: Tensor,
        teacher_ids: Tensor | None,
        mask: Tensor | None,
        row_temperature: Tensor | None,
        row_teacher_temperature: Tensor | None,
        banned: Tensor | None,
        temperature: float,
        teacher_temperature: float,
        k: int,
        limit: int,
        inplace: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the fused operator."""
        return _ops.divergence(
            student,
            teacher,
            teacher_ids,
            k,
            limit,
            banned,
            mask,
            temperature,
            row_temperature,
            teacher_temperature,
            row_teacher_temperature,
            backend,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps (ids, entry gradients), never anything (N, V) unless in place."""
        student, anchor, *_, inplace, backend = inputs
        _, ids, entry_grad = output
        if inplace:
            check_inplace(student)
        ctx.mark_non_differentiable(ids, entry_grad)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids, entry_grad, anchor, student if inplace else None)
        ctx.width, ctx.dtype, ctx.backend = student.shape[-1], student.dtype, backend

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """The dense gradient for ``student``, None for everything else."""
        if upstream is None or not ctx.needs_input_grad[0]:
            return (None,) * 14
        ids, entry_grad, anchor, student = ctx.saved_tensors
        grad = _ScatterGradient.apply(
            upstream, entry_grad, ids, anchor, student, ctx.width, ctx.dtype, ctx.backend
        )
        return (grad, *(None,) * 13)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, tuple[int, ...]]:
        """A mapped dimension is one more leading dimension."""
        if in_dims[7] is not None:
            raise ValueError("banned_ids cannot be mapped by vmap; pass one list for all")
        rows = [_leading(arg, dim, info) for arg, dim in zip(args[:7], in_dims[:7], strict=True)]
        return TopKReverseKL.apply(*rows, *args[7:]), (0, 0, 0)


class _ScatterGradient(torch.autograd.Function):
    """Backward of ``TopKReverseKL`` as a Function, so that differentiating it again raises."""

    @staticmethod
    @_signed
    def forward(
        upstream: Tensor,
        entry_grad: Tensor,
        ids: Tensor,
        anchor: Tensor,
        student: Tensor | None,
        width: int,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        if student is None:
            return _ops.scatter(entry_grad, ids, upstream, width, dtype, backend)
        grad = student.detach()
        _ops.scatter_(grad, entry_grad, ids, upstream, backend)
        return grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "topk_rkl cannot be differentiated twice: its gradient is computed in forward and held "
            "constant; where a second derivative is needed, build the loss from torch.topk, gather "
            "and log_softmax"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        if args[4] is not None:
            raise ValueError("inplace_grad=True does not work under vmap; pass inplace_grad=False")
        rows = [_leading(arg, dim, info) for arg, dim in zip(args[:4], in_dims[:4], strict=True)]
        return _ScatterGradient.apply(*rows, *args[4:]), 0


def anchor_of(student: Tensor) -> Tensor:
    """An empty tensor that depends on the student in the graph but does not share its memory.

    A second differentiation has to reach ``_ScatterGradient`` through the student; a slice saved
    for backward would do that too, but would keep the logits alive.
    """
    return student[..., :0].clone()


def _leading(arg: Tensor | None, dim: int | None, info: Any) -> Tensor | None:
    """The mapped dimension moved to the front, or added there without a copy."""
    if arg is None:
        return None
    if dim is None:
        return arg.expand(info.batch_size, *arg.shape)
    return arg.movedim(dim, 0)
