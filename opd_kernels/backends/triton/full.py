"""Any divergence of each row on a given support, and its entry gradients.

    p = exp(z / T - lse_s),  q = exp(t / T' - lse_t)

Renormalised, lse is over the support's present entries. Otherwise it is over these and a tail, the
log-sum-exp of everything else, which is given. ``csrc/common/full.h`` says what the tail and a
sampled token add, and how entry gradients and the factor of p elsewhere follow from slopes.

A program per row. Bytes of a row: k ids and values, a sector of 32 bytes of the student's row for
each entry, 8 k out.
"""

import triton
import triton.language as tl

from opd_kernels.backends.triton.divergence import (
    merge_duplicates,
    store_masked_row,
    store_row,
)
from opd_kernels.backends.triton.mathematics import exp, finite, log, log1p_near_zero, scalar
from opd_kernels.backends.triton.members import (
    clamped,
    exp_change,
    kappa_of,
    row_member,
    terms,
)
from opd_kernels.backends.triton.rows import is_banned, row_start, row_temperature

NEVER = tl.constexpr(-float("inf"))
# A tail whose slope is so many times its p has a background relative to the tail itself: p has few
# digits there, or none.
FAR_TAIL = tl.constexpr(1e25)


@triton.jit
def _row_full_divergence(
    z, t, present, temperature, teacher_temperature, student_tail, teacher_tail, member, floor,
    token, token_z, token_t,
    OUTSIDE: tl.constexpr, REVERSE: tl.constexpr, FORWARD: tl.constexpr, SKEW: tl.constexpr,
    STOP: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """(loss, entry gradients, factor, token's gradient, log-sum-exp, fill, whether to take it).

    z and t are -inf where an entry is absent. The tails are float64, -inf where there is none.
    ``token`` says whether there is one. NaN or +inf makes the row NaN, and a side of nothing but
    -inf makes it 0. The factor is that of exp(z / T - log-sum-exp) elsewhere.
    """
    bad = present & ~((z < float("inf")) & (t < float("inf")))
    poisoned = (tl.max(bad.to(tl.int32)) > 0) | ~(student_tail < float("inf"))
    poisoned = poisoned | ~(teacher_tail < float("inf"))
    if OUTSIDE == "sample":
        poisoned = poisoned | (token & ~((token_z < float("inf")) & (token_t < float("inf"))))
    student_max, teacher_max = tl.max(z), tl.max(t)
    empty = (student_max == NEVER) & (student_tail == NEVER)
    empty = empty | ((teacher_max == NEVER) & (teacher_tail == NEVER))
    # A temperature that is not allowed is NaN by now.
    both = temperature + teacher_temperature
    replaced = poisoned | empty | (both != both)
    fill = tl.where(empty & ~poisoned, 0.0, float("nan"))

    student, student_reference = _side(student_max, student_tail, temperature)
    teacher, teacher_reference = _side(teacher_max, teacher_tail, teacher_temperature)
    s, u = _relative(z, student, student_reference), _relative(t, teacher, teacher_reference)
    s_tail = tl.where(student_tail == NEVER, NEVER, student_tail - student_reference)
    u_tail = tl.where(teacher_tail == NEVER, NEVER, teacher_tail - teacher_reference)
    d, d_tail = _difference(s, u), _difference(s_tail, u_tail)
    s32, u32 = s.to(tl.float32), u.to(tl.float32)
    s_tail32, u_tail32 = s_tail.to(tl.float32), u_tail.to(tl.float32)
    p, q, p_tail, q_tail = exp(s32), exp(u32), exp(s_tail32), exp(u_tail32)
    change, change_tail = exp_change(p, q, d), exp_change(p_tail, q_tail, d_tail)
    student_sum, teacher_sum = tl.sum(p) + p_tail, tl.sum(q) + q_tail
    total_change = tl.sum(change) + change_tail
    size = tl.sum(tl.abs(change)) + tl.abs(change_tail)
    student_log, teacher_log = log(student_sum), log(teacher_sum)
    log_sums = tl.where(
        size < 0.25 * teacher_sum,
        log1p_near_zero(tl.div_rn(total_change, teacher_sum)),
        student_log - teacher_log,
    )

    kappa = kappa_of(member, REVERSE, FORWARD, SKEW, STOP, OUTSIDE)
    p, q = tl.div_rn(p, student_sum), tl.div_rn(q, teacher_sum)
    p_tail, q_tail = tl.div_rn(p_tail, student_sum), tl.div_rn(q_tail, teacher_sum)
    log_ratio, floored_p, floored_q, live = _floored(
        d - log_sums, p, q, s32 - student_log, u32 - teacher_log, floor, FLOOR
    )
    value, rest, _ = terms(
        floored_p, floored_q, log_ratio, member, REVERSE, FORWARD, SKEW, STOP, OUTSIDE
    )
    rest = tl.where(live, rest, -kappa * p)
    value, rest = tl.where(present, value, 0.0), tl.where(present, rest, 0.0)
    # In float64 no sum of finite terms overflows.
    loss, total_rest = tl.sum(value.to(tl.float64)), tl.sum(rest.to(tl.float64))

    balance = 0.0  # kappa (1 - P)
    tail_rest, tail_slope = p_tail * 0.0, p_tail * 0.0
    token_rest, token_p = p_tail * 0.0, p_tail * 0.0
    if OUTSIDE == "bucket":
        log_ratio, floored_p, floored_q, live = _floored(
            d_tail - log_sums, p_tail, q_tail,
            s_tail32 - student_log, u_tail32 - teacher_log, floor, FLOOR,
        )  # fmt: skip
        own_value, own_rest, relative = terms(
            floored_p, floored_q, log_ratio, member, REVERSE, FORWARD, SKEW, STOP, OUTSIDE
        )
        # Where the teacher has no tail, it is an absent entry of slope 0.
        listed = teacher_tail > NEVER
        own_rest = tl.where(listed & live, own_rest, -kappa * p_tail)
        loss += tl.where(listed, own_value, 0.0)
        total_rest += own_rest
        tail_rest = tl.where(listed & live, relative, -kappa)
        tail_slope = tl.where(listed, own_rest, 0.0)
    elif OUTSIDE != "renormalize":
        balance = kappa * p_tail
    if OUTSIDE == "sample":
        relative = _relative(token_z, student, student_reference)
        relative_t = _relative(token_t, teacher, teacher_reference)
        token32 = relative.to(tl.float32)
        token_p = tl.div_rn(exp(token32), student_sum)
        log_ratio, floored_p, floored_q, live = _floored(
            _difference(relative, relative_t) - log_sums, token_p, token_p,
            token32 - student_log, relative_t.to(tl.float32) - teacher_log, floor, FLOOR,
        )  # fmt: skip
        ratio = tl.where(token, finite(member[0] * clamped(log_ratio, member[6])), 0.0)
        token_rest = tl.where(live, ratio, 0.0)
        loss += ratio
        total_rest += token_rest

    total_rest = finite(total_rest.to(tl.float32))
    grad = _gradient(rest, p, total_rest, balance, temperature)
    token_grad = _gradient(token_rest, token_p, total_rest, balance, temperature)
    logsumexp = student_reference + student_log.to(tl.float64)
    # -c is -(kappa P + rests), and 1 - P is p of the tail where P is not 1.
    alpha = tail_rest - total_rest
    if OUTSIDE != "bucket":
        alpha = -(kappa - balance) - total_rest
    factor = finite(tl.div_rn(alpha, temperature))
    if OUTSIDE == "bucket":
        near = tl.abs(tail_rest) < FAR_TAIL
        # p_j over p of the tail does not vanish with the latter.
        own = _gradient(tail_slope, p_tail, total_rest, balance, temperature)
        factor = tl.where(near, factor, tl.where(student_tail > NEVER, own, 0.0))
        logsumexp = tl.where(near | (student_tail == NEVER), logsumexp, student_tail)
    return loss.to(tl.float32), grad, factor, token_grad, logsumexp, fill, replaced


@triton.jit
def _side(largest, tail, temperature):
    """(1 / T, what a side's values over T are relative to: the largest, or the tail), float64."""
    factor = 1.0 / temperature.to(tl.float64)
    most = tl.where(largest == NEVER, NEVER, largest.to(tl.float64) * factor)
    return factor, tl.where(most < tail, tail, most)


@triton.jit
def _relative(values, factor, reference):
    """Not above 0, although huge values round before the reference is subtracted."""
    relative = values.to(tl.float64) * factor - reference
    relative = tl.where(relative > 0, 0.0, relative)
    return tl.where(values == NEVER, NEVER, relative)


@triton.jit
def _difference(s, u):
    """s - u of relative values: that of an absent pair is 0."""
    d = finite((s - u).to(tl.float32))
    return tl.where(s == NEVER, tl.where(u == NEVER, 0.0, NEVER), d)


@triton.jit
def _floored(log_ratio, p, q, a, b, floor, FLOOR: tl.constexpr):
    """(log ratio, p, q) with log-probs a and b at the floor or above, and whether a is."""
    if not FLOOR:
        return log_ratio, p, q, p == p
    else:
        live = a >= floor
        least = exp(floor)
        p, q = tl.where(live, p, least), tl.where(b >= floor, q, least)
        floored = tl.maximum(a, floor) - tl.maximum(b, floor)
        return tl.where(live & (b >= floor), log_ratio, floored), p, q, live


@triton.jit
def _gradient(rest, p, total_rest, balance, temperature):
    """slope - c p over T, of an entry's rest and the sum of all."""
    return finite(tl.div_rn(rest - total_rest * p + balance * p, temperature))


@triton.jit
def _listed(support_ptr, values_ptr, banned_ptr, entry, limit, count):
    """(ids, -1 where there is none; values; which entries are known; which are present)."""
    ids = tl.load(support_ptr + entry, mask=entry < count, other=-1)
    values = tl.load(values_ptr + entry, mask=entry < count, other=0.0).to(tl.float32)
    known = (ids >= 0) & (values != NEVER)
    present = known & (ids < limit)
    if banned_ptr is not None:
        present = present & ~is_banned(banned_ptr, tl.where(present, ids, 0), present)
    return ids, values, known, present


@triton.jit
def _first_of_each(support_ptr, values_ptr, banned_ptr, ids, present, limit, count,
                   K_PAD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(each id's first present entry; of ids without one, the first listed and the first known).

    An entry is known if the teacher has a value above -inf there.
    """
    entry = tl.arange(0, K_PAD)[None, :]
    seen = tl.zeros([BLOCK, K_PAD], tl.int32)
    for block in range(0, count, BLOCK):
        other = block + tl.arange(0, BLOCK)
        other_ids, _, known, other_present = _listed(
            support_ptr, values_ptr, banned_ptr, other, limit, count
        )
        found = 2 + 4 * known.to(tl.int32) + 8 * other_present.to(tl.int32)
        equal = ids[None, :] == other_ids[:, None]  # [BLOCK, K_PAD]
        seen |= tl.where(equal & other_present[:, None], 1, 0)
        seen |= tl.where(equal & (other[:, None] < entry), found[:, None], 0)
    lost = (ids >= 0) & (tl.max(seen & 1, axis=0) == 0)
    return (
        present & (tl.max(seen & 8, axis=0) == 0),
        lost & (tl.max(seen & 2, axis=0) == 0),
        lost & (tl.max(seen & 4, axis=0) == 0),
    )


@triton.jit
def _rejoined(tail, values, joins, temperature):
    """A tail that also holds these values; NaN if one is NaN or +inf."""
    bad = tl.max((joins & ~(values < float("inf"))).to(tl.int32)) > 0
    x = values.to(tl.float64) * (1.0 / temperature.to(tl.float64))
    x = tl.where(joins & (values != NEVER), x, NEVER)
    most = tl.max(x)
    most = tl.where(most < tail, tail, most)
    total = tl.sum(exp((x - most).to(tl.float32))) + exp((tail - most).to(tl.float32))
    joined = tl.where(most == NEVER, NEVER, most + log(total).to(tl.float64))
    return tl.where(bad, float("nan"), tl.where(tail < float("inf"), joined, tail))


@triton.jit(
    do_not_specialize=[
        "temperature", "teacher_temperature", "reverse", "forward", "skew_reverse", "skew_forward",
        "beta", "clip", "floor", "limit", "width", "k",
        "student_inner", "student_outer_stride", "student_inner_stride",
    ]
)  # fmt: skip
def full_divergence_kernel(
    student_ptr, values_ptr, support_ptr, banned_ptr, mask_ptr,
    temperatures_ptr, teacher_temperatures_ptr, weights_ptr, student_tails_ptr, teacher_tails_ptr,
    loss_ptr, ids_ptr, grad_ptr, factors_ptr, logsumexp_ptr,
    temperature: tl.float32, teacher_temperature: tl.float32, reverse: tl.float32,
    forward: tl.float32, skew_reverse: tl.float32, skew_forward: tl.float32, beta: tl.float32,
    clip: tl.float32, floor: tl.float32, limit: tl.int32, width: tl.int32, k: tl.int32,
    student_inner: tl.int64, student_outer_stride: tl.int64, student_inner_stride: tl.int64,
    OUTSIDE: tl.constexpr, REVERSE: tl.constexpr, FORWARD: tl.constexpr, SKEW: tl.constexpr,
    STOP: tl.constexpr, FLOOR: tl.constexpr, K_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of full softmaxes. The given tails are without all ids that the support lists.

    An id's first present entry counts. An id without one goes back to both tails. For "sample" the
    last id is the sampled token's, or -1, and not one of the support.
    """
    row = tl.program_id(0).to(tl.int64)
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            store_masked_row(loss_ptr, ids_ptr, grad_ptr, row, k, K_PAD)
            tl.store(factors_ptr + row, 0.0)
            tl.store(logsumexp_ptr + row, 0.0)
            return
    entry = tl.arange(0, K_PAD)
    student_ptr += row_start(row, student_inner, student_outer_stride, student_inner_stride)
    support_ptr += row * k
    values_ptr += row * k
    count = k
    if OUTSIDE == "sample":
        count -= 1
    ids, t, known, present = _listed(support_ptr, values_ptr, banned_ptr, entry, limit, count)
    present, lost, lost_value = _first_of_each(
        support_ptr, values_ptr, banned_ptr, ids, present, limit, count, K_PAD, BLOCK
    )
    lost = lost & (ids < width)
    read = present | lost
    z = tl.load(student_ptr + tl.where(read, ids, 0), mask=read, other=0.0).to(tl.float32)
    temperature = scalar(row_temperature(temperature, temperatures_ptr, row))
    teacher_temperature = row_temperature(teacher_temperature, teacher_temperatures_ptr, row)
    teacher_temperature, floor = scalar(teacher_temperature), scalar(floor)
    student_tail, teacher_tail = tl.load(student_tails_ptr + row), tl.load(teacher_tails_ptr + row)
    lost_value = lost_value & known
    if tl.max((lost | lost_value).to(tl.int32)) > 0:
        student_tail = _rejoined(student_tail, z, lost, temperature)
        teacher_tail = _rejoined(teacher_tail, t, lost_value, teacher_temperature)
    token_id, token, token_z, token_t = 0, False, 0.0, 0.0
    if OUTSIDE == "sample":
        token_id = tl.load(support_ptr + count)
        token_t = tl.load(values_ptr + count).to(tl.float32)
        token = (token_id >= 0) & (token_id < width) & (token_t != NEVER)
        place = tl.where(token, token_id, 0)
        token_z = tl.load(student_ptr + place, mask=token, other=0.0).to(tl.float32)
    z, t = tl.where(present, z, NEVER), tl.where(present, t, NEVER)
    member = row_member(weights_ptr, row, reverse, forward, skew_reverse, skew_forward, beta, clip)
    loss, grad, factor, token_grad, logsumexp, fill, replaced = _row_full_divergence(
        z, t, present, temperature, teacher_temperature, student_tail, teacher_tail, member, floor,
        token, token_z, token_t, OUTSIDE, REVERSE, FORWARD, SKEW, STOP, FLOOR,
    )  # fmt: skip
    grad = tl.where(present, tl.where(replaced, fill, grad), 0.0)
    out_ids = tl.where(present, ids, -1).to(tl.int32)
    if OUTSIDE == "sample":
        # Every id occurs once, even where a row is NaN because its token is out of range.
        inside = tl.max((present & (ids == token_id)).to(tl.int32)) > 0
        apart = token & ~inside
        token_grad = tl.where(apart, tl.where(replaced, fill, token_grad), 0.0)
        grad = tl.where(entry == count, token_grad, grad)
        out_ids = tl.where(entry == count, tl.where(apart, token_id, -1).to(tl.int32), out_ids)
    loss = tl.where(replaced, fill, loss)
    store_row(loss_ptr, ids_ptr, grad_ptr, row, k, loss, out_ids, grad, False, K_PAD)
    tl.store(factors_ptr + row, tl.where(replaced, fill, factor))
    tl.store(logsumexp_ptr + row, tl.where(replaced, fill, logsumexp))


@triton.jit(
    do_not_specialize=[
        "temperature", "teacher_temperature", "reverse", "forward", "skew_reverse", "skew_forward",
        "beta", "clip", "floor", "limit", "k",
        "student_inner", "student_outer_stride", "student_inner_stride",
    ]
)  # fmt: skip
def member_divergence_kernel(
    student_ptr, values_ptr, support_ptr, banned_ptr, mask_ptr,
    temperatures_ptr, teacher_temperatures_ptr, weights_ptr, loss_ptr, ids_ptr, grad_ptr,
    temperature: tl.float32, teacher_temperature: tl.float32, reverse: tl.float32,
    forward: tl.float32, skew_reverse: tl.float32, skew_forward: tl.float32, beta: tl.float32,
    clip: tl.float32, floor: tl.float32, limit: tl.int32, k: tl.int32,
    student_inner: tl.int64, student_outer_stride: tl.int64, student_inner_stride: tl.int64,
    REVERSE: tl.constexpr, FORWARD: tl.constexpr, SKEW: tl.constexpr, STOP: tl.constexpr,
    FLOOR: tl.constexpr, K_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Renormalised: as ``support_divergence_kernel``, of any member."""
    row = tl.program_id(0).to(tl.int64)
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            store_masked_row(loss_ptr, ids_ptr, grad_ptr, row, k, K_PAD)
            return
    student_ptr += row_start(row, student_inner, student_outer_stride, student_inner_stride)
    entry = tl.arange(0, K_PAD)
    ids, t, _, present = _listed(
        support_ptr + row * k, values_ptr + row * k, banned_ptr, entry, limit, k
    )
    ids = tl.where(present, ids, -1).to(tl.int32)
    z = tl.load(student_ptr + tl.where(present, ids, 0), mask=present, other=0.0).to(tl.float32)
    z, t = tl.where(present, z, NEVER), tl.where(present, t, NEVER)
    nothing = tl.full((), NEVER, tl.float64)
    loss, grad, _, _, _, fill, replaced = _row_full_divergence(
        z, t, present,
        scalar(row_temperature(temperature, temperatures_ptr, row)),
        scalar(row_temperature(teacher_temperature, teacher_temperatures_ptr, row)),
        nothing, nothing,
        row_member(weights_ptr, row, reverse, forward, skew_reverse, skew_forward, beta, clip),
        scalar(floor),
        False, 0.0, 0.0, "renormalize", REVERSE, FORWARD, SKEW, STOP, FLOOR,
    )  # fmt: skip
    loss = tl.where(replaced, fill, loss)
    store_row(loss_ptr, ids_ptr, grad_ptr, row, k, loss, ids, grad, False, K_PAD)
    tl.debug_barrier()
    ids, grad = merge_duplicates(ids_ptr + row * k, grad_ptr + row * k, ids, grad, k, K_PAD, BLOCK)
    grad = tl.where(replaced, fill, grad)
    tl.debug_barrier()
    store_row(loss_ptr, ids_ptr, grad_ptr, row, k, loss, ids, grad, False, K_PAD)
