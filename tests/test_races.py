"""No two threads of the CUDA kernels touch the same memory without a barrier between.

ThreadSanitizer watches the emulation: a thread of a block is a thread to it, and barriers alone
order what they do (emulation.cpp). Unlike a schedule that goes wrong it needs no luck.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import emulated
import pytest
import torch
from emulation.build import build
from test_cuda import BARRIERS, SOURCES, scenarios

from opd_kernels.backends import cuda


def library() -> str:
    """ThreadSanitizer's, of the compiler that builds the emulation; "" if it has none."""
    command = [os.environ.get("CXX", "c++"), "-print-file-name=libtsan.so"]
    try:
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return path if os.path.isabs(path) else ""


pytestmark = pytest.mark.skipif(
    not emulated.POSSIBLE or shutil.which("setarch") is None or not library(),
    reason="no emulation, no ThreadSanitizer or no setarch",
)


def watched(without: str = "") -> subprocess.CompletedProcess[str]:
    """All scenarios under ThreadSanitizer up to the first race; a barrier does nothing."""
    build("races")
    environment = os.environ | {
        "OPD_KERNELS_EMULATED": "races",
        "OPD_EMULATION_WITHOUT": without,
        "OMP_NUM_THREADS": "1",  # torch's own threads are not seen
        "LD_PRELOAD": library(),
        "TSAN_OPTIONS": "halt_on_error=1 history_size=0 report_signal_unsafe=0",
    }
    # It wants memory where it expects it.
    command = ["setarch", "--addr-no-randomize", sys.executable, __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    for reason in ("unexpected memory mapping", "failed to set personality"):
        if reason in run.stderr:
            pytest.skip(f"ThreadSanitizer cannot run here: {reason}")
    return run


def test_no_two_threads_touch_the_same_memory_without_a_barrier_between() -> None:
    run = watched()
    assert "data race" not in run.stderr, run.stderr[:4000]
    assert run.returncode == 0, run.stderr[-4000:]


# Before the first barrier of a cluster blocks have nothing in common but that they run.
STARTS = "block is there"
LINES = {path.name: path.read_text().splitlines() for path in SOURCES.glob("*.cuh")}
RACING = [
    barrier
    for barrier in BARRIERS
    if STARTS not in LINES[barrier.split(":")[0]][int(barrier.split(":")[1]) - 1]
]


@pytest.mark.parametrize("barrier", RACING)
def test_without_any_one_barrier_there_is_a_race(barrier: str) -> None:
    assert "data race" in watched(barrier).stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    emulated.install()
    for _ in scenarios(cuda):
        pass
