"""Checks of what users pass. A message says what was given, what is allowed and what to do."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_kernels.divergences import OUTSIDE, Divergence

LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ID_DTYPES = (torch.int32, torch.int64)
# What TopKReverseKL.apply returns besides the loss, (..., K) each.
ENTRY_DTYPES = {"ids": (torch.int32,), "entry_grad": (torch.float32, torch.float64)}
# Ids are int32.
MAX_VOCAB = 2**31 - 1
REDUCTIONS = ("none", "sum", "mean")
# Temperatures that float32 arithmetic can divide by.
LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny
LARGEST_TEMPERATURE = torch.finfo(torch.float32).max
DEFAULT_K = 32  # arXiv 2603.25562
MAX_LENGTH = 2**63 - 1
NUMBERS = (float, int, torch.SymFloat, torch.SymInt, np.integer, np.floating)
FLAGS = (bool, np.bool_, torch.SymBool)
LARGEST_FLOAT = int(torch.finfo(torch.float64).max)
# What to do about a DTensor, by what it holds.
DTENSOR_ROWS = (
    "expected a plain tensor; pass .to_local() if each rank holds whole rows, the same rows of "
    "every argument, and .full_tensor() if it holds parts of rows"
)
DTENSOR_LOGITS = (
    "expected a plain tensor, or a DTensor with Shard(-1) on one dimension of its mesh and Partial "
    "on none; pass .to_local() if each rank holds whole rows, the same rows of every argument, and "
    ".full_tensor() if it holds other parts of rows"
)
DTENSOR_WHOLE = "expected a plain tensor; pass .full_tensor()"
DTENSOR_BUFFER = (
    "expected a plain tensor; pass .to_local(), which shares its memory, if each rank holds whole "
    "rows; if it holds parts of rows, add to .full_tensor(), a copy, and use what is returned"
)
DTENSOR_PARAMETER = (
    "of which this rank holds a part; under FSDP2 compute the loss in the forward of the module "
    "that fully_shard wraps, where its parameters are whole (docs/recipes/sharded-parameters.md). "
    "Under tensor parallelism, where each rank holds rows of it, pass .to_local() and vocab_shard, "
    "or hidden states that are a DTensor of the same mesh, too, Replicate where the weight has "
    "Shard(0). Pass .full_tensor() of a frozen one only: a trained one's gradient would lack the "
    "other ranks' share"
)


def check_logits(logits: object, name: str, content: str = "logits", least: int = 1) -> Tensor:
    """A tensor of logits, or gradients of logits, (..., V) that kernels use without a copy.

    ``least`` is the smallest V.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{name} is a {type(logits).__name__}, expected a tensor of {content} (..., V)"
        )
    check_local(logits, name)
    check_dense(logits, name)
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{name} has dtype {logits.dtype}, allowed are float16, bfloat16, float32 and float64; "
            "convert it with .float()"
        )
    shape = logits.shape
    if not shape:
        raise ValueError(f"{name} is a scalar, expected {content} (..., V)")
    vocab = shape[-1]
    if vocab < least:
        raise ValueError(f"{name} has shape {tuple(shape)}, expected a vocabulary of 1 or more")
    check_vocab(vocab, name)
    if vocab > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {logits.stride(-1)} along the vocabulary, allowed is 1; "
            f"call .contiguous() once where the {content} are made"
        )
    return logits


def check_vocab(vocab: int, name: str) -> None:
    """The ids of the vocabulary fit into int32."""
    if vocab > MAX_VOCAB:
        raise ValueError(
            f"{name} has a vocabulary of {vocab}, allowed is at most {MAX_VOCAB}: ids are int32; "
            "flatten rows, not the vocabulary"
        )


def check_buffer(grad: object) -> Tensor:
    """A tensor of gradients that may be added to in place: no graph needs it, nothing overlaps."""
    check_local(grad, "grad", DTENSOR_BUFFER)
    grad = check_logits(grad, "grad", "gradients")
    check_constant(grad, "grad")
    # torch.compile cannot order symbolic strides, and it refuses overlaps by itself.
    if not torch.compiler.is_compiling() and _overlaps(grad):
        raise ValueError(
            f"grad's elements overlap (shape {tuple(grad.shape)}, strides {grad.stride()}: "
            "expanded or unfolded), expected memory of their own; call .contiguous() once where "
            "the gradients are made"
        )
    return grad


