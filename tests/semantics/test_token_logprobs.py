"""Log-probs of the sampled tokens beside a loss and on their own, against float64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch

from opd_kernels import TopK, select_topk, token_logprobs, topk_divergence

INF, NAN = float("inf"), float("nan")
BACKENDS = ["cpu", "reference"]
OUTSIDES = ["renormalize", "truncate", "bucket", "generalize", "sample"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ROWS, V, K = (2, 4), 77, 6
BANNED = [3, 60]
MASK = torch.tensor([[True, True, False, True], [True, True, True, False]])
# One per row: in the support or not (rows 0 and 1), masked (2 and 7), banned, at the ends.
TOKENS = torch.tensor([[0, 40, -100, 60], [76, 11, 3, 500]])


def logits(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 3.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)


class Exact(NamedTuple):
    """Log-probs, their gradient for one upstream gradient each, and bounds on others' errors."""

    logp: torch.Tensor
    grad: torch.Tensor
    logp_budget: torch.Tensor
    grad_budget: torch.Tensor
    p_error: torch.Tensor  # relative


def exact(
    z: torch.Tensor,
    tokens: torch.Tensor,
    upstream: torch.Tensor,
    temperature: Any = 1.0,
    mask: torch.Tensor | None = None,
    vocab_size: int | None = None,
) -> Exact:
    """log_softmax and gather in float64; 0 in masked rows and beyond vocab_size.

    An exponent x / T is off by its own rounding and that of T, 2 u |x| / T, a sum of exponentials
    by 4 u each and its own (32 + log2 V) u: so are log-sum-exp and log-prob. p = exp(x / T - lse)
    is off by this, 8 u and 3 u of its exponent, and may be 0 where it is below the least normal
    number. The gradient (1 - p or -p) / T adds four roundings.
    """
    width, u = min(z.shape[-1], vocab_size or z.shape[-1]), unit_of(z.dtype)
    mask = torch.ones(tokens.shape, dtype=torch.bool) if mask is None else mask
    temperature = torch.as_tensor(temperature, dtype=torch.float64).expand(tokens.shape)[..., None]
    scaled = z.detach().double().masked_fill(~mask[..., None], 0) / temperature
    scaled[..., width:] = -INF
    logp = scaled.log_softmax(-1)
    places = tokens.long().masked_fill(~mask, 0)[..., None]
    ones = torch.zeros_like(logp).scatter(-1, places, 1)
    size = upstream.double().masked_fill(~mask, 0)[..., None] / temperature
    grad = size * (ones - logp.exp())
    finite = scaled.masked_fill(scaled == -INF, 0)
    off = 4 * u * finite.abs().amax(-1) + (36 + math.log2(z.shape[-1]) + 4) * u
    p_error = off[..., None] + 8 * u + 3 * u * logp.masked_fill(logp == -INF, 0).abs()
    picked = logp.gather(-1, places)[..., 0].masked_fill(~mask, 0)
    grad_budget = size.abs() * (logp.exp() * p_error + least_of(z.dtype)) + 4 * u * grad.abs()
    return Exact(picked, grad, off + u * picked.abs(), grad_budget, p_error)


def unit_of(dtype: torch.dtype) -> float:
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


