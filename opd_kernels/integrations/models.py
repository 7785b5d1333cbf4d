"""What the trainer needs of a causal model of transformers: head, hidden states, logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from opd_kernels import causal_model
from opd_kernels.causal_model import Sequences, check_own_logits, sampled_known, vocab_size_of
from opd_kernels.model_head import Head, head_of

__all__ = [
    "Sequences",
    "check_logits",
    "hidden_states",
    "model_head",
    "own_logits",
    "sampled_known",
    "sequences_of",
    "vocab_size_of",
]

INSTEAD = "With use_hidden_states=False both models' own logits are used instead"


def sequences_of(inputs: dict[str, Any], multimodal: list[str]) -> tuple[Sequences, int]:
    """(a micro-batch of TRL, how many columns its responses have).

    Prompts are padded on the left, and responses on the right.
    """
    sequences = Sequences(
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        {name: inputs[name] for name in multimodal if name in inputs},
    )
    return sequences, inputs["completion_ids"].shape[1]


@contextmanager
def usable_head(role: str) -> Iterator[None]:
    """Adds to an error whose head cannot be used, and what to do instead."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"the {role}'s output head cannot be used: {error}. {INSTEAD}") from error


def model_head(model: Any, role: str) -> Head:
    """The head of the student or the teacher."""
    with usable_head(role):
        return head_of(model)


def check_logits(model: Any, role: str, device: torch.device) -> Tensor:
    """Raises unless the model's own logits are those of its hidden states and head."""
    with usable_head(role):
        return check_own_logits(model, device)


def hidden_states(model: Any, sequences: Sequences, keep: int) -> Tensor:
    """The head's input at the rows that predict the response, (B, C, H)."""
    return causal_model.hidden_states(model, sequences)[:, -keep - 1 : -1]


def own_logits(model: Any, sequences: Sequences, keep: int) -> Tensor:
    """The model's logits from the row that predicts the first token on, (B, C + 1, V)."""
    return causal_model.own_logits(model, sequences, keep + 1)
