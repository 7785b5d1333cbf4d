"""``OPD_KERNELS_DEBUG`` and ``debug()``: the first bad row raises, masked rows hold anything."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_memory import GuardedRows

import opd_kernels
from opd_kernels import (
    Divergence,
    EntryGradient,
    LinearLogits,
    TopK,
    TopKReverseKL,
    debug,
    debugging,
    linear_topk_rkl,
    sampled_token_loss,
    select_topk,
    token_logprobs,
    topk_divergence,
    topk_rkl,
)
from opd_kernels._arguments import Allowed, Objective, Temperature
from opd_kernels._autograd import Request

INF, NAN = float("inf"), float("nan")
ROWS, V, K, H = (2, 3), 40, 4, 8
BAD = (1, 1)  # the row that is spoilt, and then masked
MASK = torch.ones(ROWS, dtype=torch.bool)
MASK[BAD] = False


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


def spoilt(tensor: torch.Tensor, value: float, *place: int) -> torch.Tensor:
    """A copy with the value at the place of the bad row."""
    tensor = tensor.clone()
    tensor[(*BAD, *place)] = value
    return tensor


STUDENT, TEACHER = drawn(*ROWS, V), drawn(*ROWS, V) * 2
HIDDEN, WEIGHT, BIAS = drawn(*ROWS, H), drawn(V, H), drawn(V)
SUPPORT, ONES = select_topk(TEACHER, K), torch.ones(ROWS)
TOKENS = torch.arange(6).view(ROWS)
HEAD = LinearLogits(HIDDEN, WEIGHT, BIAS)


def rkl(student: torch.Tensor = STUDENT, teacher: Any = TEACHER, **options: Any) -> torch.Tensor:
    return topk_rkl(student, teacher, None if isinstance(teacher, TopK) else K, **options)


def divergence(student: torch.Tensor = STUDENT, **options: Any) -> Any:
    return topk_divergence(student, TEACHER, K, return_token_logprobs=True, **options)


def linear(
    hidden: torch.Tensor = HIDDEN,
    weight: torch.Tensor = WEIGHT,
    teacher: Any = SUPPORT,
    **more: Any,
) -> torch.Tensor:
    return linear_topk_rkl(hidden, weight, teacher, **more)


def apply(
    student: torch.Tensor = STUDENT,
    temperatures: Any = None,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    objective = Objective(Temperature(temperature, temperatures))
    request = Request(allowed=Allowed(V, None, mask), objective=objective)
    return TopKReverseKL.apply(student, TEACHER, K, request)[0]


def sampled(name: str, value: float, **more: Any) -> torch.Tensor:
    values = dict.fromkeys(("logprobs", "old_logprobs", "advantages"), STUDENT[..., 0])
    return sampled_token_loss(**values | {name: spoilt(STUDENT[..., 0], value)}, **more)


def with_ids(value: int) -> TopK:
    return TopK(spoilt(SUPPORT.ids, value, 2), SUPPORT.logits)


def with_logit(value: float) -> TopK:
    return TopK(SUPPORT.ids, spoilt(SUPPORT.logits, value, 2))


# A call with something bad in one row, and the message; each takes a mask as well.
BEST = int(SUPPORT.ids[BAD][0])
CALLS: dict[str, tuple[Callable[..., Any], str]] = {
    "student nan": (
        lambda **m: rkl(spoilt(STUDENT, NAN, 7), **m),
        r"student: nan at \[1, 1, 7\], in row \(1, 1\), allowed are numbers and -inf",
    ),
    "student inf": (
        lambda **m: rkl(spoilt(STUDENT, INF, BEST), teacher=SUPPORT, **m),
        rf"student: inf at \[1, 1, {BEST}\]",
    ),
    "bfloat16": (
        lambda **m: rkl(spoilt(STUDENT.bfloat16(), INF, 7), **m),
        r"student: inf at \[1, 1, 7\]",
    ),
    "student with statistics": (
        lambda **m: rkl(spoilt(STUDENT, NAN, 7), return_stats=True, **m),
        r"student: nan at \[1, 1, 7\]",
    ),
    "student's mass": (
        lambda **m: rkl(
            spoilt(STUDENT, NAN, 7), banned_ids=[7], return_stats=("student_mass",), **m
        ),
        r"student: nan at \[1, 1, 7\]",
    ),
    "student with log-probs": (
        lambda **m: divergence(
            spoilt(STUDENT, INF, 7),
            token_ids=TOKENS,
            banned_ids=[7],
            **m,
        ),
        r"student: inf at \[1, 1, 7\]",
    ),
    "sampled token of a log-prob": (
        lambda **m: divergence(token_ids=spoilt(TOKENS, -100), **m),
        rf"token_ids: -100 in row \(1, 1\), allowed are 0 to {V - 1}",
    ),
    "token_logprobs": (
        lambda **m: token_logprobs(spoilt(STUDENT, NAN, 7), TOKENS, **m),
        r"logits: nan at \[1, 1, 7\]",
    ),
    "token of token_logprobs": (
        lambda **m: token_logprobs(STUDENT, spoilt(TOKENS, V), **m),
        rf"token_ids: {V} in row \(1, 1\), allowed are 0 to {V - 1} \(the logits' vocabulary\)",
    ),
    "linear hidden with statistics": (
        lambda **m: linear(spoilt(HIDDEN, NAN, 3), return_stats=True, **m),
        r"student_hidden: nan at \[1, 1, 3\]",
    ),
    "teacher nan": (
        lambda **m: rkl(teacher=spoilt(TEACHER, NAN, 39), **m),
        r"teacher logits: nan at \[1, 1, 39\], in row \(1, 1\)",
    ),
    "teacher inf": (
        lambda **m: rkl(teacher=spoilt(TEACHER, INF, 0), return_stats=True, **m),
        r"teacher logits: inf at \[1, 1, 0\]",
    ),
    "support id": (
        lambda **m: rkl(teacher=with_ids(V), **m),
        r"teacher ids \(TopK\): 40 at \[1, 1, 2\], in row \(1, 1\), allowed are -1 and 0 to 39",
    ),
    "support id below -1": (
        lambda **m: rkl(teacher=with_ids(-2), **m),
        r"teacher ids \(TopK\): -2 at \[1, 1, 2\]",
    ),
    "support logit": (
        lambda **m: rkl(teacher=with_logit(NAN), **m),
        r"teacher logits \(TopK\): nan at \[1, 1, 2\]",
    ),
    "temperature": (
        lambda **m: rkl(temperature=spoilt(ONES, -2.0), **m),
        r"temperature: -2.0 in row \(1, 1\), allowed are 1.18e-38 to 3.4e\+38",
    ),
    "teacher_temperature": (
        lambda **m: rkl(teacher_temperature=spoilt(ONES.half(), INF), **m),
        r"teacher_temperature: inf in row \(1, 1\)",
    ),
    "weight": (
        lambda **m: rkl(weight=spoilt(ONES, NAN), **m),
        r"weight: nan in row \(1, 1\), allowed are finite numbers",
    ),
    "apply": (
        lambda **m: apply(spoilt(STUDENT, NAN, 7), **m),
        r"student: nan at \[1, 1, 7\]",
    ),
    "apply temperature": (
        lambda **m: apply(temperatures=spoilt(ONES, 0.0), **m),
        r"temperature: 0.0 in row \(1, 1\)",
    ),
    "linear hidden": (
        lambda **m: linear(spoilt(HIDDEN, -INF, 3), **m),
        r"student_hidden: -inf at \[1, 1, 3\], in row \(1, 1\), allowed are finite numbers",
    ),
    "linear id": (
        lambda **m: linear(teacher=with_ids(V), **m),
        r"teacher ids \(TopK\): 40 at \[1, 1, 2\]",
    ),
    "linear teacher": (
        lambda **m: linear(teacher=spoilt(TEACHER, NAN, 5), k=K, **m),
        r"teacher logits: nan at \[1, 1, 5\]",
    ),
    "linear teacher's hidden": (
        lambda **m: linear(teacher=LinearLogits(spoilt(HIDDEN, NAN, 5), WEIGHT), k=K, **m),
        r"LinearLogits hidden: nan at \[1, 1, 5\], in row \(1, 1\)",
    ),
    "linear weight of rows": (
        lambda **m: linear(weight=WEIGHT, temperature=spoilt(ONES, NAN), **m),
        r"temperature: nan in row \(1, 1\)",
    ),
    "select": (
        lambda **m: select_topk(spoilt(TEACHER, NAN, 5), K, **m),
        r"teacher logits: nan at \[1, 1, 5\]",
    ),
    "select from a head that overflows": (
        lambda **m: select_topk(
            LinearLogits(spoilt(HIDDEN, 6e4, 3).half(), WEIGHT.half() * 10), K, **m
        ),
        r"logits of LinearLogits, rounded to their dtype: inf at \[1, 1, 0\]",
    ),
    "sampled logprobs": (
        lambda **m: sampled("logprobs", NAN, **m),
        r"logprobs: nan in row \(1, 1\), allowed are numbers and -inf",
    ),
    "sampled old_logprobs": (
        lambda **m: sampled("old_logprobs", -INF, **m),
        r"old_logprobs: -inf in row \(1, 1\), allowed are finite numbers",
    ),
    "sampled advantages": (
        lambda **m: sampled("advantages", INF, **m),
        r"advantages: inf in row \(1, 1\)",
    ),
}


@pytest.mark.parametrize(("call", "message"), CALLS.values(), ids=CALLS.keys())
def test_a_bad_row_raises_in_debug_mode_alone_and_not_where_it_is_masked(
    call: Callable[..., Any], message: str
) -> None:
    call()
    with debug():
        with pytest.raises(ValueError, match=message):
            call()
        call(mask=MASK)
        with pytest.raises(ValueError, match=message):
            call(mask=~MASK)


# What is of no row.
OTHERS: dict[str, tuple[Callable[..., Any], str]] = {
    "mask": (lambda: rkl(mask=MASK & ~MASK), "mask leaves none of 6 rows"),
    "mask of select": (lambda: select_topk(HEAD, K, mask=MASK & ~MASK), "mask leaves none of 6"),
    "mask of linear": (lambda: linear(mask=MASK & ~MASK), "mask leaves none of 6"),
    "mask of sampled": (lambda: sampled("logprobs", 0, mask=MASK & ~MASK), "mask leaves none of 6"),
    "temperature": (lambda: rkl(temperature=torch.tensor(-1.0)), "temperature is -1.0, allowed"),
    "apply's temperature": (lambda: apply(temperature=0.0), "temperature is 0.0, allowed"),
    "normalizer": (lambda: rkl(normalizer=torch.tensor(0)), "normalizer is 0.0, allowed"),
    "nan normalizer": (lambda: linear(normalizer=NAN), "normalizer is nan, allowed"),
    "sampled": (lambda: sampled("logprobs", 0, normalizer=-1.0), "normalizer is -1.0, allowed"),
    "a single row": (
        lambda: topk_rkl(spoilt(STUDENT, NAN, 7)[BAD], TEACHER[BAD], K),
        r"student: nan at \[7\], in row \(\)",
    ),
    "a single row's weight": (
        lambda: topk_rkl(STUDENT[BAD], TEACHER[BAD], K, weight=torch.tensor(NAN)),
        r"weight: nan in row \(\)",
    ),
    "the first of several": (
        lambda: rkl(torch.full_like(STUDENT, NAN), mask=torch.arange(6).view(ROWS) >= 2),
        r"student: nan at \[0, 2, 0\], in row \(0, 2\)",
    ),
    "student's head": (
        lambda: linear(weight=WEIGHT.index_fill(0, torch.tensor(BEST), NAN)),
        rf"student_weight: nan at \[{BEST}, 0\]",
    ),
    "student's bias": (
        lambda: linear(student_bias=BIAS.index_fill(0, torch.tensor(BEST), INF)),
        rf"student_bias: inf in row \({BEST},\)",
    ),
    "teacher's head": (
        lambda: select_topk(LinearLogits(HIDDEN, WEIGHT.index_fill(0, torch.tensor(3), INF)), K),
        r"LinearLogits weight: inf at \[3, 0\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_what_is_of_no_row_raises_too(call: Callable[..., Any], message: str) -> None:
    call()
    with debug(), pytest.raises(ValueError, match=message):
        call()


def test_what_takes_no_part_may_hold_anything() -> None:
    """Absent entries, banned ids, ids from vocab_size on, and heads at ids that are not used."""
    last, first = torch.tensor([V - 1]), torch.tensor([0])
    student, teacher = (x.index_fill(-1, first, NAN) for x in (STUDENT, TEACHER))
    student, teacher = (x.index_fill(-1, last, INF) for x in (student, teacher))
    allowed: dict[str, Any] = {"banned_ids": [0], "vocab_size": V - 1}
    absent = TopK(with_ids(V).ids, spoilt(SUPPORT.logits, -INF, 2))
    unnamed = TopK(with_ids(-1).ids, spoilt(SUPPORT.logits, NAN, 2))
    unused = torch.tensor(sorted(set(range(V)) - set(SUPPORT.ids.flatten().tolist()))[:1])
    head = WEIGHT.index_fill(0, first, NAN).index_fill(0, last, INF)
    with debug():
        rkl(student, teacher=teacher, **allowed)
        rkl(student, teacher=teacher, return_stats=("overlap", "valid_k"), **allowed)
        rkl(torch.full_like(STUDENT, -INF))
        for support in (absent, unnamed):
            rkl(teacher=support)
            linear(teacher=support)
        select_topk(teacher, K, **allowed)
        select_topk(LinearLogits(HIDDEN, head, BIAS.index_fill(0, first, -INF)), K, **allowed)
        linear(weight=WEIGHT.index_fill(0, unused, NAN))
        sampled("logprobs", -INF)


def test_a_head_s_full_softmax_takes_entries_that_take_no_part() -> None:
    """A support's banned ids and those from vocab_size on; not ids that the student lacks."""
    support = select_topk(TEACHER, K, with_logsumexp=True)
    tokens = support.ids[..., 0]
    calls: list[dict[str, Any]] = [
        {"banned_ids": tokens.unique()},
        {"vocab_size": V // 2},
        {"banned_ids": tokens.unique(), "include_token": True, "token_ids": tokens},
    ]
    beyond = TopK(with_ids(V).ids, support.logits, support.logsumexp)
    for call in calls:
        teacher = TEACHER if "token_ids" in call else support
        k = K if "token_ids" in call else None
        expected = topk_divergence(HEAD, teacher, k, outside="bucket", **call)
        with debug():
            assert torch.equal(
                topk_divergence(HEAD, teacher, k, outside="bucket", **call), expected
            )
    with debug(), pytest.raises(ValueError, match=f"the student has a vocabulary of {V}"):
        topk_divergence(HEAD, beyond, outside="bucket")


@pytest.mark.parametrize("vocab", [5, 5000])
def test_masked_rows_and_padded_vocabulary_are_not_read(vocab: int) -> None:
    mask = torch.tensor([True, False, True, False])
    pages = []
    try:
        for _ in range(2):
            rows = GuardedRows(4, vocab, torch.float32, at_end=True)
            pages.append(rows)
            rows.fill(torch.randn(4, vocab))
            for row in range(4):
                rows.close(row, whole=not mask[row])
        # With columns on the pages behind the rows, which are closed.
        student, teacher = (
            rows.logits.as_strided((4, vocab + 9), rows.logits.stride()) for rows in pages
        )
        with debug():
            topk_rkl(student, teacher, 3, mask=mask, vocab_size=vocab)
            select_topk(teacher, 3, mask=mask, vocab_size=vocab)
    finally:
        for rows in pages:
            rows.open()


def test_rows_in_many_pieces_give_the_first_bad_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debugging, "_PIECE_ELEMENTS", 2 * V)
    student = STUDENT.clone()
    student[1, 1, 9] = student[1, 2, 0] = NAN
    with debug(), pytest.raises(ValueError, match=r"nan at \[1, 1, 9\]"):
        rkl(student.transpose(0, 1).contiguous().transpose(0, 1))


