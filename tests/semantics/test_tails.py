"""The kernels of what lies outside of a support: tails and backgrounds, over their whole range.

The public functions' tests compare ordinary rows; here rows are peaked, far from 0, or hold NaN.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from effort import INTERPRETED
from tails import TAIL, entropy_of, tail_of

from opd_kernels._arguments import Allowed, Background, Objective, Tail, Tails, Temperature
from opd_kernels.backends import Backend
from opd_kernels.backends.cpu import backend
from opd_kernels.divergences import jsd

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_IDS = torch.full((1, 1), -1, dtype=torch.int32)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_within(found: torch.Tensor, expected: torch.Tensor, error: torch.Tensor) -> None:
    off = (found - expected).abs()
    assert found.dtype == torch.float64
    assert (off <= error).all(), f"off by up to {off.max()}, allowed are {error}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [7, 20, 70])
def test_tails_of_peaked_rows_keep_their_precision(
    dtype: torch.dtype, gap: int, kernel_backend: Backend
) -> None:
    """Tails of 1e-3 down to 1e-30 of the mass; 1 - P would have no digit left from 1e-7 on."""
    cases = itertools.product((1, 9, 511, 512, 2049, 5001), (0.3, 1.0, 2.0))
    for vocab, temperature in itertools.islice(cases, 0, None, 5 if INTERPRETED else 1):
        x = torch.randn(2 if INTERPRETED else 3, vocab, generator=seeded(vocab))
        x[:, torch.randperm(vocab, generator=seeded())[:5]] += gap
        x[0] -= 200
        x = x.to(dtype)
        tail = Tail(vocab, Temperature(temperature))
        k, allowed = min(8, vocab), Allowed(vocab)
        ids, values, found, entropy = kernel_backend.select_with_tail(x, k, allowed, tail)
        assert entropy is None
        expected = tail_of(x, ids, temperature)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=TAIL)
        given = tail._replace(ids=ids.long())
        assert torch.equal(kernel_backend.tail_logsumexp(x, None, given)[0], found)
        # An entropy more changes no bit of the rest, in either pass.
        tail, given = (which._replace(with_entropy=True) for which in (tail, given))
        again = kernel_backend.select_with_tail(x, k, allowed, tail)
        assert all(map(torch.equal, again, (ids, values, found, again[3])))
        assert_within(again[3], *entropy_of(x, ids, temperature))
        assert all(map(torch.equal, kernel_backend.tail_logsumexp(x, None, given), again[2:]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tails_are_over_their_width_without_what_is_listed(
    dtype: torch.dtype, kernel_backend: Backend
) -> None:
    """Ids outside of the width name nothing, repeats count once, 1024 ids share groups."""
    for k in (1, 30, 1024):
        x = (torch.randn(2, 5, 1800, generator=seeded(k)) * 3).to(dtype)[..., 1:1700]
        ids = torch.randint(-3, 1900, (2, 5, k), generator=seeded(k))
        mask = torch.tensor([[True, False, True, True, True]] * 2)
        rows = torch.rand(2, 5, generator=seeded(1)) + 0.5
        tail = Tail(1601, Temperature(1.0, rows), ids, True)
        found, entropy = kernel_backend.tail_logsumexp(x, mask, tail)
        for row in range(10):
            at = row // 5, row % 5
            expected = tail_of(x[at][:1601], ids[at], rows[at].item())
            torch.testing.assert_close(found[at], expected * mask[at], rtol=0, atol=TAIL)
            expected, error = entropy_of(x[at][:1601], ids[at], rows[at].item())
            assert_within(entropy[at], expected * mask[at], error)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_selection_may_sum_what_is_outside_of_other_ids(
    dtype: torch.dtype, kernel_backend: Backend
) -> None:
    """As where one side's support is given and the other's own best ids are wanted as well."""
    n = 1 if INTERPRETED else 2
    x = (torch.randn(n, 5, 1800, generator=seeded()) * 3).to(dtype)[..., 1:1700]
    ids = torch.randint(-3, 1900, (n, 5, 40), generator=seeded(1))
    mask = torch.tensor([[True, False, True, True, True]] * n)
    banned = torch.full((213,), 0x55, dtype=torch.uint8)  # every other id
    tail = Tail(1650, Temperature(0.7), ids, True)
    cases = ((1, banned, 1601), (12, banned, 1650), (12, None, 1500), (100, None, 1650))
    for k, bitmap, limit in cases[INTERPRETED:]:
        allowed = Allowed(limit, bitmap, mask)
        found = kernel_backend.select_with_tail(x, k, allowed, tail)
        assert all(map(torch.equal, found[:2], kernel_backend.select(x, k, allowed)))
        assert all(map(torch.equal, found[2:], kernel_backend.tail_logsumexp(x, mask, tail)))
    expected, error = entropy_of(x[..., :1650], ids, 0.7)
    assert_within(found[3], expected * mask, error)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_tail_alone_and_anywhere_in_memory(
    dtype: torch.dtype, kernel_backend: Backend
) -> None:
    """Few rows are read in pieces, and rows start at any address."""
    x = (torch.randn(2, 9001, generator=seeded()) * 3).to(dtype)[:, 1:]
    tail, allowed = Tail(9000, Temperature(0.7), None, True), Allowed(9000)
    together = kernel_backend.select_with_tail(x, 9, allowed, tail)
    for row in range(2):
        alone = kernel_backend.select_with_tail(x[row : row + 1], 9, allowed, tail)
        assert all(
            torch.equal(one[0], all_[row]) for one, all_ in zip(alone, together, strict=True)
        )
        given = tail._replace(ids=alone[0])
        found = kernel_backend.tail_logsumexp(x[row : row + 1], None, given)
        assert all(map(torch.equal, found, alone[2:]))
    masked = Allowed(9000, None, torch.zeros(1, dtype=torch.bool))
    ids, _, *nothing = kernel_backend.select_with_tail(x[:1], 9, masked, tail)
    assert (ids == -1).all()
    assert nothing == [0, 0]
    x = torch.randn(2, 2, 2, 40, generator=seeded()).to(dtype).permute(2, 1, 0, 3)
    ids = torch.randint(40, (2, 2, 2, 3), generator=seeded()).transpose(0, 1)
    rows = torch.rand(2, 2, 2, generator=seeded()).permute(1, 2, 0) + 0.5
    tail = Tail(40, Temperature(1.0, rows), ids, True)
    found = kernel_backend.tail_logsumexp(x, None, tail)
    again = kernel_backend.select_with_tail(x, 2, Allowed(40), tail)[2:]
    assert all(map(torch.equal, found, again))
    for place in itertools.product(range(2), repeat=3):
        expected = tail_of(x[place], ids[place], rows[place].item())
        torch.testing.assert_close(found[0][place], expected, rtol=0, atol=TAIL)
        expected, error = entropy_of(x[place], ids[place], rows[place].item())
        assert_within(found[1][place], expected, error)


def test_ids_of_many_groups_are_left_out_of_wide_rows(kernel_backend: Backend) -> None:
    x = torch.zeros(1, 40_000, dtype=torch.bfloat16)
    places = torch.arange(32_800, 40_000, 72)[None]  # 100 of them
    x[0, places[0]] = 300
    tail = Tail(40_000, Temperature(), NO_IDS, True)
    for ids, many, top in ((NO_IDS, 100, 300), (places, 39_900, 0)):
        found = torch.stack(kernel_backend.tail_logsumexp(x, None, tail._replace(ids=ids)))
        expected = torch.tensor([[top + math.log(many)], [math.log(many)]], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("vocab", [3, 700, 5001])
def test_entropies_of_flat_and_of_single_tails(vocab: int, kernel_backend: Backend) -> None:
    """log n of n equal logits, and 0 where one of them holds everything, or nothing is left."""
    x = torch.full((5, vocab), 3.0)
    x[1, 2:] = -math.inf
    x[2] = -math.inf
    x[3] = torch.finfo(torch.float32).max * torch.tensor([1, -1]).repeat(vocab)[:vocab]
    x[4] = -1e30
    ids = torch.zeros(5, 1, dtype=torch.int64)
    tail = Tail(vocab, Temperature(1.0), ids, True)
    _, entropy = kernel_backend.tail_logsumexp(x, None, tail)
    many, half = math.log(vocab - 1), math.log(max(1, (vocab + 1) // 2 - 1))
    expected = torch.tensor([many, 0, 0, half, many], dtype=torch.float64)
    torch.testing.assert_close(entropy, expected, rtol=1e-12, atol=1e-12)
    empty = kernel_backend.tail_logsumexp(x, None, tail._replace(width=1))
    assert [part.tolist() for part in empty] == [[-math.inf] * 5, [0] * 5]


@pytest.mark.parametrize("temperature", [1.2e-38, 1e-9, 1e-3, 30.0, 1e30, 3.4e38])
def test_entropies_at_every_temperature(temperature: float, kernel_backend: Backend) -> None:
    x = torch.randn(3, 3000, generator=seeded()) * 3
    x[1] *= 1e-6
    ids = x.topk(5).indices
    _, entropy = kernel_backend.tail_logsumexp(
        x, None, Tail(3000, Temperature(temperature), ids, True)
    )
    assert_within(entropy, *entropy_of(x, ids, temperature))


def test_tails_of_nothing_are_never_and_nan_is_found_anywhere(
    kernel_backend: Backend,
) -> None:
    never = torch.full((2, 700), -math.inf)
    never[1, 3] = 5
    ids = torch.tensor([[3], [3]])
    for width in (700, 0):
        found = kernel_backend.tail_logsumexp(never, None, Tail(width, Temperature(), ids, True))
        assert [part.tolist() for part in found] == [[-math.inf] * 2, [0, 0]]
    for place in (0, 511, 640, 699):
        x = torch.zeros(4, 700)
        # NaNs with every payload, which exponents are made from.
        x.view(torch.int32)[:3, place] = torch.tensor([0x7F800001, 0x7FC000FF, -1])
        x[3, place] = math.inf
        tail = Tail(700, Temperature(), NO_IDS.expand(4, 1), True)
        assert all(part.isnan().all() for part in kernel_backend.tail_logsumexp(x, None, tail))
    never = Temperature(1.0, torch.tensor(math.nan).expand(4))
    tail = tail._replace(temperature=never)
    assert all(
        part.isnan().all()
        for part in kernel_backend.tail_logsumexp(torch.zeros(4, 700), None, tail)
    )


@pytest.mark.parametrize("temperature", [0.37, 1.0, 5.0])
def test_the_exponential_over_its_range(temperature: float, kernel_backend: Backend) -> None:
    """Of 2e5 arguments; the background of a log-sum-exp of 0 is the exponential itself."""
    t = torch.linspace(-87, 0, 200_001)[None]
    z = t * temperature
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.float64)
    background = Background(one, zero, z.shape[1], z, Temperature(temperature))
    found = kernel_backend.scatter_background(one[None], NO_IDS, one, background).double()
    exact = (z.double() / torch.tensor(temperature).double()).exp()
    relative = ((found - exact) / exact).abs()
    # The polynomial and four roundings; log2(e) / T and its product with z are rounded, too.
    assert (relative <= 4e-7 + 2**-23 * 1.5 * -t).all()
    z = torch.tensor([[-120.0, -1e30, -math.inf, 0.0, -math.nan]])
    background = Background(one, zero, 5, z)
    found = kernel_backend.scatter_background(one[None], NO_IDS, one, background)
    assert found[0, :4].tolist() == [0, 0, 0, 1]
    assert found[0, 4].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_nan_makes_a_background_nan(dtype: torch.dtype, kernel_backend: Backend) -> None:
    """Rounded like a number, a NaN with all bits set would carry into the sign and become 0."""
    nan = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)
    ids, zeros = NO_IDS.expand(2, 1), torch.zeros(2, 1)
    background = Background(nan, torch.zeros(2).double(), 40, torch.zeros(2, 40, dtype=dtype))
    assert kernel_backend.scatter_background(zeros, ids, torch.ones(2), background).isnan().all()
    background = Background(torch.ones(2), nan.double(), 40, torch.zeros(2, 40, dtype=dtype))
    assert kernel_backend.scatter_background(zeros, ids, torch.ones(2), background).isnan().all()


@pytest.mark.parametrize("temperature", [1e-9, 1e-6, 1e-4, 1.0, 1e5, 1e30])
def test_backgrounds_at_every_temperature(temperature: float, kernel_backend: Backend) -> None:
    """Two logits share the top: T logsumexp then lies between two floats, or 1e6 of them."""
    z = torch.randn(2, 1000, generator=seeded())
    z[:, 5:7] = z.amax(-1, keepdim=True)
    divisor = torch.tensor(temperature).double()
    top = z.double().amax(-1, keepdim=True)
    powers = ((z.double() - top) / divisor).exp()
    logsumexp = (top / divisor)[:, 0] + powers.sum(-1).log()
    factors, upstream = torch.tensor([1.5, -2.0]), torch.tensor([0.3, 4.0])
    background = Background(factors, logsumexp, 999, z, Temperature(temperature))
    ids, entries = NO_IDS.expand(2, 1), torch.zeros(2, 1)
    found = kernel_backend.scatter_background(entries, ids, upstream, background)
    expected = (factors * upstream)[:, None] * powers / powers.sum(-1, keepdim=True)
    torch.testing.assert_close(found[:, :999].double(), expected[:, :999], rtol=5e-6, atol=1e-30)
    assert (found[:, 999] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 31, 33, 2001])
def test_backgrounds_round_once_in_any_memory(
    dtype: torch.dtype, vocab: int, kernel_backend: Backend
) -> None:
    """Fresh, given or the logits' own memory: the float32 gradient, rounded."""
    z = (torch.randn(3, vocab + 1, generator=seeded()) * 3).to(dtype)[:, 1:]
    ids = torch.tensor([[0], [-1], [vocab - 1]], dtype=torch.int32)
    entries, upstream = torch.randn(3, 1, generator=seeded()), torch.tensor([1e-4, 2.0, 0.0])
    background = Background(
        torch.tensor([1.0, -3.0, 2.0]), z.double().logsumexp(-1), vocab, z.float()
    )
    exact = kernel_backend.scatter_background(entries, ids, upstream, background)
    background = background._replace(logits=z)
    fresh = kernel_backend.scatter_background(entries, ids, upstream, background)
    assert torch.equal(fresh, exact.to(dtype))
    z[2] = math.nan  # where upstream is 0 nothing is read
    given = torch.full_like(z, math.nan)
    kernel_backend.scatter_background_(given, entries, ids, upstream, background)
    assert torch.equal(given, fresh)
    kernel_backend.scatter_background_(z, entries, ids, upstream, background._replace(logits=None))
    assert torch.equal(z, fresh)


