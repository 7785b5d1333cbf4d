"""Compiles the Triton kernels of what will be timed into Triton's cache, shape beside shape.

On a machine without a GPU the launches are compiled for an architecture and go no further.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from calls import Point
from peers import MEMBERS

from gpu import measure
from gpu.steps import FAMILY_WIDTH, HEADS, OUTSIDE, PIECES, WIDTHS
from opd_kernels._arguments import Allowed, Background, Objective, Tail, Tails
from opd_kernels.backends import triton

MANY_ROWS = 512  # more are launched with the same kernels


def points(plan: measure.Plan) -> list[Point]:
    """The shapes of both parts."""
    main = Point(plan.rows, plan.vocab, plan.ks[0])
    changes = [{"k": k} for k in plan.ks[1:]] + [{"rows": rows} for rows in plan.few_rows]
    return [main, *(replace(main, **change) for change in [*changes, *plan.shapes])]


def calls(point: Point, device: torch.device) -> Iterator[Callable[[], object]]:
    """Calls of the backend that launch each of its kernels for a shape."""
    shape = min(point.rows, MANY_ROWS), point.vocab
    logits = torch.zeros(shape, dtype=point.torch_dtype, device=device)
    ids = torch.zeros(shape[0], point.k, dtype=torch.int32, device=device)
    values = torch.zeros(shape[0], point.k, device=device)
    upstream = torch.zeros(shape[0], device=device)
    plain, objective = Allowed(point.vocab), Objective()
    yield lambda: triton.scatter_(logits, values, ids, upstream)
    yield lambda: triton.select(logits, point.k, plain)
    yield lambda: triton.gather(logits, ids, plain)
    # Unusual rows: some masked, some ids banned.
    mask = torch.ones(shape[0], dtype=torch.bool, device=device)
    banned = torch.zeros(-(-point.vocab // 64) * 8, dtype=torch.uint8, device=device)
    for some in (plain._replace(mask=mask), plain._replace(banned=banned)):
        yield lambda some=some: triton.select_divergence(logits, logits, point.k, some, objective)
    yield lambda: triton.entry_divergence(logits, values, ids, plain, objective)
    for settings, _ in measure.TRITON_VARIANTS.values():
        with measure.configured(settings):
            yield lambda: triton.select_divergence(logits, logits, point.k, plain, objective)
    yield from family_calls(point, logits, ids, values)


def family_calls(
    point: Point, logits: torch.Tensor, ids: torch.Tensor, values: torch.Tensor
) -> Iterator[Callable[[], object]]:
    """The same of full softmaxes."""
    plain, tail = Allowed(point.vocab), Tail(point.vocab)
    yield lambda: triton.select_with_tail(logits, point.k, plain, tail)
    yield lambda: triton.tail_logsumexp(logits, None, tail._replace(ids=ids))
    rows = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    for divergence, outside in MEMBERS.values():
        objective = Objective(divergence=divergence, outside=outside)
        tails = Tails(rows, rows, point.vocab)
        yield lambda objective=objective, tails=tails: triton.full_divergence(
            logits, values, ids, plain, objective, tails
        )
    background = Background(rows.float(), rows, point.vocab, logits)
    yield lambda: triton.scatter_background_(logits, values, ids, rows.float(), background)


def linear_calls(
    plan: measure.Plan, k: int, device: torch.device
) -> Iterator[Callable[[], object]]:
    """The same of the form from hidden states."""
    of = plan.linear
    dtype = getattr(torch, of.dtype)
    hidden = torch.zeros(min(of.rows, MANY_ROWS), of.hidden, dtype=dtype, device=device)
    weight = torch.zeros(of.vocab, of.hidden, dtype=dtype, device=device)
    ids = torch.zeros(len(hidden), k, dtype=torch.int32, device=device)
    upstream = torch.ones(len(hidden), k, device=device)
    yield lambda: triton.gather_dot_hidden(upstream, ids, weight, dtype)
    for settings, _ in measure.LINEAR_VARIANTS.values():
        with measure.configured(settings):
            yield lambda: triton.gather_dot(hidden, weight, None, ids, Allowed(of.vocab))
            yield lambda: triton.gather_dot_weight(upstream, ids, hidden, of.vocab, dtype)
    yield from full_head_calls(plan, hidden, weight, ids)


def full_head_calls(
    plan: measure.Plan, hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor
) -> Iterator[Callable[[], object]]:
    """The same of full softmaxes: on pieces of logits, and on rows of K + 1 logits and a tail."""
    vocab, count, device = plan.linear.vocab, ids.shape[-1], ids.device
    with_token = torch.zeros(len(ids), count + 1, dtype=torch.int32, device=device)
    logits = hidden.new_zeros(len(ids), vocab)
    values, upstream = torch.zeros(ids.shape, device=device), torch.zeros(len(ids), device=device)
    wide = torch.zeros(len(ids), dtype=torch.float64, device=device)
    plain, objective = Allowed(vocab), Objective(outside="bucket")
    for listed in (ids, with_token):
        yield lambda listed=listed: triton.tail_logsumexp(logits, None, Tail(vocab, ids=listed))
        yield lambda listed=listed: triton.gather(logits, listed, plain)
        yield lambda listed=listed: triton.gather_dot(hidden, weight, None, listed, plain)
    for width, row in ((vocab, logits), *((count + n, None) for n in (1, 2))):
        row = torch.zeros(len(ids), width, device=device) if row is None else row
        tails = Tails(wide, None, width)
        background = Background(upstream, wide, width, None)
        yield lambda row=row, tails=tails: triton.full_divergence(
            row, values, ids, Allowed(tails.width), objective, tails
        )
        yield lambda row=row, background=background: triton.scatter_background_(
            row, values, ids, upstream, background
        )
    ones = torch.ones(with_token.shape, device=device)
    yield lambda: triton.gather_dot_hidden(ones, with_token, weight, weight.dtype)
    yield lambda: triton.gather_dot_weight(ones, with_token, hidden, vocab, weight.dtype)


def jobs(plan: measure.Plan) -> int:
    """Shapes, and K of the form from hidden states: what a process compiles at a time."""
    return len(points(plan)) + len(plan.linear.ks)


def warm_up(number: int, device: str) -> None:
    """All kernels of one shape, or of one K from hidden states."""
    plan = measure.DRY if device == "cpu" else measure.FULL
    shapes, where = points(plan), torch.device(device)
    found = (
        calls(shapes[number], where)
        if number < len(shapes)
        else linear_calls(plan, plan.linear.ks[number - len(shapes)], where)
    )
    for call in found:
        call()
    if where.type == "cuda":
        torch.cuda.synchronize()


def compile_ahead(number: int, architecture: int) -> None:
    """The same for a GPU that is not here, with as many multiprocessors as an H100 has."""
    sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))
    import aot

    with (
        mock.patch.object(triton.common, "multiprocessors", return_value=132),
        aot.compiling(architecture),
    ):
        warm_up(number, "meta")


def compile_cases(number: int, architecture: int) -> None:
    """What the steps that run every kernel launch, at one of their K or of one ``outside``."""
    sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))
    import aot

    from gpu import correct
    from opd_kernels.testing import make_inputs, results, selected

    with (
        mock.patch.object(triton.common, "multiprocessors", return_value=132),
        mock.patch.object(triton, "refusal", return_value=None),
        aot.compiling(architecture),
    ):
        if number < len(WIDTHS):
            pieces, k = PIECES, WIDTHS[number]
        else:
            pieces, k = ((*OUTSIDE, HEADS)[number - len(WIDTHS)],), FAMILY_WIDTH
        for piece in pieces:
            for case in correct.cases(piece, "triton", k, "cuda"):
                inputs = make_inputs(case)
                if isinstance(inputs.teacher, torch.Tensor):
                    selected(inputs, "triton")
                results(case, inputs, "triton")


def main(device: str) -> int:
    """In as many processes as there are cores."""
    return side_by_side(warm_up, jobs(measure.DRY if device == "cpu" else measure.FULL), device)


def ahead(architecture: int) -> int:
    """For the GPU that will be there."""
    side_by_side(compile_cases, len(WIDTHS) + len(OUTSIDE) + 1, architecture)
    return side_by_side(compile_ahead, jobs(measure.FULL), architecture)


def side_by_side(work: Callable[[int, Any], None], count: int, argument: Any) -> int:
    """Every job in a process of its own, as many at once as there are cores."""
    begin = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(count, os.cpu_count() or 1), mp_context=context) as pool:
        for _ in pool.map(work, range(count), [argument] * count):
            pass
    print(f"Triton's kernels for {count} shapes in {time.monotonic() - begin:.1f} s")
    return 0
