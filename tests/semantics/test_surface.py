"""The public functions as one: students of both kinds, aliases, the gradient as entries."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

import pytest
import torch

from opd_kernels import (
    EntryGradient,
    LinearLogits,
    TopKReverseKL,
    linear_topk_rkl,
    select_topk,
    topk_divergence,
    topk_rkl,
)
from opd_kernels.options import MEMBER_DEFAULTS, Options, RowOptions

N, H, V, K = 6, 16, 50, 8
MASK = torch.tensor([True, True, False, True, True, True])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def test_a_student_is_logits_or_hidden_states_and_a_head() -> None:
    hidden, weight, bias = normal(N, H), normal(V, H, seed=1), normal(V, seed=2)
    teacher, results = normal(N, V, seed=3), []
    for alias in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        if alias:
            loss = linear_topk_rkl(
                *leaves[:2], teacher, K, student_bias=leaves[2], logit_softcap=5.0,
                logit_scale=0.5, mask=MASK, temperature=1.5,
            )  # fmt: skip
        else:
            student = LinearLogits(*leaves, softcap=5.0, scale=0.5)
            loss = topk_rkl(student, teacher, K, mask=MASK, temperature=1.5)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    # And the loss is that of the head's logits.
    logits = torch.tanh((hidden @ weight.T + bias) * 0.5 / 5.0) * 5.0
    torch.testing.assert_close(
        results[0][0], topk_rkl(logits, teacher, K, mask=MASK, temperature=1.5)
    )


@pytest.mark.parametrize("student", ["logits", "hidden states"])
def test_every_kind_of_teacher_goes_with_every_kind_of_student(student: str) -> None:
    head = LinearLogits(normal(N, H), normal(V, H, seed=1))
    given = head if student == "hidden states" else head.hidden @ head.weight.T
    teacher = LinearLogits(normal(N, H, seed=2), normal(V, H, seed=3))
    support = select_topk(teacher, K, mask=MASK)
    logits = teacher.hidden @ teacher.weight.T
    losses = [topk_rkl(given, some, K, mask=MASK) for some in (teacher, support, logits)]
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_aliases_show_the_options_that_they_take() -> None:
    spelled = inspect.signature(topk_rkl).parameters
    alias = inspect.signature(linear_topk_rkl).parameters
    for name in Options.__annotations__:
        assert alias[name] == spelled[name]
    assert set(spelled) - set(Options.__annotations__) == {
        "student", "teacher", "k", "return_stats",
    }  # fmt: skip
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in alias.values())
    family = inspect.signature(topk_divergence).parameters
    assert set(family) - set(spelled) == {*MEMBER_DEFAULTS, "return_token_logprobs"}
    assert family["token_ids"].annotation == "Tensor | None"


def test_printed_means_do_not_say_that_they_are_of_one_row() -> None:
    _, stats = topk_rkl(normal(N, V), normal(N, V, seed=1), K, mask=MASK, return_stats=["valid_k"])
    assert repr(stats) == f"Stats(valid_k={K}, means of {int(MASK.sum())} of {N} rows)"
    assert repr(stats.mean()) == f"Stats(valid_k={K})"


def test_entries_show_the_options_that_they_take() -> None:
    shown = inspect.signature(EntryGradient.of).parameters
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in shown.values())
    assert set(shown) - {"student", "teacher", "k"} == set(RowOptions.__annotations__)
    assert set(get_type_hints(EntryGradient.of)) > {"student", "teacher", "k"}


def test_the_function_needs_no_more_than_student_teacher_and_k(backend: str) -> None:
    leaf, teacher = normal(N, V).requires_grad_(), normal(N, V + 7, seed=1)
    loss, ids, entry_grad = TopKReverseKL.apply(leaf, teacher, K)
    loss.sum().backward()
    ours, leaf.grad = leaf.grad, None
    topk_rkl(leaf, teacher, K, reduction="sum").backward()
    assert torch.equal(ours, leaf.grad)
    assert torch.equal(EntryGradient(ids, entry_grad).dense(V), ours)
    default, _, _ = TopKReverseKL.apply(leaf, teacher)
    assert torch.equal(default, topk_rkl(leaf, teacher, reduction="none"))


OPTIONS: dict[str, Any] = {
    "mask": MASK, "temperature": 0.7, "teacher_temperature": torch.rand(N) + 0.5,
    "banned_ids": [3, 7], "vocab_size": V - 4,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [False, True])
def test_the_gradient_as_entries_is_that_of_the_loss(
    backend: str, dtype: torch.dtype, given: bool
) -> None:
    leaf, teacher = normal(N, V).to(dtype).requires_grad_(), normal(N, V, seed=1).to(dtype)
    known = select_topk(teacher, K, vocab_size=V - 4) if given else teacher
    weight = torch.rand(N)
    options = OPTIONS | {"backend": backend}
    loss = topk_rkl(leaf, known, K, weight=weight, reduction="sum", **options)
    loss.backward()
    losses, gradient = EntryGradient.of(leaf, known, K, **options)
    assert torch.equal(losses, topk_rkl(leaf, known, K, reduction="none", **options))
    assert not losses.requires_grad
    assert torch.equal(gradient.dense(V, dtype, weight, backend=backend), leaf.grad)
    buffer = torch.zeros(N, V, dtype=dtype)
    assert torch.equal(gradient.add_to_(buffer, weight, backend=backend), leaf.grad)


@pytest.mark.parametrize("name", ["weight", "reduction", "normalizer", "inplace_grad", "tau"])
def test_entries_take_no_option_that_reduces(name: str) -> None:
    with pytest.raises(TypeError, match=rf"EntryGradient.of\(\) got an unexpected .* '{name}'"):
        EntryGradient.of(normal(N, V), normal(N, V), K, **{name: 1})


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "error"),
    [
        (0, torch.float32, ValueError),
        (2.5, torch.float32, TypeError),
        (None, torch.float32, TypeError),
        (V, torch.int32, TypeError),
    ],
)
def test_a_dense_gradient_has_a_vocabulary_and_a_floating_dtype(
    vocab_size: Any, dtype: torch.dtype, error: type[Exception]
) -> None:
    _, gradient = EntryGradient.of(normal(N, V), normal(N, V, seed=1), K)
    with pytest.raises(error, match=r"allowed|expected"):
        gradient.dense(vocab_size, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dense_gradient_ignores_ids_outside_its_vocabulary(dtype: torch.dtype) -> None:
    ids = torch.tensor([[1, 9, -5]], dtype=torch.int32)
    entry_grad = torch.tensor([[1.0, torch.nan, torch.nan]], dtype=dtype)
    assert EntryGradient(ids, entry_grad).dense(4).tolist() == [[0.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "function",
    [
        topk_rkl,
        EntryGradient.of,
        lambda z, t, k: linear_topk_rkl(z, torch.ones(V, V), t, k),
    ],
)
def test_the_warning_of_one_entry_names_the_line_that_called(function: Any) -> None:
    with pytest.warns(UserWarning, match="k=1") as caught:
        function(normal(N, V), normal(N, V, seed=1), 1)
    assert caught[0].filename == __file__


def test_a_dense_gradient_maps_under_vmap() -> None:
    _, gradient = EntryGradient.of(normal(2, N, V), normal(2, N, V, seed=1), K)

    def dense(ids: torch.Tensor, entry_grad: torch.Tensor) -> torch.Tensor:
        return EntryGradient(ids, entry_grad).dense(V)

    mapped = torch.vmap(dense)(gradient.ids, gradient.entry_grad)
    assert torch.equal(mapped, gradient.dense(V))


def test_the_cached_signature_binds_as_inspect_does() -> None:
    forward = TopKReverseKL.forward
    ours = inspect.signature(forward).bind(1, 2, 3, None)
    theirs = inspect.Signature(list(inspect.signature(forward).parameters.values())).bind(
        1, 2, 3, None
    )
    assert dict(ours.arguments) == dict(theirs.arguments)
    assert (ours.args, ours.kwargs) == (theirs.args, theirs.kwargs)
    assert "student=1" in repr(ours)