def least_of(dtype: torch.dtype) -> float:
    """The least normal number of the arithmetic."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny


def assert_close(found: torch.Tensor, wanted: torch.Tensor, budget: torch.Tensor) -> None:
    """Within the budget and half a unit of the dtype more."""
    info = torch.finfo(found.dtype)
    budget = budget + wanted.abs() * info.eps / 2 + info.smallest_normal * info.eps
    off = (found.double() - wanted).abs()
    assert (off <= budget).all(), f"off by {off.max()}, {(off / budget).max()} times the budget"


def call(
    student: torch.Tensor, teacher: Any, tokens: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, ...]:
    k = None if isinstance(teacher, TopK) else K
    return topk_divergence(
        student,
        teacher,
        k,
        token_ids=tokens,
        reduction="none",
        return_token_logprobs=True,
        **options,
    )


def loss_alone(
    student: torch.Tensor, teacher: Any, tokens: torch.Tensor, **options: Any
) -> torch.Tensor:
    k = None if isinstance(teacher, TopK) else K
    return topk_divergence(student, teacher, k, token_ids=tokens, reduction="none", **options)


def both_gradients(
    student: torch.Tensor,
    teacher: Any,
    tokens: torch.Tensor,
    upstreams: tuple[torch.Tensor | None, torch.Tensor | None],
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, log-probs, gradient) of one call for its two upstream gradients."""
    leaf = student.detach().requires_grad_()
    found = call(leaf, teacher, tokens, **options)
    pairs = [(x, g) for x, g in zip(found, upstreams, strict=True) if g is not None]
    (grad,) = torch.autograd.grad([x for x, _ in pairs], leaf, [g for _, g in pairs])
    return found[0].detach(), found[1].detach(), grad


def check(
    student: torch.Tensor,
    teacher: Any,
    tokens: torch.Tensor,
    *,
    temperature: Any = 1.0,
    mask: torch.Tensor | None = None,
    vocab_size: int | None = None,
    **options: Any,
) -> None:
    """One call against float64, and against the loss and the log-probs on their own."""
    shared = {"temperature": temperature, "mask": mask, "vocab_size": vocab_size}
    shape = tokens.shape
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    of_loss, of_logp = logits(*shape, seed=5, dtype=wide), logits(*shape, seed=6, dtype=wide)
    if mask is not None:
        of_loss, of_logp = (x.masked_fill(~mask, NAN) for x in (of_loss, of_logp))
    wanted, grad_logp, logp_budget, grad_budget, p_error = exact(student, tokens, of_logp, **shared)
    keep = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    # Where a listed entry is absent, the tail without it was summed in two steps.
    same_bits = not (isinstance(teacher, TopK) or options.get("include_token"))

    leaf = student.detach().requires_grad_()
    alone = loss_alone(leaf, teacher, tokens, **shared, **options)
    (grad_loss,) = torch.autograd.grad(alone, leaf, of_loss)

    # Both, the loss's upstream gradient alone, the log-probs' alone.
    for upstreams in ((of_loss, of_logp), (of_loss, None), (None, of_logp)):
        loss, logp, grad = both_gradients(student, teacher, tokens, upstreams, **shared, **options)
        if same_bits:
            assert torch.equal(loss, alone)
        torch.testing.assert_close(loss, alone.detach(), rtol=2e-6, atol=2e-6)
        assert logp.dtype == wide
        assert_close(logp, wanted, logp_budget)
        assert (logp[~keep] == 0).all()
        assert (grad[~keep] == 0).all()
        assert grad.dtype == student.dtype
        if vocab_size is not None:
            assert (grad[..., vocab_size:] == 0).all()
        expected = grad_loss.double() * (upstreams[0] is not None)
        # The loss's own gradient was rounded to its dtype, and the sum is once more. The token is
        # an entry of its own, so the background there has a p of other roundings, which is 0 in a
        # background if it is below the least normal number, times a factor of up to 1e25.
        info, u = torch.finfo(student.dtype), unit_of(student.dtype)
        budget = expected.abs() * (info.eps / 2 + 4 * u + p_error) + info.smallest_normal * info.eps
        budget = budget + least_of(student.dtype) * 1e25
        if not same_bits:
            budget = budget + 2e-6 * (1 + expected.abs())
        if upstreams[1] is None:
            at = torch.zeros_like(grad, dtype=torch.bool)
            at.scatter_(-1, tokens.long().masked_fill(~keep, 0)[..., None], True)
            if same_bits:
                assert torch.equal(grad[~at], grad_loss[~at])
            assert_close(grad, expected, budget)
        else:
            assert_close(grad, expected * keep[..., None] + grad_logp, budget + grad_budget)

    # Log-probs on their own have the same numbers.
    leaf = student.detach().requires_grad_()
    apart = token_logprobs(leaf, tokens, **shared, backend=options.get("backend"))
    assert_close(apart.detach(), wanted, logp_budget)
    (grad,) = torch.autograd.grad(apart, leaf, of_logp)
    assert_close(grad, grad_logp, grad_budget)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("outside", OUTSIDES)
