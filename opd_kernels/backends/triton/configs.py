"""Tile sizes, in one place: what a kernel is compiled for, given k and a row.

A row is cut into groups. Small groups mean more group maxima to search, large ones more elements to
read a second time (k groups of them). The table keeps the second read near 3 % of a row of 150 000
for k up to 64 and 10 % at 1024; warps are added until a thread holds 32 elements or maxima (64
beyond 262144 ids at k above 512).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

K_MAX = 1024
# (largest k, elements of a group).
_GROUPS = ((64, 64), (256, 32), (K_MAX, 16))
_PER_THREAD = 32
_THREADS = 32  # of a warp; AMD's 64 halve the keys that a thread holds
_MAX_WARPS = 32
# Clans grow until k clans hold as many groups as there are clans, or there are this few clans.
_CLANS = 512
# Group numbers are counted in 16 bits.
_MAX_GROUPS = 32768
_WALKING_K = 64
# Elements of a group whose exponentials have a sum of their own, whatever k is. All these sums are
# added up by TAIL_LANES lanes, so that their order does not depend on the number of warps.
TAIL_GROUP = 64
TAIL_LANES = 512
# The streaming loop: bytes that a warp loads at once, four times 16 a thread, and Triton's pipeline
# stages, of which all but one are loads in flight.
_WARP_BYTES = 2048
STAGES = 3
# Warps of a program whose work does not grow with k.
WARPS = 4
# Tails: least warps of a program, and warps that are at work on a multiprocessor. A program keeps
# sums of groups for the row it is at. Two programs of 8 warps of 128 registers fill a
# multiprocessor, and their sums are 4 MB at 151936 ids on an H100; four of 4 warps would keep 8 MB.
TAIL_WARPS = 8
_TAIL_RESIDENT_WARPS = 16
# The gradient: bytes of a row that one program clears.
PIECE_BYTES = 65536
# Hidden states and a head: entries of a row that a program multiplies at once, the least entries of
# a chunk that has a sum of its own, and the bytes that the chunks' sums may take.
_ENTRIES = 16
CHUNK = 128
_CHUNK_SUMS_BYTES = 32 << 20
# Gathered rows, of as many columns as the tile leaves, that a program adds up at once: for the
# hidden states' gradient and for the weight's, and the warps of a program of the latter.
HIDDEN_GRAD_ROWS = 2
WEIGHT_GRAD_ROWS = 2
WEIGHT_GRAD_WARPS = 4
# Whether the head's logits are computed in the order of sorted ids. Off: by the model in
# benchmarks/NOTES.md it saves time for random ids only, and costs time where rows share ids.
SORTED_DOTS = False
# In that order: sorted entries of a program, bytes of hidden states that the cache is to hold, and
# entries that other kernels than the products' take at once. Places are counted in 32 bits.
_RUN = 32
_CACHED_BYTES = 16 << 20
FLAT = 1024
MAX_SORTED = 1 << 30
# A row is split over programs where there are fewer than this many rows for a multiprocessor.
SPLIT_BELOW_ROWS = 2
PROGRAMS_WHEN_SPLIT = 8


@dataclass(frozen=True)
class Selection:
    """What the selection of one row is compiled for: sizes in elements, all powers of two."""

    k_pad: int
    group: int
    groups_pad: int
    clan: int
    tile: int
    warps: int


@functools.lru_cache(256)
def selection(k: int, width: int, itemsize: int, aligned: bool) -> Selection:
    """The configuration for the k best of ``width`` elements of ``itemsize`` bytes.

    ``aligned`` says that every row starts on a multiple of 16 bytes; where one does not, its first
    group begins before it and there may be one group more.
    """
    group = next(group for largest, group in _GROUPS if k <= largest)
    shift = 0 if aligned else 16 // itemsize - 1
    while -(-(width + shift) // group) > _MAX_GROUPS:
        group *= 2
    groups_pad = max(16, next_power_of_2(-(-(width + shift) // group)))
    clan = 1
    while groups_pad // clan > max(k_pad(k) * clan, _CLANS):
        clan *= 2
    keys = max(groups_pad, min(k_pad(k), groups_pad) * group)
    # As many threads hold entries as in a program without a selection, which then adds them up in
    # the same order: the fused operator has the bits of its steps.
    least = entry_warps(k)
    most = _MAX_WARPS if k_pad(k) <= _THREADS * least else least
    warps = min(max(keys // (_PER_THREAD * _THREADS), least), most)
    return Selection(k_pad(k), group, groups_pad, clan, tile(itemsize, warps), warps)


def tile(itemsize: int, warps: int = WARPS) -> int:
    """Elements of a row that a program loads or stores at once."""
    return warps * _WARP_BYTES // itemsize


def registers(warps: int) -> int:
    """Registers of a thread on NVIDIA: few enough for five programs of 4 warps a multiprocessor.

    Without this number the assembler spills one or two, for more programs than are needed.
    """
    return 96 if warps <= 4 else 128 if warps <= 16 else 64


def pieces(rows: int, tiles: int, multiprocessors: int) -> int:
    """How many programs stream one row; 1 is the fused kernel."""
    if rows >= SPLIT_BELOW_ROWS * multiprocessors:
        return 1
    return max(1, min(tiles, PROGRAMS_WHEN_SPLIT * multiprocessors // max(rows, 1)))


def k_pad(k: int) -> int:
    """Entries that a program holds for k."""
    return max(16, next_power_of_2(k))


def entry_warps(k: int) -> int:
    """Warps of a program that holds k entries and no more: an entry a thread, up to 16 warps."""
    return max(WARPS, min(k_pad(k), 512) // _THREADS)


def entries(k: int) -> tuple[int, int]:
    """(entries of a program, how many of them it compares at once with all: 8 a thread)."""
    return k_pad(k), 8 * _THREADS * entry_warps(k) // k_pad(k)


def tail_warps(k: int) -> int:
    """Warps of a program that leaves k given entries out of a row: up to 4 entries a thread."""
    return max(TAIL_WARPS, k_pad(k) // (4 * _THREADS))


def walks(k: int) -> bool:
    """Whether a program that selects k and sums a tail takes one row after another.

    Above, the loop over rows spills registers: such a program has one row, and memory for it.
    """
    return k <= _WALKING_K


def tail_selection(k: int, width: int, itemsize: int, aligned: bool) -> Selection:
    """``selection``, for a program that also sums a tail."""
    config = selection(k, width, itemsize, aligned)
    if not walks(k):
        return config
    warps = max(config.warps, TAIL_WARPS)
    return dataclasses.replace(config, warps=warps, tile=tile(itemsize, warps))


def tail_programs(rows: int, warps: int, multiprocessors: int) -> int:
    """Programs that walk rows which nobody has streamed: as few as leave none more rows."""
    at_once = multiprocessors * max(1, _TAIL_RESIDENT_WARPS // warps)
    return -(-rows // -(-rows // at_once))


def left_out(k: int, warps: int) -> tuple[int, int]:
    """(entries of a program, groups that it sums at once: 16 elements a thread).

    Twice as many spill a few registers with the entropy.
    """
    return k_pad(k), min(2 * k_pad(k), 16 * _THREADS * warps // TAIL_GROUP)


def gathered(k: int) -> tuple[int, int]:
    """(rows, entries of a row) of a program that loads one value for each entry: 8 a thread."""
    return max(1, 8 * _THREADS * WARPS // k_pad(k)), k_pad(k)


def dots(k: int, width: int, itemsize: int) -> tuple[int, int]:
    """(entries, columns) of a tile of gathered rows, each of which is multiplied by one vector."""
    entries = min(_ENTRIES, next_power_of_2(k))
    return entries, min(next_power_of_2(width), tile(itemsize) // entries)


def sorted_dots(rows: int, width: int, itemsize: int) -> tuple[int, int]:
    """(entries, columns) of a program that multiplies sorted entries, each by one warp.

    Columns are as many as a warp loads at once. They are fewer, down to 16 bytes a thread, where
    those of all ``rows`` hidden states would not stay in the cache.
    """
    columns = min(tile(itemsize, 1), _CACHED_BYTES // (next_power_of_2(rows) * itemsize))
    return _RUN, min(next_power_of_2(width), max(columns, _THREADS * 16 // itemsize))


def row_sums(width: int, itemsize: int, least_rows: int, warps: int = WARPS) -> tuple[int, int]:
    """(rows, columns) of a tile of ``least_rows`` or more gathered rows that are added up."""
    columns = min(next_power_of_2(width), tile(itemsize, warps) // least_rows)
    return min(_ENTRIES, tile(itemsize, warps) // columns), columns


def chunk(entries: int, width: int) -> int:
    """Sorted entries of a chunk: more where the sums of so many chunks would not fit."""
    return max(CHUNK, next_power_of_2(-(-entries * width * 4 // _CHUNK_SUMS_BYTES)))


def keys_stride(width: int, group: int) -> int:
    """Keys from one row's group maxima to the next's: a multiple of 16, as kernels assume."""
    return -(-(width + 7) // (16 * group)) * 16


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
