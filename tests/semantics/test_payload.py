"""``TopK.from_logprobs``: every form in which servers and trainers hand over log-probs."""

from __future__ import annotations

import math
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_kernels import TopK, topk_rkl

INF, NAN = float("inf"), float("nan")


def entries(topk: TopK) -> Any:
    """Nested lists down to [(id, log-prob), ...] of the entries that are present."""
    if topk.shape:
        return [entries(row) for row in topk]
    pairs = zip(topk.ids.tolist(), topk.logits.tolist(), strict=True)
    return [(token, round(value, 4)) for token, value in pairs if token >= 0]


def vllm(logprob: float, rank: int = 1) -> SimpleNamespace:
    """vLLM's ``Logprob``."""
    return SimpleNamespace(logprob=logprob, rank=rank, decoded_token="a")


def jagged() -> tuple[torch.Tensor, torch.Tensor]:
    ids = [torch.tensor([[7, 3]]), torch.tensor([[5, 9], [2, 4]])]
    logprobs = [torch.tensor([[-0.5, -1.5]]), torch.tensor([[-0.25, -2.0], [-3.0, -1.0]])]
    return tuple(torch.nested.nested_tensor(x, layout=torch.jagged) for x in (logprobs, ids))


def named(logprob: float, **fields: Any) -> dict[str, Any]:
    """An entry with names, as TGI, llama.cpp, Dynamo and chat completions have them."""
    return fields | {"logprob": logprob}


