"""The Triton kernels of hidden states and a head under each switch that a benchmark may set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import guards
import pytest
import torch
from effort import INTERPRETED
from tensors import DTYPES, integers, normal

from opd_kernels._arguments import Allowed
from opd_kernels.backends import triton
from opd_kernels.backends.triton import configs
from opd_kernels.backends.triton.launches import linear

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")

VOCAB, LIMIT, WIDTH, K = 50, 48, 300, 9
BANNED = torch.zeros(8, dtype=torch.uint8)
BANNED[1] = 0b101  # 8 and 10


@pytest.fixture
def careful() -> Iterator[None]:
    """Guards what the backend allocates, and starts it with garbage."""
    with guards.around_allocations(triton.common, "empty"):
        yield


def both_orders(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> list[tuple[torch.Tensor, ...]]:
    results = []
    for switch in (False, True):
        monkeypatch.setattr(configs, "SORTED_DOTS", switch)
        results.append(triton.gather_dot(*arguments))
    return results


def ids_of(*rows: int, seed: int = 5) -> torch.Tensor:
    """Ids, some of which are absent."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, VOCAB + 5, (*rows, K), generator=generator)


@pytest.mark.parametrize("cached", [1, 16 << 20])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("hidden_dtype", DTYPES)
def test_exact_logits_are_the_same_in_both_orders(
    careful: None,
    monkeypatch: pytest.MonkeyPatch,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    cached: int,
) -> None:
    # In slices of 16 bytes a thread and in one slice; runs end within segments.
    monkeypatch.setattr(configs, "_CACHED_BYTES", cached)
    monkeypatch.setattr(configs, "_RUN", 4)
    hidden = integers(2, 5, WIDTH, dtype=hidden_dtype)
    weight, bias = integers(VOCAB, WIDTH, seed=1, dtype=weight_dtype), integers(VOCAB, seed=2)
    mask = torch.arange(10).view(2, 5) % 4 != 1
    for banned, masked, offset in ((None, None, None), (BANNED, mask, bias)):
        for ids in (ids_of(2, 5), ids_of(2, 5).int()):
            allowed = Allowed(LIMIT, banned, masked)
            plain, by_id = both_orders(monkeypatch, hidden, weight, offset, ids, allowed)
            assert torch.equal(plain[0], by_id[0])
            assert torch.equal(plain[1], by_id[1])


def test_hidden_states_of_any_strides_are_taken_in_the_order_of_ids(
    careful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "_CACHED_BYTES", 1)
    weight = integers(2 * VOCAB, WIDTH, seed=1)[::2]
    hidden = integers(2, 3, 4, 2, WIDTH + 5).permute(2, 0, 3, 1, 4)[..., 3 : 3 + WIDTH]
    ids = ids_of(4, 2, 2, 3)
    plain, by_id = both_orders(monkeypatch, hidden, weight, None, ids, Allowed(LIMIT))
    assert torch.equal(plain[0], by_id[0])
    assert torch.equal(plain[1], by_id[1])


@pytest.mark.parametrize("masked", [False, True])
def test_no_entries_at_all_give_zeros(
    careful: None, monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    hidden, weight = normal(3, WIDTH), normal(VOCAB, WIDTH, seed=1)
    ids, mask = ids_of(3), torch.zeros(3, dtype=torch.bool)
    ids = ids if masked else torch.full_like(ids, -1)
    monkeypatch.setattr(configs, "SORTED_DOTS", True)
    allowed = Allowed(LIMIT, mask=mask if masked else None)
    logits, slots = triton.gather_dot(hidden, weight, None, ids, allowed)
    assert torch.equal(logits, torch.zeros(3, K))
    assert (slots == -1).all()


def test_a_logit_has_the_same_bits_wherever_its_entry_comes_in_the_order(
    careful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "SORTED_DOTS", True)
    monkeypatch.setattr(configs, "_RUN", 4)
    hidden, weight = normal(6, WIDTH), normal(VOCAB, WIDTH, seed=1)
    ids = torch.randint(VOCAB, (6, K), generator=torch.Generator().manual_seed(3))
    logits, _ = triton.gather_dot(hidden, weight, None, ids, Allowed(VOCAB))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        turned = torch.randperm(K, generator=generator)
        rows = torch.randperm(6, generator=generator)
        turned_ids = ids[rows][:, turned]
        again, _ = triton.gather_dot(hidden[rows], weight, None, turned_ids, Allowed(VOCAB))
        assert torch.equal(again, logits[rows][:, turned])


def test_more_entries_than_32_bits_count_keep_their_order(
    careful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_sorted_dots", None)
    monkeypatch.setattr(configs, "MAX_SORTED", 2 * K)
    hidden, weight = normal(2, WIDTH), normal(VOCAB, WIDTH, seed=1)
    plain, by_id = both_orders(monkeypatch, hidden, weight, None, ids_of(2), Allowed(LIMIT))
    assert torch.equal(plain[0], by_id[0])


@pytest.mark.parametrize(
    "variant",
    [{"STAGES": 4}, {"WEIGHT_GRAD_ROWS": 1}, {"WEIGHT_GRAD_ROWS": 4}, {"WEIGHT_GRAD_WARPS": 2}],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_gradients_are_the_same_in_every_variant(
    careful: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, variant: dict[str, int]
) -> None:
    rows, width = 60, 1100
    hidden, weight = integers(rows, width, dtype=dtype), integers(VOCAB, width, seed=1, dtype=dtype)
    ids, upstream = ids_of(rows), integers(rows, K, seed=2)
    ids[:, 0] = 7  # entries of more chunks than a program adds up at once
    monkeypatch.setattr(configs, "CHUNK", 8)
    dense = torch.zeros(rows, VOCAB + 1)
    present = (ids >= 0) & (ids < VOCAB)
    dense.scatter_add_(1, torch.where(present, ids, VOCAB), upstream)
    dense = dense[:, :VOCAB]
    for name, value in variant.items():
        monkeypatch.setattr(configs, name, value)
    few = slice(12)  # a row's gradient is made of its own entries alone
    by_hidden = triton.gather_dot_hidden(upstream[few], ids[few], weight, torch.float32)
    assert torch.equal(by_hidden, dense[few] @ weight.float())
    by_weight = triton.gather_dot_weight(upstream, ids, hidden, VOCAB, torch.float32)
    assert torch.equal(by_weight, dense.t() @ hidden.float())
