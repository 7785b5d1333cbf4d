"""The objectives that are compared: what each arm minimises, and on whose rollouts.

``topk_rkl`` is local support matching (LSM). What the package has no kernel for is a few lines of
eager PyTorch here; at a vocabulary of a hundred words that costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from opd_kernels import (
    TopK,
    sampled_token_advantages,
    sampled_token_loss,
    select_topk,
    token_logprobs,
    topk_rkl,
)


@dataclass(frozen=True)
class Scores:
    """Both models at the M response tokens of a micro-batch."""

    student: Tensor  # (M, V_s) logits, with gradient
    teacher: Tensor  # (M, V_t) logits
    tokens: Tensor  # (M,) what the student said
    k: int
    banned: Sequence[int]  # ids that the teacher's support leaves out
    response: Tensor | None = None  # (B, T): where the M tokens are in their sequences

    @property
    def vocab(self) -> int:
        """Ids that both models have."""
        return min(self.student.shape[-1], self.teacher.shape[-1])

    @cached_property
    def support(self) -> TopK:
        """The teacher's K best, and its score of what was said."""
        return select_topk(
            self.teacher,
            self.k,
            vocab_size=self.vocab,
            banned_ids=self.banned,
            with_logsumexp=True,
            token_ids=self.tokens,
        )

    @cached_property
    def log_probs(self) -> tuple[Tensor, Tensor]:
        """Log-probs (M, V) of student and teacher over the ids that both have."""
        student = self.student[:, : self.vocab].float().log_softmax(-1)
        return student, self.teacher[:, : self.vocab].float().log_softmax(-1)

    @cached_property
    def said(self) -> tuple[Tensor, Tensor]:
        """Log-probs (M,) of the tokens that the student said, of student and teacher."""
        student, teacher = (
            token_logprobs(logits, self.tokens, vocab_size=self.vocab)
            for logits in (self.student, self.teacher)
        )
        return student, teacher


def lsm(scores: Scores) -> Tensor:
    """Renormalised reverse KL on the teacher's support: the paper's objective."""
    return topk_rkl(scores.student, scores.support, reduction="none")


def sampled_token(scores: Scores) -> Tensor:
    """The baseline: the log-ratio of the sampled token as its advantage, at token level.

    One update per rollout: the old policy is the present one.
    """
    student, teacher = scores.said
    old = student.detach()
    advantages = sampled_token_advantages(teacher, old)
    return sampled_token_loss(student, old, advantages, reduction="none")


def truncated(scores: Scores) -> Tensor:
    """Without renormalisation: sum over S of p log p/q with both models' full softmaxes."""
    p, q = _on_support(scores)
    return (p.exp() * (p - q)).sum(-1)


def tail_bucket(scores: Scores) -> Tensor:
    """The same, and what lies outside S as one more entry: a divergence again."""
    p, q = _on_support(scores)
    log_p, log_q = (torch.cat([x, _log_rest(x)], -1) for x in (p, q))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def student_support(scores: Scores) -> Tensor:
    """LSM on the student's K best instead of the teacher's; the paper adds the sampled token."""
    chosen = select_topk(scores.student.detach(), scores.k, vocab_size=scores.vocab)
    support = TopK(chosen.ids, scores.teacher.gather(-1, chosen.ids.long()).float())
    return topk_rkl(scores.student, support, reduction="none")


def _on_support(scores: Scores) -> tuple[Tensor, Tensor]:
    """Log-probs (M, K) of student and teacher on the teacher's support."""
    ids = scores.support.ids.long()
    return tuple(x.gather(-1, ids) for x in scores.log_probs)


def _log_rest(log_probs: Tensor) -> Tensor:
    """log(1 - sum of probabilities), (M, 1), without cancelling where little is left."""
    held = log_probs.logsumexp(-1, keepdim=True).clamp(max=-1e-6)
    return torch.where(held > -0.693, (-held.expm1()).log(), (-held.exp()).log1p())


@dataclass(frozen=True)
class Arm:
    """One line of the comparison."""

    name: str
    loss: Callable[[Scores], Tensor]  # (M,)
    top_p: float = 1.0  # of the rollouts
    masking: bool = False  # special tokens left out, as positions and from the support


# No step is taken: what the arms start from, and what they are to come near to.
BEFORE, TEACHER = Arm("before", lsm), Arm("teacher", lsm)
SAMPLED_TOKEN = Arm("sampled-token", sampled_token)
LSM_TOP_P = Arm("LSM + top-p", lsm, 0.9)
ARMS = [
    SAMPLED_TOKEN,
    Arm("sampled-token + top-p", sampled_token, 0.9),
    Arm("LSM", lsm),
    LSM_TOP_P,
    Arm("LSM + top-p + masking", lsm, 0.9, masking=True),
    Arm("no renormalisation + top-p", truncated, 0.9),
    Arm("tail bucket + top-p", tail_bucket, 0.9),
    Arm("student support + top-p", student_support, 0.9),
]
