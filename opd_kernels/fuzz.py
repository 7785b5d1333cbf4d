"""``python -m opd_kernels.fuzz``: random cases against float64 on your own machine and build.

Draws cases from the same generators as the test suite, checks ids, values, losses and gradients
against the oracle of ``opd_kernels.testing``, shrinks a failure to a small case and writes a
snippet that reproduces it. Exit status: 0 nothing found, 1 a failure, 2 wrong arguments, no such
backend or no hypothesis.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opd_kernels import backends, testing
from opd_kernels.testing import Case, inputs
from opd_kernels.testing.cases import DTYPES, draw_case, snippet

try:
    import hypothesis
    from hypothesis import strategies as st
except ImportError as error:
    _MISSING = f"the fuzzer needs hypothesis ({error}): pip install 'hypothesis>=6.100'"
    if __name__ == "__main__":
        print(_MISSING, file=sys.stderr)
        sys.exit(2)
    raise ImportError(_MISSING) from error

_BATCH = 200
# How long a failing case is shrunk; where each attempt compiles, hypothesis would take minutes.
_SHRINKING_SECONDS = 60.0
# Backends that compile a kernel, in seconds, for each combination of these.
_COMPILING = ("triton",)
_COMPILED_FOR: dict[str, tuple[tuple[Any, ...], ...]] = {
    "vocab": ((1, 128), (129, 512), (513, 1024), (1025, 2048), (2049, 5000)),
    "k": ((1, 16), (17, 32), (33, 64), (65, 128), (129, 256), (257, 512), (513, 1024)),
    "student_dtype": tuple((name,) for name in DTYPES),
    "teacher_dtype": tuple((name,) for name in DTYPES),
    "form": (("logits",), ("linear",)),
    "hidden": tuple((size,) for size in inputs.HIDDEN_SIZES),
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


class _Drawing:
    """Hypothesis as a source of random numbers."""

    def __init__(self, draw: Any) -> None:
        self._draw = draw

    def choice(self, choices: Sequence[Any]) -> Any:
        return self._draw(st.sampled_from(choices))

    def randint(self, least: int, most: int) -> int:
        return int(self._draw(st.integers(least, most)))


@st.composite
def cases(
    draw: Any,
    float64: bool = True,
    max_vocab: int = 5000,
    only: Mapping[str, tuple[Any, ...]] | None = None,
) -> Case:
    """Hypothesis strategy over ``Case``; see ``draw_case``."""
    return draw_case(_Drawing(draw), float64, max_vocab, only)


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
        only = family(f"{self.seed} {number}") if self.backend in _COMPILING else {}
        if not hasattr(backends.load(self.backend), "gather_dot"):
            only["form"] = ("logits",)

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
    names = ", ".join(backends.MODULES)
    parser.add_argument("--backend", default="cpu", help=f"{names} (default: cpu)")
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
