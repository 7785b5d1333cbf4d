"""The divergence family from hidden states and a head, against the same losses on its logits.

Hidden states and weights are small integers, so that products are exact in every dtype and order,
and what is compared is what comes after them. Those of random numbers have a test of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from effort import INTERPRETED, some
from memory import peak_growth
from tensors import integers, normal
from torch import Tensor

from opd_kernels import (
    LinearLogits,
    TopK,
    mixed,
    score_ids,
    select_topk,
    token_logprobs,
    topk_divergence,
)
from opd_kernels.backends import plain

N, H, V, K = 7, 6, 203, 9
WIDTH, TEACHERS_VOCAB = 190, 211
MEMBERS: list[dict[str, Any]] = [
    {"outside": "bucket"},
    {"outside": "bucket", "divergence": "forward_kl"},
    {"outside": "bucket", "divergence": "jsd", "include_token": True},
    {"outside": "truncate", "divergence": "forward_kl"},
    {"outside": "generalize", "divergence": mixed(forward=0.3)},
    {"outside": "sample"},
    {"outside": "bucket", "support": "student"},
    {"outside": "sample", "support": "student"},
]
# What is composed of operators that the other tests cover on every backend.
composed = pytest.mark.skipif(INTERPRETED, reason="no kernel that others do not run")
pytestmark = pytest.mark.filterwarnings("ignore:reverse KL with outside")


class Calls(NamedTuple):
    """A student's tensors and what a call takes besides."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    scale: float
    softcap: float | None
    teacher: Any
    options: dict[str, Any]

    def leaves(self) -> list[Tensor]:
        return [x.clone().requires_grad_() for x in (self.hidden, self.weight, self.bias)]

    def head(self, leaves: list[Tensor]) -> LinearLogits:
        return LinearLogits(*leaves, softcap=self.softcap, scale=self.scale)

    def logits(self, leaves: list[Tensor]) -> Tensor:
        """What the head stands for; masked rows are not read."""
        hidden, weight, bias = leaves
        mask = self.options.get("mask")
        if mask is not None:
            hidden = torch.where(mask[..., None], hidden, 0)
        return plain.shaped(torch.nn.functional.linear(hidden, weight, bias), *self.shape())

    def shape(self) -> tuple[float, float | None]:
        return self.scale, self.softcap


