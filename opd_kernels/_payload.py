"""Reading inference servers' top-K log-probs: nested, ragged, by id or as lists of entries."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import zip_longest
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

# ids int64 and log-probs float32, both (..., K); id -1 and -inf where there is no entry.
Entries: TypeAlias = "tuple[np.ndarray, np.ndarray]"

_MAX_ID = np.iinfo(np.int32).max
_MAX_DIGITS = len(str(_MAX_ID))
_PREFIX = "token_id:"
_NUMBER_TEXT = re.compile(
    r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?|nan|[+-]?inf(inity)?",
    re.ASCII | re.IGNORECASE,
)
# Servers' names of an entry's id, the most reliable first (TGI and llama.cpp; Dynamo; vLLM's chat
# completions).
_ID_NAMES = ("id", "token_id", "token")
_TOP = "top_logprobs"
_SHOWN = 80

# Advice on how to get ids in place of text.
ASK_FOR_IDS = (
    'ask the server for token ids (vLLM: "return_tokens_as_token_ids", SGLang: /generate, '
    "llama.cpp: /completion)"
)
# Advice where a position does not list the token that was sampled there.
_ASK_FOR_TOKEN = (
    "compare the positions: an entry may belong to the token after it. Else ask the server to list "
    "the sampled token besides the K best (vLLM's prompt_logprobs does; SGLang: append each "
    "position's input_token_logprobs to its input_top_logprobs), or give -100 where no token counts"
)


def from_positions(node: Any, where: str = "") -> Entries:
    """Entries of nested lists of positions; ``where`` is the node's path in the payload."""
    if _is_list(node):
        if not all(map(_is_entry, node)):
            return _stack([from_positions(child, f"{where}[{i}]") for i, child in enumerate(node)])
        if len(node) and not where:
            raise TypeError(
                "the payload is one flat list of entries: those of a position, or the tokens of a "
                "sequence (SGLang's input_token_logprobs; its K best are input_top_logprobs); pass "
                "a list of positions, [[(logprob, id), ...], ...]"
            )
    try:
        return _read(_in_list(node) if _is_list(node) else _in_position(node))
    except (TypeError, ValueError) as error:
        numbers = isinstance(node, (int, float, Tensor, np.ndarray, np.generic))
        advice = "; pass parallel arrays as from_logprobs(logprobs, ids)" if numbers else ""
        raise type(error)(f"{error}{advice}{_place(where)}") from None


def read_position(node: Any, ask_for_ids: str = ASK_FOR_IDS) -> Entries:
    """The entries (K,) of one position.

    It is None, a mapping from id to log-prob, a list of entries, or an entry that lists the others
    of its position. ``ask_for_ids`` is the advice for tokens that are given as text.
    """
    return _read(_in_position(node), ask_for_ids)


def _read(pairs: list[tuple[Any, Any]], ask_for_ids: str = ASK_FOR_IDS) -> Entries:
    tokens = [token_id(token, ask_for_ids) for _, token in pairs]
    return _row(tokens, [_number(value) for value, _ in pairs])


def _in_position(node: Any) -> list[tuple[Any, Any]]:
    """(log-prob, id) of each entry of a position, as they are written."""
    if node is None:
        return []
    if not isinstance(node, Mapping):
        if _is_list(node) and all(map(_is_entry, node)):
            return _in_list(node)
    elif not _is_named(node):
        return [(value, token) for token, value in node.items()]
    elif _TOP not in node:
        raise TypeError(
            f"the payload has the entry {shown(node)} where a position is expected; pass the K "
            "best of each position, as a list of entries"
        )
    else:
        others = node[_TOP] or ()
        if _is_list(others) and all(map(_is_entry, others)):
            # The entry itself belongs to the position, as the sampled token does in vLLM's.
            return [_pair(item) for item in (node, *others)]
    raise TypeError(
        f"a position of the payload is {shown(node)}, a {type(node).__name__}, expected None, a "
        "mapping from token id to log-prob, or a list of (logprob, id, ...) or of "
        '{"id": ..., "logprob": ...}'
    )


def _in_list(entries: Sequence[Any]) -> list[tuple[Any, Any]]:
    """(log-prob, id) of each entry of a list that is a position."""
    pairs = [_pair(item) for item in entries]
    if pairs and pairs[0][0] is None and any(value is not None for value, _ in pairs):
        raise TypeError(
            f"a position of the payload begins with {shown(entries[0])}, without a log-prob, as "
            "the tokens of a sequence do (SGLang: input_token_logprobs); pass the K best of each "
            "position (SGLang: input_top_logprobs)"
        )
    return pairs


