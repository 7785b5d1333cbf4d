"""``gather`` of every backend; select, gather and entry divergence beside the fused operator."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from effort import INTERPRETED
from test_linear import DTYPES, INF, NAN, integers, normal
from test_linear_memory import Pages

from opd_kernels import backends
from opd_kernels._arguments import Allowed, Objective, Temperature

VOCAB, LIMIT = 70, 65  # of the student, and of what may enter a support
BANNED = [0, 7, 8, 63, 64]
MASK = torch.tensor([[True, False, True], [True, True, False]])


def ids_of(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Ids, some of which are absent."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(-3, VOCAB + 5, shape, generator=generator).to(dtype)


def ban_bitmap() -> torch.Tensor:
    """Of ``BANNED``, in whole 64-bit words."""
    bits = torch.isin(torch.arange(-(-VOCAB // 64) * 64), torch.tensor(BANNED))
    return (bits.view(-1, 8) * 2 ** torch.arange(8)).sum(1).to(torch.uint8)


def allowed(banned: bool, masked: bool) -> Allowed:
    return Allowed(LIMIT, ban_bitmap() if banned else None, MASK if masked else None)


def gathered(
    student: torch.Tensor, ids: torch.Tensor, which: Allowed
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and slots by ``torch.gather``."""
    present = (ids >= 0) & (ids < which.limit)
    if which.banned is not None:
        present &= ~torch.isin(ids, torch.tensor(BANNED))
    if which.mask is not None:
        present &= which.mask[..., None]
    values = student.gather(-1, torch.where(present, ids, 0).long()).float()
    slots = torch.arange(ids.shape[-1], dtype=torch.int32)
    return torch.where(present, values, 0), torch.where(present, slots, -1)