def calls(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Calls:
    """Masked rows of NaN, banned ids, a padded vocabulary, a temperature, a shaped head."""
    hidden, weight = (integers(n, H, seed=seed + n, dtype=dtype) for n in (N, V))
    mask = torch.arange(N) % 3 != 1
    hidden[~mask] = torch.nan
    token_ids = torch.randint(WIDTH, (N,), generator=torch.Generator().manual_seed(seed))
    token_ids[~mask] = -100
    return Calls(
        hidden,
        weight,
        integers(V, seed=seed + 1, dtype=dtype),
        0.25,
        3.0,
        normal(N, TEACHERS_VOCAB, seed=seed + 2) * 2,
        {
            "token_ids": token_ids,
            "mask": mask,
            "temperature": 0.8,
            "banned_ids": [3, 50],
            "vocab_size": WIDTH,
            **options,
        },
    )


def plain_calls(**options: Any) -> Calls:
    """One head of many: without bias, scale, softcap, masks and limits."""
    found = calls(**options)
    hidden = torch.where(found.hidden.isnan(), 1, found.hidden)
    drop = ("mask", "banned_ids", "vocab_size", "token_ids")
    tokens = found.options["token_ids"].clamp(min=0)
    kept = {name: x for name, x in found.options.items() if name not in drop}
    return found._replace(
        hidden=hidden,
        bias=torch.zeros(V),
        scale=0.5,
        softcap=None,
        options=kept | {"token_ids": tokens} | options,
    )


def results(case: Calls, student: Any, leaves: list[Tensor], upstream: bool) -> list[Tensor]:
    """Loss, token log-probs and statistics where they are asked for, and the head's gradients."""
    k = None if isinstance(case.teacher, TopK) else K
    found = topk_divergence(student, case.teacher, k, **case.options)
    found = found if isinstance(found, tuple) else (found,)
    outputs = [x for x in found if isinstance(x, Tensor)]
    factors = normal(*outputs[0].shape, seed=9) if upstream else torch.tensor(0.3)
    total = (outputs[0] * factors).sum()
    if len(outputs) == 2:
        total = total + (outputs[1] * normal(N, seed=8)).sum()
    grads = torch.autograd.grad(total, leaves)
    watched = found[-1][:-1] if len(found) > len(outputs) else ()
    stats = [x.float() for x in watched if x is not None]
    return [*(x.detach() for x in outputs), *stats, *grads]


def assert_same(case: Calls, tolerance: float = 2e-6, upstream: bool = False) -> None:
    """From hidden states as on logits, up to the rounding of what comes after the product."""
    leaves, others = case.leaves(), case.leaves()
    found = results(case, case.head(leaves), leaves, upstream)
    expected = results(case, case.logits(others), others, upstream)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        largest = b.nan_to_num().abs().max() if b.numel() else 1
        torch.testing.assert_close(
            a, b, rtol=0, atol=tolerance * max(float(largest), 1e-3), equal_nan=True
        )


@pytest.mark.parametrize("member", some(MEMBERS, 3), ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_members_have_the_numbers_of_their_logits(
    member: dict[str, Any], reduction: str, linear_backend: str
) -> None:
    options = {**member, "reduction": reduction, "backend": linear_backend}
    assert_same(calls(**options), upstream=reduction == "none")
    assert_same(plain_calls(**options), upstream=reduction == "none")


@composed
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("member", some(MEMBERS[:6], 2), ids=str)
def test_a_support_with_repeats_and_ids_that_take_no_part(
    member: dict[str, Any], reduction: str, linear_backend: str
) -> None:
    """Ids beyond the student's vocabulary and banned ones: what they hold is the tails'."""
    case = calls(**member, reduction=reduction, backend=linear_backend)
    tokens, mask = case.options["token_ids"], case.options["mask"]
    ids = select_topk(case.teacher, K, mask=mask).ids
    ids[:, 3], ids[:, 4], ids[:, 5] = ids[:, 1], 3, TEACHERS_VOCAB - 1
    support = score_ids(case.teacher, ids, mask=mask, token_ids=tokens, temperature=0.8)
    assert_same(case._replace(teacher=support), upstream=reduction == "none")


@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("member", some(MEMBERS, 3), ids=str)
def test_a_teacher_of_hidden_states(
    member: dict[str, Any], shaped: bool, linear_backend: str
) -> None:
    case = calls(**member, backend=linear_backend)
    hidden, weight = integers(N, H, seed=4), integers(TEACHERS_VOCAB, H, seed=5)
    head = LinearLogits(hidden, weight, scale=0.5, softcap=4.0 if shaped else None)
    logits = plain.shaped(hidden @ weight.t(), head.scale, head.softcap)
    for student in (case.head, case.logits):
        numbers = []
        for teacher in (head, logits):
            leaves = case.leaves()
            numbers.append(results(case._replace(teacher=teacher), student(leaves), leaves, False))
        for a, b in zip(*numbers, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


@composed
@pytest.mark.parametrize("outside", ["bucket", "renormalize"])
@pytest.mark.parametrize("support", ["teacher", "student"])
def test_loss_log_probs_and_statistics_are_one_call(
    outside: str, support: str, linear_backend: str
) -> None:
    options = {"outside": outside, "support": support, "backend": linear_backend}
    both = {"return_token_logprobs": True, "return_stats": True}
    for reduction in ("mean", "none"):
        case = calls(**options, reduction=reduction)
        assert_same(case._replace(options={**case.options, **both}), upstream=True)
        case = plain_calls(**options, reduction=reduction, return_stats=True)
        assert_same(case)
    case = calls(**options, reduction="none")
    leaves = case.leaves()
    given = {**case.options, **both}
    loss, logprobs, stats = topk_divergence(case.head(leaves), case.teacher, K, **given)
    alone = topk_divergence(case.head(leaves), case.teacher, K, **case.options)
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-6)
    names = ("mask", "temperature", "vocab_size", "backend")
    token_options = {name: case.options[name] for name in names}
    alone = token_logprobs(case.head(leaves), case.options["token_ids"], **token_options)
    torch.testing.assert_close(logprobs, alone, rtol=1e-6, atol=1e-6)
    watched = {**case.options, "return_stats": ("student_mass", "student_entropy", "overlap")}
    _, alone = topk_divergence(case.head(leaves), case.teacher, K, **watched)
    for name in watched["return_stats"]:
        torch.testing.assert_close(
            getattr(stats, name), getattr(alone, name), rtol=1e-6, atol=1e-6, equal_nan=True
        )


@composed
def test_rows_of_several_dimensions_and_temperatures_of_their_own(linear_backend: str) -> None:
    hidden, weight = integers(4, 3, 2 * H)[..., ::2].transpose(0, 1), integers(V, H, seed=1)
    hidden = hidden.contiguous().transpose(0, 1).transpose(0, 1)
    teacher, temperature = normal(3, 4, V, seed=2), normal(3, 4, seed=3).abs() + 0.5
    for reduction in ("mean", "none"):
        grads = []
        for head in (True, False):
            leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
            student: Any = LinearLogits(*leaves) if head else leaves[0] @ leaves[1].t()
            loss = topk_divergence(
                student, teacher, K, outside="bucket", temperature=temperature,
                reduction=reduction, backend=linear_backend,
            )  # fmt: skip
            assert loss.shape == ((3, 4) if reduction == "none" else ())
            grads.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@composed
@pytest.mark.parametrize("rows", [(), (0,), (2, 0)])
def test_one_row_and_none(rows: tuple[int, ...], linear_backend: str) -> None:
    for reduction in ("mean", "none"):
        hidden = integers(*rows, H).requires_grad_()
        weight = integers(V, H, seed=1).requires_grad_()
        teacher, tokens = normal(*rows, V, seed=2), torch.zeros(rows, dtype=torch.int64)
        loss, logprobs = topk_divergence(
            LinearLogits(hidden, weight), teacher, K, outside="bucket", token_ids=tokens,
            return_token_logprobs=True, reduction=reduction, backend=linear_backend,
        )  # fmt: skip
        assert logprobs.shape == rows
        (loss.sum() + logprobs.sum()).backward()
        loss = topk_divergence(
            LinearLogits(hidden, weight), teacher, K, outside="bucket", reduction=reduction,
            backend=linear_backend,
        )  # fmt: skip
        loss.sum().backward()
        assert weight.grad is not None
        assert weight.grad.isfinite().all()
        assert bool(weight.grad.any()) == (0 not in rows)


def test_all_rows_masked_have_loss_and_gradient_0(linear_backend: str) -> None:
    for reduction in ("mean", "none"):
        case = calls(outside="bucket", reduction=reduction, backend=linear_backend)
        case.options["mask"] = torch.zeros(N, dtype=torch.bool)
        case.hidden.fill_(torch.nan)
        leaves = case.leaves()
        loss = topk_divergence(case.head(leaves), case.teacher, K, **case.options)
        loss.sum().backward()
        assert not loss.any()
        for leaf in leaves:
            assert leaf.grad is not None
            assert not leaf.grad.any()


@composed
def test_only_gradients_that_are_needed(linear_backend: str) -> None:
    for reduction, sampled in itertools.product(("mean", "none"), ("exact", "sampled")):
        case = plain_calls(
            outside="bucket", reduction=reduction, background=sampled, backend=linear_backend
        )
        whole = case.leaves()
        loss = topk_divergence(case.head(whole), case.teacher, K, **case.options)
        expected = torch.autograd.grad(loss.sum(), whole)
        for which in ((0,), (1,), (2,), (0, 2)):
            leaves = [x.clone() for x in (case.hidden, case.weight, case.bias)]
            for i in which:
                leaves[i].requires_grad_()
            topk_divergence(case.head(leaves), case.teacher, K, **case.options).sum().backward()
            for i, leaf in enumerate(leaves):
                assert (leaf.grad is not None) == (i in which)
                if leaf.grad is not None:
                    assert torch.equal(leaf.grad, expected[i])


@pytest.fixture
def small_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two rows or so: many pieces, the last of them smaller."""
    monkeypatch.setitem(plain.WORKSPACE_BYTES, "cpu", 2 * V * 4)
    monkeypatch.setattr(plain, "TILE_ROWS", 2)


@pytest.mark.usefixtures("small_workspace")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pieces_of_rows_and_of_columns(dtype: torch.dtype, linear_backend: str) -> None:
    for reduction in ("mean", "none"):
        options = {"outside": "bucket", "reduction": reduction, "backend": linear_backend}
        # A gradient in 16 bits is rounded at most twice, the logits' and its own.
        tolerance = 2e-6 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
        assert_same(calls(dtype=dtype, **options), tolerance, upstream=reduction == "none")


@pytest.mark.skipif(INTERPRETED, reason="the reference's own mathematics")
@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_float64_is_float64(member: dict[str, Any]) -> None:
    for reduction in ("mean", "none"):
        case = calls(dtype=torch.float64, **member, reduction=reduction)
        case = case._replace(teacher=case.teacher.double())
        assert_same(case, 1e-13, upstream=reduction == "none")


@pytest.mark.skipif(INTERPRETED, reason="the reference's own mathematics")
@pytest.mark.parametrize("of_support", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_in_float64_of_a_narrower_head(reduction: str, of_support: bool) -> None:
    """It was refused where forward makes the gradient."""
    case = calls(outside="bucket", reduction=reduction)
    teacher: Any = case.teacher.double()
    if of_support:
        teacher = select_topk(teacher, K, with_logsumexp=True, temperature=0.8)
    assert_same(case._replace(teacher=teacher), upstream=reduction == "none")


@composed
def test_random_heads_lose_what_the_product_does(linear_backend: str) -> None:
    """Beside float64: as near as the logits' loss is, on which a product of its own is rounded."""
    hidden, weight = normal(N, 64), normal(V, 64, seed=1) / 4
    teacher = normal(N, V, seed=2) * 2
    for reduction in ("mean", "none"):
        found = {}
        for name, dtype in (("head", torch.float32), ("logits", torch.float32),
                            ("exact", torch.float64)):  # fmt: skip
            leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
            student: Any = LinearLogits(*leaves) if name == "head" else leaves[0] @ leaves[1].t()
            loss = topk_divergence(
                student, teacher.to(dtype), K, outside="bucket", reduction=reduction,
                backend="reference" if name == "exact" else linear_backend,
            )  # fmt: skip
            found[name] = [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]
        for a, b, exact in zip(*found.values(), strict=True):
            unit = torch.finfo(torch.float32).eps * exact.abs().max()
            assert (a - exact).abs().max() <= 4 * (b - exact).abs().max() + 8 * unit


# The sampled background


def enumerated(case: Calls, weights: Tensor) -> Iterator[tuple[float, list[Tensor]]]:
    """(probability, gradients) of every token of every row, on its own."""
    width = case.options.get("vocab_size", V)
    with torch.no_grad():
        p = (case.logits(case.leaves()) / case.options["temperature"])[:, :width].softmax(-1)
    rows = len(case.hidden)
    mask = case.options.get("mask", torch.ones(rows, dtype=torch.bool))
    for i, y in itertools.product(mask.nonzero()[:, 0].tolist(), range(width)):
        alone = torch.zeros_like(weights)
        alone[i] = weights[i]
        options = {**case.options, "token_ids": torch.full((rows,), y), "weight": alone}
        leaves = case.leaves()
        loss = topk_divergence(case.head(leaves), case.teacher, K, **options)
        yield float(p[i, y]), list(torch.autograd.grad(loss, leaves))


@pytest.mark.skipif(INTERPRETED, reason="the mean over all tokens takes thousands of calls")
@pytest.mark.parametrize("outside", ["truncate", "bucket", "generalize"])
@pytest.mark.parametrize("shaped", [False, True])
def test_the_mean_of_a_sampled_background_is_the_exact_one(outside: str, shaped: bool) -> None:
    small: dict[str, Any] = {"outside": outside, "background": "sampled", "reduction": "sum"}
    case = calls(dtype=torch.float64, **small) if shaped else plain_calls(**small)
    tensors = [x.double() for x in (case.hidden[:3], case.weight[:29], case.bias[:29])]
    case = Calls(
        *tensors, case.scale, case.softcap, case.teacher[:3, :31].double(), dict(case.options)
    )
    limits = {"vocab_size": 27} if shaped else {"vocab_size": 29}
    case.options.update(limits)
    for name in ("mask", "token_ids"):
        if name in case.options:
            case.options[name] = case.options[name][:3]
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    leaves = case.leaves()
    exact = {**case.options, "background": "exact", "weight": weights}
    loss = topk_divergence(case.head(leaves), case.teacher, K, **exact)
    expected = torch.autograd.grad(loss, leaves)
    mean = [torch.zeros_like(x) for x in leaves]
    for p, grads in enumerated(case, weights):
        for total, grad in zip(mean, grads, strict=True):
            total += p * grad
    for found, wanted in zip(mean, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@composed
def test_a_log_sum_exp_that_is_given_changes_nothing(linear_backend: str) -> None:
    for background, reduction in itertools.product(("exact", "sampled"), ("mean", "none")):
        case = calls(
            outside="bucket", background=background, reduction=reduction, backend=linear_backend
        )
        logits = case.logits(case.leaves()).detach()[:, :WIDTH].double()
        given = (logits / 0.8).logsumexp(-1)
        found = []
        for logsumexp in (None, given):
            leaves = case.leaves()
            options = {**case.options, "student_logsumexp": logsumexp}
            loss = topk_divergence(case.head(leaves), case.teacher, K, **options)
            found.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@composed
def test_a_teacher_may_be_float64() -> None:
    for reduction in ("mean", "none"):
        case = plain_calls(outside="bucket", reduction=reduction)
        case = case._replace(
            teacher=select_topk(case.teacher.double(), K, with_logsumexp=True, temperature=0.8)
        )
        assert_same(case)


@composed
def test_masked_rows_may_have_any_temperature(linear_backend: str) -> None:
    for background, reduction in itertools.product(("exact", "sampled"), ("mean", "none")):
        case = calls(
            outside="bucket", background=background, reduction=reduction, backend=linear_backend
        )
        case.options["token_ids"].clamp_(min=0)
        found = []
        for anything in (1.0, torch.nan, 0.0):
            case.options["temperature"] = torch.where(case.options["mask"], 0.8, anything)
            found.append(results(case, case.head(leaves := case.leaves()), leaves, False))
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                assert torch.equal(a, b)


@composed
def test_a_sampled_token_of_probability_0_has_no_gradient(linear_backend: str) -> None:
    """Its share and all others' are below float64's least number; a stale rollout may hold it."""
    hidden = torch.full((1, V), -800.0)
    hidden[:, :K] = normal(1, K)
    teacher = torch.where(torch.arange(V) < K, 20.0, 0.0) + normal(1, V)
    found = []
    for background in ("exact", "sampled"):
        leaf = hidden.clone().requires_grad_()
        loss = topk_divergence(
            LinearLogits(leaf, torch.eye(V)), teacher, K, outside="bucket", background=background,
            token_ids=torch.tensor([V - 1]), backend=linear_backend,
        )  # fmt: skip
        found.append(torch.autograd.grad(loss, leaf)[0])
    assert found[0].any()
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_a_sampled_token_that_does_not_exist_makes_its_row_nan(linear_backend: str) -> None:
    case = plain_calls(
        outside="bucket", background="sampled", reduction="none", backend=linear_backend
    )
    case.options["token_ids"][2] = V
    leaves = case.leaves()
    loss = topk_divergence(case.head(leaves), case.teacher, K, **case.options)
    assert loss.isnan().nonzero().flatten().tolist() == [2]
    (grad,) = torch.autograd.grad(loss.sum(), leaves[:1])
    assert grad.isnan().any(-1).nonzero().flatten().tolist() == [2]


def test_a_log_prob_of_a_token_that_does_not_exist_is_nan(linear_backend: str) -> None:
    case = plain_calls(
        outside="bucket", return_token_logprobs=True, banned_ids=list(range(4, V)),
        backend=linear_backend,
    )  # fmt: skip
    case.options["token_ids"][2] = V  # beside ids that are missing, as 4 are allowed
    _, logprobs = topk_divergence(case.head(case.leaves()), case.teacher, K, **case.options)
    assert logprobs.isnan().nonzero().flatten().tolist() == [2]


def test_an_id_that_is_listed_twice_counts_once_in_a_sampled_background(
    linear_backend: str,
) -> None:
    case = plain_calls(
        outside="bucket", background="sampled", reduction="none", backend=linear_backend
    )
    once = score_ids(case.teacher, select_topk(case.teacher, K).ids, temperature=0.8)
    ids, logits = (torch.cat((x, x[:, :1]), -1) for x in (once.ids, once.logits))
    case.options["token_ids"] = case.teacher[:, :V].argmin(-1)
    found = []
    for teacher in (once, TopK(ids, logits, once.logsumexp, once.tail_logsumexp, None, 0.8)):
        leaves = case.leaves()
        loss = topk_divergence(case.head(leaves), teacher, **case.options)
        found.append(torch.autograd.grad(loss.sum(), leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@composed
def test_rows_of_only_minus_infinity_are_0_with_their_log_sum_exp(linear_backend: str) -> None:
    case = plain_calls(outside="bucket", reduction="none", backend=linear_backend)
    case.bias.fill_(-torch.inf)
    given = torch.full((N,), -torch.inf)
    for options in (case.options, {**case.options, "student_logsumexp": given}):
        leaves = case.leaves()
        loss = topk_divergence(case.head(leaves), case.teacher, K, **options)
        grads = torch.autograd.grad(loss.sum(), leaves)
        assert not any(x.any() for x in (loss, *grads))


@pytest.mark.parametrize("outside", ["renormalize", "bucket"])
def test_the_log_prob_of_a_token_that_does_not_exist_is_nan(
    outside: str, linear_backend: str
) -> None:
    hidden, weight = normal(3, 6).requires_grad_(), normal(40, 6)
    tokens = torch.tensor([35, 2, -100])  # beyond vocab_size, fine, none
    mask = torch.tensor([True, True, False])
    _, logprobs = topk_divergence(
        LinearLogits(hidden, weight),
        normal(3, 40),
        8,
        outside=outside,
        vocab_size=30,
        token_ids=tokens,
        mask=mask,
        return_token_logprobs=True,
        backend=linear_backend,
    )
    assert logprobs.isnan().tolist() == [True, False, False]
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isnan().any(-1).tolist() == [True, False, False]
    assert not hidden.grad[2].any()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"token_ids": None}, "token_ids"),
        ({"outside": "sample"}, 'outside="sample"'),
        ({"include_token": True}, "include_token"),
        ({"return_token_logprobs": True}, "return_token_logprobs"),
    ],
)
def test_where_a_sampled_background_is_biased_it_is_refused(
    options: dict[str, Any], named: str
) -> None:
    case = plain_calls(outside="bucket", background="sampled")
    with pytest.raises(ValueError, match=named):
        topk_divergence(case.head(case.leaves()), case.teacher, K, **{**case.options, **options})


def test_a_log_sum_exp_is_one_number_a_row() -> None:
    case = plain_calls(outside="bucket")
    head = case.head(case.leaves())
    for wrong, error in (
        (torch.zeros(N + 1), ValueError), (torch.tensor(0.0), ValueError), (0.0, TypeError),
        (torch.zeros(N, dtype=torch.int64), TypeError),
        (torch.zeros(N, requires_grad=True), ValueError),
    ):  # fmt: skip
        with pytest.raises(error, match="student_logsumexp"):
            topk_divergence(head, case.teacher, K, outside="bucket", student_logsumexp=wrong)


# Products, memory, PyTorch


@pytest.mark.skipif(INTERPRETED, reason="counts PyTorch's calls")
@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        ({"reduction": "mean"}, 3, 0),
        ({"reduction": "mean", "return_stats": True}, 3, 0),
        ({"reduction": "none"}, 1, 3),
        ({"return_token_logprobs": True, "return_stats": True}, 1, 3),
        ({"support": "student", "return_stats": True}, 1, 3),
        ({"background": "sampled"}, 1, 0),
        ({"background": "sampled", "student_logsumexp": torch.full((N,), 9.0)}, 0, 0),
        ({"outside": "renormalize"}, 0, 0),
        ({"outside": "renormalize", "return_stats": True}, 1, 0),
    ],
    ids=str,
)
def test_products_with_the_whole_head(options: dict[str, Any], forward: int, backward: int) -> None:
    case = plain_calls(**{"outside": "bucket", **options})
    leaves = case.leaves()
    counted = ("aten::mm", "aten::addmm", "aten::addmm_")

    def products(profile: Any) -> int:
        return sum(e.count for e in profile.key_averages() if e.key in counted)

    with torch.profiler.profile() as profile:
        found = topk_divergence(case.head(leaves), case.teacher, K, **case.options)
    assert products(profile) == forward
    found = found if isinstance(found, tuple) else (found,)
    total = found[0].sum() + (found[1].sum() if case.options.get("return_token_logprobs") else 0)
    with torch.profiler.profile() as profile:
        total.backward()
    assert products(profile) == backward