def test_good_calls_give_the_same_bits(backend: str) -> None:
    def results() -> list[torch.Tensor]:
        student = STUDENT.clone().requires_grad_()
        support = select_topk(TEACHER, K, mask=MASK, backend=backend)
        losses = [
            topk_rkl(student, teacher, mask=MASK, weight=ONES, temperature=ONES, backend=backend)
            for teacher in (TEACHER, support)
        ]
        return [*losses, *torch.autograd.grad(sum(losses), student), support.ids, support.logits]

    plain = results()
    with debug():
        checked = results()
    for ours, theirs in zip(checked, plain, strict=True):
        assert torch.equal(ours, theirs)


def test_no_rows_are_fine() -> None:
    with debug():
        topk_rkl(STUDENT[:0], TEACHER[:0], K, mask=MASK[:0], weight=ONES[:0])
        linear(HIDDEN[:0], teacher=SUPPORT[:0], mask=MASK[:0])


@pytest.mark.parametrize("dense", [False, True])
def test_what_is_added_to_a_gradient_or_becomes_one_is_checked(dense: bool) -> None:
    grad, ids, entries = STUDENT.clone(), SUPPORT.ids, drawn(*ROWS, K)

    def add(ids: torch.Tensor = ids, entries: torch.Tensor = entries, **more: Any) -> None:
        gradient = EntryGradient(ids, entries)
        if dense:
            gradient.dense(V, **more)
        else:
            gradient.add_to_(grad.clone(), **more)

    twice = spoilt(ids, int(ids[(*BAD, 0)]), 2)
    known = "vocab_size is 40" if dense else "grad has a vocabulary of 40"
    calls = {
        rf"ids: 40 at \[1, 1, 2\].*allowed are -1 and 0 to 39 \({known}": lambda: add(
            spoilt(ids, V, 2)
        ),
        rf"ids: {BEST} at \[1, 1, 2\].*each id once": lambda: add(twice),
        r"entry_grad: nan at \[1, 1, 1\]": lambda: add(entries=spoilt(entries, NAN, 1)),
        r"upstream: inf in row \(1, 1\)": lambda: add(upstream=spoilt(ONES, INF)),
    }
    with debug():
        add(spoilt(spoilt(ids, -1, 1), -1, 2), spoilt(entries, NAN, 1))
        for message, call in calls.items():
            with pytest.raises(ValueError, match=message):
                call()
    for call in calls.values():
        call()


