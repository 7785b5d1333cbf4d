"""Selection: the k best of each row, exactly, in one read of it.

A row is cut into groups of ``GROUP`` elements that start on 16-byte boundaries. One pass over the
row leaves each group's largest key. The k best elements all lie in the k best groups (ties go to
the lower group). These groups are read again, and the k best of their elements are selected. Only
the number of steps of four binary searches depends on the values, so all rows cost about the same.

Bytes of a row: V elements, k groups a second time, V / GROUP keys written and read. If there are
few rows, ``group_maxima_kernel`` streams a row in pieces, and the kernels here and in
``divergence`` begin with its result.
"""

import triton
import triton.language as tl

from opd_kernels.backends.triton.rows import align_row, order_key, row_start


@triton.jit
def stream_maxima(row_ptr, keys_ptr, width, piece, pieces,
                  GROUP: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """The largest key of each group in one of the row's pieces; the row's ends are not masked.

    The loop holds raw values. Their NaN-propagating maximum compiles to packed instructions, and
    only one value in a chunk of 16 bytes is turned into a key.
    """
    DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    CHUNK: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    KEY: tl.constexpr = keys_ptr.dtype.element_ty
    start_ptr, skip = align_row(row_ptr)
    chunks = tl.cdiv(skip + width, CHUNK)
    groups = tl.cdiv(skip + width, GROUP)
    tiles = tl.cdiv(skip + width, TILE)
    first = tl.cdiv(tiles, pieces) * piece
    last = tl.minimum(first + tl.cdiv(tiles, pieces), tiles)
    for tile in tl.range(first * TILE, last * TILE, TILE, num_stages=STAGES):
        place = tile + tl.arange(0, TILE)
        values = tl.load(start_ptr + place, mask=place // CHUNK < chunks)
        values = tl.reshape(values.to(tl.float32), [TILE // CHUNK, CHUNK])
        keys = order_key(chunk_maxima(values, TILE // CHUNK, CHUNK).to(DTYPE))
        keys = tl.max(tl.reshape(keys, [TILE // GROUP, GROUP // CHUNK]), axis=1)
        group = tile // GROUP + tl.arange(0, TILE // GROUP)
        tl.store(keys_ptr + group, keys.to(KEY), mask=group < groups)


@triton.jit
def keys_row(keys_ptr, row, width, GROUP: tl.constexpr):
    """Pointer to a row's group keys; ``configs.keys_stride`` is the distance of two rows' keys."""
    return keys_ptr + row * (tl.cdiv(width + 7, 16 * GROUP) * 16)


@triton.jit
def chunk_maxima(values, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Maxima of the chunks [CHUNKS, CHUNK]; NaN if an element is. A thread compares its halves."""
    if CHUNK == 8:
        values = _halves_maximum(values, CHUNKS, 8)
    values = _halves_maximum(values, CHUNKS, 4)
    return tl.reshape(_halves_maximum(values, CHUNKS, 2), [CHUNKS])


@triton.jit
def _halves_maximum(values, ROWS: tl.constexpr, SIZE: tl.constexpr):
    pairs = tl.permute(tl.reshape(values, [ROWS, 2, SIZE // 2]), (0, 2, 1))
    low, high = tl.split(pairs)
    return tl.maximum(low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def select_row(row_ptr, keys_ptr, banned_ptr, ids_ptr, width, k,
               GROUP: tl.constexpr, GROUPS_PAD: tl.constexpr, CLAN: tl.constexpr,
               K_PAD: tl.constexpr):  # fmt: skip
    """(ids, values) [K_PAD] of the k best, in order, from the group keys that streaming left.

    The k best elements lie in the k best chunks of 16 bytes, these in the k best groups, these in
    the k best clans of CLAN groups: four small selections. Between them ``ids_ptr``, the row's k
    outputs, holds their lists; afterwards it holds nothing of use. Every barrier stands between
    stores of the program and its loads of the same memory.
    """
    UNSELECTABLE: tl.constexpr = -(1 << (keys_ptr.dtype.element_ty.primitive_bitwidth - 1))
    CHUNK: tl.constexpr = 128 // row_ptr.dtype.element_ty.primitive_bitwidth
    CLANS: tl.constexpr = GROUPS_PAD // CLAN
    SOME_CLANS: tl.constexpr = min(K_PAD, CLANS)
    SOME_GROUPS: tl.constexpr = min(K_PAD, SOME_CLANS * CLAN)
    SOME_CHUNKS: tl.constexpr = min(K_PAD, SOME_GROUPS * (GROUP // CHUNK))
    start_ptr, skip = align_row(row_ptr)
    groups = tl.cdiv(skip + width, GROUP)
    list_ptr = ids_ptr

    tl.debug_barrier()
    _mask_groups(start_ptr, keys_ptr, banned_ptr, skip, width, GROUP, GROUPS_PAD)
    tl.debug_barrier()

    group = tl.arange(0, GROUPS_PAD)
    keys = _group_keys(keys_ptr, group, group >= 0, groups, UNSELECTABLE)
    keys = tl.max(tl.reshape(keys, [CLANS, CLAN]), axis=1)
    listed = _store_best(keys, tl.arange(0, CLANS), list_ptr, k, CLANS, K_PAD, UNSELECTABLE)
    tl.debug_barrier()

    group, mask = _members(list_ptr, listed, SOME_CLANS, CLAN)
    keys = _group_keys(keys_ptr, group, mask, groups, UNSELECTABLE)
    tl.debug_barrier()
    listed = _store_best(keys, group, list_ptr, k, SOME_CLANS * CLAN, K_PAD, UNSELECTABLE)
    tl.debug_barrier()

    CHUNKS: tl.constexpr = SOME_GROUPS * (GROUP // CHUNK)
    chunk, mask = _members(list_ptr, listed, SOME_GROUPS, GROUP // CHUNK)
    excluded = excluded_bits(banned_ptr, chunk, mask, skip, width, CHUNK)
    keys = _chunk_keys(start_ptr, tl.reshape(chunk, [CHUNKS]), tl.reshape(excluded, [CHUNKS]))
    tl.debug_barrier()
    listed = _store_best(keys, chunk, list_ptr, k, CHUNKS, K_PAD, UNSELECTABLE)
    tl.debug_barrier()

    slot = tl.arange(0, SOME_CHUNKS)
    chunk = tl.load(list_ptr + slot, mask=slot < listed, other=0)
    excluded = excluded_bits(banned_ptr, chunk, slot < listed, skip, width, CHUNK)
    keys, ids = _element_keys(start_ptr, chunk, excluded, skip)
    tl.debug_barrier()
    found = _store_best(keys, ids, ids_ptr, k, SOME_CHUNKS * CHUNK, K_PAD, UNSELECTABLE)
    tl.debug_barrier()

    entry = tl.arange(0, K_PAD)
    ids = tl.load(ids_ptr + entry, mask=entry < found, other=0)
    place = _order(order_key(tl.load(row_ptr + ids)), found, K_PAD)
    ids = tl.load(ids_ptr + place, mask=entry < found, other=-1)
    values = tl.load(row_ptr + ids, mask=entry < found, other=-float("inf")).to(tl.float32)
    tl.debug_barrier()
    return ids, values


@triton.jit
def _members(list_ptr, listed, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """(indices [COUNT, SIZE] of the listed parents' members, whether there is such a parent)."""
    slot = tl.arange(0, COUNT)
    parent = tl.load(list_ptr + slot, mask=slot < listed, other=0)
    return parent[:, None] * SIZE + tl.arange(0, SIZE)[None, :], (slot < listed)[:, None]


@triton.jit
def _group_keys(keys_ptr, group, mask, groups, UNSELECTABLE: tl.constexpr):
    # A row's keys are padded to a multiple of 16, so that whole vectors can be loaded.
    keys = tl.load(keys_ptr + group, mask=mask & (group // 16 * 16 < groups))
    return tl.where(mask & (group < groups), keys.to(tl.int32), UNSELECTABLE)


@triton.jit
def _mask_groups(start_ptr, keys_ptr, banned_ptr, skip, width,
                 GROUP: tl.constexpr, GROUPS_PAD: tl.constexpr):  # fmt: skip
    """New keys for the groups that hold elements which cannot be selected.

    These are the groups at the row's ends, which streaming did not mask, and groups with banned
    ids. A handful of ids costs a block or two; ids banned everywhere cost the row a second time.
    """
    BLOCK: tl.constexpr = min(64, GROUPS_PAD)
    BLOCKS: tl.constexpr = GROUPS_PAD // BLOCK
    block = tl.arange(0, BLOCKS)
    last = (skip + width) // GROUP
    dirty = (block == 0) & (skip > 0)
    dirty = dirty | ((block == last // BLOCK) & (last * GROUP < skip + width))
    if banned_ptr is not None:
        # A block begins up to 7 ids before its words of the bitmap, so it reads one word more.
        WORDS: tl.constexpr = BLOCK * GROUP // 64
        STEP: tl.constexpr = min(WORDS, 8)
        word_ptr = banned_ptr.to(tl.pointer_type(tl.uint64))
        for step in range(-1, WORDS, STEP):
            word = step + tl.arange(0, STEP)[None, :]
            inside = (block[:, None] * WORDS + word >= 0) & (word < WORDS)
            word = block[:, None] * WORDS + word
            banned = tl.load(word_ptr + word, mask=inside & (word * 64 < width), other=0) != 0
            dirty = dirty | (tl.max(banned.to(tl.int32), axis=1) > 0)
    next_block = tl.min(tl.where(dirty, block, BLOCKS))
    while next_block < BLOCKS:
        _new_keys(start_ptr, keys_ptr, banned_ptr, next_block * BLOCK, skip, width, GROUP, BLOCK)
        next_block = tl.min(tl.where(dirty & (block > next_block), block, BLOCKS))


@triton.jit
def _new_keys(start_ptr, keys_ptr, banned_ptr, first, skip, width,
              GROUP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """New keys for those of BLOCK groups that hold something to exclude."""
    CHUNK: tl.constexpr = 128 // start_ptr.dtype.element_ty.primitive_bitwidth
    CHUNKS: tl.constexpr = BLOCK * (GROUP // CHUNK)
    group = first + tl.arange(0, BLOCK)
    chunk = group[:, None] * (GROUP // CHUNK) + tl.arange(0, GROUP // CHUNK)[None, :]
    excluded = excluded_bits(banned_ptr, chunk, True, skip, width, CHUNK)
    dirty = (tl.max(excluded, axis=1) > 0) & (group * GROUP < skip + width)
    excluded = tl.where(dirty[:, None], excluded, (1 << CHUNK) - 1)  # no others are loaded
    keys = _chunk_keys(start_ptr, tl.reshape(chunk, [CHUNKS]), tl.reshape(excluded, [CHUNKS]))
    keys = tl.max(tl.reshape(keys, [BLOCK, GROUP // CHUNK]), axis=1)
    tl.store(keys_ptr + group, keys.to(keys_ptr.dtype.element_ty), mask=dirty)


@triton.jit
def excluded_bits(banned_ptr, chunk, mask, skip, width, CHUNK: tl.constexpr):
    """A bit for each element of a chunk that cannot be selected; all where ``mask`` is False."""
    ALL: tl.constexpr = (1 << CHUNK) - 1
    first = chunk * CHUNK - skip  # id of a chunk's first element
    before = tl.minimum(tl.maximum(-first, 0), CHUNK)
    until = tl.minimum(tl.maximum(width - first, 0), CHUNK)
    excluded = ((1 << before) - 1) | (ALL + 1 - (1 << until))
    if banned_ptr is not None:
        byte = first >> 3
        low = tl.load(banned_ptr + byte, mask=mask & (byte >= 0) & (first < width), other=0)
        high = tl.load(banned_ptr + byte + 1, mask=mask & (byte * 8 + 8 < width), other=0)
        banned = (low.to(tl.int32) | (high.to(tl.int32) << 8)) >> (first & 7)
        excluded = excluded | (banned & ALL)
    return tl.where(mask, excluded, ALL)


@triton.jit
def _chunk_keys(start_ptr, chunk, excluded):
    """The largest key of each chunk; only its largest value is turned into a key."""
    DTYPE: tl.constexpr = start_ptr.dtype.element_ty
    CHUNK: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    UNSELECTABLE: tl.constexpr = -(1 << (DTYPE.primitive_bitwidth - 1))
    ALL: tl.constexpr = (1 << CHUNK) - 1
    lane = tl.arange(0, CHUNK)[None, :]
    place = chunk[:, None] * CHUNK + lane
    values = tl.load(start_ptr + place, mask=(excluded != ALL)[:, None]).to(tl.float32)
    values = tl.where((excluded[:, None] >> lane) & 1 != 0, -float("inf"), values)
    keys = order_key(chunk_maxima(values, chunk.shape[0], CHUNK).to(DTYPE))
    return tl.where(excluded == ALL, UNSELECTABLE, keys)


@triton.jit
def _element_keys(start_ptr, chunk, excluded, skip):
    """(keys, ids) of the chunks' elements."""
    CHUNK: tl.constexpr = 128 // start_ptr.dtype.element_ty.primitive_bitwidth
    UNSELECTABLE: tl.constexpr = -(1 << (start_ptr.dtype.element_ty.primitive_bitwidth - 1))
    ALL: tl.constexpr = (1 << CHUNK) - 1
    lane = tl.arange(0, CHUNK)[None, :]
    place = chunk[:, None] * CHUNK + lane
    values = tl.load(start_ptr + place, mask=(excluded != ALL)[:, None])
    keys = tl.where((excluded[:, None] >> lane) & 1 != 0, UNSELECTABLE, order_key(values))
    return keys, place - skip


@triton.jit
def _store_best(keys, indices, out_ptr, k,
                SIZE: tl.constexpr, K_PAD: tl.constexpr, UNSELECTABLE: tl.constexpr):  # fmt: skip
    """Writes the indices of the k largest of SIZE keys in storage order; ties go to the first.

    Returns how many there are: k, or fewer where fewer can be selected. The keys are put into k or
    more columns. The smallest of the columns' maxima is at most the k-th key: the search starts
    there and saves most of its steps.
    """
    COLUMNS: tl.constexpr = min(K_PAD, SIZE)
    keys = tl.reshape(keys, [SIZE])
    columns = tl.max(tl.reshape(keys, [SIZE // COLUMNS, COLUMNS]), axis=0)
    low = tl.maximum(tl.min(columns), UNSELECTABLE + 1)
    high = tl.max(columns)
    while low < high:  # the largest key that k keys reach lies in [low, high]
        middle = (low | high) - ((low ^ high) >> 1)
        reach = tl.sum((keys >= middle).to(tl.int32))
        low = tl.where(reach >= k, middle, low)
        high = tl.where(reach > k, high, tl.where(reach == k, middle, middle - 1))
    # One scan counts both: fewer than 2^15 are above (below k), at most SIZE are equal.
    counts = _running_sum(tl.where(keys > low, 1 << 16, tl.where(keys == low, 1, 0)), SIZE)
    equals = counts & 0xFFFF
    total = tl.max(counts)
    wanted = tl.minimum(k - (total >> 16), SIZE)
    best = (keys > low) | ((keys == low) & (equals <= wanted))
    place = (counts >> 16) + tl.minimum(equals, wanted) - 1
    tl.store(out_ptr + place, tl.reshape(indices, [SIZE]), mask=best)
    return (total >> 16) + tl.minimum(total & 0xFFFF, wanted)


@triton.jit
def _running_sum(values, SIZE: tl.constexpr):
    """Inclusive sums. A warp holds whole rows, so that warps exchange only the rows' sums."""
    COLUMNS: tl.constexpr = min(SIZE, 128)
    rows = tl.reshape(values, [SIZE // COLUMNS, COLUMNS])
    totals = tl.sum(rows, axis=1)
    before = tl.cumsum(totals) - totals
    return tl.reshape(tl.cumsum(rows, axis=1) + before[:, None], [SIZE])


@triton.jit
def _order(keys, found, K_PAD: tl.constexpr):
    """The entry that goes to each place, so that keys descend; equal keys keep their order."""
    entry = tl.arange(0, K_PAD)
    keys = tl.where(entry < found, keys, -(1 << 31)).to(tl.int64)
    ranked = tl.sort((keys << 32) | (K_PAD - 1 - entry), descending=True)
    return K_PAD - 1 - (ranked & (K_PAD - 1)).to(tl.int32)


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
    keys_ptr = keys_row(keys_ptr, row, width, GROUP)
    piece, pieces = tl.program_id(1), tl.num_programs(1)
    stream_maxima(row_ptr, keys_ptr, width, piece, pieces, GROUP, TILE, STAGES)


@triton.jit(do_not_specialize=["width", "k", "inner", "outer_stride", "inner_stride"])
def select_kernel(
    logits_ptr, banned_ptr, mask_ptr, keys_ptr, ids_ptr, values_ptr,
    width: tl.int32, k: tl.int32, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64,
    STREAMED: tl.constexpr, GROUP: tl.constexpr, GROUPS_PAD: tl.constexpr, CLAN: tl.constexpr,
    K_PAD: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
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
        stream_maxima(row_ptr, keys_ptr, width, 0, 1, GROUP, TILE, STAGES)
    ids, values = select_row(
        row_ptr, keys_ptr, banned_ptr, ids_ptr, width, k, GROUP, GROUPS_PAD, CLAN, K_PAD
    )
    tl.store(ids_ptr + entry, ids, mask=entry < k)
    tl.store(values_ptr + entry, values, mask=entry < k)
