"""Logits and heads whose columns lie on several ranks: what one rank computes from all of them.

A pool of four gloo ranks checks cases of ``opd_kernels.testing`` as they stand, against float64:
selections, losses, gradients, statistics and log-probs (``sharded_calls``).
"""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import sharded_calls
import torch
import torch.distributed as dist
from effort import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_pool import Failure, LostRanksError, Pool
from sharded_calls import KINDS, TEACHERS, Layout

from opd_kernels import VocabShard, topk_rkl
from opd_kernels.divergences import OUTSIDE
from opd_kernels.fuzz import cases
from opd_kernels.testing import Case, inputs

RANKS = 4
EPSILON = torch.finfo(torch.float64).eps


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(RANKS)
    yield pool
    pool.close()


def check(pool: Pool, drawn: Sequence[tuple[Case, Layout]], backend: str | None = None) -> None:
    """Each case is within its budgets, and all ranks return the same bits."""
    for ranks in sorted({layout.ranks for _, layout in drawn}):
        some = [(case, layout) for case, layout in drawn if layout.ranks == ranks]
        found = pool.run(sharded_calls.check, some, backend, ranks=ranks, limit=60)
        for number, (case, layout) in enumerate(some):
            assert all(each[number] == found[0][number] for each in found), (case, layout)


def layouts(count: int, teacher: str | None = None) -> list[Layout]:
    """Layouts on 1 to 4 ranks, every kind of them."""
    kinds = itertools.cycle(itertools.product(KINDS, TEACHERS, range(1, RANKS + 1)))
    return [
        Layout(ranks, kind, bool(seed % 2), teacher or theirs, seed)
        for seed, (kind, theirs, ranks) in zip(range(count), _spread(kinds), strict=False)
    ]


def _spread(kinds: Iterator[tuple[str, str, int]]) -> Iterator[tuple[str, str, int]]:
    """Every 7th of 36, so that neighbours differ in everything."""
    return itertools.islice(kinds, 0, None, 7)


def member(outside: str, number: int, seed: int, **fields: Any) -> Case:
    """A case of the family."""
    names = {"generalize": inputs.WITHOUT_SKEW, "sample": inputs.SAMPLED}.get(
        outside, inputs.MEMBERS
    )
    token = inputs.TOKENS[seed % len(inputs.TOKENS)]
    if outside == "sample" and token == "none":
        token = "any"
    usual: dict[str, Any] = {
        "rows": (4,),
        "student_vocab": 33,
        "teacher_vocab": 33,
        "k": (4, 17, 33)[seed % 3],
        "divergence": names[number % len(names)],
        "outside": outside,
        "token": token,
        "include_token": token != "none" and outside != "sample" and seed % 2 == 0,
        "temperature": inputs.TEMPERATURES[seed % 4],
        "mask": inputs.MASKS[seed % 3],
        "reduction": ("mean", "sum", "none")[seed % 3],
        "upstream": "random" if seed % 3 == 2 else "one",
        "seed": seed,
    }
    return Case(**{**usual, **fields})


