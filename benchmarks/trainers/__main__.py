"""Times a trainer's own loss beside its adapter and beside the bare call, on the CPU.

    build/peers/verl/bin/python benchmarks/trainers verl [--quick] [--rounds 9]

256 rows of 151936 logits in bfloat16 and a support of 64, forward and backward. Each module
``calls_<trainer>`` has one function, ``calls(shape)``: the three calls by name, on the same inputs;
``make test-peers`` makes the environments. Calls are timed round by round, in random order, with
cold caches; a ratio is the median of the rounds' ratios. ``--quick`` runs the path on tiny shapes;
its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from timing import cold

CPU = torch.device("cpu")
PEER, ADAPTER, BARE = NAMES = ("the trainer's own", "adapter", "bare call")


class Shape(NamedTuple):
    """Of the logits, and of the support."""

    rows: int = 256
    vocab: int = 151936
    k: int = 64
    dtype: torch.dtype = torch.bfloat16


def seconds(call: Callable[[], object]) -> float:
    """Of one call with cold caches; what it returns is freed outside."""
    cold(CPU)
    begin = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - begin
    del result
    return elapsed


def main() -> None:
    """Prints a line for each ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trainer", help="which calls_<trainer>.py beside this file")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does the path run")
    parser.add_argument("--rounds", type=int, default=9, help="how often each call is timed")
    arguments = parser.parse_args()
    shape = Shape(8, 1000, 4) if arguments.quick else Shape()
    calls = importlib.import_module(f"calls_{arguments.trainer}").calls(shape)
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for name in NAMES:
        calls[name]()
    for _ in range(arguments.rounds):
        for name in random.sample(NAMES, len(NAMES)):  # what runs after the trainer's is slower
            times[name].append(seconds(calls[name]))
    print(f"{arguments.trainer}, {shape}, torch {torch.__version__}, {platform.machine()}")
    for name in NAMES:
        print(f"  {name:20} {1e3 * statistics.median(times[name]):9.2f} ms")
    for over, under in ((PEER, ADAPTER), (ADAPTER, BARE)):
        ratio = statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))
        print(f"  {over} / {under}: {ratio:.2f}")


if __name__ == "__main__":
    main()
