"""Gradient estimators with a discounted return-to-go: their variance, and their bias.

Everything is measured on the output layer, weight and bias together: D = 2 * (60 + 1) coordinates.
A gradient is that of the loss, -Σ_t A_t ∇ log p(a_t | s_t) averaged over trajectories, where A_t is
the discounted sum of the rewards log q(a_t | s_t) - log p(a_t | s_t) from t on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from toy.control import Policies, Task, log_prob, noise, roll_out

from opd_kernels import sampled_token_advantages

MICRO_BATCH = 8  # trajectories whose mean is one gradient


def scores(outputs: Tensor, actions: Tensor) -> Tensor:
    """∂ log p(a_t | s_t) / ∂ outputs, (..., 2)."""
    outputs = outputs.detach().requires_grad_()
    return torch.autograd.grad(log_prob(outputs, actions).sum(), outputs)[0]


def micro_batch_gradients(features: Tensor, slopes: Tensor, advantages: Tensor) -> Tensor:
    """Gradients (R, B / MICRO_BATCH, D) of the loss on the output layer.

    Takes features (R, B, T, H), slopes (R, B, T, outputs) and advantages (R, B, T).
    """
    runs, count, horizon, width = features.shape
    groups = count // MICRO_BATCH
    features = features.reshape(runs * groups, MICRO_BATCH * horizon, width)
    weighted = (-advantages.unsqueeze(-1) * slopes).reshape(
        runs * groups, MICRO_BATCH * horizon, -1
    )
    weight = features.transpose(1, 2) @ weighted  # (R * groups, H, outputs)
    gradient = torch.cat([weight.flatten(1), weighted.sum(1)], 1)
    return gradient.view(runs, groups, -1) / MICRO_BATCH


def total_variance(gradients: Tensor) -> Tensor:
    """Unbiased variance between gradients (..., M, D), summed over coordinates: (...)."""
    return gradients.var(-2).sum(-1)


def squared_norm(estimates: Tensor) -> tuple[Tensor, Tensor]:
    """‖E v‖² from independent estimates v (..., G, D), without bias, and its standard error.

    The plain ‖mean v‖² is too large by the variance of the mean; the mean of v_i · v_j over i ≠ j
    is not. The standard error is the jackknife's, which is too large where E v is near 0.
    """
    products = estimates @ estimates.mT  # (..., G, G)
    own = products.diagonal(dim1=-2, dim2=-1)  # (..., G)
    groups = own.shape[-1]
    pairs = products.sum((-2, -1)) - own.sum(-1)
    without = pairs.unsqueeze(-1) - 2 * (products.sum(-1) - own)  # sums over pairs that lack one
    without = without / ((groups - 1) * (groups - 2))
    error = ((groups - 1) * without.var(-1, correction=0)).sqrt()
    return pairs / (groups * (groups - 1)), error


@dataclass(frozen=True)
class Frozen:
    """Estimators at students that do not change; each tensor is (gammas, R)."""

    variance: Tensor  # of one micro-batch's gradient
    squared_bias: Tensor  # ‖E g_gamma - E g_1‖²
    squared_bias_error: Tensor
    signal: Tensor  # ‖E g_1‖², the same for every gamma


def measure_frozen(
    students: Policies,
    teachers: Policies,
    task: Task,
    gammas: Sequence[float],
    generators: Sequence[Generator],
    groups: int,
    group_size: int,
) -> Frozen:
    """Variance and bias of the estimator with each gamma, all from the same trajectories.

    `gammas` ends with 1, the gradient without bias. Each of the R students, one for each generator,
    plays `groups` times `group_size` trajectories; the groups are the jackknife's.
    """
    gradients = []
    for _ in range(groups):
        rollouts = roll_out(students, task, noise(generators, group_size))
        with torch.no_grad():
            features, outputs = students(rollouts.inputs)
            logprobs = log_prob(outputs, rollouts.actions)
            teacher_logprobs = log_prob(teachers(rollouts.inputs)[1], rollouts.actions)
        slopes = scores(outputs, rollouts.actions)
        gradients.append(
            torch.stack(
                [
                    micro_batch_gradients(
                        features,
                        slopes,
                        sampled_token_advantages(teacher_logprobs, logprobs, gamma),
                    )
                    for gamma in gammas
                ]
            )
        )
    every = torch.stack(gradients, 2).double()  # (gammas, R, groups, micro-batches, D)
    means = every.mean(3)
    squared_bias, error = squared_norm(means - means[-1])
    signal, _ = squared_norm(means[-1])
    variance = total_variance(every.flatten(2, 3))
    return Frozen(variance, squared_bias, error, signal.expand_as(variance))
