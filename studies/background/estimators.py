"""Gradients by the logits that depend on the sampled token y: mean and variance, in closed form.

All have the form ``base + s_y e_y`` or, centred, ``base + s_y (e_y - p)``. Means and variances over
y are sums over the vocabulary, so nothing here is sampled. T = 1 throughout, float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_kernels import select_topk, topk_divergence

CLIP = 0.2  # of `sampled_token_loss`


@dataclass
class Estimator:
    """A gradient that depends on y, for N rows."""

    base: Tensor  # (N, V)
    slope: Tensor  # (N, V), s
    log_p: Tensor  # (N, V), of the student that is trained
    centred: bool

    def mean(self, draw: Tensor) -> Tensor:
        """Its mean over y drawn from `draw`, (N, V)."""
        rows = draw * self.slope
        if self.centred:
            rows = rows - self.log_p.exp() * rows.sum(-1, keepdim=True)
        return self.base + rows

    def noise(self, head: Tensor) -> tuple[Tensor, Tensor]:
        """Trace of the covariance over y ~ p, of the logits' and the hidden states' gradient, (N,).

        `head` is (V, H); a hidden state's gradient is that of its logits times the head. The
        products with it are in its dtype.
        """
        p = self.log_p.exp()
        weight, varying = p * self.slope.square(), self.mean(p) - self.base
        # |e_y - p|^2 and, times the head, |w_y - middle|^2; without p where it is not centred.
        logits, hidden = torch.ones_like(p), head.square().sum(-1).expand_as(p)
        if self.centred:
            logits = 1 - 2 * p + p.square().sum(-1, keepdim=True)
            middle = p.to(head.dtype) @ head
            hidden = hidden - 2 * middle @ head.T + middle.square().sum(-1, keepdim=True)
        return (
            (weight * logits).sum(-1) - varying.square().sum(-1),
            (weight * hidden).sum(-1) - (varying.to(head.dtype) @ head).square().sum(-1),
        )


def sampled_background(
    log_p: Tensor, log_q: Tensor, *, k: int, divergence: str, outside: str
) -> Estimator:
    """`topk_divergence(..., background="sampled")`, from the package's own exact gradient."""
    with torch.enable_grad():
        logits = log_p.detach().requires_grad_()
        loss = topk_divergence(
            logits, log_q, k=k, divergence=divergence, outside=outside, reduction="sum"
        )
        (exact,) = torch.autograd.grad(loss, logits)
    inside = support(log_q, k)
    # Outside of the support the gradient is alpha p.
    likeliest = log_p.masked_fill(inside, -torch.inf).argmax(-1, keepdim=True)
    alpha = exact.gather(-1, likeliest) / log_p.gather(-1, likeliest).exp()
    return Estimator(exact * inside, alpha * ~inside, log_p, centred=False)


def sampled_outside(log_p: Tensor, log_q: Tensor, *, k: int) -> Estimator:
    """`topk_divergence(..., outside="sample")` with the exact background."""
    inside, p, ratio = support(log_q, k), log_p.exp(), log_p - log_q
    part = p * ratio * inside
    base = part - p * part.sum(-1, keepdim=True)
    return Estimator(base, ratio * ~inside, log_p, centred=True)


def sampled_token(log_p: Tensor, log_q: Tensor, log_old: Tensor | None = None) -> Estimator:
    """`sampled_token_loss` with gamma 0; `log_old`, or the student, made the rollout."""
    log_old = log_p if log_old is None else log_old
    ratio, advantage = (log_p - log_old).exp(), log_q - log_old
    kept = torch.where(advantage > 0, ratio <= 1 + CLIP, ratio >= 1 - CLIP)
    return Estimator(torch.zeros_like(log_p), -ratio * advantage * kept, log_p, centred=True)


def support(log_q: Tensor, k: int) -> Tensor:
    """Where an id is of the teacher's k likeliest, (N, V) bool."""
    ids = select_topk(log_q, k).ids.long()
    return torch.zeros_like(log_q, dtype=torch.bool).scatter_(-1, ids, True)


def nucleus(log_p: Tensor, top_p: float) -> Tensor:
    """The distribution that top-p rollouts draw from, (N, V)."""
    p, order = log_p.exp().sort(-1, descending=True)
    kept = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(log_p).scatter_(-1, order, kept)
