"""The CUDA kernels have no data race: barriers order what their threads do to shared memory.

ThreadSanitizer watches the emulated kernels. It takes each thread of a block for a thread that only
barriers order (emulation.cpp). So it reports a race even if the schedule of this run hides it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import emulated
import pytest
import torch
from emulation.build import build
from test_cuda import BARRIERS, SOURCES, scenarios

from opd_kernels.backends import cuda


def library() -> str:
    """The path of ThreadSanitizer's library, or "" if the emulation's compiler has none."""
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


# The first barrier of a cluster only waits until all its blocks run. Without it there is no race.
STARTS = re.compile(r"\bcluster_(arrive|wait)\(\)")  # the halves of that barrier
LINES = {path.name: path.read_text().splitlines() for path in SOURCES.glob("*.cuh")}
RACING = [
    barrier
    for barrier in BARRIERS
    if not STARTS.search(LINES[barrier.split(":")[0]][int(barrier.split(":")[1]) - 1])
]
assert len(RACING) < len(BARRIERS), "expected the first barrier of a cluster among them"


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """{barrier: (exit status, report)} of the run without this barrier; "" stands for no barrier.

    A run does all scenarios up to the first race. One process loads torch, which takes seconds
    under ThreadSanitizer, and forks a child for each run.
    """
    build("races")
    folder = tmp_path_factory.mktemp("races")
    environment = os.environ | {
        "OPD_KERNELS_EMULATED": "races",
        "OMP_NUM_THREADS": "1",  # ThreadSanitizer cannot follow torch's own threads
        "LD_PRELOAD": library(),
        "TSAN_OPTIONS": "halt_on_error=1 history_size=0 report_signal_unsafe=0",
    }
    # ThreadSanitizer needs the usual addresses.
    command = ["setarch", "--addr-no-randomize", sys.executable, __file__, str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    for reason in ("unexpected memory mapping", "failed to set personality"):
        if reason in run.stderr:
            pytest.skip(f"ThreadSanitizer cannot run here: {reason}")
    assert run.returncode == 0, run.stderr[-4000:]
    statuses = dict(zip(["", *RACING], map(int, run.stdout.split()), strict=True))
    return {
        name: (status, (folder / name_of(name)).read_text()) for name, status in statuses.items()
    }


def name_of(barrier: str) -> str:
    """The name of the file with the report of the run without this barrier."""
    return barrier.replace(":", "-") or "all"


def test_no_two_threads_touch_the_same_memory_without_a_barrier_between(
    watched: dict[str, tuple[int, str]],
) -> None:
    status, report = watched[""]
    assert "data race" not in report, report[:4000]
    assert status == 0, report[-4000:]


@pytest.mark.parametrize("barrier", RACING)
def test_without_any_one_barrier_there_is_a_race(
    barrier: str, watched: dict[str, tuple[int, str]]
) -> None:
    assert "data race" in watched[barrier][1]


def run_without(barrier: str, report: Path) -> int:
    """Runs all scenarios in a child without this barrier; returns its exit status."""
    child = os.fork()
    if child == 0:
        os.environ["OPD_EMULATION_WITHOUT"] = barrier
        os.dup2(os.open(report, os.O_WRONLY | os.O_CREAT), 2)
        status = 1
        try:
            for _ in scenarios(cuda.backend):
                pass
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    emulated.install()
    for barrier in ["", *RACING]:
        print(run_without(barrier, Path(sys.argv[1]) / name_of(barrier)), flush=True)