@pytest.mark.parametrize(
    ("message", "options", "spoil"),
    [
        (r"student: nan at \[1, 1, 39\]", {"outside": "bucket"}, "student"),
        (r"teacher logits: inf at \[1, 1, 39\]", {"outside": "truncate"}, "teacher"),
        (r"token_ids: -100 in row \(1, 1\), allowed are 0 to 39", {"outside": "sample"}, "token"),
        (r"token_ids: 40 in row \(1, 1\)", {"include_token": True}, "token"),
        (r"the divergence's weights: inf at \[1, 1, 1\]", {"outside": "bucket"}, "weight"),
    ],
)
def test_what_a_divergence_takes_more_is_checked(
    message: str, options: dict[str, Any], spoil: str
) -> None:
    student, teacher, weight = STUDENT, TEACHER, ONES
    token = torch.full(ROWS, 3)
    if spoil == "student":
        student = spoilt(STUDENT, NAN, 39)
    elif spoil == "teacher":
        teacher = spoilt(TEACHER, INF, 39)
    elif spoil == "token":
        token = spoilt(token, 40 if "include_token" in options else -100)
    else:
        weight = spoilt(ONES, INF)
    divergence = Divergence(reverse=1.0, forward=weight) if spoil == "weight" else "reverse_kl"

    def loss(**more: Any) -> torch.Tensor:
        return topk_divergence(
            student, teacher, K, divergence=divergence, token_ids=token, **options, **more
        )

    with debug():
        loss(mask=MASK)
        with pytest.raises(ValueError, match=message):
            loss()
    loss()


