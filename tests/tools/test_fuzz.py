"""The fuzzer as a program: quiet on a sound build, loud and reproducible on a broken one."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_kernels import _linear_autograd, fuzz, linear, reference
from opd_kernels._autograd import Token
from opd_kernels.backends import cpu
from opd_kernels.stats import Side
from opd_kernels.testing import Case, check
from opd_kernels.testing.cases import draw_case


def test_a_sound_backend_passes(capsys: pytest.CaptureFixture[str], backend: str) -> None:
    assert fuzz.main(["--backend", backend, "--minutes", "0.03", "--seed", "3"]) == 0
    report = capsys.readouterr().out
    assert "no failure" in report
    assert "rows" in report


def test_a_broken_backend_is_found_shrunk_and_reproduced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = cpu.backend.select_divergence

    def broken(student: torch.Tensor, *arguments: object) -> tuple[torch.Tensor, ...]:
        loss, ids, entry_grad = sound(student, *arguments)
        return loss, ids, entry_grad * 1.001 if ids.shape[-1] > 5 else entry_grad

    monkeypatch.setattr(cpu.backend, "select_divergence", broken)
    arguments = ["--backend", "cpu", "--minutes", "1", "--seed", "1", "--output", str(tmp_path)]
    assert fuzz.main(arguments) == 1
    assert "FAILURE" in capsys.readouterr().out
    (path,) = tmp_path.glob("fuzz_failure_*.py")
    program = path.read_text()
    k = int(re.search(r"\bk=(\d+)", program).group(1))
    assert 6 <= k <= 12  # about the smallest that shows it, of 1 to 1024
    with pytest.raises(AssertionError, match="outside the budget"):
        exec(compile(program, str(path), "exec"), {})
    monkeypatch.setattr(cpu.backend, "select_divergence", sound)
    exec(compile(program, str(path), "exec"), {})


def test_a_broken_divergence_is_found_and_reproduced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sound = reference.full_divergence

    def broken(*arguments: object) -> tuple[torch.Tensor, ...]:
        loss, ids, entry_grad, factors, logsumexp = sound(*arguments)
        return loss, ids, entry_grad, factors * 1.001, logsumexp

    monkeypatch.setattr(reference, "full_divergence", broken)
    arguments = ["--backend", "reference", "--minutes", "1", "--output", str(tmp_path)]
    assert fuzz.main(arguments) == 1
    (path,) = tmp_path.glob("fuzz_failure_*.py")
    program = path.read_text()
    with pytest.raises(AssertionError, match="gradient for student"):
        exec(compile(program, str(path), "exec"), {})
    monkeypatch.setattr(reference, "full_divergence", sound)
    exec(compile(program, str(path), "exec"), {})


Break = Callable[[pytest.MonkeyPatch], None]


def gradients(name: str, factor: float) -> Break:
    """A head's gradients that are too large."""
    sound = getattr(_linear_autograd, name)

    def broken(*arguments: Any) -> tuple[torch.Tensor, ...]:
        return tuple(grad * factor for grad in sound(*arguments))

    return lambda patch: patch.setattr(_linear_autograd, name, broken)


def side(tail: float) -> Break:
    """A tail beside a log-sum-exp that is given."""
    sound = linear._from_logsumexp

    def broken(*arguments: Any) -> Side:
        found = sound(*arguments)
        return found._replace(tail=found.tail + tail)

    return lambda patch: patch.setattr(linear, "_from_logsumexp", broken)


def token(logsumexp: float) -> Break:
    """The log-sum-exp that a head's log-probs are relative to."""
    sound = linear._token

    def broken(*arguments: Any) -> Token:
        found = sound(*arguments)
        return found._replace(logsumexp=found.logsumexp + logsumexp)

    return lambda patch: patch.setattr(linear, "_token", broken)


