"""Autograd around the operators: gradients are computed in forward and scattered in backward.

Kept for backward: ids and entry gradients, 8 bytes * N * K (12 in float64). With ``inplace`` also
the student logits, because the gradient takes their memory. For hidden states and a head,
``GatherDot`` computes the K logits of a row first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_kernels import _ops
from opd_kernels._arguments import Allowed, Background, Objective, Tails, Temperature
from opd_kernels._checks import DEFAULT_K, check_inplace
from opd_kernels._ops import mapped
from opd_kernels._signature import cached
from opd_kernels.backends import AUTO

__all__ = ["FullDivergence", "GatherDot", "Request", "TopKReverseKL"]

_TWICE = (
    "{} cannot be differentiated twice: its gradient is computed in forward and held constant; "
    "where a second derivative is needed, build the loss from torch.topk, gather and log_softmax"
)


class Request(NamedTuple):
    """What ``TopKReverseKL`` computes, besides student, teacher and k.

    ``ids`` (..., K) are those of a support that is given; the teacher then holds its values there.
    Without ``allowed`` every id may enter the support that both sides have.
    """

    ids: Tensor | None = None
    allowed: Allowed | None = None
    objective: Objective = Objective()
    inplace: bool = False
    backend: str = AUTO


class TopKReverseKL(torch.autograd.Function):
    """Per-row renormalised reverse KL over the teacher's top-K support.

    ``TopKReverseKL.apply(student, teacher, k)`` takes the logits of both sides, (..., V) and
    (..., V_t), and returns ``(loss, ids, entry_grad)``: the loss (...), which has a gradient for
    ``student``, and the constant ids of the support and gradient entries, (..., K) each, of which
    ``EntryGradient`` makes a dense gradient. k is 32 if it is left out.
    """

    @staticmethod
    @cached
    def forward(
        student: Tensor, teacher: Tensor, k: int | None = None, request: Request | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the fused operator, or that of entries on a given support."""
        _refuse_compiled_transform()
        if not isinstance(teacher, Tensor):
            raise TypeError(
                f"teacher is a {type(teacher).__name__}, expected a tensor of logits; topk_rkl and "
                "EntryGradient.of take every kind of teacher"
            )
        ids, allowed, objective, _, backend = Request() if request is None else request
        if allowed is None:
            sides = (student, teacher) if ids is None else (student,)
            allowed = Allowed(min(side.shape[-1] for side in sides))
        if ids is not None:
            return _ops.entry_divergence(student, teacher, ids, allowed, objective, backend)
        k = min(DEFAULT_K, teacher.shape[-1]) if k is None else k
        return _ops.select_divergence(student, teacher, k, allowed, objective, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps (ids, entry gradients), never anything (N, V) unless in place."""
        student, _, _, request = inputs
        _, ids, entry_grad = output
        inplace, backend = (False, AUTO) if request is None else request[-2:]
        if inplace:
            check_inplace(student)
        ctx.mark_non_differentiable(ids, entry_grad)
        ctx.set_materialize_grads(False)
        anchor = _anchor(student)
        ctx.save_for_backward(ids, entry_grad, anchor, student if inplace else None)
        ctx.width, ctx.dtype, ctx.backend = student.shape[-1], student.dtype, backend

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """The dense gradient for ``student``, None for everything else."""
        if upstream is None or not ctx.needs_input_grad[0]:
            return None, None, None, None
        ids, entry_grad, anchor, student = ctx.saved_tensors
        grad = _ScatterGradient.apply(
            anchor, upstream, entry_grad, ids, student, (ctx.width, ctx.dtype, ctx.backend)
        )
        return grad, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, tuple[int, ...]]:
        """A mapped dimension is one more leading dimension."""
        names = ("student", "teacher", "k", "request")
        return TopKReverseKL.apply(*mapped(info, in_dims, args, names)), (0, 0, 0)


class FullDivergence(torch.autograd.Function):
    """Per-row divergences of full softmaxes, on a given support.

    ``apply(student, teacher, request, tails)`` takes the student's logits (..., V), the
    teacher's values (..., K) at ``request.ids``, and both log-sum-exps outside of the support.
    Returns ``(loss, ids, entry_grad, factors, logsumexp)``; the last four are constant and make the
    gradient. Kept for backward: them, and the logits.
    """

    @staticmethod
    @cached
    def forward(
        student: Tensor, teacher: Tensor, request: Request, tails: Tails
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Runs the operator."""
        _refuse_compiled_transform()
        ids, allowed, objective, _, backend = request
        assert ids is not None
        assert allowed is not None
        return _ops.full_divergence(student, teacher, ids, allowed, objective, tails, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps what makes the gradient, and the logits."""
        student, _, request, tails = inputs
        if request.inplace:
            check_inplace(student)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        value, rows = request.objective.temperature
        ctx.save_for_backward(student, *output[1:], rows)
        ctx.limit, ctx.temperature, ctx.inplace = tails.width, value, request.inplace
        ctx.backend = request.backend

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """The dense gradient for ``student``, None for everything else."""
        if upstream is None or not ctx.needs_input_grad[0]:
            return None, None, None, None
        student, ids, entry_grad, factors, logsumexp, rows = ctx.saved_tensors
        temperature = Temperature(ctx.temperature, rows)
        background = Background(factors, logsumexp, ctx.limit, student.detach(), temperature)
        grad = _BackgroundGradient.apply(
            student, upstream, entry_grad, ids, background, ctx.inplace, ctx.backend
        )
        return grad, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, tuple[int, ...]]:
        """A mapped dimension is one more leading dimension."""
        names = ("student", "teacher", "request", "tails")
        return FullDivergence.apply(*mapped(info, in_dims, args, names)), (0,) * 5


class _BackgroundGradient(torch.autograd.Function):
    """Backward of ``FullDivergence`` as a Function, so that differentiating it again raises.

    ``student`` is only there to be differentiated; its values are the background's logits.
    """

    @staticmethod
    @cached
    def forward(
        student: Tensor,
        upstream: Tensor,
        entry_grad: Tensor,
        ids: Tensor,
        background: Background,
        inplace: bool,
        backend: str,
    ) -> Tensor:
        grad = background.logits
        assert grad is not None
        if not inplace:
            return _ops.scatter_background(entry_grad, ids, upstream, background, backend)
        _ops.scatter_(grad, entry_grad, ids, upstream, background._replace(logits=None), backend)
        return grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(_TWICE.format("topk_divergence"))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        if args[5]:
            raise ValueError("inplace_grad=True does not work under vmap; pass inplace_grad=False")
        names = ("student", "upstream", "entry_grad", "ids", "background")
        rows = mapped(info, in_dims[:5], args[:5], names)
        return _BackgroundGradient.apply(*rows, *args[5:]), 0


class _ScatterGradient(torch.autograd.Function):
    """Backward of ``TopKReverseKL`` as a Function, so that differentiating it again raises."""

    @staticmethod
    @cached
    def forward(
        anchor: Tensor | None,
        upstream: Tensor,
        entry_grad: Tensor,
        ids: Tensor,
        student: Tensor | None,
        out: tuple[int, torch.dtype, str],
    ) -> Tensor:
        width, dtype, backend = out
        if student is None:
            return _ops.scatter(entry_grad, ids, upstream, width, dtype, backend)
        grad = student.detach()
        _ops.scatter_(grad, entry_grad, ids, upstream, Background(), backend)
        return grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(_TWICE.format("topk_rkl"))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        if args[4] is not None:
            raise ValueError("inplace_grad=True does not work under vmap; pass inplace_grad=False")
        names = ("anchor", "upstream", "entry_grad", "ids")
        rows = mapped(info, in_dims[:4], args[:4], names)
        return _ScatterGradient.apply(*rows, *args[4:]), 0


class GatherDot(torch.autograd.Function):
    """A head's logits at a few ids of each row: z_k = W[id_k] . h + b[id_k].

    ``apply`` returns ``(logits, slots)``, (..., K) each: logits with gradients for ``hidden``,
    ``weight`` and ``bias``, each computed only if it is needed. Slot k is k, or -1 where id k takes
    no part; slots are constant. Kept for backward, without a copy: the ids, ``hidden`` if the
    weight needs a gradient, ``weight`` if the hidden states do.
    """

    @staticmethod
    @cached
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        allowed: Allowed,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """Runs the operator."""
        _refuse_compiled_transform()
        return _ops.gather_dot(hidden, weight, bias, ids, allowed, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps references to inputs."""
        hidden, weight, bias, ids, _, backend = inputs
        for_hidden, for_weight, *_ = ctx.needs_input_grad
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids, hidden if for_weight else None, weight if for_hidden else None)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.vocab, ctx.backend = weight.shape[0], backend

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Gradients for hidden, weight and bias; None where none is needed."""
        grads: list[Tensor | None] = [None] * 6
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
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, tuple[int, ...]]:
        """A mapped dimension is one more leading dimension."""
        names = ("hidden", "weight", "bias", "ids", "allowed", "backend")
        return GatherDot.apply(*mapped(info, in_dims, args, names)), (0, 0)


class _HiddenGradient(torch.autograd.Function):
    """dL/dh in the backward of ``GatherDot``; a Function, so that differentiating it raises."""

    @staticmethod
    @cached
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
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        rows = mapped(info, in_dims[:2], args[:2], ("upstream", "ids"))
        return _HiddenGradient.apply(*rows, *args[2:]), 0


class _WeightGradient(torch.autograd.Function):
    """dL/dW in the backward of ``GatherDot``; a Function, so that differentiating it raises."""

    @staticmethod
    @cached
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
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        rows = mapped(info, in_dims[:3], args[:3], ("upstream", "ids", "hidden"))
        examples = zip(*(row.unbind(0) for row in rows), strict=True)
        return torch.stack([_WeightGradient.apply(*row, *args[3:]) for row in examples]), 0


def _refuse_compiled_transform() -> None:
    """Raises where a compiler would drop the gradient: it traces a transform of torch.func.

    Inside of a transform Dynamo (torch 2.13) ignores an autograd Function's backward, so that
    ``compile(func.grad(loss))`` returns zeros, or the gradient of other operators.
    """
    if (
        torch._C._are_functorch_transforms_active()
        and torch.compiler.is_compiling()
        and torch.is_grad_enabled()
    ):
        raise RuntimeError(
            "torch.compile over torch.func.grad or vmap drops the gradient of this loss; compile "
            "inside of the transform, torch.func.grad(torch.compile(loss)), or call it under "
            "torch.no_grad() where no gradient is needed"
        )


def _anchor(student: Tensor) -> Tensor | None:
    """An empty tensor that depends on the student in the graph but does not share its memory.

    A second differentiation has to reach ``_ScatterGradient`` through the student. The logits
    themselves, or a slice of them, would do that too, but saving these keeps them alive. A compiler
    refuses a second differentiation by itself.
    """
    if not student.requires_grad or torch.compiler.is_compiling():
        return None
    with torch.enable_grad():
        # One operator; narrow_copy would be one too, but copies strided logits whole.
        return student.repeat(0, *(1,) * (student.ndim - 1))