def check_constant(tensor: Tensor, name: str) -> None:
    """The tensor does not require grad."""
    if tensor.requires_grad:
        raise ValueError(f"{name} requires grad, but gets no gradient; pass {name}.detach()")


def check_entries(entries: object, name: str, other: Tensor, other_name: str) -> Tensor:
    """Ids or entry gradients (..., K) of the rows of another tensor."""
    source = f"pass the {name} that TopKReverseKL.apply returned"
    if not isinstance(entries, Tensor):
        raise TypeError(
            f"{name} is a {type(entries).__name__}, expected a tensor (..., K); {source}"
        )
    check_local(entries, name)
    check_dense(entries, name)
    check_entries_dtype(entries, name)
    if entries.ndim == 0 or entries.shape[:-1] != other.shape[:-1] or entries.shape[-1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(entries.shape)}, expected the leading shape of {other_name}, "
            f"{tuple(other.shape[:-1])}, and 1 or more entries per row; {source} for these rows"
        )
    check_constant(entries, name)
    check_same_device(entries, other.device, name, f"{other_name} is")
    return entries


def check_entries_dtype(entries: Tensor, name: str) -> None:
    """``ids`` or ``entry_grad`` have the dtype that the loss saved them in."""
    if entries.dtype not in ENTRY_DTYPES[name]:
        allowed = " and ".join(str(dtype).removeprefix("torch.") for dtype in ENTRY_DTYPES[name])
        raise TypeError(
            f"{name} has dtype {entries.dtype}, allowed is {allowed}; pass the {name} that "
            "TopKReverseKL.apply returned, which saved-tensor hooks must not convert"
        )


def check_same_entries(ids: Tensor, entry_grad: Tensor) -> None:
    """One gradient per id."""
    if ids.shape != entry_grad.shape:
        raise ValueError(
            f"ids have shape {tuple(ids.shape)} and entry_grad {tuple(entry_grad.shape)}; both "
            "must be (..., K), from one call of TopKReverseKL.apply"
        )


def check_upstream(upstream: object, other: Tensor, other_name: str) -> Tensor:
    """A constant floating factor per row of another tensor."""
    if not isinstance(upstream, Tensor):
        raise TypeError(
            f"upstream is a {type(upstream).__name__}, expected a tensor with one per row, or None "
            "for ones"
        )
    check_local(upstream, "upstream")
    if not upstream.dtype.is_floating_point:
        raise TypeError(
            f"upstream has dtype {upstream.dtype}, allowed are floating dtypes; convert it with "
            ".float()"
        )
    check_dense(upstream, "upstream")
    whose = f"{other_name}'" if other_name.endswith("s") else f"{other_name}'s"
    check_row_shape(upstream, other.shape[:-1], "upstream", whose)
    check_constant(upstream, "upstream")
    check_same_device(upstream, other.device, "upstream", f"{other_name} is")
    return upstream


def check_dense(tensor: Tensor, name: str) -> None:
    """The tensor is dense: strided, neither sparse nor nested."""
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} is {layout}, expected a dense tensor; call .to_dense() or pad it")


def check_same_rows(rows: torch.Size, teacher_rows: torch.Size) -> None:
    """Student and teacher have the same leading shape."""
    if rows != teacher_rows:
        raise ValueError(
            f"teacher has leading shape {tuple(teacher_rows)}, the student {tuple(rows)}; they "
            "must be equal, one row per token"
        )


