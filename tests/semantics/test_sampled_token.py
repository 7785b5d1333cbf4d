"""The sampled-token baseline: returns, advantages, the clipped loss and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from opd_kernels import returns_to_go, sampled_token_advantages, sampled_token_loss

INF, NAN = torch.inf, torch.nan


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def loop(rewards: torch.Tensor, gamma: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Returns by their recursion, backwards in float64."""
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    rewards = rewards.double().masked_fill(~mask, 0.0)
    returns, running = torch.zeros_like(rewards), torch.zeros(rewards.shape[:-1]).double()
    for t in reversed(range(rewards.shape[-1])):
        running = rewards[..., t] + gamma * running
        returns[..., t] = running
    return returns.masked_fill(~mask, 0.0)


def token_loss(
    log_ratio: float, advantage: float, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, gradient) of one token whose log-prob rose by ``log_ratio``."""
    old = torch.tensor([-2.0], dtype=torch.float64)
    logprobs = (old + log_ratio).requires_grad_()
    loss = sampled_token_loss(logprobs, old, torch.tensor([advantage]), **kwargs)
    loss.backward()
    return loss.detach(), logprobs.grad[0]


# Returns


@given(
    seed=st.integers(0, 2**31),
    length=st.integers(0, 70),
    gamma=st.one_of(st.sampled_from([0.0, 1.0, 1e-30, 0.5]), st.floats(0, 1)),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_returns_are_those_of_the_recursion(
    seed: int, length: int, gamma: float, masked: bool, dtype: torch.dtype
) -> None:
    rewards = randn(3, length, seed=seed, dtype=dtype)
    mask = randn(3, length, seed=seed + 1) > 0 if masked else None
    returns = returns_to_go(rewards, gamma, mask=mask)
    assert returns.shape == rewards.shape
    assert returns.dtype == dtype
    # log2(70) additions and products on the way to each return, each off by half an ulp of what
    # the absolute values sum to.
    size = loop(rewards.abs(), gamma, mask)
    error = (returns.double() - loop(rewards, gamma, mask)).abs()
    assert (error <= 8 * torch.finfo(dtype).eps * size + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("gamma", [0.999, 1.0])
def test_returns_of_long_sequences_stay_accurate(gamma: float) -> None:
    rewards = randn(2, 5000) + 1
    exact = loop(rewards, gamma)
    error = (returns_to_go(rewards, gamma) - exact).abs()
    assert (error <= 14 * torch.finfo(torch.float32).eps * loop(rewards.abs(), gamma)).all()


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_returns_of_at_most_one_token_are_its_reward(length: int, gamma: float) -> None:
    rewards = randn(2, length)
    assert torch.equal(returns_to_go(rewards, gamma), rewards)


def test_without_discounted_future_returns_are_the_rewards_whatever_follows() -> None:
    rewards = torch.tensor([1.0, 2.0, INF, NAN])
    assert returns_to_go(rewards, 0.0)[:3].tolist() == [1.0, 2.0, INF]


def test_time_passes_over_masked_positions() -> None:
    rewards, mask = torch.tensor([1.0, 5.0, 5.0, 8.0]), torch.tensor([1, 0, 0, 1])
    assert returns_to_go(rewards, 0.5, mask=mask).tolist() == [2.0, 0.0, 0.0, 8.0]


@pytest.mark.parametrize("junk", [NAN, INF, -INF])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_what_a_masked_position_holds_does_not_matter_to_returns(junk: float, gamma: float) -> None:
    rewards, mask = randn(2, 9), randn(2, 9, seed=1) > 0
    broken = rewards.masked_fill(~mask, junk).requires_grad_()
    returns = returns_to_go(broken, gamma, mask=mask)
    assert torch.equal(returns, returns_to_go(rewards, gamma, mask=mask))
    assert returns[~mask].count_nonzero() == 0
    (grad,) = torch.autograd.grad(returns.sum(), broken)
    assert torch.equal(grad == 0, ~mask)


def test_gradients_of_returns_are_the_discounts() -> None:
    rewards = randn(6).double().requires_grad_()
    (grad,) = torch.autograd.grad(returns_to_go(rewards, 0.5)[1], rewards)
    assert grad.tolist() == [0, 1, 0.5, 0.25, 0.125, 0.0625]


def test_half_precision_rewards_are_summed_in_float32() -> None:
    rewards = torch.ones(4096, dtype=torch.bfloat16)
    returns = returns_to_go(rewards, 1.0)
    assert returns.dtype == torch.float32
    assert torch.equal(returns, torch.arange(4096, 0, -1).float())


# Advantages


def test_advantages_are_discounted_log_ratios_without_graph() -> None:
    teacher, old = randn(2, 7).requires_grad_(), randn(2, 7, seed=1).requires_grad_()
    advantages = sampled_token_advantages(teacher, old, 0.5)
    assert not advantages.requires_grad
    assert torch.equal(advantages, returns_to_go((teacher - old).detach(), 0.5))
    assert torch.equal(sampled_token_advantages(teacher, old), (teacher - old).detach())


def test_advantages_take_the_difference_in_float32() -> None:
    teacher, old = torch.tensor([-8.0]).bfloat16(), torch.tensor([-8.0 - 2**-10])
    assert sampled_token_advantages(teacher, old).tolist() == [2**-10]


def test_masked_positions_have_advantage_zero_and_add_nothing_to_others() -> None:
    teacher, old, mask = torch.tensor([0.0, -INF]), torch.tensor([-1.0, -INF]), torch.tensor([1, 0])
    assert sampled_token_advantages(teacher, old, 1.0, mask=mask).tolist() == [1.0, 0.0]


# Loss


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [
        (1.19, 2.0, False), (1.21, 2.0, True), (0.5, 2.0, False),
        (0.81, -2.0, False), (0.79, -2.0, True), (2.0, -2.0, False),
    ],
)  # fmt: skip
def test_gradient_is_minus_ratio_times_advantage_and_zero_where_clipped(
    ratio: float, advantage: float, clipped: bool
) -> None:
    loss, grad = token_loss(math.log(ratio), advantage)
    bound = min(max(ratio, 0.8), 1.2)
    expected = -min(ratio * advantage, bound * advantage)
    assert loss.item() == pytest.approx(expected, rel=1e-14)
    assert grad.item() == (0.0 if clipped else pytest.approx(-ratio * advantage, rel=1e-14))


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.1, 10.0])
def test_without_clip_no_ratio_is_clipped(ratio: float, advantage: float) -> None:
    loss, grad = token_loss(math.log(ratio), advantage, clip=None)
    assert loss.item() == pytest.approx(-ratio * advantage, rel=1e-14)
    assert grad.item() == pytest.approx(-ratio * advantage, rel=1e-14)


@pytest.mark.parametrize("ratio", [1e-6, 2.4, 2.6])
def test_clip_above_one_bounds_ratios_from_above_only(ratio: float) -> None:
    for advantage in (1.0, -1.0):
        loss, _ = token_loss(math.log(ratio), advantage, clip=1.5)
        expected = -min(ratio * advantage, min(ratio, 2.5) * advantage)
        assert loss.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_policy_the_gradient_is_that_of_minus_advantage_times_log_prob(
    dtype: torch.dtype,
) -> None:
    logprobs = randn(3, 5, dtype=dtype).requires_grad_()
    advantages = randn(3, 5, seed=1)
    loss = sampled_token_loss(logprobs, logprobs, advantages, reduction="sum")
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert torch.equal(grad, -advantages.to(dtype))
    assert loss.dtype == torch.float32


def test_a_ratio_that_overflows_has_gradient_zero_where_it_is_clipped() -> None:
    loss, grad = token_loss(2000.0, 1.0)
    assert loss.item() == pytest.approx(-1.2)
    assert grad.item() == 0.0


def test_expected_gradient_of_the_token_level_loss_is_that_of_the_full_reverse_kl() -> None:
    logits = randn(2, 6, dtype=torch.float64).requires_grad_()
    teacher = randn(2, 6, seed=1, dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    (exact,) = torch.autograd.grad((probs * (logprobs - teacher)).sum(), logits, retain_graph=True)

    # Every token of the vocabulary once, weighted by how often the student samples it.
    advantages = sampled_token_advantages(teacher, logprobs)
    losses = sampled_token_loss(logprobs, logprobs.detach(), advantages, reduction="none")
    (expected,) = torch.autograd.grad((probs.detach() * losses).sum(), logits)
    torch.testing.assert_close(expected, exact, rtol=1e-12, atol=1e-14)


def test_expected_gradient_of_the_sequence_level_loss_is_that_of_the_sequences_reverse_kl() -> None:
    # Two tokens of a vocabulary of three; the second one's distribution depends on the first.
    first = randn(3, dtype=torch.float64).requires_grad_()
    second = randn(3, 3, seed=1, dtype=torch.float64).requires_grad_()
    teacher_first = randn(3, seed=2, dtype=torch.float64).log_softmax(-1)
    teacher_second = randn(3, 3, seed=3, dtype=torch.float64).log_softmax(-1)

    def sequences(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        """Log-probs of the two tokens of all nine sequences, (9, 2)."""
        return torch.stack([one[:, None].expand(3, 3).flatten(), two.flatten()], -1)

    logprobs = sequences(first.log_softmax(-1), second.log_softmax(-1))
    teacher = sequences(teacher_first, teacher_second)
    probs = logprobs.sum(-1).exp()
    divergence = (probs * (logprobs - teacher).sum(-1)).sum()
    exact = torch.autograd.grad(divergence, (first, second), retain_graph=True)

    advantages = sampled_token_advantages(teacher, logprobs, 1.0)
    losses = sampled_token_loss(logprobs, logprobs, advantages, reduction="none")
    expected = torch.autograd.grad((probs.detach() * losses.sum(-1)).sum(), (first, second))
    torch.testing.assert_close(expected, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("junk", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["logprobs", "old_logprobs", "advantages"])
@pytest.mark.parametrize("clip", [0.2, None])
def test_masked_tokens_have_loss_and_gradient_zero_whatever_they_hold(
    junk: float, where: str, clip: float | None
) -> None:
    names = ["logprobs", "old_logprobs", "advantages"]
    values = {name: randn(2, 6, seed=i) for i, name in enumerate(names)}
    mask = torch.tensor([1, 1, 0, 1, 0, 1]).expand(2, 6)
    values[where] = values[where].masked_fill(mask == 0, junk)
    values["logprobs"].requires_grad_()
    losses = sampled_token_loss(**values, clip=clip, mask=mask, reduction="none")
    # An upstream gradient that is NaN there does no harm either.
    (grad,) = torch.autograd.grad(
        losses, values["logprobs"], torch.ones(2, 6).masked_fill(mask == 0, NAN)
    )
    assert (losses[mask == 0] == 0).all()
    assert (grad[mask == 0] == 0).all()
    assert losses.isfinite().all()
    assert grad.isfinite().all()
    assert (losses[mask != 0] != 0).all()


def test_mean_divides_by_unmasked_tokens_or_the_normalizer() -> None:
    logprobs, old, advantages = randn(2, 6), randn(2, 6, seed=1), randn(2, 6, seed=2)
    mask = randn(2, 6, seed=3) > 0

    def loss(**kwargs: Any) -> torch.Tensor:
        return sampled_token_loss(logprobs, old, advantages, **kwargs)

    losses = loss(reduction="none")
    assert losses.shape == (2, 6)
    torch.testing.assert_close(loss(), losses.mean())
    torch.testing.assert_close(loss(mask=mask), losses[mask].mean())
    torch.testing.assert_close(loss(mask=mask.int()), losses[mask].mean())
    torch.testing.assert_close(loss(mask=mask, reduction="sum"), losses[mask].sum())
    for normalizer in (4.0, torch.tensor(4)):
        torch.testing.assert_close(loss(mask=mask, normalizer=normalizer), losses[mask].sum() / 4)


def test_a_batch_that_is_masked_throughout_has_loss_zero_with_its_graph() -> None:
    logprobs = randn(2, 3).requires_grad_()
    loss = sampled_token_loss(logprobs, logprobs, randn(2, 3), mask=torch.zeros(2, 3).bool())
    loss.backward()
    assert loss == 0
    assert logprobs.grad.count_nonzero() == 0


def test_gradients_reach_the_log_probs_only() -> None:
    tensors = [randn(4, seed=i).requires_grad_() for i in range(3)]
    sampled_token_loss(*tensors).backward()
    assert [tensor.grad is not None for tensor in tensors] == [True, False, False]


def test_float64_where_an_input_is() -> None:
    single, double = randn(4), randn(4, dtype=torch.float64)
    assert sampled_token_loss(single, single, single).dtype == torch.float32
    assert sampled_token_loss(single, single, double).dtype == torch.float64
    assert sampled_token_advantages(single, double).dtype == torch.float64


def test_tensors_made_under_inference_mode_can_be_trained_on() -> None:
    with torch.inference_mode():
        old, teacher = randn(4), randn(4, seed=1)
        advantages, mask = sampled_token_advantages(teacher, old), old != 0
    logprobs = randn(4).requires_grad_()
    sampled_token_loss(logprobs, old, advantages, mask=mask).backward()
    assert torch.equal(logprobs.grad, -advantages / 4)


def test_no_value_is_read_on_the_host() -> None:
    with FakeTensorMode():
        values, mask = torch.zeros(2, 5, requires_grad=True), torch.ones(2, 5).bool()
        advantages = sampled_token_advantages(values, values, 0.9, mask=mask)
        sampled_token_loss(values, values, advantages, mask=mask).backward()
        assert values.grad.shape == (2, 5)


X = torch.zeros(2, 3)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "gamma above 1": (lambda: returns_to_go(X, 1.5), ValueError, ["1.5", "0", "1"]),
    "gamma NaN": (lambda: returns_to_go(X, NAN), ValueError, ["nan"]),
    "gamma a tensor": (lambda: returns_to_go(X, torch.tensor(0.5)), TypeError, [".item()"]),
    "gamma a string": (lambda: returns_to_go(X, "1"), TypeError, ["gamma", "str", "from 0 to 1"]),
    "gamma a bool": (lambda: returns_to_go(X, True), TypeError, ["bool", "from 0 to 1"]),
    "rewards scalar": (lambda: returns_to_go(X[0, 0], 1.0), ValueError, ["scalar", "(..., T)"]),
    "rewards integer": (lambda: returns_to_go(X.int(), 1.0), TypeError, ["int32", "float()"]),
    "rewards a list": (lambda: returns_to_go([1.0], 1.0), TypeError, ["rewards", "list"]),
    "mask shape": (
        lambda: returns_to_go(X, 1.0, mask=X[0] == 0),
        ValueError,
        ["mask", "(3,)", "(2, 3)", "rewards"],
    ),
    "mask floating": (lambda: returns_to_go(X, 1.0, mask=X), TypeError, ["mask", "float32"]),
    "advantages' shapes": (
        lambda: sampled_token_advantages(X, X[0]),
        ValueError,
        ["old_logprobs", "(3,)", "(2, 3)"],
    ),
    "loss's shapes": (
        lambda: sampled_token_loss(X, X, X[:1]),
        ValueError,
        ["advantages", "(1, 3)", "(2, 3)"],
    ),
    "device": (
        lambda: sampled_token_loss(X, X.to("meta"), X),
        ValueError,
        ["old_logprobs", "meta", "cpu"],
    ),
    "clip negative": (lambda: sampled_token_loss(X, X, X, clip=-0.1), ValueError, ["-0.1", "None"]),
    "clip infinite": (lambda: sampled_token_loss(X, X, X, clip=INF), ValueError, ["inf", "None"]),
    "clip a tensor": (lambda: sampled_token_loss(X, X, X, clip=X), TypeError, [".item()"]),
    "reduction": (lambda: sampled_token_loss(X, X, X, reduction="avg"), ValueError, ["none, sum"]),
    "normalizer with sum": (
        lambda: sampled_token_loss(X, X, X, reduction="sum", normalizer=2),
        ValueError,
        ["normalizer", "'sum'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_was_given_and_what_to_do(case: str) -> None:
    call, error, fragments = BAD[case]
    with pytest.raises(error) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_no_advantage_is_no_loss_however_large_the_ratio(clip: float | None) -> None:
    logprobs = torch.zeros(2, requires_grad=True)
    loss = sampled_token_loss(
        logprobs, torch.full((2,), -200.0), torch.tensor([0.0, -0.0]), clip=clip, reduction="sum"
    )
    loss.backward()
    assert loss.item() == 0
    assert logprobs.grad.tolist() == [0, 0]
