"""The dense gradient of a row from its k entries, written once.

A program per row and piece of it: zeros by 16-byte stores, a barrier, then the entries that fall
into the piece, while its lines are in the cache. Bytes: V elements written, k ids and gradients
read. ``add_kernel`` touches the entries alone. ``background_kernel`` writes a factor times the
student's softmax in place of zeros, and reads V elements more.
"""

import triton
import triton.language as tl

from opd_kernels.backends.triton.mathematics import LARGEST, exp, scalar
from opd_kernels.backends.triton.rows import align_row, row_start, row_temperature, store_rounded

LOG2_E = tl.constexpr(1.44269504)


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
    _store_entries(out_ptr, ids_ptr, grad_ptr, upstream_ptr, row, skip, first, stop, k, K_PAD)


@triton.jit
def _store_entries(out_ptr, ids_ptr, grad_ptr, upstream_ptr, row, skip, first, stop, k,
                   K_PAD: tl.constexpr):  # fmt: skip
    """upstream * entry gradient at the ids whose elements are in [first, stop)."""
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


@triton.jit(
    do_not_specialize=[
        "temperature", "width", "limit", "k", "inner", "outer_stride", "inner_stride",
        "logits_inner", "logits_outer_stride", "logits_inner_stride",
    ]
)  # fmt: skip
def background_kernel(
    out_ptr, logits_ptr, ids_ptr, grad_ptr, upstream_ptr, factors_ptr, logsumexp_ptr,
    temperatures_ptr,
    temperature: tl.float32, width: tl.int32, limit: tl.int32, k: tl.int32,
    inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64,
    logits_inner: tl.int64, logits_outer_stride: tl.int64, logits_inner_stride: tl.int64,
    ALIKE: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, K_PAD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out = upstream * factor * exp(z / T - logsumexp), then the entries, of one piece of a row.

    From ``limit`` on, and in a row whose upstream * factor is 0, it is 0 and z is not read. ``out``
    may be z. ALIKE: their rows start equally far from 16 bytes; if not, z is loaded by elements.
    """
    row = tl.program_id(0).to(tl.int64)
    out_ptr += row_start(row, inner, outer_stride, inner_stride)
    logits_ptr += row_start(row, logits_inner, logits_outer_stride, logits_inner_stride)
    start_ptr, skip = align_row(out_ptr)
    first = tl.program_id(1) * PIECE
    stop = tl.minimum(first + PIECE, skip + width)
    upstream, factor = tl.load(upstream_ptr + row), tl.load(factors_ptr + row)
    used = (factor != 0) & (upstream * factor != 0)
    read = tl.where(used, skip + limit, 0)
    temperature = scalar(row_temperature(temperature, temperatures_ptr, row))
    logsumexp = tl.load(logsumexp_ptr + row)
    middle, scale = _softmax(upstream, factor, logsumexp, temperature)
    softmax = middle, 88 * temperature, _exponent(temperature), scale
    _store_background(start_ptr, logits_ptr, skip, first, stop, read, softmax, ALIKE, TILE, STAGES)
    tl.debug_barrier()
    _store_entries(out_ptr, ids_ptr, grad_ptr, upstream_ptr, row, skip, first, stop, k, K_PAD)


@triton.jit
def _softmax(upstream, factor, logsumexp, temperature):
    """(middle, scale): upstream factor exp(z / T - logsumexp) = scale exp((z - middle) / T).

    ``middle`` is near T logsumexp: however small T is, the difference is exact where it matters,
    and scale over upstream factor is between 1 / V and V.
    """
    wide = temperature.to(tl.float64)
    middle = _limited((logsumexp * wide).to(tl.float32))
    rest = logsumexp - middle / wide
    near = rest.to(tl.float32)
    power = exp(tl.minimum(-near, 89.0)) * (1.0 - (rest - near).to(tl.float32))
    scale = (upstream.to(tl.float64) * factor * power).to(tl.float32)
    # Of finite values it stays finite, so that a p of 0 gives 0.
    known = (tl.abs(upstream) <= LARGEST) & (tl.abs(factor) <= LARGEST)
    return middle, tl.where(known, _limited(scale), scale)


@triton.jit
def _limited(x):
    """Infinities become the largest floats, NaN stays."""
    return tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))


@triton.jit
def _exponent(temperature):
    """log2(e) / T, within what keeps a product with 0 at 0 and one with -inf at -inf."""
    MOST: tl.constexpr = LARGEST
    LEAST: tl.constexpr = 3.74e-37
    given = tl.div_rn(scalar(LOG2_E), temperature)
    return tl.where(given > MOST, MOST, tl.where(given < LEAST, LEAST, given))


@triton.jit
def _background(z, place, read, softmax):
    """The values of elements, 0 from ``read`` on; p exceeds 1 at most at entries."""
    middle, most, exponent, scale = softmax
    x = z.to(tl.float32) - middle
    p = tl.exp2(tl.where(x > most, most, x) * exponent)
    return tl.where(place < read, p * scale, 0.0)


@triton.jit
def _store_background(start_ptr, logits_ptr, skip, first, stop, read, softmax,
                      ALIKE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Background at the elements [max(skip, first), stop), counted from the row's aligned start.

    Chunks of 16 bytes are loaded before they are stored, and each by one program, so ``out`` may be
    z. What a chunk holds of other rows is not used.
    """
    DTYPE: tl.constexpr = start_ptr.dtype.element_ty
    CHUNK: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    body = tl.cdiv(tl.maximum(first, skip), CHUNK)  # the first whole chunk
    end = stop // CHUNK  # after the last
    if ALIKE:
        chunks_ptr, _ = align_row(logits_ptr)
    for tile in tl.range(first, end * CHUNK, TILE, num_stages=STAGES):
        place = tile + tl.arange(0, TILE)
        chunk = place // CHUNK
        if ALIKE:
            z = tl.load(chunks_ptr + place, mask=chunk < tl.cdiv(read, CHUNK))
        else:
            z = tl.load(logits_ptr + (place - skip), mask=(place >= skip) & (place < read))
        values = _background(z, place, read, softmax)
        store_rounded(start_ptr + place, values, (chunk >= body) & (chunk < end))
    # What is left at a row's ends is less than a chunk each.
    lane = tl.arange(0, 2 * CHUNK)
    head = (lane >= skip) & (lane < tl.where(first == 0, tl.minimum(body * CHUNK, stop), 0))
    tail = tl.maximum(body, end) * CHUNK + lane - CHUNK
    place = tl.where(lane < CHUNK, lane, tail)
    inside = tl.where(lane < CHUNK, head, tail < stop)
    z = tl.load(logits_ptr + (place - skip), mask=inside & (place < read))
    tl.debug_barrier()
    store_rounded(start_ptr + place, _background(z, place, read, softmax), inside)


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
