"""Rows in memory and the order of their values: the first and last steps of every kernel here."""

import triton
import triton.language as tl


@triton.jit
def row_start(row, inner, outer_stride, inner_stride):
    """Offset in elements of a row whose number runs over two leading dimensions."""
    return (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def row_temperature(value, values_ptr, row):
    """A row's temperature: its own if there is memory of them."""
    if values_ptr is None:
        return value
    else:
        return tl.load(values_ptr + row)


@triton.jit
def align_row(row_ptr):
    """(pointer to the 16 bytes that hold the row's first element, elements before it in them).

    Loads from there on are 16 bytes wide, wherever the row starts. A chunk of 16 bytes never
    crosses a page, so its bytes outside the row are safe to load.
    """
    DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    address = row_ptr.to(tl.int64)
    aligned = address // 16 * 16
    skip = ((address - aligned) // BYTES).to(tl.int32)
    return tl.multiple_of(aligned.to(tl.pointer_type(DTYPE)), 16), skip


@triton.jit
def order_key(values):
    """int32 keys whose order is the selection's; they fit into the width of the dtype.

    Sign times magnitude: -0 and +0 share key 0. Every NaN gets the largest key.
    """
    BITS: tl.constexpr = values.dtype.primitive_bitwidth
    NAN_KEY: tl.constexpr = (1 << (BITS - 1)) - 1
    if BITS == 16:
        bits = values.to(tl.int16, bitcast=True).to(tl.int32)
    else:
        bits = values.to(tl.int32, bitcast=True)
    sign = bits >> 31
    key = ((bits & NAN_KEY) ^ sign) - sign
    wide = values.to(tl.float32)
    return tl.where(wide == wide, key, NAN_KEY)


@triton.jit
def key_value(keys, DTYPE: tl.constexpr):
    """float32 values of keys: the inverse of ``order_key``, with +0 for -0 and one NaN."""
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    sign = keys >> 31
    bits = ((keys ^ sign) - sign) | (sign << (BITS - 1))
    if BITS == 16:
        bits = bits.to(tl.int16)
    return bits.to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def widened_pairs(values):
    """(even, odd) float32 elements of [.., even size], in an instruction each.

    The bits of two bfloat16 are put into a word again, as they lie in a register, and taken apart
    by a shift and a mask.
    """
    SHAPE: tl.constexpr = values.shape[:-1] + [values.shape[-1] // 2, 2]
    even, odd = tl.split(tl.reshape(values, SHAPE))
    if values.dtype == tl.bfloat16:
        even_bits = even.to(tl.uint16, bitcast=True).to(tl.uint32)
        odd_bits = odd.to(tl.uint16, bitcast=True).to(tl.uint32)
        words = (odd_bits << 16) | even_bits
        even = (words << 16).to(tl.float32, bitcast=True)
        odd = (words & 0xFFFF0000).to(tl.float32, bitcast=True)
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def is_banned(banned_ptr, ids, mask):
    """The bitmap's bits at the ids; False where ``mask`` is False."""
    byte = tl.load(banned_ptr + (ids >> 3), mask=mask, other=0).to(tl.int32)
    return ((byte >> (ids & 7)) & 1) != 0


@triton.jit
def allowed_ids(ids, limit, banned_ptr):
    """(int64 ids, 0 for absent ones; which are present)."""
    present = (ids >= 0) & (ids < limit)
    ids = tl.where(present, ids, 0).to(tl.int64)
    if banned_ptr is not None:
        present = present & ~is_banned(banned_ptr, ids, present)
    return ids, present


@triton.jit
def store_rounded(ptr, values, mask):
    """Stores float32 values in the pointer's dtype, to nearest, ties to even.

    bfloat16 is rounded by hand: Triton's interpreter, where these kernels are tested, truncates.
    """
    if ptr.dtype.scalar.element_ty == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(values == values, rounded, 0x7FC0)
        tl.store(ptr.to(tl.pointer_type(tl.int16)), rounded.to(tl.int16), mask=mask)
    else:
        tl.store(ptr, values.to(ptr.dtype.scalar.element_ty), mask=mask)
