"""Vocabulary-parallel on meshes of four processes: DTensors, FSDP2, sequences, ``torch.compile``.

Each process measures everything once, under the names of ``MEASUREMENTS``, beside what one process
computes of the whole; the tests judge the numbers. Arithmetic is float64, but for compiled code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import as_rank, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from opd_kernels import (
    LinearLogits,
    VocabShard,
    linear_topk_rkl,
    score_ids,
    select_topk,
    token_logprobs,
    topk_divergence,
    topk_rkl,
)

WORLD, DATA, TP = 4, 2, 2
V, H, K = 43, 12, 8  # no dimension of a mesh divides this vocabulary
SEQUENCES, T = 4, 8
EPSILON = torch.finfo(torch.float64).eps
# Roundings that anything may be off by, of its tensor's largest entry: sums over 32 rows, 43
# columns and the layers are made in another order, in two steps.
ROUNDINGS = 256


class Model(nn.Module):
    """Embedding, one layer, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, H), nn.Linear(H, V, bias=False)
        self.up, self.down = nn.Linear(H, 4 * H), nn.Linear(4 * H, H)
        self.shard: VocabShard | None = None

    def forward(self, tokens: Tensor, teacher: Tensor | None = None, **options: Any) -> Tensor:
        """Logits; with a teacher the loss, from hidden states and this rank's rows of the head."""
        x = self.embed(tokens)
        x = x + self.down(torch.tanh(self.up(x)))
        if teacher is None:
            return self.head(x)
        weight = self.head.weight
        if self.shard is not None:
            weight = weight.to_local()
        elif isinstance(weight, DTensor):
            x = DTensor.from_local(x, weight.device_mesh, [Replicate()])
        return linear_topk_rkl(x, weight, teacher, K, vocab_shard=self.shard, **options)


