"""One of two tensor-parallel ranks: verl's Megatron engine with its own loss and with ours."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from engines import (
    LENGTHS,
    Inputs,
    K,
    inputs,
    predicting,
    restated_rows,
    row_temperatures,
    under_megatron,
)
from megatron.core import parallel_state
from peer_checks import bound
from ranks import as_rank
from torch import Tensor

from opd_kernels.integrations import verl
from opd_kernels.integrations.verl import LOSSES, MODES, topk_losses

WORLD = 2
OWN, OURS, OWN_LOSSES = "forward_kl_topk", "opd_topk_forward_kl_truncate", "distillation_losses"
STATISTICS = ("student_mass", "teacher_mass", "overlap_count", "overlap_token_advantage")


def packed(values: Tensor) -> Tensor:
    """(1, rows, ...): each sequence filled up with zeros to a multiple of the ranks."""
    parts = values.split(list(LENGTHS))
    filled = [
        torch.cat([part, part.new_zeros(-len(part) % WORLD, *part.shape[1:])]) for part in parts
    ]
    return torch.cat(filled)[None]


@dataclasses.dataclass
class Case:
    """A batch as this rank sees it, and with which weights its rows make a loss."""

    given: Inputs
    rank: int

    def __post_init__(self) -> None:
        width = self.given.student.shape[-1] // WORLD
        self.columns = slice(self.rank * width, (self.rank + 1) * width)
        weight = torch.zeros(sum(LENGTHS))
        rows = predicting()
        weight[rows] = torch.linspace(-1.0, 2.0, len(rows))
        self.counted = packed(weight) != 0
        self.weight = packed(weight)
        self.error = bound(self.given.student / 0.7, self.given.logprobs)

    def engine(self, mode: str, losses: str, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
        """The engine's outputs, and the gradient of this rank's columns."""
        leaf = packed(self.given.student[0])[..., self.columns].clone().requires_grad_()
        logits = leaf * 1.0  # which the engine divides in place
        found = under_megatron(
            self.given, mode, logits, packed(torch.arange(sum(LENGTHS))),
            packed(row_temperatures()), **options
        )  # fmt: skip
        (grad,) = torch.autograd.grad((found[losses] * self.weight).sum(), leaf)
        self.changed = off(logits, leaf / packed(row_temperatures()).clamp(min=1e-8)[..., None])
        return found, grad

    def one_process(self, mode: str, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
        leaf = packed(self.given.student[0]).requires_grad_()
        logits = leaf / packed(row_temperatures()).clamp(min=1e-8)[..., None]
        teacher = packed(self.given.logprobs), packed(self.given.ids)
        found = topk_losses(logits, *teacher, MODES[mode], topk=K, **options)
        (grad,) = torch.autograd.grad((found[LOSSES] * self.weight).sum(), leaf)
        return found, grad[..., self.columns]

    def float64(self, floor: float | None) -> tuple[dict[str, Tensor], Tensor]:
        leaf = self.given.student.double().requires_grad_()
        found = restated_rows(self.given, leaf, floor)
        rows = {name: packed(values.detach()) for name, values in found.items()}
        loss = (packed(found[OWN_LOSSES]) * self.weight).sum()
        (grad,) = torch.autograd.grad(loss, leaf)
        return rows, packed(grad[0])[..., self.columns]

    def rows_off(self, found: Tensor, expected: Tensor) -> float:
        return off(found[self.counted], expected[self.counted])


def off(found: Tensor, expected: Tensor) -> float:
    return (found.detach().double() - expected.detach().double()).abs().max().item()


def beside_verl(case: Case, floor: float | None) -> dict[str, Any]:
    options = {"log_prob_min_clamp": floor}
    own, own_grad = case.engine(OWN, OWN_LOSSES, **options)
    ours, grad = case.engine(OURS, LOSSES, **options)
    exact, exact_grad = case.float64(floor)
    result = {
        "error": case.error,
        "gradient": grad.abs().max().item(),
        "loss off": case.rows_off(ours[LOSSES], own[OWN_LOSSES]),
        "gradient off": off(grad, own_grad),
        "loss off float64": case.rows_off(ours[LOSSES], exact[OWN_LOSSES]),
        "gradient off float64": off(grad, exact_grad),
        "verl's student_mass off float64": case.rows_off(
            own["student_mass"], exact["student_mass"]
        ),
    }
    for name in STATISTICS:
        result[f"{name} off"] = case.rows_off(ours[name], own[name])
        result[f"{name} off float64"] = case.rows_off(ours[name], exact[name])
    return result


def beside_one_process(case: Case, mode: str) -> dict[str, Any]:
    found, grad = case.engine(mode, LOSSES)
    expected, expected_grad = case.one_process(mode)
    return {
        "error": case.error,
        "gradient": grad.abs().max().item(),
        "loss off": case.rows_off(found[LOSSES], expected[LOSSES]),
        "gradient off": off(grad, expected_grad),
    }


def overwritten(case: Case, mode: str) -> dict[str, Any]:
    """Beside the log-prob of the sampled token, which Megatron computes in the logits' memory."""
    _, expected = case.engine(mode, LOSSES)
    unchanged = case.changed
    _, grad = case.engine(mode, LOSSES, distillation_only=False)
    return {
        "error": case.error,
        "logits changed": case.changed,
        "unchanged": unchanged,
        "gradient off": off(grad, expected),
    }


def measured(rank: int) -> dict[str, Any]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=WORLD)
    verl.register()
    case = Case(inputs(), rank)
    found: dict[str, Any] = {f"floor {floor}": beside_verl(case, floor) for floor in (None, -4.0)}
    found |= {mode: beside_one_process(case, mode) for mode in MODES}
    return found | {f"overwritten {mode}": overwritten(case, mode) for mode in MODES}


if __name__ == "__main__":
    as_rank(measured, WORLD)
