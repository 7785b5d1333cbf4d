"""Reading inference servers' top-K log-probs: nested, ragged, with sentinels and extra entries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Servers and trainers write "no entry" as -1e3, -1e4, -9999 or -inf; no log-prob of a token that a
# model lists among its best is near that.
SENTINEL = -1e3


def from_positions(payload: Any) -> tuple[Tensor, Tensor]:
    """(ids, log-probs) of nested lists whose elements are positions: None, mapping or pairs."""
    rows: list[tuple[tuple[int, ...], list[tuple[int, float]]]] = []
    _collect(payload, (), rows)
    depth = max((len(at) for at, _ in rows), default=1)
    if any(len(at) != depth for at, entries in rows if entries):
        raise TypeError("positions lie at different depths of the payload; expected one nesting")
    shape = [0] * depth
    width = 1
    for at, entries in rows:
        width = max(width, len(entries))
        shape[: len(at)] = [max(size, i + 1) for size, i in zip(shape, at, strict=False)]
    ids = np.full((*shape, width), -1, dtype=np.int64)
    values = np.full((*shape, width), -np.inf, dtype=np.float32)
    for at, entries in rows:
        if entries:
            ids[at][: len(entries)] = [token for token, _ in entries]
            values[at][: len(entries)] = [value for _, value in entries]
    return torch.from_numpy(ids), torch.from_numpy(values)


def from_arrays(ids: Any, logprobs: Any) -> tuple[Tensor, Tensor]:
    """(ids, log-probs) of two arrays, tensors or nested (ragged) lists of one shape."""
    id_array, id_shape = _dense(ids, np.int64, -1)
    value_array, value_shape = _dense(logprobs, np.float32, -np.inf)
    if id_shape != value_shape:
        raise ValueError(
            f"ids and logprobs differ in shape ({id_array.shape} and {value_array.shape}, or in "
            "the lengths of their inner lists); expected one log-prob per id"
        )
    return torch.from_numpy(id_array), torch.from_numpy(value_array)


def canonical(ids: Tensor, values: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """Entries in order (value descending, id ascending), each id once, k of them."""
    if bool((ids > torch.iinfo(torch.int32).max).any()):
        raise ValueError(f"token id {int(ids.max())} is beyond int32; is this a token id?")
    absent = (ids < 0) | (values <= SENTINEL)
    ids = ids.masked_fill(absent, -1)
    values = values.masked_fill(absent, -torch.inf)
    # By id, the larger value first among equal ids; every later one of a run is a repeat.
    ids, values = _sort_by(values, ids, values, descending=True)
    ids, values = _sort_by(ids, ids, values)
    repeat = torch.zeros_like(ids, dtype=torch.bool)
    repeat[..., 1:] = ids[..., 1:] == ids[..., :-1]
    ids = ids.masked_fill(repeat, -1)
    values = values.masked_fill(repeat, -torch.inf)
    # Absent ids behind everything, then values; both sorts are stable, ids stay ascending.
    ids, values = _sort_by((ids < 0).int(), ids, values)
    ids, values = _sort_by(values, ids, values, descending=True)
    if k is None:
        k = max(int((ids >= 0).sum(-1).max()) if ids.numel() else 1, 1)
    missing = k - ids.shape[-1]
    if missing > 0:
        ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    return ids[..., :k].contiguous(), values[..., :k].contiguous()


def _sort_by(
    key: Tensor, ids: Tensor, values: Tensor, descending: bool = False
) -> tuple[Tensor, Tensor]:
    order = torch.sort(key, dim=-1, descending=descending, stable=True).indices
    return ids.gather(-1, order), values.gather(-1, order)


def _collect(
    node: Any, at: tuple[int, ...], rows: list[tuple[tuple[int, ...], list[tuple[int, float]]]]
) -> None:
    """Appends (index, entries) of every position below a node."""
    if node is None:
        rows.append((at, []))
    elif isinstance(node, Mapping):
        rows.append((at, [(_token_id(key), _logprob(value)) for key, value in node.items()]))
    elif _is_sequence(node) and node and all(_is_pair(item) for item in node):
        rows.append((at, [(_token_id(item[1]), _number(item[0])) for item in node]))
    elif _is_sequence(node):
        for i, child in enumerate(node):
            _collect(child, (*at, i), rows)
    else:
        raise TypeError(
            f"a position of the payload is a {type(node).__name__}, expected None, a mapping from "
            "token id to log-prob, or a list of (logprob, id, ...); pass parallel arrays as "
            "from_logprobs(logprobs, ids)"
        )


def _is_sequence(node: Any) -> bool:
    return isinstance(node, (list, tuple)) or (
        isinstance(node, np.ndarray) and node.dtype == object
    )


def _is_pair(item: Any) -> bool:
    """(logprob, id, ...): a number or None, then an id."""
    return (
        isinstance(item, (list, tuple))
        and len(item) >= 2
        and (item[0] is None or isinstance(item[0], (int, float, np.number)))
        and isinstance(item[1], (int, np.integer, str))
    )


def _token_id(key: Any) -> int:
    if isinstance(key, str):
        text = key.removeprefix("token_id:")
        try:
            return int(text)
        except ValueError:
            raise TypeError(
                f"the payload names a token {key!r}, expected its id; ask the server for token ids "
                "(vLLM: return_tokens_as_token_ids)"
            ) from None
    return int(key)


def _logprob(value: Any) -> float:
    """A number, an object with .logprob, or a mapping with "logprob"."""
    if isinstance(value, Mapping):
        value = value.get("logprob")
    return _number(getattr(value, "logprob", value))


def _number(value: Any) -> float:
    return -np.inf if value is None else float(value)


def _dense(nested: Any, dtype: Any, fill: float) -> tuple[np.ndarray, Any]:
    """A rectangular array of a nested list, padded with ``fill``, and the lengths it had."""
    if isinstance(nested, Tensor):
        nested = (
            nested.detach().cpu().float().numpy()
            if nested.is_floating_point()
            else nested.cpu().numpy()
        )
    if isinstance(nested, np.ndarray) and nested.dtype != object:
        if nested.ndim == 0:
            raise TypeError("ids and logprobs are scalars, expected (..., K)")
        return nested.astype(dtype), nested.shape
    leaves: list[tuple[tuple[int, ...], Any]] = []
    lengths: list[tuple[tuple[int, ...], int]] = []
    _walk(nested, (), leaves, lengths)
    depth = max((len(at) for at, _ in leaves), default=1)
    shape = [0] * depth
    for at, _ in leaves:
        shape[: len(at)] = [max(size, i + 1) for size, i in zip(shape, at, strict=False)]
    shape[-1] = max(shape[-1], 1)
    dense = np.full(shape, fill, dtype=dtype)
    for at, value in leaves:
        if value is not None:
            if len(at) != depth:
                raise TypeError("numbers lie at different depths; expected one nesting")
            dense[at] = value
    return dense, lengths


def _walk(
    node: Any,
    at: tuple[int, ...],
    leaves: list[tuple[tuple[int, ...], Any]],
    lengths: list[tuple[tuple[int, ...], int]],
) -> None:
    if isinstance(node, Tensor):
        node = node.tolist()
    if isinstance(node, (list, tuple, np.ndarray)):
        lengths.append((at, len(node)))
        _each(enumerate(node), at, leaves, lengths)
    elif node is None or isinstance(node, (int, float, np.number)):
        leaves.append((at, node))
    else:
        raise TypeError(f"expected numbers or nested lists of them, got a {type(node).__name__}")


def _each(
    children: Iterable[tuple[int, Any]], at: tuple[int, ...], leaves: Any, lengths: Any
) -> None:
    for i, child in children:
        _walk(child, (*at, i), leaves, lengths)
