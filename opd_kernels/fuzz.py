"""``python -m opd_kernels.fuzz``: checks random cases against float64 on your machine and build.

Draws cases from the generators of the test suite. Checks ids, values, losses and gradients against
the oracle of ``opd_kernels.testing``. Shrinks a failing case to a small one and writes a program
that reproduces it. Exit status: 0 no failure, 1 a failure, 2 wrong arguments, no such backend or
no hypothesis.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opd_kernels import backends, testing
from opd_kernels.divergences import OUTSIDE
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
# The time limit for shrinking a failing case. Where each attempt compiles a kernel, hypothesis
# would take minutes.
_SHRINKING_SECONDS = 60.0
# Backends that compile a kernel, which takes seconds, for each combination of the parts below.
_COMPILING = ("triton",)
_COMPILED_FOR: dict[str, tuple[tuple[Any, ...], ...]] = {
    "vocab": ((1, 128), (129, 512), (513, 1024), (1025, 2048), (2049, 5000)),
    "k": ((1, 16), (17, 32), (33, 64), (65, 128), (129, 256), (257, 512), (513, 1024)),
    "student_dtype": tuple((name,) for name in DTYPES),
    "teacher_dtype": tuple((name,) for name in DTYPES),
    "form": (("logits",), ("linear",)),
    "family": ((False,), (True,)),
    "outside": tuple((name,) for name in OUTSIDE),
    "watched": ((False,), (True,)),
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
    """One part of each choice at random; all cases drawn from these parts share a few kernels."""
    choose = random.Random(seed).choice
    return {name: choose(parts) for name, parts in _COMPILED_FOR.items()}


class _Drawing:
    """Gives ``draw_case`` choices that hypothesis draws and can shrink."""

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
    """Checks batches of cases and counts them; ``failure`` is the smallest (case, error)."""

    def __init__(self, backend: str, device: str, seed: int, end: float = math.inf) -> None:
        """Takes the settings. No case starts after ``end``, a time of ``time.monotonic``."""
        self.backend, self.device, self.seed = backend, device, seed
        self.cases = self.rows = 0
        self.failure: tuple[Case, Exception] | None = None
        self._end = end
        self._failing: dict[Case, Exception] = {}

    def run_batch(self, number: int, size: int = _BATCH) -> bool:
        """Checks one batch; returns False if a case failed."""
        only: dict[str, tuple[Any, ...]] = {"watched": (False, False, True)}
        if self.backend in _COMPILING:
            only = family(f"{self.seed} {number}")
        if not backends.takes_hidden_states(self.backend):
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
                self.failure = (case, error)  # the last one is the smallest
                raise AssertionError from error

        try:
            batch()
        except Exception:
            if self.failure is None:  # no case failed: the fuzzer itself is broken
                raise
            return False
        return True

    def _error_of(self, case: Case) -> Exception | None:
        """The error of a case, or None. After the time limit, only errors already found count."""
        if case in self._failing or time.monotonic() > self._end:
            return self._failing.get(case)
        self.cases += 1
        self.rows += math.prod(case.rows)
        try:
            testing.check(case, self.backend, self.device)
        except Exception as error:
            if not self._failing:
                # After a CUDA error every call of the process fails, so shrinking is impossible.
                limit = 0.0 if "CUDA" in str(error) else _SHRINKING_SECONDS
                self._end = time.monotonic() + limit
            self._failing[case] = error
            return error
        return None


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m opd_kernels.fuzz", description=__doc__)
    names = ", ".join(backends.MODULES)
    parser.add_argument("--backend", default="cpu", help=f"{names} (default: cpu)")
    parser.add_argument("--device", default="cpu", help="device of the tensors (default: cpu)")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random cases (default: 0)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(),
        help="folder for the program that reproduces a failure (default: the current one)",
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

    warnings.filterwarnings("ignore", message="k=1")
    warnings.filterwarnings("ignore", message='reverse KL with outside="truncate"')
    end, number, passed = time.monotonic() + 60 * options.minutes, 0, True
    fuzzer = Fuzzer(options.backend, options.device, options.seed, end)
    while passed and time.monotonic() < end:
        passed = fuzzer.run_batch(number)
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
