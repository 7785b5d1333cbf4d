"""Citizenship of the whole divergence family: what PyTorch offers around a loss works with each."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from effort import rows, some
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

from opd_kernels import Divergence, TopK, select_topk, topk_divergence
from opd_kernels.divergences import OUTSIDE

N, V, K = rows(6), 300, 8
FULL = [outside for outside in OUTSIDE if outside != "renormalize"]
# One call of every kind: what is outside, whose support, and what else it needs.
KINDS: dict[str, dict[str, Any]] = {
    **{outside: {"outside": outside} for outside in OUTSIDE},
    "student's support": {"outside": "bucket", "support": "student"},
    "included token": {"outside": "truncate", "include_token": True},
    "weights by row": {"outside": "bucket", "weights": True},
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 3).to(dtype)


def loss_of(
    z: torch.Tensor,
    teacher: torch.Tensor | TopK,
    kind: str,
    tokens: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """The loss of a call of that kind, with every part of a divergence that it allows."""
    options = {**KINDS[kind], **options}
    outside = options["outside"]
    parts = {"generalize": (0.5, 0.75, 0.0, 0.0), "sample": (1.0, 0.0, 0.0, 0.0)}
    weights = parts.get(outside, (0.5, 0.25, 1.5, 0.75))
    if options.pop("weights", False):
        by_row = torch.linspace(0, 2, z.shape[:-1].numel()).view(z.shape[:-1])
        weights = (by_row, 0.25, 1.5, by_row)
    if outside == "sample" or options.get("include_token"):
        options["token_ids"] = torch.arange(V)[: z.shape[-2]] if tokens is None else tokens
    divergence = Divergence(*weights, beta=0.3, log_ratio_clip=4.0, logp_floor=-20.0)
    k = None if isinstance(teacher, TopK) else K
    return topk_divergence(z, teacher, k, divergence=divergence, temperature=1.3, **options)


def gradient(loss: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("kind", some(KINDS, 2, of=2))
def test_compiles_whole_forward_and_backward(backend: str, kind: str) -> None:
    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def compiled(z: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return loss_of(z * 2, teacher, kind, backend=backend)

    teacher = logits(N, V, seed=1)
    leaf = logits(N, V).requires_grad_()
    expected = loss_of(leaf * 2, teacher, kind, backend=backend)
    loss = compiled(leaf, teacher)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, leaf), gradient(expected, leaf))


@pytest.mark.parametrize("kind", ["bucket", "sample"])
def test_compiles_with_inductor_and_dynamic_shapes(kind: str) -> None:
    @functools.partial(torch.compile, fullgraph=True, dynamic=True)
    def compiled(z: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return loss_of(z * 2, teacher, kind, tokens)

    for count in (3, 5):
        leaf, teacher = logits(count, V).requires_grad_(), logits(count, V, seed=1)
        tokens = torch.arange(count)
        expected = loss_of(leaf * 2, teacher, kind, tokens)
        loss = compiled(leaf, teacher, tokens)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient(loss, leaf), gradient(expected, leaf))


def test_compiles_with_a_served_support(backend: str) -> None:
    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def compiled(z: torch.Tensor, teacher: TopK) -> torch.Tensor:
        return loss_of(z * 2, teacher, "bucket", backend=backend, teacher_temperature=1.0)

    support = select_topk(logits(N, V, seed=1), K, with_logsumexp=True)
    leaf = logits(N, V).requires_grad_()
    expected = loss_of(leaf * 2, support, "bucket", backend=backend, teacher_temperature=1.0)
    loss = compiled(leaf, support)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, leaf), gradient(expected, leaf))


@pytest.mark.parametrize("tail", [True, False])
def test_compiles_with_a_support_that_it_makes_itself(tail: bool) -> None:
    def loss(z: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        support = select_topk(teacher, K, with_logsumexp=True)
        if not tail:
            support = TopK(support.ids, support.logits, support.logsumexp)
        return loss_of(z * 2, support, "bucket", teacher_temperature=1.0)

    teacher, leaf = logits(N, V, seed=1), logits(N, V).requires_grad_()
    expected = loss(leaf, teacher)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf, teacher)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(gradient(compiled, leaf), gradient(expected, leaf))


@pytest.mark.parametrize("kind", some(KINDS, 7, of=4))
def test_functional_gradients_and_vmap_agree_with_autograd(backend: str, kind: str) -> None:
    batch = rows(3)
    student, teacher = logits(batch, N, V), logits(batch, N, V, seed=1)

    def loss(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return loss_of(z, t, kind, backend=backend)

    mapped, losses = vmap(grad(loss))(student, teacher), vmap(loss)(student, teacher)
    for i in range(batch):
        leaf = student[i].clone().requires_grad_()
        value = loss(leaf, teacher[i])
        expected = gradient(value, leaf)
        torch.testing.assert_close(losses[i], value.detach())  # the mean may be summed otherwise
        assert torch.equal(grad(loss)(student[i], teacher[i]), expected)
        assert torch.equal(mapped[i], expected)


@pytest.mark.parametrize("kind", some(KINDS, 2, of=2))
def test_autocast_keeps_dtypes(backend: str, kind: str) -> None:
    head, hidden, teacher = torch.nn.Linear(8, V), torch.randn(N, 8), logits(N, V)
    with torch.autocast("cpu", torch.bfloat16):
        z = head(hidden)
        z.retain_grad()
        loss = loss_of(z, teacher, kind, weight=torch.rand(N), backend=backend)
    loss.backward()
    assert (z.dtype, z.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (loss.dtype, head.weight.grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inplace_grad", [False, True])
def test_checkpointing_gives_the_same_gradient(
    kind: str, use_reentrant: bool, inplace_grad: bool
) -> None:
    head, teacher = torch.nn.Linear(8, V), logits(N, V)
    hidden = torch.randn(N, 8, requires_grad=True)

    def step(hidden: torch.Tensor) -> torch.Tensor:
        return loss_of(head(hidden), teacher, kind, inplace_grad=inplace_grad)

    step(hidden).backward()
    expected, head.weight.grad = head.weight.grad, None
    checkpoint(step, hidden, use_reentrant=use_reentrant).backward()
    assert torch.equal(head.weight.grad, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_for_backward(kind: str) -> None:
    """Entries, and but for renormalised members the logits themselves and numbers by row."""
    student, teacher = logits(N, V).requires_grad_() * 1, logits(N, V, seed=1)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()  # as tensors that come back from another device

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = loss_of(student, teacher, kind)
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    full = KINDS[kind]["outside"] != "renormalize"
    assert (memory.pop(student.untyped_storage().data_ptr(), None) is not None) == full
    assert sum(memory.values()) <= N * (8 * (K + 1) + 16) + 64
    expected = loss_of(student, teacher, kind)
    assert torch.equal(gradient(loss, student), gradient(expected, student))


@pytest.mark.parametrize("inplace_grad", some((False, True)))
@pytest.mark.parametrize("kind", some(KINDS, 2))
def test_double_backward_is_refused(backend: str, kind: str, inplace_grad: bool) -> None:
    leaf, teacher = logits(N, V).requires_grad_(), logits(N, V, seed=1)
    loss = loss_of(leaf * 1, teacher, kind, inplace_grad=inplace_grad, backend=backend)
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        first.square().sum().backward()


@pytest.mark.parametrize("kind", FULL)
def test_logits_that_changed_before_backward_are_an_error(kind: str) -> None:
    # Backward reads them again.
    leaf, teacher = logits(N, V).requires_grad_(), logits(N, V, seed=1)
    student = leaf * 1
    loss = loss_of(student, teacher, kind)
    with torch.no_grad():
        student.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", FULL)
def test_a_consumer_that_needs_the_overwritten_logits_gets_an_error(kind: str) -> None:
    leaf, teacher = logits(N, V).requires_grad_(), logits(N, V, seed=1)
    student = leaf * 1
    other = student.square().sum()
    loss = loss_of(student, teacher, kind, inplace_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_gradcheck_in_float64() -> None:
    student = logits(3, 20, dtype=torch.float64).requires_grad_()
    teacher = logits(3, 20, seed=1, dtype=torch.float64)
    for kind in KINDS:
        if kind != "sample":  # whose gradient is not that of its value
            check = functools.partial(loss_of, teacher=teacher, kind=kind, reduction="none")
            assert torch.autograd.gradcheck(check, (student,), rtol=1e-5, atol=1e-7)
