"""``python -m opd_kernels.fuzz``: random cases against float64 on your own machine and build.

Draws cases from the same generators as the test suite, checks ids, values, losses and gradients
against the oracle of ``opd_kernels.testing``, shrinks a failure to a small case and writes a
snippet that reproduces it. Exit status: 0 nothing found, 1 a failure, 2 wrong arguments or no such
backend.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
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
_DTYPES = ("float32", "bfloat16", "float16")
_WIDE_DTYPES = (*_DTYPES, "float64")
# Where vectorised loops change gear: register widths, groups, blocks of groups.
_EDGES = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257, 1024, 2047, 2048, 2049, 4096)


@st.composite
def cases(draw: Any, float64: bool = True, max_vocab: int = 5000) -> Case:
    """Hypothesis strategy over ``Case``; shrinks towards the default case."""
    dtypes = st.sampled_from(_WIDE_DTYPES if float64 else _DTYPES)
    edges = [edge for edge in _EDGES if edge <= max_vocab]
    vocab = draw(st.one_of(st.integers(1, 200), st.sampled_from(edges), st.integers(1, max_vocab)))
    teacher_vocab = max(1, vocab + draw(st.sampled_from((0, 0, 0, 1, -1, 40))))
    k = draw(st.one_of(st.integers(1, 40), st.integers(1, 1024), st.just(teacher_vocab)))
    teacher = draw(st.sampled_from(inputs.TEACHERS))
    k = min(k, 1024, teacher_vocab if teacher == "logits" else 1024)
    reduction = draw(st.sampled_from(("mean", "sum", "none")))
    normalizer = draw(st.sampled_from(inputs.NORMALIZERS)) if reduction == "mean" else "none"
    sizes = st.sampled_from(((3,), (1,), (), (0,), (5,), (2, 3), (3, 1), (2, 2, 2)))
    return Case(
        rows=draw(sizes),
        student_vocab=vocab,
        teacher_vocab=teacher_vocab,
        k=k,
        student_dtype=draw(dtypes),
        teacher_dtype=draw(dtypes),
        student_content=draw(st.sampled_from(inputs.CONTENTS)),
        teacher_content=draw(st.sampled_from(inputs.CONTENTS)),
        student_layout=draw(st.sampled_from(inputs.LAYOUTS)),
        teacher_layout=draw(st.sampled_from(inputs.LAYOUTS)),
        teacher=teacher,
        mask=draw(st.sampled_from(inputs.MASKS)),
        temperature=draw(st.sampled_from(inputs.TEMPERATURES)),
        teacher_temperature=draw(st.sampled_from((None, *inputs.TEMPERATURES))),
        weight=draw(st.sampled_from(inputs.WEIGHTS)),
        banned=draw(st.sampled_from(inputs.BANS)),
        vocab_size=draw(st.one_of(st.none(), st.integers(1, vocab + 10))),
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

    def __init__(self, backend: str, device: str, seed: int) -> None:
        """Nothing runs yet."""
        self.backend, self.device, self.seed = backend, device, seed
        self.cases = self.rows = 0
        self.failure: tuple[Case, BaseException] | None = None

    def run_batch(self, number: int, size: int = _BATCH) -> bool:
        """Checks one batch; False if it found something."""

        @hypothesis.seed(self.seed * 1_000_003 + number)
        @hypothesis.settings(
            max_examples=size,
            database=None,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            print_blob=False,
            verbosity=hypothesis.Verbosity.quiet,
        )
        @hypothesis.given(cases(float64=self.backend == "reference"))
        def batch(case: Case) -> None:
            self.cases += 1
            self.rows += math.prod(case.rows)
            try:
                testing.check(case, self.backend, self.device)
            except Exception as error:
                self.failure = (case, error)  # hypothesis ends on the smallest it finds
                raise

        try:
            batch()
        except Exception:
            if self.failure is None:  # not a finding: the fuzzer itself is broken
                raise
            return False
        return True


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m opd_kernels.fuzz", description=__doc__)
    parser.add_argument("--backend", default="cpu", help="cpu or reference (default: cpu)")
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
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2

    import warnings

    warnings.filterwarnings("ignore", message="k=1")
    fuzzer = Fuzzer(options.backend, options.device, options.seed)
    end, number, sound = time.monotonic() + 60 * options.minutes, 0, True
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