def top(entry: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """An entry that lists the others of its position."""
    return entry | {"top_logprobs": list(others)}


SEQUENCE = [[], [(7, -0.5), (3, -1.5)], [(5, -0.25)]]
BATCH = [[[(7, -0.5), (3, -1.5)], []], [[(5, -0.25), (9, -2.0)], [(4, -1.0), (2, -3.0)]]]

POSITIONS = {
    "objects": [None, {3: vllm(-1.5), 7: vllm(-0.5)}, {5: vllm(-0.25)}],
    "json": [
        None,
        {"3": {"logprob": -1.5, "rank": 2}, "7": {"logprob": -0.5, "rank": 1}},
        {"5": {"logprob": -0.25, "decoded_token": None}},
    ],
    "token_id strings": [None, {"token_id:7": -0.5, "token_id:3": -1.5}, {"token_id:5": -0.25}],
    "numpy scalars": [{}, {np.int64(3): np.float32(-1.5), np.int32(7): -0.5}, {5: -0.25}],
    "pairs": [None, [[-0.5, 7, "a"], [-1.5, 3, None], [None, 8, "c"]], [(-0.25, 5, "b")]],
    "pairs, empty list": [[], [(-1.5, 3), (-0.5, 7)], [(-0.25, 5)]],
    "tuple": ((), ((-1.5, 3), (-0.5, 7)), ((-0.25, 5),)),
    "sentinels": [{1: -1e3}, {3: -1.5, 7: -0.5, 8: -9999.0}, {5: -0.25, 2: -INF, 1: None}],
    "negative ids": [{-1: 0.0}, {3: -1.5, 7: -0.5, -100: -0.1}, {5: -0.25}],
    "TGI": [
        [],
        [named(-0.5, id=7, text=" a", special=False), named(-1.5, id=3, text="b")],
        [named(-0.25, id=5, text="c")],
    ],
    "Dynamo": [
        None,
        [named(-0.5, token_id=7, token=" a", rank=1), named(-1.5, token_id=3, token="5", rank=2)],
        [named(-0.25, token_id=5, token=None, bytes=[99])],
    ],
    "named in text": [
        None,
        [named(-0.5, token="token_id:7"), named(-1.5, token="token_id:3")],
        [named(-0.25, id=None, token_id="5")],
    ],
    "llama.cpp": [
        None,
        top(
            named(-1.5, id=3, token="b", bytes=[98]),
            named(-0.5, id=7, token=" a"),
            named(-1.5, id=3, token="b"),
        ),
        top(named(-0.25, id=5, token="c")),
    ],
    "vLLM's chat": [
        None,
        top(
            named(-1.5, token="token_id:3", bytes=None),
            named(-0.5, token="token_id:7", bytes=[97]),
        ),
        {**named(-0.25, token="token_id:5"), "top_logprobs": None},
    ],
    "numbers in text": [None, {3: "-1.5", 7: "-5E-1"}, {5: "-0.25", 2: "-Infinity", 1: "-inf"}],
    "other numbers": [
        None,
        {3: torch.tensor(-1.5), torch.tensor(7): np.array(-0.5)},
        [(np.float64(-0.25), np.int32(5)), (Decimal(-2000), 6)],
    ],
    "object array": np.array([None, {3: -1.5, 7: -0.5}, {5: -0.25}], dtype=object),
}


@pytest.mark.parametrize("form", POSITIONS)
def test_every_form_of_positions_gives_the_same_support(form: str) -> None:
    topk = TopK.from_logprobs(POSITIONS[form])
    assert entries(topk) == SEQUENCE
    assert topk.ids.tolist() == [[-1, -1], [7, 3], [5, -1]]
    assert topk.logits[0].tolist() == [-INF, -INF]


ARRAYS = {
    "lists": ([[-1.5, -0.5], []], [[3, 7], []], SEQUENCE[1::-1]),
    "list of tensors": ([torch.tensor([-1.5, -0.5]), None], [torch.tensor([3, 7]), None],
                        SEQUENCE[1::-1]),
    "scalar tensors": ([torch.tensor(-1.5), torch.tensor(-0.5)],
                       [torch.tensor(3), torch.tensor(7)], SEQUENCE[1]),
    "int32 and float64": (np.array([[-1.5, -0.5]]), np.array([[3, 7]], np.int32), SEQUENCE[1:2]),
    "bfloat16": (torch.tensor([[-1.5, -0.5]]).bfloat16(), torch.tensor([[3, 7]]), SEQUENCE[1:2]),
    "tensor and list": (torch.tensor([[-1.5, -0.5]]), [[3, 7]], SEQUENCE[1:2]),
    "list and array": ([[-1.5, -0.5]], np.array([[3, 7]]), SEQUENCE[1:2]),
    "requires grad": (torch.tensor([[-1.5, -0.5]], requires_grad=True), torch.tensor([[3, 7]]),
                      SEQUENCE[1:2]),
    "jagged": (*jagged(), BATCH),
    "strings": ([[-1.5, -0.5]], [["3", "token_id:7"]], SEQUENCE[1:2]),
    "missing values": ([[-1.5, None, -0.5]], [[3, 4, 7]], SEQUENCE[1:2]),
    "missing position": ([[-1.5, -0.5], None], [[3, 7], None], SEQUENCE[1::-1]),
}  # fmt: skip


@pytest.mark.parametrize("form", ARRAYS)
def test_every_form_of_parallel_arrays_gives_the_same_support(form: str) -> None:
    logprobs, ids, expected = ARRAYS[form]
    assert entries(TopK.from_logprobs(logprobs, ids)) == expected


def test_arrays_are_not_changed_in_place() -> None:
    logprobs, ids = np.array([[-2000.0, -0.5]], np.float32), np.array([[3, 7]], np.int64)
    TopK.from_logprobs(logprobs, ids)
    assert logprobs.tolist() == [[-2000.0, -0.5]]
    assert ids.tolist() == [[3, 7]]


@pytest.mark.parametrize(
    ("payload", "shape"),
    [
        ({5: -1.0}, ()),
        ({"id": 5, "logprob": -1.0, "top_logprobs": [{"id": 6, "logprob": -2.0}]}, ()),
        ([], (0,)),
        ([None], (1,)),
        ([[], []], (2,)),
        ([[None, None], [None]], (2, 2)),
        ([[None, {5: -1.0}], None, []], (3, 2)),
        ([[None, {5: -1.0}], [None, {5: -1.0}, {6: -1.0}]], (2, 3)),
        ([[[None], [{5: -1.0}, {}]], [[None, None, None]]], (2, 2, 3)),
        ([[[(-1.0, 5)], [(-1.0, 5)], []]], (1, 3)),
    ],
)
def test_leading_shape_is_the_longest_of_each_level(payload: Any, shape: tuple[int, ...]) -> None:
    topk = TopK.from_logprobs(payload)
    assert topk.shape == shape
    assert TopK.from_logprobs(payload, k=4).ids.shape == (*shape, 4)


def test_positions_without_entries_keep_their_place() -> None:
    batch = [[{7: -0.5, 3: -1.5}], None, [None, {5: -0.25}, None]]
    pair = [(7, -0.5), (3, -1.5)]
    expected = [[pair, [], []], [[], [], []], [[], [(5, -0.25)], []]]
    assert entries(TopK.from_logprobs(batch)) == expected


@pytest.mark.parametrize("arrays", [([], []), (np.empty((0, 5)), np.empty((0, 5), int))])
def test_empty_arrays_have_no_rows(arrays: tuple[Any, Any]) -> None:
    assert TopK.from_logprobs(*arrays).shape == (0,)


def test_dtypes_and_order() -> None:
    topk = TopK.from_logprobs([{9: -1.0, 4: -1.0, 6: -0.5, 5: -1.0}])
    assert topk.ids.dtype == torch.int32
    assert topk.logits.dtype == topk.logsumexp.dtype == torch.float32
    assert topk.ids.tolist() == [[6, 4, 5, 9]]


def test_logsumexp_is_zero_where_there_are_entries_and_nan_where_not() -> None:
    topk = TopK.from_logprobs([None, {5: -0.25}, {5: -1e4}])
    torch.testing.assert_close(
        topk.logsumexp, torch.tensor([NAN, 0.0, NAN]), equal_nan=True, rtol=0, atol=0
    )


def test_the_sampled_token_that_is_listed_first_neither_repeats_nor_displaces() -> None:
    best = [[-0.5, 7], [-1.0, 3], [-1.5, 2]]
    outside, inside = [[-9.0, 50], *best], [[-1.0, 3], *best]
    topk = TopK.from_logprobs([outside, inside], k=3)
    assert topk.ids.tolist() == [[7, 3, 2]] * 2


def test_a_repeated_id_counts_once_with_its_larger_value() -> None:
    topk = TopK.from_logprobs([[[-3.0, 5], [-1.0, 5], [-2.0, 5], [-2.5, 4], [-9999.0, 4]]])
    assert entries(topk) == [[(5, -1.0), (4, -2.5)]]


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_k_cuts_and_pads(k: int) -> None:
    topk = TopK.from_logprobs([{5: -1.0, 3: -0.5, 8: -2.0}], k=k)
    assert topk.ids.tolist() == [([3, 5, 8] + [-1] * 5)[:k]]
    assert topk.logits.tolist() == [([-0.5, -1.0, -2.0] + [-INF] * 5)[:k]]


def test_width_is_the_longest_position_after_deduplication() -> None:
    assert TopK.from_logprobs([[[-1.0, 5], [-1.0, 5]], [[-2.0, 6]]]).k == 1
    assert TopK.from_logprobs([None, None]).k == 1
    assert TopK.from_logprobs([{5: -1e4, 6: -1e4}]).k == 1


@pytest.mark.parametrize("payload", [[{5: -1.0, 3: NAN}], [{"5": -1.0, "3": {"logprob": "NaN"}}]])
def test_nan_stays_ahead_of_all_others(payload: Any) -> None:
    topk = TopK.from_logprobs(payload, k=1)
    assert topk.ids.tolist() == [[3]]
    assert topk.logits.isnan().all()


def test_nan_of_a_repeated_id_is_not_hidden_by_its_other_value() -> None:
    topk = TopK.from_logprobs([[[-0.5, 3], [NAN, 3]]])
    assert topk.ids.tolist() == [[3]]
    assert topk.logits.isnan().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None,), TypeError, "logprobs is None.*did the request ask"),
        ((0.5,), TypeError, "a position of the payload is 0.5, a float.*parallel arrays"),
        (([[-0.5, -0.1]],), TypeError, "a float.*from_logprobs\\(logprobs, ids\\)"),
        ((torch.zeros(2, 3),), TypeError, "a Tensor, expected"),
        (("abc",), TypeError, "is 'abc', a str, expected"),
        (([{5: -1.0}, [{5: -1.0}]],), TypeError, "different depths"),
        (([{"the": -1.0}],), TypeError, "'the'.*return_tokens_as_token_ids"),
        (([{5.5: -1.0}],), TypeError, "names a token 5.5"),
        (([{5: {"rank": 1}}],), TypeError, "as a log-prob, expected a number"),
        (([{5: "high"}],), TypeError, "'high' as a log-prob"),
        (([{2**31: -1.0}],), ValueError, "2147483648 is beyond int32"),
        (([{2**70: -1.0}],), ValueError, "beyond int32"),
        (([{"9" * 5000: -1.0}],), ValueError, "beyond int32"),
        (([{5: 10**400}],), ValueError, "beyond what a float holds"),
        (([{5: 10**5000}],), ValueError, "a number too long to be shown as a log-prob"),
        (([[(-0.5, None, " a")]],), TypeError, "names a token None"),
        (([[{"id": 5, "prob": 0.5}]],), TypeError, 'expected one with "logprob"'),
        (([[{"logprob": -0.5, "text": "a"}]],), TypeError, "expected one with id, token_id, token"),
        (([None, {"id": 5, "logprob": -1.0}],), TypeError, "entry .* where a position is expected"),
        (([top({"id": 5, "logprob": -1.0}, -2.0)],), TypeError, "a position .* is .*top_logprobs"),
        (([{"logprob": -0.5, "top_logprobs": 3}],), TypeError, "a position .* is .*top_logprobs"),
        (([{"logprob": -0.5, "top_logprobs": {"a": -1}}],), TypeError, "a position of the payload"),
        (([[-1.0]], [[2**31]]), ValueError, "2147483648 is beyond int32"),
        ((np.zeros(1), np.array([2**63], np.uint64)), ValueError, "beyond int32"),
        ((torch.zeros(1, 2), torch.zeros(1, 2)), TypeError, "float32, expected integers.*order"),
        (([[3, 7]], [[-0.5, -1.5]]), TypeError, "names a token -0.5"),
        ((torch.zeros(2, 3), torch.zeros(2, 4).int()), ValueError, r"\(2, 4\) and \(2, 3\)"),
        (([[-1.0], [-1.0, -2.0]], [[1, 2], [3]]), ValueError, r"length \(2 and 1\)"),
        (([[-1.0]], [[1], [2]]), ValueError, r"length \(2 and 1\)"),
        ((-1.0, 5), TypeError, "hold a int, expected arrays"),
        (([[-1.0], -1.0], [[1], 2]), TypeError, "hold a int"),
    ],
)
def test_what_is_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TopK.from_logprobs(*arguments)


