"""What travels whole from the public functions to the kernels: one value for what belongs together.

Operators take such a value apart and put it together again (``_ops``), and the compiled modules
have a struct of the same name (csrc/common/arguments.h). So a new option is a field here and there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_kernels.divergences import RENORMALIZE, Divergence, reverse_kl


class Allowed(NamedTuple):
    """What may enter a support.

    Ids in [0, ``limit``) that the bitmap ``banned`` does not name, in rows (...) whose ``mask``,
    bool, is True.
    """

    limit: int
    banned: Tensor | None = None
    mask: Tensor | None = None


class Temperature(NamedTuple):
    """What divides one side's logits: ``rows`` (...) if there are any, else ``value``."""

    value: float = 1.0
    rows: Tensor | None = None


class Objective(NamedTuple):
    """What is computed on the entries of a support.

    The divergence's weights are numbers here; ``weights`` (..., 4) replaces them where rows differ.
    ``outside`` is what becomes of the probability that is not on the support, one of
    ``divergences.OUTSIDE``.
    """

    temperature: Temperature = Temperature()
    teacher_temperature: Temperature = Temperature()
    divergence: Divergence = reverse_kl()
    weights: Tensor | None = None
    outside: str = RENORMALIZE


class Tail(NamedTuple):
    """What a softmax outside of the support is over.

    It is that of x / T over the ids in [0, ``width``), banned ones included, that are not in
    ``ids`` (..., K), or where these are None, not selected in the same pass. ``with_entropy`` asks
    for its entropy beside its log-sum-exp. Width 0: nobody asks for either.
    """

    width: int = 0
    temperature: Temperature = Temperature()
    ids: Tensor | None = None
    with_entropy: bool = False


def no_tail() -> Tail:
    """Written out: of a default, torch.compile would make an input of the graph."""
    return Tail(0, Temperature(1.0, None), None, False)


class Tails(NamedTuple):
    """Both sides' log-sum-exps (...), each at its own temperature, outside of the listed ids.

    ``student`` may be None: it is computed, over the ids in [0, ``width``).
    """

    teacher: Tensor
    student: Tensor | None
    width: int


class Background(NamedTuple):
    """What a dense gradient holds where no entry is: factor p, with p = exp(z / T - logsumexp).

    ``factors`` (...), or None for zeros everywhere; ``logsumexp`` (...) of z / T over the ids in
    [0, ``limit``), beyond which the gradient is 0, or over those of them without an entry, where p
    may then exceed 1 at the entries; ``logits`` z (..., V), or None where the gradient's own memory
    holds them. Where the factor is 0, so is the gradient, whatever z is.
    """

    factors: Tensor | None = None
    logsumexp: Tensor | None = None
    limit: int = 0
    logits: Tensor | None = None
    temperature: Temperature = Temperature()


class Head(NamedTuple):
    """Hidden states (..., H) and a head: weight (V, H), bias (V,) or None, scale and softcap."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None


class Reading(NamedTuple):
    """What is read of a head's logits in one pass.

    The ``k`` best of the ``allowed`` ids (none: 0), the ``tail``, and the logits at the ids
    ``listed`` (..., C), where there are any.
    """

    k: int
    allowed: Allowed
    tail: Tail
    listed: Tensor | None


class Question(NamedTuple):
    """A divergence on a given support: its ids (..., K), the teacher's values there, both tails."""

    ids: Tensor
    teacher: Tensor
    objective: Objective
    tails: Tails


class Wanted(NamedTuple):
    """Which gradients of a head are needed."""

    hidden: bool
    weight: bool
    bias: bool


# Fields of which a row has several elements.
_ENTRIES = ("ids", "weights")


def per_piece(value: Any, rows: slice | Tensor) -> Any:
    """The value for some rows, which count over all leading dimensions."""
    found = {}
    for name, field in zip(value._fields, value, strict=True):
        if isinstance(field, Tensor):
            flat = field.reshape(-1, field.shape[-1]) if name in _ENTRIES else field.reshape(-1)
            found[name] = flat[rows]
        elif isinstance(field, tuple):
            found[name] = per_piece(field, rows)
    return value._replace(**found)


def flat(values: Iterable[Any]) -> list[Any]:
    """The fields of values that travel whole, in order."""
    fields = []
    for value in values:
        if isinstance(value, tuple):
            fields += flat(value)
        else:
            fields.append(value)
    return fields


def pack_bitmap(ids: Tensor, limit: int) -> Tensor:
    """uint8 bitmap of the ids in [0, limit), padded to whole 64-bit words; others are ignored.

    Bit b of byte i stands for id 8 i + b. Built on the device without reading a value on the host.
    """
    words = (limit + 63) // 64
    outside = (ids < 0) | (ids >= limit)
    # Ids outside go to one more flag behind the bitmap.
    slots = torch.where(outside, words * 64, ids.long())
    flags = torch.zeros(words * 64 + 1, dtype=torch.uint8, device=ids.device)
    flags = flags.index_fill(0, slots, 1)[:-1].view(-1, 8)
    bits = torch.arange(8, dtype=torch.uint8, device=ids.device)
    return (flags << bits).sum(-1, dtype=torch.uint8)


def unpack_bitmap(bitmap: Tensor, limit: int) -> Tensor:
    """Bool (limit,): which ids a bitmap names."""
    bits = torch.arange(8, device=bitmap.device, dtype=torch.uint8)
    return ((bitmap[:, None] >> bits) & 1).flatten()[:limit].bool()


def allowed_ids(ids: Tensor, allowed: Allowed) -> Tensor:
    """Whether an id may be in the support."""
    inside = (ids >= 0) & (ids < allowed.limit)
    if allowed.banned is None:
        return inside
    banned = unpack_bitmap(allowed.banned, allowed.limit)
    return inside & ~banned[torch.where(inside, ids, 0).long()]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 where an input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def exp(x: Tensor) -> Tensor:
    """e^x. MKL, which torch.exp calls on CPUs, wakes its threads even for a few numbers."""
    return torch.exp2(x * math.log2(math.e))


def divisor(temperature: Temperature, dtype: torch.dtype) -> float | Tensor:
    """What divides a row's logits (..., C)."""
    value, rows = temperature
    return value if rows is None else rows.to(dtype)[..., None]


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that lack it: of log-sum-exps and a row's few entries."""
    return torch.float32 if device.type == "mps" else torch.float64
