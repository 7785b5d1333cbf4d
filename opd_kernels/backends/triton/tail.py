"""What is outside of a row's support: the log-sum-exp of x / T there, and the entropy.

The tail may hold 1e-9 of the mass, so it is summed directly and never as 1 - P. The row is cut into
groups of ``TAIL_GROUP`` adjacent elements. The pass that selects also leaves each group's maximum m
as a key and the sum of exp((x - m) / T); for the entropy, also the sum of the exponents times these
powers. Groups with an element of the support are then read again and summed without it. At last all
groups are added up in float64, relative to the largest maximum that is left.

x - m is taken first, so that the exponent's error is relative to how far x is below m; the
hardware's power of 2 has a relative error of 2^-22. Groups and the order of sums depend on width,
dtype and alignment alone. So a given support has the bits of the same support selected.

Bytes of a row, beside the selection's: 4 for each group, with the entropy 8, written and read, and
up to k groups read once more; the selection has just read most of these. The maxima are the
selection's keys, unless these differ from them (``banned``, a lower limit, other groups): then 2 or
4 more. All this is kept a program and not a row: a program walks many rows in the same memory. The
loop takes 11.9 instructions for a bfloat16 element on sm_90, 15.9 with the entropy.
"""

import triton
import triton.language as tl

from opd_kernels.backends.triton.mathematics import log_double
from opd_kernels.backends.triton.rows import (
    align_row,
    key_value,
    order_key,
    row_start,
    widened_pairs,
)
from opd_kernels.backends.triton.select import (
    chunk_maxima,
    excluded_bits,
    keys_row,
    select_row,
)

