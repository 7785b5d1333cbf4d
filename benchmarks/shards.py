"""CPU benchmark of vocabulary-parallel losses: ranks of gloo on one machine, with yardsticks.

    python benchmarks/shards.py [--quick] [--ranks 2] [--threads 1] [--rounds 9]

Each rank holds its columns of both sides. Ours, forward and backward, is beside the same columns
as a vocabulary of their own, on all ranks at once, plus the collectives of the call alone (the
same number and sizes, recorded from a call); and beside the formulas of NeMo-RL and ModelOpt, in
plain PyTorch.

What is compared is timed in turn, round by round, with the caches full of something else; the
formulas after ours and not in turn, because who gets the gigabytes that eager frees pays for them.
A call takes as long as its slowest rank. A ratio is the median of the rounds' ratios, and for the
formulas that of medians; the second one is of processor time, all ranks and their threads together,
which other programs disturb less and which does not count waiting. Losses and gradients are
compared with those of one process before. ``--quick`` runs the path on tiny shapes; its figures
mean nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from heads import HeadPoint
from timing import cold
from torch import Tensor
from torch.distributed.nn.functional import all_gather, all_reduce
from torch.nn.functional import linear

from opd_kernels import (
    LinearLogits,
    VocabShard,
    _collectives,
    linear_topk_rkl,
    topk_divergence,
    topk_rkl,
)

Call = Callable[[], object]
Loss = Callable[[Tensor, Tensor, int], Tensor]
Seconds = tuple[float, float]  # of the clock and of the processor
OURS, ALONE, COLLECTIVES = "ours, sharded", "own columns alone", "collectives alone"


def start_of(width: int) -> int:
    """The first of this rank's columns."""
    return dist.get_rank() * width


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The mean over rows."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def candidates(values: Tensor) -> Tensor:
    """Those of all ranks, side by side."""
    everywhere = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, values)
    return torch.cat(everywhere, -1)


