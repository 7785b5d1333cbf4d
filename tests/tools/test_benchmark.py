"""The benchmarks' scripts run from the first measurement to the result file, on tiny shapes."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opd_kernels import backends

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")
# What Nsight Compute 2025 writes for `--csv --page raw --print-units base --log-file`.
NCU_LOG = """==PROF== Connected to process 4711 (/usr/bin/python3.12)
==PROF== Profiling "divergence_kernel": 0%....50%....100% - 3 passes
==PROF== Disconnected from process 4711
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","dram__bytes_read.sum","dram__bytes_write.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum","launch__registers_per_thread","launch__shared_mem_per_block_dynamic","launch__shared_mem_per_block_static","sm__warps_active.avg.pct_of_peak_sustained_active","smsp__inst_executed.sum","smsp__issue_active.avg.pct_of_peak_sustained_active"
"","","","","","","","","","","","byte","byte","%","ns","register/thread","byte/block","byte/block","%","inst","%"
"0","4711","python3.12","127.0.0.1","void opd::cuda::divergence_kernel<opd::BFloat16>(opd::DivergenceArgs)","1","7","(128, 1, 1)","(8192, 1, 1)","0","9.0","2,489,319,424","6,291,456","91.25","871,264","40","12,800","1,024","93.50","301,989,888","29.75"
"1","4711","python3.12","127.0.0.1","scatter_kernel","1","7","(128, 1, 1)","(8192, 5, 1)","0","9.0","n/a","2,489,319,424","93.1","822,400","32","0","0","n/a","100,000,000","11.5"
"""  # noqa: E501
FAKE_NCU = """#!{python}
import os, pathlib, subprocess, sys
arguments = sys.argv[1:]
def value(name): return arguments[arguments.index(name) + 1]
pathlib.Path({seen!r}).write_text(value("--metrics"))
said = {log!r}
if said.startswith("==PROF=="):
    code = subprocess.run(arguments[arguments.index({python!r}):]).returncode
    if code:
        said = f"==ERROR== The application returned an error code ({{code}})"
pathlib.Path(value("--log-file")).write_text(said)
sys.exit("==ERROR==" in said)
"""


def run(script: str, *arguments: str | Path, **environment: str) -> str:
    """What a script prints."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The benchmarks' modules."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = ("calls", "goals", "heads", "linear", "repetition", "report", "timing")
    found = {name: importlib.import_module(name) for name in names}
    found |= {name: importlib.import_module(f"gpu.{name}") for name in ("measure", "profiler")}
    return SimpleNamespace(**found)


@pytest.fixture
def two_gpu_backends(
    monkeypatch: pytest.MonkeyPatch, benchmarks: SimpleNamespace
) -> Iterator[None]:
    """In the places of "cuda" and "triton" two that serve the CPU."""
    modules = {"cuda": backends.MODULES["cpu"], "triton": backends.MODULES["reference"]}
    monkeypatch.setattr(backends, "MODULES", modules)
    backends.load.cache_clear()
    monkeypatch.setattr(benchmarks.calls, "triton", None)  # which times reading memory, too
    yield
    backends.load.cache_clear()


def dry_bench(benchmarks: SimpleNamespace, path: Path, device: torch.device = CPU) -> Any:
    """(what measures on a GPU, on the shapes of a dry run; its result)."""
    result = benchmarks.report.Result(path / "result.json", {})
    return benchmarks.measure.Bench(device, benchmarks.measure.DRY, result), result


