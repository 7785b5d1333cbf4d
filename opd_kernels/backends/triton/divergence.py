"""The renormalised reverse KL of each row and its entry gradients.

    p = softmax(z / T),  q = softmax(t / T'),  l = log p - log q      over the present entries
    L = sum p l,         dL/dz = p (l - L) / T

A program per row. If the teacher is logits, it selects the support first, in the same kernel: it
reads the teacher's row once, then k of the student's values. It writes nothing of the vocabulary's
size. ``csrc/common/divergence.h`` says how l stays accurate where p is nearly q, and names the
traps.
"""

import triton
import triton.language as tl

from opd_kernels.backends.triton.mathematics import (
    exp,
    expm1_near_zero,
    finite,
    log,
    log1p_near_zero,
)
from opd_kernels.backends.triton.rows import is_banned, row_start, row_temperature
from opd_kernels.backends.triton.select import keys_row, select_row, stream_maxima


@triton.jit
def _row_divergence(student_ptr, ids, values, present, temperature, teacher_temperature):
    """(loss, entry gradients, whether the row is NaN) of a row on its present entries.

    NaN or +inf at an entry that takes part, or a NaN temperature, make the row NaN; the caller
    writes it. Without an entry, or without a student value above -inf, loss and gradients are 0.
    """
    NEVER: tl.constexpr = -float("inf")
    t = tl.where(present, values, NEVER)
    z = tl.load(student_ptr + tl.where(present, ids, 0), mask=present, other=0.0).to(tl.float32)
    z = tl.where(present, z, NEVER)
    bad = present & ~((z < float("inf")) & (t < float("inf")))
    # A temperature that is not allowed is NaN by now.
    both = tl.zeros_like(z) + temperature + teacher_temperature
    bad = bad | ((z > NEVER) & (both != both))

    student_max, teacher_max = tl.max(z), tl.max(t)
    exp_student = tl.where(z > NEVER, exp(tl.div_rn(z - student_max, temperature)), 0.0)
    exp_teacher = tl.where(present, exp(tl.div_rn(t - teacher_max, teacher_temperature)), 0.0)
    d = _scaled(z, student_max, temperature) - _scaled(t, teacher_max, teacher_temperature)
    d = tl.where(present, finite(d.to(tl.float32)), 0.0)
    change = tl.where(tl.abs(d) <= 0.5, exp_teacher * expm1_near_zero(d), exp_student - exp_teacher)
    student_sum, teacher_sum = tl.sum(exp_student), tl.sum(exp_teacher)
    log_sums = tl.where(
        tl.sum(tl.abs(change)) < 0.25 * teacher_sum,
        log1p_near_zero(tl.div_rn(tl.sum(change), teacher_sum)),
        log(student_sum) - log(teacher_sum),
    )
    ratio = d - log_sums
    p = tl.div_rn(exp_student, student_sum)
    loss = tl.sum(tl.where(p > 0, p * ratio, 0.0))
    grad = tl.where(p > 0, tl.div_rn(p * (ratio - loss), temperature), 0.0)
    return loss, finite(grad), tl.max(bad.to(tl.int32)) > 0


@triton.jit
def _scaled(x, maximum, temperature):
    """(x - max) / T in float64, so that the difference of two of them is exact to float32."""
    return (x.to(tl.float64) - maximum) * (tl.full([1], 1.0, tl.float64) / temperature)


@triton.jit
def store_row(loss_ptr, ids_ptr, grad_ptr, row, k, loss, ids, grad, poisoned, K_PAD: tl.constexpr):
    """Writes a row's results, NaN in place of numbers if it is poisoned."""
    entry = tl.arange(0, K_PAD)
    tl.store(loss_ptr + row, tl.where(poisoned, float("nan"), loss))
    tl.store(ids_ptr + row * k + entry, ids, mask=entry < k)
    grad = tl.where(poisoned, float("nan"), grad)
    tl.store(grad_ptr + row * k + entry, tl.where(ids >= 0, grad, 0.0), mask=entry < k)


@triton.jit
def store_masked_row(loss_ptr, ids_ptr, grad_ptr, row, k, K_PAD: tl.constexpr):
    """Writes the results of a row that takes no part."""
    absent = tl.full([K_PAD], -1, tl.int32)
    nothing = tl.zeros([K_PAD], tl.float32)
    store_row(loss_ptr, ids_ptr, grad_ptr, row, k, 0.0, absent, nothing, False, K_PAD)


