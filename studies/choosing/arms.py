"""The objectives to choose from. Each is a call or two of the package's kernels."""

from __future__ import annotations

from functools import partial

import torch
from comparison.arms import LSM_TOP_P, SAMPLED_TOKEN, Arm, Scores, sampled_token
from torch import Tensor

from opd_kernels import (
    mixed,
    sampled_token_advantages,
    sampled_token_loss,
    topk_divergence,
    topk_rkl,
)

TOP_P = 0.9
DISCOUNT = 0.9
PENALTY = 1.0


def discounted(scores: Scores) -> Tensor:
    """The sampled token with what is said later as part of its return."""
    response, (student, teacher) = scores.response, scores.said
    assert response is not None
    ours, theirs = (torch.zeros(response.shape) for _ in range(2))
    ours[response], theirs[response] = student.detach().float(), teacher.float()
    advantages = sampled_token_advantages(theirs, ours, DISCOUNT, mask=response)[response]
    return sampled_token_loss(student, student.detach(), advantages, reduction="none")


def member(scores: Scores, outside: str, divergence: str | object = "reverse_kl") -> Tensor:
    """A divergence on the teacher's support; the sampled tokens count where it uses them."""
    return topk_divergence(
        scores.student,
        scores.support,
        divergence=divergence,
        outside=outside,
        token_ids=scores.tokens,
        vocab_size=scores.vocab,
        reduction="none",
    )


def on_students_support(scores: Scores, outside: str) -> Tensor:
    """The reverse KL on the K tokens that the student thinks most likely."""
    return topk_divergence(
        scores.student,
        scores.teacher,
        scores.k,
        outside=outside,
        support="student",
        vocab_size=scores.vocab,
        reduction="none",
    )


def lost_mass(scores: Scores) -> Tensor:
    """Q - P where the student has less mass on the support than the teacher, else 0.

    The forward KL, truncated and generalised, differ by just that, and so do their gradients.
    """
    truncated, generalized = (
        member(scores, outside, "forward_kl") for outside in ("truncate", "generalize")
    )
    return (truncated - generalized).relu()


def penalized(scores: Scores) -> Tensor:
    """LSM, and what the student lost of the mass on the support."""
    rows = topk_rkl(scores.student, scores.support, vocab_size=scores.vocab, reduction="none")
    return rows + PENALTY * lost_mass(scores)


BUCKET = Arm("bucket + top-p", partial(member, outside="bucket"), TOP_P)
PENALIZED = Arm("LSM + mass penalty + top-p", penalized, TOP_P)
ARMS = [
    SAMPLED_TOKEN,
    Arm("sampled-token + top-p", sampled_token, TOP_P),
    Arm(f"sampled-token, discount {DISCOUNT}", discounted),
    LSM_TOP_P,
    BUCKET,
    Arm("sample", partial(member, outside="sample")),  # unbiased without top-p only
    Arm("generalize + top-p", partial(member, outside="generalize"), TOP_P),
    Arm("student support + top-p", partial(on_students_support, outside="renormalize"), TOP_P),
    Arm("student bucket + top-p", partial(on_students_support, outside="bucket"), TOP_P),
    PENALIZED,
    Arm(
        "mixed 0.5 + top-p",
        partial(member, outside="renormalize", divergence=mixed(0.5)),
        TOP_P,
    ),
]
BY_NAME = {arm.name: arm for arm in ARMS}
# Their loss does not depend on the teacher's K best.
WITHOUT_SUPPORT = {arm.name for arm in ARMS if arm.name.startswith("sampled-token")}
SEVERAL_CALLS = {PENALIZED.name}  # of the package's functions
