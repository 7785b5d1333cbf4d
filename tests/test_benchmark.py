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
    """The benchmarks' modules."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = ("calls", "goals", "gpu", "heads", "linear", "profile_gpu", "repetition", "report")
    names += ("timing",)
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
    measured = [
        (row["part"], row["backend"], row["measure"])
        for row in result["rows"]
        if not row["part"].startswith("linear")
    ]
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
    left_out = ("launches", "profile", "linear")
    rows = [row for row in gpu_run[0]["rows"] if not row["part"].startswith(left_out)]
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
    assert len(result["goals"]) == 8 + 2  # and of hidden states
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
    linear = {
        f"{name}, K=8: teacher in process / (its LM head + the student's side)": "at most 1.25"
        for name in ("cuda", "triton")
        if hasattr(backends.load(name), "gather_dot")
    }
    assert {goal["what"]: goal["goal"] for goal in result.goals} == unusual | linear | {
        "kernels for hidden states": "at least 1",
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


def test_gpu_benchmark_measures_the_loss_of_hidden_states(
    gpu_run: tuple[dict[str, Any], str],
) -> None:
    rows = [row for row in gpu_run[0]["rows"] if row["part"].startswith("linear")]
    served = hasattr(backends.load("triton"), "gather_dot")
    rows = [row for row in rows if "Liger " not in row["measure"]]
    check_linear_rows(rows, "triton" if served else "reference", peaks=False)
    goals = {goal["what"]: goal["met"] for goal in gpu_run[0]["goals"]}
    assert goals["kernels for hidden states"] == served


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
