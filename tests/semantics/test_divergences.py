"""The divergence family: every member on every backend that has it, against float64.

The oracle itself is checked against autograd, and the sampled estimate by enumeration.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
import mmap
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from effort import INTERPRETED, examples, rows, some
from hypothesis import given, settings

from opd_kernels import (
    Divergence,
    LinearLogits,
    TopK,
    backends,
    entries,
    forward_kl,
    jsd,
    mixed,
    reverse_kl,
    select_topk,
    skew_forward_kl,
    skew_reverse_kl,
    topk_divergence,
    topk_rkl,
)
from opd_kernels._arguments import Allowed, Objective, Tails, Temperature
from opd_kernels.divergences import OUTSIDE
from opd_kernels.fuzz import cases
from opd_kernels.testing import Case, Expected, Inputs, check, make_inputs, oracle
from opd_kernels.testing.inputs import CONTENTS, MEMBERS, SAMPLED, WITHOUT_SKEW

INF, NAN = torch.inf, torch.nan
FULL = [outside for outside in OUTSIDE if outside != "renormalize"]
# Every member and what may become of the probability outside of its support.
PAIRS = [
    (member, outside)
    for outside in OUTSIDE
    for member in {"generalize": WITHOUT_SKEW, "sample": SAMPLED}.get(outside, MEMBERS)
]
FEW = rows(6)
FAMILY = {"form": ("logits",), "family": (True,)}
# Longer supports take the interpreter minutes.
SHORT = {"k": (1, 100)} if INTERPRETED else {}


def normal(
    *shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def loss_and_grad(
    student: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-row losses and the gradient of their sum."""
    student = student.detach().requires_grad_()
    loss = topk_divergence(student, *args, reduction="none", **kwargs)
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


def token(outside: str, rows: int, seed: int = 3) -> dict[str, torch.Tensor]:
    """What ``outside`` needs besides."""
    if outside != "sample":
        return {}
    return {"token_ids": torch.randint(40, (rows,), generator=torch.manual_seed(seed))}


def divergence_for(outside: str) -> Divergence:
    """One with every part that ``outside`` allows."""
    parts = {"generalize": (0.5, 0.75, 0.0, 0.0), "sample": (1.0, 0.0, 0.0, 0.0)}
    return Divergence(*parts.get(outside, (0.5, 0.25, 1.5, 0.75)), beta=0.3)


# The oracle


def eager(
    z: torch.Tensor, t: torch.Tensor, ids: torch.Tensor, divergence: Divergence, outside: str
) -> torch.Tensor:
    """The loss of one row by its formulas, z and t divided by their temperatures already."""
    rest = torch.ones(len(z), dtype=torch.bool).index_fill(0, ids, False)
    if outside == "renormalize":
        a, b = (x[ids].log_softmax(-1) for x in (z, t))
    else:
        a, b = (x.log_softmax(-1)[ids] for x in (z, t))
    if outside == "bucket":
        a, b = (
            torch.cat((x, (y[rest].logsumexp(-1) - y.logsumexp(-1))[None]))
            for x, y in ((a, z), (b, t))
        )
    if divergence.logp_floor is not None:
        a, b = (x.clamp(min=divergence.logp_floor) for x in (a, b))
    beta, clip = divergence.beta, divergence.log_ratio_clip
    m = torch.logaddexp(b + math.log(beta), a + math.log(1 - beta))

    def clipped(ratio: torch.Tensor) -> torch.Tensor:
        return ratio if clip is None else ratio.clamp(-clip, clip)

    ratio = clipped(a - b)
    p, q = a.exp(), b.exp()
    loss = divergence.reverse * p * (ratio.detach() if divergence.stop_ratio else ratio)
    loss = loss + divergence.forward * q * clipped(b - a)
    loss = loss + divergence.skew_reverse * p * clipped(a - m)
    loss = loss + divergence.skew_forward * q * clipped(b - m)
    if outside == "generalize":
        loss = loss + (divergence.reverse - divergence.forward) * (q - p)
    return loss.sum()


def inputs_of(student: torch.Tensor, teacher: Any, k: int, **options: Any) -> Inputs:
    """Inputs of per-row losses in float64."""
    family: dict[str, Any] = {
        "support": "teacher", "include_token": False, "token_ids": None, "background": "exact",
    }  # fmt: skip
    family |= {name: options.pop(name) for name in list(options) if name in {*family, "outside"}}
    family["divergence"] = options.pop("divergence")
    given = dict.fromkeys(("mask", "weight", "banned_ids", "vocab_size"))
    given |= {"reduction": "none", "temperature": 1.0, **options}
    return Inputs(student, teacher, k, True, given, family=family)


EDGES = {
    "plain": {},
    "clipped": {"log_ratio_clip": 0.7},
    "floored": {"logp_floor": -2.5},
    "stopped": {"stop_ratio": True},
    "all": {"log_ratio_clip": 1.5, "logp_floor": -3.0, "stop_ratio": True},
}


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("outside", [x for x in OUTSIDE if x != "sample"])
def test_the_oracle_is_what_autograd_gives(outside: str, edges: str) -> None:
    vocab, k, temperature, teacher_temperature = 40, 9, 0.7, 1.3
    weights = [*np.eye(4), (0.5, 0.25, 1.5, 0.75)]
    if outside == "generalize":
        weights = [(1, 0, 0, 0), (0, 1, 0, 0), (0.5, 0.75, 0, 0)]
    for seed, numbers in enumerate(weights):
        divergence = Divergence(*map(float, numbers), beta=0.3, **EDGES[edges])
        for scale in (0.01, 3.0):
            teacher = normal(vocab, seed=2 * seed + 1, scale=1.5, dtype=torch.float64)
            noise = normal(vocab, seed=2 * seed, scale=scale, dtype=torch.float64)
            student = (teacher * (temperature / teacher_temperature) + noise).requires_grad_()
            ids = select_topk(teacher, k).ids.long()
            expected = oracle(
                inputs_of(
                    student.detach()[None],
                    teacher[None],
                    k,
                    divergence=divergence,
                    outside=outside,
                    temperature=temperature,
                    teacher_temperature=teacher_temperature,
                )
            )
            loss = eager(
                student / temperature, teacher / teacher_temperature, ids, divergence, outside
            )
            (grad,) = torch.autograd.grad(loss, student)
            assert expected.loss[0] == pytest.approx(loss.item(), rel=1e-10, abs=1e-14)
            np.testing.assert_allclose(expected.grads["student"][0][0], grad, rtol=1e-9, atol=1e-13)
            # And its budget is one of float64.
            assert expected.loss_budget[0] < 1e-12
            assert expected.grads["student"][1].max() < 1e-11


@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_oracles_sampled_estimate_has_the_full_gradient_as_its_mean(k: int) -> None:
    vocab, temperature = 7, 1.7
    student = normal(vocab, dtype=torch.float64).requires_grad_()
    teacher = normal(vocab, seed=1, dtype=torch.float64)
    log_p = (student / temperature).log_softmax(-1)
    log_q = (teacher / temperature).log_softmax(-1)
    loss = (log_p.exp() * (log_p - log_q)).sum()
    (expected,) = torch.autograd.grad(loss, student)
    p = log_p.detach().exp().numpy()
    options = {"divergence": reverse_kl(), "outside": "sample", "temperature": temperature}
    rows = inputs_of(
        student.detach().expand(vocab, vocab),
        teacher.expand(vocab, vocab),
        k,
        token_ids=torch.arange(vocab),
        banned_ids=[int(teacher.argmin()), int(teacher.argmax())],
        **options,
    )
    found = oracle(rows)
    np.testing.assert_allclose(p @ found.grads["student"][0], expected, rtol=1e-11, atol=1e-14)
    assert p @ found.loss == pytest.approx(loss.item(), rel=1e-11)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_budgets_reject_arithmetic_in_bfloat16(outside: str) -> None:
    student, teacher = normal(40, 500), normal(40, 500, seed=1)
    options = {"divergence": divergence_for(outside), "outside": outside, **token(outside, 40)}
    expected = oracle(dataclasses.replace(inputs_of(student, teacher, 32, **options), wide=False))
    rounded = oracle(inputs_of(student.bfloat16(), teacher.bfloat16(), 32, **options))
    assert (abs(rounded.loss - expected.loss) > expected.loss_budget).mean() > 0.9
    grad, budget = expected.grads["student"]
    changed = (abs(rounded.grads["student"][0] - grad) > budget)[abs(grad) > 1e-6]
    assert changed.mean() > 0.9


