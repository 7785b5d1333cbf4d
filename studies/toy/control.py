"""Two mirrored one-dimensional control tasks, batches of small policies for them, and teachers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

HORIZON = 20
HIDDEN = 60
STD_FLOOR = 0.1
# A teacher pays for the length of its steps: the best plan is then an even walk to the target.
STEP_COST, MISS_COST = 0.8, 2.0
TEACHER_BATCH, TEACHER_LR = 64, 3e-3


@dataclass(frozen=True)
class Task:
    """Where a trajectory starts and where its teacher has learnt to end; `identity` is an input."""

    name: str
    identity: float
    start: float
    target: float


TASKS = (Task("left", -1.0, 2.0, -3.0), Task("right", 1.0, -2.0, 3.0))


class Policies:
    """R Gaussian policies of equal shape, each an MLP 3 -> 60 -> 60 -> 2 of 4022 parameters.

    `parameters` are three weights (R, in, out), each followed by its bias (R, 1, out).
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        """Hold `parameters`; they are not copied."""
        self.parameters = list(parameters)

    @classmethod
    def fresh(cls, generators: Sequence[Generator]) -> Policies:
        """One policy for each generator: uniform weights of variance 1 / (3 in), biases 0."""
        parameters = []
        for rows, columns in ((3, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 2)):
            uniform = torch.stack([torch.rand(rows, columns, generator=g) for g in generators])
            parameters += [(2 * uniform - 1) / math.sqrt(rows)]
            parameters += [torch.zeros(len(generators), 1, columns)]
        return cls(parameters)

    def repeat(self, times: int) -> Policies:
        """All policies in order, `times` over, as copies without a graph."""
        return Policies([p.detach().repeat(times, 1, 1) for p in self.parameters])

    def first(self, count: int) -> Policies:
        """Copies of the first `count` policies, without a graph."""
        return Policies([p.detach()[:count].clone() for p in self.parameters])

    def adam(self, learning_rate: float) -> torch.optim.Optimizer:
        """Adam for the parameters, which take gradients from here on."""
        for parameter in self.parameters:
            parameter.requires_grad_()
        return torch.optim.Adam(self.parameters, lr=learning_rate)

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Features (R, ..., H) and outputs (R, ..., 2) for inputs (R, ..., 3)."""
        w1, b1, w2, b2, w3, b3 = self.parameters
        hidden = torch.tanh(torch.baddbmm(b1, inputs.flatten(1, -2), w1))
        hidden = torch.tanh(torch.baddbmm(b2, hidden, w2))
        outputs = torch.baddbmm(b3, hidden, w3)
        shape = inputs.shape[:-1]
        return hidden.view(*shape, HIDDEN), outputs.view(*shape, 2)


def gaussian(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the action that outputs (..., 2) stand for."""
    return outputs[..., 0], STD_FLOOR + F.softplus(outputs[..., 1])


def log_prob(outputs: Tensor, actions: Tensor) -> Tensor:
    """Log-density (...) of the actions (...) under outputs (..., 2)."""
    mean, std = gaussian(outputs)
    return -0.5 * ((actions - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) of one action, in nats, from both sides' outputs (..., 2)."""
    (mean, std), (teacher_mean, teacher_std) = gaussian(student), gaussian(teacher)
    ratio = std / teacher_std
    return 0.5 * (ratio**2 + ((mean - teacher_mean) / teacher_std) ** 2 - 1) - ratio.log()


@dataclass(frozen=True)
class Rollouts:
    """What R policies did in B trajectories each."""

    inputs: Tensor  # (R, B, T, 3): task, state over 3, time over T
    actions: Tensor  # (R, B, T)
    states: Tensor  # (R, B, T + 1)


def noise(generators: Sequence[Generator], count: int) -> Tensor:
    """Standard normal draws (R, count, T), one row of trajectories from each generator."""
    return torch.stack([torch.randn(count, HORIZON, generator=g) for g in generators])


@torch.no_grad()
def roll_out(policies: Policies, task: Task, draws: Tensor) -> Rollouts:
    """Trajectories of the policies; `draws` (R, B, T) make the actions of given distributions."""
    state = torch.full(draws.shape[:2], task.start)
    inputs, actions, states = [], [], [state]
    for step in range(HORIZON):
        identity = torch.full_like(state, task.identity)
        time = torch.full_like(state, step / HORIZON)
        inputs.append(torch.stack([identity, state / 3, time], -1))
        mean, std = gaussian(policies(inputs[-1])[1])
        actions.append(mean + std * draws[..., step])
        state = state + actions[-1]
        states.append(state)
    return Rollouts(torch.stack(inputs, 2), torch.stack(actions, 2), torch.stack(states, 2))


def train_teachers(task: Task, generators: Sequence[Generator], iterations: int) -> Policies:
    """One teacher of `task` for each generator, by REINFORCE with a baseline for each step.

    A step costs STEP_COST * action², and the last one MISS_COST * (s_T - target)² as well.
    """
    teachers = Policies.fresh(generators)
    optimizer = teachers.adam(TEACHER_LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, iterations)
    for _ in range(iterations):
        rollouts = roll_out(teachers, task, noise(generators, TEACHER_BATCH))
        rewards = -STEP_COST * rollouts.actions**2
        rewards[..., -1] -= MISS_COST * (rollouts.states[..., -1] - task.target) ** 2
        returns = rewards.flip(-1).cumsum(-1).flip(-1)
        spread, mean = torch.std_mean(returns, 1, keepdim=True)
        logprobs = log_prob(teachers(rollouts.inputs)[1], rollouts.actions)
        loss = -((returns - mean) / spread * logprobs).sum() / TEACHER_BATCH
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return teachers.first(len(generators))