LARGEST = tl.constexpr(3.4028234663852886e38)
LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2 = tl.constexpr(0.6931471805599453)
# Below any exponent whose power of 2 is above 0, but finite: 0 times it is 0.
NEVER = tl.constexpr(-150.0)
# A place in a row that no id has.
NOWHERE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def stream_sums(row_ptr, keys_ptr, maxima_ptr, sums_ptr, moments_ptr, temperature,
                width, piece, pieces,
                GROUP: tl.constexpr, TAIL_GROUP: tl.constexpr, TILE: tl.constexpr,
                STAGES: tl.constexpr):  # fmt: skip
    """As ``select.stream_maxima``, with sums, of all that lies in the groups.

    ``keys_ptr`` None: nothing is selected. ``maxima_ptr`` None: the keys are the maxima, too.
    """
    DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    CHUNK: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    CHUNKS: tl.constexpr = TILE // CHUNK
    TAIL_GROUPS: tl.constexpr = TILE // TAIL_GROUP
    start_ptr, skip = align_row(row_ptr)
    chunks = tl.cdiv(skip + width, CHUNK)
    groups = tl.cdiv(skip + width, GROUP)
    tail_groups = tl.cdiv(skip + width, TAIL_GROUP)
    tiles = tl.cdiv(skip + width, TILE)
    first = tl.cdiv(tiles, pieces) * piece
    last = tl.minimum(first + tl.cdiv(tiles, pieces), tiles)
    factor = tl.div_rn(LOG2_E, temperature)
    for tile in tl.range(first * TILE, last * TILE, TILE, num_stages=STAGES):
        place = tile + tl.arange(0, TILE)
        values = tl.load(start_ptr + place, mask=place // CHUNK < chunks)
        values = tl.reshape(values, [CHUNKS, CHUNK])
        keys = order_key(chunk_maxima(values.to(tl.float32), CHUNKS, CHUNK).to(DTYPE))
        even, odd = widened_pairs(values)
        maxima = tl.max(tl.reshape(keys, [TAIL_GROUPS, TAIL_GROUP // CHUNK]), axis=1)
        sums, moments = _group_sums(even, odd, maxima, factor, DTYPE, moments_ptr is not None)
        if keys_ptr is not None:
            if GROUP == TAIL_GROUP:
                keys = maxima
            else:
                keys = tl.max(tl.reshape(keys, [TILE // GROUP, GROUP // CHUNK]), axis=1)
            group = tile // GROUP + tl.arange(0, TILE // GROUP)
            tl.store(keys_ptr + group, keys.to(keys_ptr.dtype.element_ty), mask=group < groups)
        group = tile // TAIL_GROUP + tl.arange(0, TAIL_GROUPS)
        _store_groups(
            maxima_ptr, sums_ptr, moments_ptr, group, group < tail_groups, maxima, sums, moments
        )


@triton.jit
def _group_sums(even, odd, maxima, factor, DTYPE: tl.constexpr, MOMENTS: tl.constexpr):
    """(sums, moments) of groups, from halves of their elements and the keys of their maxima.

    A group of -inf alone has sums of 0. NaN and +inf make them NaN.
    """
    most = tl.maximum(key_value(maxima, DTYPE), -LARGEST)
    even, odd = _exponents(even, most, factor), _exponents(odd, most, factor)
    even_powers, odd_powers = tl.exp2(even), tl.exp2(odd)
    sums = _sum_by_pairs(_sum_by_pairs(even_powers + odd_powers))
    moments = sums
    if MOMENTS:
        moments = even_powers * tl.maximum(even, NEVER) + odd_powers * tl.maximum(odd, NEVER)
        moments = _sum_by_pairs(_sum_by_pairs(moments))
    return sums, moments


@triton.jit
def _exponents(values, most, factor):
    """(x - m) log2(e) / T [groups, chunks of a group, ..] of values [chunks, ..]."""
    GROUPS: tl.constexpr = most.shape[0]
    SHAPE: tl.constexpr = [GROUPS, values.shape[0] // GROUPS, values.shape[1]]
    return (tl.reshape(values, SHAPE) - most[:, None, None]) * factor


@triton.jit
def _store_groups(maxima_ptr, sums_ptr, moments_ptr, group, mask, maxima, sums, moments):
    if maxima_ptr is not None:
        tl.store(maxima_ptr + group, maxima.to(maxima_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + group, sums, mask=mask)
    if moments_ptr is not None:
        tl.store(moments_ptr + group, moments, mask=mask)


@triton.jit
def tail_of_row(row_ptr, maxima_ptr, sums_ptr, moments_ptr, places_ptr, members_ptr, ids,
                temperature, width,
                TAIL_GROUP: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """(log-sum-exp, entropy) in [0, width) without the ids, from what streaming left.

    ``places_ptr`` and ``members_ptr`` are the row's memory for a list of these. Every barrier
    stands between stores of the program and its accesses to the same memory.
    """
    factor = tl.div_rn(LOG2_E, temperature)
    tl.debug_barrier()
    _leave_out(row_ptr, maxima_ptr, sums_ptr, moments_ptr, places_ptr, members_ptr, ids, factor,
               width, TAIL_GROUP, BLOCK)  # fmt: skip
    tl.debug_barrier()
    _, skip = align_row(row_ptr)
    groups = tl.cdiv(skip + width, TAIL_GROUP)
    DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    return _sum_of_groups(
        maxima_ptr, sums_ptr, moments_ptr, groups, factor, temperature, DTYPE, LANES
    )


@triton.jit
def _leave_out(row_ptr, maxima_ptr, sums_ptr, moments_ptr, places_ptr, members_ptr, ids, factor,
               width, GROUP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sums groups with elements of the support again, without these; so those at the row's ends.

    Ids outside of [0, width) name nothing, and repeated ids count once. A group's elements in the
    support are a bit each of a 64-bit number.
    """
    DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    CHUNK: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    CHUNKS: tl.constexpr = GROUP // CHUNK
    start_ptr, skip = align_row(row_ptr)
    count, lowest, highest = _list_groups(places_ptr, members_ptr, ids, skip, width, GROUP)
    last = (skip + width) // GROUP
    at_start = (skip > 0) & (lowest != 0)
    at_end = (last * GROUP < skip + width) & (highest != last)
    items = count + at_start.to(tl.int32) + at_end.to(tl.int32)
    tl.debug_barrier()
    for begin in range(0, items, BLOCK):
        item = begin + tl.arange(0, BLOCK)
        listed = item < count
        group = tl.load(places_ptr + item, mask=listed, other=0)
        group = tl.where(listed | ((item == count) & at_start), group, last)
        members = tl.load(members_ptr + item, mask=listed, other=0)
        members -= tl.load(members_ptr + item - 1, mask=listed & (item > 0), other=0)
        lane = tl.arange(0, CHUNKS)[None, :]
        chunk = group[:, None] * CHUNKS + lane  # [BLOCK, CHUNKS]
        excluded = excluded_bits(None, chunk, (item < items)[:, None], skip, width, CHUNK)
        members = (members[:, None] >> (lane * CHUNK).to(tl.int64)).to(tl.int32)
        excluded = tl.reshape(excluded | (members & ((1 << CHUNK) - 1)), [BLOCK * CHUNKS])
        values = _chunks_without(start_ptr, tl.reshape(chunk, [BLOCK * CHUNKS]), excluded)
        keys = order_key(chunk_maxima(values, BLOCK * CHUNKS, CHUNK).to(DTYPE))
        maxima = tl.max(tl.reshape(keys, [BLOCK, CHUNKS]), axis=1)
        even, odd = widened_pairs(values)
        sums, moments = _group_sums(even, odd, maxima, factor, DTYPE, moments_ptr is not None)
        _store_groups(maxima_ptr, sums_ptr, moments_ptr, group, item < items, maxima, sums, moments)


@triton.jit
def _list_groups(places_ptr, members_ptr, ids, skip, width, GROUP: tl.constexpr):
    """Lists the groups that have ids, in order; returns (how many, first, last).

    ``members_ptr`` gets the groups' bits, each together with those of the groups before it: modulo
    2^64 the difference of two sums is exact.
    """
    tl.static_assert(GROUP == 64)
    K_PAD: tl.constexpr = ids.shape[0]
    entry = tl.arange(0, K_PAD)
    place = tl.where((ids >= 0) & (ids < width), ids.to(tl.int32) + skip, NOWHERE)
    place = tl.sort(place)
    tl.store(places_ptr + entry, place)
    tl.debug_barrier()
    before = tl.load(places_ptr + entry - 1, mask=entry > 0, other=-1)
    after = tl.load(places_ptr + entry + 1, mask=entry < K_PAD - 1, other=NOWHERE)
    tl.debug_barrier()
    listed = place != NOWHERE
    bit = tl.full([K_PAD], 1, tl.int64) << (place & 63).to(tl.int64)
    bits = tl.cumsum(tl.where(listed & (place != before), bit, 0))
    group = place >> 6
    ends = listed & (group != after >> 6)
    rank = tl.cumsum((listed & (group != before >> 6)).to(tl.int32)) - 1
    tl.store(places_ptr + rank, group, mask=ends)
    tl.store(members_ptr + rank, bits, mask=ends)
    lowest, highest = tl.min(group), tl.max(tl.where(listed, group, -1))
    return tl.sum(ends.to(tl.int32)), lowest, highest


@triton.jit
def _chunks_without(start_ptr, chunk, excluded):
    """float32 values of chunks, -inf where the element's bit is set."""
    CHUNK: tl.constexpr = 128 // start_ptr.dtype.element_ty.primitive_bitwidth
    lane = tl.arange(0, CHUNK)[None, :]
    place = chunk[:, None] * CHUNK + lane
    values = tl.load(start_ptr + place, mask=(excluded != (1 << CHUNK) - 1)[:, None])
    return tl.where((excluded[:, None] >> lane) & 1 != 0, -float("inf"), values.to(tl.float32))


@triton.jit
def _sum_of_groups(maxima_ptr, sums_ptr, moments_ptr, groups, factor, temperature,
                   DTYPE: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """(log-sum-exp, entropy) of all groups; -inf and 0 where there is nothing."""
    most = tl.full([LANES], -LARGEST, tl.float32)
    for first in range(0, groups, LANES):
        group = first + tl.arange(0, LANES)
        most = tl.maximum(most, _group_maxima(maxima_ptr, group, groups, DTYPE))
    most = tl.max(most)
    totals = tl.zeros([LANES], tl.float64)
    moment_totals = tl.zeros([LANES], tl.float64)
    for first in range(0, groups, LANES):
        group = first + tl.arange(0, LANES)
        exponents = (_group_maxima(maxima_ptr, group, groups, DTYPE) - most) * factor
        weights = tl.exp2(exponents)
        parts = tl.load(sums_ptr + group, mask=group // 16 * 16 < groups) * weights
        totals += tl.where(group < groups, parts, 0.0).to(tl.float64)
        if moments_ptr is not None:
            moments = tl.load(moments_ptr + group, mask=group // 16 * 16 < groups) * weights
            moments += parts * tl.maximum(exponents, NEVER)
            moment_totals += tl.where(group < groups, moments, 0.0).to(tl.float64)
    total = tl.sum(_sum_by_pairs(tl.reshape(totals, [1, LANES])))
    log_total = tl.where(total > 0, log_double(total), total)  # NaN stays NaN
    logsumexp = most.to(tl.float64) / temperature.to(tl.float64) + log_total
    logsumexp = tl.where(total == 0, -float("inf"), logsumexp)
    entropy = log_total
    if moments_ptr is not None:
        # Both terms are 0 or more.
        moment = tl.sum(_sum_by_pairs(tl.reshape(moment_totals, [1, LANES])))
        entropy -= moment * LOG_2 / total
    return logsumexp, tl.where(total == 0, 0.0, entropy)


@triton.jit
def _group_maxima(maxima_ptr, group, groups, DTYPE: tl.constexpr):
    """Maxima of groups. A row's values of groups are padded, so that whole vectors are loaded."""
    keys = tl.load(maxima_ptr + group, mask=group // 16 * 16 < groups).to(tl.int32)
    return tl.where(group < groups, key_value(keys, DTYPE), -LARGEST)


@triton.jit
def _sum_by_pairs(values):
    """Sums over the last axis, in an order that does not depend on which thread has what."""
    SHAPE: tl.constexpr = values.shape[:-1]
    SIZE: tl.constexpr = values.shape[-1]
    if SIZE == 1:
        return tl.reshape(values, SHAPE)
    else:
        pairs = tl.reshape(values, SHAPE + [SIZE // 2, 2])
        return _sum_by_pairs(tl.sum(pairs, axis=len(SHAPE) + 1))


@triton.jit
def _row_tail(tail_ptr, entropy_ptr, row, logsumexp, entropy):
    tl.store(tail_ptr + row, logsumexp)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy)


@triton.jit
def _is_live(mask_ptr, row):
    if mask_ptr is None:
        return True
    else:
        return tl.load(mask_ptr + row) != 0


@triton.jit
def _temperature(value, rows_ptr, row):
    if rows_ptr is None:
        return value
    else:
        return tl.load(rows_ptr + row)


@triton.jit(
    do_not_specialize=["temperature", "width", "inner", "outer_stride", "inner_stride"]
)  # fmt: skip
def group_sums_kernel(
    logits_ptr, mask_ptr, temperatures_ptr, keys_ptr, maxima_ptr, sums_ptr, moments_ptr,
    temperature: tl.float32, width: tl.int32,
    inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64,
    GROUP: tl.constexpr, TAIL_GROUP: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Group keys and sums of each row; a program per row and piece of it."""
    row = tl.program_id(0).to(tl.int64)
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            return
    row_ptr = logits_ptr + row_start(row, inner, outer_stride, inner_stride)
    if keys_ptr is not None:
        keys_ptr = keys_row(keys_ptr, row, width, GROUP)
    if maxima_ptr is not None:
        maxima_ptr = keys_row(maxima_ptr, row, width, TAIL_GROUP)
    sums_ptr = keys_row(sums_ptr, row, width, TAIL_GROUP)
    if moments_ptr is not None:
        moments_ptr = keys_row(moments_ptr, row, width, TAIL_GROUP)
    temperature = _temperature(temperature, temperatures_ptr, row)
    piece, pieces = tl.program_id(1), tl.num_programs(1)
    stream_sums(row_ptr, keys_ptr, maxima_ptr, sums_ptr, moments_ptr, temperature,
                width, piece, pieces, GROUP, TAIL_GROUP, TILE, STAGES)  # fmt: skip


@triton.jit
def _select_tail_of_row(
    number, logits_ptr, banned_ptr, mask_ptr, temperatures_ptr, listed_ptr, keys_ptr, maxima_ptr,
    sums_ptr, moments_ptr, places_ptr, members_ptr, ids_ptr, values_ptr, tail_ptr, entropy_ptr,
    temperature, limit, width, k, left_out, inner, outer_stride, inner_stride,
    STREAMED: tl.constexpr, GROUP: tl.constexpr, GROUPS_PAD: tl.constexpr, CLAN: tl.constexpr,
    K_PAD: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    TAIL_GROUP: tl.constexpr, LEFT_PAD: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One row of ``select_tail_kernel``, with its program's memory."""
    row = tl.cast(number, tl.int64)
    span = tl.maximum(limit, width)
    entry = tl.arange(0, K_PAD)
    row_ids_ptr = ids_ptr + row * k
    row_values_ptr = values_ptr + row * k
    if _is_live(mask_ptr, row):
        row_ptr = logits_ptr + row_start(row, inner, outer_stride, inner_stride)
        row_temperature = _temperature(temperature, temperatures_ptr, row)
        if not STREAMED:
            # What the row before has left is read before it is overwritten.
            tl.debug_barrier()
            stream_sums(row_ptr, keys_ptr, maxima_ptr, sums_ptr, moments_ptr, row_temperature,
                        span, 0, 1, GROUP, TAIL_GROUP, TILE, STAGES)  # fmt: skip
        ids, values = select_row(
            row_ptr, keys_ptr, banned_ptr, row_ids_ptr, limit, k,
            GROUP, GROUPS_PAD, CLAN, K_PAD,
        )  # fmt: skip
        tl.store(row_ids_ptr + entry, ids, mask=entry < k)
        tl.store(row_values_ptr + entry, values, mask=entry < k)
        if listed_ptr is not None:
            left = tl.arange(0, LEFT_PAD)
            left_ptr = listed_ptr + row * left_out + left
            ids = tl.load(left_ptr, mask=left < left_out, other=-1)
        logsumexp, entropy = tail_of_row(
            row_ptr, keys_ptr if maxima_ptr is None else maxima_ptr, sums_ptr, moments_ptr,
            places_ptr, members_ptr, ids, row_temperature, width, TAIL_GROUP, BLOCK, LANES,
        )  # fmt: skip
        _row_tail(tail_ptr, entropy_ptr, row, logsumexp, entropy)
    else:
        tl.store(row_ids_ptr + entry, tl.full([K_PAD], -1, tl.int32), mask=entry < k)
        nothing = tl.full([K_PAD], -float("inf"), tl.float32)
        tl.store(row_values_ptr + entry, nothing, mask=entry < k)
        _row_tail(tail_ptr, entropy_ptr, row, 0.0, 0.0)


@triton.jit(
    do_not_specialize=[
        "temperature", "rows", "limit", "width", "k", "left_out",
        "inner", "outer_stride", "inner_stride",
    ]
)  # fmt: skip
def select_tail_kernel(
    logits_ptr, banned_ptr, mask_ptr, temperatures_ptr, listed_ptr, keys_ptr, maxima_ptr, sums_ptr,
    moments_ptr, places_ptr, members_ptr, ids_ptr, values_ptr, tail_ptr, entropy_ptr,
    temperature: tl.float32, rows: tl.int32, limit: tl.int32, width: tl.int32, k: tl.int32,
    left_out: tl.int32, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64,
    STREAMED: tl.constexpr, GROUP: tl.constexpr, GROUPS_PAD: tl.constexpr, CLAN: tl.constexpr,
    K_PAD: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    TAIL_GROUP: tl.constexpr, LEFT_PAD: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    WALKS: tl.constexpr,
):  # fmt: skip
    """(ids, values) of the k best of each row, and its tail. A program walks rows, or has one.

    The tail leaves out the ids at ``listed_ptr``, or where that is None, those that are selected.
    Keys and sums are a program's. Those that are already streamed are a row's, of one program each.
    Hoisting what all rows share would hold registers through the row, and spill some.
    """
    first = tl.program_id(0)
    program = first.to(tl.int64)
    span = tl.maximum(limit, width)
    keys_ptr = keys_row(keys_ptr, program, span, GROUP)
    if maxima_ptr is not None:
        maxima_ptr = keys_row(maxima_ptr, program, span, TAIL_GROUP)
    sums_ptr = keys_row(sums_ptr, program, span, TAIL_GROUP)
    if moments_ptr is not None:
        moments_ptr = keys_row(moments_ptr, program, span, TAIL_GROUP)
    places_ptr += program * LEFT_PAD
    members_ptr += program * LEFT_PAD
    if WALKS:
        for number in tl.range(first, rows, tl.num_programs(0), disable_licm=True):
            _select_tail_of_row(
                number, logits_ptr, banned_ptr, mask_ptr, temperatures_ptr, listed_ptr, keys_ptr,
                maxima_ptr, sums_ptr, moments_ptr, places_ptr, members_ptr, ids_ptr, values_ptr,
                tail_ptr, entropy_ptr, temperature, limit, width, k, left_out,
                inner, outer_stride, inner_stride, STREAMED, GROUP, GROUPS_PAD, CLAN, K_PAD, TILE,
                STAGES, TAIL_GROUP, LEFT_PAD, BLOCK, LANES,
            )  # fmt: skip
    else:
        _select_tail_of_row(
            first, logits_ptr, banned_ptr, mask_ptr, temperatures_ptr, listed_ptr, keys_ptr,
            maxima_ptr, sums_ptr, moments_ptr, places_ptr, members_ptr, ids_ptr, values_ptr,
            tail_ptr, entropy_ptr, temperature, limit, width, k, left_out,
            inner, outer_stride, inner_stride, STREAMED, GROUP, GROUPS_PAD, CLAN, K_PAD, TILE,
            STAGES, TAIL_GROUP, LEFT_PAD, BLOCK, LANES,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "temperature", "rows", "width", "left_out", "inner", "outer_stride", "inner_stride",
    ]
)  # fmt: skip
def tail_kernel(
    logits_ptr, mask_ptr, temperatures_ptr, listed_ptr, maxima_ptr, sums_ptr, moments_ptr,
    places_ptr, members_ptr, tail_ptr, entropy_ptr,
    temperature: tl.float32, rows: tl.int32, width: tl.int32, left_out: tl.int32,
    inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64,
    STREAMED: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    TAIL_GROUP: tl.constexpr, LEFT_PAD: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The tail of each row without the listed ids; programs as in ``select_tail_kernel``."""
    first = tl.program_id(0)
    program = first.to(tl.int64)
    maxima_ptr = keys_row(maxima_ptr, program, width, TAIL_GROUP)
    sums_ptr = keys_row(sums_ptr, program, width, TAIL_GROUP)
    if moments_ptr is not None:
        moments_ptr = keys_row(moments_ptr, program, width, TAIL_GROUP)
    places_ptr += program * LEFT_PAD
    members_ptr += program * LEFT_PAD
    for number in tl.range(first, rows, tl.num_programs(0), disable_licm=True):
        row = tl.cast(number, tl.int64)
        if _is_live(mask_ptr, row):
            row_ptr = logits_ptr + row_start(row, inner, outer_stride, inner_stride)
            row_temperature = _temperature(temperature, temperatures_ptr, row)
            if not STREAMED:
                # What the row before has left is read before it is overwritten.
                tl.debug_barrier()
                stream_sums(row_ptr, None, maxima_ptr, sums_ptr, moments_ptr, row_temperature,
                            width, 0, 1, TAIL_GROUP, TAIL_GROUP, TILE, STAGES)  # fmt: skip
            entry = tl.arange(0, LEFT_PAD)
            listed = listed_ptr + row * left_out + entry
            ids = tl.load(listed, mask=entry < left_out, other=-1)
            logsumexp, entropy = tail_of_row(
                row_ptr, maxima_ptr, sums_ptr, moments_ptr, places_ptr, members_ptr, ids,
                row_temperature, width, TAIL_GROUP, BLOCK, LANES,
            )  # fmt: skip
            _row_tail(tail_ptr, entropy_ptr, row, logsumexp, entropy)
        else:
            _row_tail(tail_ptr, entropy_ptr, row, 0.0, 0.0)