NOT_IDS = [
    " 5", "5 ", "\n5", "5\n", "1_000", "+5", "-5", "05", "00", "0x5", "5.0", "", "the",
    "\u0663", "\uff15", "\xb2", "token_id: 5", "token_id:", "token_id:+5", "token_id:-1",
    "token_id:05", "token_id:\u0663",
    " token_id:5", "TOKEN_ID:5", "token_id:token_id:5", "9" * 5000 + " ",
]  # fmt: skip


@pytest.mark.parametrize(
    "form",
    [
        lambda text: ([{"5": -0.25, text: -1.75}],),
        lambda text: ([[(-0.1, text), (-0.2, 5)]],),
        lambda text: ([[named(-0.1, id=text)]],),
        lambda text: ([[named(-0.1, token_id=text)]],),
        lambda text: ([[named(-0.1, token=text)]],),
        lambda text: ([top(named(-0.1, id=5), named(-0.2, token=text))],),
        lambda text: ([[-0.1, -0.2]], [[5, text]]),
    ],
    ids=["mapping", "pair", "id", "token_id", "token", "top_logprobs", "arrays"],
)
def test_text_is_an_id_only_where_it_is_plain_digits(form: Any) -> None:
    assert TopK.from_logprobs(*form("token_id:7")).ids.flatten().tolist().count(7) == 1
    for text in NOT_IDS:
        with pytest.raises(TypeError, match="expected its id; ask the server") as caught:
            TopK.from_logprobs(*form(text))
        assert f"names a token {repr(text)[:60]}" in str(caught.value)


