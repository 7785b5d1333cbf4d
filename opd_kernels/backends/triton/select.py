"""Selection: the k best of each row, exactly, in one read of it.

A row is cut into groups of ``GROUP`` elements that start on 16-byte boundaries. One pass over the
row leaves each group's largest key; the k best elements all lie in the k best groups (ties go to
the lower group); those are read again and the k best of them selected. Nothing depends on the
values but the number of steps of two binary searches, so all rows cost about the same.

Bytes of a row: V elements, k groups a second time, V / GROUP keys written and read (they stay in
L2). Where there are few rows, ``group_maxima_kernel`` streams a row in pieces, and the kernels here
and in ``divergence`` begin at its result.
"""

import triton
import triton.language as tl

from opd_kernels.backends.triton.rows import align_row, is_banned, order_key, row_start


@triton.jit
def stream_maxima(row_ptr, keys_ptr, width, first, stop,
                  GROUP: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """The largest key of each group of elements [first, stop) of the row, its ends not masked.

    The loop holds raw values: their NaN-propagating maximum compiles to packed instructions, and
    only one value in a chunk of 16 bytes is turned into a key.
    """
    DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    CHUNK: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    KEY: tl.constexpr = keys_ptr.dtype.element_ty
    start_ptr, skip = align_row(row_ptr)
    chunks = tl.cdiv(skip + width, CHUNK)
    groups = tl.cdiv(skip + width, GROUP)
    for tile in tl.range(first, stop, TILE, num_stages=STAGES):
        at = tile + tl.arange(0, TILE)
        values = tl.load(start_ptr + at, mask=at // CHUNK < chunks, eviction_policy="evict_first")
        keys = order_key(_chunk_maxima(values.to(tl.float32), TILE, CHUNK).to(DTYPE))
        keys = tl.max(tl.reshape(keys, [TILE // GROUP, GROUP // CHUNK]), axis=1)
        group = tile // GROUP + tl.arange(0, TILE // GROUP)
        tl.store(keys_ptr + group, keys.to(KEY), mask=group < groups)


@triton.jit
def keys_row(keys_ptr, row, width, GROUP: tl.constexpr):
    """Where a row's group keys are; ``configs.keys_stride`` is their distance."""
    return keys_ptr + row * (tl.cdiv(width + 7, 16 * GROUP) * 16)


@triton.jit
def _chunk_maxima(values, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """Maxima of adjacent CHUNK elements, NaN if one is: halves against halves within a thread."""
    values = tl.reshape(values, [TILE // CHUNK, CHUNK])
    if CHUNK == 8:
        values = _halves_maximum(values, TILE // CHUNK, 8)
    values = _halves_maximum(values, TILE // CHUNK, 4)
    return tl.reshape(_halves_maximum(values, TILE // CHUNK, 2), [TILE // CHUNK])


@triton.jit
def _halves_maximum(values, ROWS: tl.constexpr, SIZE: tl.constexpr):
    pairs = tl.permute(tl.reshape(values, [ROWS, 2, SIZE // 2]), (0, 2, 1))
    low, high = tl.split(pairs)
    return tl.maximum(low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def select_row(row_ptr, keys_ptr, banned_ptr, ids_ptr, values_ptr, width, k,
               GROUP: tl.constexpr, GROUPS_PAD: tl.constexpr, K_PAD: tl.constexpr):  # fmt: skip
    """(ids, values) [K_PAD] of the k best, in order, from the group keys that streaming left.

    ``ids_ptr`` and ``values_ptr`` are the row's k outputs; they hold the steps between as well, and
    nothing of use afterwards. Every barrier stands between the program's stores and its loads of
    the same memory.
    """
    LISTED: tl.constexpr = min(K_PAD, GROUPS_PAD)
    start_ptr, skip = align_row(row_ptr)
    groups = tl.cdiv(skip + width, GROUP)
    list_ptr = values_ptr.to(tl.pointer_type(tl.int32))

    tl.debug_barrier()
    _mask_groups(start_ptr, keys_ptr, banned_ptr, skip, width, groups, GROUP, GROUPS_PAD)
    tl.debug_barrier()

    group = tl.arange(0, GROUPS_PAD)
    UNSELECTABLE: tl.constexpr = -(1 << (keys_ptr.dtype.element_ty.primitive_bitwidth - 1))
    keys = tl.load(keys_ptr + group, mask=group < groups, other=UNSELECTABLE).to(tl.int32)
    best, place, listed = _best(keys, k, GROUPS_PAD, LISTED, UNSELECTABLE)
    tl.store(list_ptr + place, group, mask=best)
    tl.debug_barrier()

    slot = tl.arange(0, LISTED)
    group = tl.load(list_ptr + slot, mask=slot < listed, other=0)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [LISTED, GROUP]
    values, keys = _masked_keys(
        start_ptr, banned_ptr, at, skip, width, (slot < listed)[:, None], UNSELECTABLE
    )
    SIZE: tl.constexpr = LISTED * GROUP
    best, place, found = _best(tl.reshape(keys, [SIZE]), k, SIZE, min(K_PAD, SIZE), UNSELECTABLE)
    tl.debug_barrier()
    tl.store(ids_ptr + place, tl.reshape(at, [SIZE]) - skip, mask=best)
    tl.store(values_ptr + place, tl.reshape(values, [SIZE]).to(tl.float32), mask=best)
    tl.debug_barrier()
    ids, values = _in_order(ids_ptr, values_ptr, found, K_PAD)
    tl.debug_barrier()
    return ids, values


@triton.jit
def _mask_groups(start_ptr, keys_ptr, banned_ptr, skip, width, groups,
                 GROUP: tl.constexpr, GROUPS_PAD: tl.constexpr):  # fmt: skip
    """Takes what cannot be selected out of the maxima: new keys for the groups that hold any of it.

    Those are the groups at the row's ends and groups with banned ids: for a handful of banned ids a
    block or two, for ids banned everywhere the row a second time.
    """
    BLOCK: tl.constexpr = min(64, GROUPS_PAD)
    if banned_ptr is None:
        if skip + (skip + width) % GROUP != 0:
            ends = tl.arange(0, 2) * (groups - 1)
            _new_keys(start_ptr, keys_ptr, banned_ptr, ends, ends >= 0, skip, width, GROUP)
    else:
        group = tl.arange(0, GROUPS_PAD)
        dirty = _may_hold_unselectable(banned_ptr, group, skip, width, GROUP)
        block = tl.min(tl.where(dirty, group, GROUPS_PAD))
        while block < GROUPS_PAD:
            some = block + tl.arange(0, BLOCK)
            again = _may_hold_unselectable(banned_ptr, some, skip, width, GROUP)
            _new_keys(start_ptr, keys_ptr, banned_ptr, some, again, skip, width, GROUP)
            block = tl.min(tl.where(dirty & (group >= block + BLOCK), group, GROUPS_PAD))


@triton.jit
def _may_hold_unselectable(banned_ptr, group, skip, width, GROUP: tl.constexpr):
    """Groups at the row's ends, and those with a banned id within a group's length before them.

    A group begins up to 7 ids before a word of the bitmap, so that it looks at one word more.
    """
    BITS: tl.constexpr = min(GROUP, 64)
    WORDS: tl.constexpr = GROUP // BITS
    if BITS == 64:
        words_ptr = banned_ptr.to(tl.pointer_type(tl.uint64))
    elif BITS == 32:
        words_ptr = banned_ptr.to(tl.pointer_type(tl.uint32))
    else:
        words_ptr = banned_ptr.to(tl.pointer_type(tl.uint16))
    word = group[:, None] * WORDS - 1 + tl.arange(0, 2 * WORDS)[None, :]
    inside = (word >= 0) & (word * BITS < width) & (word < (group[:, None] + 1) * WORDS)
    banned = tl.load(words_ptr + word, mask=inside, other=0) != 0
    first = group * GROUP
    ends = (first < skip) | ((first < skip + width) & (first + GROUP > skip + width))
    return ends | (tl.max(banned.to(tl.int32), axis=1) > 0)


@triton.jit
def _new_keys(start_ptr, keys_ptr, banned_ptr, group, mask, skip, width, GROUP: tl.constexpr):
    UNSELECTABLE: tl.constexpr = -(1 << (keys_ptr.dtype.element_ty.primitive_bitwidth - 1))
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    _, keys = _masked_keys(start_ptr, banned_ptr, at, skip, width, mask[:, None], UNSELECTABLE)
    best = tl.max(keys, axis=1).to(keys_ptr.dtype.element_ty)
    tl.store(keys_ptr + group, best, mask=mask)


@triton.jit
def _masked_keys(start_ptr, banned_ptr, at, skip, width, mask, UNSELECTABLE: tl.constexpr):
    """(values, keys) of elements counted from the row's aligned start."""
    CHUNK: tl.constexpr = 128 // start_ptr.dtype.element_ty.primitive_bitwidth
    values = tl.load(start_ptr + at, mask=mask & (at // CHUNK < tl.cdiv(skip + width, CHUNK)))
    selectable = mask & (at >= skip) & (at < skip + width)
    if banned_ptr is not None:
        selectable = selectable & ~is_banned(banned_ptr, at - skip, selectable)
    return values, tl.where(selectable, order_key(values), UNSELECTABLE)


@triton.jit
def _best(keys, k, SIZE: tl.constexpr, COLUMNS: tl.constexpr, UNSELECTABLE: tl.constexpr):
    """Which of the keys [SIZE] are the k best, lower index first among equals.

    Returns (mask, place of each of them in order of index, how many there are: k or fewer).
    COLUMNS is at least k or all there are; each column's largest is one of COLUMNS keys, so that
    the smallest of them is at most the key sought: a start that saves most steps of the search.
    """
    columns = tl.max(tl.reshape(keys, [SIZE // COLUMNS, COLUMNS]), axis=0)
    low = tl.maximum(tl.min(columns), UNSELECTABLE + 1)
    high = tl.max(columns)
    while low < high:  # the largest key that k keys reach lies in [low, high]
        middle = (low | high) - ((low ^ high) >> 1)
        reach = tl.sum((keys >= middle).to(tl.int32))
        low = tl.where(reach >= k, middle, low)
        high = tl.where(reach > k, high, tl.where(reach == k, middle, middle - 1))
    above = (keys > low).to(tl.int32)
    equal = (keys == low).to(tl.int32)
    wanted = k - tl.sum(above)
    # Both counts in one scan: fewer than k are above, up to SIZE equal.
    before = tl.cumsum((above << 16) + equal) - ((above << 16) + equal)
    equal_before = tl.minimum(before & 0xFFFF, wanted)
    best = (above > 0) | ((equal > 0) & (equal_before < wanted))
    return best, (before >> 16) + equal_before, tl.sum(best.to(tl.int32))


@triton.jit
def _in_order(ids_ptr, values_ptr, found, K_PAD: tl.constexpr):
    """The entries found, which lie in order of id, by value descending and then id; then -1, -inf."""
    place = tl.arange(0, K_PAD)
    valid = place < found
    keys = order_key(tl.load(values_ptr + place, mask=valid, other=0.0))
    keys = tl.where(valid, keys, -(1 << 31)).to(tl.int64)
    ranked = tl.sort((keys << 32) | (K_PAD - 1 - place), descending=True)
    place = K_PAD - 1 - (ranked & (K_PAD - 1)).to(tl.int32)
    ids = tl.load(ids_ptr + place, mask=valid, other=-1)
    return ids, tl.load(values_ptr + place, mask=valid, other=-float("inf"))


@triton.jit(do_not_specialize=["width", "inner", "outer_stride", "inner_stride"])
def group_maxima_kernel(
    logits_ptr, mask_ptr, keys_ptr,
    width: tl.int32, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64,
    GROUP: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Group keys of each row; a program per row and piece of it."""
    row = tl.program_id(0).to(tl.int64)
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            return
    row_ptr = logits_ptr + row_start(row, inner, outer_stride, inner_stride)
    tiles = tl.cdiv(width + 128 // logits_ptr.dtype.element_ty.primitive_bitwidth - 1, TILE)
    piece = tl.cdiv(tiles, tl.num_programs(1)) * TILE
    first = tl.program_id(1) * piece
    stop = tl.minimum(first + piece, tiles * TILE)
    stream_maxima(row_ptr, keys_row(keys_ptr, row, width, GROUP), width, first, stop, GROUP, TILE, STAGES)


@triton.jit(
    do_not_specialize=["width", "k", "inner", "outer_stride", "inner_stride"]
)
def select_kernel(
    logits_ptr, banned_ptr, mask_ptr, keys_ptr, ids_ptr, values_ptr,
    width: tl.int32, k: tl.int32, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64,
    STREAMED: tl.constexpr, GROUP: tl.constexpr, GROUPS_PAD: tl.constexpr, K_PAD: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(ids, values) of the k best of each row; a program per row."""
    row = tl.program_id(0).to(tl.int64)
    ids_ptr += row * k
    values_ptr += row * k
    entry = tl.arange(0, K_PAD)
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            tl.store(ids_ptr + entry, tl.full([K_PAD], -1, tl.int32), mask=entry < k)
            nothing = tl.full([K_PAD], -float("inf"), tl.float32)
            tl.store(values_ptr + entry, nothing, mask=entry < k)
            return
    row_ptr = logits_ptr + row_start(row, inner, outer_stride, inner_stride)
    keys_ptr = keys_row(keys_ptr, row, width, GROUP)
    if not STREAMED:
        stop = width + 128 // logits_ptr.dtype.element_ty.primitive_bitwidth - 1
        stream_maxima(row_ptr, keys_ptr, width, 0, stop, GROUP, TILE, STAGES)
    ids, values = select_row(
        row_ptr, keys_ptr, banned_ptr, ids_ptr, values_ptr, width, k, GROUP, GROUPS_PAD, K_PAD
    )
    tl.store(ids_ptr + entry, ids, mask=entry < k)
    tl.store(values_ptr + entry, values, mask=entry < k)