def from_arrays(ids: Any, logprobs: Any, where: str = "") -> Entries:
    """Two arrays, tensors or nested (ragged) lists of one shape."""
    ids, logprobs = _plain(ids), _plain(logprobs)
    dense = isinstance(ids, np.ndarray) and isinstance(logprobs, np.ndarray)
    sizes = [x.shape if dense else len(x) for x in (ids, logprobs)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"ids and logprobs differ in {'shape' if dense else 'length'} ({sizes[0]} and "
            f"{sizes[1]}); expected one log-prob per id{_place(where)}"
        )
    nested = not dense and any(child is not None and _is_list(child) for child in (*ids, *logprobs))
    if nested:
        pairs = enumerate(zip(ids, logprobs, strict=True))
        return _stack([from_arrays(*pair, f"{where}[{i}]") for i, pair in pairs])
    try:
        if dense:
            return _id_array(ids), _value_array(logprobs)
        return _row([token_id(token) for token in ids], [_number(value) for value in logprobs])
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}{_place(where)}") from None


def token_logprobs(
    ids: np.ndarray, values: np.ndarray, token_ids: Any, sentinel: float
) -> np.ndarray:
    """The log-prob (...) that each position of (ids, values) lists for its own token id.

    NaN where the token id is negative, and where a position has no entry above the sentinel.
    """
    tokens, given = _from_tokens(token_ids)
    rows, token_rows = _rows_of(ids), _rows_of(tokens)
    if token_rows != rows:
        raise ValueError(
            f"token_ids have shape {token_rows}, the positions of the payload {rows}; expected one "
            "per position"
        )
    if 0 in rows:
        return np.empty(rows, dtype=np.float32)
    # Arrays even of a single position, which NumPy makes a scalar.
    token, given = np.array(tokens.max(-1, initial=-1)), np.array((given == 0).any(-1))
    listed = (ids == token[..., None]) & (token >= 0)[..., None]
    present = ((ids >= 0) & ~(values <= sentinel)).any(-1)
    wrong = present & ~listed.any(-1) & ((token >= 0) | ~given)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        where = "".join(f"[{i}]" for i in place)
        if not given[place]:
            raise ValueError(
                f"token_ids{where} is missing, but that position of the payload has entries; "
                "expected one per position, -100 where no token counts"
            )
        raise ValueError(
            f"token_ids{where} is {token[place]}, which payload{where} does not list; "
            f"{_ASK_FOR_TOKEN}"
        )
    found = np.where(listed, values, -np.inf).max(-1, initial=-np.inf)
    found = np.where(found <= sentinel, -np.inf, found)
    return np.where(present & (token >= 0), found, np.nan).astype(np.float32)


def _rows_of(entries: np.ndarray) -> tuple[int, ...]:
    """The leading shape of entries; an empty list has no positions, and so no entries of one."""
    return entries.shape[:-1] if entries.shape != (0,) else entries.shape


def _from_tokens(node: Any, where: str = "") -> Entries:
    """One token id per position as its only entry (..., 1), of log-prob 0."""
    if node is None:
        return _row([], [])
    try:
        if not _is_list(node):
            return _row([token_id(node)], [0.0])
        node = _plain(node)
        if isinstance(node, np.ndarray):
            if node.dtype.kind not in "iu":
                raise TypeError(f"token_ids have dtype {node.dtype}, expected integers")
            tokens = _id_array(node)[..., None]
            return tokens, np.zeros(tokens.shape, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} (token_ids{where})") from None
    children = [_from_tokens(child, f"{where}[{i}]") for i, child in enumerate(node)]
    return _stack(children, "token_ids")


@np.errstate(over="ignore")  # a sentinel may be the least float64: -inf in float32, so absent
def _row(tokens: list[int], logprobs: list[float]) -> Entries:
    """The entries (K,) of one position."""
    return np.array(tokens, dtype=np.int64), np.array(logprobs, dtype=np.float32)


def _stack(parts: list[Entries], name: str = "entries") -> Entries:
    """Stacks parts along a new dimension; short parts are filled up with absent entries.

    A part without entries may lack inner dimensions: None stands for a position or a sequence.
    """
    depth = max((ids.ndim for ids, _ in parts), default=0)
    if any(ids.size and ids.ndim != depth for ids, _ in parts):
        raise TypeError(f"{name} lie at different depths of the payload; expected one nesting")
    shape = [max(sizes) for sizes in zip_longest(*(ids.shape for ids, _ in parts), fillvalue=0)]
    ids = np.full((len(parts), *shape), -1, dtype=np.int64)
    values = np.full(ids.shape, -np.inf, dtype=np.float32)
    for index, (part_ids, part_values) in enumerate(parts):
        if part_ids.size:
            corner: Any = (index, *map(slice, part_ids.shape))
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


