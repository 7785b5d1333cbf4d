"""Entries in order: larger values first, ties to the lower id, absent entries last."""

from __future__ import annotations

import math

import pytest
import torch

from opd_kernels._ordering import in_order

INF, LEAST = math.inf, -torch.finfo(torch.float32).max
# Those that compare as equal, or that have bits out of order, are there.
VALUES = [math.nan, -math.nan, INF, 1.5, 1.0, 1e-42, 0.0, -0.0, -1e-42, -1.0, LEAST, -INF]


def entries(generator: torch.Generator, count: int) -> list[tuple[float, int]]:
    """Values with many ties at ids of their own, and absent entries."""
    picked = torch.randint(len(VALUES) + 1, (count,), generator=generator).tolist()
    ids = torch.randperm(4 * count, generator=generator)[:count].tolist()
    ids[0] = 2**31 - 1
    return [
        (VALUES[v], i) if v < len(VALUES) else (-INF, -1) for v, i in zip(picked, ids, strict=True)
    ]


def key(entry: tuple[float, int]) -> tuple[bool, float, bool, int]:
    """What Python sorts by: NaN first, absent entries last."""
    value, index = entry
    return (not math.isnan(value), 0.0 if math.isnan(value) else -value, index < 0, index)


@pytest.mark.parametrize("sorts", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entries_are_in_order_whatever_their_values(
    dtype: torch.dtype, sorts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sorts == "torch":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    generator = torch.Generator().manual_seed(0)
    rows = [entries(generator, 70) for _ in range(40)]
    values = torch.tensor([[value for value, _ in row] for row in rows], dtype=dtype)
    ids = torch.tensor([[index for _, index in row] for row in rows], dtype=torch.int32)
    expected = [sorted(row, key=key) for row in rows]
    for k in (1, 33, 70):
        found_ids, found = in_order(ids, values, k)
        assert found_ids.dtype == torch.int32
        assert found.dtype == dtype
        assert found_ids.tolist() == [[index for _, index in row[:k]] for row in expected]
        torch.testing.assert_close(
            found,
            torch.tensor([[value for value, _ in row[:k]] for row in expected], dtype=dtype),
            rtol=0,
            atol=0,
            equal_nan=True,
        )


def test_no_entries_are_in_order() -> None:
    ids, values = in_order(torch.empty(3, 0, dtype=torch.int32), torch.empty(3, 0), 0)
    assert ids.shape == values.shape == (3, 0)
