"""``return_stats`` against float64, which reads it costs, and what it costs in memory."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from opd_kernels import (
    LinearLogits,
    Stats,
    TopK,
    linear_topk_rkl,
    select_topk,
    topk_divergence,
    topk_rkl,
)
from opd_kernels.backends import plain

INF, NAN = float("inf"), float("nan")
BACKENDS = ["cpu", "reference"]
NAMES = (
    "teacher_mass", "student_mass", "overlap", "teacher_entropy", "student_entropy", "valid_k",
)  # fmt: skip


def logits(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 3.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)


def stats_of(student: torch.Tensor, teacher: Any, k: int | None = None, **options: Any) -> Stats:
    _, result = topk_rkl(student, teacher, k, **options, return_stats=True)
    assert isinstance(result, Stats)
    return result


def row_mass(row: torch.Tensor, ids: set[int], temperature: float, vocab_size: int | None) -> float:
    """What softmax(row / T) over [0, vocab_size) holds on ids, in float64."""
    p = (row[:vocab_size].double() / temperature).softmax(-1)
    return sum(p[i].item() for i in ids)


def row_entropy(row: torch.Tensor, temperature: float, vocab_size: int | None) -> float:
    return torch.special.entr((row[:vocab_size].double() / temperature).softmax(-1)).sum().item()


def best_ids(row: torch.Tensor, k: int, limit: int, banned_ids: Any) -> set[int]:
    """The k best allowed ids by a stable sort."""
    order = row[:limit].double().argsort(descending=True, stable=True).tolist()
    return set([i for i in order if i not in banned_ids][:k])


def close_to(found: torch.Tensor, expected: list[float]) -> None:
    """x - max and the division by T round once each, and exp turns that into a relative error.

    Exponents are below 60 here; sums of up to 32 terms, of a few groups, add less than 16 units. An
    entropy is terms p |log p| that have that error, and float64's in the logarithms.
    """
    torch.testing.assert_close(
        found.double().flatten(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=(60 + 16) * torch.finfo(found.dtype).eps,
        atol=1e-13,
        equal_nan=True,
    )


def check(
    student: torch.Tensor,
    teacher: torch.Tensor | TopK,
    support: TopK,
    got: Stats,
    *,
    temperature: Any = 1.0,
    teacher_temperature: Any = None,
    vocab_size: int | None = None,
    banned_ids: Any = (),
    mask: torch.Tensor | None = None,
    selected_by: str = "teacher",
) -> None:
    """Compares with a plain loop over rows."""
    rows, k = student.shape[:-1], support.k
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    t_student, t_teacher = (
        torch.as_tensor(t, dtype=torch.float64).expand(rows).flatten().tolist()
        for t in (temperature, teacher_temperature)
    )
    flags = torch.ones(rows, dtype=torch.bool) if mask is None else mask != 0
    limit = min(student.shape[-1], vocab_size or student.shape[-1])
    if isinstance(teacher, torch.Tensor):
        limit = min(limit, teacher.shape[-1])
    expected: dict[str, list[float]] = {name: [] for name in NAMES}
    for i, at in enumerate(itertools.product(*map(range, rows))):
        if not flags[at]:
            for column in expected.values():
                column.append(NAN)
            continue
        pairs = zip(support.ids[at].tolist(), support.logits[at].double().tolist(), strict=True)
        present = [
            (token, value)
            for token, value in pairs
            if 0 <= token < limit and token not in banned_ids and value != -INF
        ]
        first = dict(reversed(present))
        if isinstance(teacher, torch.Tensor):
            held = row_mass(teacher[at], set(first), t_teacher[i], vocab_size)
            entropy = row_entropy(teacher[at], t_teacher[i], vocab_size)
        else:
            held = entropy = NAN
            if teacher.logsumexp is not None:
                logsumexp = teacher.logsumexp[at].double().item()
                held = sum(math.exp(value - logsumexp) for value in first.values())
        other = student if selected_by == "teacher" else teacher
        assert isinstance(other, torch.Tensor)
        shared = set(first) & best_ids(other[at], k, limit, banned_ids)
        expected["teacher_mass"].append(held)
        expected["teacher_entropy"].append(entropy)
        expected["student_mass"].append(row_mass(student[at], set(first), t_student[i], vocab_size))
        expected["student_entropy"].append(row_entropy(student[at], t_student[i], vocab_size))
        expected["overlap"].append(len(shared) / max(1, len(first)))
        expected["valid_k"].append(len(present))
    for name in NAMES:
        found = getattr(got, name)
        assert found.shape == rows
        close_to(found, expected[name])
    assert torch.equal(got.mask, flags)
    assert got.valid_k.dtype == got.overlap.dtype == torch.float32
    for side in ("teacher", "student"):
        assert getattr(got, f"{side}_mass").dtype == getattr(got, f"{side}_entropy").dtype


SHAPES = [(), (5,), (2, 3), (3, 1, 2), (1, 5), (0,), (2, 0)]


def per_row(kind: str, rows: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Any:
    if kind == "rows":
        return logits(*rows, seed=9, dtype=dtype, spread=0.3).abs() + 0.5
    return {"one": 1.0, "float": 0.7, "int": 2, "scalar": torch.tensor(1.7, dtype=dtype)}[kind]


@pytest.mark.parametrize("rows", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", ["one", "float", "int", "scalar", "rows"])
def test_masses_of_logits_at_every_temperature(rows: tuple[int, ...], temperature: str) -> None:
    student, teacher = logits(*rows, 80), logits(*rows, 70, seed=1)
    t = per_row(temperature, rows)
    options = {"temperature": t, "banned_ids": [3, 5, 60]}
    support = select_topk(teacher, 8, banned_ids=[3, 5, 60])
    check(student, teacher, support, stats_of(student, teacher, 8, **options), **options)


@pytest.mark.parametrize("temperature", ["one", "float", "scalar", "rows"])
def test_each_side_has_its_own_temperature(temperature: str) -> None:
    student, teacher = logits(5, 80), logits(5, 80, seed=1)
    options = {"temperature": 1.3, "teacher_temperature": per_row(temperature, (5,))}
    got = stats_of(student, teacher, 8, **options)
    check(student, teacher, select_topk(teacher, 8), got, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("given", [False, True])
def test_dtypes(dtype: torch.dtype, given: bool) -> None:
    student, teacher = logits(4, 80, dtype=dtype), logits(4, 80, seed=1, dtype=dtype)
    support = select_topk(teacher, 8, with_logsumexp=True)
    if given:  # a cache in the teacher's dtype
        support = teacher = support.to(dtype)
    for temperature_dtype in (torch.float32, torch.float64):
        options = {"temperature": per_row("rows", (4,), temperature_dtype)}
        got = stats_of(student, teacher, **({} if given else {"k": 8}), **options)
        check(student, teacher, support, got, **options)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert got.teacher_mass.dtype == got.student_mass.dtype == wide


@pytest.mark.parametrize("vocab_size", [5, 60, 65, 75, 100])
def test_full_softmaxes_run_over_the_vocabulary_of_their_own_side(vocab_size: int) -> None:
    student, teacher = logits(4, 70), logits(4, 80, seed=1)
    student[:, 65:] += 5  # padding that would hold most of the mass
    teacher[:, 65:] += 5
    banned = [1, 2, 3, 69]
    got = stats_of(student, teacher, 8, vocab_size=vocab_size, banned_ids=banned)
    # Only ids that both sides have can be selected.
    support = select_topk(teacher[:, :70], 8, vocab_size=vocab_size, banned_ids=banned)
    check(student, teacher, support, got, vocab_size=vocab_size, banned_ids=banned)


@pytest.mark.parametrize("logsumexp", [True, False])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_a_given_support_is_read_as_it_is(logsumexp: bool, id_dtype: torch.dtype) -> None:
    student = logits(3, 50)
    ids = torch.tensor([[4, 9, 4, -1, 60, 0], [9, 9, 2, 7, 50, 0], [-1, -1, 60, -7, 7, 7]])
    values = logits(3, 6, seed=1).log_softmax(-1)
    values[1, 4:] = -INF
    topk = TopK(ids.to(id_dtype), values, logits(3, seed=2) if logsumexp else None)
    options = {"banned_ids": torch.tensor([7]), "temperature": 1.5}
    got = stats_of(student, topk, **options)
    check(student, topk, topk, got, temperature=1.5, banned_ids=[7])
    assert got.valid_k.tolist() == [4, 3, 0]
    assert got.student_mass[2] == 0


def test_a_wide_id_does_not_alias_a_small_one() -> None:
    topk = TopK(torch.tensor([[3, 2**32 + 4]]), torch.zeros(1, 2), torch.zeros(1))
    got = stats_of(logits(1, 50), topk)
    assert got.valid_k == 1
    assert got.teacher_mass == 1


def test_an_id_listed_twice_counts_once_with_the_value_listed_first() -> None:
    topk = TopK(torch.tensor([[4, 9, 4]]), torch.tensor([[0.2, 0.3, 0.4]]).log(), torch.zeros(1))
    student = logits(1, 50)
    got = stats_of(student, topk)
    torch.testing.assert_close(got.teacher_mass, torch.tensor([0.5]))
    close_to(got.student_mass, [row_mass(student[0], {4, 9}, 1.0, None)])
    assert got.valid_k == 3


@pytest.mark.parametrize("outside", ["renormalize", "bucket", "sample"])
def test_a_token_that_does_not_exist_leaves_the_statistics_alone(outside: str) -> None:
    student, teacher = logits(3, 40), logits(3, 40, seed=1)
    teacher[0, 4:] = -INF  # absent entries
    expected = stats_of(student, teacher, 8)
    loss, got = topk_divergence(
        student,
        teacher,
        8,
        outside=outside,
        token_ids=torch.tensor([40, -1, 3]),
        include_token=outside != "sample",
        return_stats=True,
        reduction="none",
    )
    assert loss.isnan().tolist() == [True, True, False]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("outside", ["renormalize", "bucket"])
def test_a_joining_token_is_not_in_the_mass_of_a_given_tail(outside: str) -> None:
    student, teacher = logits(3, 40), logits(3, 40, seed=1)
    tokens = teacher.sort(-1, descending=True).indices[:, 9]  # the first that is outside
    support = select_topk(teacher, 9, with_logsumexp=True, token_ids=tokens)
    support = dataclasses.replace(support, logsumexp=None)
    _, got = topk_divergence(
        student,
        support,
        outside=outside,
        token_ids=tokens,
        include_token=True,
        return_stats=("teacher_mass",),
    )
    torch.testing.assert_close(got.teacher_mass, stats_of(student, teacher, 9).teacher_mass)


def test_the_most_entries_that_kernels_take_and_a_token() -> None:
    student, teacher = logits(1, 1100), logits(1, 1100, seed=1)
    options: Any = {"token_ids": teacher.argmin(-1), "include_token": True, "outside": "bucket"}
    loss, got = topk_divergence(student, teacher, 1024, return_stats=True, **options)
    expected = stats_of(student, teacher, 1024)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(loss, topk_divergence(student, teacher, 1024, **options))


@pytest.mark.parametrize("field", ["logsumexp", "tail_logsumexp"])
def test_an_infinite_entry_of_a_given_support_makes_its_mass_nan(field: str) -> None:
    values = torch.tensor([[0.0, INF], [0.0, 1.0]])
    topk = TopK(torch.tensor([[4, 9], [4, 9]]), values, **{field: torch.full((2,), 3.0)})
    mass = stats_of(logits(2, 50), topk).teacher_mass
    assert mass.isnan().tolist() == [True, False]


def test_selecting_first_gives_the_same_masses() -> None:
    student, teacher = logits(2, 3, 80), logits(2, 3, 80, seed=1)
    support = select_topk(teacher, 8, with_logsumexp=True, vocab_size=75)
    given = stats_of(student, support, vocab_size=75)
    direct = stats_of(student, teacher, 8, vocab_size=75)
    assert given.teacher_entropy.isnan().all()  # a support does not hold it
    for a, b in zip(given, direct._replace(teacher_entropy=given.teacher_entropy), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_selecting_the_whole_vocabulary_holds_everything() -> None:
    got = stats_of(logits(4, 20), logits(4, 20, seed=1), 20)
    torch.testing.assert_close(got.student_mass, torch.ones(4))
    torch.testing.assert_close(got.teacher_mass, torch.ones(4))
    assert got.valid_k.tolist() == [20] * 4
    assert got.overlap.tolist() == [1] * 4


def test_a_common_offset_of_the_logits_costs_no_accuracy() -> None:
    student, teacher = logits(4, 80).half() + 1000, logits(4, 80, seed=1).half() - 1000
    check(student, teacher, select_topk(teacher, 8), stats_of(student, teacher, 8))


@pytest.mark.parametrize("temperature", [1.0, 1e-3])
def test_spans_that_overflow_never_make_nan(temperature: float) -> None:
    largest = torch.finfo(torch.float32).max
    rows = torch.tensor([[largest, -largest, 0.0, 1.0], [0.0, largest, -INF, 1.0]])
    got = stats_of(rows, rows.flip(0), 2, temperature=temperature)
    assert got.teacher_mass.tolist() == [1, 1]
    assert got.student_mass.tolist() == [0, 0]
    assert got.teacher_entropy.tolist() == got.student_entropy.tolist() == [0, 0]


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_bad_value_anywhere_makes_the_mass_of_its_row_nan(bad: float, side: str) -> None:
    student, teacher = logits(3, 80), logits(3, 80, seed=1)
    clean = stats_of(student, teacher, 8)
    (student if side == "student" else teacher)[1, teacher[1].argmin()] = bad
    got = stats_of(student, teacher, 8)
    for name in (f"{side}_mass", f"{side}_entropy"):
        found, before = getattr(got, name), getattr(clean, name)
        assert found[1].isnan()
        assert torch.equal(found[[0, 2]], before[[0, 2]])


def test_a_row_without_a_support_holds_nothing() -> None:
    student, teacher = logits(2, 20), torch.full((2, 20), -INF)
    got = stats_of(student, teacher, 4)
    assert got.student_mass.tolist() == got.valid_k.tolist() == got.overlap.tolist() == [0, 0]
    close_to(got.student_entropy, [row_entropy(row, 1.0, None) for row in student])
    # A row of only -inf is no distribution.
    assert got.teacher_mass.isnan().all()
    assert got.teacher_entropy.isnan().all()
    swapped = stats_of(teacher, student, 4)
    assert swapped.student_mass.isnan().all()
    assert swapped.student_entropy.isnan().all()
    assert swapped.valid_k.tolist() == [4, 4]


# Masks


@pytest.mark.parametrize("teacher_kind", ["logits", "topk", "topk without logsumexp"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_masked_rows_are_nan_whatever_they_hold(teacher_kind: str, dtype: torch.dtype) -> None:
    student, teacher = logits(2, 4, 50), logits(2, 4, 50, seed=1)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]]).to(dtype)
    temperature = per_row("rows", (2, 4))
    if teacher_kind != "logits":
        teacher = select_topk(teacher, 5, with_logsumexp=teacher_kind == "topk")
    clean = stats_of(student, teacher, 5, temperature=temperature)
    poisoned = (student, temperature, teacher) if teacher_kind == "logits" else (
        student, temperature, teacher.logits)  # fmt: skip
    for tensor in poisoned:
        tensor[mask == 0] = NAN
    got = stats_of(student, teacher, 5, mask=mask, temperature=temperature)
    assert torch.equal(got.mask, mask != 0)
    for a, b in zip(got[:-1], clean, strict=False):
        assert torch.equal(a[mask != 0], b[mask != 0]) or b.isnan().all()
        assert a[mask == 0].isnan().all()


@pytest.mark.parametrize("flag", [True, False])
def test_a_single_row_can_be_masked(flag: bool) -> None:
    student, teacher = logits(50), logits(50, seed=1)
    got = stats_of(student, teacher, 5, mask=torch.tensor(flag))
    if flag:
        check(student, teacher, select_topk(teacher, 5), got)
    else:
        assert not got.mask
        assert all(x.isnan() for x in got[:-1])
        assert all(x.isnan() for x in got.mean()[:-1])


@pytest.fixture
def fenced() -> Iterator[Callable[..., torch.Tensor]]:
    """A function that copies rows to pages of their own and makes some of these fault when read."""
    libc = ctypes.CDLL(None, use_errno=True)
    closed: list[torch.Tensor] = []

    def protect(page: torch.Tensor, how: int) -> None:
        address, size = ctypes.c_void_p(page.data_ptr()), ctypes.c_size_t(page.nbytes)
        assert libc.mprotect(address, size, how) == 0

    def build(rows: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        stride = -(-rows[0].nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = torch.frombuffer(mmap.mmap(-1, stride * len(rows)), dtype=rows.dtype)
        pages = pages.view(len(rows), -1)
        out = pages[:, : rows.shape[1]]
        out.copy_(rows)
        for i in hidden.nonzero().flatten().tolist():
            closed.append(pages[i])
            protect(pages[i], 0)
        return out

    yield build
    for page in closed:
        protect(page, mmap.PROT_READ | mmap.PROT_WRITE)


def test_masked_rows_are_not_read(fenced: Callable[..., torch.Tensor]) -> None:
    mask = torch.tensor([False, True, False, True, True, False])
    student, teacher = logits(6, 700), logits(6, 700, seed=1)
    expected = stats_of(student, teacher, 8, mask=mask)
    got = stats_of(fenced(student, ~mask), fenced(teacher, ~mask), 8, mask=mask)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    support = select_topk(fenced(teacher, ~mask), 8, mask=mask, with_logsumexp=True)
    whole = teacher.double().logsumexp(-1)
    torch.testing.assert_close(support.logsumexp[mask], whole[mask])


# The loss beside the stats


@settings(max_examples=80)
@given(st.integers(0, 2**31), st.sampled_from(BACKENDS), st.data())
def test_the_loss_and_gradient_are_bitwise_those_without_stats(
    seed: int, backend: str, data: st.DataObject
) -> None:
    def draw(*choices: Any) -> Any:
        return data.draw(st.sampled_from(choices))

    rows = draw((), (4,), (2, 3))
    vocab, k = draw((5, 5), (50, 8), (300, 40))
    dtype = draw(torch.float32, torch.bfloat16, torch.float16)
    student, teacher = (logits(*rows, vocab, seed=seed + i, dtype=dtype) for i in (0, 1))
    if data.draw(st.booleans(), label="ties"):
        teacher = teacher.round()
    generator = torch.Generator().manual_seed(seed)
    options = {
        "temperature": draw(1.0, 0.7, torch.tensor(1.3)),
        "mask": draw(None, torch.rand(rows, generator=generator) < 0.6),
        "banned_ids": draw(None, [0, 3, 4]),
        "vocab_size": draw(None, vocab - 1),
        "reduction": draw("sum", "mean"),
        "backend": backend,
        "outside": draw("renormalize", "truncate", "bucket", "generalize", "sample"),
        "support": draw("teacher", "student"),
        # None of the banned: their share joins a tail that is there, or is summed with it.
        "token_ids": torch.randint(1, 3, rows, generator=generator),
    }
    options["include_token"] = options["outside"] != "sample" and draw(False, True)
    k = min(k, vocab - 1)
    outcomes = []
    for return_stats in (False, draw(True, ("student_mass",), ("overlap", "teacher_entropy"))):
        leaf = student.clone().requires_grad_()
        result = topk_divergence(leaf, teacher, k, **options, return_stats=return_stats)
        loss = result[0] if return_stats else result
        loss.backward()
        outcomes.append((loss, leaf.grad))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("outside", ["renormalize", "truncate", "bucket", "generalize", "sample"])
def test_every_member_has_the_same_stats(outside: str, support: str, backend: str) -> None:
    """The sampled token is no entry of theirs, whether it joins the support or not."""
    student, teacher = logits(2, 3, 80), logits(2, 3, 75, seed=1)
    options = {
        "temperature": torch.linspace(0.5, 2, 6).view(2, 3),
        "teacher_temperature": 1.3,
        "banned_ids": [3, 60],
        "vocab_size": 77,
        "mask": torch.tensor([[True, True, False], [True] * 3]),
    }
    mine = student if support == "student" else teacher
    chosen = select_topk(mine, 8, vocab_size=75, banned_ids=[3, 60])
    values = teacher.gather(-1, chosen.ids.long())
    tokens = torch.tensor([[0, 3, -100], [74, 1, 76]])  # banned, masked and beyond the teacher's
    for joins in (False, True)[: 1 + (outside != "sample")]:
        _, got = topk_divergence(
            student,
            teacher,
            8,
            outside=outside,
            support=support,
            token_ids=tokens,
            include_token=joins,
            backend=backend,
            return_stats=True,
            **options,
        )
        check(student, teacher, TopK(chosen.ids, values), got, **options, selected_by=support)


def test_backends_without_kernels_for_full_softmaxes_have_stats(backend: str) -> None:
    student, teacher = logits(3, 80), logits(3, 80, seed=1)
    got = stats_of(student, teacher, 8, backend=backend)
    check(student, teacher, select_topk(teacher, 8), got)


# Names, means and what is shown


class Reads(TorchDispatchMode):
    """Which of the package's operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "opd_kernels":
            self.names.append(func._schema.name.removeprefix("opd_kernels::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("names", "reads"),
    [
        (("valid_k",), []),
        (("teacher_mass",), []),
        (("teacher_entropy", "teacher_mass"), []),
        (("student_mass",), ["tail_logsumexp"]),
        (("student_entropy",), ["tail_logsumexp"]),
        (("overlap",), ["select"]),
        (NAMES, ["select"]),
    ],
)
def test_each_side_is_read_once_for_what_is_asked_for(
    names: tuple[str, ...], reads: list[str]
) -> None:
    """The support is one read of the teacher, which sums as well; others are of the student."""
    student, teacher = logits(4, 80), logits(4, 80, seed=1)
    with Reads() as seen:
        got = topk_rkl(student, teacher, 8, return_stats=names)[1]
    assert [x for x in seen.names if x not in ("gather", "entry_divergence")] == ["select", *reads]
    everything = stats_of(student, teacher, 8)
    for name in NAMES:
        found = getattr(got, name)
        if name not in names:
            assert found is None
        else:
            torch.testing.assert_close(found, getattr(everything, name), rtol=0, atol=0)
    assert got.mask.all()
    assert got.mean()._replace(mask=None) == Stats._make(
        [None if x is None else x.mean() for x in got[:-1]] + [None]
    )


def test_means_are_over_the_rows_that_count() -> None:
    student, teacher = logits(2, 4, 50), logits(2, 4, 50, seed=1)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]])
    student[mask == 0] = NAN
    got = stats_of(student, teacher, 5, mask=mask)
    means = got.mean()
    for name in NAMES:
        found, rows = getattr(means, name), getattr(got, name)
        assert found.shape == ()
        torch.testing.assert_close(found, rows[mask != 0].mean())
    assert means.mask.item() is True
    student[0, 0] = NAN  # of a row that counts
    assert stats_of(student, teacher, 5, mask=mask).mean().student_mass.isnan()
    assert stats_of(student, teacher, 5, mask=mask * 0).mean().valid_k.isnan()