def nemo_rl(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """NeMo-RL, renormalised: gathers the ranks' best, sums the student's logits at the chosen."""
    width = student.shape[-1]
    with torch.no_grad():
        values, columns = teacher.float().topk(k, dim=-1)
        values, ids = candidates(values), candidates(columns + start_of(width))
        values, places = values.topk(k, dim=-1)
        local = ids.gather(-1, places) - start_of(width)
    inside = (local >= 0) & (local < width)
    z = student.float().gather(-1, local.clamp(0, width - 1)) * inside
    dist.all_reduce(z)  # in place: a rank's gradient is that of its own terms
    return reverse_kl(z.log_softmax(-1), values.log_softmax(-1))


def merged(student: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both sides' logits at the teacher's best, by gathers through which gradients flow."""
    values, columns = teacher.topk(k, dim=-1)
    values, z = (
        torch.cat(all_gather(some.contiguous()), -1)
        for some in (values, student.gather(-1, columns))
    )
    values, places = values.topk(k, dim=-1)
    return z.gather(-1, places), values


def modelopt(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """ModelOpt 0.47: renormalised. Its gradient is too large by the number of ranks."""
    z, values = merged(student.float(), teacher.float(), k)
    return reverse_kl(z.log_softmax(-1), values.log_softmax(-1))


def logsumexp(logits: Tensor) -> Tensor:
    """The log-sum-exp of all ranks' columns: one maximum and one sum over the group."""
    most = logits.amax(-1, keepdim=True).detach()
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most + all_reduce((logits - most).exp().sum(-1, keepdim=True)).log()


def modelopt_bucket(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """ModelOpt after 0.47: full softmaxes and one more entry for the rest of the vocabulary."""
    student, teacher = student.float(), teacher.float()
    sums = logsumexp(student), logsumexp(teacher)
    sides = []
    for values, whole in zip(merged(student, teacher, k), sums, strict=True):
        entries = values - whole
        inside = entries.logsumexp(-1, keepdim=True).clamp(max=-torch.finfo(torch.float32).eps)
        sides.append(torch.cat((entries, (-torch.expm1(inside)).log()), -1))
    return reverse_kl(*sides)


def of_head(peer: Loss, hidden: Tensor, weight: Tensor, teacher: Tensor, k: int) -> Tensor:
    """A peer's loss from the logits of the rank's part of the head."""
    return peer(linear(hidden, weight), teacher, k)


def recorded(call: Call) -> list[Call]:
    """Calls of the collectives that a call makes, with as many bytes each."""
    found: list[Call] = []
    gather, total = _collectives._gather, _collectives._sum

    def note_gather(shard: VocabShard, words: Tensor) -> Tensor:
        sent, received = torch.zeros_like(words), words.new_empty(shard.ranks * len(words))
        found.append(lambda: _collectives._all_gather(received, sent))
        return gather(shard, words)

    def note_sum(shard: VocabShard, values: Tensor) -> Tensor:
        summed = torch.zeros(values.shape, dtype=values.dtype)
        found.append(lambda: dist.all_reduce(summed))
        return total(shard, values)

    _collectives._gather, _collectives._sum = note_gather, note_sum
    try:
        call()
    finally:
        _collectives._gather, _collectives._sum = gather, total
    return found


def timed(call: Call) -> Seconds:
    """Of one call that all ranks begin together, with cold caches."""
    cold(torch.device("cpu"))
    dist.barrier()
    begin, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - begin, time.process_time() - processor


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[Seconds]]:
    """Times the calls in turn: the slowest rank's clock, and the processor time of all ranks."""
    times: dict[str, list[Seconds]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            seconds = timed(call)
            if turn:  # the first is a warm-up
                times[name].append(seconds)
    everyone: list[dict[str, list[Seconds]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, times)
    return {
        name: [
            (max(wall for wall, _ in some), sum(processor for _, processor in some))
            for some in zip(*(one[name] for one in everyone), strict=True)
        ]
        for name in calls
    }


def report(title: str, ours: dict[str, list[Seconds]], others: dict[str, list[Seconds]]) -> None:
    """Medians and the ratios of a group, where rank 0 is."""
    if dist.get_rank():
        return
    print(f"{title}, load {os.getloadavg()[0]:.1f}")
    for name, some in (*ours.items(), *others.items()):
        wall, processor = (median * 1e3 for median in medians(some))
        least = min(one for one, _ in some) * 1e3
        print(f"  {name:20} {wall:9.2f} ms  (least {least:.2f}; processor {processor:.2f})")
    rounds = zip(ours[OURS], ours[ALONE], ours[COLLECTIVES], strict=True)
    ratios = medians([(a / (b + c) for a, b, c in zip(*turn, strict=True)) for turn in rounds])
    print(f"    {OURS} / ({ALONE} + {COLLECTIVES}): {ratios[0]:.2f}, processor {ratios[1]:.2f}")
    for name, some in others.items():
        ratios = [b / a for a, b in zip(medians(ours[OURS]), medians(some), strict=True)]
        print(f"    {name} / {OURS}: {ratios[0]:.1f}, processor {ratios[1]:.1f}", flush=True)


def medians(pairs: Iterable[Iterable[float]]) -> list[float]:
    """Medians of the clock and of the processor time."""
    return [statistics.median(some) for some in zip(*pairs, strict=True)]


def check(
    loss: Tensor, whole: Tensor, leaves: tuple[Tensor, ...], wholes: tuple[Tensor, ...]
) -> None:
    """Raises unless a rank's loss and gradients are those of one process with all columns."""
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    found, expected = torch.autograd.grad(loss, leaves), torch.autograd.grad(whole, wholes)
    for mine, theirs in zip(found, expected, strict=True):
        if mine.shape != theirs.shape:  # the columns, or rows of a weight, that are here
            dim = 0 if mine.shape[0] != theirs.shape[0] else -1
            theirs = theirs.narrow(dim, start_of(mine.shape[dim]), mine.shape[dim])
        error = float((mine - theirs).float().norm() / theirs.float().norm())
        if not error <= torch.finfo(mine.dtype).eps:  # a rounding of each element
            raise AssertionError(f"a gradient differs from one process's by {error:.3g}")


def check_peers(peers: list[tuple[Loss, Callable[..., Tensor]]], k: int) -> None:
    """Raises unless the peers' losses are ours, on rows without ties."""
    width = 8 * k
    whole = torch.randn(2, 16, dist.get_world_size() * width)
    dist.broadcast(whole, 0)
    student, teacher = whole.narrow(-1, start_of(width), width)
    for peer, ours in peers:
        torch.testing.assert_close(peer(student, teacher, k), ours(*whole, k), rtol=1e-4, atol=1e-6)


def run(rank: int, asked: argparse.Namespace, folder: str) -> None:
    """A rank: checks, then measures."""
    torch.set_num_threads(asked.threads)
    warnings.simplefilter("ignore")  # of the peers' collectives, which torch calls deprecated
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=asked.ranks)
    torch.manual_seed(0)  # the same tensors on every rank
    point = HeadPoint(asked.rows, asked.vocab, asked.hidden, asked.k, "bfloat16")
    k, width, peer_rounds = point.k, point.vocab // asked.ranks, min(asked.rounds, 5)
    teachers = (2 * torch.randn(point.rows, point.vocab)).bfloat16()
    students = (teachers + torch.randn(point.rows, point.vocab)).bfloat16()
    hidden = torch.randn(point.rows, point.hidden).bfloat16()
    weights = (torch.randn(point.vocab, point.hidden) / point.hidden**0.5).bfloat16()
    shard = VocabShard(start_of(width), width * asked.ranks)
    whole = students[:, : shard.vocab_size].clone(), weights[: shard.vocab_size].clone()
    student, teacher = (
        some[:, shard.start : shard.start + width].clone() for some in (students, teachers)
    )
    weight = weights[shard.start : shard.start + width].clone()
    teachers = teachers[:, : shard.vocab_size]
    for leaf in (student, hidden, weight, *whole):
        leaf.requires_grad_()
    bucket = partial(topk_divergence, outside="bucket")
    peers: list[tuple[Loss, Callable[..., Tensor]]] = [
        (nemo_rl, topk_rkl),
        (modelopt, topk_rkl),
        (modelopt_bucket, bucket),
    ]
    check_peers(peers, k)

    def both(loss: Callable[[], Tensor]) -> Call:
        def call() -> None:
            student.grad = hidden.grad = weight.grad = None
            loss().backward()

        return call

    def group(
        title: str,
        loss: Callable[..., Tensor],
        leaves: tuple[Tensor, ...],
        wholes: tuple[Tensor, ...],
        others: dict[str, Callable[[], Tensor]],
    ) -> None:
        ours = partial(loss, *leaves, teacher, k, vocab_shard=shard)
        check(ours(), loss(*wholes, teachers, k), leaves, wholes)
        collectives = recorded(both(ours))
        calls = {
            OURS: both(ours),
            ALONE: both(partial(loss, *leaves, teacher, k)),
            COLLECTIVES: lambda: [collective() for collective in collectives],
        }
        times = measure(calls, asked.rounds)
        peers = {name: both(peer) for name, peer in others.items()}
        report(f"{title}, {len(collectives)} collectives", times, measure(peers, peer_rounds))

    if not rank:
        print(f"{point}, {asked.ranks} ranks of {asked.threads} threads, torch {torch.__version__}")
    of_logits = student, teacher, k
    group(
        "topk_rkl",
        topk_rkl,
        (student,),
        whole[:1],
        {
            "NeMo-RL": partial(nemo_rl, *of_logits),
            "ModelOpt 0.47": partial(modelopt, *of_logits),
        },
    )
    group(
        "bucket",
        bucket,
        (student,),
        whole[:1],
        {"ModelOpt": partial(modelopt_bucket, *of_logits)},
    )
    of_states = hidden, weight, teacher, k

    def bucket_of_head(hidden: Tensor, weight: Tensor, *rest: object, **options: object) -> Tensor:
        return bucket(LinearLogits(hidden, weight), *rest, **options)

    group(
        "linear_topk_rkl",
        linear_topk_rkl,
        (hidden, weight),
        (hidden, whole[1]),
        {
            "NeMo-RL": partial(of_head, nemo_rl, *of_states),
            "ModelOpt 0.47": partial(of_head, modelopt, *of_states),
        },
    )
    group(
        "bucket of hidden states",
        bucket_of_head,
        (hidden, weight),
        (hidden, whole[1]),
        {"ModelOpt": partial(of_head, modelopt_bucket, *of_states)},
    )
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's destructor may wait for a thread that waits for it


def main() -> None:
    """Starts the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes; figures mean nothing")
    parser.add_argument("--ranks", type=int, default=2, help="processes that share the vocabulary")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch in each")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each comparison")
    asked = parser.parse_args()
    asked.rows, asked.vocab, asked.hidden, asked.k = 256, 151936, 576, 64
    if asked.quick:
        asked.rows, asked.vocab, asked.hidden, asked.k, asked.rounds = 6, 500, 24, 8, 2
    with tempfile.TemporaryDirectory() as folder:
        # Forked: this process has imported everything, and has no threads yet.
        mp.start_processes(run, (asked, folder), nprocs=asked.ranks, start_method="fork")


if __name__ == "__main__":
    main()
