"""The gradients of a head whose full softmaxes are wanted: what they read, and autograd's uses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from effort import INTERPRETED
from tensors import normal
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opd_kernels import LinearLogits, debugging, token_logprobs, topk_divergence
from opd_kernels.backends import plain

N, H, V, K = 6, 5, 70, 8
WIDTH = 53
REDUCTIONS = ("mean", "none")
# Under the interpreter test_linear_family.py runs the same operators.
pytestmark = pytest.mark.skipif(INTERPRETED, reason="what surrounds the kernels")


def leaves_of(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((N, H), (V, H), (V,))
    return [normal(*x, seed=i, dtype=dtype).requires_grad_() for i, x in enumerate(shapes)]


def loss_of(leaves: list[Tensor], **options: Any) -> Tensor:
    teacher = normal(N, V, seed=5) * 2
    options = {"outside": "bucket", **options}
    loss: Tensor = topk_divergence(LinearLogits(*leaves), teacher, K, **options)
    return loss


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in torch.autograd.grad(loss.sum(), leaves)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["mean", "none", "sampled", "token"])
def test_rows_of_the_head_beyond_the_vocabulary_are_not_read(
    kind: str, linear_backend: str
) -> None:
    options: dict[str, Any] = {"vocab_size": WIDTH, "backend": linear_backend}
    tokens = torch.arange(N)

    def result(leaves: list[Tensor]) -> list[Tensor]:
        if kind == "token":
            loss = token_logprobs(LinearLogits(*leaves), tokens, **options)
        elif kind == "sampled":
            loss = loss_of(leaves, background="sampled", token_ids=tokens, **options)
        else:
            loss = loss_of(leaves, reduction=kind, **options)
        return [loss.detach(), *gradients(loss, leaves)]

    expected = result(leaves_of())
    poisoned = leaves_of()
    for leaf in poisoned[1:]:
        leaf.data[WIDTH:] = torch.nan
    assert_equal(result(poisoned), expected)
    for grad in expected[2:]:
        assert grad[:WIDTH].any()
        assert not grad[WIDTH:].any()


def test_a_teacher_may_have_the_smaller_vocabulary(linear_backend: str) -> None:
    """Its ids are fewer than those that the student's softmax is over."""
    teacher = normal(N, WIDTH, seed=5)
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"outside": "bucket", "reduction": reduction}
        options["backend"] = linear_backend
        found = []
        for head in (True, False):
            leaves = leaves_of()
            hidden, weight, bias = leaves
            student: Any = LinearLogits(*leaves) if head else hidden @ weight.t() + bias
            loss = topk_divergence(student, teacher, K, **options)
            found.append([loss.detach(), *gradients(loss, leaves)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scaled_loss_has_scaled_gradients(dtype: torch.dtype, linear_backend: str) -> None:
    """A power of two changes no digit; in float16 a loss scale keeps small gradients."""
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"reduction": reduction, "backend": linear_backend}
        leaves = leaves_of(dtype)
        small = 2.0**-14 if dtype == torch.float16 else 1.0
        weight = torch.full((N,), small)
        loss = loss_of(leaves, weight=weight, **options) / small
        found = gradients(loss, leaves)
        expected = gradients(loss_of(leaves, **options), leaves)
        for a, b in zip(found, expected, strict=True):
            # Each of the logits' gradient and the result may be rounded to the dtype on its own.
            bound = 4 * torch.finfo(dtype).eps * float(b.abs().max())
            torch.testing.assert_close(a, b, rtol=0, atol=bound)


def test_no_upstream_is_no_gradient(linear_backend: str) -> None:
    for reduction in REDUCTIONS:
        leaves = leaves_of()
        loss = loss_of(leaves, reduction=reduction, backend=linear_backend)
        for grad in gradients(0 * loss, leaves):
            assert not grad.any()


def test_two_losses_share_a_head() -> None:
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"reduction": reduction}
        leaves = leaves_of()
        members: list[dict[str, Any]] = [{}, {"divergence": "forward_kl", "temperature": 1.5}]
        alone = [gradients(loss_of(leaves, **x, **options), leaves) for x in members]
        both = sum((loss_of(leaves, **x, **options).sum() for x in members), torch.tensor(0.0))
        for a, b, c in zip(gradients(both, leaves), *alone, strict=True):
            torch.testing.assert_close(a, b + c, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same(reentrant: bool) -> None:
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"reduction": reduction}
        leaves, others = leaves_of(), leaves_of()
        loss = checkpoint(
            lambda *x, options=options: loss_of(list(x), **options),
            *leaves,
            use_reentrant=reentrant,
        )
        loss.sum().backward()
        loss_of(others, **options).sum().backward()
        assert_equal([x.grad for x in leaves], [x.grad for x in others])


def test_losses_are_differentiated_again_through_a_retained_graph() -> None:
    for options in ({"reduction": "none"}, {"support": "student"},
                    {"background": "sampled", "token_ids": torch.arange(N)}):  # fmt: skip
        leaves = leaves_of()
        loss = loss_of(leaves, **options).sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert_equal(gradients(loss, leaves), list(first))


def test_a_head_that_changes_before_backward_is_noticed() -> None:
    leaves = leaves_of()
    expected = gradients(loss_of(leaves), leaves)
    for reduction in REDUCTIONS:
        leaves = leaves_of()
        loss = loss_of(leaves, reduction=reduction)
        with torch.no_grad():
            leaves[1] += 1
        if reduction == "none":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients(loss, leaves)
        else:  # it was computed in forward
            assert_equal(gradients(loss, leaves), expected)


def test_without_gradients_the_losses_are_the_same() -> None:
    for reduction in REDUCTIONS:
        leaves = leaves_of()
        options: dict[str, Any] = {"reduction": reduction}
        expected = loss_of(leaves, **options)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                loss = loss_of(leaves, **options)
            assert not loss.requires_grad
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(INTERPRETED, reason="threads of the native kernels")
@pytest.mark.usefixtures("threads")
def test_bits_do_not_depend_on_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plain.WORKSPACE_BYTES, "cpu", 2 * V * 4)
    monkeypatch.setattr(plain, "TILE_ROWS", 2)
    for reduction, count in itertools.product(REDUCTIONS, (1, 2)):
        torch.set_num_threads(count)  # the framework's product may depend on it
        found = []
        for _ in range(3):
            leaves = leaves_of()
            loss = loss_of(leaves, reduction=reduction)
            found.append([loss.detach(), *gradients(loss, leaves)])
        for other in found[1:]:
            assert_equal(other, found[0])


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_debugging_names_the_tensor_that_is_not_finite(
    which: int, reduction: str, monkeypatch: pytest.MonkeyPatch, linear_backend: str
) -> None:
    monkeypatch.setattr(debugging, "ON", True)
    leaves = leaves_of()
    loss_of(leaves, reduction=reduction, backend=linear_backend)
    leaves[which].data[3] = torch.nan
    name = ("hidden", "weight", "bias")[which]
    with pytest.raises(ValueError, match=f"student_{name}: nan"):
        loss_of(leaves, reduction=reduction, backend=linear_backend)