def check_same_device(
    tensor: Tensor, device: torch.device, name: str, others: str = "the logits are"
) -> None:
    """The tensor is on ``device``."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, {others} on {device}; move one of them")


def check_bitmap(banned: Tensor, limit: int) -> None:
    """Banned ids as kernels read them: bits in whole words of 64, up to the limit."""
    words = banned.dtype == torch.uint8 and banned.ndim == 1 and banned.is_contiguous()
    if not words or banned.numel() % 8 or banned.storage_offset() % 8 or banned.numel() * 8 < limit:
        raise ValueError(
            f"the bitmap of banned ids is {banned.dtype} {tuple(banned.shape)}, expected uint8 in "
            f"whole words of 64 bits, one bit for each of {limit} ids"
        )


def check_divergence(divergence: Divergence) -> None:
    """Its numbers are allowed; weights per row are checked apart."""
    beta, clip, floor = divergence.beta, divergence.log_ratio_clip, divergence.logp_floor
    check_number(beta, "the divergence's beta", "a number")
    check_flag(divergence.stop_ratio, "the divergence's stop_ratio")
    if has_skew(divergence) and not 0 < beta < 1:
        raise ValueError(
            f"the divergence's beta is {beta}, allowed are numbers between 0 and 1: at the ends "
            "the skewed divergences vanish; forward_kl() and reverse_kl() are what some trainers "
            "mean by beta 0 and 1"
        )
    # After beta, of which jsd makes two weights.
    for name, weight in zip(divergence._fields[:4], divergence[:4], strict=True):
        if not isinstance(weight, Tensor):
            check_number(weight, f"the divergence's {name}")
            if not -math.inf < weight < math.inf:
                raise ValueError(f"the divergence's {name} is {weight}, allowed are finite numbers")
    if clip is not None:
        check_number(clip, "the divergence's log_ratio_clip", "a number or None")
        if not clip > 0:
            raise ValueError(f"the divergence's log_ratio_clip is {clip}, allowed are numbers > 0")
    if floor is not None:
        check_number(floor, "the divergence's logp_floor", "a number or None")
        if not -math.inf < floor < 0:
            raise ValueError(
                f"the divergence's logp_floor is {floor}, allowed are finite numbers below 0"
            )


def has_skew(divergence: Divergence) -> bool:
    """Whether it contains a mixture of both sides."""
    return any(isinstance(w, Tensor) or w != 0 for w in divergence[2:4])


def check_outside(divergence: Divergence, outside: object, with_token: bool) -> None:
    """What lies outside of the support is treated in a way that the divergence has."""
    check_choice(outside, "outside", OUTSIDE)
    if outside == "generalize" and has_skew(divergence):
        raise ValueError(
            'outside="generalize" is for reverse and forward KL, and the divergence has a skewed '
            'part; pass outside="bucket"'
        )
    if outside != "sample":
        return
    if any(isinstance(w, Tensor) or w != 0 for w in divergence[1:4]):
        raise ValueError(
            'outside="sample" estimates the reverse KL, and the divergence has other parts; pass '
            'divergence="reverse_kl", or outside="bucket"'
        )
    if not with_token:
        raise ValueError('outside="sample" needs token_ids, the sampled token of each row')


def check_choice(value: object, name: str, allowed: Sequence[str]) -> None:
    """One of a few names."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {value!r}, allowed are {', '.join(map(repr, allowed))}")


def check_row_weight(weight: Tensor, rows: torch.Size, device: torch.device, name: str) -> None:
    """A divergence's weight, constant: one for each row or one for all."""
    check_local(weight, name)
    if not weight.dtype.is_floating_point:
        raise TypeError(
            f"{name} has dtype {weight.dtype}, expected a floating dtype; convert it with .float()"
        )
    check_dense(weight, name)
    check_constant(weight, name)
    if weight.ndim > 0:
        check_row_shape(weight, rows, name)
    check_same_device(weight, device, name)


