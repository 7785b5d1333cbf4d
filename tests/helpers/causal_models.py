"""Tiny causal models of transformers, their tokens, and how far two ways to one loss may differ."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

V, K, B, T = 64, 6, 3, 9
HIDDEN, INNER, HEADS = 32, 48, 4
SMALL = {
    "vocab_size": V, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {}),
    "Gemma2": ("Gemma2ForCausalLM", {"final_logit_softcapping": 2.0, "head_dim": 8}),
    "Granite": ("GraniteForCausalLM", {"logits_scaling": 0.25}),
    "Cohere": ("CohereForCausalLM", {"logit_scale": 4.0}),
    "Phi": ("PhiForCausalLM", {}),
    "GPT2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}),
}
TOKENS = torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] * 9])
ATTENTION = torch.tensor([[1] * 9, [0] * 3 + [1] * 6, [1] * 7 + [0] * 2])

IMAGE = 60

DOUBLE, SINGLE = 2.0**-53, 2.0**-24
# The longest chain of roundings from tokens to a loss: a sum of n numbers has n. The norms, the
# projections, scores, softmax and values of the attention, the two layers after it; then the last
# norm, the head, and the loss's softmax and sum. A vision tower has as many as the layer again.
LAYER = 2 * HIDDEN + 2 * HIDDEN + HIDDEN // HEADS + 2 * T + HIDDEN + INNER
FORWARD = 2 * LAYER + HIDDEN + HIDDEN + 2 * V
# Backward goes through transposes of these sums, and adds up the rows.
ROUNDINGS = 2 * FORWARD + B * T
# No logit is larger, so no log-ratio, of which a loss is the mean, is more than twice that.
LARGEST_LOGIT = 10.0


def model_of(family: str = "Llama", seed: int = 0, **options: Any) -> Any:
    """In float64, so that two ways to the same loss agree to many digits."""
    name, special = FAMILIES[family]
    settings = getattr(transformers, name).config_class(**SMALL | special | options)
    return spread(getattr(transformers, name), settings, seed)


def spread(kind: Any, settings: Any, seed: int) -> Any:
    """A model in evaluation mode, whose weights are large enough for losses that are not flat."""
    torch.manual_seed(seed)
    model = kind(settings).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def sees_images(family: str, seed: int = 0) -> Any:
    """A model with a vision tower, which puts four features in the place of ``IMAGE``."""
    text, vision = SMALL | {"max_position_embeddings": 64}, {"hidden_size": 16, "patch_size": 4}
    if family == "Llava":
        vision |= {"model_type": "clip_vision_model", "image_size": 8, "intermediate_size": 24}
        vision |= {"num_hidden_layers": 2, "num_attention_heads": 2}
        llama = text | {"model_type": "llama"}
        settings = transformers.LlavaConfig(
            text_config=llama, vision_config=vision, image_token_index=IMAGE
        )
        return spread(transformers.LlavaForConditionalGeneration, settings, seed)
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision |= {"embed_dim": 16, "hidden_size": HIDDEN, "depth": 1, "num_heads": 2, "mlp_ratio": 2}
    settings = transformers.Qwen2VLConfig(
        text_config=text | {"rope_parameters": rotary},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=IMAGE + 2,
        vision_end_token_id=IMAGE + 3,
    )
    return spread(transformers.Qwen2VLForConditionalGeneration, settings, seed)


def with_images(family: str) -> tuple[Tensor, dict[str, Any]]:
    """(tokens (B, T), what the forward takes besides): an image in each sequence."""
    tokens = TOKENS.clamp(max=IMAGE - 1)
    tokens[:, 3:7] = IMAGE
    generator = torch.Generator().manual_seed(2)
    shape = (B, 3, 8, 8) if family == "Llava" else (B * 16, 3 * 2 * 4 * 4)
    images = {"pixel_values": torch.randn(shape, generator=generator, dtype=torch.float64)}
    if family == "Llava":
        return tokens, images
    grids = torch.tensor([[1, 4, 4]] * B)
    return tokens, images | {"image_grid_thw": grids, "mm_token_type_ids": (tokens == IMAGE).int()}


def gradients(loss: Tensor, model: Any) -> tuple[Tensor, ...]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)


def assert_same(
    ours: Tensor | tuple[Tensor, ...],
    theirs: Tensor | tuple[Tensor, ...],
    unit: float = DOUBLE,
    roundings: int = ROUNDINGS,
) -> None:
    """Losses or log-probs, or a model's gradients (a tuple), that were computed in two ways.

    Each way is off by at most so many roundings of what is added up. In a loss or a log-prob these
    are log-ratios. In a gradient they are taken to be as large as the largest entry of all, since
    some parameters' own entries are differences of larger numbers.
    """
    size = 2 * LARGEST_LOGIT
    if isinstance(theirs, tuple):
        size = max(each.abs().max().item() for each in theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * roundings * unit * size)