def test_stats_are_shown_by_their_means() -> None:
    got = stats_of(logits(3, 50), logits(3, 50, seed=1), 5, mask=torch.tensor([True, False, True]))
    shown = repr(got)
    assert "\n" not in shown
    assert f"student_mass={got.student_mass[[0, 2]].mean().item():.4g}" in shown
    assert "means of 2 of 3 rows" in shown
    named = topk_rkl(logits(3, 50), logits(3, 50, seed=1), 5, return_stats=["valid_k"])[1]
    assert repr(named) == "Stats(valid_k=5, means of 3 of 3 rows)"
    seen = []
    torch.vmap(lambda mask: seen.append(repr(named._replace(mask=mask))) or mask)(named.mask[None])
    assert seen == ["Stats(valid_k, rows (3,))"]
    numbers = torch.utils._pytree.tree_map_only(torch.Tensor, float, named.mean())
    assert "valid_k=5.0" in repr(numbers)


def test_a_certain_row_has_entropy_zero_without_a_sign() -> None:
    row = torch.full((1, 50), -INF).index_fill(-1, torch.tensor([5]), 1.0)
    got = stats_of(row, row, 5)
    for entropy in (got.student_entropy, got.teacher_entropy):
        assert entropy.item() == 0
        assert not entropy.signbit().item()