def check_given_ids(ids: object, rows: torch.Size, device: torch.device) -> Tensor:
    """Ids (..., K) of every row. Values are not read."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids is a {type(ids).__name__}, expected an int tensor (..., K)")
    check_local(ids, "ids")
    if ids.dtype not in ID_DTYPES:
        raise TypeError(f"ids have dtype {ids.dtype}, allowed are int32 and int64")
    check_dense(ids, "ids")
    if ids.ndim == 0 or ids.shape[:-1] != rows or ids.shape[-1] == 0:
        raise ValueError(
            f"ids have shape {tuple(ids.shape)}, expected the logits' leading shape {tuple(rows)} "
            "and 1 or more ids"
        )
    check_same_device(ids, device, "ids")
    return ids


def check_token_ids(token_ids: object, rows: torch.Size, device: torch.device) -> None:
    """A token id for each row. Values are not read."""
    if not isinstance(token_ids, Tensor):
        raise TypeError(
            f"token_ids is a {type(token_ids).__name__}, expected an int tensor with one id per row"
        )
    check_local(token_ids, "token_ids")
    check_dense(token_ids, "token_ids")
    if token_ids.dtype not in ID_DTYPES:
        raise TypeError(f"token_ids has dtype {token_ids.dtype}, allowed are int32 and int64")
    check_row_shape(token_ids, rows, "token_ids")
    check_same_device(token_ids, device, "token_ids")


def check_bias(bias: Tensor, weight: Tensor) -> None:
    """A bias has an element for each row of the weight."""
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, expected one per id: {tuple(weight.shape[:1])}"
        )


def check_upstream_dtype(upstream: Tensor) -> None:
    """Gradients of a student head's logits, in the dtypes that the losses make them in."""
    if upstream.dtype not in ENTRY_DTYPES["entry_grad"]:
        raise TypeError(f"upstream has dtype {upstream.dtype}, allowed are float32 and float64")


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for tensors on this type of device."""
    try:
        # Not torch.amp.is_autocast_available: torch.compile cannot trace it with torch 2.11.
        return device_type != "meta" and torch.is_autocast_enabled(device_type)
    except RuntimeError:  # another device type without autocast
        return False


def is_dtensor(tensor: object) -> bool:
    """Whether it is one; nobody has made any where their module is not loaded."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def check_local(tensor: object, name: str, remedy: str = DTENSOR_ROWS) -> None:
    """No DTensor: kernels read the memory of this rank only."""
    if is_dtensor(tensor):
        raise ValueError(f"{name} is a DTensor, {remedy}")


def vocabulary_dimension(hidden: Any, weight: Any, bias: Any, prefix: str) -> int:
    """Which dimension of the mesh shards a head of DTensors, once they fit.

    The hidden states say that its ranks hold the same rows, so that these are no ranks of FSDP.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    parts = [weight] if bias is None else [weight, bias]
    over = [i for i, place in enumerate(weight.placements) if type(place) is Shard]
    fits = all(isinstance(part, DTensor) for part in parts) and len(over) == 1
    if fits:
        [dim] = over
        expected: list[object] = [Replicate()] * weight.device_mesh.ndim
        expected[dim] = Shard(0)
        fits = all(list(part.placements) == expected for part in parts)
        fits = fits and all(part.device_mesh == hidden.device_mesh for part in parts)
        fits = fits and hidden.placements[dim].is_replicate()
        rows = [place for place in hidden.placements if not place.is_replicate()]
        fits = fits and all(type(place) is Shard and place.dim < hidden.ndim - 1 for place in rows)
    if not fits:
        shown = "None" if bias is None else getattr(bias, "placements", "no DTensor")
        raise ValueError(
            f"{prefix}hidden, {prefix}weight and {prefix}bias are DTensors with placements "
            f"{hidden.placements}, {weight.placements} and {shown}; expected DTensors of one mesh: "
            "weight and bias with Shard(0) on one of its dimensions, on which the hidden states "
            "are Replicate, and Replicate on all others, on which the hidden states may shard rows"
        )
    return dim


def check_head(hidden: object, weight: object, bias: object, prefix: str, least: int = 1) -> None:
    """Hidden states (..., H), weight (V, H) and bias (V,) or None, as ``linear`` takes them.

    ``least`` is the smallest V. Of DTensors the weight's rows have to be sharded.
    """
    local = not (is_dtensor(hidden) and is_dtensor(weight))
    if local:
        check_local(hidden, f"{prefix}hidden")
    else:
        vocabulary_dimension(hidden, weight, bias, prefix)
    hidden = _check_part(hidden, f"{prefix}hidden", "hidden states (..., H)", local)
    weight = _check_part(weight, f"{prefix}weight", "a head's weight (V, H)", local)
    if hidden.ndim == 0 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden has shape {tuple(hidden.shape)} and {prefix}weight "
            f"{tuple(weight.shape)}; expected (..., H) and (V, H)"
        )
    if weight.shape[1] == 0 or weight.shape[0] < least:
        raise ValueError(
            f"{prefix}weight has shape {tuple(weight.shape)}, expected V, H of 1 or more"
        )
    check_vocab(weight.shape[0], f"{prefix}weight")
    for tensor, name in ((hidden, "hidden"), (weight, "weight")):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{prefix}{name} has stride {tensor.stride(-1)} along H, allowed is 1; call "
                ".contiguous() once where it is made"
            )
    _check_same_kind(weight, hidden, f"{prefix}weight", f"{prefix}hidden")
    if bias is None:
        return
    bias = _check_part(bias, f"{prefix}bias", "a head's bias (V,)", local)
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{prefix}bias has shape {tuple(bias.shape)}, expected one per id: "
            f"{tuple(weight.shape[:1])}"
        )
    _check_same_kind(bias, hidden, f"{prefix}bias", f"{prefix}hidden")


def _check_part(tensor: object, name: str, expected: str, local: bool) -> Tensor:
    """A dense tensor of a dtype that kernels read; no DTensor if it has to be ``local``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected {expected}")
    if local:
        check_local(tensor, name, DTENSOR_PARAMETER)
    check_dense(tensor, name)
    if tensor.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, allowed are float16, bfloat16, float32 and float64; "
            "dequantise it with its scales, which .float() would leave out"
        )
    return tensor


