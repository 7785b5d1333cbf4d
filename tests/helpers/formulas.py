"""What restatements of losses are made of: logits, log-probs at ids, error bounds.

Shapes are (N, V) and (N, K); an id of -1 is no entry.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

N, V, K = 12, 50, 6


def logits(scale: float, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(N, V, generator=generator, dtype=torch.float64)).to(dtype)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Student and teacher: far from each other, and with a tail of some percent at least."""
    return logits(3.0, 0, dtype), logits(1.5, 1, dtype)


def sampled_tokens(student: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return student.detach().double().softmax(-1).multinomial(1, generator=generator).squeeze(-1)


def best(x: Tensor) -> Tensor:
    return x.topk(K).indices


def full(x: Tensor, ids: Tensor) -> Tensor:
    """Log-probs at the ids, of the softmax over the vocabulary."""
    return x.log_softmax(-1).gather(-1, ids)


def renormalised(x: Tensor, ids: Tensor) -> Tensor:
    """Log-probs at the ids, of the softmax over the ids."""
    return x.gather(-1, ids).log_softmax(-1)


def with_tail(x: Tensor, ids: Tensor) -> Tensor:
    """Log-probs at the ids, and the log of the probability everywhere else."""
    present = ids >= 0
    logp = full(x, ids.clamp(min=0)).masked_fill(~present, -math.inf)
    inside = torch.zeros_like(x).scatter_add(-1, ids.clamp(min=0), present.to(x)) > 0
    tail = x.masked_fill(inside, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logp, tail - x.logsumexp(-1, keepdim=True)], -1)


def kl(log_target: Tensor, log_other: Tensor) -> Tensor:
    """KL(target || other): the sum of target (log target - log other)."""
    absent = log_target == -math.inf
    ratio = (log_target - log_other).masked_fill(absent, 0.0)
    return (log_target.exp() * ratio).sum(-1)


def mixture(logp: Tensor, logq: Tensor, teacher_share: float) -> Tensor:
    return torch.logaddexp(logp + math.log1p(-teacher_share), logq + math.log(teacher_share))


def rounding(dtype: torch.dtype) -> float:
    """A bound of a loss's error; a gradient entry's is four times that.

    A log-prob is a sum of a few numbers up to ``size``, so it is off by at most 4 eps size. A loss
    adds up differences of two log-probs, with probabilities as weights that sum to at most 2. A
    gradient entry is at most four times such a sum, divided by a temperature of at least 1/2, which
    is in ``size``.
    """
    size = max(x.abs().max().item() for x in inputs(dtype)) / 0.5 + math.log(V)
    return 4 * 2 * 2 * torch.finfo(dtype).eps * size
