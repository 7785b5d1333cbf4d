"""The dense gradient of a row from its k entries, written once.

A program per row and piece of it: zeros by 16-byte stores, a barrier, then the entries that fall
into the piece, while its lines are in the cache. Bytes: V elements written, k ids and gradients
read. ``add_kernel`` touches the entries alone.
"""

import triton
import triton.language as tl

from opd_kernels.backends.triton.rows import align_row, row_start, store_rounded


@triton.jit(do_not_specialize=["width", "k", "inner", "outer_stride", "inner_stride"])
def scatter_kernel(
    out_ptr, ids_ptr, grad_ptr, upstream_ptr,
    width: tl.int32, k: tl.int32, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64,
    PIECE: tl.constexpr, TILE: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    """out = 0, then upstream * entry gradient at the ids, of one piece of a row."""
    row = tl.program_id(0).to(tl.int64)
    out_ptr += row_start(row, inner, outer_stride, inner_stride)
    start_ptr, skip = align_row(out_ptr)
    first = tl.program_id(1) * PIECE
    stop = tl.minimum(first + PIECE, skip + width)
    _clear(start_ptr, skip, first, stop, TILE)
    tl.debug_barrier()
    entry = tl.arange(0, K_PAD)
    ids = tl.load(ids_ptr + row * k + entry, mask=entry < k, other=-1)
    inside = (ids >= 0) & (ids + skip >= first) & (ids + skip < stop)
    grad = tl.load(grad_ptr + row * k + entry, mask=inside, other=0.0)
    store_rounded(out_ptr + ids, tl.load(upstream_ptr + row) * grad, inside)


@triton.jit
def _clear(start_ptr, skip, first, stop, TILE: tl.constexpr):
    """Zeros at the elements [max(skip, first), stop), counted from the row's aligned start."""
    DTYPE: tl.constexpr = start_ptr.dtype.element_ty
    CHUNK: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    body = tl.cdiv(tl.maximum(first, skip), CHUNK)  # the first whole chunk
    end = stop // CHUNK  # after the last
    for tile in range(first, end * CHUNK, TILE):
        place = tile + tl.arange(0, TILE)
        chunk = place // CHUNK
        tl.store(start_ptr + place, tl.zeros([TILE], DTYPE), mask=(chunk >= body) & (chunk < end))
    # What is left at a row's ends is less than a chunk.
    lane = tl.arange(0, CHUNK)
    head = tl.where(first == 0, stop, 0)
    tl.store(start_ptr + lane, tl.zeros([CHUNK], DTYPE), mask=(lane >= skip) & (lane < head))
    place = end * CHUNK + lane
    tl.store(start_ptr + place, tl.zeros([CHUNK], DTYPE), mask=(place >= skip) & (place < stop))


@triton.jit(do_not_specialize=["width", "k", "inner", "outer_stride", "inner_stride"])
def add_kernel(
    out_ptr, ids_ptr, grad_ptr, upstream_ptr,
    width: tl.int32, k: tl.int32, inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64,
    K_PAD: tl.constexpr,
):  # fmt: skip
    """out += upstream * entry gradient at the ids; an id occurs in a row once."""
    row = tl.program_id(0).to(tl.int64)
    out_ptr += row_start(row, inner, outer_stride, inner_stride)
    entry = tl.arange(0, K_PAD)
    ids = tl.load(ids_ptr + row * k + entry, mask=entry < k, other=-1)
    inside = (ids >= 0) & (ids < width)
    grad = tl.load(grad_ptr + row * k + entry, mask=inside, other=0.0)
    before = tl.load(out_ptr + ids, mask=inside, other=0.0).to(tl.float32)
    store_rounded(out_ptr + ids, before + tl.load(upstream_ptr + row) * grad, inside)