def test_a_token_of_digits_is_text() -> None:
    with pytest.raises(TypeError, match="names a token '5', expected its id"):
        TopK.from_logprobs([[named(-0.1, token="5")]])
    assert TopK.from_logprobs([[named(-0.1, token=5)]]).ids.tolist() == [[5]]


NOT_NUMBERS = [
    " -1", "-1 ", "-1_0.5", "\u0663", "-\uff11", "", "-", ".", "1e", "0x1p-1", "--1", "high", "1,5",
    "\u0131nf",
    b"-0.5", True, np.True_, torch.tensor(True), 1j, np.complex64(-1), torch.tensor(-1j), [-1.0],
    torch.zeros(2), {"logprob": False}, {"logprob": {"logprob": -1.0}}, SimpleNamespace(logprob=1j),
]  # fmt: skip


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
def test_what_is_no_real_number_is_no_log_prob(value: Any) -> None:
    with pytest.raises(TypeError, match=r"as a log-prob, expected a number.*\(payload\[1\]\)"):
        TopK.from_logprobs([None, {5: -0.5, 6: value}])
    with pytest.raises(TypeError, match=r"as a log-prob, expected a number.*\(payload\[1\]\)"):
        TopK.from_logprobs([None, [named(-0.5, id=5), named(value, id=6)]])