@pytest.mark.parametrize(
    ("break_it", "only"),
    [
        (gradients("_exact_gradient", 1.001), {"student_dtype": ("float32",)}),
        (gradients("_exact_gradient", 1.03), {"student_dtype": ("bfloat16",)}),
        (gradients("_exact_gradient", 1.01), {"student_dtype": ("float16",)}),
        (gradients("_sampled_gradient", 1.001), {"background": ("sampled",)}),
        (gradients("_exact_gradient", 1.001), {"support": ("student",)}),
        (side(0.01), {"logsumexp": ("float32",)}),
        (token(1e-3), {"watched": (True,)}),
    ],
    ids=("float32", "bfloat16", "float16", "sampled", "student", "log-sum-exp", "log-probs"),
)
def test_a_head_whose_full_softmaxes_are_broken_is_found(
    break_it: Break, only: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = {"outside": ("truncate", "bucket", "generalize")}
    only = {"form": ("linear",), "family": (True,), "token": ("any",), **outside, **only}
    source = random.Random(0)
    # A reduced loss takes another path, and what is masked shows less.
    drawn = (draw_case(source, False, 60, only) for _ in range(80))
    changes = {"reduction": "none", "normalizer": "none", "upstream": "one", "mask": "none"}
    found = [replace(case, **changes) for case in drawn]

    def check_all(count: int) -> None:
        for case in found[:count]:
            check(case, "cpu")

    check_all(10)
    break_it(monkeypatch)
    with pytest.raises(AssertionError, match=r"outside the budget|log-prob"):
        check_all(len(found))


def test_a_fuzzer_that_cannot_draw_cases_does_not_report_success(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_case() -> None:
        raise RuntimeError("no cases")

    monkeypatch.setattr(fuzz, "cases", lambda **_: fuzz.st.builds(no_case))
    with pytest.raises(RuntimeError, match="no cases"):
        fuzz.main(["--backend", "cpu", "--minutes", "0.01"])


def test_time_ends_between_two_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    # A batch of cases that each compile something would take minutes.
    monkeypatch.setattr(fuzz.testing, "check", lambda *_: time.sleep(0.3))
    start = time.monotonic()
    assert fuzz.main(["--backend", "cpu", "--minutes", "0.02"]) == 0
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(("error", "most"), [("wrong", 30), ("CUDA error: illegal access", 1)])
def test_shrinking_ends_in_time_and_at_once_where_every_call_fails(
    monkeypatch: pytest.MonkeyPatch, error: str, most: int
) -> None:
    checked = []

    def broken(case: Case, *_: object) -> None:
        checked.append(case)
        time.sleep(0.1)
        raise RuntimeError(error)

    monkeypatch.setattr(fuzz, "_SHRINKING_SECONDS", 1.0)
    monkeypatch.setattr(fuzz.testing, "check", broken)
    fuzzer = fuzz.Fuzzer("cpu", "cpu", seed=0)
    assert not fuzzer.run_batch(0)
    assert len(checked) <= most
    case, found = fuzzer.failure
    assert case in checked
    assert str(found) == error


@given(st.data(), st.integers(0, 1000))
def test_a_family_is_what_its_cases_have_in_common(data: st.DataObject, seed: int) -> None:
    only = fuzz.family(str(seed))
    case = data.draw(fuzz.cases(float64=False, only=only))
    (least, most), (_, k_most) = only.pop("vocab"), only.pop("k")
    assert least <= case.student_vocab <= most
    assert case.k <= k_most
    sizes, linear = only.pop("hidden"), only.pop("form") == ("linear",)
    assert only.pop("family") == (bool(case.divergence),)
    assert case.hidden in sizes if linear else case.hidden == 0
    outside = only.pop("outside")
    assert case.outside in (outside if case.divergence else ("renormalize",))
    if case.outside != "renormalize" and case.teacher.startswith("topk"):
        del only["teacher_temperature"]  # a number, that of its log-sum-exp
    if case.teacher == "linear":  # in place of logits
        assert linear
        assert "logits" in only.pop("teacher")
    assert all(getattr(case, name) in choices for name, choices in only.items())


def test_families_have_everything_between_them() -> None:
    families = [fuzz.family(str(seed)) for seed in range(300)]
    for name, parts in fuzz._COMPILED_FOR.items():
        assert {family[name] for family in families} == set(parts)


def test_a_backend_that_is_not_there_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--backend", "tpu", "--minutes", "0.01"]) == 2
    assert "'tpu'" in capsys.readouterr().err


def test_command_line_runs() -> None:
    command = [sys.executable, "-m", "opd_kernels.fuzz", "--minutes", "0.01"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "no failure" in run.stdout
    assert subprocess.run([*command, "--minutes", "-1"], capture_output=True).returncode == 2


def test_without_hypothesis_the_command_says_what_to_install() -> None:
    code = "import runpy, sys; sys.modules['hypothesis'] = None; "
    code += "runpy.run_module('opd_kernels.fuzz', run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.endswith("pip install 'hypothesis>=6.100'")
