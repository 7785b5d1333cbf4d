"""Comparing an adapter's loss and gradient with a trainer's own, and both with float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def graded(loss: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(a loss, its gradients) at copies of what it is a function of."""
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = loss(*copies)
    return value.detach(), list(torch.autograd.grad(value, copies))


def bound(*logits: Tensor, temperature: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """A bound of the error of a row's loss in ``dtype``; a gradient entry's is four times that.

    A log-prob is a sum of a few numbers up to ``size``, so it is off by at most 4 eps size. A loss
    adds up differences of two log-probs, with probabilities as weights that sum to at most 2. A
    gradient entry is at most four times such a sum, divided by the temperature.
    """
    largest = max(x.detach()[x.detach().isfinite()].abs().max().item() for x in logits)
    size = largest / temperature + math.log(logits[0].shape[-1])
    return 4 * 2 * 2 * torch.finfo(dtype).eps * size / min(temperature, 1.0)


def assert_agree(
    found: tuple[Tensor, Sequence[Tensor]],
    expected: tuple[Tensor, Sequence[Tensor]],
    error: float,
    share: float = 1.0,
) -> None:
    """Both as ``graded`` returns them; ``share`` is a row's part of the loss: 1/N for a mean.

    A loss that is a mean is off by what a row is, one that is a sum by the rows' sum. Gradients in
    16 bits may be rounded once more.
    """
    loss, gradients = found
    scale = 1.0 if share != 1.0 else float(max(math.prod(gradients[0].shape[:-1]), 1))
    torch.testing.assert_close(loss.double(), expected[0].double(), rtol=1e-6, atol=error * scale)
    for gradient, exact in zip(gradients, expected[1], strict=True):
        rounding = torch.finfo(gradient.dtype).eps
        torch.testing.assert_close(
            gradient.double(), exact.double(), rtol=rounding, atol=4 * error * share
        )
