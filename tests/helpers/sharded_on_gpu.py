"""What ranks that share one GPU do in a test: a group's calls against the whole rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from opd_kernels import LinearLogits, VocabShard, _collectives, topk_divergence

N, V, K, H = 64, 4099, 16, 32


def compare(
    group: Any, device: str, dtype: torch.dtype, outside: str, of_head: bool
) -> list[float]:
    """Largest differences of loss and gradients from one rank's, relative to their largest value.

    The collectives are the group's, on tensors of the device.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device).normal_(generator=generator).to(dtype)

    leaves = [normal(N, H), normal(V, H)] if of_head else [3 * normal(N, V)]
    teacher = 3 * normal(N, V)
    rank, step = dist.get_rank(group), -(-V // dist.get_world_size(group))
    mine = slice(rank * step, min((rank + 1) * step, V))
    whole = [leaf.clone().requires_grad_() for leaf in leaves]
    here = whole[:1] if of_head else []
    here = [leaf.detach().clone().requires_grad_() for leaf in here]
    here.append((leaves[1][mine] if of_head else leaves[0][:, mine]).clone().requires_grad_())

    def step_of(tensors: list[torch.Tensor], theirs: torch.Tensor, **options: Any) -> list[Any]:
        student = LinearLogits(*tensors) if of_head else tensors[0]
        loss = topk_divergence(student, theirs, K, outside=outside, reduction="none", **options)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), tensors)]

    shard = VocabShard(mine.start, V, group)
    expected = step_of(whole, teacher)
    found = step_of(here, teacher[:, mine].contiguous(), vocab_shard=shard)
    expected[-1] = expected[-1][mine] if of_head else expected[-1][:, mine]
    return [
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
    ]


def collectives(group: Any, device: str, backend: str) -> bool:
    """Whether the two collectives pass the bits of a group of this rank alone on."""
    alone = dist.new_group([dist.get_rank()], backend=backend, use_local_synchronization=True)
    shard = VocabShard(0, 8, alone)
    words = torch.tensor([0, -1, 2**31 - 1, -(2**31), 0x7FC00001], device=device).int()
    gathered, total = _collectives._gather(shard, words), _collectives._sum(shard, words)
    return bool((gathered == words).all() and (total == words).all())
