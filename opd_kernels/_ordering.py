"""The entries of a support in order: (value descending, id ascending), each id once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

MAX_ID = 2**31 - 1
# Entries that are put in order at a time on the CPU.
PIECE = 1 << 16
_SIGN = np.int32(-(2**31))
# An absent entry as ``ordered`` sorts it: -inf and the id -1.
_ABSENT = (0x7F800000 << 32) | 0xFFFFFFFF


def repeats(ids: Tensor) -> Tensor:
    """True at every later occurrence of an id in its row."""
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        # Ids that int32 does not hold are absent, whichever they are.
        places = torch.arange(ids.shape[-1])
        entries = _sorted((ids.clamp(-MAX_ID, MAX_ID).long() << 32) | places)
        ordered, order = entries >> 32, entries & 0xFFFFFFFF
    else:
        ordered, order = torch.sort(ids, dim=-1, stable=True)
    repeat = torch.zeros_like(ordered, dtype=torch.bool)
    repeat[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return torch.empty_like(repeat).scatter(-1, order, repeat)


def first_places(ids: Tensor) -> Tensor:
    """For each id of a row the place where it occurs first, int32."""
    ordered, order = torch.sort(ids, dim=-1, stable=True)
    places = torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    begin = torch.where(begins, places, 0).cummax(-1).values
    first = order.gather(-1, begin)
    return torch.empty_like(first).scatter(-1, order, first).to(torch.int32)


def ordered(
    ids: Tensor, values: Tensor, valid: Tensor | None, sentinel: float, k: int
) -> tuple[Tensor, Tensor]:
    """The k first entries (..., k) in order (value descending, id ascending), each id once.

    Ids int32 and values float32; -1 and -inf where there is no entry. NaN comes first. Ids that
    int32 does not hold are absent, as those outside of any vocabulary are.

    An entry is one int64 of two halves, so that sorting moves no second array: the bits of the
    value, turned so that larger values come first, and the id. Sorted by (id, value) the first of
    each id is the one that stays; sorted by (value, id) they are in order.
    """
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        try:
            ids, values = _ordered_on_host(ids, values, valid, sentinel, k)
            return resized(ids, values, k)
        except RuntimeError:  # no memory of its own: under vmap, or a fake tensor
            pass
    absent = (values <= sentinel) | (ids < 0) | (ids > MAX_ID)
    if valid is not None:
        absent |= ~valid
    # Adding 0 turns -0 into 0.
    values = values.float() + 0.0
    values = values.masked_fill(values.isnan(), torch.nan).masked_fill(absent, -torch.inf)
    # Once more: what rounds to -inf is absent.
    ids = ids.long().masked_fill(values == -torch.inf, -1)
    falling = _falling(values).long()
    by_id = ((ids << 32) + (falling + 2**31)).sort(dim=-1).values
    ids, falling = by_id >> 32, (by_id & 0xFFFFFFFF) - 2**31
    repeat = torch.nn.functional.pad(ids[..., 1:] == ids[..., :-1], (1, 0))
    entries = ((falling << 32) | (ids & 0xFFFFFFFF)).masked_fill(repeat, _ABSENT)
    return resized(*_taken_apart(entries.sort(dim=-1).values[..., :k]), k)


def _falling(values: Tensor) -> Tensor:
    """int32 that rise as float32 values fall; of -0 as of the number it is."""
    bits = values.view(torch.int32)
    return torch.where(bits < 0, bits & 0x7FFFFFFF, ~bits)


def _taken_apart(entries: Tensor) -> tuple[Tensor, Tensor]:
    """(ids, values) of int64 whose upper halves are falling bits and whose lower ones are ids."""
    falling = (entries >> 32).int()
    values = torch.where(falling < 0, ~falling, falling | -(2**31)).view(torch.float32)
    return entries.int(), values


def in_order(ids: Tensor, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k first of entries (..., C) in order (value descending, id ascending), absent ones last.

    Every id is there once; absent entries have id -1 and value -inf. NaN comes first.
    """
    # Adding 0 turns -0 into 0; the sign of a NaN does not order it.
    values = (values + 0.0).masked_fill(values.isnan(), torch.nan)
    if values.dtype == torch.float32:  # which leaves room for the id; -1 is the largest, unsigned
        entries = (_falling(values).long() << 32) | (ids.long() & 0xFFFFFFFF)
        return _taken_apart(_sorted(entries)[..., :k])
    order = torch.where(ids < 0, MAX_ID, ids).sort(dim=-1, stable=True).indices
    ids, values = ids.gather(-1, order), values.gather(-1, order)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order[..., :k]), values[..., :k]


def _sorted(keys: Tensor) -> Tensor:
    """Rows of int64 in rising order. NumPy is ten times as fast as torch where it can be used."""
    # NumPy's strides of no rows are 0.
    if keys.device.type == "cpu" and not torch.compiler.is_compiling() and keys.numel():
        try:
            return torch.from_numpy(np.sort(keys.numpy(), -1))
        except RuntimeError:  # no memory of its own: under vmap, or a fake tensor
            pass
    return keys.sort(dim=-1).values


