"""``TopK.from_tensors``: log-probs and ids on a device, put in order without synchronising."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_kernels import TopK, _ordering, topk_rkl

INF, NAN = float("inf"), float("nan")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def expected_rows(
    logprobs: torch.Tensor,
    ids: torch.Tensor,
    valid: torch.Tensor | None,
    sentinel: float,
    k: int,
) -> tuple[list[list[int]], list[list[float]]]:
    """(ids, values) of each row (N, K), from a plain loop."""
    all_ids, all_values = [], []
    for row in range(ids.shape[0]):
        best: dict[int, float] = {}
        for place in range(ids.shape[1]):
            token, value = int(ids[row, place]), float(logprobs[row, place])
            is_valid = valid is None or bool(valid[row, place])
            value = float(np.float32(value))
            if not is_valid or not 0 <= token < 2**31 or value <= sentinel or value == -INF:
                continue
            if token not in best or value != value or value > best[token]:
                best[token] = value
        order = sorted(best, key=lambda t: (0, 0, t) if best[t] != best[t] else (1, -best[t], t))
        order = order[:k]
        all_ids.append(order + [-1] * (k - len(order)))
        all_values.append([best[t] for t in order] + [-INF] * (k - len(order)))
    return all_ids, all_values


def assert_rows(topk: TopK, ids: list[list[int]], values: list[list[float]]) -> None:
    assert topk.ids.dtype == torch.int32
    assert topk.logits.dtype == topk.logsumexp.dtype == torch.float32
    assert topk.ids.tolist() == ids
    expected = torch.tensor(values).view(topk.logits.shape)
    assert torch.equal(topk.logits.nan_to_num(1e30), expected.nan_to_num(1e30))
    assert torch.equal(topk.logits.isnan(), expected.isnan())
    present = torch.tensor([row[0] >= 0 for row in ids], dtype=torch.bool)
    assert torch.equal(topk.present, present)
    assert torch.equal(topk.logsumexp == 0, present)
    assert torch.equal(topk.logsumexp.isnan(), ~present)


VALUES = st.one_of(
    st.integers(-40, 4).map(lambda n: n / 4),
    st.sampled_from([-1e3, -999.0, -1e4, -INF, INF, NAN, -0.0, 0.0]),
)
IDS = st.one_of(st.integers(-2, 6), st.sampled_from([2**31 - 1, 2**31, 2**32 + 3, -(2**40)]))


def from_tensors_off_cpu(*arguments: Any) -> TopK:
    """``from_tensors`` as it runs on other devices than the CPU."""
    with mock.patch.object(_ordering, "_ordered_on_host", side_effect=RuntimeError):
        return TopK.from_tensors(*arguments)


@pytest.mark.parametrize("make", [TopK.from_tensors, from_tensors_off_cpu])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_rows_are_those_of_a_plain_loop(make: Any, data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    k = data.draw(st.one_of(st.none(), st.integers(1, 9)))
    sentinel = data.draw(st.sampled_from([-1e3, -1e4, -INF, -2.0, 0.5]))

    def draw(elements: Any, dtype: torch.dtype) -> torch.Tensor:
        count = rows * width
        drawn = data.draw(st.lists(elements, min_size=count, max_size=count))
        return torch.tensor(drawn, dtype=dtype).view(rows, width)

    logprobs = draw(VALUES, data.draw(st.sampled_from(FLOATS)))
    ids = draw(IDS, torch.int64)
    valid = draw(st.booleans(), torch.bool) if data.draw(st.booleans()) else None
    topk = make(logprobs, ids, valid, sentinel, k)
    wanted = float(torch.tensor(sentinel, dtype=logprobs.dtype))
    assert_rows(topk, *expected_rows(logprobs, ids, valid, wanted, k or width))


def test_many_rows_in_pieces_are_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ordering, "PIECE", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(7, 11, 9, generator=generator).mul_(4).round_().div_(4)
    ids = torch.randint(-1, 12, (7, 11, 9), generator=generator, dtype=torch.int32)
    valid = torch.rand(7, 11, 9, generator=generator) < 0.8
    for k in (None, 3, 12):
        topk = TopK.from_tensors(logprobs, ids, valid, k=k)
        assert topk.shape == (7, 11)
        flat = [x.view(77, 9) for x in (logprobs, ids, valid)]
        assert_rows(topk.reshape(-1), *expected_rows(*flat, -1e3, k or 9))


@pytest.mark.parametrize("kind", ["none", "first piece", "last piece"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_pieces_with_and_without_repeats_are_those_of_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    """Rows without a repeated id take another path; repeats of an absent id do not count."""
    monkeypatch.setattr(_ordering, "PIECE", 24)  # three rows
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(12, generator=generator)[:8] for _ in range(12)])
    logprobs = torch.randn(12, 8, generator=generator).sub_(1 if kind == "none" else 5).to(dtype)
    logprobs[:, 5:], ids[:, 5:] = -1e4, 0
    if kind != "none":
        row = 1 if kind == "first piece" else 10
        ids[row, 1] = ids[row, 3]
    for values in (logprobs, -logprobs.abs()):
        topk = TopK.from_tensors(values, ids)
        assert_rows(topk, *expected_rows(values, ids, None, -1e3, 8))


def test_inputs_stay_and_strides_do_not_matter() -> None:
    logprobs = torch.tensor([[-0.0, -2000.0], [-1.0, NAN], [-3.0, -1.0]])
    ids = torch.tensor([[5, 5], [6, 7], [4, 4]])
    kept = logprobs.clone(), ids.clone()
    topk = TopK.from_tensors(logprobs.t(), ids.t())
    assert topk.ids.tolist() == [[5, 6, 4], [7, 4, -1]]
    assert torch.equal(ids, kept[1])
    torch.testing.assert_close(logprobs, kept[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(logprobs.signbit(), kept[0].signbit())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sentinel", [-1e3, -9999.0, -1e4, -1e5])
def test_a_sentinel_is_found_in_any_dtype(dtype: torch.dtype, sentinel: float) -> None:
    logprobs = torch.tensor([[-0.5, sentinel]]).to(dtype)
    topk = TopK.from_tensors(logprobs, torch.tensor([[3, 0]]), sentinel=sentinel)
    assert topk.ids.tolist() == [[3, -1]]


@pytest.mark.parametrize("make", [TopK.from_tensors, from_tensors_off_cpu])
def test_what_float32_rounds_to_minus_infinity_is_absent(make: Any) -> None:
    logprobs = torch.tensor([[-1e300, -0.5]], dtype=torch.float64)
    assert make(logprobs, torch.tensor([[3, 4]]), None, -INF).ids.tolist() == [[4, -1]]


@pytest.mark.parametrize("make", [TopK.from_tensors, from_tensors_off_cpu])
def test_nan_of_any_bits_comes_first(make: Any) -> None:
    bits = torch.tensor([[0, -1, -(2**22), 2**31 - 1, 0x7F800001]], dtype=torch.int32)
    topk = make(bits.view(torch.float32), torch.arange(5)[None].flip(-1))
    assert topk.ids.tolist() == [[0, 1, 2, 3, 4]]
    assert topk.logits.isnan().tolist() == [[True] * 4 + [False]]


def test_the_loss_of_sentinels_and_repeats_is_that_without_them() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 50, generator=generator)
    best = teacher.log_softmax(-1).topk(8)
    expected = topk_rkl(student, TopK(best.indices, best.values))
    # The sampled token, which is the third best, is listed twice. The last two are sentinels.
    ids = torch.cat([best.indices[:, 2:3], best.indices, torch.zeros(6, 2).long()], -1)
    logprobs = torch.cat([best.values[:, 2:3], best.values, torch.full((6, 2), -1e4)], -1)
    assert topk_rkl(student, TopK(ids, logprobs)) > 10 * expected
    torch.testing.assert_close(topk_rkl(student, TopK.from_tensors(logprobs, ids)), expected)


def test_width_zero_is_a_row_without_entries() -> None:
    topk = TopK.from_tensors(torch.zeros(3, 0), torch.zeros(3, 0).int())
    assert_rows(topk, [[-1]] * 3, [[-INF]] * 3)
    assert TopK.from_tensors(torch.zeros(0, 4), torch.zeros(0, 4).int(), k=2).ids.shape == (0, 2)
    assert TopK.from_tensors(torch.zeros(4), torch.arange(4)).shape == ()


def nested(parts: list[torch.Tensor], layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor(parts, layout=layout)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_flattened_to_their_rows(layout: torch.layout) -> None:
    ids = [torch.randint(0, 6, (length, 4)) for length in (3, 0, 5)]
    logprobs = [torch.randn(x.shape) for x in ids]
    valid = [torch.rand(x.shape) < 0.7 for x in ids]
    topk = TopK.from_tensors(*(nested(x, layout) for x in (logprobs, ids, valid)))
    flat = [torch.cat(x) for x in (logprobs, ids, valid)]
    assert_rows(topk, *expected_rows(*flat, -1e3, 4))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_that_do_not_match_are_refused() -> None:
    def make(layout: torch.layout, *shapes: tuple[int, ...]) -> torch.Tensor:
        return nested([torch.zeros(shape) for shape in shapes], layout)

    for layout in (torch.jagged, torch.strided):
        ids = make(layout, (2, 4), (3, 4)).long()
        for logprobs, message in (
            (torch.zeros(5, 4), "must both be nested"),
            (make(layout, (3, 4), (2, 4)), "lengths differ"),
            (make(layout, (5, 4)), "1 sequences with 3 dimensions, ids of 2"),
        ):
            with pytest.raises(ValueError, match=message):
                TopK.from_tensors(logprobs, ids)
        with pytest.raises(TypeError, match="logprobs is nested, expected a dense tensor"):
            TopK.from_tensors(make(layout, (2, 4), (3, 4)), torch.zeros(5, 4).long())
    flat = make(torch.jagged, (2,), (3,))
    with pytest.raises(ValueError, match=r"expected sequences \(T, K\)"):
        TopK.from_tensors(flat, flat.long())
    # A narrowed nested tensor has gaps: it stores more values than its rows have.
    whole = torch.zeros(2, 5, 4)
    gaps = torch.nested.narrow(whole, 1, torch.tensor([0, 0]), torch.tensor([2, 3]), torch.jagged)
    with pytest.raises(ValueError, match="gaps"):
        TopK.from_tensors(gaps, gaps.long())


ZEROS, NUMBERS = torch.zeros(2, 3), torch.zeros(2, 3).int()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[-1.0]], [[1]]), TypeError, "logprobs is a list.*TopK.from_logprobs"),
        ((NUMBERS, ZEROS), TypeError, "logprobs have dtype torch.int32.*order is logprobs, ids"),
        ((ZEROS, ZEROS), TypeError, "ids have dtype torch.float32, allowed: int32, int64"),
        ((ZEROS.to(torch.complex64), NUMBERS), TypeError, "logprobs have dtype torch.complex64"),
        ((ZEROS, NUMBERS, NUMBERS), TypeError, "valid have dtype torch.int32, allowed: bool"),
        ((ZEROS, NUMBERS, [True]), TypeError, "valid is a list"),
        ((ZEROS, NUMBERS[:1]), ValueError, r"logprobs have shape \(2, 3\) and ids \(1, 3\)"),
        ((ZEROS, NUMBERS, NUMBERS[:, 0] == 0), ValueError, r"valid have shape \(2,\)"),
        ((ZEROS[0, 0], NUMBERS[0, 0]), ValueError, r"expected one per entry, \(..., K\)"),
        ((ZEROS.to_sparse(), NUMBERS), TypeError, "logprobs is torch.sparse_coo"),
        ((ZEROS.to("meta"), NUMBERS), ValueError, "logprobs are on meta, ids on cpu; move one"),
        ((ZEROS, NUMBERS, None, NAN), ValueError, "sentinel is NaN"),
        ((ZEROS, NUMBERS, None, "x"), TypeError, "sentinel is a str"),
        ((ZEROS, NUMBERS, None, -1e3, 0), ValueError, "k is 0, allowed is 1"),
        ((ZEROS, NUMBERS, None, -1e3, 2**40), ValueError, "k is 1099511627776, allowed is 1"),
        ((ZEROS, NUMBERS, None, -1e3, 2.5), TypeError, "k is a float, expected an int"),
    ],
)
def test_what_is_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TopK.from_tensors(*arguments)


def test_no_value_is_read() -> None:
    """Meta tensors have no values, so reading one would raise."""
    topk = TopK.from_tensors(*(x.to("meta") for x in (ZEROS, NUMBERS, NUMBERS == 0)), k=5)
    assert topk.ids.is_meta
    assert topk.ids.shape == (2, 5)
    assert topk.present.is_meta


def test_compiled_it_gives_the_same() -> None:
    logprobs, ids = torch.randn(3, 4, 5), torch.randint(0, 6, (3, 4, 5))
    expected = TopK.from_tensors(logprobs, ids, k=4)
    compiled = torch.compile(TopK.from_tensors, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(logprobs, ids, k=4), expected)


def test_under_vmap_it_gives_the_same() -> None:
    try:
        torch.vmap(lambda x: x.view(torch.int32))(torch.ones(1))
    except RuntimeError:
        pytest.skip("this torch's vmap has no rule for view(dtype)")
    logprobs, ids = torch.randn(3, 4, 5), torch.randint(0, 6, (3, 4, 5))
    mapped = torch.vmap(lambda a, b: TopK.from_tensors(a, b, k=4))(logprobs, ids)
    assert_equal(mapped, TopK.from_tensors(logprobs, ids, k=4))


def assert_equal(ours: TopK, expected: TopK) -> None:
    assert torch.equal(ours.ids, expected.ids)
    assert torch.equal(ours.logits, expected.logits)


def test_log_probs_that_require_grad_give_constants() -> None:
    topk = TopK.from_tensors(ZEROS.clone().requires_grad_(), NUMBERS)
    assert not topk.logits.requires_grad


def test_present_tells_rows_that_have_an_entry() -> None:
    ids = torch.tensor([[-1, 3], [-1, -1], [4, 3], [5, -1]])
    logits = torch.tensor([[0.0, -1.0], [0.0, 0.0], [-INF, -INF], [NAN, 0.0]])
    topk = TopK(ids, logits)
    assert topk.present.tolist() == [True, False, False, True]
    assert topk[0].present.shape == ()
