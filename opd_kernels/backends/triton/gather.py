"""A student's values at the ids of a support, and which of the ids take part.

A program takes a few rows and all their entries, so that each thread has several loads in flight.
Bytes: N K ids, and a sector of 32 bytes of the logits for each entry that takes part; values and
slots are written once.
"""

import triton
import triton.language as tl

from opd_kernels.backends.triton.rows import allowed_ids, row_start


@triton.jit(
    do_not_specialize=[
        "limit", "rows", "k", "inner", "outer_stride", "inner_stride",
        "ids_inner", "ids_outer_stride", "ids_inner_stride",
    ]
)  # fmt: skip
def gather_kernel(
    student_ptr, ids_ptr, banned_ptr, mask_ptr, values_ptr, slots_ptr,
    limit: tl.int32, rows: tl.int32, k: tl.int32,
    inner: tl.int64, outer_stride: tl.int64, inner_stride: tl.int64,
    ids_inner: tl.int64, ids_outer_stride: tl.int64, ids_inner_stride: tl.int64,
    ROWS: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    """Values (0 where absent) and slots (-1 where absent) of ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    entry = tl.arange(0, K_PAD)[None, :]
    read = row < rows
    inside = read[:, None] & (entry < k)  # [ROWS, K_PAD]
    if mask_ptr is not None:
        read = read & (tl.load(mask_ptr + row, mask=read, other=0) != 0)
    ids_ptr += row_start(row, ids_inner, ids_outer_stride, ids_inner_stride)[:, None]
    ids = tl.load(ids_ptr + entry, mask=inside & read[:, None], other=-1)
    ids, present = allowed_ids(ids, limit, banned_ptr)
    student_ptr += row_start(row, inner, outer_stride, inner_stride)[:, None]
    values = tl.load(student_ptr + ids, mask=present, other=0.0).to(tl.float32)
    place = row[:, None] * k + entry
    tl.store(values_ptr + place, values, mask=inside)
    tl.store(slots_ptr + place, tl.where(present, entry, -1), mask=inside)
