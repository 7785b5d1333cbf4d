"""GPU benchmark of ``topk_rkl`` with its yardsticks in the same run.

    python benchmarks/gpu.py [--quick] [--only linear] [--minutes 7] [--output benchmarks/results]
    TRITON_INTERPRET=1 python benchmarks/gpu.py --smoke --device cpu    # its path, on tiny shapes

Yardsticks: a pure read of the teacher's bytes (the fastest of several kernels and ``torch.amax``:
the read ceiling), memset of the gradient's, a device copy. Then every GPU backend; careful and
naive eager, also through ``torch.compile``; unusual rows beside random ones; and sweeps around the
headline shape. What is compared is timed in turn, round by round, by events, with the L2 cache full
of something else and the launches queued ahead; medians. A backend is timed only after its loss and
gradient at that shape agreed with float64 on 64 rows. Beside these: the host's time in a call that
finds the queue empty, what a call launches, and what Nsight Compute counts in it (profile_gpu.py);
and ``linear_topk_rkl`` beside the LM head alone and the losses that need its logits (linear.py).

What a backend should reach is in goals.py; the end of the output says of each goal whether it was
met. The result file is rewritten after each task, and tasks come in order of importance: what
``--minutes`` leaves out is listed there.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import linear
import torch
from calls import (
    Point,
    check_peer,
    forward_backward,
    host_calls,
    other_calls,
    ours,
    random_logits,
    reads,
    triton,
    unusual_rows,
)
from goals import (
    GOALS,
    UNUSUAL_RATIO,
    judge_backends,
    judge_host,
    judge_peer,
    judge_point,
)
from heads import HeadPoint
from linear import LinearBench, LinearPlan, Step
from peers import careful_eager, check, naive_eager
from profile_gpu import profile
from report import Result, kernel_name, report
from timing import Clock, Name, Run, Runs, spread
from torch import Tensor

import opd_kernels
from opd_kernels import backends

# Bytes moved by each measure: (tensors of the logits' size, bytes per entry of the support), a
# gathered entry counting as a sector of 32; and the yardsticks that it is compared with.
MODELS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "read": (1, 0, ()),
    "memset": (1, 0, ()),
    "copy": (2, 0, ()),
    "forward": (1, 40, ("read",)),
    "backward": (1, 8, ("memset",)),
    "forward + backward": (2, 48, ("read", "memset")),
    "in place": (2, 48, ("read", "memset")),
    "select_topk": (1, 8, ("read",)),
    "forward, TopK teacher": (0, 48, ()),
}
PEERS = {"careful eager": careful_eager, "naive eager": naive_eager}


@dataclass(frozen=True)
class Plan:
    """What to measure: the headline shape for each of ``ks``, and around the first one the rest."""

    rows: int
    vocab: int
    ks: tuple[int, ...]
    few_rows: tuple[int, ...]
    sweeps: dict[str, tuple[Any, ...]]
    unusual: slice
    warmups: int
    rounds: int
    host_calls: int
    compiler: str
    linear: LinearPlan


FULL = Plan(
    rows=8192,
    vocab=151936,
    ks=(64, 32, 128),
    few_rows=(64, 128, 256, 512),
    sweeps={
        "dtype": ("float16", "float32"),
        "k": (256, 8, 1024),
        "rows": (1024, 32768, 8),
        "vocab": (128256, 151669, 32768, 262144),
    },
    unusual=slice(None),
    warmups=3,
    rounds=30,
    host_calls=300,
    compiler="inductor",
    linear=linear.GPU,
)
SMOKE = Plan(
    rows=2,
    vocab=1000,
    ks=(8,),
    few_rows=(1,),
    sweeps={"vocab": (999,)},
    unusual=slice(-2, None),
    warmups=1,
    rounds=2,
    host_calls=2,
    compiler="eager",
    linear=replace(linear.SMOKE, fresh=()),
)


def gpu_backends() -> list[str]:
    """Their names."""
    return [name for name in backends.MODULES if name not in ("cpu", "reference")]


class Bench:
    """Measures at points of a plan and records rows."""

    def __init__(self, device: torch.device, plan: Plan, result: Result) -> None:  # noqa: D107
        self.device, self.plan, self.result = device, plan, result
        self.clock = Clock(device, plan.warmups, plan.rounds)

    def backends(self, point: Point) -> list[str]:
        """GPU backends that serve a point."""
        what = self.device, (point.torch_dtype,), point.k
        return [name for name in gpu_backends() if backends.load(name).refusal(*what) is None]

    def inputs(self, point: Point, tensors: int = 5) -> tuple[Tensor, Tensor]:
        """(student, teacher), if as many tensors of their size fit in memory."""
        if self.device.type == "cuda":
            free, need = torch.cuda.mem_get_info(self.device)[0], tensors * point.nbytes + 2**31
            if need > free:
                raise MemoryError(f"skipped: {need / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free")
        student = random_logits(point, self.device).requires_grad_()
        return student, random_logits(point, self.device)

    def fastest_read(self, teacher: Tensor) -> tuple[Run, dict[str, float]]:
        """(the way of reading that takes least time, milliseconds of all)."""
        runs = reads(teacher)
        times, _ = self.clock.measure(runs)
        found = {name: int(runs[name]()().max()) for name in times}
        right = [name for name in times if found[name] == found["torch", "amax"]]
        ms = {name: statistics.median(times[name]) for name in right}
        return runs[min(ms, key=ms.__getitem__)], {" ".join(name): ms[name] for name in right}

    def measure_point(self, part: str, point: Point) -> None:
        """Yardsticks and every backend, in turn."""
        student, teacher = self.inputs(point)
        buffer = torch.empty_like(teacher)
        read, candidates = self.fastest_read(teacher)
        copy = functools.partial(buffer.copy_, teacher)
        runs: Runs = {
            ("torch", "read"): read,
            ("torch", "memset"): lambda: buffer.zero_,
            ("torch", "copy"): lambda: copy,
        }
        notes: dict[Name, dict[str, Any]] = {("torch", "read"): {"candidates": candidates}}
        for backend in self.backends(point):
            for build in (ours, other_calls) if part == "headline" else (ours,):
                built, reason = self.clock.attempt(
                    functools.partial(build, student, teacher, point.k, backend)
                )
                if built is None:
                    self.result.add(part, point, "check", backend=backend, error=reason)
                else:
                    runs |= built[0]
                    notes |= {name: {"checked": built[1]} for name in built[0]}
        self.record_point(part, point, runs, notes)

    def record_point(
        self, part: str, point: Point, runs: Runs, notes: dict[Name, dict[str, Any]]
    ) -> None:
        """Times beside the bytes that have to move and beside the yardsticks."""
        times, failed = self.clock.measure(runs)
        for (backend, measure), reason in failed.items():
            self.result.add(part, point, measure, backend=backend, error=reason)
        for (backend, measure), values in times.items():
            tensors, per_entry, yardsticks = MODELS[measure]
            row = spread(values) | notes.get((backend, measure), {})
            row["bytes"] = tensors * point.nbytes + per_entry * point.rows * point.k
            row["gb_s"] = row["bytes"] / row["ms"] / 1e6
            if yardsticks:
                least = sum(statistics.median(times["torch", name]) for name in yardsticks)
                row[f"percent_of_{'_and_'.join(yardsticks)}"] = 100 * least / row["ms"]
            row["peak_bytes"] = self.clock.peak_memory(runs[backend, measure])
            self.result.add(part, point, measure, backend=backend, **row)
            judge_point(self.result, part, point, backend, measure, row)
        if part == "headline":
            judge_backends(self.result, point, times)

    def measure_unusual(self, point: Point, content: str) -> None:
        """Unusual rows beside random ones, in turn."""
        student, random = self.inputs(point)
        make, options = unusual_rows(point, self.device)[content]
        teacher = make()
        for backend in self.backends(point):
            usual, _ = ours(student, random, point.k, backend)
            unusual, errors = ours(student, teacher, point.k, backend, **options)
            for measure in ("forward", "forward + backward"):
                name, beside = (backend, measure), (backend, "random")
                times, failed = self.clock.measure({name: unusual[name], beside: usual[name]})
                if failed:
                    raise RuntimeError("; ".join(failed.values()))
                row = spread(times[name]) | {"content": content, "checked": errors}
                row["ratio_to_random"] = row["ms"] / statistics.median(times[beside])
                self.result.add("unusual", point, measure, backend=backend, **row)
                what = f"{backend}, {content}: {measure} / random rows"
                self.result.goal(what, row["ratio_to_random"], most=UNUSUAL_RATIO)

    def measure_peer(self, point: Point, label: str, compiled: bool) -> None:
        """A peer beside ours, on a quarter of the rows where it does not fit in memory."""
        loss: Callable[..., Tensor] = PEERS[label]
        if compiled:
            torch.compiler.reset()
            loss = torch.compile(loss, dynamic=False, backend=self.plan.compiler)
            label += ", compiled"
        for scaled in (1, 4):
            _, reason = self.clock.attempt(
                functools.partial(self.beside, point, label, loss, scaled)
            )
            if reason is None or "OutOfMemory" not in reason:
                break
        if reason is not None:
            self.result.add("peers", point, label, error=reason)

    def beside(self, point: Point, label: str, loss: Callable[..., Tensor], scaled: int) -> None:
        """Forward and backward of a peer on ``rows / scaled`` rows and ours on all, in turn."""
        student, teacher = self.inputs(point)
        few = student.detach()[: point.rows // scaled].requires_grad_()
        few_teacher = teacher[: len(few)]
        peer = forward_backward(functools.partial(loss, few, few_teacher, point.k), few)
        for backend in self.backends(point):
            mine, errors = ours(student, teacher, point.k, backend)
            errors["peer_loss_error"] = check_peer(loss, few_teacher, point.k, backend)
            name = (backend, "forward + backward")
            times, failed = self.clock.measure({("peer", label): peer, name: mine[name]})
            if failed:
                raise RuntimeError("; ".join(failed.values()))
            row = {key: ms * scaled for key, ms in spread(times["peer", label]).items()}
            row |= {"scaled": scaled, "checked": errors}
            row["times_ours"] = row["ms"] / statistics.median(times[name])
            row["peak_bytes"] = self.clock.peak_memory(peer)
            self.result.add("peers", point, label, backend=backend, **row)
            judge_peer(self.result, point, backend, label, row["times_ours"])

    def count_launches(self, point: Point) -> None:
        """What a call puts on the device."""
        student, teacher = self.inputs(point)
        for backend in self.backends(point):
            runs, _ = ours(student, teacher, point.k, backend)
            for measure in ("forward", "backward"):
                names = self.clock.launches(runs[backend, measure])
                self.result.add("launches", point, measure, backend=backend, launches=names)

    def measure_host(self, point: Point) -> None:
        """The host's time in a call: how long Python takes to launch it."""
        student, teacher = self.inputs(point)
        for backend in self.backends(point):
            check(student, teacher, point.k, backend)
            for (_, measure), run in host_calls(student, teacher, point.k, backend).items():
                self.clock.host(run, self.plan.warmups)
                row = spread(self.clock.host(run, self.plan.host_calls))
                row["host_us"] = row["ms"] * 1e3
                self.result.add("host", point, measure, backend=backend, **row)
                judge_host(self.result, backend, measure, row["host_us"])

    def profile(self, point: Point) -> None:
        """Nsight Compute on a call in a process of its own, or why there is nothing of it."""
        shape = f"--rows={point.rows}", f"--vocab={point.vocab}", f"--k={point.k}"
        for backend in self.backends(point):
            kernels, why = profile(backend, *shape, f"--device={self.device}")
            for counts in kernels:
                name = kernel_name(counts)
                self.result.add("profile", point, name, backend=backend, counters=counts)
            if why:
                note = f"not profiled: {why}"
                self.result.add("profile", point, "profile", backend=backend, note=note)

    def look_for_backends(self, point: Point) -> None:
        """Whether a GPU is served by each backend that has goals; without one none is missed."""
        for name in GOALS if self.device.type == "cuda" else ():
            reason: str | None = "not in this version"
            if name in backends.MODULES:
                reason = backends.load(name).refusal(self.device, (point.torch_dtype,), point.k)
            self.result.goal(f"{name}: serves the device", float(reason is None), least=1)
            if reason is not None:
                self.result.add("backends", point, "check", backend=name, error=reason)