def test_stats_are_constant() -> None:
    student = logits(3, 50).requires_grad_()
    got = stats_of(student, logits(3, 50, seed=1).requires_grad_(), 5)
    assert not any(x.requires_grad for x in got)


# Memory


class LargestResult(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes, views left out."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return result


LAYOUTS = {
    "flat": lambda x: x.reshape(-1, x.shape[-1]),
    "one batch": lambda x: x.reshape(1, -1, x.shape[-1]),
    "batches of one": lambda x: x.reshape(-1, 1, x.shape[-1]),
    "transposed": lambda x: x.transpose(0, 1),
    "sliced": lambda x: x[:, :-1, 3:-4],
    "four dimensions": lambda x: x.reshape(2, -1, 4, x.shape[-1]).transpose(0, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_temporaries_are_as_large_as_a_few_rows(
    layout: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = (LAYOUTS[layout](logits(4, 8, 200, seed=i).bfloat16()) for i in (0, 1))
    rows = student.shape[:-1]
    mask = logits(*rows, seed=2) > 0 if masked else None
    monkeypatch.setattr(plain, "_PIECE_ELEMENTS", 6 * 200)
    with LargestResult() as largest:
        got = stats_of(student, teacher, 4, mask=mask, backend="cpu")
        support = select_topk(teacher, 4, mask=mask, with_logsumexp=True, backend="cpu")
    assert largest.nbytes <= 6 * 200 * 4 < student.nbytes
    check(student, teacher, select_topk(teacher, 4), got, mask=mask)
    wanted = teacher.double().logsumexp(-1)
    if mask is not None:
        wanted = wanted.masked_fill(~mask, 0)
    torch.testing.assert_close(support.logsumexp, wanted)


def test_a_row_longer_than_a_piece_is_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_PIECE_ELEMENTS", 7)
    for rows in SHAPES:
        student, teacher = logits(*rows, 80), logits(*rows, 80, seed=1)
        check(student, teacher, select_topk(teacher, 8), stats_of(student, teacher, 8))


# torch.func


@pytest.mark.parametrize("form", ["logits", "hidden states"])
@pytest.mark.parametrize(
    "dims",
    [
        (0, 0, 0, 0),
        (0, 1, 0, 1),
        (0, None, None, None),
        (None, 0, None, None),
        (None, None, 0, None),
        (None, None, None, 0),
    ],
)
def test_under_vmap_each_has_its_own_stats(form: str, dims: tuple[int | None, ...]) -> None:
    maps, rows, vocab = 3, 5, 30
    sides = [logits(maps, rows, 8, seed=seed, dtype=torch.float64) for seed in (0, 1)]
    heads = [logits(vocab, 8, seed=seed, dtype=torch.float64) for seed in (2, 3)]
    mask = torch.arange(maps * rows).view(maps, rows) % 3 > 0
    mask[:, 0] = False
    sides[0][:, 0], sides[1][:, 0] = NAN, NAN  # masked rows

    def measured(
        hidden: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, temperature: torch.Tensor
    ) -> tuple[torch.Tensor, Stats]:
        options = {"mask": mask, "temperature": temperature, "return_stats": True}
        if form == "logits":
            pair = hidden @ heads[0].t(), teacher @ heads[1].t()
            return topk_rkl(*pair, 4, **options)
        bounded = LinearLogits(teacher, heads[1], softcap=5.0)
        return linear_topk_rkl(hidden, heads[0], bounded, 4, logit_scale=0.5, **options)

    temperature = torch.linspace(0.5, 2, maps * rows, dtype=torch.float64).view(maps, rows)
    whole = (*sides, mask, temperature)
    pairs = list(zip(whole, dims, strict=True))
    given = [x[1] if dim is None else x.movedim(0, dim) for x, dim in pairs]
    loss, mapped = torch.vmap(measured, in_dims=dims)(*given)
    for i in range(maps):
        expected_loss, expected = measured(*(x[1 if dim is None else i] for x, dim in pairs))
        # float64, and products in another order: far below the default tolerance of 1e-7.
        torch.testing.assert_close(loss[i], expected_loss)
        for ours, wanted in zip(mapped, expected, strict=True):
            torch.testing.assert_close(ours[i], wanted, equal_nan=True)


def test_under_vmap_masks_are_mapped_beside_a_support_that_is_not() -> None:
    student, masks = logits(4, 30), torch.arange(12).view(3, 4) % 3 > 0
    support = select_topk(logits(4, 30, seed=1), 5, with_logsumexp=True)

    def measured(mask: torch.Tensor) -> Stats:
        return stats_of(student, support, mask=mask)

    mapped = torch.vmap(measured)(masks)
    for i, mask in enumerate(masks):
        for ours, wanted in zip(mapped, measured(mask), strict=True):
            torch.testing.assert_close(ours[i], wanted, equal_nan=True)


def test_under_vmap_masked_rows_are_left_out_of_the_logsumexp() -> None:
    teacher, mask = logits(3, 4, 30), torch.arange(12).view(3, 4) % 3 > 0
    teacher[~mask] = NAN

    def sums(teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return select_topk(teacher, 5, mask=mask, with_logsumexp=True).logsumexp

    mapped = torch.vmap(sums)(teacher, mask)
    assert torch.equal(mapped, torch.stack([sums(*row) for row in zip(teacher, mask, strict=True)]))


# torch.compile


def test_compiled_steps_return_stats_from_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> Any:
        return topk_rkl(student, teacher, 5, mask=mask, banned_ids=[3], return_stats=True)

    monkeypatch.setattr(plain, "_PIECE_ELEMENTS", 100)  # two rows, were it not for the compiler
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for rows in (4, 7):
        student, teacher = logits(rows, 50), logits(rows, 50, seed=1)
        mask = torch.arange(rows) % 3 > 0
        student[~mask], teacher[~mask] = NAN, NAN
        loss, got = compiled(student, teacher, mask)
        expected_loss, expected = step(student, teacher, mask)
        assert torch.equal(loss, expected_loss)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
    assert counter.frame_count == 1
