"""Every line and every branch of the CUDA kernels runs, and what it computes is right.

The calls are run in a process of their own, on an emulation built for gcov.
"""

from __future__ import annotations

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
from opd_kernels._arguments import Allowed, Objective, Temperature
from opd_kernels.backends import cuda
from opd_kernels.divergences import reverse_kl
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


def refusals() -> None:
    """What the module itself refuses; callers are told before, in their own words."""
    module = cuda.backend.module
    wide = torch.empty(1, cuda._max_width(1, torch.float32) + 1)
    with pytest.raises(ValueError, match="do not fit"):
        cuda.backend.select(wide, 1, Allowed(wide.shape[1]))
    row = torch.zeros(1, 4)
    for change in (
        {"reverse": 0.5},
        *({name: 0.5} for name in ("forward", "skew_reverse", "skew_forward")),
        {"stop_ratio": True},
        {"log_ratio_clip": 5.0},
        {"logp_floor": -20.0},
    ):
        objective = Objective(divergence=reverse_kl()._replace(**change))
        with pytest.raises(ValueError, match="the only one"):
            cuda.backend.select_divergence(row, row, 4, Allowed(4), objective)
    objective = Objective(weights=torch.ones(1, 4))
    with pytest.raises(ValueError, match="the only one"):
        cuda.backend.select_divergence(row, row, 4, Allowed(4), objective)
    with pytest.raises(ValueError, match="not renormalised"):
        cuda.backend.select_divergence(row, row, 4, Allowed(4), Objective(outside="bucket"))
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
    gathers()
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