@pytest.mark.filterwarnings("error")
def test_the_least_float64_is_absent() -> None:
    least = np.finfo(np.float64).min
    expected = [[(5, -0.5)]]
    assert entries(TopK.from_logprobs([{5: -0.5, 6: least}])) == expected
    assert entries(TopK.from_logprobs([[-0.5, least]], [[5, 6]])) == expected
    assert entries(TopK.from_logprobs(np.array([[-0.5, least]]), np.array([[5, 6]]))) == expected


@pytest.mark.parametrize("dtype", [bool, complex, "U4", "datetime64[s]"])
def test_arrays_of_other_dtypes_are_no_log_probs(dtype: Any) -> None:
    values, ids = np.zeros((2, 3), int).astype(dtype), np.ones((2, 3), int)
    with pytest.raises(TypeError, match=r"logprobs have dtype .*, expected real numbers"):
        TopK.from_logprobs(values, ids)


@pytest.mark.parametrize("token", [True, np.True_, torch.tensor(True), None, 6.0, b"5"])
def test_what_is_no_integer_is_no_id(token: Any) -> None:
    with pytest.raises(TypeError, match="expected its id"):
        TopK.from_logprobs([{5: -0.5, token: -0.1}])
    with pytest.raises(TypeError, match="expected its id"):
        TopK.from_logprobs([[-0.5, -0.1]], [[5, token]])


def test_negative_ids_of_any_size_are_absent() -> None:
    assert entries(TopK.from_logprobs([{-(2**70): -0.1, 5: -0.5}])) == [[(5, -0.5)]]
    assert entries(TopK.from_logprobs([[-0.1, -0.5]], [[-(2**70), 5]])) == [[(5, -0.5)]]


FLAT = [[None, 3, None], [-0.5, 8, None], [-0.75, 1, None]]


@pytest.mark.parametrize("tokens", [FLAT, FLAT[1:], tuple(map(tuple, FLAT[1:])), FLAT[:1]])
def test_the_tokens_of_a_sequence_are_not_one_position(tokens: Any) -> None:
    with pytest.raises(
        TypeError, match=r"flat list of entries.*input_top_logprobs.*positions, \[\["
    ):
        TopK.from_logprobs(tokens)
    with pytest.raises(TypeError, match="flat list of entries"):
        TopK.from_logprobs([named(value, id=token) for value, token, _ in tokens])