@triton.jit(
    do_not_specialize=[
        "temperature", "teacher_temperature", "width", "k",
        "student_inner", "student_outer_stride", "student_inner_stride",
        "teacher_inner", "teacher_outer_stride", "teacher_inner_stride",
    ]
)  # fmt: skip
def logits_divergence_kernel(
    student_ptr, teacher_ptr, banned_ptr, mask_ptr, temperatures_ptr, teacher_temperatures_ptr,
    keys_ptr, loss_ptr, ids_ptr, grad_ptr,
    temperature: tl.float32, teacher_temperature: tl.float32, width: tl.int32, k: tl.int32,
    student_inner: tl.int64, student_outer_stride: tl.int64, student_inner_stride: tl.int64,
    teacher_inner: tl.int64, teacher_outer_stride: tl.int64, teacher_inner_stride: tl.int64,
    STREAMED: tl.constexpr, GROUP: tl.constexpr, GROUPS_PAD: tl.constexpr, CLAN: tl.constexpr,
    K_PAD: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Selection and divergence against a teacher's logits."""
    row = tl.program_id(0).to(tl.int64)
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            store_masked_row(loss_ptr, ids_ptr, grad_ptr, row, k, K_PAD)
            return
    teacher_ptr += row_start(row, teacher_inner, teacher_outer_stride, teacher_inner_stride)
    keys_ptr = keys_row(keys_ptr, row, width, GROUP)
    if not STREAMED:
        stream_maxima(teacher_ptr, keys_ptr, width, 0, 1, GROUP, TILE, STAGES)
    ids, values = select_row(
        teacher_ptr, keys_ptr, banned_ptr, ids_ptr + row * k, width, k,
        GROUP, GROUPS_PAD, CLAN, K_PAD,
    )  # fmt: skip
    present = (ids >= 0) & (values != -float("inf"))
    student_ptr += row_start(row, student_inner, student_outer_stride, student_inner_stride)
    loss, grad, poisoned = _row_divergence(
        student_ptr, ids, values, present,
        row_temperature(temperature, temperatures_ptr, row),
        row_temperature(teacher_temperature, teacher_temperatures_ptr, row),
    )  # fmt: skip
    ids = tl.where(present, ids, -1)
    store_row(loss_ptr, ids_ptr, grad_ptr, row, k, loss, ids, grad, poisoned, K_PAD)


@triton.jit(
    do_not_specialize=[
        "temperature", "teacher_temperature", "width", "k",
        "student_inner", "student_outer_stride", "student_inner_stride",
    ]
)  # fmt: skip
def support_divergence_kernel(
    student_ptr, values_ptr, support_ptr, banned_ptr, mask_ptr,
    temperatures_ptr, teacher_temperatures_ptr, loss_ptr, ids_ptr, grad_ptr,
    temperature: tl.float32, teacher_temperature: tl.float32, width: tl.int32, k: tl.int32,
    student_inner: tl.int64, student_outer_stride: tl.int64, student_inner_stride: tl.int64,
    K_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Divergence on a support that is given: contiguous (N, K) ids and values, in any order."""
    row = tl.program_id(0).to(tl.int64)
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            store_masked_row(loss_ptr, ids_ptr, grad_ptr, row, k, K_PAD)
            return
    student_ptr += row_start(row, student_inner, student_outer_stride, student_inner_stride)
    entry = tl.arange(0, K_PAD)
    support = tl.load(support_ptr + row * k + entry, mask=entry < k, other=-1)
    values = tl.load(values_ptr + row * k + entry, mask=entry < k, other=0.0).to(tl.float32)
    present = (support >= 0) & (support < width) & (values != -float("inf"))
    ids = tl.where(present, support, -1).to(tl.int32)
    if banned_ptr is not None:
        present = present & ~is_banned(banned_ptr, ids, present)
        ids = tl.where(present, ids, -1)
    loss, grad, poisoned = _row_divergence(
        student_ptr, ids, values, present,
        row_temperature(temperature, temperatures_ptr, row),
        row_temperature(teacher_temperature, teacher_temperatures_ptr, row),
    )  # fmt: skip
    store_row(loss_ptr, ids_ptr, grad_ptr, row, k, loss, ids, grad, False, K_PAD)
    tl.debug_barrier()
    ids, grad = merge_duplicates(ids_ptr + row * k, grad_ptr + row * k, ids, grad, k, K_PAD, BLOCK)
    tl.debug_barrier()
    store_row(loss_ptr, ids_ptr, grad_ptr, row, k, loss, ids, grad, poisoned, K_PAD)


@triton.jit
def merge_duplicates(ids_ptr, grad_ptr, ids, grad, k, K_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the gradients of equal ids into the first of them; the others become absent.

    Terms are scaled by 2^-11, so that the sum of 1024 of the largest floats cannot overflow.
    """
    entry = tl.arange(0, K_PAD)[None, :]
    total = tl.zeros([BLOCK, K_PAD], tl.float32)
    same = tl.zeros([BLOCK, K_PAD], tl.int32)
    earlier = tl.zeros([BLOCK, K_PAD], tl.int32)
    for block in range(0, k, BLOCK):
        other = block + tl.arange(0, BLOCK)
        other_ids = tl.load(ids_ptr + other, mask=other < k, other=-1)[:, None]
        other_grad = tl.load(grad_ptr + other, mask=other < k, other=0.0)[:, None]
        equal = ids[None, :] == other_ids  # [BLOCK, K_PAD]
        total += tl.where(equal, other_grad * 2.0**-11, 0.0)
        same += equal.to(tl.int32)
        earlier += (equal & (other[:, None] < entry)).to(tl.int32)
    merged = finite(tl.sum(total, axis=0) * 2.0**11)
    grad = tl.where(tl.sum(same, axis=0) > 1, merged, grad)
    return tl.where(tl.sum(earlier, axis=0) > 0, -1, ids), grad