@pytest.fixture
def spoilt_student() -> torch.Tensor:
    return spoilt(STUDENT, NAN, 7)


def test_fields_of_a_support_that_do_not_fit_its_entries_are_found() -> None:
    student, teacher = drawn(*ROWS, V), 3 * drawn(*ROWS, V + 1)[..., 1:]
    best = teacher.argmax(-1)
    topk = select_topk(teacher, K, token_ids=best, with_logsumexp=True, temperature=0.5)
    raw = TopK(topk.ids, topk.logits, logsumexp=torch.zeros(ROWS))
    served = TopK.from_tensors(teacher.log_softmax(-1).bfloat16(), torch.arange(V).expand(*ROWS, V))
    moved = {"token_ids": spoilt(best, topk.ids[BAD][-1].item()), "include_token": True}
    tempered = {"outside": "bucket", "temperature": 0.5}
    topk_divergence(student, raw, outside="bucket")
    with debug():
        topk_divergence(student, served, outside="bucket")
        topk_divergence(student, topk, **tempered, token_ids=best, include_token=True)
        with pytest.raises(ValueError, match=r"entries by its logsumexp: .* in row \(0, 0\)"):
            topk_divergence(student, raw, outside="bucket")
        with pytest.raises(ValueError, match=r"token in token_ids: .* in row \(1, 1\)"):
            topk_divergence(student, topk, **moved)
        topk_divergence(student, topk, **moved, mask=MASK)


