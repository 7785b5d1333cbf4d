"""Which divergence is computed on a support, as data."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = [
    "Divergence",
    "forward_kl",
    "jsd",
    "mixed",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
]


RENORMALIZE = "renormalize"
# What becomes of the probability outside of the support.
OUTSIDE = (RENORMALIZE, "truncate", "bucket", "generalize", "sample")
# Where this package chooses for its users; studies/objectives.py is why.
RECOMMENDED = "bucket"


class Divergence(NamedTuple):
    """A weighted sum of divergences between the student's p and the teacher's q on a support.

    With a = log p, b = log q and m = log(beta q + (1 - beta) p), the sum over the support of::

        reverse p (a - b) + forward q (b - a) + skew_reverse p (a - m) + skew_forward q (b - m)

    The four weights are numbers or constant tensors, one value per row: a row may have a divergence
    of its own.

    Args:
        reverse: weight of KL(p || q).
        forward: weight of KL(q || p).
        skew_reverse: weight of KL(p || m).
        skew_forward: weight of KL(q || m).
        beta: the teacher's share of the mixture m, in (0, 1). Only the two skews read it.
        stop_ratio: the reverse KL's gradient takes a - b as constant, as policy gradients do. It
            changes the gradient under "truncate" and "generalize" only: p sums to 1 elsewhere.
        log_ratio_clip: c > 0: each log ratio is clamped to [-c, c]; beyond, its derivative is 0.
        logp_floor: f < 0: a and b are max(., f); below, their derivative is 0.

    Example::

        loss = topk_divergence(student, teacher, divergence=Divergence(reverse=0.5, forward=0.5))
    """

    reverse: float | Tensor = 0.0
    forward: float | Tensor = 0.0
    skew_reverse: float | Tensor = 0.0
    skew_forward: float | Tensor = 0.0
    beta: float = 0.5
    stop_ratio: bool = False
    log_ratio_clip: float | None = None
    logp_floor: float | None = None


# Values are written out: of a default, torch.compile with dynamic=True would make an input of the
# graph.


def reverse_kl() -> Divergence:
    """KL(p || q), the paper's: the sum of p (log p - log q)."""
    return Divergence(1.0, 0.0, 0.0, 0.0, 0.5, False, None, None)


def forward_kl() -> Divergence:
    """KL(q || p): the sum of q (log q - log p)."""
    return Divergence(0.0, 1.0, 0.0, 0.0, 0.5, False, None, None)


def jsd(beta: float = 0.5) -> Divergence:
    """The generalised Jensen-Shannon divergence: beta KL(q || m) + (1 - beta) KL(p || m).

    m = beta q + (1 - beta) p. It goes to 0 with beta and with 1 - beta. A trainer that calls beta 0
    the forward and beta 1 the reverse KL treats these two as special cases.
    """
    return Divergence(0.0, 0.0, 1.0 - beta, beta, beta, False, None, None)


def mixed(forward: float | Tensor = 0.5) -> Divergence:
    """forward KL(q || p) + (1 - forward) KL(p || q)."""
    return Divergence(1.0 - forward, forward, 0.0, 0.0, 0.5, False, None, None)


def skew_reverse_kl(beta: float) -> Divergence:
    """KL(p || m), m = beta q + (1 - beta) p."""
    return Divergence(0.0, 0.0, 1.0, 0.0, beta, False, None, None)


def skew_forward_kl(beta: float) -> Divergence:
    """KL(q || m), m = beta q + (1 - beta) p."""
    return Divergence(0.0, 0.0, 0.0, 1.0, beta, False, None, None)


# Those without a choice.
NAMED = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "jsd": jsd}