class Rank:
    """One process's place in the mesh, and the same data on all of them."""

    def __init__(self, rank: int) -> None:
        self.mesh = init_device_mesh("cpu", (DATA, TP), mesh_dim_names=("data", "tp"))
        self.line = init_device_mesh("cpu", (WORLD,))
        self.data, self.tp = self.mesh["data"], self.mesh["tp"]
        step = -(-V // TP)
        self.columns = slice(rank % TP * step, min((rank % TP + 1) * step, V))
        self.group = self.tp.get_group()
        self.shard = VocabShard(self.columns.start, V, self.group)
        torch.manual_seed(0)
        self.student, self.teacher = torch.randn(2, SEQUENCES, T, V) * 2
        self.tokens = torch.randint(V, (SEQUENCES, T))
        self.mask = torch.arange(T) < torch.tensor([[T - 1], [3], [5], [T]])
        self.count = self.mask.sum()
        self.rows = slice(rank // TP * 2, rank // TP * 2 + 2)

    def whole(self, **options: Any) -> tuple[Tensor, Tensor]:
        """Loss of all rows and its gradient, on this process alone."""
        logits = self.student.clone().requires_grad_()
        loss = topk_divergence(logits, self.teacher, K, outside="bucket", **options)
        loss.sum().backward()
        return loss.detach(), logits.grad


def summed(loss: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = loss.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, in units of the largest entry."""
    ours, theirs = (x.full_tensor() if isinstance(x, DTensor) else x for x in (ours, theirs))
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def of_placements(rank: Rank, kind: str) -> dict[str, Any]:
    """DTensors of both sides."""
    expected, gradient = rank.whole(reduction="sum")
    meshes = {
        "one dimension": (rank.line, [Shard(-1)]),
        "copies": (rank.mesh, [Replicate(), Shard(-1)]),
        "rows": (rank.mesh, [Shard(0), Shard(2)]),
        "vocabulary first": (rank.mesh, [Shard(-1), Shard(1)]),
    }
    mesh, placements = meshes[kind]
    student, teacher = (
        distribute_tensor(x, mesh, placements) for x in (rank.student, rank.teacher)
    )
    student.requires_grad_()
    loss = topk_divergence(student, teacher, K, outside="bucket", reduction="sum")
    loss.backward()
    shared = {"rows": rank.data, "vocabulary first": rank.tp}.get(kind)
    total = loss.detach() if shared is None else summed(loss, shared.get_group())
    return {
        "plain": not isinstance(loss, DTensor),
        "placements": student.grad.placements == student.placements,
        "loss": distance(total, expected),
        "gradient": distance(student.grad, gradient),
    }


def of_heads(rank: Rank, kind: str) -> dict[str, Any]:
    """Heads of DTensors, beside one process and the placements that torch's product leaves.

    The hidden states are gathered from a sequence that the ranks of a vocabulary share.
    """
    torch.manual_seed(4)
    leaves = torch.randn(SEQUENCES, T, H), torch.randn(V, H), torch.randn(V)
    mesh, weights, rows, whole = {
        "one dimension": (rank.line, [Shard(0)], [Shard(1)], [Replicate()]),
        "rows": (rank.mesh, [Replicate(), Shard(0)], [Shard(0), Shard(1)], [Shard(0), Replicate()]),
        "copies": (rank.mesh, [Shard(0), Replicate()], [Shard(1), Replicate()], [Replicate()] * 2),
    }[kind]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, teacher: Any, tokens: Tensor) -> Tensor:
        student, other = (LinearLogits(hidden, x, bias, 9.0) for x in (weight, teacher))
        few = linear_topk_rkl(
            hidden, weight, other, K, student_bias=bias, logit_softcap=9.0, reduction="sum"
        )
        full = topk_divergence(student, other, K, outside="bucket", reduction="sum")
        return few + full + token_logprobs(student, tokens).sum()

    single = [x.clone().requires_grad_() for x in leaves]
    teacher = torch.randn(V, H)
    expected = loss(*single, teacher, rank.tokens)
    expected.backward()
    placements = (rows, weights, weights)
    ours, theirs = (
        [
            distribute_tensor(x, mesh, p).requires_grad_()
            for x, p in zip(leaves, placements, strict=True)
        ]
        for _ in range(2)
    )
    tokens = distribute_tensor(rank.tokens, mesh, whole).to_local()
    hidden = ours[0].redistribute(mesh, whole)
    found = loss(hidden, *ours[1:], distribute_tensor(teacher, mesh, weights), tokens)
    found.backward()
    torch.nn.functional.linear(theirs[0].redistribute(mesh, whole), *theirs[1:]).sum().backward()
    total = summed(found, rank.data.get_group()) if kind == "rows" else found
    return {
        "placements": [x.grad.placements for x in ours] == [x.grad.placements for x in theirs],
        "loss": distance(total, expected),
        **{
            name: distance(a.grad, b.grad)
            for name, a, b in zip(("hidden", "weight", "bias"), ours, single, strict=True)
        },
    }


def empty(rank: Rank) -> dict[str, float]:
    """Five columns on four ranks: two, two, one, none."""
    student, teacher = rank.student[..., :5].contiguous(), rank.teacher[..., :5].contiguous()
    single = student.clone().requires_grad_()
    expected = topk_rkl(single, teacher, 3)
    expected.backward()
    ours, other = (distribute_tensor(x, rank.line, [Shard(-1)]) for x in (student, teacher))
    loss = topk_rkl(ours.requires_grad_(), other, 3)
    loss.backward()
    return {"loss": distance(loss, expected), "gradient": distance(ours.grad, single.grad)}


def read(rank: Rank) -> dict[str, Any]:
    """What else reads logits, DTensors whose rows lie on the other dimension of a mesh."""
    leaves = [
        rank.student.clone(),
        distribute_tensor(rank.student, rank.mesh, [Shard(0), Shard(2)]),
    ]
    logprobs, best, scored = [], [], []
    for leaf, rows in zip(leaves, (slice(None), rank.rows), strict=True):
        tokens, mask = rank.tokens[rows], rank.mask[rows]
        logprobs.append(token_logprobs(leaf.requires_grad_(), tokens, mask=mask))
        logprobs[-1].sum().backward()
        best.append(select_topk(leaf, K, mask=mask, token_ids=tokens, top_p=0.9))
        scored.append(score_ids(leaf, tokens[..., None], mask=mask))
    return {
        "plain": not any(isinstance(x, DTensor) for x in (logprobs[1], best[1].ids)),
        "ids": torch.equal(best[1].ids, best[0].ids[rank.rows]),
        "log-probs": distance(logprobs[1], logprobs[0][rank.rows]),
        "gradient": distance(leaves[1].grad, leaves[0].grad),
        "tail": distance(best[1].tail_logsumexp, best[0].tail_logsumexp[rank.rows]),
        "scored": distance(scored[1].logsumexp, scored[0].logsumexp[rank.rows]),
    }


def redistributed(rank: Rank) -> dict[str, float]:
    """Logits that a collective has just made, whose result may still be on its way."""
    expected, gradient = rank.whole(reduction="sum")
    leaf = distribute_tensor(rank.student, rank.tp, [Shard(0)]).requires_grad_()
    teacher = distribute_tensor(rank.teacher, rank.tp, [Shard(-1)])
    logits = leaf.redistribute(rank.tp, [Shard(-1)])
    loss = topk_divergence(logits, teacher, K, outside="bucket", reduction="sum")
    loss.backward()
    return {"loss": distance(loss, expected), "gradient": distance(leaf.grad, gradient)}


def mixed(rank: Rank, student: str, teacher: str) -> dict[str, float]:
    """A DTensor on one side."""
    expected, gradient = rank.whole(reduction="sum")
    forms = {
        "DTensor": lambda x: distribute_tensor(x, rank.tp, [Shard(-1)]),
        "shard": lambda x: x[..., rank.columns].contiguous(),
        "whole": torch.clone,
    }
    ours, options = forms[student](rank.student).requires_grad_(), {}
    if student == "shard":
        options["vocab_shard"] = rank.shard
    if teacher == "whole":
        options["teacher_vocab_shard"] = "whole"
    other = forms[teacher](rank.teacher)
    loss = topk_divergence(ours, other, K, outside="bucket", reduction="sum", **options)
    loss.backward()
    wanted = gradient[..., rank.columns] if student == "shard" else gradient
    return {"loss": distance(loss, expected), "gradient": distance(ours.grad, wanted)}


def refused(rank: Rank) -> dict[str, str]:
    """What is said of sides that do not fit."""
    teacher = distribute_tensor(rank.teacher, rank.line, [Shard(-1)])
    calls = {
        "groups": lambda: topk_rkl(
            rank.student[..., rank.columns], teacher, K, vocab_shard=rank.shard
        ),
        "partial": lambda: topk_rkl(
            DTensor.from_local(
                rank.student[..., rank.columns], rank.mesh, [Partial(), Shard(-1)], run_check=False
            ),
            rank.teacher,
        ),
        "twice": lambda: topk_rkl(
            distribute_tensor(rank.student, rank.mesh, [Shard(-1), Shard(-1)]), rank.teacher
        ),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def trained(rank: Rank, kind: str) -> dict[str, float]:
    """FSDP2 and tensor parallelism beside one process: the largest distances in two steps."""
    torch.manual_seed(1)
    single = Model()
    ours = parallelize_module(
        copy.deepcopy(single),
        rank.tp,
        {
            "up": ColwiseParallel(),
            "down": RowwiseParallel(),
            "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        },
    )
    if kind == "hidden states":
        ours.shard = rank.shard
    fully_shard(ours, mesh=rank.data)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.3) for each in (single, ours)]
    worst = {"loss": 0.0, "gradient": 0.0}
    mask, count, rows = rank.mask, rank.count, rank.rows
    for _ in range(2):
        expected = topk_rkl(single(rank.tokens), rank.teacher, K, mask=mask)
        expected.backward()
        options = {"mask": mask[rows], "normalizer": count}
        if kind == "logits":
            teacher = distribute_tensor(rank.teacher[rows], rank.tp, [Shard(-1)])
            loss = topk_rkl(ours(rank.tokens[rows]), teacher, K, **options)
        else:
            teacher = rank.teacher[rows][..., rank.columns].contiguous()
            loss = ours(rank.tokens[rows], teacher, **options)
        (loss * DATA).backward()  # fully_shard averages over the ranks that have other rows
        total = summed(loss, rank.data.get_group())
        worst["loss"] = max(worst["loss"], distance(total, expected))
        for a, b in zip(ours.parameters(), single.parameters(), strict=True):
            worst["gradient"] = max(worst["gradient"], distance(a.grad, b.grad))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return worst


def sequences(rank: Rank, reduce: bool) -> dict[str, float]:
    """Sequence parallelism: the ranks of a vocabulary hold hidden states of different positions.

    These are gathered before the head. Backward sums and scatters their gradients.
    """
    torch.manual_seed(2)
    hidden, weight = torch.randn(SEQUENCES, T, H), torch.randn(V, H)
    options = {"mask": rank.mask, "normalizer": rank.count}
    single = [x.clone().requires_grad_() for x in (hidden, weight)]
    expected = linear_topk_rkl(*single, rank.teacher, K, **options)
    expected.backward()
    mine = distribute_tensor(hidden, rank.tp, [Shard(1)]).requires_grad_()
    gathered = mine.redistribute(rank.tp, [Replicate()]).to_local(grad_placements=[Partial()])
    head = weight[rank.columns].clone().requires_grad_()
    shard = VocabShard(rank.columns.start, V, rank.group, reduce_hidden_grad=reduce)
    teacher = rank.teacher[..., rank.columns].contiguous()
    loss = linear_topk_rkl(gathered, head, teacher, K, vocab_shard=shard, **options)
    loss.backward()
    return {
        "loss": distance(loss, expected),
        "hidden": distance(mine.grad, single[0].grad),
        "weight": distance(head.grad, single[1].grad[rank.columns]),
    }


def contexts(rank: Rank) -> dict[str, Any]:
    """Context parallelism: packed rows in zig-zag order, each rank's with the global count."""
    student, teacher = (x.flatten(0, 1) for x in (rank.student, rank.teacher))
    mask = rank.mask.flatten()  # the sequences as one packed row
    single = student.clone().requires_grad_()
    expected = topk_divergence(single, teacher, K, outside="bucket", mask=mask)
    expected.backward()
    blocks, place = torch.arange(len(student)).chunk(2 * DATA), rank.data.get_local_rank()
    rows = torch.cat((blocks[place], blocks[2 * DATA - 1 - place]))

    def loss(of: Tensor, logits: Tensor, **options: Any) -> Tensor:
        other, options["vocab_shard"] = teacher[of][:, rank.columns].contiguous(), rank.shard
        return topk_divergence(logits, other, K, outside="bucket", mask=mask[of], **options)

    ours = student[rows][:, rank.columns].contiguous().requires_grad_()
    share = loss(rows, ours, normalizer=rank.count)
    share.backward()
    in_order = student[:, rank.columns].contiguous()
    everything = loss(torch.arange(len(student)), in_order, reduction="none")
    return {
        "loss": distance(summed(share, rank.data.get_group()), expected),
        "gradient": distance(ours.grad, single.grad[rows][:, rank.columns]),
        "same bits": torch.equal(loss(rows, ours.detach(), reduction="none"), everything[rows]),
    }


def compiled(rank: Rank) -> dict[str, Any]:
    """One graph, forward and backward, beside eager: a gather, a sum, a sum of gradients.

    Each pair of ranks that share the vocabulary has a compiler of its own.
    """
    backend = BACKENDS[rank.data.get_local_rank()]
    torch.manual_seed(3)
    student, hidden, weight = (
        x.float() for x in (rank.student[:, 0], torch.randn(SEQUENCES, H), torch.randn(V, H))
    )
    teacher = rank.teacher[:, 0, rank.columns].float().contiguous()
    leaves = [student[:, rank.columns], hidden, weight[rank.columns]]

    def loss(logits: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
        options = {"vocab_shard": rank.shard}
        full = topk_divergence(logits, teacher, K, outside="bucket", **options)
        return full + linear_topk_rkl(hidden, weight, teacher, K, **options)

    results = []
    for call in (torch.compile(loss, fullgraph=True, backend=backend), loss):
        inputs = [x.clone().requires_grad_() for x in leaves]
        value = call(*inputs)
        value.backward()
        results.append([value.detach(), *(x.grad for x in inputs)])
    return {"backend": backend, "off": max(map(distance, *results))}


BACKENDS = ("aot_eager", "inductor")
PLACEMENTS = ("one dimension", "copies", "rows", "vocabulary first")
HEADS = ("one dimension", "rows", "copies")
PAIRS = [
    ("DTensor", "shard"),
    ("DTensor", "whole"),
    ("shard", "DTensor"),
    ("whole", "DTensor"),
]
SAME: dict[str, Callable[[Rank], dict[str, Any]]] = {
    **{kind: lambda rank, kind=kind: of_placements(rank, kind) for kind in PLACEMENTS},
    **{" and ".join(pair): lambda rank, pair=pair: mixed(rank, *pair) for pair in PAIRS},
    **{f"head, {kind}": lambda rank, kind=kind: of_heads(rank, kind) for kind in HEADS},
    "an empty shard": empty,
    "redistributed": redistributed,
    "read": read,
    "FSDP2, logits": lambda rank: trained(rank, "logits"),
    "FSDP2, hidden states": lambda rank: trained(rank, "hidden states"),
    "FSDP2, a head of DTensors": lambda rank: trained(rank, "DTensors"),
    "sequence parallelism": lambda rank: sequences(rank, False),
    "context parallelism": contexts,
}
MEASUREMENTS: dict[str, Callable[[Rank], dict[str, Any]]] = {
    **SAME,
    "compiled": compiled,
    "reduced twice": lambda rank: sequences(rank, True),
    "refused": refused,
}


def measured(rank: int) -> dict[str, Any]:
    torch.set_default_dtype(torch.float64)
    view = Rank(rank)
    return {name: measure(view) for name, measure in MEASUREMENTS.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """Measurements by name, of each rank."""
    return run_ranks(__file__, tmp_path_factory.mktemp("mesh"), WORLD)


@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradients_are_those_of_one_process(
    found: list[dict[str, Any]], name: str
) -> None:
    for rank in found:
        for what, off in rank[name].items():
            assert off is True or off <= ROUNDINGS * EPSILON, (what, off / EPSILON)


def test_a_gradient_that_is_summed_twice_is_twice_as_large(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["reduced twice"]["weight"] <= ROUNDINGS * EPSILON
        assert abs(rank["reduced twice"]["hidden"] - 1) <= ROUNDINGS * EPSILON


def test_a_compiled_loss_is_the_eager_one(found: list[dict[str, Any]]) -> None:
    assert {rank["compiled"]["backend"] for rank in found} == set(BACKENDS)
    for rank in found:
        assert rank["compiled"]["off"] <= ROUNDINGS * torch.finfo(torch.float32).eps


def test_sides_that_do_not_fit_are_refused(found: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(found):
        messages = rank["refused"]
        pair = number // TP * TP
        assert f"over different ranks, [{pair}, {pair + 1}] and [0, 1, 2, 3]" in messages["groups"]
        for name in ("partial", "twice"):
            assert messages[name].startswith("student is a DTensor, expected a plain tensor, or")


if __name__ == "__main__":
    as_rank(measured, WORLD)