@pytest.mark.parametrize("outside", [x for x in OUTSIDE if x != "sample"])
def test_budgets_hold_what_eager_float32_loses_and_not_much_more(outside: str) -> None:
    student, teacher = normal(40, 500), normal(40, 500, seed=1)
    divergence = divergence_for(outside)
    inputs = inputs_of(student, teacher, 32, divergence=divergence, outside=outside)
    expected = oracle(dataclasses.replace(inputs, wide=False))
    wanted, budget = expected.grads["student"]
    student.requires_grad_()
    rows = zip(student, teacher, torch.from_numpy(expected.support), strict=True)
    losses = torch.stack([eager(z, t, ids, divergence, outside) for z, t, ids in rows])
    (grad,) = torch.autograd.grad(losses.sum(), student)
    loss_error = abs(losses.detach().double().numpy() - expected.loss)
    error = abs(grad.double().numpy() - wanted)
    assert (loss_error <= expected.loss_budget).all()
    assert (error <= budget).all()
    # Worst cases of a hundred roundings each: two orders of magnitude above the usual.
    assert np.median(expected.loss_budget) < 500 * np.median(loss_error)
    assert np.median(budget.max(-1)) < 500 * np.median(error.max(-1))


def test_budgets_reject_log_ratios_that_are_differences_of_float32_logarithms() -> None:
    # Late in training the log ratio is the signal, and its rounding the noise.
    teacher = normal(30, 400)
    student = teacher + normal(30, 400, seed=1, scale=1e-3) + 5
    options = {"divergence": mixed(0.25), "outside": "renormalize"}
    expected = oracle(dataclasses.replace(inputs_of(student, teacher, 32, **options), wide=False))
    ids = torch.from_numpy(expected.support)
    log_p, log_q = (x.gather(-1, ids).log_softmax(-1) for x in (student, teacher))
    values = (0.75 * log_p.exp() - 0.25 * log_q.exp()) * (log_p - log_q)
    wrong = values.sum(-1).double().numpy()
    assert (abs(wrong - expected.loss) > expected.loss_budget).mean() > 0.5


# Every member within its budget


@given(case=cases(float64=False, only=FAMILY | SHORT))
@settings(max_examples=examples(500))
def test_any_member_is_within_its_budget(backend: str, case: Case) -> None:
    check(case, backend)


@given(case=cases(float64=True, only=FAMILY))
@settings(max_examples=200)
def test_any_member_is_within_its_budget_on_the_default_backend(case: Case) -> None:
    check(case)


@given(case=cases(float64=False, only={**FAMILY, "form": ("linear",)}))
@settings(max_examples=examples(100))
def test_any_member_of_hidden_states_is_within_its_budget(linear_backend: str, case: Case) -> None:
    check(case, linear_backend)


@given(case=cases(float64=False, only={**FAMILY, "form": ("linear",), "watched": (True,)}))
@settings(max_examples=examples(60))
def test_statistics_and_log_probs_of_any_member_of_hidden_states(
    linear_backend: str, case: Case
) -> None:
    check(case, linear_backend)


@pytest.mark.parametrize(
    ("turn", "member", "outside", "dtype"),
    [
        (turn, *pair, dtype)
        for turn, pair in enumerate(PAIRS)
        for dtype in some(("float32", "float16", "bfloat16"), turn)
    ],
)
def test_every_member_with_temperatures_and_vocabularies_of_their_own(
    backend: str, turn: int, member: str, outside: str, dtype: str
) -> None:
    case = Case(
        rows=(rows(5),),
        student_vocab=301,
        teacher_vocab=333,
        k=17,
        student_dtype=dtype,
        teacher_dtype=dtype,
        mask="bool",
        temperature="rows",
        teacher_temperature="float",
        weight="uniform",
        banned="few",
        divergence=member,
        outside=outside,
        token="any" if outside == "sample" else "none",
        beta=0.1,
        reduction="none",
        upstream="random",
    )
    check(case, backend)
    changes: tuple[dict[str, Any], ...] = (
        {"support": "student", "teacher_temperature": "rows", "student_vocab": 347},
        {"teacher": "topk_int64", "teacher_temperature": "float", "carried": "tail"},
        {"teacher": "topk_int32", "teacher_temperature": "one", "carried": "logsumexp"},
        {"student_content": "close", "temperature": "one", "teacher_temperature": None},
        {"clip": 0.5, "floor": -2.0, "vocab_size": 290, "inplace": True},
    )
    for changed in some(changes, turn):
        check(dataclasses.replace(case, seed=len(changed), **changed), backend)


@pytest.mark.parametrize("edges", [edges for edges in EDGES if edges != "plain"])
@pytest.mark.parametrize("outside", OUTSIDE)
def test_clips_floors_and_stopped_ratios(backend: str, outside: str, edges: str) -> None:
    student, teacher = (normal(rows(8), 100, seed=seed, scale=2.0) for seed in range(2))
    plain = divergence_for(outside)
    for clip, floor in some(((0.7, -4.0), (0.05, -1.0), (3.0, -0.2))):
        wanted = EDGES[edges]
        divergence = plain._replace(
            stop_ratio="stop_ratio" in wanted,
            log_ratio_clip=clip if "log_ratio_clip" in wanted else None,
            logp_floor=floor if "logp_floor" in wanted else None,
        )
        check_rows(backend, student, teacher, 12, outside, divergence=divergence)
        # Entries and tail on both sides of the edge.
        check_rows(backend, student * 0.3, teacher * 0.3, 60, outside, divergence=divergence)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("outside", OUTSIDE)
def test_nasty_contents_on_either_side(backend: str, outside: str, content: str) -> None:
    member = {"generalize": "mixed", "sample": "reverse_kl"}.get(outside, "all")
    case = Case(
        rows=(rows(4),),
        student_vocab=1025,
        teacher_vocab=1025,
        k=33,
        divergence=member,
        outside=outside,
        token="any" if outside == "sample" else "none",
        reduction="none",
    )
    ways = itertools.product(("student", "teacher"), ("float32", "bfloat16"))
    for side, dtype in some(ways, CONTENTS.index(content) + OUTSIDE.index(outside)):
        changed = {f"{side}_content": content, f"{side}_dtype": dtype}
        check(dataclasses.replace(case, **changed), backend)