def test_with_every_divergence(outside: str, support: str, backend: str) -> None:
    student, teacher = logits(*ROWS, V), logits(*ROWS, V - 3, seed=1)
    student[~MASK], teacher[~MASK] = NAN, NAN
    tokens = TOKENS.clone()
    tokens[0, 0] = teacher[0, 0].argmax()  # in both supports, mostly
    tokens[1, 0] = student[1, 0].argmax()
    options = {"outside": outside, "support": support, "backend": backend, "banned_ids": BANNED}
    for joins in (False, True)[: 1 + (outside != "sample")]:
        for temperature in (1.0, 0.7, torch.linspace(0.4, 2, 8).view(ROWS)):
            check(
                student,
                teacher,
                tokens,
                temperature=temperature,
                mask=MASK,
                include_token=joins,
                **options,
            )


@pytest.mark.parametrize("outside", OUTSIDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_with_every_dtype(dtype: torch.dtype, outside: str) -> None:
    """Rows further apart than they are long and misaligned, a vocabulary with padding."""
    student = logits(*ROWS, V + 3, dtype=dtype)[..., 1:-2]
    student[..., 70:] += 8  # padding that would hold nearly everything
    teacher = logits(*ROWS, V, seed=1, dtype=dtype)
    tokens = TOKENS.clamp(max=69).to(torch.int32)
    check(student, teacher, tokens, mask=MASK, vocab_size=70, outside=outside, temperature=1.3)
    transposed = student.transpose(0, 1)
    flipped = teacher.transpose(0, 1), tokens.t()
    check(transposed, *flipped, mask=MASK.t(), vocab_size=70, outside=outside)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outside", OUTSIDES)
def test_with_a_served_support(outside: str, backend: str) -> None:
    """It lists ids twice, banned ones, absent ones and ids that do not exist."""
    student, teacher = logits(5, V), logits(5, V, seed=1)
    ids = torch.tensor(
        [
            [4, 9, 4, -1, 60, 0],
            [9, 9, 2, 7, V, 0],
            [-1, -1, 60, -7, 7, 7],
            [5, 1, 2, 8, 9, 10],
            [-1, -1, -1, -1, -1, -1],
        ]
    )
    values = teacher.gather(-1, ids.clamp(0, V - 1)).masked_fill((ids < 0) | (ids >= V), -INF)
    values[3, 0] = -INF
    tokens = torch.tensor([4, 0, 60, 5, 30])  # twice there, there, banned, of value -inf, absent
    at = teacher.gather(-1, tokens[:, None])[:, 0]
    whole = teacher.logsumexp(-1)
    support = TopK(ids, values, whole, None, at, 1.0)
    for joins in (False, True)[: 1 + (outside != "sample")]:
        check(
            student,
            support,
            tokens,
            outside=outside,
            include_token=joins,
            banned_ids=[60],
            backend=backend,
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outside", OUTSIDES)
def test_a_token_that_does_not_exist_makes_its_row_nan(outside: str, backend: str) -> None:
    student, teacher = logits(5, V), logits(5, V, seed=1)
    good = torch.tensor([1, 2, 3, 4, 5])
    bad = torch.tensor([1, -1, 70, -100, 5])  # beyond vocab_size, one masked
    mask = torch.tensor([True, True, True, False, True])
    options = {"outside": outside, "backend": backend, "mask": mask, "vocab_size": 70}
    ones = torch.ones(5)
    _, clean, clean_grad = both_gradients(student, teacher, good, (ones, ones), **options)
    _, logp, grad = both_gradients(student, teacher, bad, (ones, ones), **options)
    alone = student.clone().requires_grad_()
    apart = token_logprobs(alone, bad, mask=mask, vocab_size=70, backend=backend)
    apart.sum().backward()
    for found, gradient in ((logp, grad), (apart, alone.grad)):
        assert found.isnan().tolist() == [False, True, True, False, False]
        assert found[3] == 0
        assert gradient[1:3, :70].isnan().all()
        assert (gradient[3] == 0).all()
        assert (gradient[:, 70:] == 0).all()
    assert torch.equal(logp[[0, 4]], clean[[0, 4]])
    assert torch.equal(grad[[0, 4]], clean_grad[[0, 4]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_row_makes_its_log_prob_nan_and_leaves_the_loss_alone(backend: str) -> None:
    """The renormalised loss only sees the support; its upstream gradient alone keeps its bits."""
    student, teacher = logits(4, V), logits(4, V, seed=1)
    tokens = torch.tensor([1, 2, 3, 4])
    far = teacher.argmin(-1)
    student[1, far[1]], student[2, far[2]] = NAN, INF
    student[3, far[3]] = -INF
    options = {"backend": backend}
    ones = torch.ones(4)
    leaf = student.clone().requires_grad_()
    alone = loss_alone(leaf, teacher, tokens, **options)
    alone.sum().backward()
    loss, logp, grad = both_gradients(student, teacher, tokens, (ones, None), **options)
    assert torch.equal(loss, alone)
    assert torch.equal(grad, leaf.grad)
    assert logp.isnan().tolist() == [False, True, True, False]
    _, _, grad = both_gradients(student, teacher, tokens, (ones, ones), **options)
    assert grad[1:3].isnan().all()
    assert grad[[0, 3]].isfinite().all()
    apart = token_logprobs(student, tokens, backend=backend)
    assert apart.isnan().tolist() == [False, True, True, False]
    assert token_logprobs(torch.full((1, 9), -INF), torch.tensor([2]), backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outside", OUTSIDES)
def test_a_nan_loss_leaves_the_gradient_of_the_log_prob_alone(outside: str, backend: str) -> None:
    student, teacher = logits(3, V), logits(3, V, seed=1)
    tokens = teacher.argmax(-1)
    clean = teacher.clone()
    teacher[1] = NAN
    ones, options = torch.ones(3), {"outside": outside, "backend": backend}
    _, clean_logp, expected = both_gradients(student, clean, tokens, (None, ones), **options)
    loss, logp, grad = both_gradients(student, teacher, tokens, (None, ones), **options)
    assert loss.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(logp, clean_logp)
    torch.testing.assert_close(grad, expected)
    for upstream in (None, ones):
        *_, grad = both_gradients(student, teacher, tokens, (ones, upstream), **options)
        assert grad[1].isnan().any()
        assert grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_background_beyond_float32_times_a_small_probability(backend: str) -> None:
    """The student gives the sampled token 0: the loss is -inf and its factor the largest number."""
    student, teacher = logits(1, V), logits(1, V, seed=1)
    token = teacher.argmin(-1)
    student[0, token], student[0, 5] = -INF, -60.0
    teacher[0, 5] = -INF  # not in the support
    four, options = torch.full((1,), 4.0), {"outside": "sample", "backend": backend}
    for upstream in (None, torch.ones(1)):
        *_, grad = both_gradients(student, teacher, token, (four, upstream), **options)
        assert 0 < grad[0, 5].abs() < 1e20


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_of_logit_minus_inf_has_that_log_prob(backend: str) -> None:
    student = logits(3, V)
    tokens = torch.tensor([1, 2, 3])
    student[1, 2] = -INF
    grad_wanted = exact(student, tokens, torch.ones(3)).grad
    leaf = student.clone().requires_grad_()
    found = token_logprobs(leaf, tokens, backend=backend)
    assert found[1] == -INF
    (grad,) = torch.autograd.grad(found, leaf, torch.ones(3))
    torch.testing.assert_close(grad.double(), grad_wanted, rtol=1e-5, atol=1e-6)
    ones = torch.ones(3)
    _, beside, grad = both_gradients(
        student, logits(3, V, seed=1), tokens, (None, ones), outside="bucket", backend=backend
    )
    assert beside[1] == -INF
    torch.testing.assert_close(grad.double(), grad_wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outside", OUTSIDES)
def test_upstream_gradients_of_any_form(outside: str, backend: str) -> None:
    """Stride 0, as ``sum`` sends; of either alone; 0 and NaN in masked rows."""
    student, teacher = logits(*ROWS, V), logits(*ROWS, V, seed=1)
    options = {"outside": outside, "backend": backend, "mask": MASK}
    tokens = TOKENS
    one = torch.tensor(1.5)
    dense = both_gradients(student, teacher, tokens, (one.expand(ROWS).clone(),) * 2, **options)
    strided = both_gradients(student, teacher, tokens, (one.expand(ROWS),) * 2, **options)
    for a, b in zip(dense, strided, strict=True):
        assert torch.equal(a, b)
    leaf = student.clone().requires_grad_()
    loss, logp = topk_divergence(
        leaf, teacher, K, token_ids=tokens, return_token_logprobs=True, reduction="sum", **options
    )
    (1.5 * (loss + logp.sum())).backward()
    assert torch.equal(leaf.grad, dense[2])
    poisoned = one.expand(ROWS).masked_fill(~MASK, NAN)
    for upstreams in ((poisoned, poisoned), (poisoned, None), (None, poisoned)):
        *_, grad = both_gradients(student, teacher, tokens, upstreams, **options)
        assert (grad[~MASK] == 0).all()
        assert grad[MASK].isfinite().all()
    nothing = torch.zeros(ROWS)
    *_, grad = both_gradients(student, teacher, tokens, (nothing, nothing), **options)
    assert (grad == 0).all()


def far_rows(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A student whose tail holds e^-90 and a teacher whose tail holds nearly everything."""
    student, teacher = logits(3, V).to(dtype), logits(3, V, seed=1).to(dtype)
    teacher[:, :K] += 12  # the support
    student[:, :K] += 95
    student[2, :K] -= 60  # and one row of an ordinary tail
    return student, teacher


@pytest.mark.parametrize("backend", BACKENDS)
def test_beside_a_background_relative_to_a_vanishing_tail(backend: str) -> None:
    """There the loss's gradient is q-sized outside of S, and the log-prob's is p / T."""
    student, teacher = far_rows(torch.float32)
    for tokens in (torch.tensor([0, 3, 2]), torch.tensor([30, 40, 50])):
        check(student, teacher, tokens, outside="bucket", divergence="forward_kl", backend=backend)
        check(student, teacher, tokens, outside="bucket", divergence="jsd", backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 3.0, 5.0])
def test_a_token_of_probability_near_one_keeps_its_digits(scale: float, backend: str) -> None:
    """log p is -1e-5 to -1e-30 there, where log(1 - x) of a float has no digit."""
    student = logits(4, V)
    tokens = torch.tensor([3, 9, 0, 76])
    student.scatter_(-1, tokens[:, None], 14 * scale)
    grad_wanted = exact(student, tokens, torch.ones(4)).grad
    rest = student.double().scatter(-1, tokens[:, None], -INF).logsumexp(-1)
    precise = -torch.log1p((rest - 14 * scale).exp())
    leaf = student.clone().requires_grad_()
    found = token_logprobs(leaf, tokens, backend=backend)
    torch.testing.assert_close(found.double(), precise, rtol=4e-6, atol=4e-15)
    (grad,) = torch.autograd.grad(found, leaf, torch.ones(4))
    torch.testing.assert_close(grad.double(), grad_wanted, rtol=4e-6, atol=4e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outside", ["renormalize", "bucket"])
def test_in_place_gradients_take_the_logits_memory(outside: str, backend: str) -> None:
    source, teacher = logits(*ROWS, V), logits(*ROWS, V, seed=1)
    tokens, upstream = TOKENS, logits(*ROWS, seed=3)
    options = {"outside": outside, "backend": backend, "mask": MASK}
    *_, expected = both_gradients(source, teacher, tokens, (upstream, upstream), **options)
    leaf = source.clone().requires_grad_()
    student = leaf * 1
    kept: list[torch.Tensor] = []
    student.register_hook(kept.append)
    loss, logp = call(student, teacher, tokens, inplace_grad=True, **options)
    version, memory = student._version, student.data_ptr()
    torch.autograd.backward([loss, logp], [upstream, upstream])
    assert torch.equal(leaf.grad, expected)
    assert student._version > version
    assert kept[0].data_ptr() == memory
    # Another consumer of the logits gets PyTorch's error.
    student = leaf * 1
    other = student.exp().sum() * 0 + student.square().sum()
    _, logp = call(student, teacher, tokens, inplace_grad=True, **options)
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    student = leaf * 1
    apart = token_logprobs(student, tokens, mask=MASK, inplace_grad=True, backend=backend)
    memory = student.data_ptr()
    kept.clear()
    student.register_hook(kept.append)
    apart.backward(upstream)
    assert kept[0].data_ptr() == memory


@pytest.mark.parametrize("outside", OUTSIDES)
def test_differentiating_twice_is_refused(outside: str) -> None:
    student = logits(3, V).requires_grad_()
    tokens = torch.tensor([1, 2, 3])
    found = call(student, logits(3, V, seed=1), tokens, outside=outside)
    for output in (*found, sum(found), token_logprobs(student, tokens)):
        (grad,) = torch.autograd.grad(output.sum(), student, create_graph=True)
        with pytest.raises(RuntimeError, match="token_logprobs cannot be differentiated twice"):
            grad.square().sum().backward()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (3, 1, 2)], ids=str)
def test_any_rows(shape: tuple[int, ...]) -> None:
    student, teacher = logits(*shape, V), logits(*shape, V, seed=1)
    tokens = torch.full(shape, 5)
    found = call(student.requires_grad_(), teacher, tokens, outside="bucket", return_stats=True)
    assert [x.shape for x in (*found[:2], found[2].student_mass)] == [shape] * 3
    (found[0].sum() + found[1].sum()).backward()
    assert student.grad.shape == student.shape
    apart = token_logprobs(student, tokens)
    torch.testing.assert_close(apart, found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outside", OUTSIDES)
def test_stats_change_no_bit(outside: str, backend: str) -> None:
    student, teacher = logits(*ROWS, V), logits(*ROWS, V, seed=1)
    options = {"outside": outside, "backend": backend, "mask": MASK}
    results = []
    for stats in (False, ("student_entropy",), True):
        leaf = student.clone().requires_grad_()
        loss, logp, *_ = call(leaf, teacher, TOKENS, return_stats=stats, **options)
        (loss.sum() + 2 * logp.sum()).backward()
        results.append((loss, logp, leaf.grad))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_the_mask_keeps_rows_from_being_read_and_all_masked_is_zero() -> None:
    student, teacher = torch.full((3, V), NAN), torch.full((3, V), NAN)
    tokens, mask = torch.full((3,), -100), torch.zeros(3, dtype=torch.bool)
    for outside in OUTSIDES:
        ones = torch.ones(3)
        found = both_gradients(student, teacher, tokens, (ones, ones), mask=mask, outside=outside)
        assert all((x == 0).all() for x in found)
    leaf = student.clone().requires_grad_()
    token_logprobs(leaf, tokens, mask=mask).sum().backward()
    assert (leaf.grad == 0).all()


def test_token_logprobs_of_a_selected_support_are_those_of_the_logits() -> None:
    """The teacher of a policy gradient: a support that carries its token's value."""
    teacher = logits(4, V)
    tokens = torch.tensor([1, 2, 3, 4])
    support = select_topk(teacher, K, with_logsumexp=True, token_ids=tokens)
    torch.testing.assert_close(
        (support.token_logits - support.logsumexp).float(), token_logprobs(teacher, tokens)
    )
