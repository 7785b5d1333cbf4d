"""``head_of``: a causal language model's output head, and what the model does to its logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from opd_kernels import _checks
from opd_kernels.backends.plain import shaped
from opd_kernels.head import LinearLogits

__all__ = ["Head", "head_of"]

# Half precision rounds a logit by less than 1 %; a scale or softcap that is missed changes more.
TOLERANCE = 0.05
# Names that configurations have for the factor of the logits, their divisor and their cap.
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# (model type, name) that transformers does not apply, and one that it applies the other way round.
UNUSED = {
    ("mpt", "logit_scale"),
    ("aya_vision", "logit_scale"),
    ("cohere2_vision", "logit_scale"),
    ("gemma3", "final_logit_softcapping"),
}
MULTIPLIED = ("hyperclovax", "logits_scaling")
# Model types with a layer of the model itself between the last hidden states and the head.
TRANSFORMED = ("electra", "modernbert-decoder")
# Scales beside a weight, or a packed weight in its place.
QUANTISED = (
    "weight_scale", "weight_scale_inv", "weight_packed", "qweight", "scales", "W_q", "quant_state",
)  # fmt: skip
# Hooks of these packages gather a weight before it is used. Once it is whole, they change nothing.
GATHERING = ("torch.distributed.fsdp", "deepspeed")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
DEQUANTISE = (
    "dequantise it with its scales, or leave the head out where the model is quantised "
    '(transformers: llm_int8_skip_modules or modules_to_not_convert=["lm_head"])'
)


class StudentHead(TypedDict):
    """What ``linear_topk_rkl`` takes of a student's head."""

    student_weight: Tensor
    student_bias: Tensor | None
    logit_softcap: float | None
    logit_scale: float


@dataclass(frozen=True, eq=False)
class Head:
    """A model's output head: with hidden states h, ``head(h)`` are the model's logits.

    With weight W, bias b, scale s and softcap c::

        logits = cap(s (W h + b))    cap(x) = c tanh(x / c), or x without a softcap

    Shapes: ``weight`` (V, H) and ``bias`` (V,) or None are the model's own tensors, not copies.
    Gradients: a teacher's head gets none; a student's gets them from ``linear_topk_rkl``.

    Example::

        head = head_of(student)
        loss = linear_topk_rkl(hidden, teacher=head_of(teacher)(teacher_hidden), **head.as_student)
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __call__(self, hidden: Tensor) -> LinearLogits:
        """The logits of hidden states (..., H), which are what the head gets, as a teacher's."""
        return LinearLogits(hidden, self.weight, self.bias, self.softcap, self.scale)

    @property
    def as_student(self) -> StudentHead:
        """The head as keyword arguments of ``linear_topk_rkl``."""
        return {
            "student_weight": self.weight,
            "student_bias": self.bias,
            "logit_softcap": self.softcap,
            "logit_scale": self.scale,
        }

    @torch.no_grad()
    def check(self, hidden: Tensor, logits: Tensor) -> None:
        """Raises ``ValueError`` unless a model's logits are this head's, to 5 % of the largest.

        Call it once, before training, with ``hidden`` (..., H) of a few tokens and the ``logits``
        (..., V) that the model itself made of them. It computes all logits and reads them on the
        host.

        Example::

            output = model(tokens, output_hidden_states=True)
            head_of(model).check(output.hidden_states[-1], output.logits)
        """
        ours = F.linear(hidden.to(self.weight), self.weight, self.bias).float()
        ours = shaped(ours, self.scale, self.softcap)
        own = logits.detach().float().to(ours.device)
        same = ours.shape == own.shape
        # Not `>`, which NaN would pass.
        if not same or not (ours - own).abs().max() <= TOLERANCE * own.abs().max():
            raise ValueError(
                "the model's logits are not those of its last hidden state and output head with "
                f"scale {self.scale} and softcap {self.softcap}, as its config has them"
            )


