"""Autograd around the operators: gradients are computed in forward and scattered in backward.

Kept for backward: ids and entry gradients, 8 bytes * N * K (12 in float64). With ``inplace`` also
the student logits, because the gradient takes their memory. For hidden states and a head,
``_linear_autograd`` makes the few logits of a row first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_kernels import _ops
from opd_kernels._arguments import (
    Allowed,
    Background,
    Objective,
    Tails,
    Temperature,
    compute_dtype,
    exp,
    wide_dtype,
)
from opd_kernels._checks import DEFAULT_K, check_inplace
from opd_kernels._library import mapped
from opd_kernels._signature import cached
from opd_kernels.backends import AUTO

__all__ = ["BackgroundLoss", "Request", "TopKReverseKL"]

TWICE = (
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
        refuse_compiled_transform()
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
        anchor = anchor_of(student)
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


class Token(NamedTuple):
    """The sampled token of each row, whose log-prob is wanted beside the loss.

    ``ids`` (...), and the student's ``logsumexp`` (...) of z / T over the ids in [0, ``width``).
    ``log_probs`` (..., C) are those of the support's first ids; if there are more, they are tokens.
    """

    ids: Tensor
    log_probs: Tensor
    logsumexp: Tensor
    width: int


class BackgroundLoss(torch.autograd.Function):
    """Per-row losses on a given support whose gradient has a background, and token log-probs.

    ``apply(student, teacher, request, tails, token)`` takes the student's logits (..., V) and the
    teacher's values (..., K) at ``request.ids``. With ``tails``, both log-sum-exps outside of the
    support, the divergence is that of full softmaxes, without a renormalised one. Without
    ``teacher`` there is no divergence, and the loss is 0.

    Returns ``(loss, logprobs, ids, entry_grad, factors, logsumexp, token_grad, token_factors)``.
    The first two have gradients for ``student``; the others are constant and make these, each as
    entries and a background. Kept for backward: the constant ones, and the logits.
    """

    @staticmethod
    @cached
    def forward(
        student: Tensor,
        teacher: Tensor | None,
        request: Request,
        tails: Tails | None,
        token: Token | None,
    ) -> tuple[Tensor, ...]:
        """Runs the operators."""
        refuse_compiled_transform()
        ids, allowed, objective, _, backend = request
        assert ids is not None
        assert allowed is not None
        if tails is not None:
            assert teacher is not None
            found = _ops.full_divergence(student, teacher, ids, allowed, objective, tails, backend)
        elif teacher is not None:
            assert token is not None
            loss, ids, entry_grad = _ops.entry_divergence(
                student, teacher, ids, allowed, objective, backend
            )
            found = loss, ids, entry_grad, torch.zeros_like(loss), token.logsumexp
        else:
            assert token is not None
            loss = torch.zeros_like(token.logsumexp, dtype=compute_dtype(student))
            # Outputs that share memory do not compile.
            nothing = loss.new_zeros(ids.shape)
            found = loss, ids, nothing, torch.zeros_like(loss), token.logsumexp
        if token is None:
            loss = found[0]
            nothing = loss.new_empty((*loss.shape, 0))
            return loss, torch.zeros_like(loss), *found[1:], nothing, nothing.clone()
        return _with_token(student, found, request, token)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps what makes the gradients, and the logits."""
        student, _, request, tails, token = inputs
        if request.inplace:
            check_inplace(student)
        ctx.mark_non_differentiable(*output[2 if token is not None else 1 :])
        ctx.set_materialize_grads(False)
        value, rows = request.objective.temperature
        ctx.save_for_backward(student, *output[2:], rows)
        ctx.limit = token.width if tails is None else tails.width
        ctx.temperature, ctx.inplace = value, request.inplace
        ctx.backend, ctx.with_token = request.backend, token is not None

    @staticmethod
    def backward(
        ctx: Any, upstream: Tensor | None, token_upstream: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        """The dense gradient for ``student``, None for everything else."""
        nothing = (None,) * 5
        if not ctx.with_token:
            token_upstream = None  # torch.compile sends zeros
        if not ctx.needs_input_grad[0] or (upstream is None and token_upstream is None):
            return nothing
        student, ids, entry_grad, factors, logsumexp, *of_token, rows = ctx.saved_tensors
        if token_upstream is not None:
            entry_grad, factors = _added(upstream, (entry_grad, factors), token_upstream, of_token)
            upstream = torch.ones_like(token_upstream)
        temperature = Temperature(ctx.temperature, rows)
        background = Background(factors, logsumexp, ctx.limit, student.detach(), temperature)
        grad = _BackgroundGradient.apply(
            student, upstream, entry_grad, ids, background, ctx.inplace, ctx.backend
        )
        return grad, *nothing[1:]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, tuple[int, ...]]:
        """A mapped dimension is one more leading dimension."""
        names = ("student", "teacher", "request", "tails", "token")
        return BackgroundLoss.apply(*mapped(info, in_dims, args, names)), (0,) * 8