@pytest.mark.skipif(INTERPRETED, reason="memory of this process")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_is_the_gradients_and_a_workspace(reduction: str) -> None:
    rows, hidden, vocab = 300, 64, 200_000
    growth = peak_growth(f"""
        from opd_kernels import topk_divergence
        N = {rows}
        weight = torch.randn({vocab}, {hidden}).requires_grad_()
        def call(n):
            hidden = torch.randn(n, {hidden}).requires_grad_()
            ids = torch.arange(32, dtype=torch.int32).repeat(n, 1)
            teacher = TopK(ids, torch.randn(n, 32), logsumexp=torch.full((n,), 9.0))
            weight.grad = None
            loss = topk_divergence(
                LinearLogits(hidden, weight), teacher, outside="bucket", reduction="{reduction}"
            )
            loss.sum().backward()
            return hidden
    """)
    gradient = vocab * hidden * 4
    # The workspace holds at least 128 rows.
    workspace = max(64 << 20, 128 * vocab * 4)
    assert growth < gradient + workspace + (24 << 20)
    assert workspace < rows * vocab * 4 / 2


def twice(loss: Tensor, leaf: Tensor) -> None:
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    grad.sum().backward()


@composed
def test_a_reduced_loss_is_differentiated_once(linear_backend: str) -> None:
    case = plain_calls(outside="bucket", backend=linear_backend)
    leaves = case.leaves()
    loss = topk_divergence(case.head(leaves), case.teacher, K, **case.options)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='reduction="none"'):
        loss.backward()
    for reduction in ("mean", "none"):
        loss = topk_divergence(
            case.head(leaves), case.teacher, K, **{**case.options, "reduction": reduction}
        )
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            twice(loss.sum(), leaves[0])