def _check_same_kind(tensor: Tensor, other: Tensor, name: str, other_name: str) -> None:
    """Both tensors are on one device and, unless autocast converts them, of one dtype."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, {other_name} on {other.device}; move one")
    wide = torch.float64 in (tensor.dtype, other.dtype)
    if tensor.dtype != other.dtype and (wide or not autocasts(other.device.type)):
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, {other_name} {other.dtype}; convert one of them, or "
            "call under torch.autocast, which takes all but float64"
        )


def check_factor(value: object, name: str) -> None:
    """A number above 0 that float32 can hold."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} is a Tensor, expected a number; pass .item()")
    check_number(value, name, "a number")
    # Not the constants above: torch.compile(dynamic=True) takes a module's floats as variables.
    float32 = torch.finfo(torch.float32)
    if not float32.tiny <= value <= float32.max:  # type: ignore[operator]
        raise ValueError(
            f"{name} is {value}, allowed are numbers above 0, from {float32.tiny:.3g} to "
            f"{float32.max:.3g}"
        )


def check_flag(value: object, name: str) -> None:
    """True or False, and no tensor, whose value would have to be read."""
    if not isinstance(value, FLAGS):
        raise TypeError(f"{name} is a {type(value).__name__}, expected True or False")


def check_int(value: object, name: str) -> None:
    """An int, and not a bool."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, np.integer)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected an int")


def check_k(k: int, vocab: int, whose: str = "teacher") -> None:
    """1 <= k <= vocabulary of the logits that are selected from."""
    check_int(k, "k")
    if k < 1 or k > vocab:
        raise ValueError(f"k is {k}, allowed is 1 to the {whose}'s vocabulary of {vocab}")


def check_k_matches(k: int | None, width: int) -> None:
    """A given support has its own width."""
    if k is not None and k != width:
        raise ValueError(
            f"k is {k}, but the teacher is a TopK of width {width}; leave k out, or slice the "
            "TopK's last dimension where it is made"
        )


def check_vocab_size(vocab_size: int | None, name: str = "vocab_size") -> None:
    """vocab_size is a positive int or None."""
    if vocab_size is None:
        return
    check_int(vocab_size, name)
    if not 1 <= vocab_size <= MAX_VOCAB:
        raise ValueError(f"{name} is {vocab_size}, allowed is 1 or more, to {MAX_VOCAB}")


def check_mask(mask: Tensor, rows: torch.Size, device: torch.device) -> None:
    """A bool or integer mask with one flag per row."""
    check_local(mask, "mask")
    check_flags(mask, "mask", "pass per-row factors as weight, or compare: mask != 0")
    check_row_shape(mask, rows, "mask")
    check_same_device(mask, device, "mask")


def check_flags(mask: object, name: str, remedy: str) -> Tensor:
    """A dense tensor of bools or integers; floats are factors, not flags."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} is a {type(mask).__name__}, expected a bool or integer tensor")
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"{name} has dtype {mask.dtype}, allowed are bool and integers; {remedy}")
    check_dense(mask, name)
    return mask


