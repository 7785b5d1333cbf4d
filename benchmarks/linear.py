"""CPU benchmark of ``linear_topk_rkl`` with its yardsticks in the same run.

    python benchmarks/linear.py [--quick] [--threads 2] [--json benchmarks/results/linear.jsonl]

Yardsticks: the LM head alone, forward and backward; the head with careful eager and with
``topk_rkl``, which both need the student's logits; memset of a gradient of the head, freshly
allocated and warm; a read of as many bytes as the gathered rows have. Each with a trained head
(gradients of hidden states and head) and a frozen one (hidden states only). The teacher's support
is given: random ids, and ids that rows share as they do in text. Then a teacher in process
(``LinearLogits``), Liger's loss of hidden states where it is installed, other K and N, and peak
memory, each in a fresh process.

What is compared is timed in turn, round by round, with the caches full of something else; medians.
A call is timed only after its loss and both gradients agreed with float64 (a peer: with ours, Liger
with its own loss in float32). The end of the output says of each goal (goals.py) whether it was
met. ``--quick`` runs the path on tiny shapes; its figures mean nothing. ``--json`` appends a line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import heads
import torch
from goals import judge_linear, judge_linear_memory, judge_teacher
from heads import (
    BOTH,
    CAREFUL,
    FROZEN,
    HEAD,
    LIGER,
    LOGITS,
    READ,
    STUDENT,
    TEACHER_HEAD,
    TOTAL,
    TRAINED,
    HeadPoint,
    Inputs,
    Liger,
    Teacher,
)
from report import Result, report
from timing import Clock, Name, Run, spread

PART = "linear"
PEAKS = (
    *(f"{what}, {how}" for what in (BOTH, HEAD, CAREFUL, LOGITS) for how in (TRAINED, FROZEN)),
    TOTAL,
    LIGER,
)


@dataclass(frozen=True)
class LinearPlan:
    """What to measure: the headline for each of ``ks``, and around the first one the rest."""

    rows: int
    vocab: int
    hidden: int
    dtype: str
    ks: tuple[int, ...]
    teacher_hidden: int
    sweep_ks: tuple[int, ...]
    sweep_rows: tuple[int, ...]
    many_rows: int  # for which memory alone is measured
    rounds: int
    sweep_rounds: int
    compiled: bool  # Liger
    fresh: tuple[str, ...]  # whose peaks are seen from outside a fresh process, on a CPU

    def points(self) -> list[HeadPoint]:
        """The headline."""
        return [HeadPoint(self.rows, self.vocab, self.hidden, k, self.dtype) for k in self.ks]


GPU = LinearPlan(
    rows=8192,
    vocab=151936,
    hidden=4096,
    dtype="bfloat16",
    ks=(64, 32),
    teacher_hidden=5120,
    sweep_ks=(8, 32, 128, 512, 1024),
    sweep_rows=(512, 2048, 32768),
    many_rows=65536,
    rounds=12,
    sweep_rounds=6,
    compiled=True,
    fresh=(),
)
CPU = LinearPlan(
    rows=512,
    vocab=49152,
    hidden=576,
    dtype="float32",
    ks=(32,),
    teacher_hidden=1024,
    sweep_ks=(8, 32, 128, 512, 1024),
    sweep_rows=(64, 512, 4096),
    many_rows=65536,
    rounds=5,
    sweep_rounds=3,
    compiled=True,
    fresh=PEAKS,
)
SMOKE = LinearPlan(
    rows=5,
    vocab=1000,
    hidden=24,
    dtype="float32",
    ks=(8,),
    teacher_hidden=32,
    sweep_ks=(4, 8),
    sweep_rows=(3,),
    many_rows=7,
    rounds=2,
    sweep_rounds=2,
    compiled=False,
    fresh=PEAKS[:1],
)


class Step(NamedTuple):
    """Something to measure."""

    label: str
    point: HeadPoint
    run: Callable[[], None]
    has_goal: bool


class LinearBench:
    """Measures at points of a plan and records rows.

    ``names`` are the backends to look at; if none has kernels the reference is measured.
    """

    def __init__(  # noqa: D107
        self, device: torch.device, plan: LinearPlan, result: Result, names: list[str]
    ) -> None:
        self.device, self.plan, self.result = device, plan, result
        served = heads.serving(names, device, plan.points()[0])
        self.backends = served or ["reference"]
        result.goal("kernels for hidden states", float(bool(served)), least=1)
        self.clock = Clock(device, 1 if device.type == "cpu" else 3, plan.rounds)
        self.sweep_clock = Clock(device, 1, plan.sweep_rounds)

    def steps(self) -> list[Step]:
        """In order of importance."""
        points = self.plan.points()
        main = points[0]
        many = replace(main, rows=self.plan.many_rows)
        contents = [(ids, point) for point in points for ids in heads.SUPPORTS]
        todo = [
            Step(ids, point, lambda ids=ids, point=point: self.measure(point, ids), True)
            for ids, point in contents
        ]
        todo += [
            Step("teacher in process", main, lambda: self.measure_teacher(main), True),
            Step("many rows", many, lambda: self.measure_many(many), True),
            Step("K", main, lambda: self.sweep("k", self.plan.sweep_ks), False),
            Step("N", main, lambda: self.sweep("rows", self.plan.sweep_rows), False),
            Step("Liger", main, lambda: self.measure_liger(main), False),
        ]
        return todo

    def add(self, part: str, point: HeadPoint, name: Name, **row: Any) -> dict[str, Any]:
        """A row of the table."""
        self.result.add(part, point, name[1], backend=name[0], **row)
        return row

    def measure(self, point: HeadPoint, ids: str) -> None:
        """Yardsticks, peers and ours, in turn."""
        for backend in self.backends:
            given = heads.inputs(point, ids, self.device)
            checked = heads.check_ours(given, backend)
            checked |= heads.check_logits_forms(given, backend)
            runs = heads.everything(given, backend)
            times, failed = self.clock.measure(runs)
            for name, reason in failed.items():
                self.add(PART, point, name, content=ids, error=reason)
            rows = {}
            for name, values in times.items():
                row = spread(values) | {"content": ids, "checked": checked}
                row |= beside(backend, name, times)
                if name[1] == READ:
                    row["bytes"] = point.gathered_bytes
                    row["gb_s"] = row["bytes"] / row["ms"] / 1e6
                peak = self.peak(point, ids, backend, name, runs[name])
                row |= {} if peak is None else peaks(point, name[1], peak)
                rows[name[1]] = self.add(PART, point, name, **row)
            judge_linear(self.result, self.device.type, point, f"{backend}, {ids}", rows)
            for measure, row in rows.items():
                if measure.startswith(BOTH) and "extra_bytes" in row:
                    judge_linear_memory(self.result, point, f"{backend}, {measure}, {ids}", row)

    def peak(
        self, point: HeadPoint, ids: str, backend: str, name: Name, run: Run | None
    ) -> int | None:
        """Bytes that a call allocates at its peak: on a CPU seen from outside a fresh process."""
        if self.device.type != "cpu":
            return None if run is None else self.clock.peak_memory(run)
        measure = LIGER if name[1].startswith(LIGER) else name[1]
        if measure not in self.plan.fresh or not Path("/proc/self/clear_refs").exists():
            return None
        asked = json.dumps(
            {
                "point": asdict(point),
                "ids": ids,
                "backend": backend,
                "measure": measure,
                "teacher_hidden": self.plan.teacher_hidden,
            }
        )
        threads = str(torch.get_num_threads())
        command = [sys.executable, str(Path(__file__)), "--peak", asked, "--threads", threads]
        # Memory that is given back is given back to the system, or it would not be seen again.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"no peak of {name[1]}: {done.stderr[-300:]}")
        return int(done.stdout)

    def measure_many(self, point: HeadPoint) -> None:
        """Memory and time at many rows, of which the logits need not fit anywhere."""
        for backend in self.backends:
            for how in (TRAINED, FROZEN):
                ids, name = "uniform ids", (backend, f"{BOTH}, {how}")
                run = None
                if self.device.type != "cpu":
                    given = heads.inputs(point, ids, self.device)
                    run = heads.backward_of(
                        heads.losses(given, backend, how == TRAINED)[BOTH], *given.leaves
                    )
                peak = self.peak(point, ids, backend, name, run)
                if peak is not None:
                    row = peaks(point, name[1], peak)
                    self.add("linear, many rows", point, name, content=ids, **row)
                    what = f"{backend}, {name[1]}, {ids}"
                    judge_linear_memory(self.result, point, what, row)

    def measure_teacher(self, point: HeadPoint) -> None:
        """A teacher's hidden states and head beside its matrix product and the student's side."""
        for backend in self.backends:
            given = heads.inputs(point, "shared ids", self.device)
            teacher = Teacher.of(point, self.plan.teacher_hidden, self.device)
            checked = teacher.check(given, backend)
            runs = teacher.runs(given, backend)
            times, failed = self.clock.measure(runs)
            if failed:
                raise RuntimeError("; ".join(failed.values()))
            for name, values in times.items():
                row = spread(values) | {"checked": checked}
                peak = self.peak(point, "shared ids", backend, name, runs[name])
                row |= {} if peak is None else peaks(point, name[1], peak)
                row["note"] = f"teacher's H={self.plan.teacher_hidden}"
                self.add("linear, teacher in process", point, name, **row)
            parts = [("torch", TEACHER_HEAD), (backend, STUDENT)]
            least = sum(statistics.median(times[part]) for part in parts)
            total = statistics.median(times[backend, TOTAL])
            judge_teacher(self.result, point, backend, total / least)

    def measure_liger(self, point: HeadPoint) -> None:
        """Liger's loss beside ours, both of hidden states."""
        part = "linear, teacher in process"
        try:
            liger = Liger(self.plan.compiled)
        except ImportError as error:
            note = f"not measured: {error}; pip install liger-kernel"
            self.add(part, point, ("peer", "Liger"), note=note)
            return
        for backend in self.backends:
            self.beside_liger(point, backend, liger, part)

    def beside_liger(self, point: HeadPoint, backend: str, liger: Liger, part: str) -> None:
        """With a trained head, in turn."""
        given = heads.inputs(point, "shared ids", self.device)
        teacher = Teacher.of(point, self.plan.teacher_hidden, self.device)
        checked = teacher.check(given, backend)
        checked["peer_loss_error"] = liger.check(given, teacher)
        name, total = ("peer", liger.name), (backend, TOTAL)
        theirs = heads.backward_of(lambda: liger.loss(given, teacher), *given.leaves)
        runs = {name: theirs, total: teacher.runs(given, backend)[total]}
        times, failed = self.sweep_clock.measure(runs)
        if failed:
            raise RuntimeError("; ".join(failed.values()))
        ratio = statistics.median(times[name]) / statistics.median(times[total])
        row = spread(times[name]) | {"checked": checked, "beside": backend, "times_ours": ratio}
        peak = self.peak(point, "shared ids", backend, name, theirs)
        row |= {} if peak is None else peaks(point, name[1], peak)
        self.add(part, point, name, **row)

    def sweep(self, axis: str, values: tuple[int, ...]) -> None:
        """Ours beside the form that needs logits, by K or by N; and from which K on it wins."""
        ids, part = "uniform ids", f"linear, by {'K' if axis == 'k' else 'N'}"
        for backend in self.backends:
            ratios: dict[str, list[float]] = {TRAINED: [], FROZEN: []}
            for value in values:
                point = replace(self.plan.points()[0], **{axis: value})
                self.clock.release_memory()
                given = heads.inputs(point, ids, self.device)
                checked = heads.check_ours(given, backend)
                checked |= heads.check_logits_forms(given, backend)
                times, failed = self.sweep_clock.measure(heads.ours_and_logits(given, backend))
                if failed:
                    raise RuntimeError("; ".join(failed.values()))
                for name, spent in times.items():
                    row = spread(spent) | beside(backend, name, times)
                    self.add(part, point, name, content=ids, checked=checked, **row)
                    if name[1].startswith(LOGITS):
                        ratios[name[1].rpartition(", ")[2]].append(row["times_ours"])
            for how, found in ratios.items() if axis == "k" else ():
                k = heads.crossover(list(values), found)
                where = f"beyond K={values[-1]}" if k is None else f"from K={k:.0f} on"
                note = f"{LOGITS} is faster {where}"
                name = (backend, f"crossover, {how}")
                self.add(part, point, name, content=ids, crossover=k, note=note)


