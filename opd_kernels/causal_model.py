"""Causal models of transformers without their heads: bodies, what they read, and wrappers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from opd_kernels.model_head import Head, head_of
from opd_kernels.support import TopK

# Tokens that a model reads when its head is checked: few, with ids that every model has.
PROBE = 8
Result = TypeVar("Result")


class Sequences(NamedTuple):
    """Sequences as a model reads them, padded on either side.

    ``tokens`` (B, T), ``attention`` (B, T) or None where nothing is padding, and what the model's
    forward takes ``besides``, such as images.
    """

    tokens: Tensor
    attention: Tensor | None
    besides: Mapping[str, Any]

    def known_to(self, rows: int) -> Sequences:
        """Replaces ids for which a model of ``rows`` ids has no embedding by id 0."""
        return self._replace(tokens=self.tokens.masked_fill(self.tokens >= rows, 0))

    def unknown_to(self, rows: int) -> Tensor:
        """Whether a token, padding left out, is such an id; bool (B, T)."""
        unknown = self.tokens >= rows
        return unknown if self.attention is None else unknown & self.attention.bool()

    def fields(self, model: Any, base: Any) -> dict[str, Any]:
        """The keyword arguments for a forward of ``base``, the model or its body.

        Positions count from each sequence's first token, as in generation. Without them a model
        with absolute positions would count the padding. Models that see images make their own.
        """
        parameters = _forwards_parameters(base)
        for name in self.besides:
            # A forward that takes any keyword would leave images out in silence.
            if name.startswith("pixel_values") and name not in parameters:
                raise ValueError(f"{type(model).__name__} takes no {name}; use a model that does")
        fields: dict[str, Any] = {"input_ids": self.tokens, "use_cache": False}
        if self.attention is not None:
            fields["attention_mask"] = self.attention
            text_only = model.config.get_text_config() is model.config
            if text_only and "position_ids" in parameters:
                fields["position_ids"] = (self.attention.cumsum(-1) - 1).clamp(min=0)
        return fields | dict(self.besides)


def _forwards_parameters(module: Any) -> Mapping[str, inspect.Parameter]:
    """Those of the module inside of ``torch.compile``, too, whose own forward takes anything."""
    return inspect.signature(getattr(module, "_orig_mod", module).forward).parameters


def vocab_size_of(model: Any) -> int:
    """The number of logits that a model has for each token."""
    return int(model.config.get_text_config().vocab_size)


def sampled_known(topk: TopK, tokens: Tensor, rows: int) -> TopK:
    """A support by a teacher of ``rows`` ids, with probability 0 of sampled tokens beyond them."""
    if topk.token_logits is None:
        return topk
    unknown = tokens.to(topk.device) >= rows
    return replace(topk, token_logits=topk.token_logits.masked_fill(unknown, -torch.inf))


def without_adapters(model: Any) -> Any:
    """The model of transformers inside a model of PEFT; its layers have the adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def gathered_head(model: Any) -> Head:
    """The model's head, inside of its forward.

    Whoever shards the head apart from the model, as accelerate does, gathers it when the head's own
    module runs, which never happens here.
    """
    module = model.get_output_embeddings()
    if _fully_sharded(module):
        module.unshard()
    return head_of(model)


def hidden_states(model: Any, sequences: Sequences) -> Tensor:
    """What the head gets at every position, (B, T, H)."""
    base = without_adapters(model)
    body = getattr(base, "base_model", base)
    if body is base and hasattr(base, "get_decoder"):
        body = base.get_decoder()
    if body is None or body is base:
        raise ValueError(
            f"no body is found in {type(base).__name__} (base_model, get_decoder), whose last "
            "hidden states its head gets"
        )
    output = body(**sequences.fields(model, body))
    if not isinstance(getattr(output, "last_hidden_state", None), Tensor):
        raise ValueError(
            f"{type(body).__name__}, the body of {type(base).__name__}, returns no "
            "last_hidden_state"
        )
    return output.last_hidden_state


def own_logits(model: Any, sequences: Sequences, rows: int) -> Tensor:
    """The model's own logits of the last ``rows`` positions, (B, rows, V)."""
    base = without_adapters(model)
    few = "logits_to_keep" in _forwards_parameters(base)
    # Not model(...): this runs inside its forward, and its hooks have run already.
    output = model.forward(
        **sequences.fields(model, base), **({"logits_to_keep": rows} if few else {})
    )
    return output.logits[:, -rows:]


@torch.no_grad()
def check_own_logits(model: Any, device: torch.device) -> Tensor:
    """The model's own logits of a few tokens; ``ValueError`` unless they are its body's and head's.

    Runs both on a few tokens, in evaluation mode, and leaves every module in the mode it had.
    """
    tokens = torch.arange(min(PROBE, vocab_size_of(model)), device=device)[None]
    probe = Sequences(tokens, torch.ones_like(tokens), {})
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        # On CPUs bitsandbytes packs 4-bit weights for inference in evaluation mode, for good; no
        # gradient passes them after that.
        if not type(module).__module__.startswith("bitsandbytes"):
            module.training = False
    try:
        own = own_logits(model, probe, tokens.shape[1])
        hidden = hidden_states(model, probe)
        # Last: where the head is sharded apart, it was freed when its own module had run.
        gathered_head(model).check(hidden, own)
        return own
    finally:
        for module, training in modes:
            module.training = training


# By identity; a model that is gone leaves.
_checked: WeakSet[nn.Module] = WeakSet()


def check_own_logits_once(model: nn.Module, device: torch.device) -> None:
    """``check_own_logits`` of a model that has not passed it; not while a compiler traces."""
    if torch.compiler.is_compiling() or model in _checked:
        return
    check_own_logits(model, device)
    _checked.add(model)


def unwrapped(model: Any) -> Any:
    """The causal model inside of DDP, FSDP or ``torch.compile``."""
    model = getattr(model, "_orig_mod", model)
    while not hasattr(model, "get_output_embeddings") and isinstance(
        getattr(model, "module", None), nn.Module
    ):
        model = getattr(model.module, "_orig_mod", model.module)
    return model


def is_wrapped(model: Any) -> bool:
    """Whether a call of the model does more than run its forward: DDP, or parameters in shards."""
    model = getattr(model, "_orig_mod", model)
    return model is not unwrapped(model) or _fully_sharded(model)


def _fully_sharded(module: Any) -> bool:
    """Whether ``fully_shard`` has made the module's class."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def inside(model: Any, call: Callable[[], Result]) -> Result:
    """Runs a call inside of a model's forward.

    There a wrapper's parameters are whole, and the wrapper sees to their gradients. No tensor goes
    in through the wrapper, which might round it.
    """
    if not is_wrapped(model):
        return call()
    model = getattr(model, "_orig_mod", model)
    inner = unwrapped(model)
    own = vars(inner).get("forward")

    def restore() -> None:
        vars(inner).pop("forward", None)
        if own is not None:
            inner.forward = own

    def forward(_: object) -> Result:
        restore()
        return call()

    inner.forward = forward
    try:
        # Some wrappers look at their first argument.
        return model(None)
    finally:
        restore()