class Task(NamedTuple):
    """A step of the benchmark: what is called with a point, and how it is recorded if it fails."""

    part: str
    point: Point | HeadPoint
    label: str
    run: Callable[[], None]


def linear_task(step: Step) -> Task:
    """A step of the benchmark of the loss of hidden states."""
    return Task("linear", step.point, f"linear, {step.label}", step.run)


def tasks(bench: Bench, plan: Plan, quick: bool) -> list[Task]:
    """In order of importance."""
    headline = [Point(plan.rows, plan.vocab, k) for k in plan.ks]
    main = headline[0]

    def measured(part: str, point: Point) -> Task:
        return Task(part, point, part, functools.partial(bench.measure_point, part, point))

    def peers(point: Point, compiled: bool) -> list[Task]:
        what = ", compiled" if compiled else ""
        return [
            Task(
                "peers",
                point,
                label + what,
                functools.partial(bench.measure_peer, point, label, compiled),
            )
            for label in PEERS
        ]

    def beside(part: str, point: Point, run: Callable[[Point], None]) -> Task:
        return Task(part, point, part, functools.partial(run, point))

    few = [replace(main, rows=rows) for rows in plan.few_rows]
    todo = [beside("backends", main, bench.look_for_backends)]
    todo += [measured("headline", point) for point in headline]
    todo += [measured("few rows", point) for point in few]
    todo.append(beside("host", few[0], bench.measure_host))
    todo += peers(main, compiled=False)
    steps = LinearBench(bench.device, plan.linear, bench.result, gpu_backends()).steps()
    todo += [linear_task(step) for step in steps if step.has_goal]
    for content in list(unusual_rows(replace(main, rows=1), bench.device))[plan.unusual]:
        run = functools.partial(bench.measure_unusual, main, content)
        todo.append(Task("unusual", main, content, run))
    todo += [beside("launches", point, bench.count_launches) for point in (few[0], main)]
    for point in headline[1:]:
        todo += peers(point, compiled=False)
    todo.append(beside("profile", main, bench.profile))
    if quick:
        return todo
    todo += [linear_task(step) for step in steps if not step.has_goal]
    todo += peers(main, compiled=True)
    for axis, values in plan.sweeps.items():
        todo += [measured("sweep", replace(main, **{axis: value})) for value in values]
    for point in headline[1:]:
        todo += peers(point, compiled=True)
    return todo