def beside(backend: str, name: Name, times: dict[Name, list[float]]) -> dict[str, Any]:
    """How many times as long as ours, with the same head, something else takes."""
    how = name[1].rpartition(", ")[2]
    if name[0] == backend or how not in (TRAINED, FROZEN):
        return {}
    mine = statistics.median(times[backend, f"{BOTH}, {how}"])
    return {"beside": backend, "times_ours": statistics.median(times[name]) / mine}


def peaks(point: HeadPoint, measure: str, peak: int) -> dict[str, int]:
    """A peak, and what of it is not the gradients themselves."""
    grads = 0
    if measure.endswith((TRAINED, STUDENT, TOTAL)) or measure.startswith(LIGER):
        grads = point.hidden_bytes + point.weight_bytes
    elif measure.endswith(FROZEN):
        grads = point.hidden_bytes
    return {"peak_bytes": peak, "extra_bytes": peak - grads}


def resident(field: str) -> int:
    """Bytes of this process, of Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_here(asked: dict[str, Any]) -> int:
    """Bytes by which this process peaks in a call, after the same call on two rows."""
    point, device = HeadPoint(**asked["point"]), torch.device("cpu")
    given = heads.inputs(point, asked["ids"], device)
    teacher = Teacher.of(point, asked["teacher_hidden"], device)
    prepared(given.first(2), teacher, asked)()
    timed = prepared(given, teacher, asked)  # which frees the gradients of the call before
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    timed()
    return resident("VmHWM") - before


def prepared(given: Inputs, teacher: Teacher, asked: dict[str, Any]) -> Callable[[], object]:
    """A call of those in PEAKS."""
    what, _, how = asked["measure"].partition(", ")
    backend, trained = asked["backend"], how == TRAINED
    if what == HEAD:
        shape = len(given), len(given.weight)
        return heads.head_alone(given, given.hidden.new_ones(shape), trained)()
    if what in (TOTAL, LIGER):
        teacher = teacher.first(len(given))
        liger = Liger(compiled=False) if what == LIGER else None  # without the compiler's memory
        if liger is not None:
            return heads.backward_of(lambda: liger.loss(given, teacher), *given.leaves)()
        return heads.backward_of(lambda: teacher.loss(given, backend), *given.leaves)()
    return heads.backward_of(heads.losses(given, backend, trained)[what], *given.leaves)()


def describe(threads: int) -> dict[str, object]:
    """Machine, versions and commit."""
    from cpu import describe as machine  # the module of that name here, not the backend

    return {**machine(), "threads": threads}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes; figures mean nothing")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and the kernels")
    parser.add_argument("--only", default="", help="steps whose label contains this")
    parser.add_argument("--json", type=Path, help="append the result as one line to this file")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.peak:
        print(peak_here(json.loads(options.peak)))
        return
    result = Result(None, describe(options.threads))
    plan = SMOKE if options.quick else CPU
    bench = LinearBench(torch.device("cpu"), plan, result, ["cpu"])
    begin = time.monotonic()
    try:
        for step in bench.steps():
            if options.only in step.label:
                spent = time.monotonic() - begin
                print(f"{spent:5.0f} s  {step.label}, {step.point}", flush=True)
                step.run()
    finally:
        report(result)
    if options.json:
        with options.json.open("a") as file:
            file.write(json.dumps(result.content()) + "\n")


if __name__ == "__main__":
    main()
