"""Every line and every branch of the CUDA kernels runs, and what it computes is right.

The calls are run in a process of their own, on an emulation built for gcov.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from emulation.build import CSRC, build

from opd_kernels import reference, testing
from opd_kernels._arguments import Allowed, Background, Objective, Tail, Tails, Temperature
from opd_kernels.backends import cpu, cuda
from opd_kernels.backends.native import NativeFull
from opd_kernels.divergences import OUTSIDE, Divergence, forward_kl, jsd, reverse_kl
from opd_kernels.testing import Case
from opd_kernels.testing.inputs import copied_to

COVERED = ("cuda", "common")
pytestmark = pytest.mark.skipif(
    not emulated.POSSIBLE or shutil.which("gcov") is None, reason="no emulation or no gcov"
)

# Multiprocessors, and whether blocks form clusters.
ONE, FEW, CLUSTERS = (1, False), (4, True), (16, True)
KINDS = ("float32", "float16", "bfloat16")


def cases() -> Iterator[tuple[tuple[int, bool], Case]]:
    """GPUs, and calls of the public function on them; each case in every dtype."""
    for at, kind in enumerate(KINDS):
        other = KINDS[at - 1]

        def case(vocab: int, k: int, kind: str = kind, other: str = other, **more: Any) -> Case:
            more = {"student_dtype": other, "teacher_dtype": kind, "student_vocab": vocab} | more
            return Case(**({"rows": (1,), "teacher_vocab": vocab, "k": k} | more))

        # Rows of one chunk, cut at both ends, with fewer than k elements, of a cluster's blocks.
        yield FEW, case(5, 5)
        yield ONE, case(700, 9, rows=(2, 3), teacher_layout="sliced", student_layout="transposed")
        few = {"vocab_size": 40, "rows": (9,), "teacher_temperature": "rows"}
        yield FEW, case(300, 65, teacher_content="nan", **few)
        yield CLUSTERS, case(33_000, 70, mask="all")
        yield CLUSTERS, case(33_000, 2, mask="nothing")
        # Ties, of which too many to sort, and the tiers of k.
        yield FEW, case(5000, 130, teacher_content="equal", mask="bool", rows=(3,))
        yield FEW, case(3000, 1024, teacher_content="quantised", student_content="neg_inf")
        yield ONE, case(8000, 1024, rows=(9,))
        # Rows so wide that groups of 32 do not fit, and an odd number of tiles.
        yield ONE, case(1_300_000, 9)
        # Ids that may not be selected.
        yield ONE, case(1500, 9, rows=(3,), banned="half", teacher_layout="sliced")
        yield ONE, case(1536, 9, rows=(3,), banned="few", teacher_layout="sliced")
        yield FEW, case(9000, 200, banned="few", teacher_content="zeros")
        yield FEW, case(70, 7, banned="all", rows=(0,))
        yield FEW, case(70, 9, student_content="close")
        # Supports that are given, with repeated ids.
        for teacher in ("topk_int32", "topk_int64"):
            yield FEW, case(20, 100, teacher=teacher, banned="half", mask="bool", rows=(3,))
        # Gradients that are rounded to every kind of number.
        yield FEW, case(90, 9, student_dtype=kind, inplace=True, student_content="extreme")
        yield FEW, case(90, 90, student_dtype=kind, student_content="nan", rows=(3,))
        yield FEW, case(90, 90, student_dtype=kind, student_content="half_neg_inf")
        # Full softmaxes, with tails and without.
        for outside in OUTSIDE[1 + at :: len(KINDS)]:
            family = {"outside": outside, "rows": (3,), "mask": "bool", "temperature": "float"}
            family["divergence"] = "reverse_kl" if outside == "sample" else "mixed"
            family["token"] = "any" if outside == "sample" else "none"
            yield FEW, case(700, 9, student_content="half_neg_inf", **family)
            yield ONE, case(300, 130, banned="half", student_layout="sliced", **family)
            yield FEW, case(20, 12, teacher="topk_int64", teacher_temperature="one", **family)


def against_the_reference() -> None:
    """Gradients added to what is there, and numbers that overflow or that a dtype rounds."""

    def compare(name: str, *arguments: Any) -> None:
        results = []
        for module in (cuda.backend, reference):
            own = copied_to("cpu", arguments)  # with its strides and where it begins
            result = getattr(module, name)(*own)
            results.append([x for x in (own[0], result) if x is not None])
        # Fewer than eight roundings lie between these inputs and results.
        eight_ulps = 8 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(*results, rtol=eight_ulps, atol=0, equal_nan=True)

    one, half = torch.ones(1), torch.tensor([0.5])
    numbers = torch.tensor([[1.5, torch.nan, torch.inf, 1e9, -1e9, 1e-6, -1e-30, 65519.0]])
    ids = torch.tensor([[3, 0, 5, 7, 11, 2, -1, 8]], dtype=torch.int32)
    for kind in KINDS:
        out = torch.arange(13.0)[None].to(getattr(torch, kind))
        compare("scatter_add_", out, numbers, ids, half)
        compare("scatter", numbers, ids, half, 13, out.dtype)
        compare("scatter_", out[:, 1:3], numbers[:, :2], ids[:, 1:3] % 2, half)
    compare("scatter", numbers[:, :0], ids[:, :0], half, 0, torch.float32)

    student, teacher = torch.zeros(1, 4), torch.tensor([[1e38, 1e38, -1e38, -1e38]])
    allowed = Allowed(4)
    for temperature in (one * 0.01, one * torch.nan):
        objective = Objective(Temperature(rows=temperature), Temperature(rows=one))
        compare("select_divergence", student, teacher, 4, allowed, objective)
    compare("entry_divergence", *(student[:0],) * 2, student[:0].int(), allowed, Objective())
    objective = Objective(Temperature(0.01), Temperature(rows=one))
    for ids in ([2, 2, 2, 2], [0, 1, 2, 2], [0, 0, 1, 2]):
        repeated = torch.tensor([ids], dtype=torch.int32)
        compare("entry_divergence", student, teacher, repeated, allowed, objective)


def backgrounds() -> None:
    """Of logits and gradients that are aligned alike and differently, in every kind of number."""
    ids = torch.tensor([[3, -1], [170, 0], [1, 2]], dtype=torch.int32)
    entries, upstream = torch.randn(3, 2), torch.tensor([1.0, -2.0, 0.0])
    for kind in KINDS:
        dtype = getattr(torch, kind)
        # A power of 2 is off by 2^-22, and by 2^-23 of its exponent, which is 20 at most.
        tolerance = {"rtol": 2**-18 + torch.finfo(dtype).eps, "atol": torch.finfo(dtype).tiny}
        for vocab, to in itertools.product((3, 180, 4500), range(9)):
            z = (torch.randn(3, vocab + 9) * 2).to(dtype)[:, 2 : 2 + vocab]
            limit = vocab - to % 2
            sums = z[:, :limit].double().logsumexp(-1)
            background = Background(torch.tensor([0.5, 1.0, 2.0]), sums, limit, z)
            results = []
            for module in (cuda.backend, reference):
                out = torch.full((3, vocab + 9), torch.nan, dtype=dtype)[:, to : to + vocab]
                module.scatter_background_(out, entries, ids, upstream, background)
                results.append(out)
            torch.testing.assert_close(*results, **tolerance)
        # Temperatures near both ends, and an infinite factor or upstream gradient.
        flat, none = torch.zeros(3, vocab, dtype=dtype), torch.zeros(3).double()
        one = torch.ones(3)
        for temperature, infinite in itertools.product((2e-38, 3e38), (0, 1)):
            given = torch.tensor([torch.inf, 1, 2]) if infinite else one
            background = Background(given, none, vocab, flat, Temperature(temperature))
            for upstream in (one, given.flip(0)):
                found = cuda.backend.scatter_background(entries, ids - 200, upstream, background)
                assert torch.equal(found, (given * upstream)[:, None].to(dtype).expand(3, vocab))
        for count, width in ((3, 0), (0, 9)):
            background = Background(one[:count], none[:count], 0, flat[:count, :width])
            given = entries[:count], ids[:count], one[:count], background
            assert cuda.backend.scatter_background(*given).numel() == 0


MEMBERS = (
    jsd(),
    reverse_kl(),
    *(Divergence(**{name: 0.7}, beta=0.3) for name in Divergence._fields[:4]),
    Divergence(1.0, stop_ratio=True),
    Divergence(0.2, 0.3, 0.4, 0.1, beta=1e-40, log_ratio_clip=0.5),
    Divergence(0.2, 0.3, 0.4, 0.1, beta=1 - 1e-9, log_ratio_clip=5.0, logp_floor=-3.0),
    Divergence(0.0, 0.5, 0.0, 0.5, beta=0.9, logp_floor=-0.5),
)


def families() -> None:
    """Every member against the CPU's kernels, in rows that go every way through the formulas."""
    count, vocab, inf, nan = 18, 40, torch.inf, torch.nan
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(count, vocab, generator=generator) * 2
    values = torch.randn(count, 9, generator=generator) * 2
    ids = torch.stack([torch.randperm(30, generator=generator)[:9] for _ in range(count)])
    student_tail, teacher_tail = torch.randn(2, count, generator=generator).double()
    student[1].scatter_(-1, ids[1, 2:6], -inf)
    values[1, 3:7] = -inf
    ids[2:4, 3:6], ids[2:4, 6] = ids[2:4, :3], 36  # repeats, and an id beyond the limit
    values[2:4, 1], values[2, 6] = -inf, -inf
    ids[3, 5] = ids[3, 4] + 2**32  # with the same low half
    student[2, 36] = -inf
    student_tail[3:5], teacher_tail[3:5] = -inf, -inf
    student_tail[5], teacher_tail[6] = nan, inf
    ids[7:10, :8], teacher_tail[8], student_tail[9] = -1, -inf, -inf
    student[10], student_tail[10] = -inf, -inf
    student_tail[11:13], values[11, 2] = -1000, -1000  # of which p and q are 0
    student[13, ids[13, 8]], student_tail[13] = 20.0, 24.9999999  # a token rounded above its tail
    ids[14, 8], values[15, 8] = 90, -inf  # a token beyond the student's ids, and one that q has not
    values[16, 0], student[16, ids[16, 1]], values[17, 8] = nan, nan, inf
    teacher_tail[12] = -inf
    values[0], teacher_tail[0] = student[0].gather(-1, ids[0]) + 0.01, student_tail[0]
    mask, temperatures = torch.arange(count) != 15, torch.full((count,), 0.8)
    banned = torch.zeros(8, dtype=torch.uint8)
    banned[0] = 1 << 5
    tails = Tails(teacher_tail, student_tail, 38)
    # Nine floats are added in another order, of log ratios up to 60 or of p of the far tails.
    close = {"rtol": 9 * 2**-22, "atol": 9 * 60 * 2**-24, "equal_nan": True}
    for turn, (outside, member) in enumerate(itertools.product(OUTSIDE, MEMBERS)):
        # Every third call has weights of its own for each row.
        weights = torch.rand(count, 4, generator=generator) if turn % 3 == 1 else None
        sides = Temperature(rows=temperatures), Temperature(1.3)
        objective = Objective(*sides, member, weights, outside)
        allowed = Allowed(35, banned, mask) if turn % 4 < 2 else Allowed(38)
        given = student, values, ids, allowed, objective
        results = [
            backend.entry_divergence(*given)
            if outside == "renormalize"
            else backend.full_divergence(*given, tails)
            for backend in (cuda.backend, cpu.backend)
        ]
        torch.testing.assert_close(*results, **close)