def run_tasks(bench: Bench, result: Result, todo: list[Task], seconds: float) -> None:
    """Runs tasks until the time is over; the file is up to date after each."""
    begin = time.monotonic()
    for task in todo:
        spent = time.monotonic() - begin
        if spent > seconds:
            result.not_reached.append(f"{task.label}, {task.point}")
        else:
            print(f"{spent:5.0f} s  {task.label}, {task.point}", flush=True)
            bench.clock.release_memory()
            _, reason = bench.clock.attempt(task.run)
            if reason is not None:
                result.add(task.part, task.point, task.label, error=reason)
        result.write()


def printed(*command: str) -> str:
    """What a command prints, or nothing."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def git_commit() -> str:
    commit = printed("git", "rev-parse", "--short", "HEAD")
    dirty = printed("git", "status", "--porcelain", "--untracked-files=no")
    return (commit or "unknown") + ("-dirty" if dirty else "")


def describe(device: torch.device, commit: str) -> dict[str, object]:
    """Device, versions, date and commit."""
    about: dict[str, object] = {"device": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        about = {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": (driver.splitlines() or ["unknown"])[0],
            "cuda": torch.version.cuda,
        }
    return {
        **about,
        "torch": torch.__version__,
        "triton": None if triton is None else triton.__version__,
        "python": platform.python_version(),
        "opd_kernels": opd_kernels.__version__,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="what has a goal, and a profile")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes; figures mean nothing")
    parser.add_argument("--minutes", type=float, default=7.0, help="no task begins after them")
    parser.add_argument("--only", default="", help="tasks whose label contains this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default=git_commit(), help="where there is no git")
    folder = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=folder, help="folder of the result file")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --smoke --device cpu runs the path without one")
    torch.manual_seed(0)

    head = describe(device, options.commit)
    slug = re.sub("[^a-z0-9]+", "-", str(head["device"]).lower()).strip("-")
    options.output.mkdir(parents=True, exist_ok=True)
    result = Result(options.output / f"{slug}-{options.commit}.json", head)
    plan = SMOKE if options.smoke else FULL
    bench = Bench(device, plan, result)
    try:
        todo = [task for task in tasks(bench, plan, options.quick) if options.only in task.label]
        run_tasks(bench, result, todo, options.minutes * 60)
    except Exception as error:
        result.head["stopped"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        result.write()
        report(result)


if __name__ == "__main__":
    main()
