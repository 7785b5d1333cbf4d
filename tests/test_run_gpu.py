"""What runs the tests on a GPU: counts, failures, time limits and the one line, without a GPU."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import run_gpu
import torch
from run_gpu import Result, Step


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Not those of the run that this test may be part of."""
    pytest.importorskip("triton")
    monkeypatch.setattr(run_gpu, "LOGS", tmp_path)
    return tmp_path


def step(name: str, program: str, **options: object) -> Step:
    return Step(name, [sys.executable, "-c", program], **options)


def run(*steps: Step, seconds: float = 60, slots: int = 2) -> dict[str, Result]:
    results = run_gpu.run(steps, time.monotonic() + seconds, slots)
    return {result.step.name: result for result in results}


def test_steps_pass_fail_and_are_skipped() -> None:
    results = run(
        step("good", "print('3 passed, 1 skipped in 0.10s')"),
        step("bad", "print('1 failed, 2 passed in 0.10s'); raise SystemExit(1)"),
        step("empty", "print('2 skipped in 0.10s')"),
        step("fuzz", "print('17 cases, 40 rows, backend cpu, seed 0')"),
        step("no cases", "print('0 cases, 0 rows, backend cpu, seed 0')"),
        step("build", "print('done')", counts=False),
        step("unable", "print('Device not supported'); raise SystemExit(1)", unable="not supp"),
        step("absent", "raise SystemExit(1)", skip="no such tool"),
    )
    assert {name: (r.state, r.summary) for name, r in results.items()} == {
        "good": ("passed", "3 passed, 1 skipped"),
        "bad": ("FAILED", "1 failed, 2 passed"),
        "empty": ("FAILED", "2 skipped"),
        "fuzz": ("passed", "17 cases"),
        "no cases": ("FAILED", "0 cases"),
        "build": ("passed", ""),
        "unable": ("skipped", ""),
        "absent": ("skipped", ""),
    }
    assert run_gpu.verdict(list(results.values())) == (
        "test-gpu: 3 passed, 3 failed, 2 skipped (no such tool; unable: not supp)"
    )


def test_nothing_skipped_is_not_mentioned() -> None:
    results = [Result(step("a", ""), "passed"), Result(step("b", ""), "FAILED")]
    assert run_gpu.verdict(results) == "test-gpu: 1 passed, 1 failed"


def test_pytest_says_what_is_counted(tmp_path: Path) -> None:
    tests = tmp_path / "test_it.py"
    tests.write_text("def test_a(): pass\n\n\ndef test_b(): assert 1 == 2\n")
    alone = f"--rootdir={tmp_path}", f"--confcutdir={tmp_path}", "-c", os.devnull
    results = run(
        run_gpu.pytest("one fails", str(tests), *alone),
        run_gpu.pytest("quiet", str(tests), *alone, "-q", "-k", "test_a"),
        run_gpu.pytest("none", str(tests), *alone, "-k", "test_c"),
    )
    assert [results[name].state for name in ("one fails", "quiet", "none")] == [
        "FAILED",
        "passed",
        "FAILED",
    ]
    assert results["one fails"].summary == "1 failed, 1 passed"
    assert results["quiet"].summary == "1 passed, 1 deselected"


@pytest.mark.parametrize("limit", ["step", "all"])
def test_a_step_that_hangs_is_stopped_with_its_children(limit: str, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = (
        "import pathlib, subprocess\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\n"
        "child.wait()"
    )
    start = time.monotonic()
    limits = {"step": (3.0, 60.0), "all": (60.0, 3.0)}[limit]
    (result,) = run(step("hangs", program, seconds=limits[0]), seconds=limits[1]).values()
    assert time.monotonic() - start < 20
    assert (result.state, result.reason) == ("FAILED", "stopped after 3 s")
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_steps_run_beside_each_other(tmp_path: Path) -> None:
    # Each waits for what the other writes.
    programs = [
        "import pathlib, time\n"
        f"pathlib.Path({str(tmp_path / mine)!r}).touch()\n"
        f"while not pathlib.Path({str(tmp_path / other)!r}).exists(): time.sleep(0.01)"
        for mine, other in (("a", "b"), ("b", "a"))
    ]
    results = run(*(step(f"step {i}", p, counts=False) for i, p in enumerate(programs)))
    assert [result.state for result in results.values()] == ["passed", "passed"]


def test_failed_steps_show_the_end_of_their_log(capsys: pytest.CaptureFixture[str]) -> None:
    program = "print(*range(1000), sep='\\n'); raise SystemExit(3)"
    (result,) = run(step("bad", program)).values()
    run_gpu.report(result)
    report = capsys.readouterr().out
    assert "FAILED" in report
    assert "exit status 3" in report
    assert "    999\n" in report
    assert "    900\n" not in report


def test_every_step_is_there_for_a_gpu_and_none_needs_one_elsewhere() -> None:
    steps = run_gpu.tests("cuda", ["triton", "reference"], 2.0)
    names = [step.name for step in steps]
    assert len(set(names)) == len({step.log for step in steps}) == len(names)
    for part in ("cpu suite", "suite on cuda", "gpu tests", "fuzz triton", "fuzz reference"):
        assert any(part in name for name in names)
    assert all(step.skip in ("", "compute-sanitizer is not installed") for step in steps)
    dry = run_gpu.tests("cpu", ["triton", "reference"], 2.0)
    skipped = {step.name for step in dry if step.skip}
    assert skipped == {"gpu tests", *run_gpu.SANITIZERS}


def test_a_run_ends_in_one_line_and_tells_by_its_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = ["--device", "cpu", "--only", "fuzz reference", "--fuzz-minutes"]
    for minutes, status, line in (
        ("0.005", 0, "test-gpu: 1 passed, 0 failed"),
        ("-1", 1, "test-gpu: 0 passed, 1 failed"),
    ):
        assert run_gpu.main([*arguments, minutes]) == status
        assert capsys.readouterr().out.splitlines()[-1] == line
    assert run_gpu.main(["--device", "cpu", "--only", "check"]) == 0
    assert capsys.readouterr().out.endswith("0 passed, 0 failed, 3 skipped (needs a GPU)\n")
    assert run_gpu.main(["--device", "cpu", "--only", "no such step"]) == 2


def test_nothing_runs_after_a_failed_build(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = step("build", "raise SystemExit('no compiler')", counts=False)
    monkeypatch.setattr(run_gpu, "build", lambda: broken)
    assert run_gpu.main(["--device", "cpu"]) == 1
    report = capsys.readouterr().out
    assert "no compiler" in report
    assert report.endswith("test-gpu: 0 passed, 1 failed\n")


def test_without_kernels_for_the_device_the_run_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert run_gpu.main(["--device", "cpu", "--only", "fuzz"]) == 1
    assert "it runs on GPUs" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_gpu.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out