def test_a_compiled_call_is_checked_when_it_runs(spoilt_student: torch.Tensor) -> None:
    compiled = torch.compile(rkl, fullgraph=True, backend="aot_eager")
    temperature = {"temperature": ONES, "weight": ONES}
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(spoilt_student, **temperature)
        with debug():
            compiled(STUDENT, **temperature)
    with debug():
        with pytest.raises(ValueError, match=r"student: nan at \[1, 1, 7\]"):
            compiled(spoilt_student, **temperature)
        with pytest.raises(ValueError, match=r"temperature: nan in row \(1, 1\)"):
            compiled(STUDENT, **temperature | {"temperature": spoilt(ONES, -1.0)})


def test_under_vmap_the_mapped_dimension_is_part_of_the_row(spoilt_student: torch.Tensor) -> None:
    mapped = torch.vmap(lambda student, teacher, ones: rkl(student, teacher, weight=ones))
    with debug():
        mapped(STUDENT, TEACHER, ONES)
        with pytest.raises(ValueError, match=r"student: nan at \[1, 1, 7\]"):
            mapped(spoilt_student, TEACHER, ONES)


def test_under_func_grad_it_raises(spoilt_student: torch.Tensor) -> None:
    with debug():
        torch.func.grad(rkl)(STUDENT)
        with pytest.raises(ValueError, match=r"student: nan at \[1, 1, 7\]"):
            torch.func.grad(rkl)(spoilt_student)
        with pytest.raises(ValueError, match=r"weight: nan in row \(1, 1\)"):
            torch.func.grad(lambda weight: rkl(weight=weight))(spoilt(ONES, NAN))