@pytest.mark.parametrize("outside", FULL)
def test_every_vocabulary_edge(instruction_set: str, outside: str) -> None:
    member = {"generalize": "mixed", "sample": "reverse_kl"}.get(outside, "all")
    for vocab in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 1023, 1025, 4097):
        for k in {1, min(vocab, 7), min(vocab, 1024 - (outside == "sample"))}:
            for dtype in ("float32", "bfloat16"):
                case = Case(
                    rows=(2,),
                    student_vocab=vocab,
                    teacher_vocab=vocab,
                    k=k,
                    student_dtype=dtype,
                    teacher_dtype=dtype,
                    student_layout="sliced",
                    banned="few",
                    divergence=member,
                    outside=outside,
                    token="any" if outside == "sample" else "none",
                )
                check(case, "cpu")


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.2, 1.0, 4.0])
def test_every_distance_of_the_student_from_the_teacher(
    backend: str, outside: str, size: float
) -> None:
    teacher = normal(rows(20), 300)
    student = teacher + normal(rows(20), 300, seed=1, scale=size) - 20
    check_rows(backend, student, teacher, 24, outside)


@pytest.mark.parametrize("outside", ["renormalize", "bucket", "generalize", "sample"])
def test_late_in_training_gradients_keep_their_digits(backend: str, outside: str) -> None:
    # A log ratio of 1e-4 is the signal. The difference of two float32 logarithms, or of p and q,
    # has an error of about 1e-6 and leaves two digits.
    teacher = normal(rows(20), 2000, scale=1.5)
    student = teacher + normal(rows(20), 2000, seed=1, scale=1e-4) + 3
    options = {"divergence": divergence_for(outside), "outside": outside}
    if outside == "sample":
        options["token_ids"] = select_topk(teacher, 1).ids[:, 0]
    expected = oracle(inputs_of(student, teacher, 64, **options))
    loss, grad = loss_and_grad(student, teacher, 64, backend=backend, **options)
    wanted = torch.from_numpy(expected.grads["student"][0])
    size = wanted.abs().amax(-1, keepdim=True)
    assert ((grad - wanted).abs() <= 1e-3 * size).all()
    assert ((loss - torch.from_numpy(expected.loss)).abs() <= 1e-8).all()


def check_rows(
    backend: str, student: torch.Tensor, teacher: Any, k: int, outside: str, **options: Any
) -> Expected:
    """Per-row losses and gradients, by default of the member with every part, against float64."""
    member = {"divergence": divergence_for(outside), "outside": outside}
    options = {**member, **token(outside, len(student)), **options}
    expected = oracle(dataclasses.replace(inputs_of(student, teacher, k, **options), wide=False))
    given_k = None if isinstance(teacher, TopK) else k
    loss, grad = loss_and_grad(student, teacher, given_k, backend=backend, **options)
    with np.errstate(invalid="ignore"):
        close = abs(loss.numpy() - expected.loss) <= expected.loss_budget
    assert (close | (loss.numpy() == expected.loss)).all()
    wanted, budget = expected.grads["student"]
    assert (abs(grad.double().numpy() - wanted) <= budget).all()
    assert (grad.double().numpy()[budget == 0] == 0).all()
    return expected


# Tails


def with_tail(mass: float, rows: int, vocab: int, k: int, seed: int) -> torch.Tensor:
    """Logits of which the k best hold all but ``mass``."""
    logits = normal(rows, vocab, seed=seed, scale=1.0, dtype=torch.float64)
    logits[:, :k] += 30
    rest, best = logits[:, k:].logsumexp(-1), logits[:, :k].logsumexp(-1)
    logits[:, k:] += (best - rest + math.log(mass))[:, None]
    return logits.float()


@pytest.mark.parametrize("outside", ["renormalize", "truncate", "bucket", "generalize", "sample"])
def test_slopes_whose_sum_overflows_make_no_nan(backend: str, outside: str) -> None:
    """An entry whose p is 0 gets 0 of a sum beyond float32."""
    student = torch.tensor([[0.0, 0.0, -3e4, 0.0, -3e4, -3e4]], requires_grad=True)
    teacher = torch.tensor([[-3e38, -3e38, 3e38, -3.1e38, -3.2e38, -3.2e38]])
    of = {"divergence": Divergence(4.0)} if outside != "sample" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = topk_divergence(
            student, teacher, 3, outside=outside, token_ids=torch.tensor([3]),
            backend=backend, **of,
        )  # fmt: skip
    loss.backward()
    assert not loss.isnan()
    assert student.grad is not None
    assert not student.grad.isnan().any()


@pytest.mark.parametrize("outside", ["truncate", "bucket"])
def test_an_upstream_that_overflows_makes_no_nan(backend: str, outside: str) -> None:
    student, teacher = torch.randn(2, 2, 40, generator=torch.Generator().manual_seed(0))
    student[:, 20:] = -INF
    student.requires_grad_()
    loss = topk_divergence(
        student,
        teacher,
        8,
        divergence="forward_kl",
        outside=outside,
        temperature=0.01,
        reduction="none",
        backend=backend,
    )
    upstream = torch.full((2,), 3e38)
    assert not torch.autograd.grad(loss, student, upstream)[0].isnan().any()


