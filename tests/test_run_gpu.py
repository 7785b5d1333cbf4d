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


def test_a_step_that_informs_shows_what_it_prints_and_cannot_fail(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {"counts": False, "informs": True}
    results = run(
        step("works", "print('a line for each kernel')", **options),
        step("denied", "print('a'); print('no permission'); raise SystemExit(1)", **options),
        step(
            "hangs", "import time; print('b', flush=True); time.sleep(60)", seconds=3.0, **options
        ),
        step("absent", "print('c')", skip="no such tool", **options),
    )
    for result in results.values():
        run_gpu.report(result)
    lines = capsys.readouterr().out.splitlines()
    assert {"a line for each kernel", "a", "b"} < set(lines)
    assert "c" not in lines
    assert {name: (result.state, result.reason) for name, result in results.items()} == {
        "works": ("passed", ""),
        "denied": ("skipped", "denied: no permission"),
        "hangs": ("skipped", "hangs: stopped after 3 s"),
        "absent": ("skipped", "no such tool"),
    }


def reported(
    place: str, header: str = "Uninitialized __global__ memory read of size 4 bytes"
) -> str:
    """compute-sanitizer's log of one error."""
    return (
        "========= COMPUTE-SANITIZER\n"
        f"========= {header}\n"
        f"=========     {place}\n"
        "=========     by thread (0,0,0) in block (0,0,0)\n"
        "=========     Access to 0x7f is out of bounds\n"
        "=========     and is 1 bytes after the nearest allocation at 0x7f of size 8 bytes\n"
        "=========     Saved host backtrace up to driver entry point at kernel launch time\n"
        "=========         Host Frame: at::native::launch() [0x1fe264] in libtorch_cuda.so\n"
        "========= \n"
        "6 passed, 8 deselected in 9.34s\n"
        "========= ERROR SUMMARY: 1 error\n"
    )


TORCHS = "at void at::native::elementwise_kernel<(int)4, at::native::F>(int, T3)+0x150 in F.cu:7"
OURS = "at void opd::cuda::divergence_kernel<(int)4>(opd::DivergenceArgs, at::Tensor)+0x150"
RACE = "Error: Race reported between Write access "
API = "Host API memory access error at host access to 0x7f of size 400 bytes"


@pytest.mark.parametrize(
    ("log", "state"),
    [
        (reported(TORCHS), "passed"),
        (reported("at 0x150 in void at::native::reduce_kernel<4>(float*)"), "passed"),
        (reported("at void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<(int)4>"), "passed"),
        (reported(f"and Read access {TORCHS}", RACE + TORCHS), "passed"),
        (reported(OURS), "FAILED"),
        (reported("at select_kernel+0x150 in select.py:12"), "FAILED"),
        (reported(TORCHS) + reported(OURS), "FAILED"),
        (reported(TORCHS + "\n=========     Device Frame:" + OURS.removeprefix("at ")), "FAILED"),
        (reported(f"and Read access {TORCHS}", RACE + OURS), "FAILED"),
        (reported("Uninitialized access at 0x7f on access by cudaMemcpy source", API), "FAILED"),
        (reported(TORCHS) + "========= Target application returned an error\n", "FAILED"),
        (reported(TORCHS).replace("6 passed", "1 failed, 5 passed"), "FAILED"),
        (reported(TORCHS).replace("6 passed", "5 passed, 1 error"), "FAILED"),
        ("6 passed in 9.34s\n========= ERROR SUMMARY: 0 errors\n", "FAILED"),
    ],
)
def test_a_sanitizer_fails_for_all_but_torchs_own_kernels(log: str, state: str) -> None:
    program = f"print({log!r}); raise SystemExit({run_gpu.SANITIZER_EXIT})"
    (result,) = run(step("initcheck cuda", program)).values()
    assert result.state == state


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
    serving = ["cuda", "triton", "reference"]
    steps = [*run_gpu.tests("cuda", serving, 2.0), run_gpu.profile("cuda", serving)]
    names = [step.name for step in steps]
    assert len(set(names)) == len({step.log for step in steps}) == len(names)
    for part in ("cpu suite", "suite on cuda", "gpu tests", "profile"):
        assert any(part in name for name in names)
    fuzzed = [name.split()[1].strip(",") for name in names if name.startswith("fuzz")]
    assert {name: fuzzed.count(name) for name in serving} == {
        "cuda": 2,
        "triton": 4,
        "reference": 1,
    }
    tools = ("memcheck", "racecheck", "synccheck", "initcheck")
    sanitizers = {f"{tool} {name}" for name in ("cuda", "triton") for tool in tools}
    assert {name for name in names if name.split()[0] in tools} == sanitizers
    assert all(step.skip in ("", "compute-sanitizer is not installed") for step in steps)
    dry = [*run_gpu.tests("cpu", ["triton"], 2.0), run_gpu.profile("cpu", ["triton"])]
    skipped = {step.name for step in dry if step.skip}
    gpu_tests = {"gpu tests: gpu", "gpu tests: gpu_linear"}
    assert skipped == {"profile", *gpu_tests, *(f"{tool} triton" for tool in tools)}


def test_the_kernels_themselves_are_tested_and_none_is_left_out() -> None:
    environments = {
        step.name: step.environment for step in run_gpu.tests("cuda", ["cuda", "triton"], 2.0)
    }
    assert environments["gpu tests: gpu"]["OPD_KERNELS_GPU_BACKENDS"] == "cuda,triton"
    for name in ("gpu tests: gpu", "gpu tests: gpu_linear", "memcheck cuda", "racecheck triton"):
        assert environments[name].items() >= run_gpu.NO_EMULATION.items()
    program = (
        "import sys; sys.path.insert(0, 'tests'); import conftest\n"
        "from opd_kernels.backends import cuda; print(cuda.DEVICE)"
    )
    (result,) = run(step("tests", program, environment=run_gpu.NO_EMULATION, counts=False)).values()
    assert result.step.log.read_text() == "cuda\n"


def test_a_sanitizers_tests_are_those_of_its_backend(tmp_path: Path) -> None:
    tests = tmp_path / "test_it.py"
    tests.write_text(
        "import pytest\n\n\n@pytest.mark.parametrize('kernels', ['cuda', 'triton'])\n"
        "@pytest.mark.parametrize('name', ['sanitized'])\n"
        "def test_it(name, kernels): pass\n\n\ndef test_other(): pass\n"
    )
    step = run_gpu.sanitizer("memcheck", "cuda", "cuda")
    selected = step.command[step.command.index("-k") :]
    alone = f"--rootdir={tmp_path}", f"--confcutdir={tmp_path}", "-c", os.devnull, "-q"
    (result,) = run(run_gpu.pytest("cuda", str(tests), *alone, *selected)).values()
    assert result.summary == "1 passed, 2 deselected"


def test_every_file_of_the_suite_runs_once_and_those_for_a_gpu_apart() -> None:
    files = {f"tests/{path.name}" for path in Path(__file__).parent.glob("test_*.py")}
    steps = run_gpu.suite("suite", run_gpu.SUITE_PARTS, {})
    named = [argument for step in steps[:-1] for argument in step.command if argument in files]
    ignored = [argument.removeprefix("--ignore=") for argument in steps[-1].command]
    assert len(named) == len(set(named))
    assert files & set(ignored) == {*named, *run_gpu.GPU_TESTS}
    for step in run_gpu.gpu_tests("cuda", ["triton"]):
        assert len(files & set(step.command)) == 1
    for name in ("cuda", "triton"):
        assert {*run_gpu.GPU_TESTS} <= {*run_gpu.sanitizer("initcheck", name, "cuda").command}


@pytest.mark.parametrize(
    ("capability", "architecture"), [((9, 0), "90a"), ((10, 0), "100"), ((8, 6), "86")]
)
def test_the_build_compiles_for_the_gpu_that_is_there(
    capability: tuple[int, int], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert run_gpu.build("cuda").environment == {
        "OPD_KERNELS_REQUIRE_NATIVE": "1",
        "OPD_KERNELS_BUILD_CUDA": "1",
        "OPD_KERNELS_CUDA_ARCHS": architecture,
    }
    assert run_gpu.build("cpu").environment == {"OPD_KERNELS_REQUIRE_NATIVE": "1"}


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
    assert capsys.readouterr().out.endswith("0 passed, 0 failed, 4 skipped (needs a GPU)\n")
    assert run_gpu.main(["--device", "cpu", "--only", "no such step"]) == 2


def test_nothing_runs_after_a_failed_build(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = step("build", "raise SystemExit('no compiler')", counts=False)
    monkeypatch.setattr(run_gpu, "build", lambda device: broken)
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
def test_without_the_cuda_kernels_a_run_on_a_gpu_fails() -> None:
    # The Triton kernels serve any device called cuda; the CUDA ones need it to be there.
    (result,) = run(run_gpu.serving("cuda")).values()
    log = result.step.log.read_text().splitlines()
    assert result.state == "FAILED"
    assert '"triton"' in log[0]
    assert log[1].startswith("cuda does not serve cuda: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_gpu.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out