def test_the_tokens_of_sequences_are_not_positions_of_a_batch() -> None:
    named_ones = [named(value, id=token) for value, token, _ in FLAT]
    for tokens in (FLAT, named_ones):
        with pytest.raises(TypeError, match=r"begins with .*input_top_logprobs.*\(payload\[1\]\)"):
            TopK.from_logprobs([FLAT[1:], tokens])


def test_errors_name_the_place() -> None:
    with pytest.raises(TypeError, match=r"token ' a', .*\(payload\[1\]\[2\]\)"):
        TopK.from_logprobs([[None], [None, {5: -0.5}, {" a": -0.5}]])
    with pytest.raises(ValueError, match=r"\(1 and 2\).*\(payload\[1\]\)"):
        TopK.from_logprobs([[-0.1], [-0.5, -0.7]], [[5], [6]])
    with pytest.raises(TypeError, match=r"token 'x', .*\(payload\[0\]\)"):
        TopK.from_logprobs([[-0.1]], [["x"]])
    with pytest.raises(ValueError, match=r"2147483648 is beyond int32.*\(payload\[1\]\)"):
        TopK.from_logprobs([torch.zeros(1)] * 2, [torch.tensor([5]), torch.tensor([2**31])])


def test_k_that_is_no_int_is_refused() -> None:
    for k in (2.5, True, "8"):
        with pytest.raises(TypeError, match=f"k is a {type(k).__name__}, expected an int"):
            TopK.from_logprobs([{5: -1.0}], k=k)


@pytest.mark.parametrize("k", [0, -1, 2**31, 2**40])
def test_k_below_one_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}, allowed is 1 or more"):
        TopK.from_logprobs([{5: -1.0}], k=k)


def test_device_is_where_the_tensors_go() -> None:
    topk = TopK.from_logprobs([{5: -1.0}], device="meta")
    assert topk.ids.is_meta
    assert topk.logits.is_meta
    assert topk.logsumexp.is_meta


def test_the_largest_id_fits() -> None:
    assert TopK.from_logprobs([{2**31 - 1: -1.0}]).ids.tolist() == [[2**31 - 1]]


def expected_entries(position: list[tuple[int, float]], k: int | None) -> list[tuple[int, float]]:
    best: dict[int, float] = {}
    for token, value in position:
        if token >= 0 and value > -1e3:
            best[token] = max(value, best.get(token, -INF))
    return sorted(best.items(), key=lambda entry: (-entry[1], entry[0]))[:k]


# Values that float32 and four decimals hold exactly, with ties.
VALUES = st.one_of(st.integers(-40, 0).map(lambda n: n / 4), st.sampled_from([-1e3, -1e4, -INF]))
POSITION = st.lists(st.tuples(st.integers(-1, 12), VALUES), max_size=6)


@settings(max_examples=150)
@given(
    st.lists(st.lists(POSITION, max_size=4), min_size=1, max_size=3),
    st.one_of(st.none(), st.integers(1, 8)),
)
def test_batches_read_as_a_plain_loop_reads_them(
    batch: list[list[list[tuple[int, float]]]], k: int | None
) -> None:
    pairs = [[[(v, t, "text") for t, v in position] for position in seq] for seq in batch]
    ids = [[[t for t, _ in position] for position in seq] for seq in batch]
    logprobs = [[[v for _, v in position] for position in seq] for seq in batch]
    length = max(map(len, batch))
    expected = [
        [expected_entries(position, k) for position in seq] + [[]] * (length - len(seq))
        for seq in batch
    ]
    if length == 0:  # nothing says that the empty lists are sequences and not positions
        return
    by_arrays = TopK.from_logprobs(logprobs, ids, k=k)
    assert entries(by_arrays) == expected
    assert entries(TopK.from_logprobs(pairs, k=k)) == expected
    longest = max((len(position) for seq in expected for position in seq), default=0)
    assert by_arrays.k == (k or max(longest, 1))


# The sampled tokens