@pytest.mark.parametrize("gap", [86.0, 89.0, 120.0, 900.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_tail_that_the_student_all_but_rules_out_keeps_its_gradient(
    backend: str, gap: float, inplace: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, rows(4), 60, generator=generator)
    z[:, 0] += gap
    t[:, 0] += 3
    leaf = z.clone().requires_grad_()
    loss = topk_divergence(
        leaf * 1,
        t,
        8,
        divergence="forward_kl",
        outside="bucket",
        reduction="sum",
        inplace_grad=inplace,
        backend=backend,
    )
    (grad,) = torch.autograd.grad(loss, leaf)
    p, q = z.double().softmax(-1), t.double().softmax(-1)
    outside = torch.ones_like(z, dtype=torch.bool).scatter(-1, t.topk(8).indices, False)
    inside_tail = z.double().masked_fill(~outside, -INF).softmax(-1)
    tail = (q * outside).sum(-1, keepdim=True)
    expected = torch.where(outside, p - tail * inside_tail, p - q)
    torch.testing.assert_close(grad, expected.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "member", [jsd(1e-5), jsd(1 - 1e-5), skew_forward_kl(1e-7)], ids=["jsd 0", "jsd 1", "forward 0"]
)
@pytest.mark.parametrize("outside", ["renormalize", "bucket"])
def test_a_small_share_of_a_mixture_keeps_its_digits(
    backend: str, outside: str, member: Divergence
) -> None:
    generator = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(rows(6), 500, generator=generator)
    t = z + 4 * torch.randn(rows(6), 500, generator=generator)
    results = []
    for student, name in ((z, backend), (z.double(), "reference")):
        leaf = student.clone().requires_grad_()
        loss = topk_divergence(
            leaf, t, 32, divergence=member, outside=outside, reduction="none", backend=name
        )
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    (loss, grad), (expected, expected_grad) = results  # the bounds are some ten float32 roundings
    assert ((loss - expected).abs() <= 2e-6 * expected).all()
    error = (grad - expected_grad).abs().amax(-1)
    assert (error <= 5e-6 * expected_grad.abs().amax(-1)).all()


@pytest.mark.parametrize("beta", some([1e-30, 1 - 1e-9, 1e-9], of=2))
@pytest.mark.parametrize("outside", ["renormalize", "bucket"])
def test_shares_that_floats_round_away_never_make_nan(
    backend: str, outside: str, beta: float
) -> None:
    z, t = torch.zeros(2, 40), torch.zeros(2, 40)
    z[0, 0], t[1, 0] = 100, 100
    for member in (jsd(beta), skew_reverse_kl(beta), skew_forward_kl(beta)):
        leaf = z.clone().requires_grad_()
        loss = topk_divergence(
            leaf, t, 8, divergence=member, outside=outside, reduction="none", backend=backend
        )
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mass", some([1e-3, 2e-5, 1e-7, 1e-9], turn=2, of=2))
@pytest.mark.parametrize("outside", FULL)
def test_small_tails_keep_their_digits(
    backend: str, outside: str, mass: float, dtype: torch.dtype
) -> None:
    # 1 - Q in float32, or log1mexp of its logarithm, has none left at 1e-7.
    count, vocab, k = rows(6), 1500, 32
    teacher = with_tail(mass, count, vocab, k, seed=5).to(dtype)
    options = {
        "divergence": divergence_for(outside),
        "outside": outside,
        "token_ids": torch.full((count,), vocab - 1) if outside == "sample" else None,
    }
    students = (with_tail(mass * 3, count, vocab, k, seed=6), normal(count, vocab, seed=9))
    for student in some(students, dtype.itemsize // 2):
        student = student.to(dtype).float()  # whose gradient is not rounded to bfloat16
        expected = check_rows(backend, student, teacher, k, **options)
        loss, grad = loss_and_grad(student, teacher, k, backend=backend, **options)
        assert loss.isfinite().all()
        assert grad.isfinite().all()
        exact = torch.from_numpy(expected.loss)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-9)
        wanted = torch.from_numpy(expected.grads["student"][0])
        size = wanted.abs().amax(-1, keepdim=True)
        assert ((grad - wanted).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("outside", FULL)
def test_a_teacher_without_a_tail_is_finite(backend: str, outside: str) -> None:
    teacher = normal(FEW, 40, seed=1)
    teacher[:, 10:] = -INF
    check_rows(backend, normal(FEW, 40), teacher, 12, outside)
    # And a tail that the student has and the teacher has not costs nothing, as an absent entry.
    options = {"divergence": divergence_for(outside), "outside": outside, **token(outside, FEW)}
    loss, grad = loss_and_grad(normal(FEW, 40), teacher, 12, backend=backend, **options)
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    if outside == "bucket":
        options["outside"] = "truncate"
        other = loss_and_grad(normal(FEW, 40), teacher, 12, backend=backend, **options)
        torch.testing.assert_close((loss, grad), other)


@pytest.mark.parametrize("outside", FULL)
def test_a_support_of_the_whole_vocabulary_has_no_tail(backend: str, outside: str) -> None:
    student, teacher = normal(FEW, 40), normal(FEW, 40, seed=1)
    check_rows(backend, student, teacher, 40, outside)
    divergence = reverse_kl()
    loss, grad = loss_and_grad(
        student,
        teacher,
        40,
        divergence=divergence,
        outside=outside,
        backend=backend,
        **token(outside, FEW),
    )
    # Then every member is the full divergence, and that of the paper.
    expected = loss_and_grad(student, teacher, 40, divergence=divergence, backend=backend)
    torch.testing.assert_close((loss, grad), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("outside", FULL)
def test_a_student_without_a_tail_is_never_nan(backend: str, outside: str) -> None:
    student, teacher = normal(FEW, 40), normal(FEW, 44, seed=1)
    check_rows(backend, student, teacher, 40, outside, banned_ids=None)
    student = normal(FEW, 44)
    student[:, 12:] = -INF  # and what is left is not all in the support
    student[1, 5:] = -INF
    options = {"divergence": divergence_for(outside), "outside": outside, **token(outside, FEW)}
    if outside == "sample":
        options["token_ids"] = torch.zeros(FEW, dtype=torch.int64)
    loss, grad = loss_and_grad(student, teacher, 9, backend=backend, **options)
    assert not loss.isnan().any()
    assert grad.isfinite().all()
    check_rows(backend, student, teacher, 9, **options)


@pytest.mark.parametrize("outside", FULL)
def test_banned_ids_and_absent_entries_are_in_the_tail(backend: str, outside: str) -> None:
    student, teacher = normal(FEW, 40), normal(FEW, 40, seed=1)
    banned = [3, 17, 20, 21]
    check_rows(backend, student, teacher, 8, outside, banned_ids=banned)
    # A support that lists them gives the same as one that never did.
    best = select_topk(teacher, 8, banned_ids=banned, with_logsumexp=True)
    more = select_topk(teacher, 40, with_logsumexp=True)
    kept = torch.isin(more.ids, torch.tensor(banned)) | (
        more.ids[..., None] == best.ids[:, None]
    ).any(-1)
    ids, order = torch.where(kept, more.ids, -1), torch.arange(39, -1, -1)
    listed = TopK(ids[:, order], more.logits[:, order], logsumexp=more.logsumexp)
    rest = teacher.double().masked_fill(kept.gather(-1, more.ids.argsort(-1)), -INF).logsumexp(-1)
    listed = dataclasses.replace(listed, tail_logsumexp=rest)
    options = {"divergence": divergence_for(outside), "outside": outside, "banned_ids": banned}
    options |= token(outside, FEW)
    if outside == "sample":
        at = teacher.gather(-1, options["token_ids"][:, None])[:, 0]
        best, listed = (dataclasses.replace(x, token_logits=at) for x in (best, listed))
    expected = loss_and_grad(student, teacher, 8, backend=backend, **options)
    for support in (best, listed):
        found = loss_and_grad(student, support, backend=backend, **options)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("outside", ["truncate", "bucket", "generalize"])
def test_rows_without_entries_have_loss_and_gradient_zero(backend: str, outside: str) -> None:
    student, teacher = normal(3, 40), normal(3, 40, seed=1)
    logprobs, ids = teacher.log_softmax(-1).topk(5)
    answer = [
        None,
        *(
            dict(zip(i, v, strict=True))
            for i, v in zip(ids.tolist(), logprobs.tolist(), strict=True)
        ),
    ]
    options = {"outside": outside, "divergence": divergence_for(outside), "backend": backend}
    served = TopK.from_logprobs(answer[:3])  # vLLM's first position is None
    for topk in (served, served[1:].pad(3)[[2, 0, 1]]):
        loss, grad = loss_and_grad(student, topk, **options)
        assert (loss[0], grad[0].abs().max()) == (0, 0)
        rest = loss_and_grad(student[1:], topk[1:], **options)
        assert torch.equal(loss[1:], rest[0])
        assert torch.equal(grad[1:], rest[1])


@pytest.mark.parametrize("outside", FULL)
def test_entries_that_the_teacher_excludes_are_in_the_students_tail(
    backend: str, outside: str
) -> None:
    student, teacher = normal(FEW, 40), normal(FEW, 40, seed=1)
    best = student.argsort(-1, descending=True)
    teacher = teacher.scatter(-1, best[:, 1:4], -INF)
    check_rows(backend, student, teacher, 8, outside, support="student")


@pytest.mark.parametrize("outside", FULL)
def test_repeated_ids_count_once(backend: str, outside: str) -> None:
    student, teacher = normal(FEW, 40), normal(FEW, 40, seed=1)
    once = select_topk(teacher, 8, with_logsumexp=True)
    options = {"divergence": divergence_for(outside), "outside": outside, **token(outside, FEW)}
    if outside == "sample":
        at = teacher.gather(-1, options["token_ids"][:, None])[:, 0]
        once = dataclasses.replace(once, token_logits=at)
    ids = torch.cat((once.ids, once.ids[:, 2:5]), -1)
    logits = torch.cat((once.logits, once.logits[:, 2:5]), -1)
    for names in ((), ("tail_logsumexp",), ("logsumexp",)):
        kept = dataclasses.replace(once, **dict.fromkeys(names))
        twice = dataclasses.replace(kept, ids=ids, logits=logits)
        expected = loss_and_grad(student, kept, backend=backend, **options)
        found = loss_and_grad(student, twice, backend=backend, **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def direct(
    backend: str, ids: torch.Tensor, values: torch.Tensor, outside: str, tails: Tails
) -> tuple[torch.Tensor, ...]:
    """The operator's results for a student of 60 ids, of which 7 and all from 50 on are barred."""
    banned = torch.zeros(8, dtype=torch.uint8)
    banned[0] = 1 << 7
    objective = Objective(
        Temperature(0.8), Temperature(1.3), divergence_for(outside), outside=outside
    )
    student = normal(len(ids), 60, seed=5)
    kernels: Any = backends.load(backend)
    return tuple(
        kernels.full_divergence(student, values, ids, Allowed(50, banned), objective, tails)
    )


@pytest.mark.parametrize("outside", FULL)
def test_of_repeats_the_first_with_a_value_counts(backend: str, outside: str) -> None:
    """To the last bit as if the others were not listed, wherever they are."""
    # An id of 2^32 + 3 has the low half of 3.
    listed = torch.tensor([3, 9, 3, 2**32 + 3, 4, 9, 3, -1, 4, 3, 9, 12], dtype=torch.int64)
    values = normal(1, 12, seed=6)
    values[0, [0, 5, 9]] = -INF
    once = torch.where(torch.tensor([0, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 1]) == 1, listed, -1)
    values[0, 3] = -INF  # of an id that neither side has
    tails = Tails(torch.tensor([0.3]).double(), torch.tensor([-0.2]).double(), 55)
    *expected, sums = direct(backend, once[None], values, outside, tails)
    *found, other_sums = direct(backend, listed[None], values, outside, tails)
    kept = once if outside != "sample" else torch.cat((once[:-1], torch.tensor([12])))
    assert torch.equal(found[1][0].long(), torch.where(kept < 50, kept, -1))
    assert all(map(torch.equal, (*found, other_sums), (*expected, sums)))


@pytest.mark.parametrize("outside", FULL)
def test_ids_without_a_present_entry_are_in_the_given_tails(backend: str, outside: str) -> None:
    """Banned ones, those beyond the limit, which the student may not have, and those of -inf."""
    ids = torch.tensor([[3, 7, 55, 9, 7, 2**40, 52, 3, 7, -1, 12]])
    values = normal(1, 11, seed=6)
    lost = {7: values[0, 4].item(), 55: values[0, 2].item(), 2**40: values[0, 5].item()}
    values[0, [1, 6]] = -INF  # 52 has no value
    values[0, [0, 7]] = -INF  # nor has 3
    z = normal(1, 60, seed=5)[0].double() / 0.8000000119
    t = torch.tensor([*lost.values()]).double() / 1.3
    student, teacher = torch.tensor([0.1, 0.4]).double()
    given = Tails(teacher[None], student[None], 53)
    # Ids from 53 on are not in the student's width.
    joined = Tails(
        torch.cat((teacher[None], t)).logsumexp(0)[None],
        torch.cat((student[None], z[[7, 52, 3]])).logsumexp(0)[None],
        53,
    )
    without = torch.where(torch.isin(ids, torch.tensor([9, 12])), ids, -1)
    expected = direct(backend, without, values, outside, joined)
    found = direct(backend, ids, values, outside, given)
    assert torch.equal(found[1], expected[1])
    # The tails' error of a few units of 2^-24 is that of their share's logarithm.
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_token_among_the_entries_has_no_entry_of_its_own(backend: str) -> None:
    ids, values = torch.tensor([[3, 9, 4, 9]]), normal(1, 4, seed=6)
    tails = Tails(torch.zeros(1).double(), torch.zeros(1).double(), 55)
    _, found, grad, *_ = direct(backend, ids, values, "sample", tails)
    if backend != "reference":  # which is not asked this
        assert found.tolist() == [[3, 9, 4, -1]]
        assert grad[0, 3] == 0
    # A token that is no id of the student's, in a row that is NaN.
    for token in (-1, 55, 2**40):
        ids[0, 3], values[0, 0] = token, NAN
        _, found, grad, *_ = direct(backend, ids, values, "sample", tails)
        assert found.tolist() == [[3, 9, 4, -1]]
        assert grad[0, :3].isnan().all()
        assert grad[0, 3] == 0


def test_a_served_tail_of_nothing_is_floored(backend: str) -> None:
    teacher = normal(FEW, 40, seed=1).double().log_softmax(-1)
    served = TopK(
        teacher.argsort(-1, descending=True), teacher.sort(descending=True).values.float()
    )
    whole = dataclasses.replace(served, logsumexp=torch.zeros(FEW))
    for outside in ("truncate", "bucket", "generalize"):
        options = {"divergence": divergence_for(outside), "outside": outside}
        loss, grad = loss_and_grad(normal(FEW, 50), whole, backend=backend, **options)
        floored = dataclasses.replace(served, tail_logsumexp=torch.full((FEW,), -24 * math.log(2)))
        expected = loss_and_grad(normal(FEW, 50), floored, backend=backend, **options)
        torch.testing.assert_close((loss, grad), expected, rtol=1e-4, atol=1e-6)


# Properties


@pytest.mark.parametrize(("member", "outside"), PAIRS)
def test_equal_models_have_loss_and_gradient_zero(backend: str, member: str, outside: str) -> None:
    inputs = make_inputs(
        Case(rows=(rows(3),), divergence=member, outside=outside, token="any", seed=2)
    )
    # The estimate at y is l_y = 0, too.
    student = inputs.student
    loss, grad = loss_and_grad(student, student, 8, backend=backend, **inputs.family)
    assert loss.abs().max() < 1e-6
    stopped = outside == "truncate"  # does not vanish there: mass on S still pays
    assert stopped or grad.abs().max() < 1e-6


@pytest.mark.parametrize("outside", FULL)
def test_gradients_sum_to_zero_as_softmaxes_ignore_an_offset(backend: str, outside: str) -> None:
    options = {"divergence": divergence_for(outside), "outside": outside, **token(outside, FEW)}
    student, teacher = normal(FEW, 300), normal(FEW, 300, seed=1)
    loss, grad = loss_and_grad(student, teacher, 16, backend=backend, **options)
    assert (grad.double().sum(-1).abs() <= 1e-5 * grad.abs().double().sum(-1)).all()
    moved, moved_grad = loss_and_grad(student + 4, teacher, 16, backend=backend, **options)
    torch.testing.assert_close((moved, moved_grad), (loss, grad), rtol=1e-4, atol=1e-5)


def test_the_default_is_topk_rkl_to_the_last_bit(backend: str) -> None:
    student, teacher = normal(FEW, 300), normal(FEW, 300, seed=1)
    leaf = student.clone().requires_grad_()
    expected = topk_rkl(leaf, teacher, 16, reduction="none", backend=backend)
    (wanted,) = torch.autograd.grad(expected.sum(), leaf)
    for options in (
        {},
        {"divergence": "reverse_kl", "token_ids": torch.zeros(FEW, dtype=torch.int64)},
    ):
        loss, grad = loss_and_grad(student, teacher, 16, backend=backend, **options)
        assert torch.equal(loss, expected)
        assert torch.equal(grad, wanted)


@pytest.mark.parametrize("outside", [outside for outside in OUTSIDE if outside != "sample"])
def test_token_ids_alone_change_nothing(backend: str, outside: str) -> None:
    student, teacher = normal(FEW, 300), normal(FEW, 300, seed=1)
    options = {"divergence": divergence_for(outside), "outside": outside}
    expected = loss_and_grad(student, teacher, 16, backend=backend, **options)
    tokens = torch.arange(FEW)
    found = loss_and_grad(student, teacher, 16, backend=backend, token_ids=tokens, **options)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


NAMES = {
    "reverse_kl": reverse_kl(),
    "forward_kl": forward_kl(),
    "jsd": jsd(),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_stand_for_members(name: str) -> None:
    student, teacher = normal(FEW, 50), normal(FEW, 50, seed=1)
    named = topk_divergence(student, teacher, 8, divergence=name)
    assert torch.equal(named, topk_divergence(student, teacher, 8, divergence=NAMES[name]))


@pytest.mark.parametrize("outside", some(["bucket", "renormalize", "truncate"]))
def test_members_are_the_sums_of_their_parts(backend: str, outside: str) -> None:
    student, teacher = normal(FEW, 50), normal(FEW, 50, seed=1)

    def found(divergence: Divergence) -> tuple[torch.Tensor, torch.Tensor]:
        return loss_and_grad(
            student, teacher, 8, divergence=divergence, outside=outside, backend=backend
        )

    def added(*parts: tuple[float, Divergence]) -> tuple[torch.Tensor, ...]:
        results = [(weight, found(part)) for weight, part in parts]
        return tuple(sum(weight * result[i] for weight, result in results) for i in range(2))

    torch.testing.assert_close(
        found(jsd(0.3)), added((0.7, skew_reverse_kl(0.3)), (0.3, skew_forward_kl(0.3)))
    )
    torch.testing.assert_close(
        found(mixed(0.25)), added((0.75, reverse_kl()), (0.25, forward_kl()))
    )
    gate = torch.tensor([0.0, 1, 0, 1, 1, 0])[:FEW]
    gated, ungated = found(Divergence(reverse=1.0, forward=gate)), found(reverse_kl())
    both = found(Divergence(reverse=1.0, forward=1.0))
    for found_gated, without, whole in zip(gated, ungated, both, strict=True):
        torch.testing.assert_close(found_gated[gate == 0], without[gate == 0])
        torch.testing.assert_close(found_gated[gate == 1], whole[gate == 1])


@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("outside", OUTSIDE)
def test_masked_rows_are_zero_whatever_they_hold(backend: str, outside: str, support: str) -> None:
    mask = torch.tensor([True, False, True, False])
    junk = torch.tensor([1.0, NAN, 1.0, INF])
    student, teacher = normal(4, 50), normal(4, 50, seed=1)
    options = {"divergence": divergence_for(outside), "outside": outside, "support": support}
    options |= {"mask": mask, "backend": backend, **token(outside, 4)}
    clean, clean_grad = loss_and_grad(student, teacher, 8, **options)
    if outside == "sample":
        options["token_ids"] = options["token_ids"].where(mask, -100)
    student, teacher = (x.where(mask[:, None], junk[:, None]) for x in (student, teacher))
    student.requires_grad_()
    weight = junk.clone().requires_grad_()
    loss = topk_divergence(
        student, teacher, 8, weight=weight, temperature=junk, reduction="none", **options
    )
    loss.backward(junk)
    assert torch.equal(loss, clean)
    assert torch.equal(student.grad, clean_grad)
    assert (weight.grad[~mask] == 0).all()


def test_weights_of_masked_rows_do_not_matter(backend: str) -> None:
    student, teacher = normal(4, 50), normal(4, 50, seed=1)
    mask = torch.tensor([True, False, True, False])
    weight = torch.tensor([0.5, NAN, 0.25, INF])
    for outside in ("renormalize", "bucket"):
        options = {"outside": outside, "mask": mask, "backend": backend}
        found = loss_and_grad(student, teacher, 8, divergence=mixed(weight), **options)
        clean = mixed(weight.where(mask, 0.0))
        expected = loss_and_grad(student, teacher, 8, divergence=clean, **options)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        assert (found[0][~mask] == 0).all()


@pytest.mark.parametrize("outside", [x for x in OUTSIDE if x != "sample"])
def test_an_included_token_is_one_entry_more(backend: str, outside: str) -> None:
    student, teacher = normal(5, 60), normal(5, 60, seed=1)
    best = select_topk(teacher, 8)
    order = teacher.argsort(-1, descending=True)
    tokens = torch.stack([order[0, 20], order[1, 3], order[2, 59], order[3, 8], order[4, 0]])
    options = {"divergence": divergence_for(outside), "outside": outside}
    found = loss_and_grad(
        student, teacher, 8, token_ids=tokens, include_token=True, backend=backend, **options
    )
    known = (best.ids == tokens[:, None]).any(-1)
    ids = torch.cat((best.ids, torch.where(known, -1, tokens)[:, None].int()), -1)
    value = teacher.gather(-1, tokens[:, None])
    support = TopK(ids, torch.cat((best.logits, value), -1), teacher.double().logsumexp(-1))
    listed = ids.long().masked_fill(ids < 0, 60)
    rest = torch.cat((teacher.double(), torch.zeros(5, 1).double()), -1)
    rest = rest.scatter(-1, listed, -INF)[:, :60].logsumexp(-1)
    support = dataclasses.replace(support, tail_logsumexp=rest)
    expected = loss_and_grad(student, support, backend=backend, **options)
    torch.testing.assert_close(found, expected)
    # It leaves a served tail, too.
    served = select_topk(teacher, 8, with_logsumexp=True, token_ids=tokens)
    options |= {"token_ids": tokens, "include_token": True}
    joined = loss_and_grad(student, served, backend=backend, **options)
    torch.testing.assert_close(joined, expected)


def test_a_sampled_token_that_is_banned_keeps_its_log_ratio(backend: str) -> None:
    student, teacher = normal(3, 30), normal(3, 30, seed=1)
    tokens = torch.tensor([4, 5, 6])
    banned = [4, 5, 6, 7]
    loss, grad = loss_and_grad(
        student,
        teacher,
        8,
        outside="sample",
        token_ids=tokens,
        banned_ids=banned,
        backend=backend,
    )
    ids = select_topk(teacher, 8, banned_ids=banned).ids.long()
    log_p, log_q = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    p, ratio = log_p.exp(), log_p - log_q
    slopes = torch.zeros(3, 30).double().scatter(-1, ids, (p * ratio).gather(-1, ids))
    slopes.scatter_(-1, tokens[:, None], ratio.gather(-1, tokens[:, None]))
    torch.testing.assert_close(loss.double(), slopes.sum(-1), rtol=1e-5, atol=1e-6)
    expected = slopes - slopes.sum(-1, keepdim=True) * p
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_token_that_does_not_exist_makes_its_row_nan(backend: str, outside: str) -> None:
    student, teacher = normal(6, 30), normal(6, 30, seed=1)
    tokens = torch.tensor([3, -100, 30, 2**31, 29, -100])
    mask = torch.tensor([True, True, True, True, True, False])
    options = {"divergence": divergence_for(outside), "outside": outside, "banned_ids": [0, 1, 2]}
    loss, grad = loss_and_grad(
        student,
        teacher,
        8,
        token_ids=tokens,
        include_token=outside != "sample",
        mask=mask,
        backend=backend,
        **options,
    )
    assert loss.isnan().tolist() == [False, True, True, True, False, False]
    assert loss[5] == 0
    assert (grad[5] == 0).all()
    assert grad.isnan().any(-1).tolist() == [False, True, True, True, False, False]


@pytest.mark.parametrize("outside", some(FULL, FULL.index("bucket")))
@pytest.mark.parametrize("bad", some([NAN, INF]))
def test_nan_makes_its_row_nan_and_no_other(backend: str, outside: str, bad: float) -> None:
    clean = normal(4, 30), normal(4, 30, seed=1)
    options = {"divergence": divergence_for(outside), "outside": outside, **token(outside, 4)}
    if outside == "sample":
        options["token_ids"] %= 30
    expected = loss_and_grad(*clean, 8, backend=backend, **options)
    last = int(clean[1][2].argmin())  # in the tail
    for side in range(2):
        broken = [x.clone() for x in clean]
        broken[side][2, last] = bad
        loss, grad = loss_and_grad(*broken, 8, backend=backend, **options)
        assert loss.isnan().tolist() == [False, False, True, False]
        assert grad[2].isnan().all()
        others = torch.tensor([0, 1, 3])
        assert torch.equal(loss[others], expected[0][others])
        assert torch.equal(grad[others], expected[1][others])


@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_side_of_only_minus_infinity_has_no_loss(backend: str, outside: str) -> None:
    options = {"divergence": divergence_for(outside), "outside": outside, **token(outside, 3)}
    for broken in range(2):
        sides = [normal(3, 40), normal(3, 40, seed=1)]
        sides[broken][1] = -INF
        loss, grad = loss_and_grad(*sides, 8, backend=backend, **options)
        assert loss[1] == 0
        assert (grad[1] == 0).all()
        assert (loss[[0, 2]] != 0).all()


@pytest.mark.parametrize("outside", ["renormalize", "truncate", "bucket", "generalize"])
def test_a_student_without_probability_where_the_teacher_has_some(
    backend: str, outside: str
) -> None:
    student, teacher = normal(3, 40), normal(3, 40, seed=1)
    best = teacher.argmax(-1, keepdim=True)
    student = student.scatter(-1, best, -INF)
    options = {"outside": outside, "backend": backend}
    loss, grad = loss_and_grad(student, teacher, 8, divergence=forward_kl(), **options)
    assert (loss == INF).all()
    if outside == "renormalize":
        q = select_topk(teacher, 8).logits.softmax(-1)[:, :1]
    else:
        q = teacher.softmax(-1).gather(-1, best)
    torch.testing.assert_close(grad.gather(-1, best), -q)
    assert grad.isfinite().all()
    for divergence in (reverse_kl(), jsd()):
        if outside == "generalize" and divergence == jsd():
            continue
        loss, grad = loss_and_grad(student, teacher, 8, divergence=divergence, **options)
        assert loss.isfinite().all()
        assert grad.isfinite().all()
        assert outside != "renormalize" or (grad.gather(-1, best) == 0).all()


def test_sampled_gradients_average_to_the_full_one(backend: str) -> None:
    student, teacher = normal(7, scale=1.5), normal(7, seed=1, scale=1.5)
    leaf = student.double().requires_grad_()
    log_p, log_q = leaf.log_softmax(-1), teacher.double().log_softmax(-1)
    full = (log_p.exp() * (log_p - log_q)).sum()
    (expected,) = torch.autograd.grad(full, leaf)
    loss, grad = loss_and_grad(
        student.expand(7, 7),
        teacher.expand(7, 7),
        3,
        outside="sample",
        token_ids=torch.arange(7),
        backend=backend,
    )
    p = log_p.detach().exp()
    torch.testing.assert_close(p @ grad.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(p @ loss.double(), full.detach(), rtol=1e-5, atol=1e-6)


# The same bits


@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("outside", OUTSIDE)
def test_results_are_the_same_bits_on_every_run_and_thread_count(
    instruction_set: str, outside: str, support: str, threads: int
) -> None:
    student, teacher = normal(9, 20_011), normal(9, 20_011, seed=1)
    options = {"divergence": divergence_for(outside), "outside": outside, "support": support}
    options |= token(outside, 9)
    results = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        for dtype in (torch.float32, torch.bfloat16):
            results += [*loss_and_grad(student.to(dtype), teacher, 40, backend="cpu", **options)]
    for i in range(4, len(results)):
        assert torch.equal(results[i], results[i % 4])


@pytest.mark.parametrize(
    ("outside", "dtype"),
    [
        (outside, dtype)
        for turn, outside in enumerate(OUTSIDE)
        for dtype in some((torch.float32, torch.bfloat16, torch.float16), turn)
    ],
)
def test_in_place_gradients_are_the_same_bits(
    backend: str, outside: str, dtype: torch.dtype
) -> None:
    # Rows at multiples of 16 bytes, whose sums are the same wherever they lie.
    leaf, teacher = normal(2, 3, 312, dtype=dtype).requires_grad_(), normal(2, 3, 300, seed=1)
    options = {"divergence": divergence_for(outside), "outside": outside, "backend": backend}
    options |= {"vocab_size": 290, "mask": torch.tensor([[True, False, True], [True, True, False]])}
    options |= {"temperature": torch.linspace(0.5, 2, 6).view(2, 3), "teacher_temperature": 1.0}
    if outside == "sample":
        options["token_ids"] = torch.arange(6).view(2, 3)
    expected = torch.autograd.grad(topk_divergence(leaf * 1, teacher, 9, **options), leaf)[0]
    student, seen = leaf * 1, []
    student.register_hook(lambda grad: seen.append(grad.data_ptr()))
    loss = topk_divergence(student, teacher, 9, inplace_grad=True, **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(grad, expected)
    assert seen == [student.data_ptr()]
    # And into rows with strides.
    strided = torch.empty(3, 2, 400, dtype=dtype).transpose(0, 1)[..., 48:360]
    student = strided.copy_(leaf.detach()).requires_grad_() * 1
    view = (leaf * 1).transpose(0, 1).contiguous().transpose(0, 1)
    loss = topk_divergence(view, teacher, 9, inplace_grad=True, **options)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)


# Not read


LIBC = ctypes.CDLL(None, use_errno=True)


class Pages:
    """Rows of float32 on pages of their own, 1024 elements each, which may be closed."""

    def __init__(self, values: torch.Tensor) -> None:
        self.width = -(-values.shape[1] // 1024) + 1
        self.memory = mmap.mmap(-1, len(values) * self.width * mmap.PAGESIZE)
        flat = torch.frombuffer(self.memory, dtype=torch.float32)
        self.rows = flat.view(len(values), -1)[:, : values.shape[1]]
        self.rows.copy_(values)

    def close(self, row: int, first: int, last: int | None = None) -> None:
        """Takes away the pages from the first to the last of a row."""
        stop = self.width if last is None else last + 1
        self._protect((row * self.width + first) * mmap.PAGESIZE, (stop - first), 0)

    def open(self) -> None:
        """Gives everything back."""
        self._protect(0, len(self.memory) // mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)

    def _protect(self, offset: int, pages: int, how: int) -> None:
        address = ctypes.c_void_p(self.rows.data_ptr() + offset)
        assert LIBC.mprotect(address, ctypes.c_size_t(pages * mmap.PAGESIZE), how) == 0


@pytest.fixture
def fenced() -> Iterator[Callable[[torch.Tensor], Pages]]:
    made: list[Pages] = []

    def build(values: torch.Tensor) -> Pages:
        made.append(Pages(values))
        return made[-1]

    yield build
    for pages in made:
        pages.open()


@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("outside", OUTSIDE)
def test_masked_rows_and_padding_are_not_read(
    instruction_set: str, fenced: Callable[[torch.Tensor], Pages], outside: str, support: str
) -> None:
    values = normal(4, 2500), normal(4, 2500, seed=1)
    mask = torch.tensor([True, False, True, False])
    sides = [fenced(x) for x in values]
    for side in sides:
        for row in range(4):
            side.close(row, 1 if mask[row] else 0)
    options = {"divergence": divergence_for(outside), "outside": outside, "support": support}
    options |= {"mask": mask, "vocab_size": 1024, "backend": "cpu", **token(outside, 4)}
    found = loss_and_grad(*(side.rows for side in sides), 12, **options)
    expected = loss_and_grad(*values, 12, **options)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_renormalised_members_read_the_student_on_the_support_alone(
    instruction_set: str, fenced: Callable[[torch.Tensor], Pages]
) -> None:
    student, teacher = normal(3, 5000), normal(3, 5000, seed=1)
    teacher[:, 1024:4096] -= 40  # no page between the first and the last has an entry
    pages = fenced(student)
    for row in range(3):
        pages.close(row, 1, 3)
    for options in (
        {"divergence": jsd(0.3)},
        {"divergence": mixed(torch.rand(3)), "temperature": torch.rand(3) + 0.5},
        {
            "divergence": "forward_kl",
            "include_token": True,
            "token_ids": torch.tensor([1, 7, 4500]),
        },
    ):
        found = loss_and_grad(pages.rows, teacher, 12, backend="cpu", **options)
        expected = loss_and_grad(student, teacher, 12, backend="cpu", **options)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


# Bad input

X, Y = normal(2, 30), normal(2, 30, seed=1)
TOKENS = torch.zeros(2, dtype=torch.int64)
SERVED = select_topk(Y, 8)
HEAD = LinearLogits(normal(2, 4), normal(30, 4))
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], list[str]]] = {
    "name": ((X, Y), {"divergence": "kl"}, ValueError, ["'kl'", "'reverse_kl'", "'jsd'"]),
    "no divergence": ((X, Y), {"divergence": 0.5}, TypeError, ["float", "Divergence"]),
    "outside": ((X, Y), {"outside": "tail"}, ValueError, ["'tail'", "'bucket'"]),
    "support": ((X, Y), {"support": "both"}, ValueError, ["'both'", "'student'"]),
    "option": ((X, Y), {"topk": 3}, TypeError, ["topk"]),
    "beta 0": ((X, Y), {"divergence": jsd(0.0)}, ValueError, ["beta", "0.0", "forward_kl()"]),
    "beta 1": ((X, Y), {"divergence": skew_reverse_kl(1.0)}, ValueError, ["beta", "1.0"]),
    "beta": ((X, Y), {"divergence": skew_forward_kl(-0.1)}, ValueError, ["beta", "-0.1"]),
    "clip": (
        (X, Y),
        {"divergence": Divergence(1.0, log_ratio_clip=0.0)},
        ValueError,
        ["clip", "0"],
    ),
    "floor": ((X, Y), {"divergence": Divergence(1.0, logp_floor=1.0)}, ValueError, ["floor", "1"]),
    "beta NaN": ((X, Y), {"divergence": jsd(NAN)}, ValueError, ["beta", "nan"]),
    "weight": ((X, Y), {"divergence": mixed(NAN)}, ValueError, ["nan"]),
    "a gate of bools": (
        (X, Y),
        {"divergence": Divergence(1.0, forward=X[:, 0] > 0)},
        TypeError,
        ["forward", "bool", ".float()"],
    ),
    "k of the student's support": (
        (X[:, :20], Y),
        {"k": 25, "support": "student"},
        ValueError,
        ["25", "the student's vocabulary of 20"],
    ),
    "include without the teacher's value": (
        (X, SERVED),
        {"include_token": True, "token_ids": TOKENS},
        ValueError,
        ["include_token=True needs", "token_logits"],
    ),
    "weight's shape": (
        (X, Y),
        {"divergence": mixed(torch.rand(3))},
        ValueError,
        ["(3,)", "(2,)"],
    ),
    "sample without a token": ((X, Y), {"outside": "sample"}, ValueError, ["token_ids"]),
    "sample of another divergence": (
        (X, Y),
        {"outside": "sample", "divergence": "forward_kl", "token_ids": TOKENS},
        ValueError,
        ["sample", "reverse"],
    ),
    "generalize with skews": (
        (X, Y),
        {"outside": "generalize", "divergence": "jsd"},
        ValueError,
        ["generalize", "bucket"],
    ),
    "student support with a TopK": (
        (X, SERVED),
        {"support": "student"},
        ValueError,
        ["student", "TopK"],
    ),
    "TopK without a log-sum-exp": (
        (X, SERVED),
        {"outside": "bucket"},
        ValueError,
        ["logsumexp", "with_logsumexp=True"],
    ),
    "TopK of another temperature": (
        (X, select_topk(Y, 8, with_logsumexp=True)),
        {"outside": "bucket", "temperature": 2.0},
        ValueError,
        ["2.0", "1.0", "temperature"],
    ),
    "TopK without the token": (
        (X, select_topk(Y, 8, with_logsumexp=True)),
        {"outside": "sample", "token_ids": TOKENS},
        ValueError,
        ["token_logits"],
    ),
    "sampled background of logits": (
        (X, Y),
        {"outside": "bucket", "background": "sampled", "token_ids": TOKENS},
        ValueError,
        ["background", "LinearLogits"],
    ),
    "log-sum-exp of logits": (
        (X, Y),
        {"student_logsumexp": torch.zeros(X.shape[0])},
        ValueError,
        ["student_logsumexp", "LinearLogits"],
    ),
    "background": ((HEAD, Y), {"background": "none"}, ValueError, ["background", "sampled"]),
    "include without a token": ((X, Y), {"include_token": True}, ValueError, ["token_ids"]),
    "include_token": (
        (X, Y),
        {"include_token": 1, "token_ids": TOKENS},
        TypeError,
        ["include_token"],
    ),
    "include and sample": (
        (X, Y),
        {"include_token": True, "outside": "sample", "token_ids": TOKENS},
        ValueError,
        ["include_token", "sample"],
    ),
    "token ids' shape": (
        (X, Y),
        {"token_ids": TOKENS[:1]},
        ValueError,
        ["token_ids", "(1,)", "(2,)"],
    ),
    "token ids' dtype": ((X, Y), {"token_ids": TOKENS.float()}, TypeError, ["token_ids"]),
    "token ids a list": ((X, Y), {"token_ids": [0, 1]}, TypeError, ["token_ids", "list"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_one_clear_error(name: str) -> None:
    arguments, options, error, words = BAD[name]
    with pytest.raises(error) as caught:
        topk_divergence(*arguments, **options)
    assert caught.value.__cause__ is None
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_one_renormalised_entry_warns() -> None:
    with pytest.warns(UserWarning, match="k=1"):
        topk_divergence(X, Y, 1, divergence="jsd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        topk_divergence(X, Y, 1, divergence="jsd", outside="bucket")
        topk_divergence(X, Y, 1, divergence="jsd", token_ids=TOKENS, include_token=True)


def test_truncated_reverse_kl_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    entries._warn_about_collapse.cache_clear()
    with pytest.warns(UserWarning, match="collapse") as caught:
        topk_divergence(X, Y, 8, outside="truncate")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        topk_divergence(X, Y, 8, outside="truncate")
        topk_divergence(X, Y, 8, outside="truncate", divergence="forward_kl")


def test_truncated_reverse_kl_in_some_rows_warns() -> None:
    entries._warn_about_collapse.cache_clear()
    with pytest.warns(UserWarning, match="collapse"):
        topk_divergence(X, Y, 8, outside="truncate", divergence=mixed(torch.rand(2)))


def test_a_divergence_without_any_part_warns() -> None:
    with pytest.warns(UserWarning, match="all weights") as caught:
        loss = topk_divergence(X, Y, 8, divergence=Divergence(beta=0.1))
    assert loss == 0
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        topk_divergence(X, Y, 8, divergence=Divergence(forward=torch.zeros(2)))