def gathers() -> None:
    """Values at ids: of many rows in a block, of a row in several turns, of no row or no id."""
    for at, (count, k) in enumerate(((7, 5), (3, 200), (0, 5), (3, 0))):
        student = torch.randn(count, 40).to(getattr(torch, KINDS[at % 3]))
        ids = torch.arange(count * k, dtype=(torch.int32, torch.int64)[at % 2]).view(count, k) % 50
        mask = torch.arange(count) != 1
        values, slots = cuda.backend.gather(student, ids - 2, Allowed(33, mask=mask))
        present = (ids >= 2) & (ids < 35) & mask[:, None]
        picked = student.float().gather(1, (ids - 2).long().clamp(0, 39))
        assert torch.equal(values, torch.where(present, picked, 0))
        assert torch.equal(slots, torch.where(present, torch.arange(k), -1).int())


def tails() -> None:
    """Tails alone and with a selection, given and selected ids, in every dtype."""

    def compare(
        logits: torch.Tensor, tail: Tail, k: int = 0, allowed: Allowed | None = None
    ) -> None:
        """Ids and values are exact, sums as close as those of tests/semantics/test_tails.py."""
        found, expected = [], []
        for module, results in ((cuda.backend, found), (reference, expected)):
            if k == 0:
                mask = None if allowed is None else allowed.mask
                sums = module.tail_logsumexp(logits, mask, tail)
            else:
                some = allowed or Allowed(tail.width)
                *selected, total, entropy = module.select_with_tail(logits, k, some, tail)
                sums = total, entropy
                results += [part.double() for part in selected]
            results += [part for part in sums if part is not None]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=3e-6, equal_nan=True)

    random = torch.Generator().manual_seed(0)
    mask, banned = torch.tensor([True, False]), torch.zeros(2200, dtype=torch.uint8)
    banned[::90] = 0x55
    few, many = (torch.randint(-9, 8009, (2, k), generator=random) for k in (5, 200))
    rows = torch.rand(2, generator=random) + 0.5
    for kind, entropy in itertools.product(KINDS, (False, True)):
        dtype = getattr(torch, kind)
        vocab = 66 * 512 // dtype.itemsize  # so many tiles that blocks share them
        x = (3 * torch.randn(2, vocab, generator=random)).round().to(dtype)
        with emulated.gpu(*CLUSTERS):
            tail = Tail(vocab - 2, Temperature(), None, entropy)
            compare(x[:, 1:], tail, 9, Allowed(vocab - 300, banned, mask))
        x = x[:, :4000]
        with emulated.gpu(*ONE):
            compare(x[:, 1:], Tail(3999, Temperature(1.0, rows), many.int(), entropy))
            compare(x, Tail(4000, Temperature(), few, entropy), 9, Allowed(3001))
            compare(x, Tail(4000, Temperature(), None, entropy), 200, Allowed(3500))
        short = Tail(900, Temperature(1e-30), few, entropy)
        x[0] = -torch.inf
        compare(x, short, 0, Allowed(900, None, mask))
        compare(x[:, 3:], short._replace(ids=None), 300, Allowed(0))
        compare(x.sign(), short._replace(temperature=Temperature()), 130, Allowed(900))
        compare(x[:, 1:3], Tail(1, Temperature(), few[:, :1] * 0, entropy))
        compare(x[:, :9], Tail(0, Temperature(), few, entropy))
        compare(x[:0], Tail(900, Temperature(), few[:0], entropy))
        compare(x[:0], Tail(900, Temperature(), None, entropy), 3)
        # Rows in segments. The larger numbers are in the last segment, or in the first; one of the
        # segments is empty, or all are. Then a last segment without a tile.
        wide = torch.full((5, 4097 * 512 // x.itemsize), -torch.inf, dtype=x.dtype)
        wide[:2, ::1000], wide[2, -1], wide[3, ::1000] = 1, 2, 1
        wide[0, -1], wide[1, -1] = 20, 0.5
        wide = wide if kind == "float32" else wide[:1]
        ids = torch.tensor([[0, 1000]] * 5)[: len(wide)]
        compare(wide, Tail(wide.shape[1], Temperature(), ids, entropy))
        compare(wide[:1], Tail(4096 * 512 // x.itemsize - 2, Temperature(), ids[:1], entropy))
    # A selection that does not fit beside the tail: two reads, of selected and of given ids.
    compare(wide[:1], Tail(wide.shape[1]), 3)
    x = torch.randn(1, 262_144, generator=random)
    compare(x, Tail(x.shape[1], Temperature(), few[:1], True), 1024)


def refusals() -> None:
    """What the module itself refuses; callers are told before, in their own words."""
    module = cuda.backend.module
    wide = torch.empty(1, cuda._max_width(1, torch.float32) + 1)
    with pytest.raises(ValueError, match="do not fit"):
        cuda.backend.select(wide, 1, Allowed(wide.shape[1]))
    with pytest.raises(ValueError, match="do not fit"):
        cuda.backend.select_with_tail(wide[:, :350_000], 1024, Allowed(350_000), Tail(350_000))
    row, sums = torch.zeros(1, 4), torch.zeros(1).double()
    # Equal models have loss and gradient 0.
    for change in (
        *({name: 0.5} for name in Divergence._fields[:4]),
        {"stop_ratio": True},
        {"log_ratio_clip": 5.0},
        {"logp_floor": -20.0},
    ):
        objective = Objective(divergence=reverse_kl()._replace(**change))
        ids = torch.arange(4)[None]
        loss, _, grad = cuda.backend.entry_divergence(row, row, ids, Allowed(4), objective)
        assert [loss.item(), *grad[0].tolist()] == [0] * 5
    objective = Objective(divergence=forward_kl())
    with pytest.raises(ValueError, match="reverse_kl"):
        NativeFull.select_divergence(cuda.backend, row, row, 4, Allowed(4), objective)
    with pytest.raises(ValueError, match="not renormalised"):
        cuda.backend.select_divergence(row, row, 4, Allowed(4), Objective(outside="bucket"))
    bucket, tails = Objective(outside="bucket"), Tails(sums, None, 4)
    with pytest.raises(ValueError, match="student's tail"):
        NativeFull.full_divergence(cuda.backend, row, row, row.int(), Allowed(4), bucket, tails)
    none = cuda.backend.full_divergence(
        row[:0], row[:0], row[:0].int(), Allowed(4), bucket, Tails(sums[:0], sums[:0], 4)
    )
    assert [part.numel() for part in none] == [0] * 5
    for shape, strides, said in (
        ((), (), "one dimension or more"),
        ((3,), (1, 1), "one dimension or more"),
        ((2, 3), (1, 2), "adjacent"),
        ((2,) * 18, tuple(range(100, 117)) + (1,), "do not merge"),
    ):
        with pytest.raises(ValueError, match=said):
            module.Rows(0, "float32", shape, strides)
    assert module.driver_version() == 0
    assert module.max_clusters(0, 8) == 16


def run() -> None:
    """Makes all calls; what they compute is compared with float64 or the reference."""
    emulated.install()
    for gpu, case in cases():
        with emulated.gpu(*gpu):
            testing.check(case, "cuda")
    against_the_reference()
    families()
    backgrounds()
    gathers()
    tails()
    refusals()


def executed(folder: Path) -> dict[str, dict[str, bool]]:
    """By file, whether lines ran, in each instantiation, and ways at their branches, in any."""
    command = ["gcov", "--json-format", "--branch-probabilities", "--stdout"]
    command += map(str, sorted(folder.glob("*.gcno")))
    said = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    ran: dict[str, dict[str, bool]] = defaultdict(dict)
    for report in map(json.loads, said.splitlines()):
        for file in report["files"]:
            path = Path(report["current_working_directory"], file["file"]).resolve()
            if not any(path.is_relative_to(CSRC / part) for part in COVERED):
                continue
            of_file = ran[str(path.relative_to(CSRC))]
            names = {function["name"]: function["demangled_name"] for function in file["functions"]}
            for line in file["lines"]:
                number = line["line_number"]
                counts = {f"{number} in {names.get(line.get('function_name'))}": line["count"]}
                for way, branch in enumerate(line["branches"]):
                    if not branch["throw"]:
                        counts[f"{number} way {way}"] = branch["count"]
                for at, count in counts.items():
                    of_file[at] = of_file.get(at, False) or count > 0
    return ran


def test_every_line_and_branch_runs_and_computes_what_it_should(
    tmp_path: Path,
) -> None:
    objects = build("coverage")
    for notes in objects.glob("*.gcno"):
        shutil.copy2(notes, tmp_path)
    # Counts go beside the copies: nothing of another run is among them.
    environment = {"GCOV_PREFIX": str(tmp_path), "GCOV_PREFIX_STRIP": str(len(objects.parts) - 1)}
    environment |= os.environ | {"OPD_KERNELS_EMULATED": "coverage"}
    subprocess.run([sys.executable, __file__], env=environment, check=True)

    ran = executed(tmp_path)
    sources = {str(path.relative_to(CSRC)) for path in (CSRC / "cuda").glob("*.cu*")}
    assert sources - set(ran) <= {"cuda/device.cuh"}  # which the emulation stands in for
    missing = []
    for file in sorted(ran):
        lines = (CSRC / file).read_text().splitlines()
        for at in (at for at, did in ran[file].items() if not did):
            missing.append(f"{file}:{at}: {lines[int(at.split()[0]) - 1].strip()}")
    assert not missing, "\n".join(["what did not run:", *missing])


if __name__ == "__main__":
    run()
