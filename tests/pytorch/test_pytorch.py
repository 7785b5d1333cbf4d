"""Citizenship: what PyTorch offers around a loss works with this one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from effort import INTERPRETED, rows, some
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from opd_kernels import (
    EntryGradient,
    TopK,
    TopKReverseKL,
    backends,
    linear_topk_rkl,
    select_topk,
    topk_rkl,
)
from opd_kernels._arguments import Background, flat
from opd_kernels._autograd import Request
from opd_kernels.divergences import reverse_kl

ops = torch.ops.opd_kernels
N, V, K = 6, 300, 8


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 3).to(dtype)


def gradient(loss: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, student)[0]


# Operators


def op_arguments() -> dict[str, tuple[object, ...]]:
    student, teacher = logits(2, 3, V), logits(2, 3, V, seed=1)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    banned = torch.zeros((V + 63) // 64 * 8, dtype=torch.uint8).fill_(1)
    rows = torch.rand(2, 3) + 0.5
    kl = (*reverse_kl(), None, "renormalize", "reference")
    jsd = (0.2, 0.1, 0.3, 0.4, 0.3, True, 5.0, -20.0)
    tails = (rows, None, V)
    factors = (rows, rows.double() + 5, V - 5)
    loss, ids, entry_grad = ops.select_divergence(
        student, teacher, K, V, None, None, 1.0, None, 1.0, None, *kl
    )
    return {
        "select": (teacher, K, V - 5, banned, mask, 0, 1.0, None, None, False, "cpu"),
        "select with a tail": (teacher, K, V - 5, banned, mask, V, 1.0, rows, None, False, "cpu"),
        "select with another tail": (teacher, K, V, None, mask, V, 0.7, None, ids, True, "cpu"),
        "tail_logsumexp": (teacher, mask, V - 1, 0.7, None, ids, False, "cpu"),
        "tail_logsumexp with its entropy": (teacher, None, V, 1.0, rows, ids, True, "cpu"),
        "gather": (student, ids, V - 5, banned, mask, "cpu"),
        "select_divergence": (
            student, teacher, K, V, banned, mask, 1.5, None, 1.0, rows, *kl,
        ),
        "entry_divergence": (
            student, logits(2, 3, K), ids, V, None, None, 1.0, rows, 1.0, None, *kl,
        ),
        "full_divergence": (
            student, logits(2, 3, K), ids, V, None, None, 1.0, rows, 1.3, None, *jsd, None,
            "bucket", *tails, "cpu",
        ),
        "full_divergence with weights of rows": (
            student, logits(2, 3, K), ids, V, banned, mask, 1.0, rows, 1.3, None, *jsd,
            torch.rand(2, 3, 4), "truncate", *tails, "cpu",
        ),
        "scatter": (entry_grad, ids, loss, V, torch.bfloat16, "cpu"),
        "scatter_background": (
            entry_grad, ids, loss,
            *flat(Background(*factors, logits(2, 3, V))), "cpu",
        ),
        "scatter_": (logits(2, 3, V), entry_grad, ids, loss, *flat(Background()), "cpu"),
        "scatter_ with a background": (
            logits(2, 3, V), entry_grad, ids, loss,
            *flat(Background(*factors, logits(2, 3, V))), "cpu",
        ),
        "scatter_add_": (logits(2, 3, V), entry_grad, ids, loss, "cpu"),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(op_arguments()))
def test_operators_pass_opcheck(backend: str, name: str) -> None:
    if name.startswith("gather_dot") and not backends.takes_hidden_states(backend):
        pytest.skip("it lacks that")
    arguments = (*op_arguments()[name][:-1], backend)
    # Autograd and tracing do not depend on the kernels: other backends show them.
    checks = {"test_utils": ("test_schema", "test_faketensor")} if INTERPRETED else {}
    torch.library.opcheck(getattr(ops, name.split()[0]).default, arguments, **checks)


def test_gradcheck_in_float64() -> None:
    student = logits(3, 20, dtype=torch.float64).requires_grad_()
    teacher = logits(3, 20, seed=1, dtype=torch.float64)
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)

    def loss(student: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return topk_rkl(student, teacher, 7, weight=weight, temperature=1.3, reduction="none")

    assert torch.autograd.gradcheck(loss, (student, weight))
    support = TopK(torch.tensor([[1, 4, 1, -1, 9]] * 3), logits(3, 5, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda z: topk_rkl(z, support), (student,))


def test_nothing_of_the_logits_size_is_kept_for_backward() -> None:
    student, teacher = logits(N, V).requires_grad_() * 1, logits(N, V, seed=1)
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        topk_rkl(student, teacher, K)
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert sum(memory.values()) <= N * K * 8 + 64
    assert student.untyped_storage().data_ptr() not in memory


# torch.compile


# (rows, vocabulary) of three calls of one compiled function.
SHAPES = ((2, 300), (3, 310), (5, 333))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("given_support", [False, True])
def test_compiles_whole_forward_and_backward(dynamic: bool, given_support: bool) -> None:
    check_compiled(None, dynamic, given_support)


@pytest.mark.parametrize("given_support", [False, True])
def test_compiles_on_every_backend(backend: str, given_support: bool) -> None:
    # A first call of sizes that are constants, and others of any size. A compiler sees the same
    # graph for every backend, but for a name.
    check_compiled(backend, None, given_support, "aot_eager" if given_support else "inductor")


def check_compiled(
    backend: str | None, dynamic: bool | None, given_support: bool, compiler: str = "inductor"
) -> None:
    @functools.partial(torch.compile, fullgraph=True, dynamic=dynamic, backend=compiler)
    def compiled(
        z: torch.Tensor, teacher: torch.Tensor | TopK, mask: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        return topk_rkl(z * 2, teacher, None, mask=mask, weight=weight, backend=backend)

    for n, v in SHAPES:
        z, teacher = logits(n, v).requires_grad_(), logits(n, v, seed=1)
        teacher = select_topk(teacher, K) if given_support else teacher
        mask, weight = torch.arange(n) % 3 != 0, torch.rand(n)
        loss = compiled(z, teacher, mask, weight)
        expected = topk_rkl(z * 2, teacher, mask=mask, weight=weight, backend=backend)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient(loss, z), gradient(expected, z))


def test_a_temperature_schedule_does_not_recompile_every_step() -> None:
    counter = CompileCounterWithBackend("inductor")

    @functools.partial(torch.compile, fullgraph=True, backend=counter)
    def compiled(z: torch.Tensor, t: float, tokens: float) -> torch.Tensor:
        return topk_rkl(z * 1, teacher, K, temperature=t, normalizer=tokens)

    z, teacher = logits(N, V).requires_grad_(), logits(N, V, seed=1)
    for step in range(12):
        t, tokens = 1 + step / 10, 100.0 + step
        loss = compiled(z, t, tokens)
        expected = topk_rkl(z * 1, teacher, K, temperature=t, normalizer=tokens)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient(loss, z), gradient(expected, z))
    assert counter.frame_count <= 3


def test_stats_and_selection_compile_whole() -> None:
    z, teacher = logits(N, V), logits(N, V, seed=1)

    @functools.partial(torch.compile, fullgraph=True)
    def compiled(z: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, ...]:
        support = select_topk(teacher, K, with_logsumexp=True, banned_ids=[1, 2])
        loss, stats = topk_rkl(z, support, return_stats=True)
        return loss, *stats

    support = select_topk(teacher, K, with_logsumexp=True, banned_ids=[1, 2])
    loss, stats = topk_rkl(z, support, return_stats=True)
    assert stats.teacher_entropy.isnan().all()
    for ours, expected in zip(compiled(z, teacher), (loss, *stats), strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_adding_to_a_gradient_compiles_whole(dynamic: bool) -> None:
    check_compiled_adding("reference", dynamic)


def test_adding_to_a_gradient_compiles_on_every_backend(backend: str) -> None:
    check_compiled_adding(backend, None)


def check_compiled_adding(backend: str, dynamic: bool | None) -> None:
    @functools.partial(torch.compile, fullgraph=True, dynamic=dynamic)
    def compiled(
        z: torch.Tensor, ids: torch.Tensor, entry_grad: torch.Tensor, upstream: torch.Tensor
    ) -> torch.Tensor:
        return EntryGradient(ids, entry_grad).add_to_(z.softmax(-1), upstream, backend=backend) * 2

    for n, v in SHAPES:
        z, upstream = logits(n, v), torch.rand(n)
        request = Request(backend=backend)
        _, ids, entry_grad = TopKReverseKL.apply(z, logits(n, v, seed=1), K, request)
        expected = z.softmax(-1)
        EntryGradient(ids, entry_grad).add_to_(expected, upstream, backend=backend)
        torch.testing.assert_close(compiled(z, ids, entry_grad, upstream), expected * 2)


def test_a_compiled_k_of_one_does_not_warn() -> None:
    compiled = torch.compile(lambda z, t: topk_rkl(z, t, 1), fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert compiled(logits(N, V), logits(N, V)) == 0


# Functional transforms, autocast, checkpointing


def test_functional_grad_is_the_gradient(backend: str) -> None:
    student, teacher = logits(N, V), logits(N, V, seed=1)
    leaf = student.clone().requires_grad_()
    expected = gradient(topk_rkl(leaf, teacher, K, backend=backend), leaf)
    assert torch.equal(grad(lambda z: topk_rkl(z, teacher, K, backend=backend))(student), expected)


@pytest.mark.parametrize(
    "in_dims", some([(1, 0, 1), (0, 0, 0), (0, None, None), (None, 0, None)], of=2)
)
def test_vmap_of_grad_is_grad_of_each(backend: str, in_dims: tuple[int | None, ...]) -> None:
    maps, rows = 2, 3
    student, teacher = logits(maps, rows, V), logits(maps, rows, V, seed=1)
    mask = torch.tensor([[True, False, True], [False, True, True]])

    def loss(z: torch.Tensor, t: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return topk_rkl(z, t, K, mask=m, backend=backend)

    whole = (student, teacher, mask)
    arguments = [
        tensor[0] if dim is None else tensor.movedim(0, dim)
        for tensor, dim in zip(whole, in_dims, strict=True)
    ]
    mapped = vmap(grad(loss), in_dims=in_dims)(*arguments)
    for i in range(maps):
        alone = [t[0 if d is None else i] for t, d in zip(whole, in_dims, strict=True)]
        assert torch.equal(mapped[i], grad(loss)(*alone))


def test_vmap_over_a_given_support() -> None:
    student = logits(4, N, V)
    supports = select_topk(logits(4, N, V, seed=1), K)
    mapped = vmap(lambda z, ids, values: topk_rkl(z, TopK(ids, values)))(
        student, supports.ids, supports.logits
    )
    expected = torch.stack([topk_rkl(student[i], supports[i]) for i in range(4)])
    torch.testing.assert_close(mapped, expected)


@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (1, 1, 2, 0), (0, None, None, None)])
def test_vmap_over_added_gradients_adds_each(backend: str, in_dims: tuple[int | None, ...]) -> None:
    maps = 3
    ids = torch.stack([torch.randperm(V)[: N * 2].view(N, 2) for _ in range(maps)]).int()
    whole = (logits(maps, N, V), ids, logits(maps, N, 2, seed=1), torch.rand(maps, N))
    given = [
        tensor[0] if dim is None else tensor.movedim(0, dim).clone()
        for tensor, dim in zip(whole, in_dims, strict=True)
    ]

    def add(grad: torch.Tensor, ids: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return EntryGradient(ids, rest[0]).add_to_(grad, *rest[1:], backend=backend)

    mapped = vmap(add, in_dims=in_dims)(*given)
    for i in range(maps):
        rows = [t[0 if d is None else i].clone() for t, d in zip(whole, in_dims, strict=True)]
        assert torch.equal(mapped[i], add(*rows))
    assert torch.equal(given[0].movedim(in_dims[0], 0), mapped)  # in place


def test_vmap_over_what_is_added_to_one_gradient_is_refused() -> None:
    def add(grad: torch.Tensor, *entries: torch.Tensor) -> torch.Tensor:
        return EntryGradient(*entries).add_to_(grad)

    one = (logits(N, V), torch.zeros(2, N, 1, dtype=torch.int32), torch.ones(2, N, 1))
    with pytest.raises(ValueError, match="map grad as well"):
        vmap(add, in_dims=(None, 0, 0))(*one)
    with pytest.raises(ValueError, match="elements overlap"):
        vmap(add)(one[0].expand(2, N, V), *one[1:])


def test_autocast_keeps_dtypes(backend: str) -> None:
    head, hidden, teacher = torch.nn.Linear(8, V), torch.randn(N, 8), logits(N, V)
    with torch.autocast("cpu", torch.bfloat16):
        z = head(hidden)
        z.retain_grad()
        loss = topk_rkl(z, teacher, K, weight=torch.rand(N), backend=backend)
    loss.backward()
    assert (z.dtype, z.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (loss.dtype, head.weight.grad.dtype) == (torch.float32, torch.float32)


def keep_divergence(_: object, op: object, *__: object, **___: object) -> CheckpointPolicy:
    kept = op == ops.select_divergence.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = functools.partial(create_selective_checkpoint_contexts, keep_divergence)


@pytest.mark.parametrize(
    "options",
    [
        {"use_reentrant": True},
        {"use_reentrant": False},
        {"use_reentrant": False, "context_fn": SELECTIVE},
    ],
    ids=["reentrant", "plain", "selective"],
)
@pytest.mark.parametrize("inplace_grad", [False, True])
def test_checkpointing_gives_the_same_gradient(
    options: dict[str, object], inplace_grad: bool
) -> None:
    head, teacher = torch.nn.Linear(8, V), logits(N, V)
    hidden = torch.randn(N, 8, requires_grad=True)

    def step(hidden: torch.Tensor) -> torch.Tensor:
        return topk_rkl(head(hidden), teacher, K, inplace_grad=inplace_grad)

    step(hidden).backward()
    expected, head.weight.grad = head.weight.grad, None
    checkpoint(step, hidden, **options).backward()
    assert torch.equal(head.weight.grad, expected)


# Strides


@pytest.mark.parametrize("layout", ["sliced", "transposed", "permuted", "expanded", "one_row"])
def test_leading_strides_are_read_in_place(backend: str, layout: str) -> None:
    base = logits(2, 4, rows(3), V)
    views: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "sliced": lambda x: x[:, 1:-1, ::2, 3:-4],
        "transposed": lambda x: x.transpose(0, 1),
        "permuted": lambda x: x.permute(2, 0, 1, 3),
        "expanded": lambda x: x[:1].expand(base.shape),
        "one_row": lambda x: x[0, 0, 0],
    }
    student = views[layout](base)
    teacher = views[layout](logits(*base.shape, seed=1))
    expected_student = student.contiguous().requires_grad_()
    expected = topk_rkl(
        expected_student, teacher.contiguous(), K, reduction="none", backend=backend
    )
    student = student.requires_grad_()
    loss = topk_rkl(student, teacher, K, reduction="none", backend=backend)
    assert loss.shape == student.shape[:-1]
    assert torch.equal(loss, expected)
    expected.sum().backward()
    assert torch.equal(gradient(loss.sum(), student), expected_student.grad)


def test_upstream_gradients_of_stride_zero(backend: str) -> None:
    student, teacher = logits(N, V).requires_grad_(), logits(N, V, seed=1)
    loss = topk_rkl(student, teacher, K, reduction="none", backend=backend)
    summed = gradient(loss.sum(), student)
    loss = topk_rkl(student, teacher, K, reduction="none", backend=backend)
    assert torch.equal(summed, torch.autograd.grad(loss, student, torch.ones(N))[0])


# In place


def test_inplace_gradient_takes_the_logits_memory(backend: str) -> None:
    leaf, teacher = logits(2, 3, V).requires_grad_(), logits(2, 3, V, seed=1)
    expected = gradient(topk_rkl(leaf * 1, teacher, K, backend=backend), leaf)
    student = leaf * 1
    seen = []
    student.register_hook(lambda g: seen.append(g.data_ptr()))
    version = student._version
    topk_rkl(student, teacher, K, inplace_grad=True, backend=backend).backward()
    assert torch.equal(leaf.grad, expected)
    assert seen == [student.data_ptr()]
    assert student._version > version


def test_inplace_gradient_into_strided_rows(backend: str) -> None:
    leaf, teacher = logits(4, 3, V + 7).requires_grad_(), logits(3, 2, V, seed=1)

    def view(x: torch.Tensor) -> torch.Tensor:
        return x[:2, :, 3:-4].transpose(0, 1)

    expected = gradient(topk_rkl(view(leaf), teacher, K, backend=backend), leaf)
    student = view(leaf * 1)
    loss = topk_rkl(student, teacher, K, inplace_grad=True, backend=backend)
    assert torch.equal(gradient(loss, leaf), expected)


def test_a_consumer_that_needs_the_overwritten_logits_gets_an_error() -> None:
    # Backward runs in reverse order of forward: the consumer's comes after the overwrite.
    leaf, teacher = logits(N, V).requires_grad_(), logits(N, V, seed=1)
    student = leaf * 1
    other = student.square().sum()
    loss = topk_rkl(student, teacher, K, inplace_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_a_consumer_whose_backward_comes_before_the_overwrite_is_right() -> None:
    leaf, teacher = logits(N, V).requires_grad_(), logits(N, V, seed=1)
    expected = gradient(topk_rkl(leaf * 1, teacher, K) + (leaf * 1).square().sum(), leaf)
    student = leaf * 1
    loss = topk_rkl(student, teacher, K, inplace_grad=True)
    torch.testing.assert_close(gradient(loss + student.square().sum(), leaf), expected)


def test_inplace_gradient_twice_is_an_error() -> None:
    leaf, teacher = logits(N, V).requires_grad_(), logits(N, V, seed=1)
    loss = topk_rkl(leaf * 1, teacher, K, inplace_grad=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_changed_between_forward_and_inplace_backward_are_an_error() -> None:
    leaf, teacher = logits(N, V).requires_grad_(), logits(N, V, seed=1)
    student = leaf * 1
    loss = topk_rkl(student, teacher, K, inplace_grad=True)
    with torch.no_grad():
        student.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled_inplace_with_another_consumer_is_right() -> None:
    leaf, teacher = logits(N, V).requires_grad_(), logits(N, V, seed=1)

    @functools.partial(torch.compile, fullgraph=True)
    def compiled(z: torch.Tensor) -> torch.Tensor:
        student = z * 1
        return topk_rkl(student, teacher, K, inplace_grad=True) + student.square().sum()

    expected = gradient(topk_rkl(leaf * 1, teacher, K) + (leaf * 1).square().sum(), leaf)
    torch.testing.assert_close(gradient(compiled(leaf), leaf), expected)


# Double backward


@pytest.mark.parametrize("inplace_grad", some((False, True)))
@pytest.mark.parametrize("given_support", some((False, True)))
def test_double_backward_is_refused(backend: str, inplace_grad: bool, given_support: bool) -> None:
    leaf, teacher = logits(N, V).requires_grad_(), logits(N, V, seed=1)
    teacher = select_topk(teacher, K) if given_support else teacher
    loss = topk_rkl(leaf * 1, teacher, inplace_grad=inplace_grad, backend=backend)
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        first.square().sum().backward()


def test_double_backward_is_refused_by_functional_grad() -> None:
    teacher = logits(N, V, seed=1)

    def penalty(z: torch.Tensor) -> torch.Tensor:
        return grad(lambda u: topk_rkl(u, teacher, K))(z).square().sum()

    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad(penalty)(logits(N, V))


@pytest.mark.parametrize("inplace_grad", [False, True])
def test_double_backward_is_refused_when_compiled(inplace_grad: bool) -> None:
    leaf, teacher = logits(N, V).requires_grad_(), logits(N, V, seed=1)

    @functools.partial(torch.compile, fullgraph=True)
    def compiled(z: torch.Tensor) -> torch.Tensor:
        return topk_rkl(z * 1, teacher, K, inplace_grad=inplace_grad)

    def penalised() -> None:
        loss = compiled(leaf)
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (loss + first.square().sum()).backward()

    # PyTorch refuses it from 2.13 on; before, the penalty would be left out in silence.
    with pytest.raises(RuntimeError, match=r"double backward|cannot be differentiated twice"):
        penalised()


@pytest.mark.parametrize("form", ["logits", "in place", "hidden states"])
def test_compiled_autograd_runs_an_eager_graph(form: str) -> None:
    hidden, weight = logits(N, 16).requires_grad_(), logits(V, 16, seed=1).requires_grad_()
    teacher = logits(N, V, seed=2)

    def loss() -> torch.Tensor:
        if form == "hidden states":
            return linear_topk_rkl(hidden, weight, teacher, K)
        return topk_rkl(hidden @ weight.t(), teacher, K, inplace_grad=form == "in place")

    expected = torch.autograd.grad(loss(), (hidden, weight))
    made = loss()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda value: value.backward(), backend="aot_eager")(made)
    for leaf, gradient_of_leaf in zip((hidden, weight), expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient_of_leaf)


def test_a_compiled_bad_temperature_makes_nan() -> None:
    compiled = torch.compile(lambda z, t, x: topk_rkl(z, t, K, temperature=x), fullgraph=True)
    for bad in (-1.0, 0.0, float("nan")):
        assert compiled(logits(N, V), logits(N, V, seed=1), bad).isnan()


def test_a_compiled_inplace_gradient_leaves_a_viewed_leaf_alone() -> None:
    leaf, teacher = logits(N, V).requires_grad_(), logits(N, V, seed=1)
    before = leaf.detach().clone()

    @functools.partial(torch.compile, fullgraph=True)
    def compiled(z: torch.Tensor) -> torch.Tensor:
        return topk_rkl(z.view(N, V), teacher, K, inplace_grad=True)

    compiled(leaf).backward()
    assert torch.equal(leaf.detach(), before)


def test_tensors_made_under_inference_mode_are_welcome() -> None:
    student, teacher = logits(N, V), logits(N, V, seed=1)
    with torch.inference_mode():
        mask = torch.arange(N) % 2 == 0
        options = {
            "mask": mask,
            "weight": torch.ones(N) * 2,
            "normalizer": mask.sum(),
            "temperature": torch.ones(N) * 1.5,
            "banned_ids": torch.arange(3),
        }
        inside = topk_rkl(student, teacher, K, **options)
        support = select_topk(teacher, K)
    leaf = student.requires_grad_()
    loss = topk_rkl(leaf, teacher, K, **options)
    loss.backward()
    topk_rkl(leaf, support, **options).backward()
    torch.testing.assert_close(loss, inside)


@pytest.mark.parametrize("vocab", [V, 400_000])
def test_gradients_are_ordinary_tensors_of_any_size(vocab: int) -> None:
    leaf, teacher = logits(N, vocab).requires_grad_(), logits(N, vocab, seed=1)
    grad = gradient(topk_rkl(leaf, teacher, K), leaf)
    assert not grad._is_view()
    grad.detach_()
    grad += torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad(topk_rkl(leaf, teacher, K), leaf, create_graph=True)
    grad.mul_(2)
    copy = grad.detach().clone()
    assert torch.equal(copy.share_memory_(), grad)


TRANSFORMED = {
    "grad": lambda f: torch.func.grad(f),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f)),
    "jacrev": lambda f: torch.func.jacrev(f),
    "vmap": lambda f: torch.func.vmap(f),
}


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize("hidden", [False, True])
def test_a_compiled_transform_leaves_the_loss_out_of_the_graph(name: str, hidden: bool) -> None:
    """Inside of it PyTorch would drop the gradient of an autograd Function, and give zeros."""
    teacher = logits(V, seed=1).expand(N, V)
    given = logits(2, N, V) if name.startswith("vmap") else logits(N, V)
    weight = torch.eye(V)

    def loss(z: torch.Tensor) -> torch.Tensor:
        return linear_topk_rkl(z, weight, teacher, K) if hidden else topk_rkl(z, teacher, K)

    transformed = TRANSFORMED[name](loss)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(transformed, backend="eager", fullgraph=True)(given)
    if not name.startswith("vmap"):
        compiled = torch.compile(transformed, backend="eager")
        torch.testing.assert_close(compiled(given), transformed(given))
        inside = TRANSFORMED[name](torch.compile(loss, backend="eager"))
        torch.testing.assert_close(inside(given), transformed(given))


def test_the_function_is_public_and_gives_the_rows_loss() -> None:
    student, teacher = logits(N, V), logits(N, V, seed=1)
    loss, ids, entry_grad = TopKReverseKL.apply(student, teacher, K)
    assert torch.equal(loss, topk_rkl(student, teacher, K, reduction="none"))
    assert ids.shape == entry_grad.shape == (N, K)
