"""DTensors are refused by name, with what to pass instead, before any operator sees them.

Logits that are sharded over the vocabulary are taken, by this process alone here and by several in
``test_vocab_mesh``.
That what to pass gives the loss and the gradient is measured on two processes, in ``test_fsdp``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from opd_kernels import (
    EntryGradient,
    LinearLogits,
    TopK,
    VocabShard,
    linear_topk_rkl,
    score_ids,
    select_topk,
    token_logprobs,
    topk_divergence,
    topk_rkl,
)

S, T = torch.randn(4, 50), torch.randn(4, 50)
H, W, B = torch.randn(4, 6), torch.randn(50, 6), torch.randn(50)
SUPPORT = select_topk(T, 8, with_logsumexp=True)
IDS, LOGITS, SUMS = SUPPORT.ids, SUPPORT.logits, SUPPORT.logsumexp
HEAD = LinearLogits(H, W, B)
ONES = torch.ones(4)
BANNED = torch.tensor([1, 2])

Distribute = Callable[[Tensor], Tensor]
ROWS, WHOLE = [".to_local()", ".full_tensor()"], [".full_tensor()"]
PARAMETER = ["fully_shard", ".to_local() and vocab_shard"]
# Taken where the vocabulary is sharded.
TAKEN = ("student", "student and a support", "student and teacher", "teacher")
TAKEN += ("teacher of hidden states", "select", "score", "log-probs")

# name: (the call with a DTensor, the argument as the message names it, its tensor, the remedies)
CALLS: dict[str, tuple[Callable[[Distribute], Any], str, Tensor, list[str]]] = {
    "student": (lambda d: topk_rkl(d(S), T), "student", S, ROWS),
    "student and a support": (lambda d: topk_rkl(d(S), SUPPORT), "student", S, ROWS),
    "student and teacher": (lambda d: topk_rkl(d(S), d(T)), "student", S, ROWS),
    "teacher": (lambda d: topk_rkl(S, d(T)), "teacher", T, ROWS),
    "teacher of hidden states": (lambda d: linear_topk_rkl(H, W, d(T)), "teacher", T, ROWS),
    "select": (lambda d: select_topk(d(T), 8), "logits", T, ROWS),
    "score": (lambda d: score_ids(d(T), IDS), "logits", T, ROWS),
    "log-probs": (lambda d: token_logprobs(d(T), IDS[:, 0]), "logits", T, ROWS),
    "select's mask": (lambda d: select_topk(T, 8, mask=d(ONES > 0)), "mask", ONES, ROWS),
    "support ids": (lambda d: TopK(d(IDS), LOGITS), "TopK ids", IDS, ROWS),
    "support logits": (lambda d: TopK(IDS, d(LOGITS)), "TopK logits", LOGITS, ROWS),
    "support sums": (lambda d: TopK(IDS, LOGITS, d(SUMS)), "TopK logsumexp", SUMS, ROWS),
    "mapped support": (
        lambda d: topk_rkl(S, pytree.tree_map(d, SUPPORT)),
        "TopK ids",
        SUMS,
        ROWS,
    ),
    "mask": (lambda d: topk_rkl(S, T, mask=d(ONES > 0)), "mask", ONES, ROWS),
    "integer mask": (lambda d: topk_rkl(S, T, mask=d(ONES.long())), "mask", ONES, ROWS),
    "linear mask": (lambda d: linear_topk_rkl(H, W, T, mask=d(ONES > 0)), "mask", ONES, ROWS),
    "weight": (lambda d: topk_rkl(S, T, weight=d(ONES)), "weight", ONES, ROWS),
    "linear weight": (lambda d: linear_topk_rkl(H, W, T, weight=d(ONES)), "weight", ONES, ROWS),
    "temperature": (lambda d: topk_rkl(S, T, temperature=d(ONES)), "temperature", ONES, ROWS),
    "teacher temperature": (
        lambda d: topk_rkl(S, T, teacher_temperature=d(ONES)),
        "teacher_temperature",
        ONES,
        ROWS,
    ),
    "banned ids": (lambda d: topk_rkl(S, T, banned_ids=d(BANNED)), "banned_ids", BANNED, WHOLE),
    "hidden states": (lambda d: linear_topk_rkl(d(H), W, T), "student_hidden", H, ROWS),
    "head": (lambda d: linear_topk_rkl(H, d(W), T), "student_weight", W, WHOLE + PARAMETER),
    "bias": (
        lambda d: linear_topk_rkl(H, W, T, student_bias=d(B)),
        "student_bias",
        B,
        WHOLE + PARAMETER,
    ),
    "teacher's hidden states": (lambda d: LinearLogits(d(H), W), "LinearLogits hidden", H, ROWS),
    "teacher's head": (lambda d: LinearLogits(H, d(W)), "LinearLogits weight", W, PARAMETER),
    "gradient": (lambda d: EntryGradient(IDS, LOGITS).add_to_(d(S)), "grad", S, ROWS),
    "gradient's ids": (lambda d: EntryGradient(d(IDS), LOGITS).add_to_(S), "ids", IDS, ROWS),
    "entry gradients": (
        lambda d: EntryGradient(IDS, d(LOGITS)).add_to_(S),
        "entry_grad",
        LOGITS,
        ROWS,
    ),
    "upstream": (lambda d: EntryGradient(IDS, LOGITS).add_to_(S, d(ONES)), "upstream", ONES, ROWS),
}
CASES = [
    pytest.param(name, placement, id=f"{name}, {placement}")
    for name, (_, _, tensor, _) in CALLS.items()
    for placement in (Replicate(), Shard(0), Shard(1))
    if not placement.is_shard() or placement.dim < tensor.ndim
    if not (name in TAKEN and placement == Shard(1))
]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """A group of this process alone."""
    store = tmp_path_factory.mktemp("dtensor") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(("name", "placement"), CASES)
def test_a_dtensor_is_refused_by_name_with_what_to_pass(
    mesh: DeviceMesh, name: str, placement: Placement
) -> None:
    call, argument, _, remedies = CALLS[name]
    with pytest.raises(ValueError, match=f"^{argument} is a DTensor, ") as raised:
        call(lambda tensor: distribute_tensor(tensor, mesh, [placement]))
    assert all(remedy in str(raised.value) for remedy in remedies)


@pytest.mark.parametrize("name", TAKEN)
def test_logits_sharded_over_the_vocabulary_are_taken(mesh: DeviceMesh, name: str) -> None:
    call = CALLS[name][0]
    expected = call(lambda tensor: tensor)
    found = call(lambda tensor: distribute_tensor(tensor, mesh, [Shard(-1)]))
    if isinstance(found, TopK):
        assert torch.equal(found.ids, expected.ids)
        found, expected = found.logits, expected.logits
    assert not isinstance(found, DTensor)
    # The row is not read in one pass: a few roundings of terms of a loss about 1.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_no_rows_are_taken(mesh: DeviceMesh) -> None:
    """A plain student's kernel wants the teacher's entries side by side, of no rows too."""
    student = S[:0].clone().requires_grad_()
    teacher = distribute_tensor(T[:0], mesh, [Shard(1)])
    for support in (teacher, select_topk(teacher, 8, with_logsumexp=True)):
        loss = topk_divergence(student, support, outside="bucket", reduction="none")
        assert loss.shape == (0,)
        loss.sum().backward()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_pending_sums_and_two_shards_of_the_vocabulary_are_refused(
    mesh: DeviceMesh, side: str
) -> None:
    square = init_device_mesh("cpu", (1, 1))
    wrong = [
        DTensor.from_local(S, mesh, [Partial()]),
        DTensor.from_local(S, square, [Shard(1), Partial()]),
        DTensor.from_local(S, square, [Shard(1), Shard(1)]),
    ]
    for logits in wrong:
        with pytest.raises(ValueError, match=rf"^{side} is a DTensor, .* Shard\(-1\) on one dim"):
            topk_rkl(*((logits, T) if side == "student" else (S, logits)))


HIDDEN = "LinearLogits hidden, LinearLogits weight and LinearLogits bias are DTensors"


@pytest.mark.parametrize(
    ("hidden", "weight", "bias"),
    [
        (Replicate(), Replicate(), Replicate()),
        (Shard(0), Shard(0), Shard(0)),  # rows and vocabulary over the same ranks, as FSDP has them
        (Replicate(), Shard(1), Replicate()),
        (Partial(), Shard(0), Shard(0)),
        (Replicate(), Shard(0), Replicate()),
        (Replicate(), Shard(0), None),
    ],
)
def test_a_head_of_other_placements_is_refused(
    mesh: DeviceMesh, hidden: Placement, weight: Placement, bias: Placement | None
) -> None:
    parts = [DTensor.from_local(x, mesh, [p]) for x, p in ((H, hidden), (W, weight))]
    plain = bias is None
    parts.append(B if plain else DTensor.from_local(B, mesh, [bias]))
    with pytest.raises(ValueError, match=f"^{HIDDEN} .*; expected DTensors of one mesh"):
        LinearLogits(*parts)


def test_a_head_on_another_mesh_is_refused(mesh: DeviceMesh) -> None:
    square = init_device_mesh("cpu", (1, 1))
    hidden = DTensor.from_local(H, square, [Replicate(), Replicate()])
    with pytest.raises(ValueError, match=r"^student_hidden, .* expected DTensors of one mesh"):
        linear_topk_rkl(hidden, distribute_tensor(W, mesh, [Shard(0)]), T)


def head_of_dtensors(mesh: DeviceMesh) -> LinearLogits:
    hidden = distribute_tensor(H, mesh, [Replicate()]).requires_grad_()
    weight, bias = (distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (W, B))
    return LinearLogits(hidden, weight, bias)


def test_a_head_of_dtensors_is_taken_and_compiles_to_one_graph(mesh: DeviceMesh) -> None:
    def loss(head: LinearLogits, teacher: LinearLogits) -> Tensor:
        best, scored = select_topk(teacher, 8), score_ids(teacher, IDS)
        return topk_divergence(head, teacher, 8, outside="bucket") + sum(
            topk_divergence(head, support) for support in (best, scored)
        )

    teacher = head_of_dtensors(mesh)
    eager, traced = head_of_dtensors(mesh), head_of_dtensors(mesh)
    expected = loss(eager, teacher)
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(traced, teacher)
    found.backward()
    expected.backward()
    assert torch.equal(found, expected)
    for part in ("hidden", "weight", "bias"):
        assert torch.equal(
            getattr(traced, part).grad.full_tensor(), getattr(eager, part).grad.full_tensor()
        )
    with pytest.raises(ValueError, match="inplace_grad=True reuses the memory of logits"):
        topk_rkl(eager, teacher, inplace_grad=True)
    with pytest.raises(ValueError, match="inplace_grad=True reuses the memory of logits"):
        token_logprobs(eager, IDS[:, 0], inplace_grad=True)
    with pytest.raises(ValueError, match=r"^vocab_shard goes with plain tensors"):
        topk_rkl(eager, teacher, vocab_shard=VocabShard(0, 50))


def test_a_dtensor_and_a_shard_option_exclude_each_other(mesh: DeviceMesh) -> None:
    logits, shard = distribute_tensor(S, mesh, [Shard(1)]), VocabShard(0, 50)
    with pytest.raises(ValueError, match=r"^vocab_shard goes with plain tensors"):
        topk_rkl(logits, T, vocab_shard=shard)
    for option in (shard, "whole"):
        with pytest.raises(ValueError, match=r"^teacher_vocab_shard goes with plain tensors"):
            topk_rkl(S, logits, vocab_shard=shard, teacher_vocab_shard=option)


def test_the_memory_of_a_dtensor_is_not_overwritten(mesh: DeviceMesh) -> None:
    logits = distribute_tensor(S, mesh, [Shard(1)]).requires_grad_()
    with pytest.raises(ValueError, match="inplace_grad=True would overwrite a DTensor's memory"):
        topk_rkl(logits * 1, T, inplace_grad=True)
    with pytest.raises(ValueError, match="inplace_grad=True would overwrite a DTensor's memory"):
        token_logprobs(logits * 1, IDS[:, 0], inplace_grad=True)


def test_a_local_gradient_is_added_to_in_place(mesh: DeviceMesh) -> None:
    grad = distribute_tensor(S.clone(), mesh, [Shard(0)])
    EntryGradient(IDS, LOGITS).add_to_(grad.to_local())
    assert torch.equal(grad.full_tensor(), EntryGradient(IDS, LOGITS).add_to_(S.clone()))


def test_plain_tensors_compile_to_one_graph_beside_dtensors(mesh: DeviceMesh) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        return topk_rkl(student, select_topk(teacher, 8), weight=weight, mask=weight > 0)

    expected = topk_rkl(S, SUPPORT, weight=ONES, mask=ONES > 0)
    assert torch.equal(compiled(S, T, ONES), expected)


def test_a_compiled_loss_refuses_a_dtensor_by_name(mesh: DeviceMesh) -> None:
    student = distribute_tensor(S, mesh, [Shard(0)])
    with pytest.raises(ValueError, match="student is a DTensor"):
        torch.compile(topk_rkl, backend="aot_eager")(student, T)


def test_dtensors_compile_to_one_graph(mesh: DeviceMesh) -> None:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return topk_divergence(student, teacher, 8, outside="bucket")

    teacher = distribute_tensor(T, mesh, [Shard(1)])
    eager, traced = (distribute_tensor(S, mesh, [Shard(1)]).requires_grad_() for _ in range(2))
    expected = loss(eager, teacher)
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(traced, teacher)
    found.backward()
    expected.backward()
    assert torch.equal(found, expected)
    assert traced.grad.placements == (Shard(1),)
    assert torch.equal(traced.grad.to_local(), eager.grad.to_local())
