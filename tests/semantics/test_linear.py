"""``linear_topk_rkl``: the loss from hidden states and a head, and ``LinearLogits``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from effort import INTERPRETED, examples
from hypothesis import given, settings
from tensors import DTYPES, integers, normal
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear

from opd_kernels import LinearLogits, TopK, backends, linear_topk_rkl, select_topk, topk_rkl
from opd_kernels._arguments import Allowed
from opd_kernels.backends import cpu, plain
from opd_kernels.backends.native import NativeLinear
from opd_kernels.fuzz import cases
from opd_kernels.testing import Case, check

INF, NAN = torch.inf, torch.nan
LINEAR = {"form": ("linear",), "family": (False,)}  # test_divergences.py has the others


def gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


# Against float64


@given(case=cases(float64=False, only=LINEAR))
@settings(max_examples=examples(750))
def test_any_call_is_within_its_budget(linear_backend: str, case: Case) -> None:
    check(case, linear_backend)


@given(case=cases(only=LINEAR))
@settings(max_examples=examples(150))
def test_any_call_is_within_its_budget_on_the_default_backend(case: Case) -> None:
    check(case)


@given(case=cases(float64=False, only=LINEAR))
@settings(max_examples=examples(150))
def test_any_call_is_within_its_budget_on_every_instruction_set(
    instruction_set: str, case: Case
) -> None:
    check(case, "cpu")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("hidden", [1, 7, 15, 16, 17, 31, 33, 64, 65, 130])
def test_every_width(linear_backend: str, hidden: int, dtype: str) -> None:
    case = Case(rows=(3,), student_vocab=40, teacher_vocab=40, k=9, hidden=hidden, head="all",
                student_dtype=dtype, student_layout="sliced", banned="few")  # fmt: skip
    check(case, linear_backend)


# Beside the logits form


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_are_exact_give_the_same_loss_to_the_bit(
    linear_backend: str, dtype: torch.dtype
) -> None:
    hidden, weight = integers(2, 5, 12, dtype=dtype), integers(70, 12, seed=1, dtype=dtype)
    teacher, k = normal(2, 5, 70, seed=2), 20
    logits = linear(hidden.float(), weight.float())
    for masked in (None, torch.arange(10).view(2, 5) % 3 != 0):
        options: dict[str, Any] = {"mask": masked, "reduction": "none", "temperature": 1.3}
        ours = linear_topk_rkl(hidden, weight, teacher, k, backend=linear_backend, **options)
        expected = topk_rkl(logits, teacher, k, backend=linear_backend, **options)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_are_exact_come_out_exact(linear_backend: str, dtype: torch.dtype) -> None:
    rows, k, width, vocab = 30, 7, 19, 12
    hidden, weight = integers(rows, width, dtype=dtype), integers(vocab, width, seed=1, dtype=dtype)
    upstream = integers(rows, k, seed=2)
    ids = torch.randint(vocab, (rows, k), generator=torch.Generator().manual_seed(3))
    module = backends.resolve_linear(linear_backend, torch.device("cpu"), (dtype,), k)
    dense = torch.zeros(rows, vocab).scatter_add_(1, ids, upstream)
    assert torch.equal(
        module.gather_dot_hidden(upstream, ids, weight, dtype), (dense @ weight.float()).to(dtype)
    )
    got = module.gather_dot_weight(upstream, ids, hidden, vocab, torch.float32)
    assert torch.equal(got, dense.t() @ hidden.float())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_a_head_and_autograd(
    linear_backend: str, bias: bool, softcap: float | None, tied: bool
) -> None:
    embedding = normal(60, 16, seed=3).double().requires_grad_()
    head_weight = embedding if tied else normal(60, 16, seed=4).double().requires_grad_()
    head_bias = normal(60, seed=5).double().requires_grad_() if bias else None
    leaves = [x for x in (embedding, head_weight, head_bias) if x is not None]
    rows = 6 if INTERPRETED else 40
    tokens = torch.randint(60, (rows,), generator=torch.Generator().manual_seed(6))
    teacher = normal(rows, 60, seed=7)

    def loss(double: bool) -> torch.Tensor:
        dtype = torch.float64 if double else torch.float32
        hidden = torch.tanh(embedding.to(dtype)[tokens])
        weight, offset = head_weight.to(dtype), None if head_bias is None else head_bias.to(dtype)
        if not double:
            return linear_topk_rkl(
                hidden, weight, teacher, 10, student_bias=offset, logit_softcap=softcap,
                logit_scale=1.5, backend=linear_backend,
            )  # fmt: skip
        logits = linear(hidden, weight, offset) * 1.5
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return topk_rkl(logits, teacher, 10, backend="reference")

    for ours, expected in zip(
        gradients(loss(False), *leaves), gradients(loss(True), *leaves), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)


def test_statistics_are_those_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plain.WORKSPACE_BYTES, "cpu", 0)
    monkeypatch.setattr(plain, "TILE_ROWS", 4)
    hidden, weight, bias = normal(3, 7, 16), normal(60, 16, seed=1), normal(60, seed=2)
    teacher = LinearLogits(normal(3, 7, 8, seed=3), normal(66, 8, seed=4), scale=0.5, softcap=4.0)
    options: dict[str, Any] = {
        "mask": torch.arange(21).view(3, 7) % 4 != 0,
        "temperature": torch.rand(3, 7) + 0.5,
        "vocab_size": 55,
        "banned_ids": [3, 50],
        "return_stats": True,
    }
    student = 5 * torch.tanh(linear(hidden, weight, bias) * 0.7 / 5)
    logits = 4 * torch.tanh(linear(teacher.hidden, teacher.weight) * 0.5 / 4)
    support = select_topk(logits, 9, vocab_size=55, with_logsumexp=True)
    for ours, theirs, k in ((teacher, logits, 9), (logits, logits, 9), (support, support, None)):
        loss, stats = linear_topk_rkl(
            hidden, weight, ours, k, student_bias=bias, logit_softcap=5.0, logit_scale=0.7,
            **options,
        )  # fmt: skip
        expected_loss, expected = topk_rkl(student, theirs, k, **options)
        torch.testing.assert_close(loss, expected_loss)
        for got, wanted in zip(stats, expected, strict=True):
            torch.testing.assert_close(got, wanted, equal_nan=True)  # masked rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_round_no_more_than_the_product(dtype: torch.dtype) -> None:
    hidden, weight = 2 * normal(6, 64, dtype=dtype), normal(500, 64, seed=1, dtype=dtype)
    teacher = LinearLogits(hidden, weight, softcap=30.0, scale=0.7)
    exact = 30 * torch.tanh(linear(hidden, weight).double() * 0.7 / 30)
    support = select_topk(teacher, 32, with_logsumexp=True)
    torch.testing.assert_close(support.logsumexp.double(), exact.logsumexp(-1), rtol=1e-6, atol=0)
    _, stats = linear_topk_rkl(
        hidden, weight, teacher, 32, logit_softcap=30.0, logit_scale=0.7, return_stats=True
    )
    ids = support.ids.long()
    mass = exact.softmax(-1).gather(-1, ids).sum(-1)
    torch.testing.assert_close(stats.teacher_mass.double(), mass, rtol=1e-5, atol=0)
    # Those of the student come from one product, entries and the rest alike.
    torch.testing.assert_close(stats.student_mass.double(), mass, rtol=1e-5, atol=0)
    entropy = -(exact.softmax(-1) * exact.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(stats.student_entropy.double(), entropy, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [(), (0,), (3, 0), (2, 1, 2)])
def test_statistics_have_the_rows_shape(rows: tuple[int, ...]) -> None:
    hidden, weight = normal(*rows, 8), normal(30, 8)
    for teacher in (LinearLogits(hidden, weight), linear(hidden, weight)):
        loss, stats = linear_topk_rkl(
            hidden, weight, teacher, 5, reduction="none", return_stats=True
        )
        assert loss.shape == stats.teacher_mass.shape == stats.student_mass.shape == rows


def test_compiled_calls_measure_the_same() -> None:
    hidden, weight = normal(4, 8), normal(30, 8, seed=1)
    teacher, mask = LinearLogits(normal(4, 6), normal(30, 6)), torch.arange(4) != 2

    def step(hidden: torch.Tensor, weight: torch.Tensor, teacher: Any, mask: torch.Tensor) -> Any:
        return linear_topk_rkl(hidden, weight, teacher, 5, mask=mask, return_stats=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected_loss, expected = step(hidden, weight, teacher, mask)
    loss, stats = compiled(hidden, weight, teacher, mask)
    assert torch.equal(loss, expected_loss)
    for got, wanted in zip(stats, expected, strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)  # the masked row


# What is computed


def refuse(*_: object) -> torch.Tensor:
    raise AssertionError("nobody asked for this gradient")


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_gradients_that_nobody_asks_for_are_not_computed(
    monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    tensors = {"hidden": normal(6, 16), "weight": normal(30, 16, seed=1), "bias": normal(30)}
    tensors[wanted].requires_grad_()
    module = backends.load("cpu")
    made: list[torch.Size] = []

    def weight_gradient(*arguments: Any) -> torch.Tensor:
        made.append(arguments[2].shape)
        return original(*arguments)

    original = module.gather_dot_weight
    monkeypatch.setattr(module, "gather_dot_weight", weight_gradient)
    if wanted != "hidden":
        monkeypatch.setattr(module, "gather_dot_hidden", refuse)
    loss = linear_topk_rkl(
        tensors["hidden"], tensors["weight"], normal(6, 30, seed=2), 5,
        student_bias=tensors["bias"], backend="cpu",
    )  # fmt: skip
    loss.backward()
    assert tensors[wanted].grad is not None
    assert made == {"hidden": [], "weight": [(6, 16)], "bias": [(6, 1)]}[wanted]


def test_nothing_is_computed_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = linear_topk_rkl(normal(6, 16), normal(30, 16), normal(6, 30), 5)
    assert not loss.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_that_every_row_has(linear_backend: str, dtype: torch.dtype) -> None:
    # Sums so long that they are cut, over a few ids; beside them ids that one row has.
    rows, width, vocab = (700, 24, 40) if INTERPRETED else (9000, 200, 1000)
    hidden = normal(rows, width, dtype=dtype)
    ids = torch.tensor([[7, 3, vocab - 1, 0]]).repeat(rows, 1)
    ids[5, 2] = 11
    upstream = normal(rows, 4, seed=2) / rows
    module = backends.resolve_linear(linear_backend, torch.device("cpu"), (dtype,), 4)
    got = module.gather_dot_weight(upstream, ids, hidden, vocab, torch.float32).double()
    # Of one sign, so that a long sum that is not cut drifts.
    drift = module.gather_dot_weight(upstream * 0 + 0.1, ids, hidden * 0 + 1, vocab, torch.float32)
    if linear_backend != "reference":
        counts = torch.bincount(ids.flatten(), minlength=vocab)[:, None] * 0.1
        torch.testing.assert_close(drift, counts.expand_as(drift), rtol=1e-5, atol=0)
    dense = torch.zeros(rows, vocab, dtype=torch.float64).scatter_(1, ids, upstream.double())
    size = dense.abs().t() @ hidden.double().abs()
    assert bool(((got - dense.t() @ hidden.double()).abs() <= 600 * 2**-24 * size).all())
    assert bool((got[12 : vocab - 1] == 0).all())
    again = module.gather_dot_weight(upstream, ids, hidden, vocab, torch.float32).double()
    assert torch.equal(got, again)


def test_a_million_entries(linear_backend: str) -> None:
    rows, k, width, vocab = (200, 4, 2, 60) if INTERPRETED else (16384, 64, 8, 5000)
    hidden, weight = normal(rows, width).requires_grad_(), normal(vocab, width, seed=1)
    weight.requires_grad_()
    # Ids as words of a language: a few in nearly every row, most in few.
    spread = torch.rand(rows, k, generator=torch.Generator().manual_seed(2)) ** 6
    ids = (spread * vocab).long()
    teacher = TopK(ids, normal(rows, k, seed=3))
    loss = linear_topk_rkl(hidden, weight, teacher, reduction="sum", backend=linear_backend)
    got = gradients(loss, hidden, weight)
    logits = linear(hidden.double(), weight.double())
    log_p = logits.gather(1, ids).log_softmax(-1)
    expected = (log_p.exp() * (log_p - teacher.logits.double().log_softmax(-1))).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for ours, wanted in zip(got, gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=2e-4)


def test_ids_listed_twice_count_twice(linear_backend: str) -> None:
    hidden, weight = normal(3, 16).requires_grad_(), normal(30, 16, seed=1).requires_grad_()
    teacher = TopK(torch.tensor([[4, 9, 4, 4]] * 3), normal(3, 4, seed=2))
    loss = linear_topk_rkl(hidden, weight, teacher, backend=linear_backend)
    expected = topk_rkl(linear(hidden, weight), teacher, backend=linear_backend)
    torch.testing.assert_close(loss, expected)
    for ours, wanted in zip(
        gradients(loss, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        torch.testing.assert_close(ours, wanted)


def test_results_are_the_same_bits_for_every_thread_count_and_instruction_set(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    hidden, weight = normal(300, 200).requires_grad_(), normal(900, 200, seed=1).requires_grad_()
    ids = torch.randint(900, (300, 40), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 5
    teacher = TopK(ids, normal(300, 40, seed=3))
    results = []
    for name in cpu.instruction_sets():
        monkeypatch.setattr(cpu, "INSTRUCTION_SET", name)
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            loss = linear_topk_rkl(hidden, weight, teacher, reduction="none", backend="cpu")
            results.append((loss, *gradients(loss.sum(), hidden, weight)))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_value_of_a_half_dtype_is_widened_and_rounded_exactly(
    instruction_set: str, dtype: torch.dtype
) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = torch.cat([every[every.isfinite()], torch.tensor([0.1], dtype=dtype)])[:, None]
    ids = torch.arange(len(every))[:, None]
    one = torch.ones(len(every), 1)
    logits, _ = cpu.backend.gather_dot(one, every, None, ids, Allowed(len(every)))
    assert torch.equal(logits, every.float())
    # Halfway between neighbours, and a little to either side.
    between = (every.float() + every.roll(1).float()) / 2
    for shift in (0, 2**-20, -(2**-20)):
        factor = (between * (1 + shift)).nan_to_num(1.0)
        hidden = cpu.backend.gather_dot_hidden(factor, ids * 0, one, dtype)
        wanted = torch.where(factor == 0, 0, factor).to(dtype)
        assert torch.equal(hidden, wanted)
    for special in (NAN, INF, -INF, 1e30, -1e30, 1e-30):
        hidden = cpu.backend.gather_dot_hidden(torch.tensor([[special]]), ids[:1], one, dtype)
        assert torch.equal(
            hidden.float().nan_to_num(7.0),
            torch.tensor([[special]]).to(dtype).float().nan_to_num(7.0),
        )


# PyTorch


def op_arguments() -> dict[str, tuple[object, ...]]:
    hidden, weight, bias = normal(2, 3, 16), normal(30, 16, seed=1), normal(30, seed=2)
    ids = torch.randint(30, (2, 3, 5), generator=torch.Generator().manual_seed(3))
    mask, banned = torch.arange(6).view(2, 3) != 1, torch.full((8,), 2, dtype=torch.uint8)
    distinct, lse = torch.arange(5).expand(2, 3, 5), torch.full((2, 3), 9.0)
    return {
        "read_linear": (
            hidden, weight, bias, 0.5, 4.0, 5, 28, banned, mask, 29, 0.7, None, None, True, ids,
        ),
        "linear_gradient": (
            hidden, weight, bias, 0.5, 4.0, normal(2, 3, 5), distinct, normal(2, 3), lse, 28, None,
            0.7, None, mask, True, True, True,
        ),
        "linear_divergence": (
            hidden, weight, bias, 0.5, 4.0, 2, 28, banned, mask, 29, 0.7, None, ids.int(), False,
            ids, ids, normal(2, 3, 5), 0.7, None, 0.9, None, 1.0, 0.0, 0.0, 0.0, 0.5, False, None,
            None, None, "bucket", lse.double(), None, 29, normal(2, 3), True, True, True,
        ),
        "gather_dot": (hidden, weight, bias, ids, 28, banned, mask),
        "gather_dot_hidden": (normal(2, 3, 5), ids, weight, torch.bfloat16),
        "gather_dot_weight": (normal(2, 3, 5), ids, hidden, 30, torch.float32),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(op_arguments()))
def test_operators_pass_opcheck(linear_backend: str, name: str) -> None:
    operator = getattr(torch.ops.opd_kernels, name).default
    torch.library.opcheck(operator, (*op_arguments()[name], linear_backend))


def test_autocast_takes_what_linear_takes(linear_backend: str) -> None:
    hidden, weight = normal(5, 16).requires_grad_(), normal(30, 16, seed=1).requires_grad_()
    bias, teacher = normal(30, seed=2).requires_grad_(), normal(5, 30, seed=3)
    teacher_hidden, teacher_weight = normal(5, 8, seed=4), normal(30, 8, seed=5)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_topk_rkl(
                hidden.to(dtype), weight, teacher, 8, student_bias=bias, backend=linear_backend
            )
            through_linear = topk_rkl(linear(hidden, weight, bias), teacher, 8)
            support = select_topk(LinearLogits(teacher_hidden.to(dtype), teacher_weight), 4)
            rounded = select_topk(linear(teacher_hidden.to(dtype), teacher_weight), 4)
        assert torch.equal(support.ids, rounded.ids)
        assert torch.equal(support.logits, rounded.logits)
        assert loss.dtype == torch.float32
        got = [loss, *gradients(loss, hidden, weight, bias)]
        assert [grad.dtype for grad in got] == [torch.float32] * 4
        expected = [through_linear, *gradients(through_linear, hidden, weight, bias)]
        for ours, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0.05, atol=0.02)


def test_backward_twice_through_a_retained_graph_gives_the_same(linear_backend: str) -> None:
    hidden, weight = normal(5, 16).requires_grad_(), normal(30, 16, seed=1).requires_grad_()
    loss = linear_topk_rkl(hidden, weight, normal(5, 30, seed=2), 8, backend=linear_backend)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for a, b in zip(first, gradients(loss, hidden, weight), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_differentiating_twice_is_refused(which: int) -> None:
    leaves = [normal(5, 16), normal(30, 16, seed=1), normal(30, seed=3)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    hidden, weight, bias = leaves
    loss = linear_topk_rkl(hidden, weight, normal(5, 30, seed=2), 8, student_bias=bias)
    (grad,) = torch.autograd.grad(loss, leaves[which], create_graph=True)
    for leaf in leaves:
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(grad.sum(), leaf, retain_graph=True)


@pytest.mark.parametrize("trained", [0, 1])
def test_differentiating_twice_is_refused_when_compiled(trained: int) -> None:
    inputs = [normal(5, 16), normal(30, 16, seed=1)]
    leaf, teacher = inputs[trained].requires_grad_(), normal(5, 30, seed=2)

    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def compiled(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_topk_rkl(hidden, weight, teacher, 8)

    def penalised() -> None:
        loss = compiled(*inputs)
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (loss + first.square().sum()).backward()

    # As for topk_rkl: PyTorch itself refuses it from 2.13 on.
    with pytest.raises(RuntimeError, match=r"double backward|cannot be differentiated twice"):
        penalised()


def test_changing_an_input_before_backward_is_noticed() -> None:
    hidden, weight = normal(5, 16).requires_grad_(), normal(30, 16, seed=1).requires_grad_()
    loss = linear_topk_rkl(hidden * 1, weight, normal(5, 30, seed=2), 8)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_supports_memory_may_be_used_again_before_backward() -> None:
    hidden, weight = normal(5, 16).requires_grad_(), normal(30, 16, seed=1).requires_grad_()
    teacher = select_topk(normal(5, 30, seed=2), 8)
    expected = gradients(linear_topk_rkl(hidden, weight, teacher), hidden, weight)
    loss = linear_topk_rkl(hidden, weight, teacher)
    teacher.ids.fill_(3)
    teacher.logits.fill_(0)
    for ours, wanted in zip(gradients(loss, hidden, weight), expected, strict=True):
        assert torch.equal(ours, wanted)


def test_a_support_that_was_made_in_inference_mode_is_taken() -> None:
    hidden, weight = normal(5, 16).requires_grad_(), normal(30, 16, seed=1).requires_grad_()
    teacher = normal(5, 30, seed=2)
    with torch.inference_mode():
        inferred, mask = select_topk(teacher, 8), torch.ones(5, dtype=torch.bool)
        head_of_teacher = LinearLogits(normal(5, 4), normal(30, 4))
    for support in (inferred, head_of_teacher):
        k = None if support is inferred else 8
        loss = linear_topk_rkl(hidden, weight, support, k, mask=mask)
        assert torch.isfinite(gradients(loss, hidden, weight)[0]).all()


@pytest.mark.parametrize("kind", ["logits", "linear", "topk"])
def test_compiled_calls_give_the_same(kind: str) -> None:
    hidden, weight = normal(2, 5, 16).requires_grad_(), normal(30, 16, seed=1).requires_grad_()
    bias, mask = normal(30, seed=2).requires_grad_(), torch.arange(10).view(2, 5) != 3
    teacher_head = LinearLogits(normal(2, 5, 8, seed=3), normal(30, 8, seed=4), softcap=9.0)
    logits = normal(2, 5, 30, seed=5)
    teachers = {"logits": logits, "linear": teacher_head, "topk": select_topk(logits, 8)}

    def step(hidden: Any, weight: Any, bias: Any, teacher: Any, mask: Any) -> torch.Tensor:
        k = None if isinstance(teacher, TopK) else 8
        return linear_topk_rkl(
            hidden, weight, teacher, k, student_bias=bias, mask=mask, logit_softcap=4.0
        )

    arguments = (hidden, weight, bias, teachers[kind], mask)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*arguments), step(*arguments)
    assert torch.equal(got, expected)
    for ours, wanted in zip(
        gradients(got, hidden, weight, bias), gradients(expected, hidden, weight, bias), strict=True
    ):
        torch.testing.assert_close(ours, wanted)


def test_compiled_steps_are_not_compiled_again_for_new_rows_and_temperatures() -> None:
    def step(hidden: Any, weight: Any, teacher: Any, mask: Any, temperature: float) -> torch.Tensor:
        return linear_topk_rkl(hidden, weight, teacher, mask=mask, temperature=temperature)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for rows, temperature in ((4, 1.0), (7, 1.1), (9, 1.3)):
        hidden, weight = normal(rows, 16).requires_grad_(), normal(30, 16, seed=1)
        teacher, mask = select_topk(normal(rows, 30, seed=2), 8), torch.arange(rows) % 3 > 0
        arguments = (hidden, weight, teacher, mask, temperature)
        assert torch.equal(compiled(*arguments), step(*arguments))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_function_transforms_give_what_autograd_gives() -> None:
    hidden, weight, teacher = normal(3, 4, 16), normal(30, 16, seed=1), normal(3, 4, 30, seed=2)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, teacher: Any) -> torch.Tensor:
        return linear_topk_rkl(hidden, weight, teacher, 8, logit_scale=0.5)

    each = torch.vmap(torch.func.grad(loss, (0, 1)), (0, None, 0))(hidden, weight, teacher)
    for row in range(3):
        leaves = [x.clone().requires_grad_() for x in (hidden[row], weight)]
        expected = gradients(loss(*leaves, teacher[row]), *leaves)
        for ours, wanted in zip(each, expected, strict=True):
            assert torch.equal(ours[row], wanted)
    head_weight = normal(30, 8, seed=3)

    def from_heads(hidden: torch.Tensor, teacher_hidden: torch.Tensor) -> torch.Tensor:
        return loss(hidden, weight, LinearLogits(teacher_hidden, head_weight))

    teacher_hidden = normal(3, 4, 8, seed=4)
    mapped = torch.vmap(from_heads)(hidden, teacher_hidden)
    for row in range(3):
        assert torch.equal(mapped[row], from_heads(hidden[row], teacher_hidden[row]))
    heads = weight.expand(2, -1, -1)
    with pytest.raises(ValueError, match=r"student_weight.*LinearLogits.*vmap.*torch\.stack"):
        torch.vmap(loss, (None, 0, None))(hidden[0], heads, teacher[0])
    with pytest.raises(ValueError, match=r"weight.*LinearLogits.*vmap.*torch\.stack"):
        torch.vmap(lambda head: loss(hidden[0], weight, LinearLogits(hidden[0], head)))(heads)


def test_checkpointing_recomputes_the_same() -> None:
    hidden, weight = normal(5, 16).requires_grad_(), normal(30, 16, seed=1).requires_grad_()
    teacher = normal(5, 30, seed=2)
    loss = torch.utils.checkpoint.checkpoint(
        linear_topk_rkl, hidden, weight, teacher, 8, use_reentrant=False
    )
    got = gradients(loss, hidden, weight)
    for ours, wanted in zip(
        got, gradients(linear_topk_rkl(hidden, weight, teacher, 8), hidden, weight), strict=True
    ):
        assert torch.equal(ours, wanted)


# A teacher's head


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_pieces_of_a_teacher_give_what_the_whole_gives(
    monkeypatch: pytest.MonkeyPatch, backend: str, masked: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setitem(plain.WORKSPACE_BYTES, "cpu", 0)
    monkeypatch.setattr(plain, "TILE_ROWS", 3)
    hidden, weight = integers(2, 5, 9, dtype=dtype), integers(50, 9, seed=1, dtype=dtype)
    bias = integers(50, seed=2, dtype=dtype)
    mask = torch.arange(10).view(2, 5) % 3 != 1 if masked else None
    options: dict[str, Any] = {"mask": mask, "banned_ids": [3, 49], "vocab_size": 48}
    for offset in (None, bias):
        topk = select_topk(
            LinearLogits(hidden, weight, offset), 7, with_logsumexp=True, backend=backend, **options
        )
        logits = linear(hidden.float(), weight.float(), None if offset is None else offset.float())
        expected = select_topk(logits, 7, with_logsumexp=True, backend=backend, **options)
        assert torch.equal(topk.ids, expected.ids)
        assert torch.equal(topk.logits, expected.logits)
        torch.testing.assert_close(topk.logsumexp, expected.logsumexp)


def test_scale_and_softcap_come_after_the_selection() -> None:
    # Capped, the largest are equal in float32; the selection still tells them apart.
    hidden, weight = torch.ones(1, 1), torch.tensor([[50.0], [90.0], [70.0], [-3.0]])
    topk = select_topk(LinearLogits(hidden, weight, softcap=2.0, scale=2.0), 3)
    assert topk.ids.tolist() == [[1, 2, 0]]
    assert topk.logits.tolist() == [[2.0, 2.0, 2.0]]


def test_a_teacher_head_is_a_pytree_and_has_a_shape() -> None:
    teacher = LinearLogits(normal(2, 3, 8), normal(30, 8), normal(30), softcap=3.0, scale=0.5)
    assert (teacher.shape, teacher.vocab, teacher.device.type) == ((2, 3), 30, "cpu")
    doubled = torch.utils._pytree.tree_map(lambda x: 2 * x, teacher)
    assert torch.equal(doubled.bias, 2 * teacher.bias)
    assert (doubled.softcap, doubled.scale) == (3.0, 0.5)
    bare = LinearLogits(normal(2, 3, 8), normal(30, 8))
    assert torch.utils._pytree.tree_map(lambda x: x, bare).bias is None


# What is refused

HIDDEN, WEIGHT, TEACHER = normal(2, 16), normal(30, 16), normal(2, 30)
TRANSPOSED = normal(16, 30).t()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: linear_topk_rkl([1.0], WEIGHT, TEACHER), TypeError, "student_hidden is a list"),
        (lambda: linear_topk_rkl(HIDDEN, None, TEACHER), TypeError, "student_weight is a NoneType"),
        (lambda: linear_topk_rkl(HIDDEN, WEIGHT.t(), TEACHER), ValueError,
         r"student_hidden has shape \(2, 16\) and student_weight \(16, 30\)"),
        (lambda: linear_topk_rkl(HIDDEN[0, 0], WEIGHT, TEACHER), ValueError,
         r"expected \(..., H\)"),
        (lambda: linear_topk_rkl(HIDDEN, WEIGHT[:0], TEACHER), ValueError, "V, H of 1 or more"),
        (lambda: linear_topk_rkl(HIDDEN, TRANSPOSED, TEACHER), ValueError,
         "student_weight has stride 30 along H, allowed is 1"),
        (lambda: linear_topk_rkl(HIDDEN, WEIGHT.bfloat16(), TEACHER), TypeError,
         "torch.bfloat16, student_hidden torch.float32; convert one"),
        (lambda: linear_topk_rkl(HIDDEN.long(), WEIGHT.long(), TEACHER), TypeError,
         "student_hidden has dtype torch.int64"),
        (lambda: linear_topk_rkl(HIDDEN, WEIGHT, TEACHER, student_bias=normal(29)), ValueError,
         r"student_bias has shape \(29,\), expected one per id: \(30,\)"),
        (lambda: linear_topk_rkl(HIDDEN, WEIGHT.to("meta"), TEACHER), ValueError,
         "student_weight is on meta, student_hidden on cpu"),
        (lambda: linear_topk_rkl(HIDDEN, WEIGHT, TEACHER[:1]), ValueError,
         r"teacher has leading shape \(1,\), the student \(2,\)"),
        (lambda: linear_topk_rkl(HIDDEN, WEIGHT, LinearLogits(HIDDEN[:1], WEIGHT)), ValueError,
         r"teacher has leading shape \(1,\), the student \(2,\)"),
        (lambda: linear_topk_rkl(HIDDEN, WEIGHT, TEACHER, 31), ValueError, "k is 31, allowed is 1"),
        (lambda: linear_topk_rkl(HIDDEN, WEIGHT, TEACHER, logit_softcap=0), ValueError,
         "logit_softcap is 0, allowed are numbers above 0"),
        (lambda: linear_topk_rkl(HIDDEN, WEIGHT, TEACHER, logit_scale=-1.0), ValueError,
         "logit_scale is -1.0"),
        (lambda: linear_topk_rkl(HIDDEN, WEIGHT, TEACHER, logit_scale="2"), TypeError,
         "logit_scale is a str"),
        (lambda: linear_topk_rkl(HIDDEN, WEIGHT, TEACHER, logit_scale=torch.tensor(2.0)), TypeError,
         "logit_scale is a Tensor, expected a number"),
        (lambda: linear_topk_rkl(HIDDEN, WEIGHT, (HIDDEN, WEIGHT)), TypeError,
         "teacher is a tuple, expected .* a TopK or a LinearLogits"),
        (lambda: linear_topk_rkl(HIDDEN, WEIGHT, TEACHER, mask=torch.ones(3).bool()), ValueError,
         r"mask has shape \(3,\)"),
        (lambda: linear_topk_rkl(HIDDEN, WEIGHT, TEACHER, backend="none"), ValueError,
         "'none' is not in this version"),
        (lambda: linear_topk_rkl(HIDDEN.double(), WEIGHT.double(), TEACHER, backend="cpu"),
         ValueError, "float64 is not float16"),
        (lambda: LinearLogits(HIDDEN, WEIGHT, scale=0.0), ValueError, "LinearLogits scale is 0.0"),
        (lambda: LinearLogits(HIDDEN, WEIGHT, softcap=INF), ValueError, "LinearLogits softcap is"),
        (lambda: LinearLogits(HIDDEN, WEIGHT[:, 1:]), ValueError, "LinearLogits weight"),
        (lambda: select_topk(LinearLogits(HIDDEN, WEIGHT), 31), ValueError, "k is 31"),
        (lambda: topk_rkl(LinearLogits(HIDDEN, WEIGHT), TEACHER, inplace_grad=True), ValueError,
         "student is hidden states and a head"),
        (lambda: linear_topk_rkl(HIDDEN, WEIGHT, TEACHER, tau=2.0), TypeError,
         r"linear_topk_rkl\(\) got an unexpected keyword argument 'tau'"),
    ],
)  # fmt: skip
def test_what_is_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(backends.load("cuda").unavailable() is not None, reason="no CUDA module")
def test_a_backend_without_such_kernels_says_which_have_them() -> None:
    if backends.load("cuda").refusal(torch.device("cpu"), (torch.float32,), 1) is not None:
        pytest.skip("the CUDA backend is not emulated")
    with pytest.raises(ValueError, match=r"no kernels for hidden states.*'cpu', 'triton'"):
        linear_topk_rkl(HIDDEN, WEIGHT, TEACHER, backend="cuda")


def test_the_reference_says_why_it_serves_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = linear_topk_rkl(HIDDEN, WEIGHT, TEACHER, 5, backend="reference")
    monkeypatch.delattr(NativeLinear, "gather_dot")
    backends._warn_if_slow.cache_clear()
    with pytest.warns(UserWarning, match="slowly.*no kernels for hidden states"):
        found = linear_topk_rkl(HIDDEN, WEIGHT, TEACHER, 5)
    # Its logits, but the CPU's divergence: a row of 5 entries in float32, some 16 roundings off.
    torch.testing.assert_close(found, expected, rtol=2**-20, atol=0)
    backends._warn_if_slow.cache_clear()


def test_one_entry_warns_at_the_call() -> None:
    with pytest.warns(UserWarning, match="k=1") as caught:
        linear_topk_rkl(HIDDEN, WEIGHT, TEACHER, 1)
    assert caught[0].filename == __file__


def test_no_rows_give_no_loss(linear_backend: str) -> None:
    hidden, weight = normal(0, 16).requires_grad_(), normal(30, 16).requires_grad_()
    loss = linear_topk_rkl(hidden, weight, normal(0, 30), 4, backend=linear_backend)
    assert loss == 0
    hidden_grad, weight_grad = gradients(loss, hidden, weight)
    assert hidden_grad.shape == (0, 16)
    assert torch.equal(weight_grad, torch.zeros(30, 16))