@pytest.mark.parametrize(("dtype", "tie"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_backgrounds_round_ties_to_even(
    dtype: torch.dtype, tie: float, kernel_backend: Backend
) -> None:
    z, sums = torch.zeros(3, 40, dtype=dtype), torch.zeros(3, dtype=torch.float64)
    factors = torch.tensor([1 + tie, 1 + 3 * tie, 1 + tie * (1 + 2**-10)])
    background = Background(factors, sums, 40, z)
    ids, ones = NO_IDS.expand(3, 1), torch.ones(3, 1)
    found = kernel_backend.scatter_background(ones, ids, ones[:, 0], background)
    expected = torch.tensor([1, 1 + 4 * tie, 1 + 2 * tie]).to(dtype)
    assert torch.equal(found, expected[:, None].expand(3, 40))


@pytest.mark.usefixtures("instruction_set")
def test_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    teacher, student = torch.randn(2, 40, 5001, generator=seeded()).bfloat16() * 3
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        over = Tail(5001, Temperature(), None, True)
        ids, values, tail, entropy = backend.select_with_tail(teacher, 20, Allowed(5001), over)
        full = backend.full_divergence(
            student,
            values,
            ids,
            Allowed(5001),
            Objective(divergence=jsd(), outside="bucket"),
            Tails(tail, None, 5001),
        )
        _, ids, entries, factors, logsumexp = full
        background = Background(factors, logsumexp, 5001, student)
        upstream = torch.linspace(-1, 1, 40)
        grad = backend.scatter_background(entries, ids, upstream, background)
        results.append((tail, entropy, *full, grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
