"""Every backend against the float64 oracle, over everything a call can vary."""

from __future__ import annotations

import itertools
import math

import bridge
import numpy as np
import pytest
import torch
from effort import INTERPRETED, SANITIZED, examples
from hypothesis import given, settings

from opd_kernels import select_topk, topk_rkl
from opd_kernels.fuzz import cases
from opd_kernels.testing import Case, Inputs, check, make_inputs, oracle
from opd_kernels.testing.inputs import CONTENTS

# test_linear.py and test_divergences.py have the others.
LOGITS = {"form": ("logits",), "family": (False,)}
# Beside any loss.
WATCHED = {"form": ("logits",), "watched": (True,)}

# Numbers of cases are those of one run; the run under sanitizers draws as many again.


@given(case=cases(float64=False, only=LOGITS))
@settings(max_examples=examples(2000))
def test_any_call_is_within_its_budget(backend: str, case: Case) -> None:
    check(case, backend)


@given(case=cases(only=LOGITS))
@settings(max_examples=examples(300))
def test_any_call_is_within_its_budget_on_the_default_backend(case: Case) -> None:
    check(case)


@given(case=cases(float64=False, only=LOGITS))
@settings(max_examples=examples(300))
def test_any_call_is_within_its_budget_on_every_instruction_set(
    instruction_set: str, case: Case
) -> None:
    check(case, "cpu")


@given(case=cases(float64=False, only=WATCHED))
@settings(max_examples=examples(200))
def test_statistics_and_log_probs_of_any_call(case: Case) -> None:
    check(case, "cpu")


@given(case=cases(only={**WATCHED, "teacher": ("logits",)}))
@settings(max_examples=examples(200))
def test_statistics_and_log_probs_of_any_call_of_the_reference(case: Case) -> None:
    check(case, "reference")


DTYPES = ("float32", "float16", "bfloat16")
TIERS = (1, 2, 31, 32, 64, 128, 129, 500, 1024)
NASTY = list(itertools.product(TIERS, CONTENTS, DTYPES))
# Every pair of the three at least once: for the interpreter, where a row takes a sixth of a second,
# and for sanitizers, which look at accesses and not at numbers. A device gets all.
FEW = (INTERPRETED or SANITIZED) and not bridge.DEVICE
PAIRS = [
    (k, content, DTYPES[(at + turn) % len(DTYPES)])
    for at, content in enumerate(CONTENTS)
    for turn, k in enumerate(TIERS)
]


@pytest.mark.parametrize(("k", "content", "dtype"), PAIRS if FEW else NASTY)
def test_nasty_teachers_of_real_width(backend: str, content: str, dtype: str, k: int) -> None:
    # The interpreter takes each row by itself in any case, and a third of a second for two.
    case = Case(
        rows=(1 if INTERPRETED else 2,),
        student_vocab=20011,
        teacher_vocab=20011,
        k=k,
        teacher_dtype=dtype,
        teacher_content=content,
        seed=k,
    )
    check(case, backend)


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.7, 0.5)], ids=["equal", "unequal"])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.1, 0.2, 0.3, 0.6, 3.0])
def test_every_distance_of_the_student_from_the_teacher(
    backend: str, size: float, temperatures: tuple[float, float]
) -> None:
    # Where p is nearly q, log p - log q is computed in another way than where it is not.
    options = dict.fromkeys(("mask", "weight", "banned_ids", "vocab_size"))
    options |= {"reduction": "none"}
    options |= dict(zip(("temperature", "teacher_temperature"), temperatures, strict=True))
    generator = torch.Generator().manual_seed(0)
    rows = 6 if INTERPRETED else 40
    teacher = 3 * torch.randn(rows, 300, generator=generator)
    noise = size * torch.randn(rows, 300, generator=generator)
    student = teacher * (temperatures[0] / temperatures[1]) + noise - 20
    expected = oracle(Inputs(student, teacher, 64, False, options))
    student.requires_grad_()
    loss = topk_rkl(student, teacher, 64, backend=backend, **options)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert (abs(loss.detach().numpy() - expected.loss) <= expected.loss_budget).all()
    wanted, budget = expected.grads["student"]
    assert (abs(grad.numpy() - wanted) <= budget).all()


@pytest.mark.parametrize(
    "vocab", [*range(1, 70), 127, 128, 129, 1023, 1024, 1025, 2047, 2049, 4097]
)
def test_every_vocabulary_edge(instruction_set: str, vocab: int) -> None:
    for k in {1, min(vocab, 7), vocab} - set(range(1025, 5000)):
        for dtype in ("float32", "bfloat16"):
            case = Case(
                rows=(2,),
                student_vocab=vocab,
                teacher_vocab=vocab,
                k=k,
                teacher_dtype=dtype,
                teacher_content="quantised",
                teacher_layout="sliced",
                banned="few",
            )
            check(case, "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_values_of_a_half_dtype_are_ordered_as_a_stable_sort_orders_them(
    instruction_set: str, dtype: torch.dtype
) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    shuffled = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    rows = shuffled.view(64, 1024)
    topk = select_topk(rows, 1024, backend="cpu")
    order = torch.sort(rows.float(), dim=-1, descending=True, stable=True).indices
    assert torch.equal(topk.ids.long(), order)


