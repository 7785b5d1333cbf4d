"""Autograd around logits of which a rank holds some columns.

A rank's loss is made of numbers that were exchanged, and of these its gradient is that of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opd_kernels import _ops
from opd_kernels._arguments import Background, Temperature, compute_dtype, divisor
from opd_kernels._autograd import TWICE, anchor_of, refuse_compiled_transform
from opd_kernels._checks import check_inplace
from opd_kernels._linear_autograd import Rows

__all__ = ["LogitRows", "Merged", "ReducedGradient"]


class LogitRows(torch.autograd.Function):
    """Attaches the gradients of logits (..., V) to what a pass over them has found.

    ``apply(logits, rows, inplace, backend)`` returns the rows' (values, tail). The derivative of
    the tail by the logits z outside of the ids is exp(z / T - tail) / T. Without a tail the logits
    are not kept for backward.
    """

    @staticmethod
    def forward(logits: Tensor, rows: Rows, inplace: bool, backend: str) -> tuple[Tensor, Tensor]:
        """The values as they are."""
        refuse_compiled_transform()
        tail = rows.values.new_empty(0) if rows.tail is None else rows.tail.clone()
        return rows.values.clone(), tail

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the ids, and the logits where backward reads or overwrites them."""
        logits, (ids, _, tail, temperature, width, mask, _), inplace, backend = inputs
        if inplace:
            check_inplace(logits)
        ctx.set_materialize_grads(False)
        value, rows = Temperature() if temperature is None else temperature
        kept = logits if inplace or tail is not None else None
        ctx.save_for_backward(anchor_of(logits), kept, ids, tail, rows, mask)
        ctx.rest = (value, width, inplace, backend, logits.shape, logits.dtype)

    @staticmethod
    def backward(
        ctx: Any, upstream: Tensor | None, tail_upstream: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The dense gradient for the logits, None for everything else."""
        link, logits, ids, tail, per_rows, mask = ctx.saved_tensors
        value, width, inplace, backend, shape, dtype = ctx.rest
        if not ctx.needs_input_grad[0] or (upstream is None and tail_upstream is None):
            return None, None, None, None
        if upstream is None:
            assert tail is not None
            upstream = torch.zeros(ids.shape, dtype=compute_dtype(logits), device=ids.device)
        factors: Tensor | None = None
        if tail is not None and tail_upstream is not None and width:
            temperature = divisor(Temperature(value, per_rows), tail_upstream.dtype)
            factors = (tail_upstream[..., None] / temperature)[..., 0]
            factors = torch.where(tail_upstream == 0, 0, factors).to(upstream.dtype)
        if mask is not None:
            upstream = upstream.masked_fill(~mask[..., None], 0)
        background = Background(factors, tail, width, logits, Temperature(value, per_rows))
        grad = _LogitGradient.apply(
            link, upstream, ids, background, (shape, dtype, inplace, backend)
        )
        return grad, None, None, None


class _LogitGradient(torch.autograd.Function):
    """Backward of ``LogitRows`` as a Function, so that differentiating it again raises."""

    @staticmethod
    def forward(
        link: Tensor | None,
        entry_grad: Tensor,
        ids: Tensor,
        background: Background,
        rest: tuple[torch.Size, torch.dtype, bool, str],
    ) -> Tensor:
        shape, dtype, inplace, backend = rest
        if not shape[-1]:
            return entry_grad.new_empty(shape, dtype=dtype)
        logits, ones = background.logits, entry_grad.new_ones(ids.shape[:-1])
        if inplace:
            assert logits is not None
            grad = logits.detach()
            _ops.scatter_(grad, entry_grad, ids, ones, background._replace(logits=None), backend)
            return grad
        if background.factors is None:
            return _ops.scatter(entry_grad, ids, ones, shape[-1], dtype, backend)
        assert logits is not None
        background = background._replace(logits=logits.detach())
        return _ops.scatter_background(entry_grad, ids, ones, background, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(TWICE.format("topk_rkl or topk_divergence"))


class Merged(torch.autograd.Function):
    """``apply(own, merged, ids)`` returns ``merged``: ``own`` where an id is not -1."""

    @staticmethod
    def forward(own: Tensor, merged: Tensor, ids: Tensor) -> Tensor:
        """The merged values as they are."""
        return merged.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        """That of the merged values, 0 for what other ranks made."""
        (ids,) = ctx.saved_tensors
        return upstream.masked_fill(ids < 0, 0), None, None


class ReducedGradient(torch.autograd.Function):
    """``apply(hidden, total)`` returns the hidden states; their gradient is ``total`` of it.

    Every rank has them whole and a head of some columns, so a rank's gradient is one part of a sum.
    """

    @staticmethod
    def forward(hidden: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
        """The hidden states as they are."""
        return hidden.view_as(hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.total = inputs[1]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """The sum over the ranks."""
        return ctx.total(upstream), None
