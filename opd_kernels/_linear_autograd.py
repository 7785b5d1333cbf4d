"""Autograd around the operators on hidden states and a head.

``GatherDot`` makes a few logits of each row, ``HeadRows`` a few logits and the log-sum-exp of all
others, ``HeadLoss`` carries a head's gradient that was computed in forward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_kernels import _ops
from opd_kernels._arguments import (
    Allowed,
    Background,
    Head,
    Temperature,
    Wanted,
    compute_dtype,
    divisor,
    exp,
    wide_dtype,
)
from opd_kernels._autograd import TWICE, refuse_compiled_transform
from opd_kernels._library import mapped
from opd_kernels._signature import cached
from opd_kernels.backends import plain

__all__ = ["GatherDot", "HeadLoss", "HeadRows", "Rows"]


class Rows(NamedTuple):
    """What a pass over a head's logits has found.

    The logits ``values`` (..., C) at ``ids`` (..., C), each id once or -1, and ``tail`` (...), the
    log-sum-exp of z / T at all other ids in [0, ``width``). Rows whose ``mask`` is False have none.
    ``sampled``: the last id stands for all others in backward.
    """

    ids: Tensor
    values: Tensor
    tail: Tensor | None
    temperature: Temperature | None
    width: int
    mask: Tensor | None
    sampled: bool


class HeadRows(torch.autograd.Function):
    """Attaches a head's gradients to logits that a pass over it has found.

    ``apply(hidden, weight, bias, rows, scale, softcap, backend)`` returns the rows' (values, tail).
    Exact: the derivative of the tail by the logits z outside of the ids is exp(z / T - tail) / T,
    and backward computes these logits again, a few columns at a time. Sampled: with y, the last id,
    drawn from the row's softmax, the derivative at y alone, divided by its probability.
    """

    @staticmethod
    @cached
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Rows,
        scale: float,
        softcap: float | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """The values as they are."""
        refuse_compiled_transform()
        assert rows.tail is not None
        return rows.values.clone(), rows.tail.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps references to inputs."""
        hidden, weight, bias, rows, scale, softcap, backend = inputs
        ids, values, tail, (temperature, per_rows), width, mask, sampled = rows
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, ids, values, tail, per_rows, mask)
        ctx.rest = (temperature, width, sampled, scale, softcap, backend)

    @staticmethod
    def backward(
        ctx: Any, upstream: Tensor | None, tail_upstream: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients for hidden, weight and bias; None where none is needed."""
        nothing = (None,) * 7
        if upstream is None and tail_upstream is None:
            return nothing
        hidden, weight, bias, ids, values, tail, per_rows, mask = ctx.saved_tensors
        temperature, width, sampled, scale, softcap, backend = ctx.rest
        upstream = torch.zeros_like(values) if upstream is None else upstream
        tail_upstream = torch.zeros_like(tail) if tail_upstream is None else tail_upstream
        rows = Rows(ids, values, tail, Temperature(temperature, per_rows), width, mask, sampled)
        wanted = Wanted(*ctx.needs_input_grad[:3])
        grads = _HeadGradient.apply(
            hidden, weight, bias, rows, upstream, tail_upstream, (scale, softcap, wanted, backend)
        )
        return (
            *(grad if needed else None for grad, needed in zip(grads, wanted, strict=True)),
            *nothing[3:],
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, tuple[int, ...]]:
        """A mapped dimension is one more leading dimension."""
        names = ("hidden", "weight", "bias", "rows", "scale", "softcap", "backend")
        return HeadRows.apply(*mapped(info, in_dims, args, names)), (0, 0)


def _exact_gradient(
    head: Head, rows: Rows, upstream: Tensor, tail_upstream: Tensor, wanted: Wanted, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Through all of the head's logits."""
    assert rows.temperature is not None
    dtype = compute_dtype(rows.values)
    factors = tail_upstream[..., None] / divisor(rows.temperature, tail_upstream.dtype)
    factors = torch.where(tail_upstream == 0, 0, factors[..., 0]).to(dtype)
    background = Background(factors, rows.tail, rows.width, None, rows.temperature)
    entry_grad = upstream.to(dtype)
    if rows.mask is not None:
        entry_grad = entry_grad.masked_fill(~rows.mask[..., None], 0)
    return _ops.linear_gradient(head, entry_grad, rows.ids, background, rows.mask, wanted, backend)


def _sampled_gradient(
    head: Head, rows: Rows, upstream: Tensor, tail_upstream: Tensor, wanted: Wanted, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Through the logits at the ids. The last one, y, stands for all others and for itself.

    With g the derivatives at y and at all others together, p their probabilities: sum of g / sum
    of p at y.
    """
    hidden, weight, bias, scale, softcap = head
    assert rows.temperature is not None
    assert rows.tail is not None
    wide = wide_dtype(rows.values.device)
    temperature = divisor(rows.temperature, wide)
    scaled = torch.cat((rows.values.to(wide) / temperature, rows.tail.to(wide)[..., None]), -1)
    top = scaled.amax(-1, keepdim=True)
    p = exp(scaled - top.masked_fill(top == -torch.inf, 0))
    outside = p[..., -2:].sum(-1) / p.sum(-1)
    given = upstream[..., -1:].to(wide) + tail_upstream.to(wide)[..., None] / temperature
    # Probabilities of 0 have no gradient.
    there = torch.where(given == 0, 0, given / outside[..., None])
    grad = torch.cat((upstream[..., :-1].to(wide), there), -1)
    absent = rows.ids < 0  # another rank's columns
    if rows.mask is not None:  # the temperature may be anything
        absent = absent | ~rows.mask[..., None]
    grad = grad.masked_fill(absent, 0)
    grad = torch.where(grad == 0, 0, grad * plain.slope(rows.values.to(wide), scale, softcap))
    grad = grad.to(compute_dtype(rows.values))
    hidden_grad, weight_grad, bias_grad = (hidden.new_empty(0) for _ in wanted)
    if wanted.hidden:
        hidden_grad = _ops.gather_dot_hidden(grad, rows.ids, weight, hidden.dtype, backend)
    if wanted.weight:
        weight_grad = _ops.gather_dot_weight(
            grad, rows.ids, hidden, weight.shape[0], weight.dtype, backend
        )
    if wanted.bias:
        assert bias is not None
        bias_grad = _bias_gradient(grad, rows.ids, weight.shape[0], bias.dtype, backend)
    return hidden_grad, weight_grad, bias_grad


def _bias_gradient(
    upstream: Tensor, ids: Tensor, vocab: int, dtype: torch.dtype, backend: str
) -> Tensor:
    """The bias is the weight of an input that is 1."""
    ones = upstream.new_ones((*ids.shape[:-1], 1))
    return _ops.gather_dot_weight(upstream, ids, ones, vocab, dtype, backend).squeeze(-1)


class _HeadGradient(torch.autograd.Function):
    """Backward of ``HeadRows`` as a Function, so that differentiating it again raises."""

    @staticmethod
    @cached
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Rows,
        upstream: Tensor,
        tail_upstream: Tensor,
        rest: tuple[float, float | None, Wanted, str],
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale, softcap, wanted, backend = rest
        if not rows.width:  # a shard without columns
            made = (hidden, weight, hidden if bias is None else bias)
            return tuple(map(torch.zeros_like, made))  # type: ignore[return-value]
        head = Head(hidden, weight, bias, scale, softcap)
        compute = _sampled_gradient if rows.sampled else _exact_gradient
        return compute(head, rows, upstream, tail_upstream, wanted, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(TWICE.format("topk_divergence or token_logprobs"))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, tuple[int, ...]]:
        names = ("hidden", "weight", "bias", "rows", "upstream", "tail_upstream")
        hidden, weight, bias, *per_row = mapped(info, in_dims[:6], args[:6], names)
        examples = (
            _HeadGradient.apply(
                hidden[i], weight, bias, *(_example(some, i) for some in per_row), args[6]
            )
            for i in range(info.batch_size)
        )
        return tuple(torch.stack(grads) for grads in zip(*examples, strict=True)), (0, 0, 0)


def _example(value: Any, i: int) -> Any:
    """One example of a mapped value."""
    if isinstance(value, tuple):
        return type(value)(*(_example(field, i) for field in value))
    return value[i] if isinstance(value, Tensor) else value


class HeadLoss(torch.autograd.Function):
    """A scalar 0 whose gradient is a head's, computed in forward, times the upstream gradient.

    ``grads`` (hidden, weight, bias) is emptied: autograd copies a gradient that somebody else holds
    as well. Backward scales them where they are and gives them away, so it runs once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        grads: list[Tensor],
        loss: Tensor,
    ) -> Tensor:
        """Takes the gradients out of their list."""
        ctx.grads = grads[:]
        grads.clear()
        return loss.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, times a number."""
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE.format("topk_divergence"))
        if ctx.grads is None:
            raise RuntimeError(
                "the loss was differentiated before, and its head's gradient was given away; use "
                'reduction="none" and reduce the losses yourself: backward computes it then'
            )
        grads, ctx.grads = ctx.grads, None
        needed = zip(grads, ctx.needs_input_grad, strict=False)
        return *(grad.mul_(upstream) if need else None for grad, need in needed), None, None


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
        refuse_compiled_transform()
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
        raise RuntimeError(TWICE.format("linear_topk_rkl"))

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
        raise RuntimeError(TWICE.format("linear_topk_rkl"))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        rows = mapped(info, in_dims[:3], args[:3], ("upstream", "ids", "hidden"))
        examples = zip(*(row.unbind(0) for row in rows), strict=True)
        return torch.stack([_WeightGradient.apply(*row, *args[3:]) for row in examples]), 0
