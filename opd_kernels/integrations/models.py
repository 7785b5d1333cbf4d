"""What the trainer needs of a causal model of transformers: head, hidden states, logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_kernels.model_head import Head, head_of

__all__ = [
    "Sequences",
    "checked_logits",
    "hidden_states",
    "model_head",
    "own_logits",
    "vocab_size_of",
]

INSTEAD = "With use_hidden_states=False both models' own logits are used instead"


class Sequences(NamedTuple):
    """Prompts, padded on the left, and responses, padded on the right, as the models read them.

    ``tokens`` and ``attention`` (B, P + C), ``keep``: C, ``multimodal``: what comes with images.
    """

    tokens: Tensor
    attention: Tensor
    keep: int
    multimodal: dict[str, Any]

    @classmethod
    def of(cls, inputs: dict[str, Any], multimodal: list[str]) -> Sequences:
        """The sequences of a micro-batch of TRL."""
        return cls(
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            inputs["completion_ids"].shape[1],
            {name: inputs[name] for name in multimodal if name in inputs},
        )

    def known_to(self, rows: int) -> Sequences:
        """Replaces ids for which a model of ``rows`` ids has no embedding by id 0."""
        return self._replace(tokens=self.tokens.masked_fill(self.tokens >= rows, 0))

    def unknown_to(self, rows: int) -> Tensor:
        """Whether a token, padding left out, is such an id; bool (B, P + C)."""
        return (self.tokens >= rows) & self.attention.bool()

    def fields(self, model: Any, base: Any) -> dict[str, Any]:
        """The keyword arguments for a forward of ``base``, the model or its body.

        Positions count from each sequence's first token, as in generation. Without them a model
        with absolute positions would count the padding. Models that see images make their own.
        """
        fields = {"input_ids": self.tokens, "attention_mask": self.attention, "use_cache": False}
        text_only = model.config.get_text_config() is model.config
        if text_only and "position_ids" in inspect.signature(base.forward).parameters:
            fields["position_ids"] = (self.attention.cumsum(-1) - 1).clamp(min=0)
        return fields | self.multimodal


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


def checked_logits(model: Any, role: str, sequences: Sequences) -> Tensor:
    """The model's own logits; raises unless its hidden states and head give the same."""
    head, hidden = model_head(model, role), hidden_states(model, sequences)
    own = own_logits(model, sequences)[:, :-1]
    with usable_head(role):
        head.check(hidden, own)
    return own


def hidden_states(model: Any, sequences: Sequences) -> Tensor:
    """The head's input at the rows that predict the response, (B, C, H)."""
    body = _without_adapters(model).base_model
    output = body(**sequences.fields(model, body))
    return output.last_hidden_state[:, -sequences.keep - 1 : -1]


def own_logits(model: Any, sequences: Sequences) -> Tensor:
    """The model's logits from the row that predicts the first token on, (B, C + 1, V)."""
    rows = sequences.keep + 1
    base = _without_adapters(model)
    few = "logits_to_keep" in inspect.signature(base.forward).parameters
    # Not model(...): this runs inside its forward, and its hooks have run already.
    output = model.forward(
        **sequences.fields(model, base), **({"logits_to_keep": rows} if few else {})
    )
    return output.logits[:, -rows:]


def _without_adapters(model: Any) -> Any:
    """The model of transformers inside a model of PEFT; its layers have the adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def vocab_size_of(model: Any) -> int:
    """The number of logits that a model has for each token."""
    return int(model.config.get_text_config().vocab_size)