def test_the_sampled_token_is_looked_up_before_the_list_is_cut() -> None:
    best = [[-0.5, 7], [-1.0, 3], [-1.5, 2]]
    payload = [None, [[-9.0, 50], *best], [[-1.0, 3], *best]]
    topk = TopK.from_logprobs(payload, k=2, token_ids=[4, 50, 3])
    assert topk.ids.tolist() == [[-1, -1], [7, 3], [7, 3]]
    assert topk.token_logits.dtype == torch.float32
    assert topk.token_logits[1:].tolist() == [-9.0, -1.0]
    assert topk.token_logits[0].isnan()
    assert topk.temperature == 1.0
    assert TopK.from_logprobs(payload, k=2).token_logits is None


TOKENS = [[7, -100, None], [5, 4]]  # of the positions of BATCH and one without entries
IN_BATCH = [[[(-0.5, 7), (-1.5, 3)], [], []], [[(-0.25, 5), (-2.0, 9)], [(-1.0, 4), (-3.0, 2)]]]


@pytest.mark.parametrize(
    "tokens",
    [
        TOKENS,
        [(7, -1, -1), (5, 4)],
        [[7, -100, 0], [5, 4, -100]],
        torch.tensor([[7, 8, 3], [5, 4, 99]], dtype=torch.int32),
        np.array([[7, 0, 0], [5, 4, 0]], dtype=np.uint16),
        [torch.tensor([7, -1]), np.array([5, 4, -1])],
        [[np.int64(7), torch.tensor(-100), None], ["5", "token_id:4"]],
        torch.nested.nested_tensor(
            [torch.tensor([7, 1, 2]), torch.tensor([5, 4])], layout=torch.jagged
        ),
    ],
    ids=["ragged", "tuples", "padded", "tensor", "array", "arrays", "scalars", "jagged"],
)
def test_every_form_of_token_ids_is_taken(tokens: Any) -> None:
    for k in (None, 1):
        topk = TopK.from_logprobs(IN_BATCH, k=k, token_ids=tokens)
        expected = torch.tensor([[-0.5, NAN, NAN], [-0.25, -1.0, NAN]])
        torch.testing.assert_close(topk.token_logits, expected, rtol=0, atol=0, equal_nan=True)


def test_parallel_arrays_and_single_positions_take_token_ids() -> None:
    logprobs, ids = torch.tensor([[-0.5, -1.5], [-0.25, -2.0]]), torch.tensor([[7, 3], [5, 9]])
    topk = TopK.from_logprobs(logprobs, ids, token_ids=torch.tensor([3, 5]))
    assert topk.token_logits.tolist() == [-1.5, -0.25]
    for tokens in (3, torch.tensor(3), np.int64(3)):
        assert TopK.from_logprobs({7: -0.5, 3: -1.5}, token_ids=tokens).token_logits == -1.5
    assert TopK.from_logprobs({7: -0.5}, token_ids=-100).token_logits.isnan()
    for payload, tokens in (([], []), ([[], []], [[], []]), (np.empty((0, 5)), [])):
        ids = np.empty((0, 5), int) if isinstance(payload, np.ndarray) else None
        empty = TopK.from_logprobs(payload, ids, token_ids=tokens)
        assert empty.token_logits.shape == empty.shape


