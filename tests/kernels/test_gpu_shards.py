"""Columns on several ranks, with GPU tensors: two gloo ranks share one GPU. Needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sharded_on_gpu
import torch
from rank_pool import Pool

# Products of a part of a head may add in another order; bfloat16 rounds what they are.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("of_head", [False, True])
@pytest.mark.parametrize("outside", ["renormalize", "bucket"])
@pytest.mark.parametrize("dtype", LIMITS)
def test_two_ranks_have_the_whole_rows_numbers(
    pool: Pool, dtype: torch.dtype, outside: str, of_head: bool
) -> None:
    found = pool.run(sharded_on_gpu.compare, "cuda:0", dtype, outside, of_head, limit=60)
    assert max(map(max, found)) < LIMITS[dtype]


def test_nccl_passes_bits_on(pool: Pool) -> None:
    assert all(pool.run(sharded_on_gpu.collectives, "cuda:0", "nccl", limit=60))
