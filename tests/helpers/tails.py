"""Log-sum-exps and entropies of what is outside of a support, and how far kernels may be off."""

from __future__ import annotations

import math

import torch

# x / T is rounded by 2^-24 twice and one exponential by 2.5e-7: a term at x / T = -t below its
# group's maximum is wrong by (t 2^-23 + 2.5e-7), and its share of the group falls with e^-t.
TAIL = 6e-7
GROUP = 32  # terms that are added one after the other


def without(x: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """x / T, -inf at the ids, in float64."""
    divisor = torch.tensor(temperature, dtype=torch.float32).double()
    x = torch.nn.functional.pad(x.double() / divisor, (0, 1))
    places = torch.where((ids >= 0) & (ids < x.shape[-1] - 1), ids, x.shape[-1] - 1).long()
    return x.scatter(-1, places, -math.inf)[..., :-1]


def tail_of(x: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """log of the sum of exp(x / T) without the ids, in float64."""
    return without(x, ids, temperature).logsumexp(-1)


def entropy_of(
    x: torch.Tensor, ids: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(entropy of the softmax of x / T without the ids, a bound on the kernel's error), float64.

    With t = (max - x) / T it is log(sum of e^-t) + mean of t. A weight e^-t is off by e, as above,
    and moves the two by p e and p e (t - mean of t). Both sums have up to GROUP roundings; t, the
    weight and their product have four.
    """
    x = without(x, ids, temperature)
    empty = (x == -math.inf).all(-1, keepdim=True)
    p = x.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    t = (x.amax(-1, keepdim=True) - x).masked_fill(p == 0, 0)
    mean = (p * t).sum(-1, keepdim=True)
    moved = (p * (t * 2**-23 + 2.5e-7) * (1 + (t - mean).abs())).sum(-1)
    error = moved + 2**-24 * ((GROUP + 4) * mean[..., 0] + GROUP)
    return torch.special.entr(p).sum(-1), error