def test_every_backend_is_judged_by_goals_of_its_own(
    tmp_path: Path, benchmarks: SimpleNamespace, two_gpu_backends: None
) -> None:
    bench, result = dry_bench(benchmarks, tmp_path)
    for step in ("headline", "few_rows", "host", "careful_eager", "naive_eager", "unusual"):
        for task in benchmarks.measure.STEPS[step](bench):
            task.run()
    point = benchmarks.calls.Point(64, 1000, 1024)
    row = {"percent_of_read": 80.0, "peak_bytes": None}
    for part in ("few rows", "shapes"):
        for backend in ("cuda", "triton"):
            benchmarks.goals.judge_point(result, part, point, backend, "forward", row)
    assert [row["error"] for row in result.rows if "error" in row] == []
    unusual = {
        f"{name}, {content}: {measure} / random rows": f"at most {most}"
        for name in ("cuda", "triton")
        for content, most in (("20 banned ids", 1.1), ("all equal", 1.05))
        for measure in ("forward", "forward + backward")
    }
    assert {goal["what"]: goal["goal"] for goal in result.goals} == unusual | {
        "cuda, 2 rows, K=8: forward, % of the read ceiling": "at least 93",
        "cuda, 2 rows, K=8: forward + backward, % of read + memset": "at least 93",
        "cuda, 64 rows, K=1024: forward, % of the read ceiling": "at least 75",
        "cuda: forward, 1 rows / 2 rows": "at most 1",
        "cuda, K=8: careful eager / ours": "at least 8",
        "cuda, K=8: naive eager / ours": "at least 20",
        "cuda: forward, us on the host": "at most 25",
        "cuda: backward, us on the host": "at most 25",
        "triton, 2 rows, K=8: forward, % of the read ceiling": "at least 88",
        "triton, 2 rows, K=8: forward + backward, % of read + memset": "at least 88",
        "triton, K=8: careful eager / ours": "at least 5",
        "triton, K=8: naive eager / ours": "at least 15",
    }
    # The same shape was judged as one of few rows, and as a wide one.
    few = [goal for goal in result.goals if "64 rows" in goal["what"]]
    assert [goal["goal"] for goal in few] == ["at least 65", "at least 75"]
    rows = {(row["part"], row["backend"], row["measure"]): row for row in result.rows}
    values = {goal["what"]: goal["value"] for goal in result.goals}
    for what, value in (
        ("cuda, 2 rows, K=8: forward, % of the read ceiling", "percent_of_read"),
        ("triton, 2 rows, K=8: forward, % of the read ceiling", "percent_of_read"),
    ):
        assert values[what] == rows["headline", what.split(",")[0], "forward"][value]
    host = rows["host", "cuda", "backward"]
    assert values["cuda: backward, us on the host"] == host["host_us"]
    few_ms = [
        row["ms"]
        for row in result.rows
        if (row["part"], row["backend"], row["measure"]) == ("few rows", "cuda", "forward")
    ]
    assert values["cuda: forward, 1 rows / 2 rows"] == few_ms[1] / few_ms[0]


def test_shapes_of_the_goals_are_measured(benchmarks: SimpleNamespace) -> None:
    plan = benchmarks.measure.FULL
    assert set(plan.ks) == {32, 64, 128}
    assert plan.few_rows == (benchmarks.goals.FEW_ROWS, 33)
    assert {"k": benchmarks.goals.WIDEST} in plan.shapes
    changed = [dict(change) for change in plan.shapes]
    assert {"vocab": 262144} in changed
    assert {"vocab": 151669} in changed
    assert {"rows": 1024} in changed
    assert {change.get("dtype") for change in changed} == {None, "float32", "float16"}
    assert plan.linear.rows == benchmarks.goals.LINEAR_ROWS
    assert set(plan.linear.ks) == set(benchmarks.goals.LINEAR_MS)