def head_of(model: Any) -> Head:
    """The output head of a causal language model, in the form that the losses take.

    Reads weight and bias of the model's output embedding, and logit scale (Cohere, Granite, Falcon
    H1) and final softcap (Gemma) of its configuration, so that none of them is forgotten::

        head_of(model)(hidden)                                  # a teacher's LinearLogits
        linear_topk_rkl(hidden, teacher=..., **head_of(model).as_student)

    ``model`` is a causal model as transformers makes them, also of PEFT: it has
    ``get_output_embeddings()`` and a ``config``. Adapters elsewhere in the model are in its hidden
    states; prompt and prefix tuning are in those of PEFT's model alone, not of its
    ``get_base_model()``. Of a head in PEFT's ``modules_to_save`` this is the active copy.

    Nothing is copied or run, and it takes less than a millisecond. Call it again after
    ``model.to``, a change of the active adapter or a resized vocabulary: these replace parameters.
    Scale and softcap are read under the names that transformers has for them. For a model with code
    of its own, let ``Head.check`` compare the logits once.

    Errors: ``TypeError`` for what is no such model; ``ValueError`` for a head whose logits are not
    those of one whole weight: with adapters (LoRA), quantised, sharded (DTensor, ZeRO-3, a part of
    the vocabulary), offloaded, parametrised, with hooks, of another class than ``nn.Linear``; for
    encoder-decoder models and models without a head. The message says what to do.

    Example::

        with torch.no_grad():
            teacher_hidden = teacher.model(tokens).last_hidden_state
        support = select_topk(head_of(teacher)(teacher_hidden), 32)
    """
    find = getattr(model, "get_output_embeddings", None)
    config: Any = getattr(model, "config", None)
    if find is None or not hasattr(config, "get_text_config"):
        raise TypeError(
            f"{type(model).__name__} has no get_output_embeddings() and config as causal models of "
            "transformers have them; pass the model inside of a wrapper (.module), or make "
            "LinearLogits of hidden states and a weight (V, H)"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model, which may scale what its head "
            "gets or add to its logits; make LinearLogits of what the head gets"
        )
    module = find()
    if module is None:
        raise ValueError(
            f"{type(model).__name__} has no output head; load it as AutoModelForCausalLM"
        )
    _check_place(model, module)
    module = _in_use(module)
    _check_whole(module)
    weight, bias = module.weight, module.bias
    text = config.get_text_config()
    # Some models cut a padded head's logits to the vocabulary.
    unpadded = getattr(text, "unpadded_vocab_size", None)
    vocab = unpadded or getattr(text, "vocab_size", 0)
    if weight.shape[0] < vocab:
        raise ValueError(
            f"the head's weight has {weight.shape[0]} rows, but the config says {vocab} ids; if it "
            "is a part of the vocabulary, gather it from all ranks; if not, correct the config"
        )
    if unpadded:
        weight, bias = weight[:unpadded], None if bias is None else bias[:unpadded]
    return Head(weight, bias, _softcap(config, text), _scale(config, text))


def _check_place(model: Any, module: Any) -> None:
    """Raises where other layers change the hidden states before the head, as BERT's do."""
    parents = (
        each for each in model.modules() if any(child is module for child in each.children())
    )
    parent = next(parents, model)
    transformed = getattr(model.config, "model_type", None) in TRANSFORMED
    if transformed or not hasattr(parent, "get_output_embeddings"):
        raise ValueError(
            f"the output head lies in a {type(parent).__name__}, whose other layers change the "
            "hidden states; make LinearLogits of what its last layer gets"
        )


def _in_use(module: Any) -> Any:
    """The module whose forward runs: the one inside a compiled module, or the active copy.

    PEFT's ``modules_to_save`` trains a copy per adapter. Without an active one the original runs.
    """
    module = getattr(module, "_orig_mod", module)
    copies, original = (
        getattr(module, "modules_to_save", None),
        getattr(module, "original_module", None),
    )
    if not isinstance(copies, nn.ModuleDict) or original is None:
        return module
    active = [] if module.disable_adapters else list(module.active_adapters)
    if any(name not in copies for name in active):
        active = []
    if len(active) > 1:
        raise ValueError(
            f"the head has {len(active)} active copies ({', '.join(active)}); set_adapter to one"
        )
    return copies[active[0]] if active else original