def test_gradients_round_as_torch_rounds(instruction_set: str) -> None:
    # Upstream gradients that reach subnormals, overflow and every rounding tie of fp16 and bf16.
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float16, torch.bfloat16):
        n = 4096
        student = torch.randn(n, 8, generator=generator).to(dtype)
        teacher = torch.randn(n, 8, generator=generator)
        upstream = torch.exp2(torch.rand(n, generator=generator) * 60 - 35)
        grads = []
        for student_dtype in (dtype, torch.float32):
            leaf = student.detach().to(student_dtype).requires_grad_()
            topk_rkl(leaf, teacher, 8, reduction="none", backend="cpu").backward(upstream)
            grads.append(leaf.grad)
        assert torch.equal(grads[0], grads[1].to(dtype))


def test_rows_reach_beyond_two_to_the_31_elements(backend: str) -> None:
    import mmap

    # Two rows 2^31 + 16 elements apart in reserved memory, of which only the rows are ever touched.
    stride, vocab = 2**31 + 16, 300
    pages = mmap.mmap(-1, 2 * stride * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    memory = torch.frombuffer(pages, dtype=torch.bfloat16)
    far = memory.as_strided((2, vocab), (stride, 1))
    far.copy_(torch.randn(2, vocab))
    near = far.clone()
    for student, teacher in ((far, near), (near, far)):
        a = topk_rkl(student, teacher, 9, reduction="none", backend=backend)
        b = topk_rkl(near, near, 9, reduction="none", backend=backend)
        assert torch.equal(a, b)


def _errors(inputs: Inputs, loss: torch.Tensor, grad: torch.Tensor) -> tuple[float, float]:
    expected = oracle(inputs)
    return (
        float(abs(loss.detach().double().numpy() - expected.loss).max()),
        float(abs(grad.double().numpy() - expected.grads["student"][0]).max()),
    )


@pytest.mark.parametrize("content", ["normal", "quantised", "offset"])
def test_errors_are_at_most_twice_those_of_eager_float32(backend: str, content: str) -> None:
    case = Case(
        rows=(50 if INTERPRETED else 400,),
        student_vocab=500,
        teacher_vocab=500,
        k=32,
        student_content=content,
        teacher_content=content,
        reduction="none",
        temperature="float",
    )
    inputs = make_inputs(case)
    temperature = inputs.options["temperature"]
    z = inputs.student.clone().requires_grad_()
    ids = select_topk(inputs.teacher, 32).ids.long()
    log_p = torch.log_softmax(z.gather(-1, ids) / temperature, -1)
    log_q = torch.log_softmax(inputs.teacher.gather(-1, ids) / temperature, -1)
    eager = (log_p.exp() * (log_p - log_q)).sum(-1)
    eager.sum().backward()

    student = inputs.student.clone().requires_grad_()
    loss = topk_rkl(student, inputs.teacher, 32, backend=backend, **inputs.options)
    loss.sum().backward()
    ours, theirs = _errors(inputs, loss, student.grad), _errors(inputs, eager, z.grad)
    assert ours[0] <= 2 * theirs[0]
    assert ours[1] <= 2 * theirs[1]


def test_budget_covers_what_the_oracle_loses_itself(backend: str) -> None:
    # One entry holds nearly all: the loss is below the last bit of the logarithms that make it.
    case = Case(
        rows=(8,),
        student_vocab=2,
        teacher_vocab=2,
        k=2,
        student_dtype="float16",
        teacher_dtype="float16",
        student_content="close",
        teacher_content="clustered",
        teacher="topk_int32",
        temperature="float",
        reduction="none",
        upstream="random",
        seed=297891,
    )
    check(case, backend)


def test_spans_that_overflow_float64_have_an_infinite_budget() -> None:
    case = Case(
        rows=(8,),
        student_vocab=5,
        teacher_vocab=5,
        k=3,
        student_dtype="float64",
        teacher_dtype="float16",
        student_content="extreme",
        teacher_content="clustered",
        teacher="topk_int64",
        temperature="float",
        reduction="none",
        seed=420302,
    )
    expected = oracle(make_inputs(case))
    assert not np.isnan(expected.loss).any()
    assert np.isinf(expected.loss_budget).any()
    check(case, "reference")


def test_gradients_may_overflow_where_their_budget_does() -> None:
    options = dict.fromkeys(("mask", "weight", "banned_ids", "vocab_size"))
    options |= {"reduction": "none", "temperature": 1e-6}
    student = torch.zeros(1, 3, dtype=torch.float16)
    teacher = torch.tensor([[0.0, -2000.0, -1000.0]])
    wanted, budget = oracle(Inputs(student, teacher, 3, False, options)).grads["student"]
    assert abs(wanted[0, 2]) < 65504  # but for errors of 1e9 / T it would be 0
    assert np.isinf(budget[0, 2])


def test_budget_rejects_arithmetic_in_bfloat16() -> None:
    case = Case(rows=(50,), student_vocab=500, teacher_vocab=500, k=32, reduction="none")
    inputs = make_inputs(case)
    expected = oracle(inputs)
    ids = torch.from_numpy(expected.support)
    log_p = torch.log_softmax(inputs.student.bfloat16().gather(-1, ids), -1)
    log_q = torch.log_softmax(inputs.teacher.bfloat16().gather(-1, ids), -1)
    loss = (log_p.exp() * (log_p - log_q)).sum(-1).double().numpy()
    assert (abs(loss - expected.loss) > expected.loss_budget).mean() > 0.9
    # And it is no wider than float32 needs: within a factor of 100 of one rounding of the loss.
    assert np.median(expected.loss_budget / abs(expected.loss)) < 100 * 2**-24
    assert math.isfinite(expected.grads["student"][1].max())