def _with_token(
    student: Tensor, found: tuple[Tensor, ...], request: Request, token: Token
) -> tuple[Tensor, ...]:
    """Results of a loss and of log p of the token y, whose gradient is that of a softmax::

        (1[v = y] - p_v) / T = entries at the support and at y, and the background -p / T

    The token is one entry more, absent where it is in the support.
    """
    loss, ids, entry_grad, factors, reference = found
    _, allowed, objective, _, backend = request
    assert allowed is not None
    dtype, wide = compute_dtype(student), wide_dtype(student.device)
    logsumexp = token.logsumexp.to(wide)[..., None]
    value, rows = objective.temperature
    temperature = value if rows is None else rows.to(wide)[..., None]
    sampled = token.ids[..., None]
    everything = Allowed(token.width, None, allowed.mask)
    z, slots = _ops.gather(student, sampled, everything, backend)
    # NaN where the token does not exist; masked rows take no part.
    missing = slots < 0
    scaled = z.to(wide) / temperature
    log_p_token = (scaled - logsumexp).clamp(max=0).masked_fill(missing, torch.nan)
    count = ids.shape[-1] + 1 - token.log_probs.shape[-1]
    log_p = torch.cat((token.log_probs, log_p_token.expand(*z.shape[:-1], count)), -1)
    listed = torch.cat((ids.to(sampled.dtype), sampled), -1)
    grad = torch.where(listed == sampled, -torch.expm1(log_p_token), -exp(log_p)) / temperature
    grad = grad.masked_fill(missing, torch.nan)
    background = -1 / (torch.zeros_like(log_p_token) + temperature)
    # Relative to what the loss's own background is relative to, if there is one.
    own = (factors == 0)[..., None] | factors.isnan()[..., None]
    reference = torch.where(own, logsumexp, reference.to(wide)[..., None])
    background = background * _share(reference, logsumexp)
    background = background.masked_fill(missing, torch.nan)
    known = (ids == sampled).any(-1, keepdim=True)
    listed = torch.cat((ids, torch.where(known | missing, -1, sampled).to(ids.dtype)), -1)
    if allowed.mask is not None:
        masked = ~allowed.mask[..., None]
        log_p_token, grad, background, reference = (
            x.masked_fill(masked, 0) for x in (log_p_token, grad, background, reference)
        )
    grad = grad.masked_fill(listed < 0, 0)
    # An entry takes the place of the background, so the token's holds the loss's own there.
    there = factors[..., None] * exp((scaled - reference).clamp(max=0))
    there = torch.where((factors == 0)[..., None] | (listed[..., -1:] < 0), 0, there)
    return (
        loss,
        log_p_token[..., 0].to(dtype),
        listed,
        torch.cat((entry_grad, there.to(entry_grad.dtype)), -1),
        factors,
        reference[..., 0],
        grad.to(dtype),
        background[..., 0].to(dtype),
    )


def _share(reference: Tensor, logsumexp: Tensor) -> Tensor:
    """exp(reference - logsumexp): 1 where both are of the whole row, less where one is a tail's.

    Kernels round a temperature to float32, so that the same sum may differ by 2^-24 of itself. A
    tail that is a background's reference is 57 or more below the whole.
    """
    difference = reference - logsumexp
    same = difference.abs() <= 1 + logsumexp.abs() * 2.0**-22
    return exp(torch.where(same, 0, difference).clamp(max=0))


def _added(
    upstream: Tensor | None,
    of_loss: tuple[Tensor, Tensor],
    token_upstream: Tensor,
    of_token: Sequence[Tensor],
) -> Iterator[Tensor]:
    """Entries and factors of both gradients, each times its upstream gradient, added.

    0 stays 0 whatever the upstream gradient is: that of a masked row, say. What is beyond the dtype
    becomes its largest number, so that a factor times a probability of 0 is 0.
    """

    def times(factor: Tensor, x: Tensor) -> Tensor:
        factor = factor if factor.ndim == x.ndim else factor[..., None]
        return torch.where(x == 0, 0, factor.to(wide) * x)

    wide = wide_dtype(token_upstream.device)
    for loss_part, token_part in zip(of_loss, of_token, strict=True):
        added = times(token_upstream, token_part)
        if upstream is not None:
            added = added + times(upstream, loss_part)
        largest = torch.finfo(loss_part.dtype).max
        yield added.clamp(-largest, largest).to(loss_part.dtype)


class _BackgroundGradient(torch.autograd.Function):
    """Backward of ``BackgroundLoss`` as a Function, so that differentiating it again raises.

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
        raise RuntimeError(TWICE.format("topk_divergence or token_logprobs"))

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
        raise RuntimeError(TWICE.format("topk_rkl"))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        if args[4] is not None:
            raise ValueError("inplace_grad=True does not work under vmap; pass inplace_grad=False")
        names = ("anchor", "upstream", "entry_grad", "ids")
        rows = mapped(info, in_dims[:4], args[:4], names)
        return _ScatterGradient.apply(*rows, *args[4:]), 0


def refuse_compiled_transform() -> None:
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


def anchor_of(student: Tensor) -> Tensor | None:
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
