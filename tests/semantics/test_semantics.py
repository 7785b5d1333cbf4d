"""What the numbers mean: properties that hold exactly, and the rules for absent and masked
entries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_kernels import EntryGradient, TopK, select_topk, topk_rkl
from opd_kernels._arguments import Allowed
from opd_kernels._autograd import Request, TopKReverseKL

INF, NAN = torch.inf, torch.nan


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 3).to(dtype)


def loss_and_grad(
    student: torch.Tensor, *args: object, **kwargs: object
) -> tuple[torch.Tensor, torch.Tensor]:
    student = student.detach().requires_grad_()
    loss = topk_rkl(student, *args, **kwargs)
    loss.sum().backward()
    return loss.detach(), student.grad


def entries(
    student: torch.Tensor, teacher: torch.Tensor, k: int, backend: str
) -> tuple[torch.Tensor, ...]:
    """(loss, ids, entry gradients) per row, before anything is scattered."""
    return TopKReverseKL.apply(student, teacher, k, Request(backend=backend))


def random_entries(
    *rows: int, k: int, vocab: int, present: float = 0.7
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, entry gradients): ids that differ within a row, a part of them absent."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.rand(*rows, vocab, generator=generator).argsort(-1)[..., :k]
    ids[torch.rand(ids.shape, generator=generator) >= present] = -1
    return ids.to(torch.int32), logits(*rows, k, seed=3)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """What ``torch.equal`` distinguishes -0 from +0 and NaN from NaN by."""
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


# Selection


def test_ties_go_to_the_lower_id(backend: str) -> None:
    teacher = torch.zeros(1, 5000)
    teacher[0, [4000, 4999]] = 1.0
    topk = select_topk(teacher, 5, backend=backend)
    assert topk.ids.tolist() == [[4000, 4999, 0, 1, 2]]


def test_negative_zero_equals_zero(backend: str) -> None:
    teacher = torch.tensor([[-1.0, 0.0, -0.0, 0.0, -0.0]])
    topk = select_topk(teacher, 4, backend=backend)
    assert topk.ids.tolist() == [[1, 2, 3, 4]]
    assert topk.logits.signbit().tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_of_either_sign_ranks_highest(backend: str, dtype: torch.dtype, sign: float) -> None:
    teacher = logits(1, 5000, dtype=dtype)
    teacher[0, 17] = INF
    teacher[0, [3000, 40]] = torch.copysign(torch.tensor(NAN), torch.tensor(sign)).to(dtype)
    topk = select_topk(teacher, 3, backend=backend)
    assert topk.ids.tolist() == [[40, 3000, 17]]


def test_fewer_selectable_ids_than_k_pad_with_minus_one(backend: str) -> None:
    teacher = logits(2, 10)
    topk = select_topk(teacher, 8, vocab_size=6, banned_ids=[0, 5, 99, -3], backend=backend)
    assert (topk.ids[:, :4].sort().values == torch.tensor([1, 2, 3, 4])).all()
    assert (topk.ids[:, 4:] == -1).all()
    assert (topk.logits[:, 4:] == -INF).all()


def test_minus_inf_that_can_be_selected_comes_before_padding(backend: str) -> None:
    teacher = torch.tensor([[-INF, 1.0, -INF, 0.0]])
    topk = select_topk(teacher, 4, banned_ids=[0], backend=backend)
    assert topk.ids.tolist() == [[1, 3, 2, -1]]


def test_tens_of_thousands_of_banned_ids(backend: str) -> None:
    teacher = logits(2, 50000)
    banned = torch.randperm(50000, generator=torch.Generator().manual_seed(0))[:30000]
    topk = select_topk(teacher, 64, banned_ids=banned, backend=backend)
    assert not torch.isin(topk.ids, banned).any()
    expected = teacher.index_fill(1, banned, -INF).topk(64).values
    assert torch.equal(topk.logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("banned", [0, 63, 64, 2047, 4089, 4095, 4096, 8190, 9000])
def test_a_banned_id_is_not_selected_wherever_it_and_the_row_lie(
    backend: str, banned: int, dtype: torch.dtype
) -> None:
    # Rows of odd width start at every offset within 16 bytes; the best are far from each other.
    teacher = logits(8, 9001, dtype=dtype)
    teacher[:, 30::64] = 50 - torch.arange(len(range(30, 9001, 64))).to(dtype) / 8
    teacher[:, banned] = 100
    topk = select_topk(teacher, 40, banned_ids=[banned], backend=backend)
    expected = teacher.index_fill(1, torch.tensor([banned]), -INF).float()
    expected = torch.sort(expected, dim=-1, descending=True, stable=True)
    assert torch.equal(topk.ids.long(), expected.indices[:, :40])
    assert torch.equal(topk.logits, expected.values[:, :40])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [9001, 8993, 8980])
def test_what_lies_around_a_row_does_not_matter(
    backend: str, vocab_size: int, dtype: torch.dtype
) -> None:
    # Rows of odd width between rows, and before columns, of the largest values.
    around = torch.full((17, 9001), torch.finfo(dtype).max, dtype=dtype)
    teacher = around[1::2]
    row = logits(vocab_size, dtype=dtype)
    row[222::64] = 50 - torch.arange(len(range(222, vocab_size, 64))).to(dtype) / 8
    teacher[:, :vocab_size] = row
    topk = select_topk(teacher, 40, vocab_size=vocab_size, backend=backend)
    expected = torch.sort(row.float(), descending=True, stable=True)
    assert torch.equal(topk.ids.long(), expected.indices[:40].expand(8, 40))
    assert torch.equal(topk.logits, expected.values[:40].expand(8, 40))


def test_banned_ids_as_list_and_as_tensor_are_the_same(backend: str) -> None:
    student, teacher = logits(3, 40), logits(3, 40, seed=1)
    as_list = topk_rkl(student, teacher, 5, banned_ids=[1, 2, 30], backend=backend)
    for dtype in (torch.int32, torch.int64):
        tensor = torch.tensor([1, 2, 30], dtype=dtype)
        assert torch.equal(
            as_list, topk_rkl(student, teacher, 5, banned_ids=tensor, backend=backend)
        )


def test_no_banned_ids_is_none(backend: str) -> None:
    student, teacher = logits(3, 40), logits(3, 40, seed=1)
    none = topk_rkl(student, teacher, 5, backend=backend)
    assert torch.equal(none, topk_rkl(student, teacher, 5, banned_ids=[], backend=backend))


@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 3000))
def test_permuting_distinct_values_permutes_the_ids(backend: str, seed: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randperm(vocab, generator=generator).float() - vocab // 2
    permutation = torch.randperm(vocab, generator=generator)
    k = min(vocab, 40)
    plain = select_topk(values[None], k, backend=backend)
    permuted = select_topk(values[permutation][None], k, backend=backend)
    assert torch.equal(permutation[permuted.ids.long()], plain.ids.long())
    assert torch.equal(permuted.logits, plain.logits)


# Divergence


@given(seed=st.integers(0, 10**6), k=st.integers(2, 60))
def test_loss_is_not_below_zero_and_entry_gradients_sum_to_zero(
    backend: str, seed: int, k: int
) -> None:
    student, teacher = logits(4, 200, seed=seed), logits(4, 200, seed=seed + 1)
    loss, ids, grad = entries(student, teacher, k, backend)
    unit = 2.0**-24
    assert (ids >= 0).all()
    # Each of k terms carries a few roundings of numbers up to the largest log ratio.
    scale = 60.0
    assert (loss >= -8 * unit * scale).all()
    assert (grad.sum(-1).abs() <= 8 * k * unit * scale).all()


@given(seed=st.integers(0, 10**6), shift=st.integers(-32, 32))
def test_adding_an_exactly_representable_constant_changes_nothing(
    backend: str, seed: int, shift: int
) -> None:
    # Multiples of 1/64 below 2^10 add without rounding, so that the bits must stay the same.
    student = (logits(3, 300, seed=seed) * 64).round() / 64
    teacher = (logits(3, 300, seed=seed + 1) * 64).round() / 64
    plain = loss_and_grad(student, teacher, 20, backend=backend)
    shifted = loss_and_grad(student + shift, teacher + shift / 2, 20, backend=backend)
    assert torch.equal(plain[0], shifted[0])
    assert torch.equal(plain[1], shifted[1])


def test_k_equal_to_the_vocabulary_is_the_full_reverse_kl(backend: str) -> None:
    student, teacher = logits(5, 50), logits(5, 50, seed=1)
    loss, grad = loss_and_grad(student, teacher, 50, reduction="none", backend=backend)
    z = student.double().requires_grad_()
    log_p, log_q = z.log_softmax(-1), teacher.double().log_softmax(-1)
    full = (log_p.exp() * (log_p - log_q)).sum(-1)
    full.sum().backward()
    torch.testing.assert_close(loss.double(), full.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), z.grad, rtol=1e-5, atol=1e-6)


def test_equal_student_and_teacher_have_loss_and_gradient_zero(backend: str) -> None:
    teacher = logits(4, 100)
    loss, grad = loss_and_grad(teacher, teacher, 10, backend=backend)
    assert loss == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.7, 0.5)], ids=["equal", "unequal"])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_a_student_close_to_the_teacher_has_an_accurate_loss(
    backend: str, offset: float, temperatures: tuple[float, float]
) -> None:
    temperature, teacher_temperature = temperatures
    teacher = logits(24, 2000)
    noise = 1e-3 * logits(24, 2000, seed=1) / 3
    student = teacher * (temperature / teacher_temperature) + noise + offset
    z = student.double().requires_grad_()
    support = select_topk(teacher, 64, backend="reference").ids.long()
    log_p = (z.gather(-1, support) / temperature).log_softmax(-1)
    log_q = (teacher.double().gather(-1, support) / teacher_temperature).log_softmax(-1)
    exact = (log_p.exp() * (log_p - log_q)).sum(-1)
    exact.sum().backward()
    loss, grad = loss_and_grad(
        student, teacher, 64, temperature=temperature, teacher_temperature=teacher_temperature,
        reduction="none", backend=backend,
    )  # fmt: skip
    # The loss is about 5e-7, its terms p l up to 1e-3, each rounded a few times.
    assert ((loss.double() - exact) / exact).abs().median() < 1e-3
    # log p - log q comes rounded once; of unequal temperatures each is rounded to float32.
    error = (grad.double() - z.grad).abs().amax(-1) / z.grad.abs().amax(-1)
    assert error.median() < (1e-6 if temperature == teacher_temperature else 1e-3)


def test_temperature_divides_both_sides_without_a_factor(backend: str) -> None:
    student, teacher = logits(3, 60), logits(3, 60, seed=1)
    a, grad_a = loss_and_grad(student, teacher, 8, temperature=2.0, backend=backend)
    b, grad_b = loss_and_grad(student / 2, teacher / 2, 8, backend=backend)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(grad_a, grad_b / 2)
    c, _ = loss_and_grad(
        student, teacher, 8, temperature=2.0, teacher_temperature=1.0, backend=backend
    )
    d, _ = loss_and_grad(student / 2, teacher, 8, backend=backend)
    torch.testing.assert_close(c, d)


def test_teacher_log_probs_and_logits_are_the_same_teacher(backend: str) -> None:
    student, teacher = logits(3, 60), logits(3, 60, seed=1)
    support = select_topk(teacher, 8, backend=backend)
    log_probs = TopK(support.ids, support.logits - teacher.logsumexp(-1, keepdim=True))
    a, grad_a = loss_and_grad(student, teacher, 8, backend=backend)
    b, grad_b = loss_and_grad(student, support, backend=backend)
    c, grad_c = loss_and_grad(student, log_probs, backend=backend)
    assert torch.equal(a, b)
    assert torch.equal(grad_a, grad_b)
    torch.testing.assert_close(a, c)
    torch.testing.assert_close(grad_a, grad_c)


def test_order_of_a_given_support_does_not_matter(backend: str) -> None:
    student, teacher = logits(3, 60), logits(3, 60, seed=1)
    support = select_topk(teacher, 8, backend=backend)
    a, grad_a = loss_and_grad(student, support, backend=backend)
    flipped = TopK(support.ids.flip(-1).long(), support.logits.flip(-1))
    b, grad_b = loss_and_grad(student, flipped, backend=backend)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(grad_a, grad_b)


# Absent entries


@pytest.mark.parametrize("bad", [-1, -7, 60, 10**6, 2**32 + 1, -(2**40)])
def test_ids_outside_the_vocabulary_are_absent(backend: str, bad: int) -> None:
    student, teacher = logits(3, 60), logits(3, 60, seed=1)
    support = select_topk(teacher, 6, backend=backend)
    ids = torch.cat([support.ids.long(), torch.full((3, 2), bad)], -1)
    values = torch.cat([support.logits, torch.tensor([NAN, INF]).expand(3, 2)], -1)
    a = loss_and_grad(student, support, backend=backend)
    b = loss_and_grad(student, TopK(ids, values), backend=backend)
    torch.testing.assert_close(a[0], b[0])
    torch.testing.assert_close(a[1], b[1])


def test_teacher_minus_inf_is_absent(backend: str) -> None:
    student, teacher = logits(2, 30), logits(2, 30, seed=1)
    teacher[:, 5:] = -INF
    a = loss_and_grad(student, teacher, 20, backend=backend)
    b = loss_and_grad(student, teacher, 5, backend=backend)
    torch.testing.assert_close(a[0], b[0])
    torch.testing.assert_close(a[1], b[1])


def test_student_minus_inf_contributes_nothing_and_stays_in_the_teacher(backend: str) -> None:
    student, teacher = logits(2, 30), logits(2, 30, seed=1)
    best = teacher.argmax(-1)
    hole = student.clone()
    hole[torch.arange(2), best] = -INF
    low = student.clone()
    low[torch.arange(2), best] = -1e4
    loss, grad = loss_and_grad(hole, teacher, 6, backend=backend)
    limit, _ = loss_and_grad(low, teacher, 6, backend=backend)
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, limit)
    assert (grad[torch.arange(2), best] == 0).all()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("kind", ["student", "teacher", "banned", "ids"])
def test_nothing_left_is_zero_with_the_graph_attached(backend: str, kind: str) -> None:
    student, teacher = logits(2, 12), logits(2, 12, seed=1)
    options, support = {}, teacher
    if kind == "student":
        student = torch.full_like(student, -INF)
    elif kind == "teacher":
        support = torch.full_like(teacher, -INF)
    elif kind == "banned":
        options = {"banned_ids": range(12)}
    else:
        support = TopK(torch.full((2, 3), -1), torch.zeros(2, 3))
    loss, grad = loss_and_grad(student, support, **options, backend=backend)
    assert loss == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("value", [NAN, -NAN, INF])
def test_a_bad_value_at_a_used_entry_makes_its_row_nan_and_no_other(
    backend: str, side: str, value: float
) -> None:
    student, teacher = logits(3, 80), logits(3, 80, seed=1)
    clean_loss, clean_grad = loss_and_grad(student, teacher, 6, reduction="none", backend=backend)
    best = int(teacher[1].argmax())
    (student if side == "student" else teacher)[1, best] = value
    loss, grad = loss_and_grad(student, teacher, 6, reduction="none", backend=backend)
    assert loss[1].isnan()
    support = select_topk(teacher, 6, backend=backend).ids[1].long()
    assert grad[1, support].isnan().all()
    rest = torch.ones(80, dtype=torch.bool).index_fill(0, support, False)
    assert (grad[1, rest] == 0).all()
    assert torch.equal(loss[[0, 2]], clean_loss[[0, 2]])
    assert torch.equal(grad[[0, 2]], clean_grad[[0, 2]])


def test_a_bad_value_outside_the_support_is_not_noticed(backend: str) -> None:
    student, teacher = logits(2, 80), logits(2, 80, seed=1)
    clean = loss_and_grad(student, teacher, 6, backend=backend)
    student[0, teacher[0].argmin()] = NAN
    dirty = loss_and_grad(student, teacher, 6, backend=backend)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])


def test_duplicate_ids_are_entries_of_their_own_and_their_gradients_add(backend: str) -> None:
    student = logits(1, 10)
    ids = torch.tensor([[3, 5, 3, 7]])
    values = torch.tensor([[0.3, 0.1, -0.4, 1.0]])
    loss, grad = loss_and_grad(student, TopK(ids, values), backend=backend)
    z = student.double().requires_grad_()
    log_p = z[0, ids[0]].log_softmax(-1)
    expected = (log_p.exp() * (log_p - values.double().log_softmax(-1))).sum()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad.double(), z.grad, rtol=1e-5, atol=1e-7)


def test_gradients_of_a_repeated_id_do_not_overflow(backend: str) -> None:
    student = torch.zeros(1, 5, requires_grad=True)
    ids = torch.tensor([[0, 1, 2, 2]])
    teacher = TopK(ids, torch.tensor([[3e38, 3e38, -3e38, -3e38]]))
    loss = topk_rkl(student, teacher, temperature=0.01, reduction="none", backend=backend)
    for upstream in (0.0, 1.0):
        (grad,) = torch.autograd.grad(loss, student, torch.tensor([upstream]), retain_graph=True)
        assert grad.isfinite().all()
    assert grad[0, 2] == torch.finfo(torch.float32).max


def test_spans_that_overflow_never_make_nan(backend: str) -> None:
    largest = torch.finfo(torch.float32).max
    student = torch.tensor([[largest, -largest, 0.0, 1.0], [0.0, 1.0, 2.0, 3.0]])
    teacher = torch.tensor([[-largest, largest, 0.0, 1.0], [largest, -largest, largest, 0.0]])
    for temperature in (1.0, 1e-3, 1e3):
        loss, grad = loss_and_grad(
            student, teacher, 4, temperature=temperature, reduction="none", backend=backend
        )
        assert not loss.isnan().any()
        assert not grad.isnan().any()


# Masks, weights, reductions


def test_masked_rows_are_zero_whatever_they_hold(backend: str) -> None:
    student, teacher = logits(4, 50), logits(4, 50, seed=1)
    mask = torch.tensor([True, False, True, False])
    weight, temperature, upstream = torch.rand(4), torch.rand(4) + 0.5, torch.rand(4)
    clean = topk_rkl(student[mask], teacher[mask], 5, weight=weight[mask], reduction="none",
                     temperature=temperature[mask], backend=backend)  # fmt: skip
    for tensor in (student, teacher, weight, temperature, upstream):
        tensor[~mask] = NAN
    student.requires_grad_()
    weight.requires_grad_()
    loss = topk_rkl(student, teacher, 5, mask=mask, weight=weight, temperature=temperature,
                    reduction="none", backend=backend)  # fmt: skip
    loss.backward(upstream)
    assert torch.equal(loss[mask], clean)
    assert (loss[~mask] == 0).all()
    assert (student.grad[~mask] == 0).all()
    assert (weight.grad[~mask] == 0).all()
    assert torch.isfinite(student.grad).all()


def test_integer_masks_count_as_bool(backend: str) -> None:
    student, teacher = logits(4, 50), logits(4, 50, seed=1)
    flags = torch.tensor([3, 0, -1, 0])
    expected = topk_rkl(student, teacher, 5, mask=flags != 0, backend=backend)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        mask = flags.abs().to(dtype)
        assert torch.equal(expected, topk_rkl(student, teacher, 5, mask=mask, backend=backend))


@pytest.mark.parametrize("shape", [(4, 50), (0, 50)])
def test_no_rows_left_is_zero_with_the_graph_attached(backend: str, shape: tuple[int, int]) -> None:
    student, teacher = logits(*shape), logits(*shape)
    mask = torch.zeros(shape[0], dtype=torch.bool)
    for reduction in ("mean", "sum"):
        loss, grad = loss_and_grad(
            student, teacher, 5, mask=mask, reduction=reduction, backend=backend
        )
        assert loss == 0
        assert grad.shape == shape
        assert (grad == 0).all()


def test_reductions(backend: str) -> None:
    student, teacher = logits(2, 3, 50), logits(2, 3, 50, seed=1)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    weight = torch.rand(2, 3)
    rows = topk_rkl(
        student, teacher, 5, mask=mask, weight=weight, reduction="none", backend=backend
    )
    assert rows.shape == (2, 3)

    def reduced(reduction: str, normalizer: object = None) -> torch.Tensor:
        return topk_rkl(student, teacher, 5, mask=mask, weight=weight, reduction=reduction,
                        normalizer=normalizer, backend=backend)  # fmt: skip

    torch.testing.assert_close(reduced("sum"), rows.sum())
    torch.testing.assert_close(reduced("mean"), rows.sum() / 4)
    torch.testing.assert_close(reduced("mean", 10.0), rows.sum() / 10)
    torch.testing.assert_close(reduced("mean", torch.tensor(10)), rows.sum() / 10)


def test_weight_gets_the_rows_loss_as_gradient(backend: str) -> None:
    student, teacher = logits(4, 50), logits(4, 50, seed=1)
    weight = torch.rand(4, requires_grad=True)
    rows = topk_rkl(student, teacher, 5, reduction="none", backend=backend)
    topk_rkl(student, teacher, 5, weight=weight, reduction="sum", backend=backend).backward()
    assert torch.equal(weight.grad, rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_loss_and_gradient(dtype: torch.dtype) -> None:
    loss, grad = loss_and_grad(logits(3, 40, dtype=dtype), logits(3, 40), 5)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype


def test_default_k_is_32_and_at_most_the_vocabulary(backend: str) -> None:
    student, teacher = logits(3, 100), logits(3, 100, seed=1)
    expected = topk_rkl(student, teacher, 32, backend=backend)
    assert torch.equal(topk_rkl(student, teacher, backend=backend), expected)
    small = topk_rkl(student[:, :10], teacher[:, :10], backend=backend)
    assert torch.equal(small, topk_rkl(student[:, :10], teacher[:, :10], 10, backend=backend))


def test_a_padded_teacher_vocabulary_is_cut_to_the_students(backend: str) -> None:
    student, teacher = logits(3, 100), logits(3, 128, seed=1)
    teacher[:, 100:] = 50.0
    expected = topk_rkl(student, teacher[:, :100], 8, backend=backend)
    assert torch.equal(topk_rkl(student, teacher, 8, backend=backend), expected)


def test_no_gradient_is_computed_for_the_teacher(backend: str) -> None:
    student, teacher = logits(3, 40).requires_grad_(), logits(3, 40, seed=1).requires_grad_()
    topk_rkl(student, teacher, 5, backend=backend).backward()
    assert teacher.grad is None
    support = TopK(torch.zeros(3, 2, dtype=torch.int32), torch.rand(3, 2, requires_grad=True))
    topk_rkl(student, support, backend=backend).backward()
    assert support.logits.grad is None


# Adding to a gradient


@pytest.mark.parametrize("layout", ["plain", "strided", "one_row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adding_is_a_sum_in_float32_rounded_once(
    backend: str, dtype: torch.dtype, layout: str
) -> None:
    base = logits(4, 3, 307, dtype=dtype)
    grad = {"plain": base[0], "strided": base[:2, :, 3:-4].transpose(0, 1), "one_row": base[1, 1]}[
        layout
    ]
    ids, entry_grad = random_entries(*grad.shape[:-1], k=100, vocab=grad.shape[-1])
    upstream = logits(*grad.shape[:-1], 1, seed=4)[..., 0]
    before, base_before = grad.clone(), base.clone()

    def expected(product_dtype: torch.dtype) -> torch.Tensor:
        product = (upstream[..., None] * entry_grad).to(product_dtype).float()
        present = torch.where(ids >= 0, product, 0)
        dense = torch.zeros(grad.shape).scatter_add(-1, ids.clamp(min=0).long(), present)
        return (before.float() + dense).to(dtype)

    assert EntryGradient(ids, entry_grad).add_to_(grad, upstream, backend=backend) is grad
    assert torch.equal(grad, expected(torch.float32))
    if dtype != torch.float32:
        assert not torch.equal(grad, expected(dtype)), "these values do not show a second rounding"
    grad.copy_(before)
    assert torch.equal(bits(base), bits(base_before)), "something beside the rows was written"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adding_rounds_ties_to_even_and_only_ties(backend: str, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    half = eps / 2
    grad = torch.tensor([[1, 1 + eps, 1, -1, 7, 1]], dtype=dtype)
    added = torch.tensor([[half, half, half * (1 + half), -half * (1 + half), half * half]])
    ids = torch.tensor([[0, 1, 2, 3, 5]], dtype=torch.int32)
    EntryGradient(ids, added).add_to_(grad, backend=backend)
    assert grad.tolist() == [[1, 1 + 2 * eps, 1 + eps, -1 - eps, 7, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_absent_entries_leave_a_gradient_bitwise_alone(backend: str, dtype: torch.dtype) -> None:
    # Row 0 has a present id and no NaN; row 1 only absent ones; row 2 a present one and a NaN.
    grad = torch.tensor([-0.0, NAN, -NAN, INF, -INF, 1e-7, 3.0]).to(dtype).repeat(3, 1)
    ids = torch.tensor([[-1, 6, -1], [-1, -1, -9], [6, -1, -1]], dtype=torch.int32)
    entry_grad = torch.tensor([[NAN, 2.0, INF], [NAN, 1.0, -INF], [1.0, 1.0, 1.0]])
    expected = grad.clone()
    expected[0, 6], expected[2, 6] = 4.0, NAN
    EntryGradient(ids, entry_grad).add_to_(grad, torch.tensor([0.5, NAN, NAN]), backend=backend)
    assert torch.equal(bits(grad[:2]), bits(expected[:2]))
    assert torch.equal(bits(grad[2, :6]), bits(expected[2, :6]))
    assert grad[2, 6].isnan()


def test_adding_ignores_ids_outside_the_vocabulary(backend: str) -> None:
    base = logits(2, 20)
    ids = torch.tensor([[3, 10, 12], [-5, 19, 9]], dtype=torch.int32)
    expected = base.clone()
    expected[0, 3] += 1
    expected[1, 9] += 1
    EntryGradient(ids, torch.ones(2, 3)).add_to_(base[:, :10], backend=backend)
    assert torch.equal(base, expected)


def test_adding_without_upstream_is_with_ones_and_no_rows_are_no_error(backend: str) -> None:
    ids, entry_grad = random_entries(3, k=5, vocab=40)
    plain, ones = logits(3, 40), logits(3, 40)
    EntryGradient(ids, entry_grad).add_to_(plain, backend=backend)
    EntryGradient(ids, entry_grad).add_to_(
        ones, torch.ones(3, dtype=torch.float64), backend=backend
    )
    assert torch.equal(plain, ones)
    assert not torch.equal(plain, logits(3, 40))
    EntryGradient(ids[:0], entry_grad[:0]).add_to_(plain[:0], backend=backend)


def test_adding_is_in_float64_where_an_input_is() -> None:
    ids, upstream = torch.zeros(1, 1, dtype=torch.int32), torch.full((1,), 2.0).double()
    # Half a unit of float32 at 1, and a part of it that float32 cannot hold beside it.
    entry_grad = torch.full((1, 1), 2.0**-25).double() * (1 + 2.0**-26)
    one = torch.ones(1, 1)
    assert EntryGradient(ids, entry_grad.float()).add_to_(one.double(), upstream) == 1 + 2.0**-24
    assert EntryGradient(ids, entry_grad).add_to_(one.clone(), upstream) == 1 + 2.0**-23
    assert EntryGradient(ids, entry_grad.float()).add_to_(one.clone(), upstream) == 1


def test_a_consumer_that_needs_the_gradient_before_the_addition_gets_an_error(
    backend: str,
) -> None:
    ids, entry_grad = random_entries(3, k=5, vocab=40)
    factor, grad = torch.ones(3, 40, requires_grad=True), logits(3, 40)
    consumer, version = (factor * grad).sum(), grad._version
    EntryGradient(ids, entry_grad).add_to_(grad, backend=backend)
    assert grad._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        consumer.backward()


@pytest.mark.parametrize("k", [1, 50])
def test_adding_gives_the_gradient_that_autograd_adds(backend: str, k: int) -> None:
    student, teacher = logits(4, 50).requires_grad_(), logits(4, 50, seed=1)
    mask = torch.tensor([True, False, True, True])
    (
        student.logsumexp(-1).sum() + topk_rkl(student, teacher, k, mask=mask, backend=backend)
    ).backward()
    grad = student.detach().softmax(-1)
    request = Request(allowed=Allowed(50, None, mask), backend=backend)
    _, ids, entry_grad = TopKReverseKL.apply(student.detach(), teacher, k, request)
    EntryGradient(ids, entry_grad).add_to_(grad, mask / mask.sum(), backend=backend)
    torch.testing.assert_close(grad, student.grad)
