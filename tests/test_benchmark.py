"""The benchmarks' scripts run from the first measurement to the result file, on tiny shapes."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from opd_kernels import backends

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")
# What Nsight Compute 2025 writes for `--csv --page raw --print-units base --log-file`.
NCU_LOG = """==PROF== Connected to process 4711 (/usr/bin/python3.12)
==PROF== Profiling "divergence_kernel": 0%....50%....100% - 3 passes
==PROF== Disconnected from process 4711
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","dram__bytes_read.sum","dram__bytes_write.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum","launch__registers_per_thread","launch__shared_mem_per_block_dynamic","launch__shared_mem_per_block_static","sm__warps_active.avg.pct_of_peak_sustained_active","smsp__inst_executed.sum"
"","","","","","","","","","","","byte","byte","%","ns","register/thread","byte/block","byte/block","%","inst"
"0","4711","python3.12","127.0.0.1","void opd::cuda::divergence_kernel<opd::BFloat16>(opd::DivergenceArgs)","1","7","(128, 1, 1)","(8192, 1, 1)","0","9.0","2,489,319,424","6,291,456","91.25","871,264","40","12,800","1,024","93.50","301,989,888"
"1","4711","python3.12","127.0.0.1","scatter_kernel","1","7","(128, 1, 1)","(8192, 5, 1)","0","9.0","n/a","2,489,319,424","93.1","822,400","32","0","0","n/a","100,000,000"
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
    """The GPU benchmark's modules."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = ("calls", "goals", "gpu", "profile_gpu", "report", "timing")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture
def no_ncu(monkeypatch: pytest.MonkeyPatch, benchmarks: SimpleNamespace) -> None:
    monkeypatch.setattr(benchmarks.profile_gpu, "find_ncu", lambda: None)


@pytest.fixture
def two_gpu_backends(monkeypatch: pytest.MonkeyPatch, benchmarks: SimpleNamespace) -> None:
    """In the places of "cuda" and "triton" two that serve the CPU."""
    modules = {"cuda": "opd_kernels.backends.cpu", "triton": "opd_kernels.reference"}

    @functools.cache
    def load(name: str) -> ModuleType:
        return importlib.import_module(modules[name])

    monkeypatch.setattr(backends, "MODULES", modules)
    monkeypatch.setattr(backends, "load", load)
    monkeypatch.setattr(benchmarks.calls, "triton", None)  # which times reading memory, too


def smoke_result(benchmarks: SimpleNamespace, path: Path, device: torch.device = CPU) -> Any:
    """(benchmark on the shapes of the smoke run, its result)."""
    result = benchmarks.report.Result(path / "result.json", {})
    return benchmarks.gpu.Bench(device, benchmarks.gpu.SMOKE, result), result


@pytest.fixture(scope="module")
def gpu_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """(result file, output) of the GPU benchmark under Triton's interpreter."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("results")
    arguments = ("--smoke", "--device", "cpu", "--commit", "abc", "--output", folder)
    output = run("gpu.py", *arguments, TRITON_INTERPRET="1")
    assert [path.name for path in folder.iterdir()] == ["cpu-abc.json"]
    return json.loads((folder / "cpu-abc.json").read_text()), output


def test_gpu_benchmark_measures_everything_and_nothing_fails(
    gpu_run: tuple[dict[str, Any], str],
) -> None:
    result, _ = gpu_run
    assert [row["error"] for row in result["rows"] if "error" in row] == []
    assert result["not_reached"] == []
    measured = [(row["part"], row["backend"], row["measure"]) for row in result["rows"]]
    yardsticks = [("torch", measure) for measure in ("read", "memset", "copy")]
    ours = [("triton", measure) for measure in ("forward", "backward", "forward + backward")]
    others = [("triton", m) for m in ("select_topk", "forward, TopK teacher", "in place")]
    host = ["forward", "backward", "forward operator", "backward operator"]
    peers = ["careful eager", "naive eager", "careful eager, compiled", "naive eager, compiled"]
    assert sorted(measured) == sorted(
        [("headline", *name) for name in yardsticks + ours + others]
        + [(part, *name) for name in yardsticks + ours for part in ("few rows", "sweep")]
        + [("host", "triton", measure) for measure in host]
        + [("peers", "triton", label) for label in peers]
        + [("unusual", "triton", measure) for measure in ("forward", "forward + backward")] * 2
        + [("launches", "triton", measure) for measure in ("forward", "backward")] * 2
        + [("profile", "triton", "profile")]
    )
    (profile,) = (row for row in result["rows"] if row["part"] == "profile")
    assert profile["note"].startswith("not profiled: ")


