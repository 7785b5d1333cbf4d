"""The losses of today's trainers and papers, restated in plain PyTorch, are one call each.

docs/divergences.md lists the same calls, and what trainers do besides. No trainer is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from formulas import (
    K,
    N,
    best,
    full,
    inputs,
    kl,
    mixture,
    renormalised,
    rounding,
    sampled_tokens,
    with_tail,
)
from torch import Tensor

from opd_kernels import (
    Divergence,
    TopK,
    jsd,
    mixed,
    select_topk,
    skew_forward_kl,
    skew_reverse_kl,
    topk_divergence,
)

T = 1.5
FLOOR, CLIP = -2.5, 5.0
# float32 runs on the kernels of the machine, where there are any.
BACKENDS = [("reference", torch.float64), (None, torch.float32)]


def row_temperatures(dtype: torch.dtype) -> Tensor:
    return torch.linspace(0.5, 2.0, N, dtype=dtype)


def generalised_jsd(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """Forward KL at 0, reverse KL at 1, as trainers define these two."""
    if beta == 0:
        return kl(logq, logp)
    if beta == 1:
        return kl(logp, logq)
    m = mixture(logp, logq, beta)
    return beta * kl(logq, m) + (1 - beta) * kl(logp, m)


def entropy(x: Tensor) -> Tensor:
    return -(x.softmax(-1) * x.log_softmax(-1)).sum(-1)


# Each loss: restated as (student, teacher) -> (N,) in float64, and the call that gives it.


class Loss(NamedTuple):
    name: str
    restated: Callable[[Tensor, Tensor], Tensor]
    call: Callable[..., Tensor]


def served(teacher: Tensor) -> TopK:
    """What an inference server sends: the K best ids and their log-probs at temperature 1."""
    logprobs, ids = teacher.log_softmax(-1).topk(K)
    return TopK(ids, logprobs, logsumexp=torch.zeros_like(logprobs[:, 0]))


# verl: full softmaxes, the teacher's K best. Both sides' log-probs are raised to the floor before
# they are exponentiated. The student's logits have been divided by a temperature per token.


def verl(floor: float | None) -> Loss:
    def restated(student: Tensor, teacher: Tensor) -> Tensor:
        tempered = student / row_temperatures(student.dtype)[:, None]
        logp, logq = full(tempered, best(teacher)), full(teacher, best(teacher))
        if floor is not None:
            logp, logq = logp.clamp(min=floor), logq.clamp(min=floor)
        return kl(logq, logp)

    def call(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        return topk_divergence(
            student,
            served(teacher),
            divergence=Divergence(forward=1.0, logp_floor=floor),
            outside="truncate",
            temperature=row_temperatures(student.dtype),
            teacher_temperature=1.0,
            **options,
        )

    return Loss(f"verl, floor {floor}", restated, call)


VERL_TAIL = Loss(
    "verl, forward_kl_topk_tail",
    lambda s, t: kl(with_tail(t, best(t)), with_tail(s, best(t))),
    lambda s, t, **o: topk_divergence(s, served(t), divergence="forward_kl", outside="bucket", **o),
)


# NeMo-RL: the teacher is always renormalised on its K entries, raw logits.


def nemo_rl(weight: float) -> Loss:
    def restated(student: Tensor, teacher: Tensor) -> Tensor:
        logp, logq = (renormalised(x, best(teacher)) for x in (student, teacher))
        return weight * kl(logq, logp) + (1 - weight) * kl(logp, logq)

    def call(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        return topk_divergence(student, teacher, K, divergence=mixed(forward=weight), **options)

    return Loss(f"NeMo-RL, mixed {weight}", restated, call)


def nemo_rl_zero_outside() -> Loss:
    """``zero_outside_topk`` with the forward KL: the student's softmax is full."""

    def restated(student: Tensor, teacher: Tensor) -> Tensor:
        return kl(renormalised(teacher, best(teacher)), full(student, best(teacher)))

    def call(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        entries, ids = teacher.topk(K)
        nothing = torch.full_like(entries[:, 0], -math.inf)
        topk = TopK(ids, entries, logsumexp=entries.logsumexp(-1), tail_logsumexp=nothing)
        return topk_divergence(
            student, topk, divergence="forward_kl", outside="truncate", **options
        )

    return Loss("NeMo-RL, zero_outside_topk", restated, call)


# TRL's SDFT and SDPO: the student's K best; renormalised, or with the tail as one more entry.


def trl(alpha: float, tail: bool) -> Loss:
    named = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(alpha) or jsd(alpha)

    def restated(student: Tensor, teacher: Tensor) -> Tensor:
        ids, logprobs = best(student), with_tail if tail else renormalised
        return generalised_jsd(logprobs(student / T, ids), logprobs(teacher / T, ids), alpha)

    def call(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        return topk_divergence(
            student,
            teacher,
            K,
            divergence=named,
            outside="bucket" if tail else "renormalize",
            support="student",
            temperature=T,
            **options,
        )

    return Loss(f"TRL, alpha {alpha}, {'tail' if tail else 'renormalised'}", restated, call)


def ms_swift(beta: float) -> Loss:
    named = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta) or jsd(beta)

    def restated(student: Tensor, teacher: Tensor) -> Tensor:
        logp, logq = (renormalised(x / T, best(teacher)) for x in (student, teacher))
        return generalised_jsd(logp, logq, beta)

    def call(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        return topk_divergence(student, served(teacher), divergence=named, temperature=T, **options)

    return Loss(f"ms-swift, beta {beta}", restated, call)


# ROLL: all renormalised. The teacher's logits are divided by both temperatures.

KD, TEACHER, SKEW, HEAD = 1.5, 0.75, 0.125, 0.5


def adaptive(logp: Tensor, logq: Tensor) -> Tensor:
    """The forward KL's weight (N,): the gap on the head, as a share of the whole gap."""
    q, order = logq.exp().sort(-1)
    gap = (q - logp.exp().gather(-1, order)).abs()
    tail = q.cumsum(-1) <= HEAD
    return (gap * ~tail).sum(-1) / gap.sum(-1)


def roll(objective: str) -> Loss:
    def restated(student: Tensor, teacher: Tensor) -> Tensor:
        ids = best(teacher)
        logp, logq = renormalised(student / KD, ids), renormalised(teacher / KD / TEACHER, ids)
        if objective == "forward_kl":
            return kl(logq, logp)
        if objective == "reverse_kl":
            return kl(logp, logq)
        if objective == "adaptive_kl":
            weight = adaptive(logp, logq).detach()
            return weight * kl(logq, logp) + (1 - weight) * kl(logp, logq)
        if objective == "skewed_forward_kl":
            return kl(logq, mixture(logp, logq, SKEW))
        if objective == "skewed_reverse_kl":
            return kl(logp, mixture(logp, logq, 1 - SKEW))
        return generalised_jsd(logp, logq, 0.5)  # js_divergence

    def call(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        support = select_topk(teacher, K)
        divergence: Any = objective
        if objective == "adaptive_kl":
            logp = renormalised(student.detach() / KD, support.ids.long())
            logq = (support.logits / (KD * TEACHER)).log_softmax(-1)
            divergence = mixed(forward=adaptive(logp, logq))
        elif objective == "skewed_forward_kl":
            divergence = skew_forward_kl(SKEW)
        elif objective == "skewed_reverse_kl":
            divergence = skew_reverse_kl(1 - SKEW)
        elif objective == "js_divergence":
            divergence = "jsd"
        return topk_divergence(
            student,
            support,
            divergence=divergence,
            temperature=KD,
            teacher_temperature=KD * TEACHER,
            **options,
        )

    return Loss(f"ROLL, {objective}", restated, call)


ROLL = (
    "forward_kl",
    "reverse_kl",
    "adaptive_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "js_divergence",
)


# Megatron-LM: cached log-probs, from 2 to K a row, padded with -1000 at id -1; the rest of the
# vocabulary is a "ghost" token.


def ragged(teacher: Tensor) -> tuple[Tensor, Tensor]:
    logprobs, ids = teacher.log_softmax(-1).topk(K)
    padded = torch.arange(K) >= 2 + torch.arange(N)[:, None] % (K - 1)
    return logprobs.masked_fill(padded, -1000.0), ids.masked_fill(padded, -1)


def megatron() -> Loss:
    def restated(student: Tensor, teacher: Tensor) -> Tensor:
        _, ids = ragged(teacher)
        return kl(with_tail(teacher, ids), with_tail(student, ids))

    def call(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        logprobs, ids = ragged(teacher)
        topk = TopK(ids, logprobs, logsumexp=torch.zeros_like(logprobs[:, 0]))
        return topk_divergence(student, topk, divergence="forward_kl", outside="bucket", **options)

    return Loss("Megatron-LM", restated, call)


OPENCLAW_RL = Loss(
    "OpenClaw-RL",
    lambda s, t: kl(with_tail(s, best(t)), with_tail(t, best(t))),
    lambda s, t, **o: topk_divergence(s, served(t), outside="bucket", **o),
)


# MOPD (2606.30406): each entry's own p (log p - log q) - p + q, which is never negative.


def mopd_restated(student: Tensor, teacher: Tensor) -> Tensor:
    logp, logq = full(student, best(teacher)), full(teacher, best(teacher))
    return kl(logp, logq) + (logq.exp() - logp.exp()).sum(-1)


MOPD = Loss(
    "MOPD",
    mopd_restated,
    lambda s, t, **o: topk_divergence(s, t, K, outside="generalize", **o),
)


# TOP-D (2607.04751): the target is beta q + (1 - beta) p. The paper holds it constant.

TOP_D = Loss(
    "TOP-D",
    lambda s, t: kl(
        with_tail(s, best(t)), mixture(with_tail(s, best(t)), with_tail(t, best(t)), 0.2)
    ),
    lambda s, t, **o: topk_divergence(
        s, t, K, divergence=skew_reverse_kl(0.2), outside="bucket", **o
    ),
)


def top_d_constant() -> Loss:
    def restated(student: Tensor, teacher: Tensor) -> Tensor:
        logp, logq = (renormalised(x, best(teacher)) for x in (student, teacher))
        return kl(logp, mixture(logp.detach(), logq, 0.2))

    def call(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        support = select_topk(teacher, K)
        logp = renormalised(student.detach(), support.ids.long())
        target = mixture(logp, support.logits.log_softmax(-1), 0.2)
        return topk_divergence(student, TopK(support.ids, target), **options)

    return Loss("TOP-D, a constant target", restated, call)


# EOPD (2603.07079): a forward KL where the teacher's entropy is above a threshold.


def eopd(outside: str) -> Loss:
    def gate(teacher: Tensor) -> Tensor:
        uncertainty = entropy(teacher)
        return (uncertainty > uncertainty.median()).to(teacher.dtype)

    def restated(student: Tensor, teacher: Tensor) -> Tensor:
        ids = best(teacher)
        if outside == "truncate":  # the forward term alone, as it is added to a policy gradient
            return gate(teacher) * kl(full(teacher, ids), full(student, ids))
        logp, logq = with_tail(student, ids), with_tail(teacher, ids)
        return kl(logp, logq) + gate(teacher) * kl(logq, logp)

    def call(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        reverse = 0.0 if outside == "truncate" else 1.0
        divergence = Divergence(reverse=reverse, forward=gate(teacher))
        return topk_divergence(
            student, teacher, K, divergence=divergence, outside=outside, **options
        )

    return Loss(f"EOPD, {outside}", restated, call)


# The code of the paper (2603.25562): log ratios clamped to +-5, and the sampled token as one more
# entry where it is not among the K best.


def clipped(logp: Tensor, logq: Tensor) -> Tensor:
    return (logp.exp() * (logp - logq).clamp(-CLIP, CLIP)).sum(-1)


CLIPPED = Divergence(reverse=1.0, log_ratio_clip=CLIP)

PAPER_CLIP = Loss(
    "the paper, clip",
    lambda s, t: clipped(renormalised(s, best(t)), renormalised(t, best(t))),
    lambda s, t, **o: topk_divergence(s, t, K, divergence=CLIPPED, **o),
)

PAPER_UNNORMALISED = Loss(
    "the paper, clip, not renormalised",
    lambda s, t: clipped(full(s, best(t)), full(t, best(t))),
    lambda s, t, **o: topk_divergence(s, t, K, divergence=CLIPPED, outside="truncate", **o),
)


def paper_union() -> Loss:
    def restated(student: Tensor, teacher: Tensor) -> Tensor:
        token = sampled_tokens(student)[:, None]
        ids = torch.cat([best(teacher), token], -1)
        # Where the token is among the K best, its second entry weighs nothing on either side.
        dropped = torch.zeros(N, K + 1, dtype=torch.bool)
        dropped[:, K] = (ids[:, :K] == token).any(-1)
        sides = [x.gather(-1, ids).masked_fill(dropped, -1e30) for x in (student, teacher)]
        return clipped(*(x.log_softmax(-1) for x in sides))

    def call(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        return topk_divergence(
            student,
            teacher,
            K,
            divergence=CLIPPED,
            token_ids=sampled_tokens(student),
            include_token=True,
            **options,
        )

    return Loss("the paper, union with the sampled token", restated, call)


LOSSES = [
    verl(None),
    verl(FLOOR),
    VERL_TAIL,
    nemo_rl(0.5),
    nemo_rl(0.25),
    nemo_rl_zero_outside(),
    *[trl(alpha, tail) for alpha in (0.0, 0.25, 0.5, 1.0) for tail in (False, True)],
    *[ms_swift(beta) for beta in (0.0, 0.25, 1.0)],
    *[roll(objective) for objective in ROLL],
    megatron(),
    OPENCLAW_RL,
    MOPD,
    TOP_D,
    top_d_constant(),
    eopd("truncate"),
    eopd("bucket"),
    PAPER_CLIP,
    PAPER_UNNORMALISED,
    paper_union(),
]


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=["float64", "float32"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_a_trainers_loss_is_one_call(loss: Loss, backend: str | None, dtype: torch.dtype) -> None:
    student, teacher = (x.requires_grad_() for x in inputs(dtype))
    wide = student.detach().double().requires_grad_()
    upstream = torch.linspace(-1.0, 2.0, N, dtype=torch.float64)
    expected = loss.restated(wide, teacher.detach().double())
    (expected_grad,) = torch.autograd.grad(expected, wide, upstream)

    values = loss.call(student, teacher, reduction="none", backend=backend)
    grad, teacher_grad = torch.autograd.grad(
        values, (student, teacher), upstream.to(values.dtype), allow_unused=True
    )
    assert teacher_grad is None
    bound = rounding(dtype)
    torch.testing.assert_close(values.double(), expected, rtol=0.0, atol=bound)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0.0, atol=4 * bound)


@pytest.mark.parametrize("dtype", [dtype for _, dtype in BACKENDS])
def test_floor_clip_gate_and_union_are_at_work(dtype: torch.dtype) -> None:
    """In some entries or rows, and not in all."""
    student, teacher = inputs(dtype)
    ids = best(teacher)
    ratio = (renormalised(student, ids) - renormalised(teacher, ids)).abs()
    inside = (ids == sampled_tokens(student)[:, None]).any(-1)
    for some in (full(student, ids) < FLOOR, full(teacher, ids) < FLOOR, ratio > CLIP, inside):
        assert some.any()
        assert not some.all()


def test_verls_clamp_at_zero_is_not_in_the_loss() -> None:
    """verl replaces a row's negative loss by 0, and with it the gradient of that row."""
    student, teacher = inputs(torch.float64)
    student[::2] = 2 * teacher[::2]  # more on the support than the teacher has there
    student.requires_grad_()
    options: dict[str, Any] = {"divergence": "forward_kl", "outside": "truncate"}
    loss = topk_divergence(student, served(teacher), reduction="none", **options)
    negative = loss < 0
    assert negative.any()
    assert not negative.all()
    (grad,) = torch.autograd.grad(loss.clamp(min=0.0).sum(), student)
    moved = grad.abs().sum(-1) > 0
    assert torch.equal(moved, ~negative)