def check_tokens(tokens: object, name: str = "tokens") -> Tensor:
    """Token ids (..., T)."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name} is a {type(tokens).__name__}, expected an int tensor (..., T)")
    check_dense(tokens, name)
    if tokens.dtype not in ID_DTYPES:
        raise TypeError(f"{name} has dtype {tokens.dtype}, allowed are int32 and int64")
    if tokens.ndim == 0:
        raise ValueError(f"{name} is a scalar, expected ids (..., T); pass at least one sequence")
    return tokens


def check_token_values(values: object, name: str) -> Tensor:
    """A number per token: log-probs, rewards, advantages."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} is a {type(values).__name__}, expected a tensor, one per token")
    check_dense(values, name)
    if values.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{name} has dtype {values.dtype}, allowed are float16, bfloat16, float32 and float64; "
            "convert it with .float()"
        )
    return values


def check_like(tensor: Tensor, other: Tensor, name: str, other_name: str) -> None:
    """``tensor`` has the shape and the device of ``other``."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, {other_name} {tuple(other.shape)}; they "
            "must be equal, one element per token"
        )
    check_same_device(tensor, other.device, name, f"{other_name} is")


def check_gamma(gamma: object) -> None:
    """A discount: a number from 0 to 1."""
    if isinstance(gamma, Tensor):
        raise TypeError("gamma is a Tensor, expected a number from 0 to 1; pass .item()")
    check_number(gamma, "gamma", "a number from 0 to 1")
    if not 0 <= gamma <= 1:  # type: ignore[operator]
        raise ValueError(
            f"gamma is {gamma}, allowed is 0 (each token's own reward) to 1 (undiscounted)"
        )


def check_clip(clip: object) -> None:
    """How far a ratio may be from 1: a finite number from 0 on, or None."""
    if clip is None:
        return
    if isinstance(clip, Tensor):
        raise TypeError("clip is a Tensor, expected a number or None; pass .item()")
    check_number(clip, "clip", "a number or None")
    if not 0 <= clip < float("inf"):  # type: ignore[operator]
        raise ValueError(f"clip is {clip}, allowed are finite numbers from 0; None is no clipping")


def check_prompt_length(length: object, tokens: Tensor) -> None:
    """An int from 0 on, or an int tensor with one per sequence."""
    if not isinstance(length, Tensor):
        check_int(length, "prompt_length")
        if not 0 <= length <= MAX_LENGTH:  # type: ignore[operator]
            raise ValueError(f"prompt_length is {length}, allowed is 0 or more, to {MAX_LENGTH}")
        return
    if length.dtype not in ID_DTYPES:
        raise TypeError(f"prompt_length has dtype {length.dtype}, allowed are int32 and int64")
    check_row_shape(length, tokens.shape[:-1], "prompt_length", "the tokens'")
    check_same_device(length, tokens.device, "prompt_length", "tokens is")


def check_student_logsumexp(given: object, rows: torch.Size, device: torch.device) -> None:
    """The student's log-sum-exp of each row, constant."""
    name = "student_logsumexp"
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is a {type(given).__name__}, expected a tensor with one per row")
    check_row_weight(given, rows, device, name)
    check_row_shape(given, rows, name)


