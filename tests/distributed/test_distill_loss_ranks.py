"""``distill_loss`` on two processes: the loss and gradients of one that has all sequences."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import as_rank, run_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers", reason="it runs models of transformers")

from causal_models import ATTENTION, MASK, TOKENS, B, K, T, V, assert_same, gradients, model_of

from opd_kernels import distill_loss

WORLD = 2
# Three sequences; no token of the last one counts.
SPLITS = {"two and one": [slice(2), slice(2, 3)], "one and two": [slice(1), slice(1, 3)]}
LOSSES: dict[str, dict[str, Any]] = {
    "renormalize": {},
    "bucket": {"outside": "bucket"},
    "rows": {"outside": "bucket", "weight": torch.linspace(0.5, 2, B * T).double().view(B, T)},
    "sampled": {"outside": "bucket", "background": "sampled"},
    "statistics": {"outside": "truncate", "return_stats": ["student_mass"]},
}
CASES = [
    ("ddp", "two and one", "renormalize"),
    ("ddp", "one and two", "rows"),
    ("fsdp2", "two and one", "bucket"),
    ("fsdp2", "one and two", "sampled"),
    ("fsdp2", "one and two", "statistics"),
    ("fsdp2, teacher resharded", "one and two", "renormalize"),
    ("fsdp2, teacher resharded", "two and one", "rows"),
    ("fsdp2, head apart", "two and one", "bucket"),
    ("fsdp2, head apart, teacher resharded", "one and two", "rows"),
    ("fsdp2, head with the norm", "one and two", "bucket"),
]


def sharded(model: Any, mesh: DeviceMesh, wrapper: str, **options: Any) -> Any:
    fully_shard(model.model.layers[0], mesh=mesh, **options)
    if "head apart" in wrapper:
        fully_shard(model.lm_head, mesh=mesh, **options)
    if "head with the norm" in wrapper:  # as accelerate 1.15 does
        tail = [model.model.norm, model.lm_head]
        fully_shard(tail, mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh, **options)


def loss_of(model: Any, teacher: Any, rows: slice, normalizer: Tensor | None, **given: Any) -> Any:
    options = {
        name: value[rows] if isinstance(value, Tensor) else value for name, value in given.items()
    }
    result = distill_loss(
        model, TOKENS[rows], teacher, mask=MASK[rows], attention_mask=ATTENTION[rows], k=K,
        normalizer=normalizer, **options,
    )  # fmt: skip
    return result[0] if isinstance(result, tuple) else result


def trained_apart(
    wrapper: str, rows: slice, options: dict[str, Any], mesh: DeviceMesh
) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """Loss and gradients of one process, and of both ranks together, twice."""
    # A weight that two modules share cannot be sharded apart.
    student = model_of(tie_word_embeddings="head" not in wrapper)
    teacher = model_of(seed=5, vocab_size=V + 8)
    expected = loss_of(student, teacher, slice(None), None, **options)
    results = [(expected.detach(), gradients(expected, student))]
    ours = copy.deepcopy(student)
    if wrapper == "ddp":
        wrapped: Any = DistributedDataParallel(ours)
    else:
        resharded = {"reshard_after_forward": True} if "resharded" in wrapper else {}
        wrapped = sharded(ours, mesh, wrapper)
        teacher = sharded(teacher, mesh, wrapper, **resharded)
    counted = MASK[rows, 1:].sum()
    dist.all_reduce(counted)
    for _ in range(2):
        ours.zero_grad()
        loss = loss_of(wrapped, teacher, rows, counted, **options)
        (loss * WORLD).backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        found = [parameter.grad for parameter in ours.parameters()]
        whole = [g.full_tensor() if isinstance(g, DTensor) else g.clone() for g in found]
        results.append((total, tuple(whole)))
    return results


def measured(rank: int) -> dict[str, str]:
    """What is wrong with each case; nothing, if all is well."""
    mesh, said = init_device_mesh("cpu", (WORLD,)), {}
    for case in CASES:
        wrapper, split, loss = case
        expected, *results = trained_apart(wrapper, SPLITS[split][rank], LOSSES[loss], mesh)
        said[", ".join(case)] = ""
        try:
            for result in results:
                assert_same(result[0], expected[0])
                assert_same(result[1], expected[1])
        except AssertionError as error:
            said[", ".join(case)] = str(error)
    return said


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_ranks(__file__, tmp_path_factory.mktemp("ranks"), WORLD)


@pytest.mark.parametrize("name", [", ".join(case) for case in CASES])
def test_two_ranks_have_the_loss_and_the_gradients_of_one_process(
    found: list[dict[str, str]], name: str
) -> None:
    assert [rank[name] for rank in found] == [""] * WORLD


if __name__ == "__main__":
    as_rank(measured, WORLD)
