"""A head's logits at a few ids of each row, and the gradients of that.

    z_k = W[id_k] . h + b[id_k]      dL/dh = sum over k of g_k W[id_k]      g = dL/dz
    dL/dW[v] = sum of g_k h over the rows and k with id_k = v

All three gather rows of H elements and are bound by reading them, N K H elements each. The first
two read rows of the weight, the third rows of the hidden states, in slices of H that the cache
holds. The gradient of the weight goes by sorted ids: the entries of a vocabulary row are a segment,
which is summed in order. Every row is written once, so there is nothing to clear and no atomic. A
segment may be as long as there are tokens: programs of their own sum its whole chunks first.

The logits can also be computed in the order of sorted ids, a slice of H at a time. Then a row of
the weight is read from memory once, and the cache holds the hidden states' slice. A kernel of its
own adds up the slices' sums, in order.

Multiplications and additions are fused only where the source says so: all GPUs give the same bits.
"""

import triton
import triton.language as tl

from opd_kernels.backends.triton.rows import allowed_ids, row_start, store_rounded


@triton.jit(do_not_specialize=["limit", "k", "inner"])
def gather_dot_kernel(
    hidden_ptr, weight_ptr, bias_ptr, ids_ptr, banned_ptr, mask_ptr, logits_ptr, slots_ptr,
    limit: tl.int32, k: tl.int32, width, weight_stride, inner: tl.int64, outer_stride, inner_stride,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Logits and slots of BLOCK_K of a row's entries; contiguous (N, K) ids.

    The programs of a row are neighbours, so that its hidden state comes from memory once.
    """
    blocks = tl.cdiv(k, BLOCK_K)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    entry = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    logits_ptr += row * k
    slots_ptr += row * k
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            tl.store(logits_ptr + entry, tl.zeros([BLOCK_K], tl.float32), mask=entry < k)
            tl.store(slots_ptr + entry, tl.full([BLOCK_K], -1, tl.int32), mask=entry < k)
            return
    ids = tl.load(ids_ptr + row * k + entry, mask=entry < k, other=-1)
    ids, present = allowed_ids(ids, limit, banned_ptr)
    hidden_ptr += row_start(row, inner, outer_stride, inner_stride)
    column = tl.arange(0, BLOCK_H)
    weight_ptrs = weight_ptr + (ids * weight_stride)[:, None] + column[None, :]
    products = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    for start in tl.range(0, width, BLOCK_H, num_stages=STAGES):
        inside = start + column < width
        h = tl.load(hidden_ptr + start + column, mask=inside, other=0.0)  # [BLOCK_H]
        w = tl.load(weight_ptrs + start, mask=present[:, None] & inside[None, :], other=0.0)
        products = tl.fma(w.to(tl.float32), h.to(tl.float32)[None, :], products)
    logits = tl.sum(products, axis=1)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + ids, mask=present, other=0.0).to(tl.float32)
    tl.store(logits_ptr + entry, tl.where(present, logits, 0.0), mask=entry < k)
    tl.store(slots_ptr + entry, tl.where(present, entry, -1), mask=entry < k)


@triton.jit(do_not_specialize=["limit", "k", "entries"])
def entry_keys_kernel(
    ids_ptr, banned_ptr, mask_ptr, keys_ptr, slots_ptr,
    limit: tl.int32, k: tl.int32, entries: tl.int32, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys to sort BLOCK entries by, their id or ``limit`` for absent ones, and their slots."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < entries
    kept = inside
    if mask_ptr is not None:
        kept = inside & (tl.load(mask_ptr + place // k, mask=inside, other=0) != 0)
    ids, present = allowed_ids(tl.load(ids_ptr + place, mask=kept, other=-1), limit, banned_ptr)
    tl.store(keys_ptr + place, tl.where(present, ids, limit).to(tl.int32), mask=inside)
    tl.store(slots_ptr + place, tl.where(present, place % k, -1), mask=inside)


@triton.jit(do_not_specialize=["limit", "entries"])
def sorted_dot_kernel(
    keys_ptr, order_ptr, rows_ptr, hidden_ptr, weight_ptr, sums_ptr,
    limit: tl.int32, entries: tl.int32, width, weight_stride, hidden_unit,
    RUN: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Products of RUN sorted entries summed over BLOCK_H columns; ``order`` says where to store.

    All runs of one slice of columns come before the next slice, so that the hidden states' slice
    stays in the cache. A row of the weight stays in registers until the id changes.
    """
    first = tl.program_id(0) * RUN
    stop = tl.minimum(first + RUN, entries)
    if tl.load(keys_ptr + first) >= limit:
        return
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    sums_ptr += tl.program_id(1).to(tl.int64) * entries
    inside = column < width
    last = limit
    w = tl.zeros([BLOCK_H], tl.float32)
    for place in range(first, stop):
        key = tl.load(keys_ptr + place)
        if key < limit:
            h_ptrs = hidden_ptr + tl.load(rows_ptr + place) * hidden_unit + column
            h = tl.load(h_ptrs, mask=inside, other=0.0)
            if key != last:
                w_ptrs = weight_ptr + key.to(tl.int64) * weight_stride + column
                w = tl.load(w_ptrs, mask=inside, other=0.0).to(tl.float32)
                last = key
            total = tl.sum(w * h.to(tl.float32), axis=0)
            tl.store(sums_ptr + tl.load(order_ptr + place), total)


@triton.jit(do_not_specialize=["limit", "entries", "slices"])
def add_slices_kernel(
    sums_ptr, keys_ptr, bias_ptr, logits_ptr,
    limit: tl.int32, entries: tl.int32, slices: tl.int32, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits of BLOCK entries from the (slices, entries) sums of ``sorted_dot_kernel``."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < entries
    keys = tl.load(keys_ptr + place, mask=inside, other=limit)
    present = keys < limit
    logits = tl.zeros([BLOCK], tl.float32)
    for _ in range(slices):
        logits += tl.load(sums_ptr + place, mask=present, other=0.0)
        sums_ptr += entries
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + keys, mask=present, other=0.0).to(tl.float32)
    tl.store(logits_ptr + place, logits, mask=inside)


@triton.jit(do_not_specialize=["vocab", "k"])
def hidden_grad_kernel(
    upstream_ptr, ids_ptr, weight_ptr, out_ptr, vocab: tl.int32, k: tl.int32, width, weight_stride,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_H columns of a row's gradient; contiguous (N, K) upstream and ids."""
    tiles = tl.cdiv(width, BLOCK_H)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    upstream_ptr += row * k
    ids_ptr += row * k
    total = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    for block in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        entry = block + tl.arange(0, BLOCK_K)
        factor = tl.load(upstream_ptr + entry, mask=entry < k, other=0.0)
        ids = tl.load(ids_ptr + entry, mask=entry < k, other=-1).to(tl.int64)
        read = (factor != 0) & (ids >= 0) & (ids < vocab)
        offset = (tl.where(read, ids, 0) * weight_stride)[:, None] + column[None, :]
        w = tl.load(weight_ptr + offset, mask=read[:, None] & (column < width)[None, :], other=0.0)
        factor = tl.where(read, factor, 0.0)
        total = tl.fma(w.to(tl.float32), factor[:, None], total)
    store_rounded(out_ptr + row * width + column, tl.sum(total, axis=0), column < width)


@triton.jit
def _add_entries(total, first, count, head, gap, factors_ptr, rows_ptr, hidden_ptr, hidden_unit,
                 column, width, ENTRIES: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Adds factor * hidden of ``count`` sorted entries to [ENTRIES, BLOCK_H] sums.

    They begin at ``first``. After the first ``head`` entries, ``gap`` entries are skipped.
    """
    for block in tl.range(0, count, ENTRIES, num_stages=STAGES):
        entry = block + tl.arange(0, ENTRIES)
        place = first + entry + tl.where(entry < head, 0, gap)
        factor = tl.load(factors_ptr + place, mask=entry < count, other=0.0)
        row = tl.load(rows_ptr + place, mask=entry < count, other=0)
        offset = (row * hidden_unit)[:, None] + column[None, :]
        inside = (entry < count)[:, None] & (column < width)[None, :]
        h = tl.load(hidden_ptr + offset, mask=inside, other=0.0)
        total = tl.fma(h.to(tl.float32), factor[:, None], total)
    return total


@triton.jit(do_not_specialize=["vocab", "chunk"])
def chunk_sums_kernel(
    keys_ptr, factors_ptr, rows_ptr, hidden_ptr, sums_ptr,
    vocab: tl.int32, chunk: tl.int32, width, hidden_unit,
    ENTRIES: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sum of each chunk of sorted entries that lies in one segment; others have no sum."""
    first = tl.program_id(0) * chunk
    key = tl.load(keys_ptr + first)
    if (key >= vocab) | (key != tl.load(keys_ptr + first + chunk - 1)):
        return
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([ENTRIES, BLOCK_H], tl.float32)
    total = _add_entries(
        total, first, chunk, chunk, 0, factors_ptr, rows_ptr, hidden_ptr, hidden_unit,
        column, width, ENTRIES, STAGES,
    )  # fmt: skip
    offset = tl.program_id(0).to(tl.int64) * width + column
    tl.store(sums_ptr + offset, tl.sum(total, axis=0), mask=column < width)


@triton.jit(do_not_specialize=["chunk"])
def weight_grad_kernel(
    segments_ptr, factors_ptr, rows_ptr, hidden_ptr, sums_ptr, out_ptr,
    chunk: tl.int32, width, hidden_unit,
    ENTRIES: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """BLOCK_H columns of a vocabulary row's gradient: its whole chunks, then the other entries.

    All rows of one slice of columns come before the next slice, so that the hidden states' slice
    stays in the cache. Most segments have no or few entries: filling a pipeline would take longer.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    out_ptr += row * width
    start = tl.load(segments_ptr + row)
    stop = tl.load(segments_ptr + row + 1)
    if start == stop:
        nothing = tl.zeros([BLOCK_H], out_ptr.dtype.element_ty)
        tl.store(out_ptr + column, nothing, mask=column < width)
        return
    first = tl.cdiv(start, chunk)
    chunks = tl.maximum(stop // chunk - first, 0)
    total = tl.zeros([ENTRIES, BLOCK_H], tl.float32)
    for block in range(0, chunks, ENTRIES):
        member = block + tl.arange(0, ENTRIES)
        offset = ((first + member).to(tl.int64) * width)[:, None] + column[None, :]
        inside = (member < chunks)[:, None] & (column < width)[None, :]
        total += tl.load(sums_ptr + offset, mask=inside, other=0.0)
    head = tl.where(chunks > 0, first * chunk, stop) - start
    gap = chunks * chunk
    total = _add_entries(
        total, start, stop - start - gap, head, gap, factors_ptr, rows_ptr, hidden_ptr, hidden_unit,
        column, width, ENTRIES, 1,
    )  # fmt: skip
    store_rounded(out_ptr + column, tl.sum(total, axis=0), column < width)