def check_weight(weight: Tensor, rows: torch.Size, device: torch.device) -> None:
    """A floating factor per row."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}, expected a tensor with one per row")
    check_local(weight, "weight")
    if not weight.dtype.is_floating_point:
        raise TypeError(
            f"weight has dtype {weight.dtype}, allowed are floating dtypes; pass bool and integer "
            "flags as mask"
        )
    check_dense(weight, "weight")
    check_row_shape(weight, rows, "weight")
    check_same_device(weight, device, "weight")


def check_row_shape(
    tensor: Tensor, rows: torch.Size, name: str, whose: str = "the logits'"
) -> None:
    """One element per row."""
    if tensor.shape != rows:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected {whose} leading shape {tuple(rows)}"
        )


def check_temperature_tensor(
    temperature: Tensor, rows: torch.Size, device: torch.device, name: str
) -> None:
    """A constant temperature per row. Its values are not read: that would synchronise."""
    check_local(temperature, name)
    if not temperature.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {temperature.dtype}, expected a floating dtype")
    check_dense(temperature, name)
    check_constant(temperature, name)
    if temperature.ndim > 0:
        check_row_shape(temperature, rows, name)
    check_same_device(temperature, device, name)


def check_number(value: object, name: str, expected: str = "a number or a tensor") -> None:
    """A real number that a float can hold. A compiler may know only its type."""
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(f"{name} is a {type(value).__name__}, expected {expected}")
    if type(value) is int and abs(value) > LARGEST_FLOAT:
        raise ValueError(
            f"{name} is an int of {value.bit_length()} bits, beyond what a float holds"
        )


def check_temperature_value(temperature: float, name: str) -> None:
    """Above 0, and neither 0 nor infinite in float32."""
    if not LEAST_TEMPERATURE <= temperature <= LARGEST_TEMPERATURE:
        raise ValueError(
            f"{name} is {temperature}, allowed are finite numbers above 0, from "
            f"{LEAST_TEMPERATURE:.3g} to {LARGEST_TEMPERATURE:.3g}"
        )


def check_reduction(reduction: str, normalizer: object, device: torch.device) -> None:
    """A known reduction; a normalizer only for the mean."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, allowed are {', '.join(REDUCTIONS)}")
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(
            f'normalizer goes with reduction="mean", not {reduction!r}; divide the result yourself'
        )
    if not isinstance(normalizer, Tensor):
        check_number(normalizer, "normalizer")
        return
    if normalizer.ndim != 0:
        raise ValueError(
            f"normalizer has shape {tuple(normalizer.shape)}, expected a number or a 0-d tensor"
        )
    if normalizer.dtype.is_complex or normalizer.dtype == torch.bool:
        raise TypeError(f"normalizer has dtype {normalizer.dtype}, expected a real number")
    check_same_device(normalizer, device, "normalizer")


def check_backend(backend: str | None) -> None:
    """A name or None; whether there is such a backend, ``backends.resolve`` checks."""
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend is a {type(backend).__name__}, expected a name or None")


def check_inplace(student: Tensor) -> None:
    """Backward may overwrite the logits' memory: it is no leaf's, and no elements overlap."""
    base = student if student._base is None else student._base
    if base.requires_grad and base.is_leaf:
        kind = "" if base is student else "a view of "
        raise ValueError(
            f"inplace_grad=True would overwrite the logits, which are {kind}a leaf of the graph; "
            "pass the output of a layer, or inplace_grad=False"
        )
    if _overlaps(student):
        raise ValueError(
            "inplace_grad=True needs elements of their own, but those of the logits "
            f"overlap (shape {tuple(student.shape)}, strides {student.stride()}: expanded or "
            "unfolded); pass inplace_grad=False"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements may share memory."""
    if tensor.numel() == 0:
        return False
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < extent:
            return True
        extent += (size - 1) * stride
    return False


def as_banned_ids(banned_ids: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """A 1-D tensor of ids on the device."""
    check_local(banned_ids, "banned_ids", DTENSOR_WHOLE)
    return as_ids(banned_ids, device, "banned_ids", "the logits are")


def as_ids(ids: Sequence[int] | Tensor, device: torch.device, name: str, others: str) -> Tensor:
    """A 1-D tensor of ids on the device of ``others``."""
    if not isinstance(ids, Tensor):
        try:
            ids = torch.tensor(list(ids), device=device)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(
                f"{name} is {ids!r:.80}, expected a sequence of ints or an int tensor"
            ) from error
    check_dense(ids, name)
    if ids.numel() == 0:
        ids = ids.long()
    if ids.dtype not in ID_DTYPES:
        raise TypeError(f"{name} has dtype {ids.dtype}, allowed are int32 and int64")
    if ids.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}, expected one dimension")
    check_same_device(ids, device, name, others)
    return ids
