"""A dry run's GPU: the CUDA kernels emulated, the Triton kernels interpreted, CPU tensors."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
TESTS = Path(__file__).resolve().parents[2] / "tests" / "helpers"


def build() -> None:
    """Compiles the emulation, which other processes then find."""
    _tests()
    from emulation.build import build

    print(build(), variants()[0])


def variants() -> tuple[Path, Callable[[int], Any]]:
    """The module of the variants, emulated, and the properties of its GPU."""
    _tests()
    import emulated
    from emulation.build import CSRC, build

    from gpu.variants import MODULE, SOURCE

    folder = build("plain", MODULE, (SOURCE, CSRC / "cuda" / "device.cu"))
    (path,) = folder.glob(f"{MODULE}{SUFFIX}")
    return path, lambda index: (emulated.MULTIPROCESSORS, 228 * 1024, (0,) * 7)


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