def test_a_backend_that_does_not_serve_the_gpu_misses_a_goal(
    tmp_path: Path,
    benchmarks: SimpleNamespace,
    two_gpu_backends: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench, result = dry_bench(benchmarks, tmp_path)
    bench.device = torch.device("cuda")
    monkeypatch.setattr(benchmarks.measure, "describe", lambda device: {"device": "X"})
    bench.machine()
    assert {goal["what"]: goal["met"] for goal in result.goals} == {
        "cuda: serves the device": False,
        "triton: serves the device": True,
    }
    assert [(row["backend"], row["error"]) for row in result.rows] == [
        ("cuda", "the tensors are on cuda")
    ]
    result.write()
    assert json.loads(result.path.read_text())["head"] == {"device": "X"}


def test_the_hosts_time_is_that_of_the_call_alone(benchmarks: SimpleNamespace) -> None:
    def prepare() -> Any:
        time.sleep(0.05)
        return functools.partial(time.sleep, 0.002)

    times = benchmarks.timing.Clock(CPU, warmups=1, rounds=1).host(prepare, calls=5)
    assert len(times) == 5
    assert 2 <= sorted(times)[2] < 20


@pytest.fixture
def ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a profiler that runs the program and writes a log; returns where its metrics go."""

    def make(log: str) -> Path:
        seen, program = tmp_path / "metrics", tmp_path / "ncu"
        program.write_text(FAKE_NCU.format(python=sys.executable, seen=str(seen), log=log))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return seen

    return make


SHAPE = ("--rows=2", "--vocab=300", "--k=4", "--device=cpu")


def test_a_profile_has_a_line_for_each_kernel(ncu: Any, benchmarks: SimpleNamespace) -> None:
    metrics = ncu(NCU_LOG)
    kernels, why = benchmarks.profiler.profile("cpu", *SHAPE)
    assert why == ""
    assert kernels == [
        {
            "kernel": "void opd::cuda::divergence_kernel<opd::BFloat16>(opd::DivergenceArgs)",
            "block": "(128, 1, 1)",
            "grid": "(8192, 1, 1)",
            "ns": 871264.0,
            "dram_percent": 91.25,
            "read_bytes": 2489319424.0,
            "written_bytes": 6291456.0,
            "warps_percent": 93.5,
            "instructions": 301989888.0,
            "issue_percent": 29.75,
            "registers": 40.0,
            "shared_bytes": 13824.0,
        },
        {
            "kernel": "scatter_kernel",
            "block": "(128, 1, 1)",
            "grid": "(8192, 5, 1)",
            "ns": 822400.0,
            "dram_percent": 93.1,
            "written_bytes": 2489319424.0,
            "instructions": 100000000.0,
            "issue_percent": 11.5,
            "registers": 32.0,
            "shared_bytes": 0.0,
        },
    ]
    asked = {name for names in benchmarks.profiler.METRICS.values() for name in names}
    assert set(metrics.read_text().split(",")) == asked
    assert asked <= set(NCU_LOG.splitlines()[3].split('"'))
    line = benchmarks.report.counted(kernels[0])
    assert line.startswith("871.3 us, 91.2 % of the memory's peak, 2489.3 MB read, ")
    assert "40 registers, 13.8 kB shared" in line


def test_units_are_converted(benchmarks: SimpleNamespace) -> None:
    log = NCU_LOG.replace('"ns"', '"usecond"').replace('"byte","byte"', '"Mbyte","Kbyte"')
    first, _ = benchmarks.profiler.parsed(log)
    assert first["ns"] == 871264e3
    assert (first["read_bytes"], first["written_bytes"]) == (2489319424e6, 6291456e3)


@pytest.mark.parametrize(
    ("log", "why"),
    [
        (
            "==PROF== Connected to process 1\n==ERROR== ERR_NVGPUCTRPERM - The user does not have "
            "permission to access NVIDIA GPU Performance Counters\n==ERROR== Failed\n",
            "ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance "
            "Counters",
        ),
        ("==WARNING== No kernels were profiled.\n", "==WARNING== No kernels were profiled."),
        (None, "Nsight Compute (ncu) is not installed"),
        ("", "exit status 0"),
    ],
)
def test_without_counters_a_profile_says_why(
    log: str | None,
    why: str,
    tmp_path: Path,
    ncu: Any,
    benchmarks: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if log is None:
        monkeypatch.setattr(benchmarks.profiler, "find_ncu", lambda: None)
    else:
        ncu(log)
    bench, result = dry_bench(benchmarks, tmp_path)
    bench.profile("cpu")
    assert [row["note"] for row in result.rows] == [f"not available: {why}"]


def test_a_call_that_fails_has_no_profile(ncu: Any, benchmarks: SimpleNamespace) -> None:
    ncu(NCU_LOG)
    kernels, why = benchmarks.profiler.profile("no such backend", *SHAPE)
    assert (kernels, why) == ([], "The application returned an error code (1)")


def test_a_profile_is_part_of_the_result(
    tmp_path: Path, ncu: Any, benchmarks: SimpleNamespace
) -> None:
    ncu(NCU_LOG)
    bench, result = dry_bench(benchmarks, tmp_path)
    bench.profile("cpu")
    assert [row["measure"] for row in result.rows] == [
        "opd::cuda::divergence_kernel<opd::BFloat16>",
        "scatter_kernel",
    ]
    table = "\n".join(benchmarks.report.table(result.rows))
    teachers = 2489319424 / (2 * 1000 * 2)
    assert f"2489.3 MB read, {teachers:.3f} x the teacher's bytes" in table


# The loss of hidden states


HOW = ("trained", "frozen")
LOGITS_FORM = [("logits", f"LM head + topk_rkl, {how}") for how in HOW]
TEACHER_PART = "linear, teacher in process"


def linear_measures(backend: str, points: int, peaks: bool) -> list[tuple[str, str, str]]:
    """(part, backend, measure) of every row, where Liger is not installed."""
    both = [(backend, f"forward + backward, {how}") for how in HOW]
    headline = [(backend, "forward"), *both, *LOGITS_FORM]
    headline += [("eager", f"LM head + careful eager, {how}") for how in HOW]
    headline += [("torch", f"LM head, {how}") for how in HOW]
    headline += [("torch", "read of gathered bytes")]
    memories = ["fresh", "warm"] + ["fresh huge pages"] * hasattr(mmap, "MADV_HUGEPAGE")
    headline += [("torch", f"memset of dW, {memory}") for memory in memories]
    teacher = [("torch", "teacher's LM head"), (backend, "student side")]
    teacher += [(backend, "teacher in process"), ("peer", "Liger")]
    by_k = [*(both + LOGITS_FORM) * 2, *((backend, f"crossover, {how}") for how in HOW)]
    return sorted(
        [("linear", *name) for name in headline * points]
        + [(TEACHER_PART, *name) for name in teacher]
        + [("linear, many rows", *both[0])] * peaks
        + [("linear, by K", *name) for name in by_k]
        + [("linear, by N", *name) for name in both + LOGITS_FORM]
    )


def check_linear_rows(rows: list[dict[str, Any]], backend: str, peaks: bool) -> None:
    measured = [(row["part"], row["backend"], row["measure"]) for row in rows]
    assert sorted(measured) == linear_measures(backend, points=2, peaks=peaks)
    assert {row["content"] for row in rows if row["part"] == "linear"} == {
        "uniform ids",
        "shared ids",
    }
    for row in rows:
        if "ms" in row:
            assert 0 < row["p10"] <= row["ms"] <= row["p90"]
            assert row["checked"]["rows"] == row["rows"]
            assert row["checked"]["loss_error"] < 1e-4
        if row["measure"].startswith("LM head"):
            assert row["times_ours"] > 0
            assert row["beside"] == backend
        if row["measure"].startswith("LM head +"):
            assert row["checked"][row["measure"].rpartition(",")[0]] < 1e-4
        if row["measure"] == "Liger":
            assert "pip install liger-kernel" in row["note"]


@pytest.fixture
def no_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)


def linear_bench(benchmarks: SimpleNamespace, backend: str = "reference") -> Any:
    """The benchmark of hidden states on tiny shapes, and its result."""
    result = benchmarks.report.Result(None, {})
    plan = dataclasses.replace(benchmarks.linear.SMOKE, fresh=())
    return benchmarks.linear.LinearBench(CPU, plan, result, [backend]), result


def test_cpu_benchmark_of_hidden_states_appends_its_figures(tmp_path: Path) -> None:
    path = tmp_path / "linear.jsonl"
    output = run("linear.py", "--quick", "--json", path)
    (line,) = path.read_text().splitlines()
    figures = json.loads(line)
    served = hasattr(backends.load("cpu"), "gather_dot")
    peaks = Path("/proc/self/clear_refs").exists()
    rows = [row for row in figures["rows"] if "Liger " not in row["measure"]]
    check_linear_rows(rows, "cpu" if served else "reference", peaks)
    seen = [row for row in rows if "peak_bytes" in row]
    assert len(seen) == 3 * peaks
    for row in seen:
        assert row["peak_bytes"] - row["extra_bytes"] == 4 * 24 * (row["rows"] + row["vocab"])
        assert row["peak_bytes"] < 4 << 20
    verdict = output[output.index("\nverdict") :]
    for goal in figures["goals"]:
        assert f"{'met' if goal['met'] else 'missed':6s}  {goal['what']}" in verdict
    assert "written to" not in output


@pytest.mark.parametrize("broken", ["loss", "hidden", "weight", "frozen"])
def test_nothing_of_hidden_states_is_timed_whose_outputs_are_wrong(
    broken: str, benchmarks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = benchmarks.heads.linear_topk_rkl

    def changed(tensor: torch.Tensor, factor: float) -> torch.Tensor:
        """The same with another gradient."""
        return tensor.detach() + factor * (tensor - tensor.detach())

    def wrong(
        hidden: torch.Tensor, weight: torch.Tensor, *args: Any, **options: Any
    ) -> torch.Tensor:
        frozen = not weight.requires_grad
        if broken == "hidden" or (broken == "frozen" and frozen):
            hidden = changed(hidden, 1.001)
        if broken == "weight" and not frozen:
            weight = changed(weight, 1.001)
        loss = right(hidden, weight, *args, **options)
        return loss * 1.001 if broken == "loss" else loss

    monkeypatch.setattr(benchmarks.heads, "linear_topk_rkl", wrong)
    bench, result = linear_bench(benchmarks)
    point = bench.plan.points()[0]
    with pytest.raises(AssertionError, match="frozen" if broken == "frozen" else broken):
        bench.measure(point, "shared ids")
    with pytest.raises(AssertionError):
        bench.measure_teacher(point)
    with pytest.raises(AssertionError):
        bench.sweep("k", (8,))
    assert result.rows == []


def test_peers_of_hidden_states_are_checked(
    benchmarks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    careful = benchmarks.heads.careful_given
    monkeypatch.setattr(benchmarks.heads, "careful_given", lambda *args: careful(*args) * 1.001)
    bench, _ = linear_bench(benchmarks)
    with pytest.raises(AssertionError, match="careful eager differs"):
        bench.measure(bench.plan.points()[0], "uniform ids")


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_liger_is_a_peer_where_it_is_installed(
    factor: float, benchmarks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loss:
        def __init__(self, **options: Any) -> None:
            assert options == {
                "weight_hard_loss": 0.0,
                "weight_soft_loss": 1.0,
                "beta": 1.0,
                "compiled": False,
            }

        def __call__(
            self,
            hidden: torch.Tensor,
            weight: torch.Tensor,
            teacher: torch.Tensor,
            teacher_weight: torch.Tensor,
            labels: torch.Tensor,
        ) -> torch.Tensor:
            log_p = (hidden @ weight.t()).log_softmax(-1)
            log_q = (teacher @ teacher_weight.t()).log_softmax(-1)
            return factor * (log_p.exp() * (log_p - log_q)).sum() / len(labels)

    module = SimpleNamespace(LigerFusedLinearJSDLoss=Loss)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(chunked_loss=module))
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", module)
    monkeypatch.setattr(benchmarks.heads.importlib.metadata, "version", lambda _: "9.9")
    bench, result = linear_bench(benchmarks)
    if factor != 1:
        with pytest.raises(AssertionError, match="Liger's loss is off"):
            bench.measure_liger(bench.plan.points()[0])
        return
    bench.measure_liger(bench.plan.points()[0])
    (row,) = result.rows
    assert row["measure"] == "Liger 9.9, full vocabulary"
    assert row["times_ours"] > 0
    assert row["checked"]["peer_loss_error"] < 1e-4


def test_without_liger_the_benchmark_says_so(benchmarks: SimpleNamespace, no_liger: None) -> None:
    bench, result = linear_bench(benchmarks)
    bench.measure_liger(bench.plan.points()[0])
    (row,) = result.rows
    assert "pip install liger-kernel" in row["note"]


def test_goals_of_hidden_states(benchmarks: SimpleNamespace) -> None:
    result, goals = benchmarks.report.Result(None, {}), benchmarks.goals
    point = benchmarks.heads.HeadPoint(512, 49152, 576, 32, "float32")
    # Ours take 50 and 40 ms; a tenth of the 600 that careful eager takes, and the memset's 30.
    rows = {
        "memset of dW, fresh": {"ms": 30.0},
        "LM head + careful eager, trained": {"ms": 600.0, "times_ours": 12.0},
        "LM head + careful eager, frozen": {"ms": 400.0, "times_ours": 10.0},
    }
    goals.judge_linear(result, "cpu", point, "cpu", rows)
    found = [(goal["what"], goal["goal"], goal["met"]) for goal in result.goals]
    assert found == [
        (
            "cpu, K=32: LM head + careful eager, trained / ours (10 and a memset of a fresh dW)",
            "at least 6.66667",
            True,
        ),
        ("cpu, K=32: LM head + careful eager, frozen / ours", "at least 20", False),
    ]
    result.goals.clear()
    for k, times_ours in ((64, 7.5), (32, 9.5), (8, 1.0)):
        point = benchmarks.heads.HeadPoint(8192, 151936, 4096, k, "bfloat16")
        rows = {"LM head, trained": {"ms": 42.0, "times_ours": times_ours}}
        goals.judge_linear(result, "cuda", point, "triton", rows)
    assert [(goal["goal"], goal["met"]) for goal in result.goals] == [
        ("at least 7", True),
        ("at least 10", False),
    ]
    result.goals.clear()
    for extra, met in ((-5e6, True), (65e6, True), (66e6, False)):
        goals.judge_linear_memory(result, point, "triton", {"extra_bytes": extra})
        assert result.goals[-1]["met"] is met


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ((4.0, 2.0, 1.5), None),
        ((4.0, 2.0, 0.5), 64.0),
        ((4.0, 0.25, 0.1), 16.0),
        ((0.9, 0.5, 0.1), 8.0),
        ((4.0, 1.0, 0.5), 32.0),
    ],
)
def test_the_crossover_is_interpolated(
    ratios: tuple[float, ...], expected: float | None, benchmarks: SimpleNamespace
) -> None:
    found = benchmarks.heads.crossover([8, 32, 128], list(ratios))
    assert found == (expected if expected is None else pytest.approx(expected))


def test_supports_are_distinct_in_a_row_and_shared_as_in_text(benchmarks: SimpleNamespace) -> None:
    heads, share = benchmarks.heads, benchmarks.repetition.distinct_share
    torch.manual_seed(0)
    point = heads.HeadPoint(512, 49152, 576, 32, "float32")
    uniform, shared = (make(point, CPU) for make in heads.SUPPORTS.values())
    for ids in (uniform, shared):
        assert ids.shape == (512, 32)
        assert ids.dtype == torch.int32
        assert 0 <= int(ids.min()) <= int(ids.max()) < 49152
        assert share(ids, 1) == 1
    assert share(uniform, 512) > 0.8
    # What repetition.py found, within the spread of a few answers.
    for block, found in ((16, 0.624), (64, 0.415), (512, 0.215)):
        assert share(shared, block) == pytest.approx(found, abs=0.03)


def test_repetition_counts_the_first_of_each_id_in_whole_blocks(
    benchmarks: SimpleNamespace,
) -> None:
    ids = torch.tensor([[1, 2], [2, 3], [1, 2], [4, 5], [9, 9]])
    assert benchmarks.repetition.distinct_share(ids, 2) == 7 / 8
    assert benchmarks.repetition.distinct_share(ids, 4) == 5 / 8
    assert math.isnan(benchmarks.repetition.distinct_share(ids, 8))
    assert benchmarks.repetition.commonest(ids[:4]) == 3 / 4


def test_cpu_benchmark_appends_its_figures(tmp_path: Path) -> None:
    shape = ("--rows", "2", "--vocab", "300", "--k", "4", "--rounds", "2", "--no-compile")
    output = run("cpu.py", *shape, "--json", tmp_path / "cpu.jsonl")
    figures = json.loads((tmp_path / "cpu.jsonl").read_text())
    assert all(ms > 0 for ms in figures["milliseconds"].values())
    assert "careful eager / ours" in output


def test_cpu_benchmark_of_statistics_appends_its_figures(tmp_path: Path) -> None:
    shape = ("--rows", "2", "--vocab", "300", "--k", "4", "--hidden", "8", "--rounds", "2")
    output = run("stats.py", *shape, "--json", tmp_path / "stats.jsonl")
    figures = json.loads((tmp_path / "stats.jsonl").read_text())
    assert all(ms > 0 for ms in figures["milliseconds"].values())
    assert "masses, entropies, log-probs / loss" in output


def test_benchmark_of_shards_compares_with_one_process_and_with_trainers() -> None:
    output = run("shards.py", "--quick")
    assert output.count("ours, sharded / (own columns alone + collectives alone)") == 4
    assert output.count("NeMo-RL / ours, sharded") == 2