def _is_entry(item: Any) -> bool:
    """Whether an item is one entry: (logprob, id, ...) or {"id": ..., "logprob": ...}."""
    if not isinstance(item, (list, tuple)):
        return isinstance(item, Mapping) and _is_named(item) and _TOP not in item
    if len(item) < 2:
        return False
    value, token = item[0], item[1]
    named = isinstance(token, (int, np.integer, str))
    if value is None:
        return named
    return isinstance(value, (float, int, np.number, Decimal)) and (named or token is None)


def _is_named(node: Mapping[Any, Any]) -> bool:
    """Whether a mapping is an entry, or an entry that lists those of its position."""
    return "logprob" in node or any(isinstance(node.get(name), (int, str)) for name in _ID_NAMES)


def _pair(item: Any) -> tuple[Any, Any]:
    """(log-prob, id) as an entry has them."""
    if isinstance(item, (list, tuple)):
        return item[0], item[1]
    if "logprob" not in item:
        raise TypeError(f'the payload has the entry {shown(item)}, expected one with "logprob"')
    for name in _ID_NAMES:
        token = item.get(name)
        if token is not None:
            is_text = name == "token" and isinstance(token, str)
            return item["logprob"], _Text(token) if is_text else token
    raise TypeError(
        f"the payload has the entry {shown(item)}, expected one with {', '.join(_ID_NAMES)}"
    )


class _Text(str):
    """A token's text, even if it is digits; it is an id only if it begins with ``token_id:``."""

    __slots__ = ()


def _id_array(ids: np.ndarray) -> np.ndarray:
    if ids.dtype.kind not in "iu":
        raise TypeError(
            f"ids have dtype {ids.dtype}, expected integers; the order is "
            "from_logprobs(logprobs, ids)"
        )
    if ids.size:
        _check_id(int(ids.max()))
    return ids.astype(np.int64)


@np.errstate(over="ignore")
def _value_array(logprobs: np.ndarray) -> np.ndarray:
    if logprobs.dtype.kind not in "iuf":
        raise TypeError(f"logprobs have dtype {logprobs.dtype}, expected real numbers")
    return logprobs.astype(np.float32)


def token_id(token: Any, ask_for_ids: str = ASK_FOR_IDS) -> int:
    """The id in an integer or in text; -1 for negative numbers."""
    if type(token) is int:
        return _check_id(token)
    number = _id_in_text(token) if isinstance(token, str) else integer(token)
    if number is None:
        raise TypeError(f"the payload names a token {shown(token)}, expected its id; {ask_for_ids}")
    return _check_id(number)


def integer(value: Any) -> int | None:
    """The int in an integer of any kind; None for anything else, booleans included."""
    value = _scalar(value)
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _id_in_text(text: str) -> int | None:
    digits = text.removeprefix(_PREFIX)
    if not (digits.isascii() and digits.isdigit()):
        return None
    # A server writes an id in one way: "05" is a token's text, not the id 5.
    if (digits[0] == "0" and digits != "0") or (type(text) is _Text and digits == text):
        return None
    return int(digits) if len(digits) <= _MAX_DIGITS else _MAX_ID + 1


def _check_id(token: int) -> int:
    if token > _MAX_ID:
        raise ValueError(f"token id {shown(token)} is beyond int32; are these token ids?")
    return token if token >= 0 else -1


def _number(value: Any) -> float:
    """The log-prob of a number, an object with .logprob, a mapping with "logprob", or None."""
    if type(value) is dict or isinstance(value, Mapping):
        value = value.get("logprob", value)
    if type(value) is float:
        return value
    value = _scalar(getattr(value, "logprob", value))
    if value is None:
        return -np.inf
    text = isinstance(value, str)
    real = isinstance(value, (int, float, Decimal, np.floating)) and not isinstance(value, bool)
    if not (real or (text and _NUMBER_TEXT.fullmatch(value))):
        raise TypeError(
            f"the payload has {shown(value)} as a log-prob, expected a number, an object with "
            '.logprob or a mapping with "logprob"'
        )
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"the payload has {shown(value)} as a log-prob, beyond what a float holds"
        ) from None


def _scalar(value: Any) -> Any:
    """The Python number in a tensor, array or NumPy scalar of one element."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value
    if isinstance(value, (np.ndarray, np.generic)):
        return value.item() if value.size == 1 else value
    return value


def shown(value: Any) -> str:
    """A value as an error shows it."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        text = "a number too long to be shown"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _place(where: str) -> str:
    return f" (payload{where})" if where else ""
