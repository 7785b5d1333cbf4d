"""A teacher's support: ``TopK``, and what a server's log-probs become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_kernels import _payload
from opd_kernels._checks import ID_DTYPES

__all__ = ["TopK"]


@dataclass(frozen=True, eq=False)
class TopK:
    """The teacher's K entries of each row: ids and logits, in any order.

    Shapes and dtypes: ``ids`` int32 or int64 (..., K); ``logits`` floating (..., K), logits or
    log-probs (they differ by a constant per row, which the renormalisation cancels); ``logsumexp``
    floating (...) or None, the teacher's full log-sum-exp in the same scale at temperature 1, which
    only ``return_stats`` reads.

    An entry is absent where its id is -1, outside the vocabulary or banned, or its logit is -inf.
    Duplicate ids count as entries of their own; their gradients add up.

    It behaves as a container over its leading dimensions: ``topk[2:5]`` slices rows,
    ``topk.to(...)`` moves, ``TopK.cat`` concatenates, ``torch.utils._pytree`` maps over its
    tensors, and ``torch.load`` takes it with ``weights_only=True``.

    Errors: ``TypeError`` for wrong dtypes, ``ValueError`` for shapes that do not match.

    Example::

        topk = TopK(ids=torch.tensor([[3, 1]]), logits=torch.tensor([[2.0, 0.5]]))
        loss = topk_rkl(student_logits, topk)
    """

    ids: Tensor
    logits: Tensor
    logsumexp: Tensor | None = None

    def __post_init__(self) -> None:
        """Checks shapes and dtypes; values are not read."""
        if self.ids.dtype not in ID_DTYPES:
            raise TypeError(f"TopK ids have dtype {self.ids.dtype}, allowed are int32 and int64")
        if not self.logits.dtype.is_floating_point:
            raise TypeError(
                f"TopK logits have dtype {self.logits.dtype}, expected a floating dtype"
            )
        if self.ids.ndim == 0 or self.ids.shape != self.logits.shape:
            raise ValueError(
                f"TopK ids have shape {tuple(self.ids.shape)} and logits "
                f"{tuple(self.logits.shape)}; both must be (..., K)"
            )
        if self.ids.shape[-1] < 1:
            raise ValueError("TopK has width 0, allowed is 1 or more entries per row")
        if self.logits.device != self.ids.device:
            raise ValueError(
                f"TopK ids are on {self.ids.device} and logits on {self.logits.device}; move one"
            )
        if self.logsumexp is not None and self.logsumexp.shape != self.ids.shape[:-1]:
            raise ValueError(
                f"TopK logsumexp has shape {tuple(self.logsumexp.shape)}, expected one per row: "
                f"{tuple(self.ids.shape[:-1])}"
            )

    @property
    def k(self) -> int:
        """Entries per row."""
        return self.ids.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """Leading shape: one element per row."""
        return self.ids.shape[:-1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.ids.device

    def __len__(self) -> int:
        """Size of the first leading dimension."""
        if not self.shape:
            raise TypeError("a TopK of a single row has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[TopK]:
        """Over the first leading dimension."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> TopK:
        """Rows by any index of the leading dimensions; the K entries stay together."""
        return self._map(
            lambda tensor, trailing: tensor[_index_rows(index, tensor.ndim - trailing)]
        )

    def to(self, *args: Any, **kwargs: Any) -> TopK:
        """As ``Tensor.to``; a dtype applies to logits and logsumexp, ids keep theirs."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def move(tensor: Tensor, _: int) -> Tensor:
            target = dtype if tensor.dtype.is_floating_point else None
            return tensor.to(device=device, dtype=target, non_blocking=non_blocking)

        return self._map(move)

    def detach(self) -> TopK:
        """Without graph."""
        return self._map(lambda tensor, _: tensor.detach())

    def reshape(self, *shape: int) -> TopK:
        """Other leading dimensions."""
        return self._map(
            lambda tensor, trailing: tensor.reshape(*shape, *tensor.shape[-1:][:trailing])
        )

    @staticmethod
    def cat(parts: Sequence[TopK], dim: int = 0) -> TopK:
        """Concatenates along a leading dimension; logsumexp is kept where all parts have one."""
        if not parts:
            raise ValueError("TopK.cat got no parts, expected one or more")
        dim = dim + len(parts[0].shape) if dim < 0 else dim
        if not 0 <= dim < len(parts[0].shape):
            raise ValueError(
                f"TopK.cat got dim {dim}, but the leading shape is {tuple(parts[0].shape)}"
            )
        sums = [part.logsumexp for part in parts if part.logsumexp is not None]
        return TopK(
            torch.cat([part.ids for part in parts], dim),
            torch.cat([part.logits for part in parts], dim),
            torch.cat(sums, dim) if len(sums) == len(parts) else None,
        )

    @staticmethod
    def from_logprobs(
        logprobs: Any,
        ids: Any = None,
        *,
        k: int | None = None,
        device: torch.device | str | None = None,
    ) -> TopK:
        """A server's top-K log-probs as a ``TopK``.

        ``logprobs`` alone is nested lists down to one element per position: None (vLLM's first
        position), a mapping from token id to log-prob (vLLM's ``prompt_logprobs``; the value may be
        a number, an object with ``.logprob`` or a mapping with ``"logprob"``; ids may be ints,
        digits or ``"token_id:5"``), or a list of ``(logprob, id, ...)`` (SGLang). With ``ids``,
        both are arrays, tensors or nested lists of the same shape (TRL, verl).

        Ragged lengths are padded with absent entries to the longest of each level; log-probs at or
        below -1000, None and negative ids are absent. An id that is listed twice counts once, with
        its larger log-prob. Of more than ``k`` entries (vLLM lists the sampled token besides the K
        best) the k largest are kept; ``k=None`` keeps all, and is the longest position.

        Returns ids int32 (..., k) in order (log-prob descending, id ascending), logits float32, and
        logsumexp 0 where a position has entries (log-probs are normalised) and NaN where not.

        Errors: ``TypeError`` for an element that is none of these; ``ValueError`` for k < 1, for
        ``ids`` and ``logprobs`` of different shapes, for ids beyond int32.

        Example::

            teacher = TopK.from_logprobs(response.prompt_logprobs, k=32)
        """
        if k is not None and k < 1:
            raise ValueError(f"k is {k}, allowed is 1 or more")
        if ids is None:
            id_tensor, values = _payload.from_positions(logprobs)
        else:
            id_tensor, values = _payload.from_arrays(ids, logprobs)
        id_tensor, values = _payload.canonical(id_tensor, values, k)
        empty = (id_tensor < 0).all(-1)
        logsumexp = torch.zeros(empty.shape).masked_fill(empty, torch.nan)
        return TopK(id_tensor.to(torch.int32), values, logsumexp).to(device or "cpu")

    def validate(self, vocab_size: int) -> TopK:
        """Raises ``ValueError`` for ids that are neither -1 nor in [0, vocab_size); returns self.

        Reads the values, so it synchronises with the device: call it where a support enters, not in
        every step.
        """
        bad = (self.ids < -1) | (self.ids >= vocab_size)
        count = int(bad.sum())
        if count:
            where = tuple(int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"TopK has {count} ids outside [0, {vocab_size}), the first is "
                f"{int(self.ids[where])} at {where}; use the student's vocabulary size, and -1 "
                f"for absent entries"
            )
        return self

    def _map(self, fn: Callable[[Tensor, int], Tensor]) -> TopK:
        """fn(tensor, number of trailing dimensions that are not rows) over the tensors."""
        return TopK(
            fn(self.ids, 1),
            fn(self.logits, 1),
            None if self.logsumexp is None else fn(self.logsumexp, 0),
        )


def _index_rows(index: Any, row_dims: int) -> Any:
    """The index with an ellipsis that leaves whatever follows the rows alone."""
    parts = index if isinstance(index, tuple) else (index,)
    used = sum(
        part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1
        for part in parts
        if part is not None and part is not Ellipsis
    )
    if used > row_dims:
        raise IndexError(f"TopK has {row_dims} leading dimensions, but {used} were indexed")
    if any(part is Ellipsis for part in parts):
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        fill = (slice(None),) * (row_dims - used)
        return (*parts[:at], *fill, *parts[at + 1 :])
    return parts


def _flatten(topk: TopK) -> tuple[list[Tensor | None], None]:
    return [topk.ids, topk.logits, topk.logsumexp], None


def _unflatten(children: Any, _: None) -> TopK:
    # Not through __init__: tree_map may put anything at the leaves, shapes or specs for instance.
    topk = object.__new__(TopK)
    for name, value in zip(("ids", "logits", "logsumexp"), children, strict=True):
        object.__setattr__(topk, name, value)
    return topk


torch.utils._pytree.register_pytree_node(
    TopK, _flatten, _unflatten, serialized_type_name="opd_kernels.TopK"
)
torch.serialization.add_safe_globals([TopK])
