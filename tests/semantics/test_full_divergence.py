"""The operators on given entries: supports with repeats, banned and absent ids, given tails.

Each row is compared with the oracle's numbers of what is left of its support.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from opd_kernels import Divergence, backends
from opd_kernels._arguments import Allowed, Objective, Tail, Tails, Temperature, pack_bitmap
from opd_kernels.divergences import OUTSIDE
from opd_kernels.reference import tail_logsumexp
from opd_kernels.testing.arithmetic import Arithmetic
from opd_kernels.testing.members import Member, Numbers, Side, numbers

INF, NAN, NEVER = math.inf, math.nan, -math.inf
FLOAT32 = Arithmetic(2.0**-24, 1.2e-38, 3.4e38)
N, V, LIMIT = 6, 70, 66
BANNED = (1, 5, 8, 40)
# What a joined tail may be off by: an exponential and a logarithm of a sum of up to K terms.
JOINED = 16 * FLOAT32.unit
EDGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"log_ratio_clip": 0.7},
    "floored": {"logp_floor": -2.5},
    "all": {"log_ratio_clip": 1.5, "logp_floor": -3.0, "stop_ratio": True},
}
WEIGHTS = {"generalize": (0.5, 0.75, 0.0, 0.0), "sample": (1.0, 0.0, 0.0, 0.0)}


def rows_of(
    k: int, dtype: torch.dtype, scale: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(student, teacher, ids, values at them): ids that repeat, and all that entries may be."""
    generator = torch.Generator().manual_seed(k)
    student = (torch.randn(N, V, generator=generator) * scale).to(dtype)
    teacher = (torch.randn(N, V, generator=generator) * scale).to(dtype)
    ids = torch.randint(-2, V, (N, k), generator=generator)
    values = teacher.gather(-1, ids.clamp(min=0))
    values[1, ::3] = NEVER  # also where the id is listed again
    values[2, ids[2] == ids[2, k // 2]] = NAN
    student[3] = NEVER
    values[4] = NEVER
    return student, teacher, ids, values


def objective_of(outside: str, edges: str, by_row: bool) -> Objective:
    weights = WEIGHTS.get(outside, (0.5, 0.25, 1.5, 0.75))
    divergence = Divergence(*weights, beta=0.3, **EDGES[edges])
    temperatures = torch.linspace(0.5, 2.0, N)
    return Objective(
        Temperature(1.0, temperatures) if by_row else Temperature(0.7),
        Temperature(1.3),
        divergence,
        # A weight of 0 in some rows.
        torch.tensor(weights) * torch.arange(N)[:, None].remainder(3) if by_row else None,
        outside,
    )


def numbers_of(
    objective: Objective, row: int, values: tuple[Any, Any], tails: Any, token: Any
) -> Numbers:
    """The oracle's, of the present entries' values."""
    temperature, teacher_temperature, divergence, weights, outside = objective
    t = temperature.value if temperature.rows is None else temperature.rows[row].item()
    own = divergence[:4] if weights is None else tuple(weights[row].tolist())
    clip, floor = divergence.log_ratio_clip, divergence.logp_floor
    member = Member(
        own,
        divergence.beta,
        divergence.stop_ratio,
        INF if clip is None else clip,
        NEVER if floor is None else floor,
        outside,
    )
    sides = []
    for i, divisor in enumerate((t, teacher_temperature.value)):
        x = values[i].double().numpy()
        side = Side(x, np.zeros(len(x)), divisor)
        if tails is not None:
            side = side._replace(tail=tails[i], tail_error=JOINED * (1 + abs(tails[i])))
        sides.append(side if token is None else side._replace(token=token[i]))
    return numbers(*sides, member, FLOAT32)


def first_present(
    ids: torch.Tensor, values: torch.Tensor, once: bool
) -> tuple[list[int], list[tuple[int, float]]]:
    """(places of entries that take part, (id, value) of each id without one)."""
    kept: dict[int, list[int]] = {}
    lost: dict[int, float] = {}
    for place, (i, value) in enumerate(zip(ids.tolist(), values.tolist(), strict=True)):
        if 0 <= i < LIMIT and i not in BANNED and value != NEVER:
            kept.setdefault(i, []).append(place)
        elif i >= 0 and lost.get(i, NEVER) == NEVER:
            lost[i] = value
    places = [place for found in kept.values() for place in (found[:1] if once else found)]
    return sorted(places), [(i, value) for i, value in lost.items() if i not in kept]


def assert_close(found: float, expected: float, budget: float, what: str) -> None:
    assert abs(found - expected) <= budget or found == expected, (
        f"{what} is {found}, expected {expected} within {budget}"
    )


@pytest.mark.parametrize("by_row", [False, True], ids=["numbers", "rows"])
@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("outside", [outside for outside in OUTSIDE if outside != "renormalize"])
def test_full_softmaxes_of_given_entries_and_tails(
    backend: str, outside: str, edges: str, by_row: bool
) -> None:
    check_full(backend, objective_of(outside, edges, by_row), 19, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [2, 70])
def test_full_softmaxes_of_few_and_many_entries(backend: str, k: int, dtype: torch.dtype) -> None:
    check_full(backend, objective_of("bucket", "plain", False), k, dtype)
    check_full(backend, objective_of("sample", "plain", False), k, dtype)


def check_full(backend: str, objective: Objective, k: int, dtype: torch.dtype) -> None:
    student, teacher, ids, values = rows_of(k, dtype)
    sample = objective.outside == "sample"
    support = k - sample
    if sample:
        ids[:, -1] = torch.tensor([7, 11, 13, 3, -1, 40])  # the last is banned
        values[:, -1] = teacher.gather(-1, ids[:, -1:].clamp(min=0))[:, 0]
        ids[:, :-1] = torch.where(ids[:, :-1] == ids[:, -1:], -1, ids[:, :-1])
    mask = torch.tensor([True] * (N - 1) + [sample])
    temperature, teacher_temperature, *_ = objective
    width, listed = V - 1, ids[:, :support]
    tails = [
        tail_logsumexp(x[:, :width].double(), None, Tail(width, at, listed))[0]
        for x, at in ((student, temperature), (teacher, teacher_temperature))
    ]
    allowed = Allowed(LIMIT, pack_bitmap(torch.tensor(BANNED), LIMIT), mask)
    loss, out_ids, grad, factors, sums = backends.load(backend).full_divergence(
        student, values, ids, allowed, objective, Tails(tails[1], tails[0], width)
    )
    for row in range(N):
        if not mask[row]:
            assert (loss[row], factors[row], sums[row]) == (0, 0, 0)
            assert (out_ids[row] == -1).all()
            assert (grad[row] == 0).all()
            continue
        places, lost = first_present(listed[row], values[row, :support], once=True)
        token = sample and 0 <= ids[row, -1] < width
        expected_ids = torch.full((k,), -1)
        expected_ids[places] = ids[row, places]
        if token:
            expected_ids[-1] = ids[row, -1]
        assert out_ids[row].tolist() == expected_ids.tolist()
        z, t = student[row, ids[row, places]], values[row, places]
        at = temperature.value if temperature.rows is None else temperature.rows[row].item()
        rest_z = [student[row, i].item() / at for i, _ in lost if i < width]
        rest_t = [value / teacher_temperature.value for _, value in lost]
        both = [
            torch.tensor([tail[row].item(), *rest]).double().logsumexp(-1).item()
            for tail, rest in ((tails[0], rest_z), (tails[1], rest_t))
        ]
        token_values = (student[row, ids[row, -1]].item(), values[row, -1].item())
        present = out_ids[row] >= 0
        assert (grad[row][~present] == 0).all()
        read = [*z.tolist(), *t.tolist(), *both, *(token_values if token else ())]
        if any(math.isnan(x) for x in read):
            assert all(x.isnan().all() for x in (loss[row], grad[row][present], factors[row]))
            continue
        if all(x == NEVER for x in (*z, both[0])) or all(x == NEVER for x in (*t, both[1])):
            assert (loss[row], factors[row], sums[row]) == (0, 0, 0)
            assert (grad[row] == 0).all()
            continue
        wanted = numbers_of(objective, row, (z, t), both, token_values if token else None)
        assert_close(loss[row].item(), wanted.loss, wanted.loss_budget, f"loss {row}")
        pairs = zip(grad[row][present].tolist(), wanted.grad, wanted.grad_budget, strict=True)
        for found, exact, budget in pairs:
            assert_close(found, exact, budget, f"a gradient of row {row}")
        if both[0] == NEVER:
            continue
        # Where z_j / T is the tail's log-sum-exp, elsewhere in proportion.
        p = math.exp(both[0] - wanted.logsumexp)
        exact = wanted.scale * p + wanted.share
        off = wanted.logsumexp_error + 8 * FLOAT32.unit * (1 + abs(both[0])) + JOINED
        budget = wanted.scale_budget * p + wanted.share_budget + (abs(exact) + p) * off
        found = factors[row].item() * math.exp(both[0] - sums[row].item())
        assert_close(found, exact, budget, f"background of row {row}")


@pytest.mark.parametrize("by_row", [False, True], ids=["numbers", "rows"])
@pytest.mark.parametrize("edges", EDGES)
def test_renormalised_members_of_given_entries(backend: str, edges: str, by_row: bool) -> None:
    """Gradients of repeated ids are added into the first of them."""
    objective = objective_of("renormalize", edges, by_row)
    for k, dtype in ((19, torch.float32), (1, torch.bfloat16)):
        student, _, ids, values = rows_of(k, dtype)
        mask = torch.tensor([True] * (N - 1) + [False])
        allowed = Allowed(LIMIT, pack_bitmap(torch.tensor(BANNED), LIMIT), mask)
        loss, out_ids, grad = backends.load(backend).entry_divergence(
            student, values, ids, allowed, objective
        )
        for row in range(N):
            places, _ = first_present(ids[row], values[row], once=False)
            once, _ = first_present(ids[row], values[row], once=True)
            expected_ids = torch.full((k,), -1)
            if mask[row]:
                expected_ids[once] = ids[row, once]
            assert out_ids[row].tolist() == expected_ids.tolist()
            present = out_ids[row] >= 0
            assert (grad[row][~present] == 0).all()
            z, t = student[row, ids[row, places]], values[row, places]
            if not mask[row] or not places or (z == NEVER).all():
                assert loss[row] == 0
                assert (grad[row] == 0).all()
            elif t.isnan().any():
                assert loss[row].isnan()
                assert grad[row][present].isnan().all()
            else:
                wanted = numbers_of(objective, row, (z, t), None, None)
                assert_close(loss[row].item(), wanted.loss, wanted.loss_budget, f"loss {row}")
                for place in once:
                    same = (ids[row, places] == ids[row, place]).numpy()
                    exact, budget = wanted.grad[same].sum(), wanted.grad_budget[same].sum()
                    budget += FLOAT32.unit * same.sum() * abs(exact)
                    assert_close(grad[row, place].item(), exact, budget, f"gradient {row}")