def test_gpu_benchmark_puts_every_time_beside_a_check_and_a_yardstick(
    gpu_run: tuple[dict[str, Any], str],
) -> None:
    rows = [row for row in gpu_run[0]["rows"] if row["part"] not in ("launches", "profile")]
    for row in rows:
        assert 0 < row["p10"] <= row["ms"] <= row["p90"]
        if row["part"] == "host":
            assert row["host_us"] == pytest.approx(row["ms"] * 1e3)
        elif row["backend"] == "triton":
            assert row["checked"]["rows"] == row["rows"]
            assert row["checked"]["loss_error"] < 1e-4
    for row in rows:
        if row["measure"] == "forward" and row["part"] not in ("unusual", "host"):
            nbytes = row["rows"] * row["vocab"] * 2 + 40 * row["rows"] * row["k"]
            assert row["bytes"] == nbytes
            assert row["gb_s"] == pytest.approx(nbytes / row["ms"] / 1e6)
            assert row["percent_of_read"] > 0
    assert {row["ratio_to_random"] > 0 for row in rows if row["part"] == "unusual"} == {True}


def test_gpu_benchmark_prints_a_verdict_on_every_goal(
    gpu_run: tuple[dict[str, Any], str],
) -> None:
    result, output = gpu_run
    assert len(result["goals"]) == 8
    verdict = output[output.index("\nverdict") :]
    for goal in result["goals"]:
        assert f"{'met' if goal['met'] else 'missed':6s}  {goal['what']}" in verdict


def test_every_backend_is_judged_by_goals_of_its_own(
    tmp_path: Path, benchmarks: SimpleNamespace, two_gpu_backends: None, no_ncu: None
) -> None:
    bench, result = smoke_result(benchmarks, tmp_path)
    tasks = benchmarks.gpu.tasks(bench, bench.plan, quick=True)
    benchmarks.gpu.run_tasks(bench, result, tasks, 300)
    assert [row["error"] for row in result.rows if "error" in row] == []
    contents = ("20 banned ids", "half of the rows masked")
    unusual = {
        f"{name}, {content}: {measure} / random rows": "at most 1.1"
        for name in ("cuda", "triton")
        for content in contents
        for measure in ("forward", "forward + backward")
    }
    assert {goal["what"]: goal["goal"] for goal in result.goals} == unusual | {
        "cuda, K=8: forward, % of the read ceiling": "at least 90",
        "cuda, K=8: forward + backward, % of read + memset": "at least 90",
        "cuda, 1 rows: forward, % of the read ceiling": "at least 60",
        "cuda, K=8: forward, triton / ours": "at least 1.05",
        "cuda, K=8: forward + backward, triton / ours": "at least 1.05",
        "cuda, K=8: careful eager / ours": "at least 8",
        "cuda, K=8: naive eager / ours": "at least 20",
        "cuda: forward, us on the host": "at most 25",
        "cuda: backward, us on the host": "at most 25",
        "triton, K=8: forward, % of the read ceiling": "at least 80",
        "triton, K=8: forward + backward, % of read + memset": "at least 80",
        "triton, K=8: careful eager / ours": "at least 5",
        "triton, K=8: naive eager / ours": "at least 15",
    }
    rows = {(row["part"], row["backend"], row["measure"]): row for row in result.rows}
    values = {goal["what"]: goal["value"] for goal in result.goals}
    for what, value in (
        ("cuda, 1 rows: forward, % of the read ceiling", rows["few rows", "cuda", "forward"]),
        ("cuda, K=8: forward, % of the read ceiling", rows["headline", "cuda", "forward"]),
    ):
        assert values[what] == value["percent_of_read"]
    host = rows["host", "cuda", "backward"]
    assert values["cuda: backward, us on the host"] == host["host_us"]
    ratio = rows["headline", "triton", "forward"]["ms"] / rows["headline", "cuda", "forward"]["ms"]
    assert values["cuda, K=8: forward, triton / ours"] == pytest.approx(ratio)


@pytest.mark.parametrize(("slower", "met"), [(1.06, True), (1.04, False), (0.9, False)])
def test_a_backend_has_to_be_faster_than_another(
    slower: float, met: bool, tmp_path: Path, benchmarks: SimpleNamespace
) -> None:
    _, result = smoke_result(benchmarks, tmp_path)
    times = {("cuda", "forward"): [2.0, 1.0, 9.0], ("triton", "forward"): [2 * slower, 1.0, 30.0]}
    benchmarks.goals.judge_backends(result, benchmarks.gpu.Point(2, 1000, 8), times)
    assert [(goal["value"], goal["met"]) for goal in result.goals] == [(slower, met)]


