"""How often a call reads the rows of either side: once, whatever is asked for beside the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_kernels import TopK, select_topk, token_logprobs, topk_divergence, topk_rkl
from opd_kernels.backends import cpu, cuda

# Those whose launches are counted: CUDA's where it is emulated.
BACKENDS = {"cpu": cpu.backend} | ({"cuda": cuda.backend} if cuda.DEVICE == "cpu" else {})

ROWS, V, K = 3, 500, 8
# Operators that read whole rows, and which of their arguments is these rows. The divergence of full
# softmaxes reads the student unless it is given the tail, an address that is not 0. The CPU's does
# so itself, where CUDA has it read first.
READERS = {"select": 0, "select_with_tail": 0, "tail_logsumexp": 0, "select_divergence": 1}
STUDENT_TAIL = 6
EVERYTHING = {"return_stats": True, "return_token_logprobs": True}


class Reads:
    """Counts a backend's reads of whole rows by the address of their memory."""

    def __init__(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.backend = backend
        self.operators: list[str] = []
        self.addresses: list[int] = []
        launch, rows = BACKENDS[backend]._launch, BACKENDS[backend]._rows
        known: dict[int, int] = {}

        def remembered(tensor: Tensor) -> Any:
            made = rows(tensor)
            known[id(made)] = tensor.data_ptr()
            alive.append(made)
            return made

        def counted(operator: str, device: torch.device, *args: Any) -> None:
            place = READERS.get(operator)
            if operator == "full_divergence" and not args[STUDENT_TAIL]:
                place = 0
            if place is not None:
                self.operators.append(operator)
                self.addresses.append(known[id(args[place])])
            launch(operator, device, *args)

        alive: list[Any] = []
        monkeypatch.setattr(BACKENDS[backend], "_rows", remembered)
        monkeypatch.setattr(BACKENDS[backend], "_launch", counted)

    def of(self, tensor: Tensor) -> int:
        return self.addresses.count(tensor.data_ptr())


@pytest.fixture(params=BACKENDS)
def reads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(request.param, monkeypatch)


@pytest.fixture
def sides() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, ROWS, V, generator=generator)
    return student, teacher, torch.randint(V, (ROWS,), generator=generator)


@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("outside", ["renormalize", "truncate", "bucket", "generalize", "sample"])
def test_everything_at_once_reads_each_side_once(
    outside: str, support: str, reads: Reads, sides: tuple[Tensor, Tensor, Tensor]
) -> None:
    student, teacher, tokens = sides
    options = {"outside": outside, "support": support, "token_ids": tokens, **EVERYTHING}
    topk_divergence(student, teacher, K, **options, backend=reads.backend)
    assert reads.operators == ["select_with_tail", "select_with_tail"]
    assert reads.of(student) == reads.of(teacher) == 1


@pytest.mark.parametrize(
    ("names", "operators"),
    [
        (("valid_k",), ["select"]),
        (("teacher_mass",), ["select_with_tail"]),
        (("teacher_entropy", "valid_k"), ["select_with_tail"]),
        (("student_mass",), ["select", "tail_logsumexp"]),
        (("overlap",), ["select", "select"]),
        (("overlap", "student_entropy"), ["select", "select_with_tail"]),
        ((), ["select"]),
    ],
    ids=str,
)
def test_names_pay_for_themselves_only(
    names: tuple[str, ...],
    operators: list[str],
    reads: Reads,
    sides: tuple[Tensor, Tensor, Tensor],
) -> None:
    student, teacher, _ = sides
    _, stats = topk_rkl(student, teacher, K, return_stats=names, backend=reads.backend)
    assert reads.operators == operators
    assert reads.of(teacher) == 1
    given = {name for name, value in stats._asdict().items() if value is not None}
    assert given == {*names, "mask"}


@pytest.mark.parametrize("name", ["student_mass", "overlap", "student_entropy"])
def test_a_name_of_the_student_shares_the_read_of_full_softmaxes(
    name: str, reads: Reads, sides: tuple[Tensor, Tensor, Tensor]
) -> None:
    student, teacher, _ = sides
    options = {"outside": "bucket", "return_stats": (name,), "backend": reads.backend}
    topk_divergence(student, teacher, K, **options)
    assert reads.of(student) == reads.of(teacher) == 1


def test_a_given_support_leaves_one_read_of_the_student(
    reads: Reads, sides: tuple[Tensor, Tensor, Tensor]
) -> None:
    student, teacher, tokens = sides
    support: TopK = select_topk(teacher, K, with_logsumexp=True)
    backend, everything = reads.backend, {"token_ids": tokens, **EVERYTHING}
    bucket = {"outside": "bucket", "backend": backend}
    mass = {"return_stats": ("student_mass",), "backend": backend}
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("tail_logsumexp", lambda: topk_rkl(student, support, **mass)),
        ("select_with_tail", lambda: topk_divergence(student, support, **bucket, **everything)),
        (
            "full_divergence" if backend == "cpu" else "tail_logsumexp",
            lambda: topk_divergence(student, support, **bucket),
        ),
    ]
    for operator, call in calls:
        reads.operators.clear()
        call()
        assert reads.operators == [operator]


def test_a_log_prob_alone_is_one_read(reads: Reads, sides: tuple[Tensor, Tensor, Tensor]) -> None:
    student, _, tokens = sides
    token_logprobs(student, tokens, backend=reads.backend)
    assert reads.operators == ["tail_logsumexp"]


def test_what_masked_rows_hold_changes_nothing(sides: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, tokens = sides
    mask = torch.tensor([True, False, True])
    _, logprobs, stats = topk_divergence(
        student, teacher, K, token_ids=tokens, mask=mask, outside="bucket", **EVERYTHING
    )
    student[1], teacher[1], tokens[1] = torch.nan, torch.inf, -100
    _, again, same = topk_divergence(
        student, teacher, K, token_ids=tokens, mask=mask, outside="bucket", **EVERYTHING
    )
    assert torch.equal(logprobs, again)
    for before, after in zip(stats, same, strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=0, equal_nan=True)
