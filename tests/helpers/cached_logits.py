"""Megatron-LM's loss on cached log-probs: its inputs, the formula in float64, and its arithmetic.

Shapes are (S, B, V) and (S, B, K). ``exact`` is what is meant; ``as_megatron`` computes as
Megatron's main branch of 2026-08-22 does, which is in no package, with the same roundings, floors
and collectives. An upstream that is 1 on every rank is what Megatron's training loop gives it.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.distributed.nn as dist_nn
from torch import Tensor

S, B, V, K = 7, 3, 50, 6
SENTINEL = -1e3
READ_BACK = 131071  # what an id of -1 is after it was packed into 17 bits
LEAST_TAIL = 2.0**-24


def logits(scale: float, seed: int, dtype: torch.dtype, vocab: int = V) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(S, B, vocab, generator=generator)).to(dtype)


def cached(seed: int = 1, absent_id: int = READ_BACK, vocab: int = V) -> tuple[Tensor, Tensor]:
    """A teacher's float16 log-probs and ids, from 1 to K entries a row."""
    logprobs, ids = logits(1.5, seed, torch.float32, vocab).log_softmax(-1).topk(K)
    kept = 1 + torch.arange(S * B).reshape(S, B, 1) % K
    absent = torch.arange(K) >= kept
    return logprobs.half().masked_fill(absent, SENTINEL), ids.masked_fill(absent, absent_id)


def exact(student: Tensor, logprobs: Tensor, ids: Tensor, ghost: bool = True) -> Tensor:
    """(S, B) in float64. The teacher's tail is what the rounded log-probs leave."""
    logp, logq = student.double().log_softmax(-1), logprobs.double()
    present = (logq > SENTINEL) & (ids >= 0) & (ids < student.shape[-1])
    logq = logq.masked_fill(~present, -math.inf)
    inside = torch.zeros_like(logp).scatter_add(
        -1, ids.where(present, torch.zeros_like(ids)), present.double()
    )
    at_ids = logp.gather(-1, ids.where(present, torch.zeros_like(ids)))
    ratio = (logq - at_ids).masked_fill(~present, 0.0)
    loss = (logq.exp() * ratio).sum(-1)
    if ghost:
        rest = (1 - logq.exp().sum(-1)).clamp(min=LEAST_TAIL)
        others = logp.masked_fill(inside > 0, -math.inf).logsumexp(-1)
        loss = loss + rest * (rest.log() - others)
    return loss


def as_megatron(
    student: Tensor,
    logprobs: Tensor,
    ids: Tensor,
    ranks: int = 1,
    rank: int = 0,
    group: dist.ProcessGroup | None = None,
    ghost: bool = True,
) -> Tensor:
    """(B, S): this rank's part of the losses. Float32 logits are overwritten, as there."""

    def summed(x: Tensor) -> Tensor:
        return dist_nn.functional.all_reduce(x, group=group) if ranks > 1 else x

    wide, logq = student.float(), logprobs.float()
    largest = wide.max(-1, keepdim=True).values
    if ranks > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    wide -= largest.detach()
    logp = wide - summed(wide.exp().sum(-1, keepdim=True)).log()
    width = wide.shape[-1]
    local = ids - rank * width
    mine = (local >= 0) & (local < width) & (logq != SENTINEL)
    entries = logp.gather(-1, local.clamp(0, width - 1))
    if ghost:
        on_support = summed((entries.exp() * mine).sum(-1, keepdim=True))
        left = [1 - on_support, 1 - logq.exp().sum(-1, keepdim=True)]
        ours, theirs = (x.clamp(min=1e-8).log() for x in left)
        entries, logq = torch.cat([entries, ours], -1), torch.cat([logq, theirs], -1)
        mine = torch.cat([mine, mine.new_full((*mine.shape[:-1], 1), rank == 0)], -1)
    return (mine * (logq.exp() * (logq - entries))).sum(-1).T.contiguous()
