"""How a launch is cut, told by the kernels' own header (csrc/cuda/plan.h), compiled by g++."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "plan"


@dataclass(frozen=True)
class Gpu:
    """What of a GPU a plan depends on; clusters are those of 2, 3, ... 8 blocks at once."""

    multiprocessors: int
    shared_kilobytes: int
    clusters: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """How a launch is cut."""

    lane_bits: int
    threads: int
    cluster: int
    shared: int
    support_threads: int
    support_shared: int
    tiles_at_once: int
    chunks_at_once: int


# By architecture: A100, H100, B200, RTX 5090. Clusters as the first has none, and as they would be
# where 16 or 18 multiprocessors lie together.
NO_CLUSTERS = (0,) * 7
H100 = Gpu(132, 228, (66, 42, 32, 24, 18, 16, 16))
GPUS = {
    80: Gpu(108, 164, NO_CLUSTERS),
    90: H100,
    100: Gpu(148, 228, (74, 48, 36, 28, 22, 20, 18)),
    120: Gpu(170, 100, (85, 55, 41, 33, 27, 23, 20)),
}


def plan(rows: int, width: int, k: int, itemsize: int, gpu: Gpu) -> Plan:
    """How a launch is cut on a GPU."""
    includes = f"-I{ROOT / 'csrc' / 'cuda'} -I{ROOT / 'tests' / 'emulation'}"
    lines = [
        "rule compile",
        f"  command = {os.environ.get('CXX', 'c++')} -std=c++17 -DOPD_EMULATION {includes} "
        "-Wno-unknown-pragmas -MMD -MF $out.d $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        f"build plan: compile {ROOT / 'tests' / 'emulation' / 'plan.cpp'}",
        "",
    ]
    import ninja

    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (FOLDER / "build.ninja").write_text("\n".join(lines))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "--quiet"]
        subprocess.run(command, cwd=FOLDER, check=True, stdout=sys.stderr)
    numbers = (rows, width, k, itemsize, gpu.multiprocessors, gpu.shared_kilobytes * 1024)
    words = [str(FOLDER / "plan"), *map(str, (*numbers, *gpu.clusters))]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return Plan(*map(int, said.split()))
