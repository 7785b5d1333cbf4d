"""The benchmarks' scripts run from the first measurement to the result file, on tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


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
    peers = ["careful eager", "naive eager", "careful eager, compiled", "naive eager, compiled"]
    assert sorted(measured) == sorted(
        [("headline", *name) for name in yardsticks + ours + others]
        + [("sweep", *name) for name in yardsticks + ours]
        + [("peers", "triton", label) for label in peers]
        + [("unusual", "triton", measure) for measure in ("forward", "forward + backward")] * 2
        + [("launches", "triton", measure) for measure in ("forward", "backward")]
    )


def test_gpu_benchmark_puts_every_time_beside_a_check_and_a_yardstick(
    gpu_run: tuple[dict[str, Any], str],
) -> None:
    rows = [row for row in gpu_run[0]["rows"] if row["part"] != "launches"]
    for row in rows:
        assert 0 < row["p10"] <= row["ms"] <= row["p90"]
        if row["backend"] == "triton":
            assert row["checked"]["rows"] == 2
            assert row["checked"]["loss_error"] < 1e-4
    for row in rows:
        if row["measure"] == "forward" and row["part"] != "unusual":
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


def test_cpu_benchmark_appends_its_figures(tmp_path: Path) -> None:
    shape = ("--rows", "2", "--vocab", "300", "--k", "4", "--rounds", "2", "--no-compile")
    output = run("cpu.py", *shape, "--json", tmp_path / "cpu.jsonl")
    figures = json.loads((tmp_path / "cpu.jsonl").read_text())
    assert all(ms > 0 for ms in figures["milliseconds"].values())
    assert "careful eager / ours" in output
