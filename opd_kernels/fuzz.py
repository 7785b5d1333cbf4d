"""``python -m opd_kernels.fuzz``: random cases against float64 on your own machine and build.

Draws cases from the same generators as the test suite, checks ids, values, losses and gradients
against the oracle of ``opd_kernels.testing``, shrinks a failure to a small case and writes a
snippet that reproduces it. Exit status: 0 nothing found, 1 a failure, 2 wrong arguments or no such
backend.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from opd_kernels import backends, testing
from opd_kernels.testing import Case, inputs

try:
    import hypothesis
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("the fuzzer needs hypothesis: pip install 'opd_kernels[fuzz]'") from error

_BATCH = 200
# How long a failing case is shrunk; where each attempt compiles, hypothesis would take minutes.
_SHRINKING_SECONDS = 60.0
_DTYPES = ("float32", "bfloat16", "float16")
_WIDE_DTYPES = (*_DTYPES, "float64")
# Where vectorised loops change gear: register widths, groups, blocks of groups.
_EDGES = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257, 1024, 2047, 2048, 2049, 4096)
# Backends that compile a kernel, in seconds, for each combination of these.
_COMPILING = ("triton",)
_COMPILED_FOR: dict[str, tuple[tuple[Any, ...], ...]] = {
    "vocab": ((1, 128), (129, 512), (513, 1024), (1025, 2048), (2049, 5000)),
    "k": ((1, 16), (17, 32), (33, 64), (65, 128), (129, 256), (257, 512), (513, 1024)),
    "student_dtype": tuple((name,) for name in _DTYPES),
    "teacher_dtype": tuple((name,) for name in _DTYPES),
    "student_layout": tuple((name,) for name in inputs.LAYOUTS),
    "teacher_layout": tuple((name,) for name in inputs.LAYOUTS),
    "teacher": (inputs.TEACHERS[:1], inputs.TEACHERS[1:]),
    "mask": (inputs.MASKS[:1], inputs.MASKS[1:]),
    "banned": (inputs.BANS[:1], inputs.BANS[1:]),
    "temperature": (("one", "float"), ("scalar", "rows")),
    "teacher_temperature": (("one", "float"), ("scalar", "rows")),
}


def family(seed: str) -> dict[str, tuple[Any, ...]]:
    """A part of each choice, so that the cases drawn from it share a handful of kernels."""
    choose = random.Random(seed).choice
    return {name: choose(parts) for name, parts in _COMPILED_FOR.items()}


@st.composite
def cases(
    draw: Any,
    float64: bool = True,
    max_vocab: int = 5000,
    only: Mapping[str, tuple[Any, ...]] | None = None,
) -> Case:
    """Hypothesis strategy over ``Case``; shrinks towards the default case.

    ``only`` names what to draw from instead of all there is; for "vocab" and "k" a range.
    """
    only = only or {}

    def one_of(name: str, *choices: Any) -> Any:
        return draw(st.sampled_from(only.get(name, choices)))

    dtypes = _WIDE_DTYPES if float64 else _DTYPES
    least, most = only.get("vocab", (1, max_vocab))
    edges = [edge for edge in _EDGES if least <= edge <= most] or [least]
    small = st.integers(least, min(least + 199, most))
    vocab = draw(st.one_of(small, st.sampled_from(edges), st.integers(least, most)))
    teacher_vocab = max(1, vocab + draw(st.sampled_from((0, 0, 0, 1, -1, 40))))
    k_least, k_most = only.get("k", (1, 1024))
    k_small = st.integers(k_least, min(k_least + 39, k_most))
    k = draw(st.one_of(k_small, st.integers(k_least, k_most), st.just(teacher_vocab)))
    teacher = one_of("teacher", *inputs.TEACHERS)
    k = min(k, k_most, teacher_vocab if teacher == "logits" else k_most)
    reduction = draw(st.sampled_from(("mean", "sum", "none")))
    normalizer = draw(st.sampled_from(inputs.NORMALIZERS)) if reduction == "mean" else "none"
    sizes = st.sampled_from(((3,), (1,), (), (0,), (5,), (2, 3), (3, 1), (2, 2, 2)))
    return Case(
        rows=draw(sizes),
        student_vocab=vocab,
        teacher_vocab=teacher_vocab,
        k=k,
        student_dtype=one_of("student_dtype", *dtypes),
        teacher_dtype=one_of("teacher_dtype", *dtypes),
        student_content=one_of("student_content", *inputs.CONTENTS),
        teacher_content=one_of("teacher_content", *inputs.CONTENTS),
        student_layout=one_of("student_layout", *inputs.LAYOUTS),
        teacher_layout=one_of("teacher_layout", *inputs.LAYOUTS),
        teacher=teacher,
        mask=one_of("mask", *inputs.MASKS),
        temperature=one_of("temperature", *inputs.TEMPERATURES),
        teacher_temperature=one_of("teacher_temperature", None, *inputs.TEMPERATURES),
        weight=one_of("weight", *inputs.WEIGHTS),
        banned=one_of("banned", *inputs.BANS),
        vocab_size=draw(st.one_of(st.none(), st.integers(least, vocab + 10))),
        reduction=reduction,
        normalizer=normalizer,
        upstream=draw(st.sampled_from(inputs.UPSTREAMS)) if reduction == "none" else "one",
        inplace=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def snippet(case: Case, backend: str, device: str, error: BaseException) -> str:
    """A program that repeats a failing case."""
    reason = "\n".join(f"# {line}" for line in str(error).splitlines()[:6])
    return (
        f"# torch {torch.__version__}, opd_kernels backend {backend!r} on {device!r}\n{reason}\n"
        "from opd_kernels.testing import Case, check\n\n"
        f"check(\n    {case!r},\n    backend={backend!r},\n    device={device!r},\n)\n"
    )


class Fuzzer:
    """Runs batches of cases and keeps count; ``failure`` is (case, error) of the smallest found."""

    def __init__(self, backend: str, device: str, seed: int, end: float = math.inf) -> None:
        """Nothing runs yet; nothing will that begins after ``end`` on the monotonic clock."""
        self.backend, self.device, self.seed = backend, device, seed
        self.cases = self.rows = 0
        self.failure: tuple[Case, Exception] | None = None
        self._end = end
        self._failing: dict[Case, Exception] = {}

    def run_batch(self, number: int, size: int = _BATCH) -> bool:
        """Checks one batch; False if it found something."""
        only = family(f"{self.seed} {number}") if self.backend in _COMPILING else None

        @hypothesis.seed(self.seed * 1_000_003 + number)
        @hypothesis.settings(
            max_examples=size,
            database=None,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            print_blob=False,
            verbosity=hypothesis.Verbosity.quiet,
        )
        @hypothesis.given(cases(float64=self.backend == "reference", only=only))
        def batch(case: Case) -> None:
            error = self._error_of(case)
            if error is not None:
                self.failure = (case, error)  # hypothesis ends on the smallest it finds
                raise AssertionError from error

        try:
            batch()
        except Exception:
            if self.failure is None:  # not a finding: the fuzzer itself is broken
                raise
            return False
        return True

    def _error_of(self, case: Case) -> Exception | None:
        """What is wrong with a case; when time is up, no other than those that are known fail."""
        if case in self._failing or time.monotonic() > self._end:
            return self._failing.get(case)
        self.cases += 1
        self.rows += math.prod(case.rows)
        try:
            testing.check(case, self.backend, self.device)
        except Exception as error:
            if not self._failing:
                # After an error of CUDA's every call of the process fails: nothing to shrink.
                sticky = "CUDA" in str(error)
                self._end = time.monotonic() + (0.0 if sticky else _SHRINKING_SECONDS)
            self._failing[case] = error
            return error
        return None


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m opd_kernels.fuzz", description=__doc__)
    parser.add_argument("--backend", default="cpu", help="cpu, triton or reference (default: cpu)")
    parser.add_argument("--device", default="cpu", help="where the tensors are (default: cpu)")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default: 1)")
    parser.add_argument(
        "--seed", type=int, default=0, help="start of the random cases (default: 0)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(), help="folder for a failure's snippet"
    )
    options = parser.parse_args(arguments)
    if not (options.minutes > 0 and math.isfinite(options.minutes)):
        parser.error(f"--minutes is {options.minutes}, allowed are finite numbers above 0")
    try:
        backends.resolve(options.backend, torch.device(options.device), (torch.float32,), 1)
        torch.empty(1, device=options.device)
    except (ValueError, RuntimeError, AssertionError) as error:
        print(error, file=sys.stderr)
        return 2

    import warnings

    warnings.filterwarnings("ignore", message="k=1")
    end, number, sound = time.monotonic() + 60 * options.minutes, 0, True
    fuzzer = Fuzzer(options.backend, options.device, options.seed, end)
    while sound and time.monotonic() < end:
        sound = fuzzer.run_batch(number)
        number += 1
    print(
        f"{fuzzer.cases} cases, {fuzzer.rows} rows, backend {options.backend}, seed {options.seed}"
    )
    if fuzzer.failure is None:
        print("no failure")
        return 0
    case, failure = fuzzer.failure
    path = options.output / f"fuzz_failure_{options.backend}_{options.seed}.py"
    path.write_text(snippet(case, options.backend, options.device, failure))
    print(f"FAILURE: {failure}\nreproduce with: python {path}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
