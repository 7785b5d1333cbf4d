"""A teacher's support: ``TopK``, and what a server's log-probs become."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_kernels import _payload
from opd_kernels._checks import ID_DTYPES, check_dense, check_int, check_local

__all__ = ["TopK"]

# Servers and trainers write "no entry" as -1e3, -1e4, -9999 or -inf; no log-prob of a token that a
# model lists among its best is near that.
SENTINEL = -1e3


@dataclass(frozen=True, eq=False, repr=False)
class TopK:
    """The teacher's K entries of each row: ids and logits, in any order.

    Shapes and dtypes: ``ids`` int32 or int64 (..., K); ``logits`` floating (..., K), logits or
    log-probs (they differ by a constant per row, which the renormalisation cancels); ``logsumexp``
    floating (...) or None, the teacher's full log-sum-exp in the same scale at temperature 1, which
    only ``return_stats`` reads.

    An entry is absent where its id is -1, outside the vocabulary or banned, or its logit is -inf.
    Duplicate ids count as entries of their own; their gradients add up.

    It behaves as a container over its leading dimensions: ``topk[2:5]`` slices rows,
    ``topk.to(...)`` moves, ``TopK.cat`` concatenates, ``torch.utils._pytree`` maps over the tensors
    that are there, and ``torch.load`` takes it with ``weights_only=True``.

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
        self.check()

    def check(self) -> None:
        """Raises for tensors that are no support; values are not read.

        What ``torch.utils._pytree`` maps over the tensors may leave anything in their place, so the
        losses ask again.
        """
        others = {"logits": self.logits}
        if self.logsumexp is not None:
            others["logsumexp"] = self.logsumexp
        for name, tensor in {"ids": self.ids, **others}.items():
            _check_tensor(tensor, name)
        if self.ids.dtype not in ID_DTYPES:
            raise TypeError(f"TopK ids have dtype {self.ids.dtype}, allowed are int32 and int64")
        for name, tensor in others.items():
            if not tensor.dtype.is_floating_point:
                raise TypeError(f"TopK {name} have dtype {tensor.dtype}, expected a floating dtype")
            if tensor.device != self.ids.device:
                raise ValueError(
                    f"TopK ids are on {self.ids.device} and {name} on {tensor.device}; move one"
                )
        if self.ids.ndim == 0 or self.ids.shape != self.logits.shape:
            raise ValueError(
                f"TopK ids have shape {tuple(self.ids.shape)} and logits "
                f"{tuple(self.logits.shape)}; both must be (..., K)"
            )
        if self.ids.shape[-1] < 1:
            raise ValueError("TopK has width 0, allowed is 1 or more entries per row")
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
        index = _index_rows(index, self.ids.ndim - 1)
        return self._map(lambda tensor: tensor[index])

    def __repr__(self) -> str:
        """Dtypes and shapes, not values."""
        shown = (f"{field.name}={_describe(getattr(self, field.name))}" for field in fields(self))
        return f"TopK({', '.join(shown)}, device={getattr(self.ids, 'device', None)})"

    def to(self, *args: Any, **kwargs: Any) -> TopK:
        """As ``Tensor.to``; a dtype applies to logits and logsumexp, ids keep theirs."""
        logits = self.logits.to(*args, **kwargs)
        how = {name: kwargs[name] for name in ("non_blocking", "copy") if name in kwargs}
        return TopK(
            self.ids.to(logits.device, **how),
            logits,
            None if self.logsumexp is None else self.logsumexp.to(*args, **kwargs),
        )

    def pin_memory(self) -> TopK:
        """In page-locked memory; ``DataLoader(pin_memory=True)`` calls it."""
        return self._map(Tensor.pin_memory)

    def detach(self) -> TopK:
        """Without graph."""
        return self._map(Tensor.detach)

    def reshape(self, *shape: int) -> TopK:
        """Other leading dimensions, of which one may be -1."""
        return TopK(
            self.ids.reshape(*shape, self.k),
            self.logits.reshape(*shape, self.k),
            None if self.logsumexp is None else self.logsumexp.reshape(shape),
        )

    @staticmethod
    def cat(parts: Iterable[TopK], dim: int = 0) -> TopK:
        """Concatenates along a leading dimension; logsumexp is kept where all parts have one."""
        parts = list(parts)
        if not parts:
            raise ValueError("TopK.cat got no parts, expected one or more")
        widths = sorted({part.k for part in parts})
        if len(widths) > 1:
            raise ValueError(
                f"TopK.cat got widths {widths}, expected one; give from_logprobs a k, or pad with "
                "id -1 and logit -inf"
            )
        row_dims = len(parts[0].shape)
        if not -row_dims <= dim < row_dims:
            raise ValueError(
                f"TopK.cat got dim {dim}, but the leading shape is {tuple(parts[0].shape)}"
            )
        dim %= row_dims
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

        ``logprobs`` alone is nested lists down to one element per position, which is one of

        - None (vLLM's first position);
        - a mapping from token id to log-prob (vLLM's ``prompt_logprobs``): a number, an object with
          ``.logprob`` or a mapping with ``"logprob"``;
        - a list of ``(logprob, id, ...)`` (SGLang's ``input_top_logprobs``) or of
          ``{"id": 5, "logprob": -0.1}`` (TGI); the id may be called ``"token_id"`` (Dynamo) or be
          written ``"token": "token_id:5"`` (vLLM's chat completions);
        - such an entry with the others of its position in ``"top_logprobs"`` (llama.cpp, vLLM's
          chat completions).

        With ``ids``, both are arrays, tensors or nested lists of the same shape (TRL, verl). Read
        on the host.

        Ids in text are ASCII decimal digits without leading zeros, ``"5"`` or ``"token_id:5"``; a
        ``"token"`` that is ``"5"`` is text. A flat list of entries is refused, because it may be
        the tokens of a sequence (SGLang's ``input_token_logprobs``) as well as one position; so is
        a position whose first entry alone has no log-prob, as in SGLang's.

        Ragged lengths are padded with absent entries to the longest of each level; log-probs at or
        below -1000, None and negative ids are absent. An id that is listed twice counts once, with
        its larger log-prob. Of more than ``k`` entries (vLLM lists the sampled token besides the K
        best) the k largest are kept; ``k=None`` keeps all, and is the longest position. NaN stays,
        ahead of all others. An empty list is no position at all.

        Returns ids int32 (..., k) in order (log-prob descending, id ascending), logits float32, and
        logsumexp 0 where a position has entries (log-probs are normalised) and NaN where not.

        Errors: ``TypeError`` for an element that is none of these, for ids that are not integers,
        log-probs that are not real numbers, and a k that is not an int; ``ValueError`` for k < 1,
        for ``ids`` and ``logprobs`` of different shapes, for ids beyond int32. The message names
        the place in the payload.

        Example::

            teacher = TopK.from_logprobs(response.prompt_logprobs, k=32)
        """
        if k is not None:
            check_int(k, "k")
            if k < 1:
                raise ValueError(f"k is {k}, allowed is 1 or more")
        if logprobs is None:
            raise TypeError(
                "logprobs is None, expected a server's payload; did the request ask for it? "
                "(vLLM: prompt_logprobs=32)"
            )
        if ids is None:
            entries = _payload.from_positions(logprobs)
        else:
            entries = _payload.from_arrays(ids, logprobs)
        best_ids, best = _canonical(*entries, k)
        logsumexp = best.new_zeros(best.shape[:-1]).masked_fill(best_ids[..., 0] < 0, torch.nan)
        topk = TopK(best_ids.to(torch.int32), best, logsumexp)
        return topk if device is None else topk.to(device)

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

    def _map(self, fn: Callable[[Tensor], Tensor]) -> TopK:
        logsumexp = None if self.logsumexp is None else fn(self.logsumexp)
        return TopK(fn(self.ids), fn(self.logits), logsumexp)


def _check_tensor(tensor: object, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"TopK {name} is a {type(tensor).__name__}, expected a tensor; lists go to "
            "TopK.from_logprobs"
        )
    check_local(tensor, f"TopK {name}")
    check_dense(tensor, f"TopK {name}")


def repeats(ids: Tensor) -> Tensor:
    """True at every later occurrence of an id in its row."""
    ordered, order = torch.sort(ids, dim=-1, stable=True)
    repeat = torch.zeros_like(ordered, dtype=torch.bool)
    repeat[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return torch.empty_like(repeat).scatter_(-1, order, repeat)


def _canonical(
    id_array: np.ndarray, value_array: np.ndarray, k: int | None
) -> tuple[Tensor, Tensor]:
    """Entries in order (value descending, id ascending), each id once, k of them."""
    if id_array.shape == (0,):  # an empty list: no positions, not one position without entries
        id_array, value_array = id_array[:, None], value_array[:, None]
    ids, values = torch.from_numpy(id_array), torch.from_numpy(value_array)
    ids, values = _without((ids < 0) | (values <= SENTINEL), ids, values)
    ids, order = torch.sort(ids, dim=-1)
    ids, values = _by_value(ids, values.gather(-1, order))
    ids, values = _by_value(*_without(repeats(ids), ids, values))
    present = ids >= 0
    if k is None:
        k = max(1, int(present.sum(-1).max())) if present.numel() else 1
    # Negative padding cuts.
    pad = (0, k - ids.shape[-1])
    ids = torch.nn.functional.pad(ids, pad, value=-1)
    return ids, torch.nn.functional.pad(values, pad, value=-torch.inf)


def _without(absent: Tensor, ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return ids.masked_fill(absent, -1), values.masked_fill(absent, -torch.inf)


def _by_value(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    values, order = torch.sort(values, dim=-1, descending=True, stable=True)
    return ids.gather(-1, order), values


def _index_rows(index: Any, row_dims: int) -> tuple[Any, ...]:
    """The index with an ellipsis that leaves whatever follows the rows alone."""
    parts = index if isinstance(index, tuple) else (index,)
    parts = tuple(torch.from_numpy(p) if isinstance(p, np.ndarray) else p for p in parts)
    free = row_dims - sum(_dims_used(part) for part in parts)
    if free < 0:
        raise IndexError(
            f"TopK has {row_dims} leading dimensions, but {row_dims - free} were indexed"
        )
    at = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    return (*parts[:at], *[slice(None)] * free, *parts[at + 1 :])


def _dims_used(part: Any) -> int:
    """How many dimensions one part of an index takes up."""
    if isinstance(part, Tensor) and part.dtype == torch.bool:
        return part.ndim
    return 0 if part is None or part is Ellipsis or isinstance(part, bool) else 1


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _flatten(topk: TopK) -> tuple[list[Tensor], None]:
    # Without a logsumexp there is no leaf for it: what is mapped over the leaves sees tensors only.
    leaves = [topk.ids, topk.logits]
    return leaves if topk.logsumexp is None else [*leaves, topk.logsumexp], None


def _unflatten(leaves: Iterable[Any], _: None) -> TopK:
    # Not through __init__: tree_map may put anything at the leaves, shapes or specs for instance.
    topk = object.__new__(TopK)
    for field, leaf in zip_longest(fields(TopK), leaves):
        object.__setattr__(topk, field.name, leaf)
    return topk


torch.utils._pytree.register_pytree_node(
    TopK, _flatten, _unflatten, serialized_type_name="opd_kernels.TopK"
)
torch.serialization.add_safe_globals([TopK])