def test_shapes_of_the_goals_are_measured(benchmarks: SimpleNamespace) -> None:
    plan = benchmarks.gpu.FULL
    assert set(plan.ks) == {32, 64, 128}
    assert plan.few_rows == (64, 128, 256, 512)


def test_a_backend_that_does_not_serve_the_gpu_misses_a_goal(
    tmp_path: Path, benchmarks: SimpleNamespace, two_gpu_backends: None
) -> None:
    bench, result = smoke_result(benchmarks, tmp_path)
    bench.device = torch.device("cuda")
    bench.look_for_backends(benchmarks.gpu.Point(2, 1000, 8))
    assert {goal["what"]: goal["met"] for goal in result.goals} == {
        "cuda: serves the device": False,
        "triton: serves the device": True,
    }
    assert [(row["backend"], row["error"]) for row in result.rows] == [
        ("cuda", "the tensors are on cuda")
    ]


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
    kernels, why = benchmarks.profile_gpu.profile("cpu", *SHAPE)
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
            "registers": 32.0,
            "shared_bytes": 0.0,
        },
    ]
    asked = {name for names in benchmarks.profile_gpu.METRICS.values() for name in names}
    assert set(metrics.read_text().split(",")) == asked
    assert asked <= set(NCU_LOG.splitlines()[3].split('"'))
    printed = run("profile_gpu.py", "cpu", *SHAPE).splitlines()
    assert len(printed) == 2
    name, figures = printed[0].split(": ")
    assert name == "  cpu     opd::cuda::divergence_kernel<opd::BFloat16>"
    assert figures.startswith("871.3 us, 91.2 % of the memory's peak, 2489.3 MB read, ")
    assert "40 registers, 13.8 kB shared" in figures


def test_units_are_converted(benchmarks: SimpleNamespace) -> None:
    log = NCU_LOG.replace('"ns"', '"usecond"').replace('"byte","byte"', '"Mbyte","Kbyte"')
    first, _ = benchmarks.profile_gpu.parsed(log)
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
def test_without_counters_a_profile_says_why_and_the_benchmark_goes_on(
    log: str | None,
    why: str,
    tmp_path: Path,
    ncu: Any,
    benchmarks: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if log is None:
        monkeypatch.setattr(benchmarks.profile_gpu, "find_ncu", lambda: None)
    else:
        ncu(log)
    monkeypatch.setattr(sys, "argv", ["profile_gpu.py", "cpu", *SHAPE])
    assert benchmarks.profile_gpu.main() == 1
    assert capsys.readouterr().out == f"not profiled: cpu: {why}\n"
    bench, result = smoke_result(benchmarks, tmp_path)
    monkeypatch.setattr(bench, "backends", lambda _: ["cpu"])
    bench.profile(benchmarks.gpu.Point(2, 300, 4))
    assert [row["note"] for row in result.rows] == [f"not profiled: {why}"]


def test_a_call_that_fails_has_no_profile(ncu: Any, benchmarks: SimpleNamespace) -> None:
    ncu(NCU_LOG)
    kernels, why = benchmarks.profile_gpu.profile("no such backend", *SHAPE)
    assert (kernels, why) == ([], "The application returned an error code (1)")


def test_a_profile_is_part_of_the_result(
    tmp_path: Path, ncu: Any, benchmarks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ncu(NCU_LOG)
    bench, result = smoke_result(benchmarks, tmp_path)
    monkeypatch.setattr(bench, "backends", lambda _: ["cpu"])
    bench.profile(benchmarks.gpu.Point(2, 300, 4))
    assert [row["measure"] for row in result.rows] == [
        "opd::cuda::divergence_kernel<opd::BFloat16>",
        "scatter_kernel",
    ]
    table = "\n".join(benchmarks.report.table(result.rows))
    assert "871.3 us, 91.2 % of the memory's peak" in table


def test_cpu_benchmark_appends_its_figures(tmp_path: Path) -> None:
    shape = ("--rows", "2", "--vocab", "300", "--k", "4", "--rounds", "2", "--no-compile")
    output = run("cpu.py", *shape, "--json", tmp_path / "cpu.jsonl")
    figures = json.loads((tmp_path / "cpu.jsonl").read_text())
    assert all(ms > 0 for ms in figures["milliseconds"].values())
    assert "careful eager / ours" in output