def _ordered_on_host(
    ids: Tensor, values: Tensor, valid: Tensor | None, sentinel: float, k: int
) -> tuple[Tensor, Tensor]:
    """``ordered`` in NumPy, which is faster on a CPU: it sorts entries alone, in the cache.

    As many threads as torch's share the rows; NumPy sorts without the interpreter's lock.
    """
    # The sentinel as the dtype rounds it; what is narrower than float32 is compared in float32.
    sentinel = float(torch.tensor(sentinel, dtype=values.dtype))
    width = max(ids.shape[-1], 1)
    if values.dtype == torch.bfloat16:  # which NumPy lacks
        values = values.view(torch.int16)
    kept = min(ids.shape[-1], k)
    best_ids = torch.empty(*ids.shape[:-1], kept, dtype=torch.int32)
    best = torch.empty(*ids.shape[:-1], kept, dtype=torch.float32)
    arrays = [tensor.view(-1, max(kept, 1)).numpy() for tensor in (best_ids, best)]
    given = (ids, values) if valid is None else (ids, values, valid)
    arrays += [tensor.reshape(-1, width).numpy() for tensor in given]
    count, step = len(arrays[-1]), max(PIECE // width, 1)
    threads = max(min(torch.get_num_threads(), -(-count // step)), 1)
    share = -(-count // threads)

    def order(first: int) -> None:
        """Pieces of a thread's rows that the cache holds."""
        seen, stop = False, min(first + share, count)
        for start in range(first, stop, step):
            piece = slice(start, min(start + step, stop))
            seen = _order_rows(*(array[piece] for array in arrays), sentinel=sentinel, seen=seen)

    if threads == 1:
        order(0)
    else:
        with ThreadPoolExecutor(threads - 1) as pool:
            others = pool.map(order, range(share, count, share))
            order(0)
            list(others)  # raises what a thread raised
    return best_ids, best


# A float64 beyond float32 is minus infinity, so absent; a signalling NaN is a NaN.
@np.errstate(over="ignore", invalid="ignore")
def _order_rows(
    out_ids: np.ndarray,
    out_values: np.ndarray,
    ids: np.ndarray,
    values: np.ndarray,
    valid: np.ndarray | None = None,
    *,
    sentinel: float,
    seen: bool,
) -> bool:
    """Writes the first entries of rows (N, K) in order, as ``ordered`` says.

    ``values`` are floats, or int16 that hold the bits of a bfloat16.

    An entry is a uint64 here, and an absent one has all bits set. Rows that list no id twice need
    one sort of entries, and one of ids to know it. ``seen`` says that rows before these had
    repeats: then it is not asked. Returns whether repeats were seen.
    """
    if values.dtype == np.int16:  # the upper half of a float32
        values = (values.astype(np.int32) << 16).view(np.float32)
    elif values.dtype == np.float16:
        values = values.astype(np.float32)
    absent = values <= values.dtype.type(sentinel)
    absent |= ids.view(np.uint64 if ids.dtype == np.int64 else np.uint32) > MAX_ID
    if valid is not None:
        absent |= ~valid
    # Subtracted from 0, so that rising bits are falling values; -0 becomes 0.
    negated = np.subtract(np.float32(0), values, dtype=np.float32, casting="same_kind")
    if values.dtype == np.float64:
        absent |= negated == np.inf
    bits = negated.view(np.int32)
    nan = negated != negated
    has_nan = bool(nan.any())
    if has_nan:
        bits[nan] = -1  # a NaN that comes before all numbers
    # Log-probs have none: bits of positive numbers are in their order.
    has_sign = bits.size > 0 and bool(bits.min() < 0)
    if has_sign:
        bits ^= bits >> 31 | _SIGN
    rising, numbers = bits.view(np.uint32), ids.astype(np.uint32)
    if absent.any():
        all_bits = np.negative(absent.view(np.int8)).astype(np.uint32)
        rising |= all_bits
        numbers |= all_bits
    seen = seen or bool(_marked_repeats(np.sort(numbers, -1)).any())
    if seen:
        entries = _joined_halves(numbers, rising)
        entries.sort(-1)
        upper = entries >> 32
        entries <<= 32
        entries |= upper  # the halves change places
        entries |= np.negative(_marked_repeats(upper).view(np.int8)).astype(np.uint64)
    else:
        entries = _joined_halves(rising, numbers)
    entries.sort(-1)
    entries = entries[:, : out_ids.shape[1]]
    np.copyto(out_ids, entries, casting="unsafe")  # the lower half
    rising = (entries >> 32).astype(np.uint32)
    # Of an absent entry it is that of minus infinity.
    infinity = 0x7F800000 | (0x80000000 if has_sign else 0)
    np.minimum(rising, np.uint32(infinity), out=rising)
    bits = rising.view(np.int32)
    if has_sign:
        bits ^= ~(bits >> 31) | _SIGN
    np.subtract(np.float32(0), bits.view(np.float32), out=out_values)
    if has_nan:
        out_values[out_values != out_values] = np.nan
    return seen


def _marked_repeats(numbers: np.ndarray) -> np.ndarray:
    """Flags (N, K) of ids, in order in each row, that are present and equal to the one before.

    All rows are compared as one, which is faster; the first of each row is no repeat.
    """
    flat = numbers.reshape(-1)
    flags = np.empty(flat.shape, dtype=bool)
    np.equal(flat[1:], flat[:-1], out=flags[1:])
    flags[:: numbers.shape[1]] = False
    flags &= flat <= MAX_ID
    return flags.reshape(numbers.shape)


def _joined_halves(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """uint64 of two uint32."""
    whole = high.astype(np.uint64)
    whole <<= 32
    whole |= low.astype(np.uint64)
    return whole


def resized(ids: Tensor, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k entries of each row, filled up with absent ones."""
    pad = (0, k - ids.shape[-1])  # negative padding cuts
    if pad[1] == 0:
        return ids, values
    ids = torch.nn.functional.pad(ids, pad, value=-1)
    return ids, torch.nn.functional.pad(values, pad, value=-torch.inf)
