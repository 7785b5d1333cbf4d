"""The gradients in the table of docs/divergences.md are those of ``topk_divergence``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from formulas import K, best, full, inputs, rounding, sampled_tokens
from torch import Tensor

from opd_kernels import jsd, skew_forward_kl, skew_reverse_kl, topk_divergence

T, BETA = 1.5, 0.25

# Of each divergence, the gradient by T times the logits of the entries, whose probabilities sum to
# 1: the support's under renormalize, or those and the tail.


def total(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


def reverse_gradient(p: Tensor, q: Tensor, m: Tensor) -> Tensor:
    ratio = p.log() - q.log()
    return p * (ratio - total(p * ratio))


def forward_gradient(p: Tensor, q: Tensor, m: Tensor) -> Tensor:
    return p - q


def jsd_gradient(p: Tensor, q: Tensor, m: Tensor) -> Tensor:
    ratio = p.log() - m.log()
    return (1 - BETA) * p * (ratio - total(p * ratio))


def skew_reverse_gradient(p: Tensor, q: Tensor, m: Tensor) -> Tensor:
    slope = p * (p.log() - m.log() + BETA * q / m)
    return slope - p * total(slope)


def skew_forward_gradient(p: Tensor, q: Tensor, m: Tensor) -> Tensor:
    slope = -(1 - BETA) * p * q / m
    return slope - p * total(slope)


WHOLE = {
    "reverse_kl": ("reverse_kl", reverse_gradient),
    "forward_kl": ("forward_kl", forward_gradient),
    "jsd": (jsd(BETA), jsd_gradient),
    "skew_reverse_kl": (skew_reverse_kl(BETA), skew_reverse_gradient),
    "skew_forward_kl": (skew_forward_kl(BETA), skew_forward_gradient),
}


def gradient(**options: Any) -> Tensor:
    student, teacher = inputs(torch.float64)
    student.requires_grad_()
    loss = topk_divergence(student, teacher, K, reduction="sum", temperature=T, **options)
    return T * torch.autograd.grad(loss, student)[0]


def entries() -> tuple[Tensor, ...]:
    """Ids, full log-probs of student and teacher at them, and the student's everywhere."""
    student, teacher = (x / T for x in inputs(torch.float64))
    ids = best(teacher)
    return ids, full(student, ids), full(teacher, ids), student.log_softmax(-1).exp()


def assert_gradient(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=4 * rounding(torch.float64))


@pytest.mark.parametrize("name", WHOLE)
def test_the_pages_gradients_under_renormalize(name: str) -> None:
    divergence, formula = WHOLE[name]
    ids, a, b, everywhere = entries()
    p, q = a.softmax(-1), b.softmax(-1)
    on_support = formula(p, q, BETA * q + (1 - BETA) * p)
    expected = torch.zeros_like(everywhere).scatter(-1, ids, on_support)
    assert_gradient(gradient(divergence=divergence), expected)


@pytest.mark.parametrize("name", WHOLE)
def test_the_pages_gradients_with_a_bucket(name: str) -> None:
    divergence, formula = WHOLE[name]
    ids, a, b, everywhere = entries()
    p, q = (torch.cat([x.exp(), 1 - total(x.exp())], -1) for x in (a, b))
    with_the_tails = formula(p, q, BETA * q + (1 - BETA) * p)
    shared_out = everywhere * with_the_tails[:, K:] / p[:, K:]
    expected = shared_out.scatter(-1, ids, with_the_tails[:, :K])
    assert_gradient(gradient(divergence=divergence, outside="bucket"), expected)


OTHERS = ["truncate forward", "truncate reverse", "generalize reverse", "generalize forward"]


@pytest.mark.parametrize("name", OTHERS)
def test_the_pages_gradients_without_a_tail(name: str) -> None:
    outside, direction = name.split()
    ids, a, b, everywhere = entries()
    p, q = a.exp(), b.exp()
    if name == "truncate forward":
        on_support, background = total(q) * p - q, total(q)
    elif name == "truncate reverse":
        slope = p * (a - b + 1)
        on_support, background = slope - p * total(slope), -total(slope)
    elif name == "generalize reverse":
        ratio = total(p * (a - b))
        on_support, background = p * (a - b - ratio), -ratio
    else:
        on_support, background = p * (1 + total(q) - total(p)) - q, total(q) - total(p)
    expected = (everywhere * background).scatter(-1, ids, on_support)
    assert_gradient(gradient(divergence=f"{direction}_kl", outside=outside), expected)


def test_the_pages_gradient_with_a_sampled_token() -> None:
    student, teacher = (x / T for x in inputs(torch.float64))
    ids, a, b, everywhere = entries()
    tokens = sampled_tokens(student)
    ratio = (student.log_softmax(-1) - teacher.log_softmax(-1)).gather(-1, tokens[:, None])
    ratio = ratio * ~(ids == tokens[:, None]).any(-1, keepdim=True)
    p = a.exp()
    value = total(p * (a - b)) + ratio
    expected = -everywhere * value
    at_token = expected.gather(-1, tokens[:, None]) + ratio
    expected = expected.scatter(-1, tokens[:, None], at_token).scatter(-1, ids, p * (a - b - value))
    assert_gradient(gradient(outside="sample", token_ids=tokens), expected)
