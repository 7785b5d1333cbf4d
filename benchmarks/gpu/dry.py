"""A dry run's GPU: the CUDA kernels emulated, the Triton kernels interpreted, CPU tensors."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"


def build() -> None:
    """Compiles the emulation, which other processes then find."""
    _tests()
    from emulation.build import build

    print(build())


def install() -> None:
    """From now on both GPU backends serve CPU tensors."""
    _tests()
    import emulated
    import interpreter

    emulated.install()
    interpreter.speed_up()


def _tests() -> None:
    if str(TESTS) not in sys.path:
        sys.path.insert(1, str(TESTS))
