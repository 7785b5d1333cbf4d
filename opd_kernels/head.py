"""Logits of a linear head that are never whole: ``LinearLogits``, and how a head is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from opd_kernels import _checks
from opd_kernels._arguments import Head

__all__ = ["LinearLogits"]


@dataclass(frozen=True, eq=False)
class LinearLogits:
    """Logits as hidden states and a head: they are never whole.

    A teacher's are computed a few rows at a time. Of a student's only those of the support are,
    unless a loss needs full softmaxes: then a few rows at a time, in backward a few columns.

    With hidden states h, weight W, bias b, scale s and softcap c::

        logits = cap(s (W h + b))    cap(x) = c tanh(x / c), or x without a softcap

    Shapes and dtypes: ``hidden`` (..., H), ``weight`` (V, H), ``bias`` (V,) or None, floating and
    of one dtype; under autocast of any, as ``torch.nn.functional.linear`` takes them.

    The product W h + b is the framework's own matrix product, rounded to the dtype: what the
    model's head returns, up to the order of its sums. Selection uses these. Scale and softcap keep
    their order, so they are applied to the selected ones only, in float32. No gradient reaches the
    teacher.

    The weight has to be the whole head. With an adapter, a quantised weight without its scales or a
    forgotten softcap the loss is wrong in silence. ``head_of(model)(hidden)`` reads the whole head
    or refuses it.

    Memory: one workspace for the logits of a few hundred rows, 256 MB on GPUs and 64 MB on CPUs, or
    the logits of 128 rows if these are more. Autocast copies tensors of another dtype.

    DTensors are taken under tensor parallelism: weight and bias with Shard(0) on one dimension of
    their mesh, on which the hidden states are Replicate; other dimensions may shard rows of the
    hidden states. Gradients have the placements that torch's own ``linear`` leaves.

    Errors: ``TypeError`` for wrong types and dtypes, ``ValueError`` for shapes and devices that do
    not fit, for other DTensors, such as a weight that FSDP2 shards over other rows' ranks, for a
    scale or softcap that is not above 0.

    Example::

        teacher = LinearLogits(teacher_hidden, weight, softcap=30.0)
        support = select_topk(teacher, 32)
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Checks shapes, dtypes and devices; values are not read."""
        # A rank may hold no row of a sharded head.
        _checks.check_head(self.hidden, self.weight, self.bias, "LinearLogits ", least=0)
        _checks.check_factor(self.scale, "LinearLogits scale")
        if self.softcap is not None:
            _checks.check_factor(self.softcap, "LinearLogits softcap")

    @staticmethod
    def _unchecked(*fields: Any) -> LinearLogits:
        """Makes one from its fields in order, without checks."""
        head = object.__new__(LinearLogits)
        for name, value in zip(LinearLogits.__dataclass_fields__, fields, strict=True):
            object.__setattr__(head, name, value)
        return head

    @property
    def shape(self) -> torch.Size:
        """Leading shape: one element per row."""
        return self.hidden.shape[:-1]

    @property
    def vocab(self) -> int:
        """V, the number of logits of a row."""
        return self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.hidden.device


def as_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as ``linear`` would take them: in autocast's dtype where it is on."""
    device = next(tensor for tensor in tensors if tensor is not None).device.type
    if not _checks.autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return tensors if wide else tuple(None if t is None else t.to(dtype) for t in tensors)


def in_autocast(head: LinearLogits) -> LinearLogits:
    """The head with its tensors in autocast's dtype, where that is on."""
    tensors = as_autocast(head.hidden, head.weight, head.bias)
    return LinearLogits._unchecked(*tensors, head.softcap, head.scale)


def head_as_operand(head: LinearLogits) -> Head:
    """A head as operators take it, without gradients, in autocast's dtype where that is on."""
    # Checked again: autocast may have allowed mixed dtypes there and be off here.
    _checks.check_head(head.hidden, head.weight, head.bias, "LinearLogits ")
    hidden, weight, bias = as_autocast(head.hidden, head.weight, head.bias)
    bias = None if bias is None else bias.detach()
    return Head(hidden.detach(), weight.detach(), bias, head.scale, head.softcap)


def _flatten(head: LinearLogits) -> tuple[list[Tensor], tuple[float | None, float]]:
    leaves = [head.hidden, head.weight]
    return leaves if head.bias is None else [*leaves, head.bias], (head.softcap, head.scale)


def _unflatten(leaves: Any, context: tuple[float | None, float]) -> LinearLogits:
    # Not through __init__: tree_map may put anything at the leaves.
    hidden, weight, *bias = leaves
    return LinearLogits._unchecked(hidden, weight, bias[0] if bias else None, *context)


def _flatten_with_keys(
    head: LinearLogits,
) -> tuple[list[tuple[pytree.KeyEntry, Tensor]], tuple[float | None, float]]:
    leaves, context = _flatten(head)
    names = map(pytree.GetAttrKey, ("hidden", "weight", "bias")[: len(leaves)])
    return list(zip(names, leaves, strict=True)), context


pytree.register_pytree_node(
    LinearLogits,
    _flatten,
    _unflatten,
    serialized_type_name="opd_kernels.LinearLogits",
    # JSON has no tuples.
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([LinearLogits])
