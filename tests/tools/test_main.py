"""``python -m opd_kernels``: says what is there, and finds a backend that computes wrong."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
import torch

from opd_kernels import __main__ as program
from opd_kernels import backends, select_topk
from opd_kernels.backends import _build, cpu, cuda, triton
from opd_kernels.backends.native import NativeLinear
from opd_kernels.testing import Case

CPU = torch.device("cpu")
# As where what only tests and integrations need is not installed.
WITHOUT_EXTRAS = """
import runpy, sys
for name in ("hypothesis", "transformers", "peft"):
    sys.modules[name] = None
sys.argv[1:] = ["--seconds", "1"]
runpy.run_module("opd_kernels", run_name="__main__")
"""


def test_a_sound_installation_says_what_it_is_and_passes() -> None:
    command = [sys.executable, "-c", WITHOUT_EXTRAS]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"torch {torch.__version__}" in run.stdout
    assert f"uses {cpu.instruction_sets()[0]}" in run.stdout
    assert "backend=None on cpu takes 'cpu'" in run.stdout
    head, _, checks = run.stdout.partition("checks against float64\n")
    for name in backends.MODULES:
        assert f"\n  {name} " in head
    checked = dict.fromkeys(line.split()[0] for line in checks.splitlines())
    assert {"cpu", "reference"} <= set(checked)
    assert checks.count("no failure") == len(checks.splitlines())


def test_a_backend_that_computes_wrong_is_reported_with_a_program_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = cpu.backend.select_divergence

    def broken(student: torch.Tensor, *arguments: object) -> tuple[torch.Tensor, ...]:
        loss, ids, entry_grad = sound(student, *arguments)
        return loss, ids, entry_grad * 1.001

    monkeypatch.setattr(cpu.backend, "select_divergence", broken)
    assert program.main(["--seconds", "1"]) == 1
    report = capsys.readouterr().out
    assert re.search(r"FAILED: cpu on cpu, AssertionError: gradient for \w+ of Case\(", report)
    assert "Please report this" in report
    assert report.count("no failure") >= 1  # the others were checked all the same
    repeats = report.partition("repeats it:\n")[2].partition("Please report")[0]
    with pytest.raises(AssertionError, match="outside the budget"):
        exec(compile(repeats, "report", "exec"), {})
    monkeypatch.setattr(cpu.backend, "select_divergence", sound)
    exec(compile(repeats, "report", "exec"), {})


def test_a_backend_that_is_not_there_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu.backend, "unavailable", lambda: "install a compiler")
    monkeypatch.setattr(cuda.backend, "unavailable", lambda: "install CUDA")
    assert program.main(["--no-check"]) == 0
    report = capsys.readouterr().out
    assert "cpu        not on cpu: install a compiler" in report
    assert "install CUDA" in report
    assert "backend=None on cpu takes 'reference'" in report


def test_what_hidden_states_take_is_said_where_it_is_another_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert program.defaults(CPU) == "backend=None on cpu takes 'cpu'"
    monkeypatch.delattr(NativeLinear, "gather_dot")
    wanted = "backend=None on cpu takes 'cpu', for hidden states 'reference'"
    assert program.defaults(CPU) == wanted
    monkeypatch.setattr(cuda.backend, "refusal", lambda *_: None)
    monkeypatch.setattr(triton, "refusal", lambda *_: None)
    wanted = "backend=None on cuda:0 takes 'cuda', for hidden states 'triton'"
    assert program.defaults(torch.device("cuda", 0)) == wanted


def test_what_the_build_left_out_is_said_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = {"_C": "no C++17 compiler. Install g++.", "_cuda": "no nvcc. Install CUDA."}
    monkeypatch.setattr(_build, "record", lambda: {"missing": missing})
    monkeypatch.setattr(cpu.backend, "module", None)
    monkeypatch.setattr(cuda.backend, "module", None)
    assert program.main(["--no-check"]) == 0
    report = capsys.readouterr().out
    assert (
        "cpu        not on cpu: the CPU kernels were not built: no C++17 compiler. Inst" in report
    )
    assert "cuda       not available: the CUDA kernels were not built: no nvcc. Install C" in report


def test_a_build_without_openmp_is_said_here_and_by_the_first_call(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    cpu._warn_if_single_threaded.cache_clear()
    record = {"compiler": "clang 99", "missing": {"openmp": "no -fopenmp. Install g++."}}
    monkeypatch.setattr(_build, "record", lambda: record)
    assert "CPU kernels built with clang 99, one thread: no -fopenmp. In" in program.cpu_kernels()
    assert ", 1 thread, " in program.describe(CPU)
    logits = torch.zeros(1, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what asks for one thread gets it
        torch.set_num_threads(1)
        select_topk(logits, 2, backend="cpu")
    torch.set_num_threads(2)
    with pytest.warns(UserWarning, match=r"one thread: no -fopenmp. Install g\+\+") as said:
        [select_topk(logits, 2, backend="cpu") for _ in range(2)]
    assert len(said) == 1
    cpu._warn_if_single_threaded.cache_clear()


def test_nothing_is_checked_where_nothing_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program.testing, "check", lambda *_: pytest.fail("checked"))
    assert program.main(["--no-check"]) == 0
    assert "float64" not in capsys.readouterr().out


def test_where_nothing_can_be_checked_that_is_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = SimpleNamespace(refusal=lambda *_: "broken")
    monkeypatch.setattr(program.backends, "load", lambda _: nothing)
    assert program.check_all([CPU], 0.1) == 2
    assert "Nothing could be checked" in capsys.readouterr().out


def test_cases_that_a_backend_refuses_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Case] = []
    monkeypatch.setattr(program.testing, "check", lambda case, *_: checked.append(case))
    monkeypatch.setattr(
        cpu.backend,
        "refusal",
        lambda device, dtypes, k, vocab: "too wide" if k > 40 or vocab > 140_000 else None,
    )
    outcome = program.check("cpu", CPU, 0.2)
    assert outcome.cases == len(checked) > 10
    assert max(case.k for case in checked) <= 40
    assert max(case.teacher_vocab for case in checked) <= 140_000


def test_checks_end_in_time_after_a_least_number_of_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program.testing, "check", lambda *_: time.sleep(0.02))
    assert program.check("cpu", CPU, 0.01).cases == program.LEAST_CASES == 30
    assert program.check("cpu", CPU, 1.0).cases in range(31, 52)
    # Each of Triton's cases may compile kernels for seconds.
    monkeypatch.setattr(triton, "refusal", lambda *_: None)
    assert program.check("triton", CPU, 0.01).cases == program.LEAST_COMPILED_CASES == 6
    monkeypatch.setattr(cpu.backend, "refusal", lambda *_: "always")
    assert program.check("cpu", CPU, 0.1).cases == 0


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_time_must_be_finite_and_positive(seconds: str) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(["--seconds", seconds])
    assert ended.value.code == 2
