"""What the kernels' own headers say of a launch and of a search, compiled by g++."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FOLDER = ROOT / "build" / "plan"


@dataclass(frozen=True)
class Gpu:
    """What of a GPU a plan depends on; clusters are those of 2, 3, ... 8 blocks at once."""

    multiprocessors: int
    shared_kilobytes: int
    clusters: tuple[int, ...]


class Blocks(NamedTuple):
    """How a launch with a tail is cut; too much shared memory where it is none."""

    lane_bits: int
    threads: int
    cluster: int
    shared: int


@dataclass(frozen=True)
class Plan:
    """How a launch is cut."""

    lane_bits: int
    threads: int
    cluster: int
    shared: int
    with_tail: Blocks
    with_entropy: Blocks
    support_threads: int
    support_shared: int
    tiles_at_once: int
    tiles_at_once_with_tail: int
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
    numbers = (rows, width, k, itemsize, gpu.multiprocessors, gpu.shared_kilobytes * 1024)
    said = _said("plan", *numbers, *gpu.clusters)
    return Plan(*said[:4], Blocks(*said[4:8]), Blocks(*said[8:12]), *said[12:])


def bounds(keys: list[int], threads: int, k: int) -> tuple[int, int]:
    """Between what a block of threads looks for the k-th largest of 16-bit keys."""
    low, high = _said("bounds", threads, k, given=" ".join(map(str, keys)))
    return low, high


def _said(program: str, *numbers: int, given: str = "") -> list[int]:
    """What one of the programs here prints."""
    import ninja

    includes = f"-I{ROOT / 'csrc' / 'cuda'} -I{HERE}"
    command = f"{os.environ.get('CXX', 'c++')} -std=c++17 -O1 -Wno-unknown-pragmas"
    lines = [
        "rule compile",
        f"  command = {command} -DOPD_EMULATION {includes} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {command} $in -o $out",
    ]
    for name in ("plan", "bounds", "emulation"):
        lines.append(f"build {name}.o: compile {HERE / name}.cpp")
    for name in ("plan", "bounds"):
        lines.append(f"build {name}: link {name}.o emulation.o")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (FOLDER / "build.ninja").write_text("\n".join([*lines, ""]))
        ninja_command = [str(Path(ninja.BIN_DIR) / "ninja"), "--quiet", program]
        subprocess.run(ninja_command, cwd=FOLDER, check=True, stdout=sys.stderr)
    words = [str(FOLDER / program), *map(str, numbers)]
    said = subprocess.run(words, input=given, check=True, capture_output=True, text=True).stdout
    return [int(word) for word in said.split()]
