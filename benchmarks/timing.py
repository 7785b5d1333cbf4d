"""Times, memory and launches of calls on a device."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
# Elements of float32 that are more than a CPU's caches.
CPU_CACHES = 1 << 24
Name = tuple[str, str]  # backend and measure
Run = Callable[[], Callable[[], object]]  # prepares, and returns what is timed
Runs = dict[Name, Run]
Times = dict[Name, list[float]]


@functools.cache
def _other(device: torch.device) -> torch.Tensor:
    """256 MB, more than caches hold; read and not written, which would leave lines to write."""
    return torch.zeros(2**26, device=device)


def cold(device: torch.device) -> None:
    """Fills a CPU's caches with something else; ``Clock`` does it itself on other devices."""
    if device.type == "cpu":
        _other(device)[:CPU_CACHES].sum()


class Clock:
    """Times runs on a device, in turn."""

    def __init__(self, device: torch.device, warmups: int, rounds: int) -> None:  # noqa: D107
        self.device, self.warmups, self.rounds = device, warmups, rounds
        self.other = _other(device) if device.type == "cuda" else None

    def once(self, run: Run) -> float:
        """Milliseconds on the device, of one call with cold caches."""
        timed = run()
        if self.other is None:
            begin = time.perf_counter()
            timed()
            return (time.perf_counter() - begin) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(8):  # most of a millisecond, in which the launches below get queued
            self.other.sum()
        start.record()
        timed()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def measure(self, runs: Runs) -> tuple[Times, dict[Name, str]]:
        """(times of each run that works, why the others do not)."""
        failed: dict[Name, str] = {}
        for name, run in runs.items():
            _, reason = self.attempt(lambda run=run: [self.once(run) for _ in range(self.warmups)])
            if reason is not None:
                failed[name] = reason
        times: Times = {name: [] for name in runs if name not in failed}
        for _ in range(self.rounds):
            for name, values in times.items():
                values.append(self.once(runs[name]))
        return times, failed

    def host(self, run: Run, calls: int) -> list[float]:
        """Milliseconds on the host, of calls that find the device's queue empty."""
        times = []
        for _ in range(calls):
            timed = run()
            self.synchronize()
            begin = time.perf_counter()
            result = timed()
            times.append((time.perf_counter() - begin) * 1e3)
            del result
        return times

    def attempt(self, call: Callable[[], T]) -> tuple[T | None, str | None]:
        """(what it returned, None) or (None, why it failed); raises where the device is lost."""
        try:
            return call(), None
        except Exception as error:  # whatever it is, other measurements go on
            reason = f"{type(error).__name__}: {error}"[:400]
        print(f"        {reason}", flush=True)
        self.synchronize()
        self.release_memory()
        return None, reason

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def release_memory(self) -> None:
        """Gives back what nothing holds, so that another shape finds it in one piece."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def peak_memory(self, run: Run) -> int | None:
        """Bytes that a call allocates at its peak."""
        if self.device.type != "cuda":
            return None
        timed = run()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        timed()
        return torch.cuda.max_memory_allocated(self.device) - before

    def launches(self, run: Run) -> list[str] | None:
        """Kernels, copies and memsets of a call by name, in the second of two profiles."""
        for _ in range(2):
            timed = run()
            self.synchronize()
            with torch.profiler.profile() as profiler:
                timed()
                self.synchronize()
        names = [
            event.name
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
        ]
        return names or None


def spread(times: list[float]) -> dict[str, Any]:
    """Median, 10 % and 90 % quantiles, in milliseconds."""
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return {"ms": statistics.median(times), "p10": deciles[0], "p90": deciles[-1]}
