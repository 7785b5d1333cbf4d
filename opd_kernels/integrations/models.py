"""What the trainer needs of a causal model of transformers: its head, its own logits."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from opd_kernels.head import LinearLogits, shaped

__all__ = ["Head", "Sequences", "hidden_states", "own_logits", "vocab_size_of"]

INSTEAD = "set use_hidden_states=False: both models' own logits are used then"
# Half precision rounds a logit by less than 1 %; a scale or softcap that is missed changes more.
TOLERANCE = 0.05


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
        """Of a micro-batch as TRL makes it."""
        return cls(
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            inputs["completion_ids"].shape[1],
            {name: inputs[name] for name in multimodal if name in inputs},
        )

    def known_to(self, rows: int) -> Sequences:
        """With id 0 in place of ids that a model of ``rows`` ids has no embedding for."""
        return self._replace(tokens=self.tokens.masked_fill(self.tokens >= rows, 0))

    def unknown_to(self, rows: int) -> Tensor:
        """Where tokens, padding left out, are such ids; bool (B, P + C)."""
        return (self.tokens >= rows) & self.attention.bool()

    def fields(self, model: Any, base: Any) -> dict[str, Any]:
        """What a forward of ``base``, the model or its body, gets.

        Positions count from each sequence's first token, as in generation; without them a model
        with absolute positions would count the padding. Models that see images make their own.
        """
        fields = {"input_ids": self.tokens, "attention_mask": self.attention, "use_cache": False}
        text_only = model.config.get_text_config() is model.config
        if text_only and "position_ids" in inspect.signature(base.forward).parameters:
            fields["position_ids"] = (self.attention.cumsum(-1) - 1).clamp(min=0)
        return fields | self.multimodal


class Head(NamedTuple):
    """A model's output head, and what the model does to the logits afterwards."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any, role: str) -> Head:
        """The head as module and configuration describe it; ``check`` tries it out."""
        module, config = model.get_output_embeddings(), model.config.get_text_config()
        weight: Any = getattr(module, "weight", None)
        # ZeRO-3 leaves an empty tensor in place of a weight that is elsewhere.
        whole = isinstance(weight, Tensor) and weight.ndim == 2 and weight.numel() > 0
        if not whole or isinstance(weight, DTensor):
            raise ValueError(
                f"the {role}'s output head ({type(module).__name__}) has no weight (V, H) that is "
                f"whole on this rank; {INSTEAD}"
            )
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(weight, getattr(module, "bias", None), _logit_scale(config), softcap)

    def logits(self, hidden: Tensor) -> LinearLogits:
        """The teacher's logits, to be selected from."""
        hidden = hidden.to(self.weight.device)
        return LinearLogits(hidden, self.weight, self.bias, self.softcap, self.scale)

    def check(self, model: Any, role: str, hidden: Tensor, sequences: Sequences) -> Tensor:
        """The model's logits, which have to be those of this head."""
        ours = F.linear(hidden.to(self.weight), self.weight, self.bias).float()
        ours = shaped(ours, self.scale, self.softcap)
        own = own_logits(model, sequences)[:, :-1].float().to(ours.device)
        if ours.shape != own.shape or (ours - own).abs().max() > TOLERANCE * own.abs().max():
            raise ValueError(
                f"the {role}'s logits are not those of its last hidden state and output head with "
                f"scale {self.scale} and softcap {self.softcap}, as its config has them; {INSTEAD}"
            )
        return own


def _logit_scale(config: Any) -> float:
    """What a model multiplies its logits by, under the names that configurations have for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling if config.model_type == "hyperclovax" else 1 / scaling)


def hidden_states(model: Any, sequences: Sequences) -> Tensor:
    """What the head gets at the rows that predict the response, (B, C, H)."""
    body = _without_adapters(model).base_model
    output = body(**sequences.fields(model, body))
    return output.last_hidden_state[:, -sequences.keep - 1 : -1]


def own_logits(model: Any, sequences: Sequences) -> Tensor:
    """The model's logits from the row that predicts the first token on, (B, C + 1, V)."""
    rows = sequences.keep + 1
    base = _without_adapters(model)
    few = "logits_to_keep" in inspect.signature(base.forward).parameters
    # Not model(...): this runs inside its forward, whose hooks have run.
    output = model.forward(
        **sequences.fields(model, base), **({"logits_to_keep": rows} if few else {})
    )
    return output.logits[:, -rows:]


def _without_adapters(model: Any) -> Any:
    """The model of transformers inside one of PEFT, whose layers have the adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def vocab_size_of(model: Any) -> int:
    """How many logits a model has for each token."""
    return int(model.config.get_text_config().vocab_size)
