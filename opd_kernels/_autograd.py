"""Autograd around the operators: gradients are computed in forward and scattered in backward.

Kept for backward: ids and entry gradients, 8 bytes * N * K (12 in float64). With ``inplace`` also
the student logits, because the gradient takes their memory. For hidden states and a head,
``GatherDot`` computes the K logits of a row first.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opd_kernels import _ops
from opd_kernels._checks import check_inplace
from opd_kernels._ops import leading

__all__ = ["GatherDot", "TopKReverseKL"]

_TWICE = (
    "{} cannot be differentiated twice: its gradient is computed in forward and held constant; "
    "where a second derivative is needed, build the loss from torch.topk, gather and log_softmax"
)


class _Complete(inspect.BoundArguments):
    """Bound arguments that were all given by position, so that no default is missing."""

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
    """Caches the signature: ``Function.apply`` would inspect and bind it at every call, 30 µs."""
    parameters = inspect.signature(forward).parameters.values()
    forward.__signature__ = _Signature(list(parameters))  # type: ignore[attr-defined]
    return forward


class TopKReverseKL(torch.autograd.Function):
    """Per-row renormalised reverse KL over the teacher's top-K support.

    ``apply`` returns ``(loss, ids, entry_grad)``: loss (...) with a gradient for ``student``, and
    the constant support ids and gradient entries (..., K). ``anchor`` is ``anchor_of(student)``:
    through it a second differentiation reaches the Function that refuses it.
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
        return (grad, _anchors_gradient(anchor), *(None,) * 12)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, tuple[int, ...]]:
        """A mapped dimension is one more leading dimension."""
        if in_dims[7] is not None:
            raise ValueError("banned_ids cannot be mapped by vmap; pass one list for all")
        rows = [leading(arg, dim, info) for arg, dim in zip(args[:7], in_dims[:7], strict=True)]
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
        raise RuntimeError(_TWICE.format("topk_rkl"))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        if args[4] is not None:
            raise ValueError("inplace_grad=True does not work under vmap; pass inplace_grad=False")
        rows = [leading(arg, dim, info) for arg, dim in zip(args[:4], in_dims[:4], strict=True)]
        return _ScatterGradient.apply(*rows, *args[4:]), 0


class GatherDot(torch.autograd.Function):
    """A head's logits at a few ids of each row: z_k = W[id_k] . h + b[id_k].

    ``apply`` returns ``(logits, slots)``, (..., K) each: logits with gradients for ``hidden``,
    ``weight`` and ``bias``, each computed only if it is needed. Slot k is k, or -1 where id k takes
    no part; slots are constant. Kept for backward, without a copy: the ids, ``hidden`` if the
    weight needs a gradient, ``weight`` if the hidden states do.
    """

    @staticmethod
    @_signed
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        mask: Tensor | None,
        banned: Tensor | None,
        limit: int,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """Runs the operator."""
        return _ops.gather_dot(hidden, weight, bias, ids, limit, banned, mask, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps references to inputs."""
        hidden, weight, bias, ids, *_, backend = inputs
        for_hidden, for_weight, *_ = ctx.needs_input_grad
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids, hidden if for_weight else None, weight if for_hidden else None)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.vocab, ctx.backend = weight.shape[0], backend

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Gradients for hidden, weight and bias; None where none is needed."""
        grads: list[Tensor | None] = [None] * 8
        if upstream is None:
            return tuple(grads)
        ids, hidden, weight = ctx.saved_tensors
        for_hidden, for_weight, for_bias, *_ = ctx.needs_input_grad
        if for_hidden:
            grads[0] = _HiddenGradient.apply(upstream, ids, weight, ctx.dtypes[0], ctx.backend)
        if for_weight:
            grads[1] = _WeightGradient.apply(
                upstream, ids, hidden, ctx.vocab, ctx.dtypes[1], ctx.backend
            )
        if for_bias:  # the bias is the weight of an input that is 1
            ones = upstream.new_ones((*ids.shape[:-1], 1))
            bias_grad = _WeightGradient.apply(
                upstream, ids, ones, ctx.vocab, ctx.dtypes[2], ctx.backend
            )
            grads[2] = bias_grad.squeeze(-1)
        return tuple(grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, tuple[int, ...]]:
        """A mapped dimension is one more leading dimension."""
        if any(dim is not None for dim in (*in_dims[1:3], in_dims[5])):
            raise ValueError(
                "student_weight, student_bias and banned_ids cannot be mapped by vmap; pass one "
                "for all"
            )
        hidden, ids, mask = (leading(args[i], in_dims[i], info) for i in (0, 3, 4))
        return GatherDot.apply(hidden, *args[1:3], ids, mask, *args[5:]), (0, 0)


class _HiddenGradient(torch.autograd.Function):
    """dL/dh in the backward of ``GatherDot``; a Function, so that differentiating it raises."""

    @staticmethod
    @_signed
    def forward(
        upstream: Tensor, ids: Tensor, weight: Tensor, dtype: torch.dtype, backend: str
    ) -> Tensor:
        return _ops.gather_dot_hidden(upstream, ids, weight, dtype, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(_TWICE.format("linear_topk_rkl"))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        rows = [leading(arg, dim, info) for arg, dim in zip(args[:2], in_dims[:2], strict=True)]
        return _HiddenGradient.apply(*rows, *args[2:]), 0


class _WeightGradient(torch.autograd.Function):
    """dL/dW in the backward of ``GatherDot``; a Function, so that differentiating it raises."""

    @staticmethod
    @_signed
    def forward(
        upstream: Tensor, ids: Tensor, hidden: Tensor, vocab: int, dtype: torch.dtype, backend: str
    ) -> Tensor:
        return _ops.gather_dot_weight(upstream, ids, hidden, vocab, dtype, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(_TWICE.format("linear_topk_rkl"))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        rows = [leading(arg, dim, info) for arg, dim in zip(args[:3], in_dims[:3], strict=True)]
        examples = zip(*(row.unbind(0) for row in rows), strict=True)
        return torch.stack([_WeightGradient.apply(*row, *args[3:]) for row in examples]), 0


def _anchors_gradient(anchor: Tensor) -> Tensor | None:
    """None; zeros where compiled autograd runs an eager graph, which cannot add None.

    Zeros cost a pass over the student's gradient, so only that case gets them.
    """
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiled is None or not compiled.in_compiled_autograd_region:
        return None
    return anchor.new_zeros(anchor.shape)


def anchor_of(student: Tensor) -> Tensor:
    """An empty tensor that depends on the student in the graph but does not share its memory.

    A second differentiation has to reach ``_ScatterGradient`` through the student. A slice saved
    for backward would do that too, but it would keep the logits alive.
    """
    return student[..., :0].clone()