def test_a_token_that_is_listed_twice_or_as_a_sentinel() -> None:
    payload = [[[-3.0, 5], [-1.0, 5], [-2.0, 4]], [[-9999.0, 5], [-2.0, 4]], [[-2.0, 4], [None, 5]],
               [[NAN, 5], [-1.0, 5]], [[-9999.0, 5]]]  # fmt: skip
    topk = TopK.from_logprobs(payload, token_ids=[5] * 5)
    expected = torch.tensor([-1.0, -INF, -INF, NAN, NAN])  # the last lists nothing
    torch.testing.assert_close(topk.token_logits, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([[7, 1, 1], [5, 8]], ValueError,
         r"token_ids\[1\]\[1\] is 8, which payload\[1\]\[1\] does not list; compare the "
         r"positions.*ask the server to list the sampled token"),
        ([[7, 1, 1], [5]], ValueError,
         r"token_ids\[1\]\[1\] is missing, but that position .* has entries"),
        ([[7, 1, 1], [5, None]], ValueError, r"token_ids\[1\]\[1\] is missing"),
        ([[7], None], ValueError, r"token_ids have shape \(2, 1\), .* of the payload \(2, 3\)"),
        ([7, 5], ValueError, r"token_ids have shape \(2,\), the positions of the payload \(2, 3\)"),
        ([[7, 1, 1, 1], [5, 4]], ValueError, r"shape \(2, 4\), .* \(2, 3\); expected one per pos"),
        (7, ValueError, r"shape \(\), .* \(2, 3\)"),
        ([], ValueError, r"shape \(0,\), .* \(2, 3\)"),
        ([[7, 1, 1], 5], TypeError, "token_ids lie at different depths"),
        ([[7, 1, 1], [5, "the"]], TypeError, r"names a token 'the'.*\(token_ids\[1\]\[1\]\)"),
        ([[7, 1, 1], [5.0, 4]], TypeError, r"names a token 5.0.*\(token_ids\[1\]\[0\]\)"),
        ([[7, 1, 1], [True, 4]], TypeError, "names a token True"),
        (torch.zeros(2, 3), TypeError, "token_ids have dtype float32, expected integers"),
        (torch.zeros(2, 3).bfloat16(), TypeError, "token_ids have dtype float32, expected int"),
        (np.zeros((2, 3), bool), TypeError, "token_ids have dtype bool, expected integers"),
        (torch.full((2, 3), 2**31), ValueError, "2147483648 is beyond int32"),
        ({7: 1}, TypeError, "names a token {7: 1}"),
    ],
)  # fmt: skip
def test_token_ids_that_are_refused(tokens: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TopK.from_logprobs(IN_BATCH, token_ids=tokens)


def test_a_missing_token_is_missed_where_the_list_is_short_too() -> None:
    payload = [[{7: -0.5, 3: -1.0}, {5: -0.25}], [{5: -1.0}, {4: -1.0}]]
    with pytest.raises(ValueError, match=r"token_ids\[1\]\[1\] is missing"):
        TopK.from_logprobs(payload, token_ids=[[7, 5], [5]])


@settings(max_examples=60)
@given(st.lists(st.lists(POSITION, min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_token_logits_are_what_a_plain_loop_finds(
    batch: list[list[list[tuple[int, float]]]], data: st.DataObject
) -> None:
    pairs = [[[(v, t, "text") for t, v in position] for position in seq] for seq in batch]
    tokens = [
        [data.draw(st.sampled_from([-100, *(t for t, _ in position)])) for position in seq]
        for seq in batch
    ]
    topk = TopK.from_logprobs(pairs, k=1, token_ids=tokens)
    for i, seq in enumerate(batch):
        for j, position in enumerate(seq):
            listed = [v for t, v in position if t == tokens[i][j] >= 0]
            value = max((v if v > -1e3 else -INF for v in listed), default=NAN)
            value = value if any(t >= 0 and v > -1e3 for t, v in position) else NAN
            got = topk.token_logits[i, j].item()
            assert got == value or (math.isnan(got) and math.isnan(value))
        assert topk.token_logits[i, len(seq) :].isnan().all()


def test_a_payload_gives_the_loss_of_the_teacher_it_came_from() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 40, generator=generator)
    best = teacher.log_softmax(-1).topk(8)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    payload = [None, *(dict(zip(*row, strict=True)) for row in list(rows)[1:])]
    topk = TopK.from_logprobs(payload)
    mask = torch.arange(6) > 0
    loss, stats = topk_rkl(student, topk, mask=mask, return_stats=True)
    expected, wanted = topk_rkl(student, teacher, 8, mask=mask, return_stats=True)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats.mean().teacher_mass, wanted.mean().teacher_mass)
    torch.testing.assert_close(stats.teacher_mass, wanted.teacher_mass, equal_nan=True)
    assert math.isfinite(loss.item())