@composed
def test_gradients_add_up_and_repeat_their_bits(linear_backend: str) -> None:
    case = plain_calls(outside="bucket", backend=linear_backend)
    leaves, others = case.leaves(), case.leaves()
    for _ in range(2):
        topk_divergence(case.head(leaves), case.teacher, K, **case.options).backward()
    (2 * topk_divergence(case.head(others), case.teacher, K, **case.options)).backward()
    for a, b in zip(leaves, others, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize(
    ("options", "compiler"),
    [
        ({}, "inductor"),
        ({"background": "sampled"}, "aot_eager"),
        ({"return_token_logprobs": True}, "aot_eager"),
    ],
    ids=str,
)
def test_compiled_as_eager(options: dict[str, Any], compiler: str) -> None:
    case = plain_calls(outside="bucket", **options)

    def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        found = topk_divergence(case.head([hidden, weight, bias]), case.teacher, K, **case.options)
        return found[0] + found[1].mean() if isinstance(found, tuple) else found

    found = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend=compiler)):
        leaves = case.leaves()
        loss = function(*leaves)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(INTERPRETED, reason="PyTorch's own")
def test_transforms_of_torch_func() -> None:
    case = plain_calls(outside="bucket")

    def loss_of(hidden: Tensor) -> Tensor:
        return topk_divergence(
            case.head([hidden, case.weight, case.bias]), case.teacher, K, **case.options
        )

    hidden = torch.stack((case.hidden, case.hidden.flip(0)))
    found = torch.vmap(torch.func.grad(loss_of))(hidden)
    for one, grad in zip(hidden, found, strict=True):
        leaf = one.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss_of(leaf), leaf)
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-8)


@composed
def test_autocast_casts_the_head(linear_backend: str) -> None:
    case = plain_calls(outside="bucket", backend=linear_backend)
    leaves, others = case.leaves(), case.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        loss = topk_divergence(case.head(leaves), case.teacher, K, **case.options)
        expected = topk_divergence(case.logits(others), case.teacher, K, **case.options)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    assert [leaf.grad.dtype for leaf in leaves if leaf.grad is not None] == [torch.float32] * 3
