"""Times a trainer's own loss beside its adapter and beside the bare call, on the CPU.

    build/peers/verl/bin/python benchmarks/trainers verl [--quick] [--rounds 9]

256 rows of 151936 logits in bfloat16 and a support of 64, forward and backward. Each module
``calls_<trainer>`` has one function, ``calls(shape)``: the three calls by name, on the same inputs;
``make test-peers`` makes the environments. Adapter and bare call are timed in turn, round by round,
with cold caches, and their ratio is the median of the rounds' ratios. The trainer's own comes after
them, and its ratio is that of medians: whoever is timed after it pays for the gigabytes that it
frees. ``--quick`` runs the path on tiny shapes; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import platform
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
    """Shape and dtype of the logits, and the support's size."""

    rows: int = 256
    vocab: int = 151936
    k: int = 64
    dtype: torch.dtype = torch.bfloat16


def seconds(call: Callable[[], object]) -> float:
    """Seconds of one call with cold caches; its result is freed outside."""
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
    for turn in ((ADAPTER, BARE), (PEER,)):
        for name in turn:
            calls[name]()
        for _ in range(arguments.rounds):
            for name in turn:
                times[name].append(seconds(calls[name]))
    medians = {name: statistics.median(times[name]) for name in NAMES}
    ratios = [a / b for a, b in zip(times[ADAPTER], times[BARE], strict=True)]
    print(f"{arguments.trainer}, {shape}, torch {torch.__version__}, {platform.machine()}")
    for name in NAMES:
        print(f"  {name:20} {1e3 * medians[name]:9.2f} ms")
    print(f"  {PEER} / {ADAPTER}: {medians[PEER] / medians[ADAPTER]:.2f}")
    print(f"  {ADAPTER} / {BARE}: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