@pytest.mark.parametrize("outside", OUTSIDE)
def test_every_member(outside: str, pool: Pool) -> None:
    drawn = []
    for seed, layout in enumerate(layouts(24)):
        support = inputs.SUPPORTS[seed // 2 % 2]
        banned = inputs.BANS[seed % 4]
        size = (None, 30, 20)[seed // 4 % 3]
        case = member(
            outside, seed, seed, support=support, watched=True, banned=banned, vocab_size=size
        )
        drawn.append((case, layout))
    check(pool, drawn)


@pytest.mark.parametrize("vocab", [1, 2, 7, 33, 129])
def test_tiny_and_odd_vocabularies(vocab: int, pool: Pool) -> None:
    """K above a shard's width, K of all ids, empty shards, ties between ranks."""
    drawn = []
    for seed, layout in enumerate(layouts(20)):
        outside, content = (
            OUTSIDE[seed % 5],
            ("normal", "equal", "quantised", "clustered")[seed % 4],
        )
        k = max(min(vocab, (vocab, vocab // 2 + 1, 3)[seed % 3]), 1)
        case = member(
            outside, seed, seed, student_vocab=vocab, teacher_vocab=vocab, k=k,
            teacher_content=content, student_content=content if seed % 3 else "normal",
            support=inputs.SUPPORTS[seed % 2], watched=seed % 2 == 0, inplace=seed % 4 == 1,
        )  # fmt: skip
        drawn.append((case, layout))
    check(pool, drawn)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_contents_that_are_hard(outside: str, pool: Pool) -> None:
    """Ties, NaN and infinities of either side, in losses, gradients and statistics."""
    contents = [(side, content) for content in inputs.CONTENTS for side in ("student", "teacher")]
    drawn = []
    for (seed, (side, content)), layout in zip(enumerate(contents), layouts(26), strict=True):
        case = member(outside, seed, seed, watched=True, **{f"{side}_content": content})
        drawn.append((case, layout))
    check(pool, drawn)


@pytest.mark.parametrize("support", inputs.SUPPORTS)
def test_vocabularies_of_two_widths(support: str, pool: Pool) -> None:
    """A sampled token that only the student knows has a log-prob, and is in its tail."""
    drawn = []
    for seed, layout in enumerate(layouts(20, "own")):
        outside, vocabs = OUTSIDE[seed % 5], ((33, 20), (20, 33))[seed % 3 == 2]
        case = member(
            outside, seed, seed, student_vocab=vocabs[0], teacher_vocab=vocabs[1], support=support,
            k=(1, 9, 20)[seed % 3], watched=True, token="any", include_token=False,
        )  # fmt: skip
        drawn.append((case, layout))
    check(pool, drawn)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_heads(outside: str, pool: Pool) -> None:
    """Heads of both sides, with scale, bias and softcap, frozen or trained."""
    drawn = []
    for seed, layout in enumerate(layouts(20)):
        teacher = ("linear", "logits", "topk_int32")[seed % 3]
        case = member(
            outside, seed, seed, hidden=inputs.HIDDEN_SIZES[seed % 6], head=inputs.HEADS[seed % 5],
            frozen=seed % 4 == 3, teacher=teacher, banned=inputs.BANS[seed % 4],
            vocab_size=(None, 25)[seed // 5 % 2],
            teacher_temperature="one" if teacher == "topk_int32" else None,
        )  # fmt: skip
        drawn.append((case, layout))
    check(pool, drawn)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_given_supports(outside: str, pool: Pool) -> None:
    """In any order, with repeats, gaps and ids that take no part."""
    drawn = []
    for seed, layout in enumerate(layouts(20)):
        case = member(
            outside, seed, seed, teacher=inputs.TEACHERS[1 + seed % 2], watched=True,
            teacher_temperature="one", carried=inputs.CARRIED[seed % 3],
            banned=inputs.BANS[seed % 4],
        )  # fmt: skip
        if outside == "renormalize" and seed % 2:
            case = Case(
                rows=(4,), student_vocab=33, teacher_vocab=33, k=20, teacher=case.teacher,
                mask=case.mask, seed=seed,
            )  # fmt: skip
        drawn.append((case, layout))
    check(pool, drawn)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(dtype: str, pool: Pool) -> None:
    """Half precision rounds a head's logits, so of those there is no bound for full softmaxes."""
    drawn = []
    for seed, layout in enumerate(layouts(20)):
        hidden = (0, 17)[seed // 2 % 2]
        pair = dtype, ("float32", dtype)[seed % 2]
        student, teacher = pair if hidden or seed % 8 > 1 else pair[::-1]
        outside = "renormalize" if hidden and dtype != "float64" else OUTSIDE[seed % 5]
        case = member(
            outside, seed, seed, student_dtype=student, teacher_dtype=teacher, hidden=hidden,
            watched=not hidden,
        )  # fmt: skip
        drawn.append((case, layout))
    check(pool, drawn, "reference" if dtype == "float64" else None)


def test_a_head_s_shard_of_padding_alone(pool: Pool) -> None:
    """Its rows are not read: they are NaN here."""
    shapes = ((4, 3), (5, 4), (9, 4))
    drawn = [
        (
            member(
                outside, seed, seed, student_vocab=vocab, teacher_vocab=vocab, k=vocab,
                hidden=3, head=inputs.HEADS[seed % 5], token="any",
            ),
            Layout(ranks, "padded", bool(seed % 2), TEACHERS[seed % 3], seed),
        )
        for seed, (outside, (vocab, ranks)) in enumerate(itertools.product(OUTSIDE, shapes))
    ]  # fmt: skip
    check(pool, drawn)


def test_no_rows(pool: Pool) -> None:
    drawn = [
        (member(OUTSIDE[seed % 5], seed, seed, rows=(0,), hidden=(0, 3)[seed % 2]), layout)
        for seed, layout in enumerate(layouts(20))
    ]
    check(pool, drawn)


@st.composite
def any_layout(draw: Any) -> Layout:
    return Layout(
        draw(st.integers(1, RANKS)),
        draw(st.sampled_from(KINDS)),
        draw(st.booleans()),
        draw(st.sampled_from(TEACHERS)),
        draw(st.integers(0, 99)),
    )


@settings(
    derandomize=True,
    max_examples=examples(60),
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(case=cases(False, 140, {"watched": (True, False)}), layout=any_layout())
def test_random_cases(pool: Pool, case: Case, layout: Layout) -> None:
    check(pool, [(case, layout)])


def test_a_renormalised_loss_has_the_bits_of_one_rank(pool: Pool) -> None:
    """Its entries are selected and gathered exactly, and the arithmetic is the same from there."""
    drawn = []
    for seed, layout in enumerate(layouts(36)):
        source = random.Random(seed)
        content = ("normal", "quantised", "equal", "half_neg_inf")[seed % 4]
        case = Case(
            rows=(4,), student_vocab=65, teacher_vocab=65, k=source.choice((1, 9, 40, 65)),
            student_dtype=source.choice(("float32", "bfloat16")),
            teacher_dtype=source.choice(("float32", "float16")), teacher_content=content,
            mask=inputs.MASKS[seed % 3], temperature=inputs.TEMPERATURES[seed % 4],
            banned=inputs.BANS[seed % 3], inplace=seed % 5 == 0, seed=seed,
        )  # fmt: skip
        drawn.append((case, layout))
    for ranks in range(1, RANKS + 1):
        some = [each for each in drawn if each[1].ranks == ranks]
        pool.run(sharded_calls.same_bits, some, ranks=ranks)


FROM_HEADS: list[dict[str, Any]] = [
    {"outside": "bucket", "background": "sampled"},
    {"outside": "generalize", "background": "sampled", "return_stats": True},
    {"outside": "bucket", "given": True},
    {"outside": "bucket", "return_token_logprobs": True, "return_stats": True},
    {"outside": "sample", "return_token_logprobs": True},
    {"return_token_logprobs": True, "return_stats": True},
    {"support": "student", "return_stats": True},
    {"support": "student", "outside": "bucket", "return_token_logprobs": True},
    {"include_token": True, "outside": "bucket", "return_stats": True},
    {"support": "student", "include_token": True, "k": 1},
    # Tokens that the teacher's vocabulary lacks.
    {"support": "student", "outside": "bucket", "return_token_logprobs": True, "teacher_vocab": 20},
]


@pytest.mark.parametrize("options", FROM_HEADS, ids=str)
def test_a_head_has_the_numbers_of_one_rank(options: dict[str, Any], pool: Pool) -> None:
    """In float64: sums of 33 terms in another order, of exponentials and of products.

    A term is off by a few roundings, and so is its exponent, whose size is below 16 here.
    """
    for layout in layouts(8):
        for found in pool.run(sharded_calls.beside_one_rank, layout, options, ranks=layout.ranks):
            for name, (off, largest) in found.items():
                assert off <= 33 * 16 * EPSILON * largest, (name, layout)


@pytest.mark.parametrize("of_head", [False, True])
def test_selections_scores_and_log_probs_are_those_of_one_rank(of_head: bool, pool: Pool) -> None:
    """Ids, logits and the nucleus bit for bit; sums as in the test above, their size below 64."""
    for layout in layouts(16):
        task = sharded_calls.reads_beside_one_rank
        for found in pool.run(task, layout, of_head, ranks=layout.ranks):
            for name, (off, largest) in found.items():
                assert off <= 33 * 64 * EPSILON * max(largest, 1), (name, layout)


def test_the_gradient_of_hidden_states_can_be_left_to_the_caller(pool: Pool) -> None:
    """Two numbers have one sum, whoever adds them."""
    (first, whole), (second, _) = pool.run(sharded_calls.gradient_parts, ranks=2)
    assert torch.equal(first + second, whole)
    assert not torch.equal(first, whole)


CALLS: list[dict[str, Any]] = [
    {},
    {"outside": "bucket"},
    {"outside": "truncate", "divergence": "jsd"},
    {"outside": "generalize"},
    {"outside": "sample"},
    {"include_token": True},
    {"support": "student", "outside": "bucket"},
    {"outside": "bucket", "return_token_logprobs": True},
    {"outside": "bucket", "return_stats": ("student_mass", "student_entropy")},
    {"support": "student"},
    {"outside": "bucket", "include_token": True},
    {"support": "student", "outside": "bucket", "include_token": True},
]


@pytest.mark.parametrize("of_head", [False, True])
@pytest.mark.parametrize(
    ("ranks", "teacher"), [(2, "logits"), (4, "logits"), (2, "topk"), (2, "head")]
)
def test_what_is_sent(ranks: int, of_head: bool, teacher: str, pool: Pool) -> None:
    """At most 12 N K + 32 N bytes from each rank in two collectives, whatever V is.

    A token is one more entry. Backward sums the gradient of hidden states alone.
    """
    rows, k = 6, 8
    for options in CALLS:
        if teacher == "topk" and options.get("support") == "student":
            continue
        sent, larger = (
            pool.run(sharded_calls.traffic, of_head, vocab, k, options, teacher, ranks=ranks)
            for vocab in (400, 1200)
        )
        assert sent == larger
        assert sent == sent[:1] * ranks
        forward = [each.size for each in sent[0] if each.phase == "forward"]
        backward = [each for each in sent[0] if each.phase == "backward"]
        most = 1 if teacher == "topk" else 2  # which takes no selection
        assert len(forward) <= most, options
        tokens = options.get("include_token") or options.get("return_token_logprobs")
        tokens = tokens or options.get("outside") == "sample"
        entries = k + (1 if tokens else 0)
        # The student's values as they order, and as the loss takes them.
        each = 16 if of_head and options == {"support": "student"} else 12
        assert sum(forward) <= (each * rows * entries + 32 * rows) * ranks, options
        assert [each.name for each in backward] == ["reduce"] * of_head, options
        assert sum(each.size for each in backward) == of_head * rows * 5 * 4 * ranks


def test_no_call_takes_more_than_two_collectives(pool: Pool) -> None:
    """Nor more than 24 N (K + 2) + 32 N bytes from each rank, with everything that there is."""
    counts = pool.run(sharded_calls.collectives, ranks=2)
    assert counts[0] == counts[1]
    assert len(counts[0]) > 150
    for call, (count, size) in counts[0].items():
        assert count == (1 if "topk" in call else 2), call
        assert size <= (24 * 3 * (5 + 2) + 32 * 3) * 2, call


def test_the_overlap_sends_the_student_s_own_best_ids_as_well(pool: Pool) -> None:
    options = {"outside": "bucket", "return_stats": ("overlap",)}
    sent = pool.run(sharded_calls.traffic, False, 400, 8, options, "logits", ranks=2)[0]
    assert len(sent) == 2
    assert sum(each.size for each in sent) <= (20 * 6 * 8 + 32 * 6) * 2


# What is wrong, and what the message says on every rank.
WRONG = {
    "k": r"^k is 5 on rank 0 and 6 on rank 1",
    "outside": r"^outside is bucket on rank 0 and renormalize on rank 1",
    "support": r"^support is teacher on rank 0 and student on rank 1",
    "token": r"^include_token is False on rank 0 and True on rank 1",
    "stats": r"^return_stats is None on rank 0 and \('overlap',\) on rank 1",
    "rows": r"^rows is \(4,\) on rank 0 and \(3,\) on rank 1",
    "dtype": r"^teacher dtype is torch.float64 on rank 0 and torch.float32 on rank 1",
    "reduced": r"^student reduce_hidden_grad is False on rank 0 and True on rank 1",
    "vocabulary": r"^student vocab_size is 20 on rank 0 and 21 on rank 1",
    "overlap": r"^the student's columns overlap: rank 1 begins at 8, those before it end at 10",
    "gap": r"^the student's columns leave a gap: rank 1 begins at 10, those before it end at 9",
    "short": r"^the student's columns end at 20, and VocabShard vocab_size is 22",
    "beyond": r"^the student's columns end at 10, and VocabShard vocab_size is 20",
    "teacher's width": r"^teacher has [78] columns on this rank and the student 10; .*\"whole\"",
    "topk": r"^teacher is a TopK, .* leave teacher_vocab_shard out",
    "whole": r"^teacher_vocab_shard=\"whole\" goes with a vocab_shard",
    "head's option": r"^student_logsumexp saves products with a head, and student is logits",
    "head's background": r"^background=\"sampled\" saves products with a head, and student is",
    "backend": r"^backend 'cuda' cannot serve this call: the tensors are on cpu",
    "head's backend": r"^backend 'cuda' cannot serve this call: the tensors are on cpu",
    "gather's backend": r"^backend 'cuda' cannot serve this call: the tensors are on cpu",
    "type": r"^vocab_shard is a int, expected a VocabShard or None",
}
SECONDS = 2.0  # that a rank waits in a collective of these tests


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("later", [False, True])
def test_a_call_that_does_not_fit_raises_on_every_rank(what: str, later: bool, pool: Pool) -> None:
    """Before it sends anything of the rows. After a call that fits, debugging looks again."""
    found = pool.outcomes(sharded_calls.wrong, what, later, ranks=2, timeout=SECONDS, limit=20)
    for failure in found:
        assert isinstance(failure, Failure)
        assert failure.kind == ("TypeError" if what == "type" else "ValueError"), failure.trace
        assert re.search(WRONG[what], failure.message), failure.trace


@pytest.mark.parametrize("later", [False, True])
def test_a_rank_that_raises_leaves_the_others_with_an_error_in_time(
    later: bool, pool: Pool
) -> None:
    began = time.monotonic()
    *others, last = pool.outcomes(
        sharded_calls.wrong, "raises", later, ranks=2, timeout=SECONDS, limit=20
    )
    assert time.monotonic() - began < SECONDS + 8
    assert last.message == "the data ran out"
    for failure in others:
        assert failure.kind == "RuntimeError"
        assert failure.message.startswith("a collective over the 2 ranks of a VocabShard failed")
        assert "another rank has raised" in failure.message


def test_without_a_process_group_the_message_says_how_to_make_one() -> None:
    logits = torch.randn(2, 10)
    with pytest.raises(RuntimeError, match=r"vocab_shard needs a process group; .*init_process"):
        topk_rkl(logits, logits, 4, vocab_shard=VocabShard(0, 10))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((-1, 10), "start is -1, allowed is 0 or more"),
        ((0, 0), "vocab_size is 0"),
        ((0, 10, None, 2), "reduce_hidden_grad"),
        ((True, 10), "start"),
        ((0, 10, 3), "group is a int, expected a ProcessGroup or None; of a DeviceMesh"),
        ((0, 10, dist.GroupMember.NON_GROUP_MEMBER), "group is one without this rank"),
    ],
)
def test_a_shard_of_wrong_numbers_is_refused(numbers: tuple[Any, ...], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"VocabShard {message}"):
        VocabShard(*numbers)


@pytest.fixture
def lost() -> Iterator[Pool]:
    """Two ranks that a test may lose."""
    pool = Pool(2)
    yield pool
    pool.close()


def test_the_pool_names_a_rank_that_dies_and_starts_again(lost: Pool) -> None:
    lost.run(sharded_calls.check, [])
    began = time.monotonic()
    with pytest.raises(LostRanksError, match="rank 1 has died, status 3"):
        lost.run(sharded_calls.die)
    with pytest.raises(LostRanksError, match=r"no answer within 0.5 s from ranks \[1\]"):
        lost.run(sharded_calls.hang, limit=0.5)
    assert time.monotonic() - began < 30
    assert lost.run(sharded_calls.check, []) == [[], []]


def test_the_pool_returns_what_a_rank_raises(lost: Pool) -> None:
    found = lost.outcomes(sharded_calls.fail)
    assert found[0] == 0
    assert found[1][:2] == ("ValueError", "the last one")
    with pytest.raises(AssertionError, match="the last one"):
        lost.run(sharded_calls.fail)
