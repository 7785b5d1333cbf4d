"""What operators get and give: checks of operands, whoever calls, and memory for sums.

Kernels take addresses, so what they would read is checked here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_kernels._arguments import (
    Allowed,
    Background,
    Objective,
    Tail,
    wide_dtype,
)
from opd_kernels._checks import (
    ID_DTYPES,
    check_bias,
    check_bitmap,
    check_logits,
    check_row_shape,
    check_same_device,
    check_same_rows,
)

_LOST_GRAPH = (
    "{} cannot be differentiated twice: its gradient is computed in forward and held constant, and "
    "torch {} would return the gradient of this compiled function without a graph; leave out "
    "create_graph=True, or build the loss from torch.topk, gather and log_softmax"
)


def check_rows(tensor: Tensor | None, name: str, logits: Tensor) -> None:
    """Raises unless ``tensor`` has one element per row, on the logits' device."""
    if tensor is not None:
        check_row_shape(tensor, logits.shape[:-1], name)
        check_same_device(tensor, logits.device, name)


def check_sums(tensor: Tensor | None, name: str, logits: Tensor) -> None:
    """Raises unless ``tensor`` has a floating number per row."""
    check_rows(tensor, name, logits)
    if tensor is not None and not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating dtype")


def check_device(tensor: Tensor | None, name: str, other: Tensor) -> None:
    """Raises unless ``tensor`` is on the device of ``other``."""
    if tensor is not None and tensor.device != other.device:
        check_same_device(tensor, other.device, name, "the other tensors are")


def check_ids(ids: Tensor, shape: Sequence[int], student: Tensor) -> None:
    """Raises unless the ids of a given support are integers of that shape."""
    check_device(ids, "ids", student)
    if ids.shape != tuple(shape):
        raise ValueError(f"ids have shape {tuple(ids.shape)}, expected {tuple(shape)}")
    if ids.dtype not in ID_DTYPES:
        raise TypeError(f"ids have dtype {ids.dtype}, allowed are int32 and int64")
    check_width(ids)


def check_width(ids: Tensor) -> None:
    """Raises unless a support has entries: kernels are compiled for 1 or more."""
    if ids.shape[-1] == 0:
        raise ValueError(f"ids have shape {tuple(ids.shape)}, expected 1 or more per row")


def check_allowed(allowed: Allowed, logits: Tensor, vocab: int) -> None:
    """Raises unless the mask has the logits' rows and the limit lies in vocabulary and bitmap."""
    limit, banned, mask = allowed
    if not 0 <= limit <= vocab:
        raise ValueError(f"limit is {limit}, allowed is 0 to the vocabulary of {vocab}")
    check_mask(mask, logits)
    if banned is not None:
        check_bitmap(banned, limit)
        check_same_device(banned, logits.device, "banned")


def check_mask(mask: Tensor | None, logits: Tensor) -> None:
    """Raises unless there is no mask, or a flag for each row."""
    check_rows(mask, "mask", logits)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}, expected bool")


def check_tail(tail: Tail, logits: Tensor, vocab: int | None = None) -> None:
    """Raises unless a tail lies in the vocabulary and what it has per row has the logits' rows."""
    vocab = logits.shape[-1] if vocab is None else vocab
    if not 0 <= tail.width <= vocab:
        raise ValueError(f"width is {tail.width}, allowed is 0 to the vocabulary of {vocab}")
    check_rows(tail.temperature.rows, "temperature", logits)
    if tail.ids is not None:
        check_ids(tail.ids, (*logits.shape[:-1], tail.ids.shape[-1]), logits)


def check_sides(student: Tensor, teacher: Tensor, allowed: Allowed, objective: Objective) -> None:
    """Raises unless student, teacher and what belongs to their rows fit together."""
    check_same_rows(student.shape[:-1], teacher.shape[:-1])
    check_allowed(allowed, student, student.size(-1))
    check_device(teacher, "teacher", student)
    check_rows(objective.temperature.rows, "temperature", student)
    check_rows(objective.teacher_temperature.rows, "teacher_temperature", student)
    if objective.weights is not None:
        check_row_shape(objective.weights, torch.Size((*student.shape[:-1], 4)), "weights")
        check_same_device(objective.weights, student.device, "weights")
        if not objective.weights.dtype.is_floating_point:
            raise TypeError(
                f"weights have dtype {objective.weights.dtype}, expected a floating one"
            )


def check_background(background: Background, out: Tensor) -> None:
    """Raises unless a background has the rows of the gradient ``out``, and logits of its width."""
    if background.logsumexp is None:
        raise ValueError("logsumexp is None, expected one per row beside factors")
    if not 1 <= background.limit <= out.shape[-1]:
        raise ValueError(
            f"limit is {background.limit}, allowed is 1 to the vocabulary of {out.shape[-1]}"
        )
    for name in ("factors", "logsumexp"):
        check_sums(getattr(background, name), name, out)
    check_rows(background.temperature.rows, "temperature", out)
    logits = background.logits
    if logits is not None:
        check_device(logits, "logits", out)
        check_row_shape(logits, out.shape, "logits", "the gradient's")
        check_logits(logits, "logits")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, allowed: Allowed) -> None:
    """Raises unless a head's parts and what belongs to its rows fit together."""
    check_device(weight, "weight", hidden)
    if bias is not None:
        check_bias(bias, weight)
        check_device(bias, "bias", hidden)
    check_allowed(allowed, hidden, weight.shape[0])


def refuse_lost_graph(function: str) -> None:
    """Raises where ``create_graph=True`` would silently give a gradient without a graph.

    This happens before torch 2.13, in compiled functions that save no input with a gradient
    (github.com/pytorch/pytorch/issues/181581). Only such functions run these operators in a
    backward pass with gradients enabled; an autograd.Function disables them.
    """
    if torch.is_grad_enabled() and torch._C._current_graph_task_id() >= 0:
        raise RuntimeError(_LOST_GRAPH.format(function, torch.__version__))


def listed_by(k: int, tail: Tail) -> int:
    """How many ids a row has, selected or left out of the tail: with a token one more than k."""
    return k if tail.ids is None or not tail.width else max(k, tail.ids.shape[-1])


def tail_fake(logits: Tensor, tail: Tail) -> tuple[Tensor, Tensor]:
    sums = wide_rows(logits) if tail.width else nothing_of(logits)
    return sums, wide_rows(logits) if tail.width and tail.with_entropy else nothing_of(logits)


def wide_rows(logits: Tensor) -> Tensor:
    """Memory for a sum of each row."""
    return logits.new_empty(logits.shape[:-1], dtype=wide_dtype(logits.device))


def nothing_of(logits: Tensor) -> Tensor:
    """In place of sums that nobody asked for: no element in each row."""
    return logits.new_empty((*logits.shape[:-1], 0), dtype=wide_dtype(logits.device))
