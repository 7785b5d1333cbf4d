"""``select_topk``'s log-sum-exps, sampled tokens and top-p, and ``TopK.tail``, against float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from effort import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_linear_memory import Pages

from opd_kernels import LinearLogits, TopK, debug, select_topk
from opd_kernels.backends import cuda, plain

INF, NAN = float("inf"), float("nan")
EPSILON = 2.0**-52


def draw(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def beside(logits: torch.Tensor, ids: torch.Tensor, width: int, temperature: float) -> torch.Tensor:
    """The log-sum-exp over [0, width) without the ids, of float64 logits, row by row."""
    sums = []
    rows = zip(logits.reshape(-1, logits.shape[-1]), ids.reshape(-1, ids.shape[-1]), strict=True)
    for row, listed in rows:
        left = row[:width].double() / temperature
        left[[i for i in listed.tolist() if i >= 0]] = -INF
        sums.append(left.logsumexp(-1))
    return torch.stack(sums).reshape(logits.shape[:-1])


def budget(vocab: int, *sums: torch.Tensor) -> float:
    """What sums of float64 may differ by: a rounding per term, and of the result."""
    largest = max(float(x[x.isfinite()].abs().max()) if x.isfinite().any() else 0.0 for x in sums)
    return 4 * EPSILON * (vocab + largest)


# Kernels add 32 terms exp(d) in float32, d = (x - max) / T. Of a sum's relative error, in units of
# 2^-24, additions make 31, exp 4, and four roundings of d 4 |d|, whose mean under the terms is
# at most their entropy, log 32. The combined sums make as much again of log(V / 32), below 8. Of
# CUDA's sums of 64 terms additions make 13, which is less together.
KERNELS = (31 + 4 + 4 * math.log(32) + 4 * 8) * 2.0**-24
NATIVE = ["cpu", *(["cuda"] if cuda.DEVICE == "cpu" else [])]  # which is emulated
SLACK = {"cpu": KERNELS, "cuda": KERNELS, "reference": 0.0}


def assert_sums(
    got: torch.Tensor, expected: torch.Tensor, vocab: int, backend: str = "cpu"
) -> None:
    atol = budget(vocab, expected) + SLACK[backend]
    torch.testing.assert_close(got, expected, rtol=0, atol=atol, equal_nan=True)


# Log-sum-exps


@settings(max_examples=examples(60))
@given(
    seed=st.integers(0, 2**20),
    rows=st.sampled_from([(), (3,), (2, 3)]),
    vocab=st.sampled_from([1, 7, 60, 301]),
    temperature=st.sampled_from([1.0, 0.25, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    backend=st.sampled_from([*NATIVE, "reference"]),
    data=st.data(),
)
def test_log_sum_exps_are_those_of_float64(
    seed: int,
    rows: tuple[int, ...],
    vocab: int,
    temperature: float,
    dtype: torch.dtype,
    backend: str,
    data: st.DataObject,
) -> None:
    backend = "reference" if dtype == torch.float64 else backend
    k = data.draw(st.integers(1, min(vocab, 9)))
    vocab_size = data.draw(st.sampled_from([None, vocab + 3, max(vocab - 2, 1)]))
    banned = data.draw(st.sampled_from([None, [0, 2, 99]]))
    logits = draw(*rows, vocab, seed=seed).to(dtype)
    mask = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < 0.7
    options: dict[str, Any] = {
        "mask": mask, "vocab_size": vocab_size, "banned_ids": banned, "backend": backend
    }  # fmt: skip
    topk = select_topk(logits, k, temperature=temperature, with_logsumexp=True, **options)
    width = vocab if vocab_size is None else min(vocab, vocab_size)
    whole = (logits[..., :width].double() / temperature).logsumexp(-1)
    assert_sums(topk.logsumexp, whole.masked_fill(~mask, 0), vocab, backend)
    tail = beside(logits, topk.ids, width, temperature)
    assert_sums(topk.tail_logsumexp, tail.masked_fill(~mask, 0), vocab, backend)
    assert topk.temperature == temperature
    assert topk.token_logits is None
    # A temperature divides no logit, and selects nothing else.
    plainly = select_topk(logits, k, **options)
    assert torch.equal(topk.ids, plainly.ids)
    assert torch.equal(topk.logits, plainly.logits)
    assert plainly.logsumexp is None
    assert plainly.tail_logsumexp is None


@pytest.mark.parametrize("name", [*NATIVE, "reference"])
def test_a_small_tail_keeps_its_digits(name: str) -> None:
    logits = draw(4, 500, scale=1.0)
    logits[:, :8] += torch.tensor([20.0, 25.0, 30.0, 40.0])[:, None]
    topk = select_topk(logits, 8, with_logsumexp=True, backend=name)
    mass = (topk.tail_logsumexp - topk.logsumexp).exp()
    assert mass[0] < 1e-5
    assert mass[3] < 1e-14  # 1 minus what the entries hold would be noise
    assert_sums(topk.tail_logsumexp, beside(logits, topk.ids, 500, 1.0), 500, name)


def test_nothing_left_is_a_tail_of_minus_infinity() -> None:
    topk = select_topk(draw(3, 6), 6, with_logsumexp=True)
    assert topk.tail_logsumexp.tolist() == [-INF] * 3
    assert topk.tail().tolist() == [-INF] * 3
    assert topk.logsumexp.isfinite().all()


# Top-p


def nucleus(
    logits: torch.Tensor, ids: torch.Tensor, width: int, temperature: float, top_p: float
) -> list[int]:
    """The ids of one row that stay, one after another; not where rounding decides."""
    shares = (logits[:width].double() / temperature).softmax(-1)
    kept, before = [], 0.0
    for i in ids.tolist():
        if i < 0 or (kept and before >= top_p):
            break
        kept.append(i)
        before += float(shares[i])
        assume(abs(before - top_p) > KERNELS)
    return kept


@settings(max_examples=examples(60))
@given(
    seed=st.integers(0, 2**20),
    vocab=st.sampled_from([5, 60, 301]),
    top_p=st.floats(0.01, 0.9999),
    temperature=st.sampled_from([1.0, 0.3, 2.0]),
    ties=st.booleans(),
    data=st.data(),
)
def test_top_p_keeps_the_nucleus(
    seed: int, vocab: int, top_p: float, temperature: float, ties: bool, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, min(vocab, 40)))
    banned = data.draw(st.sampled_from([None, [0, 2, 99]]))
    vocab_size = data.draw(st.sampled_from([None, vocab - 1]))
    logits, mask = draw(4, vocab, seed=seed), torch.tensor([True, False, True, True])
    logits = logits.round() if ties else logits
    options: dict[str, Any] = {"mask": mask, "vocab_size": vocab_size, "banned_ids": banned}
    whole = select_topk(logits, k, **options)
    topk = select_topk(logits, k, temperature=temperature, top_p=top_p, **options)
    width = vocab_size or vocab
    for i, row in enumerate(topk):
        if not mask[i]:
            assert (row.ids == -1).all()
            assert (row.logits == -INF).all()
            continue
        kept = nucleus(logits[i], whole.ids[i], width, temperature, top_p)
        assert row.ids.tolist() == kept + [-1] * (k - len(kept))
        assert torch.equal(row.logits[: len(kept)], whole.logits[i, : len(kept)])
        assert (row.logits[len(kept) :] == -INF).all()
    tail = beside(logits, topk.ids, width, temperature)
    assert_sums(topk.tail_logsumexp, tail.masked_fill(~mask, 0), vocab)
    sums = (logits[:, :width].double() / temperature).logsumexp(-1)
    assert_sums(topk.logsumexp, sums.masked_fill(~mask, 0), vocab)


def test_equal_logits_are_counted_exactly() -> None:
    """Before entry 3 of 10 lie exactly 3 tenths, which are not below 0.3."""
    for vocab in (8, 10, 24):
        for part in range(1, vocab):
            topk = select_topk(torch.full((1, vocab), 5.0), vocab, top_p=part / vocab)
            assert topk.ids[0].tolist() == [*range(part), *[-1] * (vocab - part)]


def test_top_p_of_one_keeps_all() -> None:
    logits = draw(4, 50, scale=30.0)  # some hold less than float64 resolves beside 1
    topk = select_topk(logits, 50, top_p=1.0)
    assert torch.equal(topk.ids, select_topk(logits, 50).ids)
    assert (topk.tail_logsumexp == -INF).all()
    assert torch.equal(select_topk(logits, 50, top_p=1).ids, topk.ids)


def test_the_best_entry_always_stays() -> None:
    topk = select_topk(draw(5, 50), 8, top_p=1e-300)
    assert ((topk.ids >= 0).sum(-1) == 1).all()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_top_p_of_a_row_that_is_not_finite_keeps_its_best_entry(bad: float) -> None:
    logits = draw(3, 50)
    logits[1, 7] = bad
    topk, others = select_topk(logits, 8, top_p=0.5), select_topk(logits[::2], 8, top_p=0.5)
    assert topk.ids[1].tolist() == [7] + [-1] * 7
    assert not topk.logsumexp[1].isfinite()
    for name in ("ids", "logits", "logsumexp", "tail_logsumexp"):
        assert torch.equal(getattr(topk, name)[::2], getattr(others, name))


def test_rows_of_minus_infinity_are_without_entries() -> None:
    logits = draw(3, 50)
    logits[1] = -INF
    topk = select_topk(logits, 8, top_p=0.5)
    assert topk.present.tolist() == [True, False, True]
    assert topk.logsumexp[1] == topk.tail_logsumexp[1] == -INF
    assert topk.tail()[1] == -INF


# The sampled token


@settings(max_examples=examples(40))
@given(
    seed=st.integers(0, 2**20),
    rows=st.sampled_from([(), (4,), (2, 3), (0,)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    id_dtype=st.sampled_from([torch.int32, torch.int64]),
    top_p=st.sampled_from([None, 0.5]),
)
def test_token_logits_are_those_of_the_row(
    seed: int,
    rows: tuple[int, ...],
    dtype: torch.dtype,
    id_dtype: torch.dtype,
    top_p: float | None,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = draw(*rows, 30, seed=seed).to(dtype)
    tokens = torch.randint(-3, 33, rows, generator=generator).to(id_dtype)
    mask = torch.rand(rows, generator=generator) < 0.7
    topk = select_topk(
        logits, 4, mask=mask, vocab_size=28, banned_ids=[3, 5], token_ids=tokens, top_p=top_p,
        temperature=0.5,
    )  # fmt: skip
    inside = mask & (tokens >= 0) & (tokens < 28)
    found = logits.gather(-1, tokens.clamp(0, 29).long()[..., None]).squeeze(-1)
    expected = torch.where(inside, found.to(topk.logits.dtype), NAN)
    torch.testing.assert_close(topk.token_logits, expected, rtol=0, atol=0, equal_nan=True)


def test_token_ids_beyond_int32_are_outside() -> None:
    topk = select_topk(draw(2, 30), 4, token_ids=torch.tensor([2**32 + 3, -(2**40)]))
    assert topk.token_logits.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_head_the_token_has_the_logit_that_it_would_be_selected_with(
    linear_backend: str, dtype: torch.dtype
) -> None:
    """Sums of integers are exact, so that every product is rounded alike."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randint(-30, 31, shape, generator=generator).to(dtype)
        for shape in ((2, 3, 16), (20, 16), (20,))
    )
    teacher = LinearLogits(hidden, weight, bias, softcap=30.0, scale=0.005)
    tokens = torch.randint(0, 20, (2, 3), generator=generator)
    mask = torch.arange(6).view(2, 3) % 3 > 0
    every = select_topk(teacher, 20, backend=linear_backend)
    selected = torch.where(every.ids == tokens[..., None], every.logits, 0).sum(-1)
    topk = select_topk(
        teacher, 4, mask=mask, banned_ids=[int(tokens[0, 1])], token_ids=tokens,
        backend=linear_backend,
    )  # fmt: skip
    assert torch.equal(topk.token_logits[mask], selected[mask])
    assert topk.token_logits[~mask].isnan().all()
    with debug():
        far = select_topk(teacher, 4, token_ids=tokens - 150, backend=linear_backend)
    assert far.token_logits.isnan().all()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_of_a_head_the_sums_are_those_of_its_logits(softcap: float | None) -> None:
    teacher = LinearLogits(draw(3, 4, 16), draw(60, 16, seed=1, scale=0.5), softcap=softcap)
    logits = plain.shaped(torch.nn.functional.linear(teacher.hidden, teacher.weight), 1.0, softcap)
    options: dict[str, Any] = {"temperature": 0.5, "top_p": 0.8, "vocab_size": 55}
    topk, expected = (select_topk(source, 9, **options) for source in (teacher, logits))
    assert torch.equal(topk.ids, expected.ids)
    # Products in another order: a few roundings of float32 in a logit of up to 40, over 1 / 2.
    tolerance = 16 * 2.0**-23 * float(logits.abs().max()) / 0.5
    for name in ("logsumexp", "tail_logsumexp"):
        torch.testing.assert_close(
            getattr(topk, name), getattr(expected, name), rtol=0, atol=tolerance
        )