def assert_same(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Equal in dtype, shape and value, NaN to NaN."""
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("banned", "masked"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_those_of_torch_gather_and_slots_say_which_take_part(
    backend: str, dtype: torch.dtype, ids_dtype: torch.dtype, banned: bool, masked: bool
) -> None:
    student = normal(2, 3, VOCAB, dtype=dtype)
    student[0, 0, ::3], student[0, 2, ::5], student[1, 0, ::7] = -INF, NAN, INF
    which = allowed(banned, masked)
    for k in (1, 9, 40):
        ids = ids_of(2, 3, k, dtype=ids_dtype)
        ours = backends.load(backend).gather(student, ids, which)
        assert_same(ours, gathered(student, ids, which))


def test_int64_ids_beyond_int32_are_absent(backend: str) -> None:
    ids = torch.tensor([[2**32 + 1, -(2**32) + 1, 1, 2**63 - 1, -(2**63)]])
    student = normal(1, VOCAB)
    values, slots = backends.load(backend).gather(student, ids, Allowed(LIMIT))
    assert slots.tolist() == [[-1, -1, 2, -1, -1]]
    assert torch.equal(values, torch.where(slots >= 0, student[0, 1], 0))


def test_leading_dimensions_of_any_strides_are_taken(backend: str) -> None:
    k = 5
    student = normal(2, 3, 4, 2, VOCAB + 6).permute(2, 0, 3, 1, 4)[..., 3 : 3 + VOCAB]
    wide = ids_of(3, 4, 2, 2, k + 4).permute(1, 3, 2, 0, 4)[..., 1 : 1 + k]
    mask = (torch.arange(48).view(3, 2, 2, 4) % 5 != 1).permute(3, 1, 2, 0)
    same = wide[:1, :, :, :1].expand(4, 2, 2, 3, k)
    dense = student.contiguous(), wide.contiguous()
    for logits, ids in ((student, wide), (student, same), (student, dense[1]), (dense[0], wide)):
        for which in (Allowed(LIMIT), Allowed(LIMIT, None, mask)):
            ours = backends.load(backend).gather(logits, ids, which)
            assert_same(ours, gathered(logits, ids, which))


@pytest.mark.parametrize("rows", [(), (0,), (2, 0), (1, 1, 1)])
def test_any_number_of_rows_is_taken(backend: str, rows: tuple[int, ...]) -> None:
    student, ids = normal(*rows, VOCAB), ids_of(*rows, 4)
    ours = backends.load(backend).gather(student, ids, Allowed(LIMIT))
    assert_same(ours, gathered(student, ids, Allowed(LIMIT)))


@pytest.mark.parametrize("rows", [16, 17, 33])
def test_rows_of_several_programs_are_taken(backend: str, rows: int) -> None:
    student, ids = normal(rows, VOCAB), ids_of(rows, 60)
    ours = backends.load(backend).gather(student, ids, Allowed(LIMIT))
    assert_same(ours, gathered(student, ids, Allowed(LIMIT)))


def test_rows_reach_beyond_two_to_the_31_elements(backend: str) -> None:
    stride, width = 2**31 + 16, 40
    pages = mmap.mmap(-1, 2 * stride * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    far = torch.frombuffer(pages, dtype=torch.bfloat16).as_strided((2, width), (stride, 1))
    far.copy_(normal(2, width))
    ids = torch.tensor([[3, 39], [0, 5]])
    ours = backends.load(backend).gather(far, ids, Allowed(width))
    assert_same(ours, gathered(far, ids, Allowed(width)))


@pytest.fixture(params=["triton" if INTERPRETED else "cpu"])
def careful(request: pytest.FixtureRequest) -> str:
    """The backend that reads no more than it must."""
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_rows_and_absent_ids_are_not_read(careful: str, dtype: torch.dtype) -> None:
    student = Pages(normal(4, VOCAB, dtype=dtype))
    ids = torch.tensor([[1, 2, 3], [-1, LIMIT, 7], [1, 69, 64], [63, 0, 8]])
    mask = torch.tensor([False, True, True, True])
    which = Allowed(LIMIT, ban_bitmap(), mask)
    for row in (0, 1, 3):
        student.close(row)
    try:
        ours = backends.load(careful).gather(student.rows, ids, which)
    finally:
        student.open()
    assert_same(ours, gathered(student.rows, ids, which))


# The steps beside the fused operator and beside each other. K is at most 128: beyond, the compiled
# Triton kernels of the two add up a row's entries in orders of their own (test_aot.py).

CALLS = (
    (torch.float32, False, False, Objective()),
    (torch.bfloat16, True, False, Objective(Temperature(1.7), Temperature(0.6))),
    (torch.float16, True, True, Objective(Temperature(rows=normal(3, 2).abs().t() + 0.5))),
)


def hard_logits(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(student, teacher) with ties, infinities and a NaN in a row of its own."""
    student, teacher = normal(2, 3, VOCAB, dtype=dtype), normal(2, 3, VOCAB - 1, seed=1)
    teacher = teacher.to(dtype)
    teacher[0, 0] = integers(VOCAB - 1)
    teacher[0, 2, 9:] = -INF
    student[1, 0, ::2] = -INF
    student[1, 1, 12] = NAN
    return student, teacher


@pytest.mark.parametrize(("dtype", "banned", "masked", "objective"), CALLS)
def test_steps_give_the_bits_of_the_fused_operator(
    backend: str, dtype: torch.dtype, banned: bool, masked: bool, objective: Objective
) -> None:
    module: Any = backends.load(backend)
    student, teacher = hard_logits(dtype)
    which = allowed(banned, masked)
    for k in (5, 33):
        loss, ids, entry_grad = module.select_divergence(student, teacher, k, which, objective)
        support, teacher_values = module.select(teacher, k, which)
        values, slots = module.gather(student, support, which)
        within = Allowed(k, None, which.mask)
        steps = module.entry_divergence(values, teacher_values, slots, within, objective)
        assert_same((steps[0], steps[2]), (loss, entry_grad))
        assert torch.equal(steps[1] >= 0, ids >= 0)


@pytest.mark.parametrize(("dtype", "banned", "masked", "objective"), CALLS)
def test_gathered_values_give_the_bits_of_the_logits_that_they_come_from(
    backend: str, dtype: torch.dtype, banned: bool, masked: bool, objective: Objective
) -> None:
    module: Any = backends.load(backend)
    student, _ = hard_logits(dtype)
    order = torch.rand(2, 3, VOCAB + 3, generator=torch.Generator().manual_seed(2)).argsort(-1)
    ids, k = order[..., :20] - 1, 20  # no duplicates; some are -1 or outside the vocabulary
    teacher = normal(2, 3, k, seed=3, dtype=dtype)
    teacher[0, 1, 4] = -INF
    which = allowed(banned, masked)
    loss, found, entry_grad = module.entry_divergence(student, teacher, ids, which, objective)
    values, slots = module.gather(student, ids, which)
    within = Allowed(k, None, which.mask)
    steps = module.entry_divergence(values, teacher, slots, within, objective)
    assert_same((steps[0], steps[2]), (loss, entry_grad))
    assert torch.equal(steps[1] >= 0, found >= 0)
