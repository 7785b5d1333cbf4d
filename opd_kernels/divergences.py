"""Which divergence is computed on a support, as data."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Divergence", "reverse_kl"]


class Divergence(NamedTuple):
    """A weighted sum of divergences between the student's p and the teacher's q on a support.

    With a = log p, b = log q and m = log(beta q + (1 - beta) p), the sum over the support of::

        reverse p (a - b) + forward q (b - a) + skew_reverse p (a - m) + skew_forward q (b - m)

    ``stop_ratio`` holds the log ratio constant in the gradient, ``log_ratio_clip`` clamps it to
    [-c, c], and ``logp_floor`` clamps a and b from below. This version computes ``reverse_kl()``
    and refuses all others.
    """

    reverse: float = 0.0
    forward: float = 0.0
    skew_reverse: float = 0.0
    skew_forward: float = 0.0
    beta: float = 0.5
    stop_ratio: bool = False
    log_ratio_clip: float | None = None
    logp_floor: float | None = None


def reverse_kl() -> Divergence:
    """KL(p || q), the paper's: the sum of p (log p - log q)."""
    # Written out: of a default, torch.compile with dynamic=True would make an input of the graph.
    return Divergence(1.0, 0.0, 0.0, 0.0, 0.5, False, None, None)
