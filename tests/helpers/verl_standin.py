"""verl's calling convention without verl: the functions that the adapter calls, in their places.

What they compute is restated from verl 0.9.1 as far as a test needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_kernels.integrations import verl
from opd_kernels.integrations.verl import MODES, topk_losses

OWN = "forward_kl_topk"  # verl's own mode


@dataclass
class LossConfig:
    """Of verl's options those that a loss reads."""

    loss_mode: str
    topk: int | None = 4
    log_prob_min_clamp: float | None = None
    use_policy_gradient: bool = False


@dataclass
class Engine:
    """How verl's processes share the work; the ranks' part of each sequence comes with it."""

    sequence_parallel: tuple[int, int] = (0, 1)  # rank, size
    tensor_parallel: tuple[int, int] = (0, 1)
    group: Any = None
    registry: dict[str, Any] = field(default_factory=dict)


def install(patch: pytest.MonkeyPatch, engine: Engine | None = None) -> ModuleType:
    """Puts the stand-in where verl is imported from; its ``losses`` module."""
    engine = engine or Engine()
    losses = _losses(engine)
    modules = {
        "verl.trainer.distillation": {"losses": losses},
        "verl.workers.utils.padding": {"no_padding_2_padding": no_padding_2_padding},
        "verl.utils.tensordict_utils": {"get_non_tensor_data": _get_non_tensor_data},
        "verl.utils.ulysses": {
            "get_ulysses_sequence_parallel_world_size": lambda: engine.sequence_parallel[1],
            "slice_input_tensor": lambda x, dim: _slice(x, dim, *engine.sequence_parallel),
        },
        "verl.models.mcore.util": {
            "preprocess_thd_engine": lambda x: (_packed(x, engine.tensor_parallel[1]), None),
            "preprocess_bshd_engine": lambda x: (x.to_padded_tensor(0), None),
        },
        "megatron.core.parallel_state": vars(_parallel_state(engine)),
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        patch.setitem(sys.modules, name, module)
    patch.setattr(verl, "_registered", {})
    return losses


def _losses(engine: Engine) -> ModuleType:
    def register_distillation_loss(settings: Any) -> Callable[[Any], Any]:
        def decorator(function: Any) -> Any:
            for name in settings.names:
                if name in engine.registry:
                    raise ValueError(f"'{name}' is already registered.")
                engine.registry[name] = function
            return function

        return decorator

    def compute_topk_loss(
        config: Any, distillation_config: Any, data: Any, student_logits: Tensor, data_format: str
    ) -> dict[str, Tensor]:
        return {"distillation_losses": student_logits.new_zeros(student_logits.shape[:2])}

    def compute_forward_kl_topk(
        config: Any, distillation_config: Any, model_output: Any, data: Any
    ) -> tuple[Tensor, dict[str, float]]:
        found = {
            name: no_padding_2_padding(model_output[name], data)
            for name in ("distillation_losses", "student_mass")
        }
        mass = found["student_mass"][data["response_mask"].bool()].mean().item()
        return found["distillation_losses"].clamp_min(0.0), {"distillation/student_mass": mass}

    module = ModuleType("verl.trainer.distillation.losses")
    module.DistillationLossSettings = SimpleNamespace
    module.register_distillation_loss = register_distillation_loss
    module.compute_topk_loss = compute_topk_loss
    module.compute_forward_kl_topk = compute_forward_kl_topk
    return module


def no_padding_2_padding(tensor: Tensor, data: Any) -> Tensor:
    """The rows that predict each sequence's response, filled up to the longest with zeros."""
    longest = data["response_mask"].shape[1]
    rows = []
    for sequence, response in zip(tensor.unbind(), data["responses"], strict=True):
        part = sequence[len(sequence) - response - 1 : len(sequence) - 1]
        rows.append(torch.nn.functional.pad(part, (0, longest - response)))
    return torch.stack(rows)


def _get_non_tensor_data(data: Any, key: str, default: Any) -> Any:
    return data.get(key, default)


def _slice(x: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    """A rank's part, of what zeros fill up to parts of one length."""
    parts = -(-x.shape[dim] // ranks)
    filled = torch.nn.functional.pad(x, (0, 0, 0, parts * ranks - x.shape[dim]))
    return filled.narrow(dim, rank * parts, parts)


def _packed(nested: Tensor, ranks: int) -> Tensor:
    """Sequences one after another, each filled up with zeros to a multiple of the ranks."""
    pad = torch.nn.functional.pad
    parts = [pad(part, (0, 0, 0, -len(part) % ranks)) for part in nested.unbind()]
    return torch.cat(parts)[None]


def _parallel_state(engine: Engine) -> SimpleNamespace:
    return SimpleNamespace(
        get_tensor_model_parallel_world_size=lambda: engine.tensor_parallel[1],
        get_tensor_model_parallel_rank=lambda: engine.tensor_parallel[0],
        get_tensor_model_parallel_group=lambda: engine.group,
    )


def on_rank(
    group: Any, names: Sequence[str], student: Tensor, teacher: tuple[Tensor, Tensor]
) -> list[tuple[list[Tensor], Tensor, list[Tensor], Tensor]]:
    """For each mode what a tensor-parallel rank finds, and what one process finds, each with the
    gradient of the rank's columns.
    """
    rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    width = student.shape[-1] // ranks
    mine = slice(rank * width, (rank + 1) * width)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        losses = install(patch, Engine(tensor_parallel=(rank, ranks), group=group))
        verl.register()
        data = dict(zip(("teacher_logprobs", "teacher_ids"), teacher, strict=True))
        for name in names:
            config = SimpleNamespace(distillation_loss=LossConfig(name, log_prob_min_clamp=-6.0))
            part = student[..., mine].clone().requires_grad_()
            found = losses.compute_topk_loss(
                SimpleNamespace(strategy="megatron"), config, data, part, "thd"
            )
            whole = student.clone().requires_grad_()
            packed = [_packed(tensor, ranks) for tensor in teacher]
            expected = topk_losses(whole, *packed, MODES[name], topk=4, log_prob_min_clamp=-6.0)
            results.append(
                (
                    [x.detach() for x in found.values()],
                    torch.autograd.grad(found[verl.LOSSES].sum(), part)[0],
                    [x.detach() for x in expected.values()],
                    torch.autograd.grad(expected[verl.LOSSES].sum(), whole)[0][..., mine],
                )
            )
    return results