def test_meta_tensors_are_left_alone() -> None:
    with debug():
        rkl(STUDENT.to("meta"), TEACHER.to("meta"), weight=ONES.to("meta"))
        sampled_token_loss(*(ONES.to("meta") for _ in range(3)))


def test_the_switch_is_put_back_after_a_block_and_after_an_error() -> None:
    def fail() -> None:
        with debug(False):
            assert not debugging.ON
        assert debugging.ON
        raise ZeroDivisionError

    assert not debugging.ON
    with pytest.raises(ZeroDivisionError), debug():
        fail()
    assert not debugging.ON


@pytest.mark.parametrize("value", ["0", 0, None])
def test_the_switch_is_true_or_false(value: object) -> None:
    with pytest.raises(TypeError, match="enabled is a"), debug(value):
        pass
    assert not debugging.ON


@pytest.fixture
def reloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], bool]]:
    """Whether the module is on when it is imported with that value in the environment."""

    def reload(value: str) -> bool:
        monkeypatch.setenv(debugging.VARIABLE, value)
        return importlib.reload(debugging).ON

    yield reload
    monkeypatch.undo()
    importlib.reload(debugging)


def test_the_environment_turns_it_on(
    reloaded: Callable[[str], bool], spoilt_student: torch.Tensor
) -> None:
    assert not reloaded("")
    assert not reloaded("0")
    assert reloaded("1")
    with pytest.raises(ValueError, match="student: nan"):
        opd_kernels.topk_rkl(spoilt_student, TEACHER, K)
    with pytest.raises(ValueError, match="OPD_KERNELS_DEBUG is 'yes', allowed are 1"):
        reloaded("yes")


@pytest.mark.parametrize("function", [topk_rkl, EntryGradient.of])
@pytest.mark.parametrize(("teacher", "k"), [(TEACHER, V + 1), (SUPPORT, K + 1), (TEACHER, 0)])
def test_a_wrong_k_is_told_before_values_are_looked_at(function: Any, teacher: Any, k: int) -> None:
    with debug(), pytest.raises(ValueError, match=f"k is {k}"):
        function(STUDENT, teacher, k, temperature=spoilt(ONES, NAN))
