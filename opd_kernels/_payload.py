"""Reading inference servers' top-K log-probs: nested, ragged, by id or as lists of pairs."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

# ids int64 and log-probs float32, both (..., K); id -1 and -inf where there is no entry.
Entries: TypeAlias = "tuple[np.ndarray, np.ndarray]"

_MAX_ID = np.iinfo(np.int32).max


def from_positions(node: Any) -> Entries:
    """Nested lists whose elements are positions: None, mappings or lists of pairs."""
    if node is None:
        return _row((), ())
    if isinstance(node, Mapping):
        return _row(node.keys(), node.values())
    if not _is_list(node):
        raise TypeError(
            f"a position of the payload is a {type(node).__name__}, expected None, a mapping from "
            "token id to log-prob, or a list of (logprob, id, ...); pass parallel arrays as "
            "from_logprobs(logprobs, ids)"
        )
    if all(_is_pair(item) for item in node):
        return _row([item[1] for item in node], [item[0] for item in node])
    return _stack([from_positions(child) for child in node])


def from_arrays(ids: Any, logprobs: Any) -> Entries:
    """Two arrays, tensors or nested (ragged) lists of one shape."""
    ids, logprobs = _plain(ids), _plain(logprobs)
    dense = isinstance(ids, np.ndarray) and isinstance(logprobs, np.ndarray)
    sizes = [x.shape if dense else len(x) for x in (ids, logprobs)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"ids and logprobs differ in {'shape' if dense else 'length'} ({sizes[0]} and "
            f"{sizes[1]}); expected one log-prob per id"
        )
    if dense:
        return _id_array(ids), logprobs.astype(np.float32)
    if any(child is not None and _is_list(child) for child in (*ids, *logprobs)):
        return _stack([from_arrays(*pair) for pair in zip(ids, logprobs, strict=True)])
    return _row(ids, logprobs)


def _row(tokens: Iterable[Any], logprobs: Iterable[Any]) -> Entries:
    """The entries (K,) of one position."""
    ids = np.array([_token_id(token) for token in tokens], dtype=np.int64)
    return ids, np.array([_number(value) for value in logprobs], dtype=np.float32)


def _stack(parts: list[Entries]) -> Entries:
    """One more dimension; short parts are filled up with absent entries.

    A part without entries may lack inner dimensions: None stands for a position or a sequence.
    """
    depth = max((ids.ndim for ids, _ in parts), default=0)
    if any(ids.size and ids.ndim != depth for ids, _ in parts):
        raise TypeError("entries lie at different depths of the payload; expected one nesting")
    shape = [max(sizes) for sizes in zip_longest(*(ids.shape for ids, _ in parts), fillvalue=0)]
    ids = np.full((len(parts), *shape), -1, dtype=np.int64)
    values = np.full(ids.shape, -np.inf, dtype=np.float32)
    for at, (part_ids, part_values) in enumerate(parts):
        if part_ids.size:
            corner: Any = (at, *map(slice, part_ids.shape))
            ids[corner], values[corner] = part_ids, part_values
    return ids, values


def _plain(node: Any) -> Any:
    """A numeric array as a NumPy array, everything else nested as a list."""
    if node is None:
        return []
    if isinstance(node, Tensor) and not node.is_nested:
        node = node.detach().cpu()
        node = node.float().numpy() if node.is_floating_point() else node.numpy()
    if isinstance(node, np.ndarray) and node.ndim and node.dtype != object:
        return node
    if not _is_list(node):
        raise TypeError(
            f"ids and logprobs hold a {type(node).__name__}, expected arrays, tensors or nested "
            "lists of numbers, (..., K)"
        )
    return list(node)


def _is_list(node: Any) -> bool:
    if isinstance(node, (Tensor, np.ndarray)):
        return node.ndim > 0
    return isinstance(node, Sequence) and not isinstance(node, (str, bytes))


def _is_pair(item: Any) -> bool:
    """(logprob, id, ...): a number or None, then an id."""
    return (
        isinstance(item, (list, tuple))
        and len(item) >= 2
        and (item[0] is None or isinstance(item[0], (int, float, np.number)))
        and isinstance(item[1], (int, np.integer, str))
    )


def _id_array(ids: np.ndarray) -> np.ndarray:
    if ids.dtype.kind not in "iu":
        raise TypeError(
            f"ids have dtype {ids.dtype}, expected integers; the order is "
            "from_logprobs(logprobs, ids)"
        )
    if ids.size:
        _check_id(int(ids.max()))
    return ids.astype(np.int64)


def _token_id(key: Any) -> int:
    try:
        token = int(key.removeprefix("token_id:")) if isinstance(key, str) else operator.index(key)
    except (TypeError, ValueError):
        raise TypeError(
            f"the payload names a token {key!r}, expected its id; ask the server for token ids "
            "(vLLM: return_tokens_as_token_ids)"
        ) from None
    return _check_id(token)


def _check_id(token: int) -> int:
    if token > _MAX_ID:
        raise ValueError(f"token id {token} is beyond int32; are these token ids?")
    return token


def _number(value: Any) -> float:
    """The log-prob of a number, an object with .logprob, a mapping with "logprob", or None."""
    if isinstance(value, Mapping):
        value = value.get("logprob", value)
    value = getattr(value, "logprob", value)
    try:
        return -np.inf if value is None else float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"the payload has {value!r} as a log-prob, expected a number, an object with .logprob "
            'or a mapping with "logprob"'
        ) from None