# Rows that are not read, transforms


def test_of_a_head_with_a_softcap_an_absent_entry_is_minus_infinity() -> None:
    hidden, weight = draw(3, 4), draw(6, 4, seed=1)
    head = LinearLogits(hidden, weight, softcap=2.0)
    found = select_topk(head, 5, banned_ids=[0, 3, 5], with_logsumexp=True)
    assert (found.ids[:, 3:] == -1).all()
    assert (found.logits[:, 3:] == -torch.inf).all()
    assert found.logsumexp is not None
    expected = (2 * torch.tanh(hidden @ weight.T / 2)).double().logsumexp(-1)
    torch.testing.assert_close(found.logsumexp, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NATIVE)
def test_masked_rows_are_not_read(name: str) -> None:
    mask = torch.tensor([True, False, True, False])
    values = draw(4, 700)
    tokens = torch.tensor([3, 5, -100, 7])
    options: dict[str, Any] = {"mask": mask, "token_ids": tokens, "top_p": 0.9, "backend": name}
    pages = Pages(values)
    for row in (1, 3):
        pages.close(row)
    try:
        topk = select_topk(pages.rows, 8, **options)
    finally:
        pages.open()
    expected = select_topk(values, 8, **options)
    for field in ("ids", "logits", "logsumexp", "tail_logsumexp", "token_logits"):
        ours, theirs = getattr(topk, field), getattr(expected, field)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def select_all(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> TopK:
    return select_topk(logits, 6, mask=mask, token_ids=tokens, top_p=0.9, temperature=0.7)


def without_tail(topk: TopK) -> TopK:
    return dataclasses.replace(topk, tail_logsumexp=None)


ARGUMENTS = (
    draw(3, 4, 40),
    torch.randint(-2, 42, (3, 4), generator=torch.Generator().manual_seed(0)),
    torch.arange(12).view(3, 4) % 4 > 0,
)


@pytest.mark.parametrize(
    "transformed",
    [
        lambda fn: torch.compile(fn, fullgraph=True, backend="aot_eager"),
        torch.vmap,
        lambda fn: torch.vmap(torch.vmap(fn)),
    ],
    ids=["compile", "vmap", "vmap of vmap"],
)
def test_transforms_give_the_same(transformed: Callable[..., Any]) -> None:
    expected = select_all(*ARGUMENTS)
    got = transformed(select_all)(*ARGUMENTS)
    assert got.temperature == 0.7
    for name in ("ids", "logits", "token_logits", "logsumexp", "tail_logsumexp"):
        torch.testing.assert_close(
            getattr(got, name), getattr(expected, name), rtol=1e-14, atol=0, equal_nan=True
        )
    for topk in (expected, without_tail(expected)):
        torch.testing.assert_close(
            transformed(TopK.tail)(topk), topk.tail(), rtol=1e-12, atol=0, equal_nan=True
        )


def test_what_is_selected_has_no_graph() -> None:
    topk = select_all(ARGUMENTS[0].clone().requires_grad_(), *ARGUMENTS[1:])
    assert not any(x.requires_grad for x in torch.utils._pytree.tree_leaves(topk))
    differentiable = TopK(
        topk.ids, topk.logits, topk.logsumexp.requires_grad_(), topk.tail_logsumexp.requires_grad_()
    )
    assert not differentiable.tail().requires_grad
    assert not without_tail(differentiable).tail().requires_grad


# What is refused

LOGITS = draw(2, 3, 20)
TOKENS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_p": 0.0}, ValueError, r"top_p is 0.0, allowed is above 0 to 1"),
        ({"top_p": 0}, ValueError, "top_p is 0, allowed"),
        ({"top_p": 1.0001}, ValueError, "top_p is 1.0001, allowed"),
        ({"top_p": -0.5}, ValueError, "top_p is -0.5, allowed"),
        ({"top_p": NAN}, ValueError, "top_p is nan, allowed"),
        ({"top_p": True}, TypeError, "top_p is a bool, expected a number in"),
        ({"top_p": "0.9"}, TypeError, "top_p is a str, expected a number in"),
        ({"top_p": torch.tensor(0.9)}, TypeError, r"top_p is a Tensor, .*pass .item\(\)"),
        ({"temperature": torch.ones(2, 3)}, TypeError, "temperature is a Tensor, expected a numb"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0, allowed are numbers above 0"),
        ({"temperature": NAN}, ValueError, "temperature is nan"),
        ({"temperature": None}, TypeError, "temperature is a NoneType"),
        ({"temperature": True}, TypeError, "temperature is a bool"),
        ({"token_ids": TOKENS[0]}, ValueError, r"token_ids has shape \(3,\), expected the logits'"),
        ({"token_ids": TOKENS[..., None]}, ValueError, r"token_ids has shape \(2, 3, 1\)"),
        ({"token_ids": TOKENS.float()}, TypeError, "token_ids has dtype torch.float32, allowed"),
        ({"token_ids": TOKENS.short()}, TypeError, "token_ids has dtype torch.int16"),
        ({"token_ids": TOKENS.bool()}, TypeError, "token_ids has dtype torch.bool"),
        ({"token_ids": TOKENS.tolist()}, TypeError, "token_ids is a list, expected an int tensor"),
        ({"token_ids": TOKENS.to("meta")}, ValueError, "token_ids is on meta, the logits are on"),
        ({"token_ids": TOKENS.to_sparse()}, TypeError, "token_ids is torch.sparse_coo"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for logits in (LOGITS, LinearLogits(LOGITS, draw(30, 20))):
        with pytest.raises(error, match=message):
            select_topk(logits, 4, **options)


# TopK.tail


@settings(max_examples=examples(60))
@given(
    seed=st.integers(0, 2**20),
    rows=st.sampled_from([(), (3,), (2, 3)]),
    temperature=st.sampled_from([1.0, 0.3, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    absent=st.sampled_from(["none", "ids", "logits"]),
    repeated=st.booleans(),
)
def test_the_tail_is_what_the_entries_leave(
    seed: int,
    rows: tuple[int, ...],
    temperature: float,
    dtype: torch.dtype,
    absent: str,
    repeated: bool,
) -> None:
    logits = draw(*rows, 40, seed=seed).to(dtype)
    topk = select_topk(logits, 6, with_logsumexp=True, temperature=temperature)
    ids, values = topk.ids.clone(), topk.logits.clone()
    if absent == "ids":
        ids[..., 1] = -1  # its logit stays
    elif absent == "logits":
        values[..., 1] = -INF
    if repeated:  # of another value, of which the first counts
        ids = torch.cat([ids, ids[..., :1], ids[..., 3:4]], -1)
        values = torch.cat([values, values[..., :1] - 1, values[..., 3:4] + 2], -1)
    whole = (logits.double() / temperature).logsumexp(-1)
    given = TopK(ids, values, whole, temperature=temperature)
    present = torch.where(values > -INF, ids, -1)
    exact = beside(logits, present, 40, temperature)
    expected = torch.maximum(exact, whole - 24 * math.log(2))
    # 1 - Q is rounded as numbers near 1 and near the log-sum-exp are, so its logarithm by
    # that much of 1 - Q.
    left = (expected - whole).exp()
    tolerance = budget(40, whole) / left
    assert given.tail().dtype == torch.float64
    assert ((given.tail() - expected).abs() <= tolerance).all()
    # A tail that is given counts, whatever the entries say.
    assert torch.equal(dataclasses.replace(given, tail_logsumexp=exact).tail(), exact)


def test_a_repeat_of_an_absent_entry_counts() -> None:
    """The first of id 3 has no logit; its second is the one that is present."""
    shares = torch.tensor([[0.0, 0.5, 0.25, 0.125]])
    topk = TopK(torch.tensor([[3, 3, 5, 3]]), shares.log(), torch.zeros(1))
    torch.testing.assert_close(topk.tail().exp(), torch.tensor([0.25]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("excess", [0.0, 1e-7, 1e-3])
def test_a_tail_is_at_least_what_float32_resolves(excess: float) -> None:
    """Log-probs of all there is, which sum to 1 or, rounded, to more."""
    shares = torch.tensor([[0.5, 0.25, 0.25 + excess]], dtype=torch.float64)
    for lse in (0.0, 50.0, -50.0):
        topk = TopK(torch.tensor([[3, 4, 5]]), shares.log() + lse, torch.full((1,), lse).double())
        assert topk.tail().item() == pytest.approx(lse - 24 * math.log(2), rel=1e-12)


def test_the_tail_of_a_servers_log_probs() -> None:
    teacher = draw(5, 60).log_softmax(-1)
    best = teacher.topk(8)
    topk = TopK.from_logprobs(best.values, best.indices)
    expected = beside(teacher, best.indices, 60, 1.0)
    # Each log-prob is rounded to float32, so 1 - Q by at most 2^-24 of the largest, 20.
    tolerance = 20 * 2.0**-24 / expected.exp()
    assert ((topk.tail() - expected).abs() <= tolerance).all()


def test_rows_without_entries() -> None:
    ids, logits = torch.full((4, 3), -1), torch.zeros(4, 3)
    topk = TopK(ids, logits, torch.tensor([NAN, 2.0, -INF, INF]))
    tails = topk.tail()
    assert tails[0].isnan()
    assert tails[1:3].tolist() == [2.0, -INF]
    assert tails[3] == INF
    padded = TopK.from_logprobs([{5: -1.0}]).pad(2)
    assert padded.tail().isnan().tolist() == [False, True]


def test_an_entry_of_nan_poisons_the_tail_of_its_row_alone() -> None:
    topk = select_topk(draw(3, 30), 4, with_logsumexp=True)
    expected = without_tail(topk).tail()
    topk.logits[1, 2] = NAN
    tails = without_tail(topk).tail()
    assert tails[1].isnan()
    assert torch.equal(tails[::2], expected[::2])


def test_without_a_sum_there_is_no_tail() -> None:
    topk = TopK(torch.zeros(2, 3).int(), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"neither tail_logsumexp nor logsumexp.*with_logsumexp=T"):
        topk.tail()