def _check_whole(module: Any) -> None:
    """Raises unless the module is a plain linear layer: x W' + b of tensors that are all here."""
    name = f"the output head ({type(module).__name__})"
    # A layer of PEFT has a base_layer, a head with trained tokens a token_adapter.
    if hasattr(module, "base_layer") or hasattr(module, "token_adapter"):
        raise ValueError(
            f"{name} has an adapter, which its weight does not show: the loss would be silently "
            "wrong; call merge_and_unload(), or leave the head out of target_modules and "
            "trainable_token_indices (modules_to_save trains it whole)"
        )
    if parametrize.is_parametrized(module):
        raise ValueError(
            f"{name} is parametrised: its weight is computed at each use; call "
            "torch.nn.utils.parametrize.remove_parametrizations, or make LinearLogits of a weight "
            "that you compute"
        )
    marks = [mark for mark in QUANTISED if getattr(module, mark, None) is not None]
    weight = getattr(module, "weight", None)
    if marks or callable(weight):
        raise ValueError(f"{name} is quantised ({', '.join(marks) or 'packed'}); {DEQUANTISE}")
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"{name} has no weight; make LinearLogits of hidden states and a weight (V, H)"
        )
    bias = getattr(module, "bias", None)
    for tensor, part in ((weight, "weight"), (bias, "bias")):
        if tensor is not None:
            _check_tensor(tensor, f"{name[:-1]}.{part})")
    if weight.ndim != 2:
        raise ValueError(
            f"{name}'s weight has shape {tuple(weight.shape)}, expected (V, H); if it is flat or "
            "packed, gather or dequantise it"
        )
    _check_forward(module, name)


def _check_tensor(tensor: Tensor, name: str) -> None:
    """A plain floating tensor, all of it on this rank."""
    _checks.check_local(tensor, name, _checks.DTENSOR_PARAMETER)
    if tensor.numel() == 0:
        raise ValueError(
            f"{name} is empty, its values are on other ranks; call this inside of "
            "deepspeed.zero.GatheredParameters (ZeRO-3) or of the wrapped model's forward (FSDP)"
        )
    # A quantised tensor may have a floating dtype. A fake tensor counts as a plain one.
    plain = type(tensor) in (Tensor, nn.Parameter) or hasattr(tensor, "fake_mode")
    if not plain or tensor.dtype not in _checks.LOGIT_DTYPES:
        raise ValueError(
            f"{name} is a {type(tensor).__name__} of {tensor.dtype}, expected a plain tensor of "
            f"float16, bfloat16, float32 or float64; if it is quantised, {DEQUANTISE}"
        )


def _check_forward(module: Any, name: str) -> None:
    """Raises unless the module runs ``nn.Linear.forward`` and no hook."""
    hooks = [
        kind
        for kind in HOOKS
        for hook in (getattr(module, kind, None) or {}).values()
        if not (getattr(hook, "__module__", None) or "").startswith(GATHERING)
    ]
    if hooks:
        raise ValueError(
            f"{name} has hooks ({', '.join(hooks)}), which the loss would not run; remove them, or "
            "make LinearLogits yourself if they change nothing"
        )
    # accelerate's device_map gives the module a forward that moves its input.
    moved = getattr(module, "_hf_hook", None)
    if getattr(moved, "offload", False):
        raise ValueError(
            f"{name} is offloaded: its weight is loaded while it runs; keep it on a device "
            "(device_map)"
        )
    replaced = "forward" in vars(module) and type(moved).__name__ != "AlignDevicesHook"
    if replaced or getattr(type(module), "forward", None) is not nn.Linear.forward:
        raise ValueError(
            f"{name} has a forward of its own, expected that of nn.Linear; make LinearLogits if "
            "its logits are those of a weight (V, H) and bias (V,)"
        )


def _softcap(config: Any, text: Any) -> float | None:
    """What a model caps its logits at."""
    return next((value for _, value in _factors(config, text, SOFTCAPS)), None)


def _scale(config: Any, text: Any) -> float:
    """What a model multiplies its logits by."""
    for _, value in _factors(config, text, MULTIPLIERS):
        return value
    for name, value in _factors(config, text, DIVISORS):
        return value if (text.model_type, name) == MULTIPLIED else 1 / value
    return 1.0


def _factors(config: Any, text: Any, names: Iterable[str]) -> Iterator[tuple[str, float]]:
    """(name, value) of the factors that the configuration has and the model applies."""
    for name in names:
        value = getattr(text, name, None)
        if value is None or (getattr(config, "model_type", None), name) in UNUSED:
            continue
        _checks.check_factor(value, f"config.{name}")
        yield name, float(value)
