"""Runs steps, each in a process and with a time-out of its own, and records how they ended.

A process for a measurement is started while the step before it runs and imports what it needs; it
touches the GPU only when its turn has come. A kernel that hangs costs its step's limit, and what
the step had recorded until then is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.package import CACHE, ROOT
from gpu.steps import SANITIZER_EXIT, Step, estimate, groups

PASSED, FAILED, UNABLE, DROPPED = "passed", "FAILED", "not available", "dropped"
# What pytest and the fuzzer say at their end.
SUMMARY = re.compile(r"^=*\s*((?:\d+ [a-z]+, )*\d+ [a-z]+) in [\d.]+s|^(\d+ cases), ", re.MULTILINE)
# Not a session of its own, which would go on where a lease ends and the runner is killed.
OWN_GROUP: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
)
# What compute-sanitizer says where it cannot run.
REFUSED = ("Device not supported", "Unable to find a suitable", "Failed to initialize")


@dataclass(frozen=True)
class Setting:
    """Where a run takes place."""

    device: str  # "cuda", or "cpu" for a dry run
    work: Path  # logs, and what steps leave
    slots: int  # processes at the same time, where nothing is timed
    sanitizer: str | None  # compute-sanitizer, where there is one

    @property
    def dry(self) -> bool:
        """Whether there is no GPU: emulation, interpreter and tiny shapes."""
        return self.device == "cpu"

    def environment(self, step: Step | None = None) -> dict[str, str]:
        """Steps share the machine's cores, what Triton has compiled, and this checkout."""
        paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        shared = {
            "OMP_NUM_THREADS": "2",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TRITON_CACHE_DIR": str(CACHE),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "TRITON_INTERPRET": "1" if self.dry else "0",
        }
        own = {} if step is None else step.environment
        return os.environ | shared | {name: self.filled(value) for name, value in own.items()}

    def filled(self, text: str) -> str:
        """A word of a command."""
        words = {"python": sys.executable, "device": self.device, "work": str(self.work)}
        for name, value in (words | {"sanitizer": self.sanitizer or ""}).items():
            text = text.replace(f"{{{name}}}", value)
        return text


@dataclass(frozen=True)
class Outcome:
    """How a step ended, why, what it counted, and what it recorded."""

    step: Step
    state: str
    reason: str = ""
    summary: str = ""
    seconds: float = 0.0
    record: dict[str, Any] | None = None

    @property
    def harmful(self) -> bool:
        """Whether what ran would spoil others' time: a wrong result does not."""
        return self.reason.startswith("stopped") or "AssertionError" not in self.reason

    def content(self) -> dict[str, Any]:
        """For the result file."""
        return {
            "step": self.step.name,
            "state": self.state,
            "reason": self.reason,
            "summary": self.summary,
            "seconds": round(self.seconds, 1),
            "estimate": self.step.estimate,
        }


class Process:
    """A program with all its descendants in a process group of their own."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        """Starts it; what it prints goes to the log."""
        self.log = log
        with log.open("w") as file:
            self.popen = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=file,
                stderr=subprocess.STDOUT, text=True, **OWN_GROUP,
            )  # fmt: skip

    def stop(self) -> None:
        """Ends all of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: leave it there
            self.popen.wait(timeout=10)
        if self.popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.popen.stdin.close()


class Worker(Process):
    """A process that has imported what measurements need and waits to be told which."""

    def __init__(self, setting: Setting, number: int) -> None:
        """Starts it."""
        command = [sys.executable, "benchmarks/gpu", "--worker", "--device", setting.device]
        log = setting.work / f"worker-{number}.log"
        super().__init__(command, setting.environment(), log)

    def begin(self, step: Step, record: Path, log: Path, seconds: float, without: set[str]) -> None:
        """Tells it, and which backends to leave out; its log becomes the step's."""
        self.log = self.log.replace(log)
        request = {
            "measure": step.measure,
            "record": str(record),
            "seconds": seconds,
            "without": sorted(without),
        }
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died, which its exit status tells
            self.popen.stdin.write(json.dumps(request) + "\n")
            self.popen.stdin.flush()


class Job:
    """A step that runs."""

    def __init__(self, step: Step, process: Process, record: Path, limit: float) -> None:
        """From now on its time counts."""
        self.step, self.process, self.record, self.limit = step, process, record, limit
        self.started = time.monotonic()

    def outcome(self) -> Outcome | None:
        """None while it runs; stopped when its time is up."""
        code, seconds = self.process.popen.poll(), time.monotonic() - self.started
        if code is None and seconds < self.limit:
            return None
        self.process.stop()
        text = self.process.log.read_text(errors="replace")
        record = json.loads(self.record.read_text()) if self.record.exists() else None
        found = SUMMARY.findall(text)
        summary = "".join(found[-1]) if found else ""
        reason = self.failure(code, text, summary, record, seconds)
        refused = next((words for words in REFUSED if words in text), None)
        sanitizes = self.step.command[:1] == ("{sanitizer}",)
        if reason and sanitizes and refused and code != SANITIZER_EXIT:
            return Outcome(self.step, UNABLE, refused, summary, seconds, record)
        unable = unavailable(record)
        if unable and not reason:
            return Outcome(self.step, UNABLE, unable, summary, seconds, record)
        state = FAILED if reason else PASSED
        return Outcome(self.step, state, reason, summary, seconds, record)

    def failure(
        self, code: int | None, text: str, summary: str, record: dict[str, Any] | None, spent: float
    ) -> str:
        """What is wrong with how it ended, or nothing."""
        if code is None:
            return f"stopped after {spent:.0f} s"
        if code:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            failed = [line for line in lines if line.startswith("FAILED ")]
            return f"exit status {code}: {(failed or lines[-1:] or [''])[0][:150]}"
        if self.step.counts and not re.search(r"[1-9]\d* (passed|cases)", summary):
            return "nothing ran"
        errors = [row["error"] for row in (record or {}).get("rows", ()) if "error" in row]
        return f"{len(errors)} failed, first: {errors[0][:120]}" if errors else ""


def unavailable(record: dict[str, Any] | None) -> str:
    """Why a measurement found nothing to measure with, or nothing if it measured something."""
    notes = [str(row.get("note", "")) for row in (record or {}).get("rows", ())]
    if notes and all(note.startswith(UNABLE) for note in notes):
        return notes[0].removeprefix(f"{UNABLE}: ")
    return ""


class Runner:
    """Runs the steps of a part one group after the other until the time is over."""

    def __init__(self, setting: Setting, seconds: float) -> None:
        """The time counts from now on."""
        self.setting, self.begin = setting, time.monotonic()
        self.end = self.begin + seconds
        self.number = 0
        self.worker: Worker | None = None
        self.without: set[str] = set()  # backends that hang or lose the GPU
        setting.work.mkdir(parents=True, exist_ok=True)

    def run(self, steps: Sequence[Step], keep: Callable[[Outcome], None]) -> None:
        """Every outcome is handed on as soon as it is there."""
        try:
            broken = ""
            for group in groups(tuple(steps)):
                if any(step.measure for step in group) and self.worker is None and not broken:
                    self.worker = self.spare()
                for outcome in self.run_group(group, broken):
                    keep(outcome)
                    if outcome.step.fatal and outcome.state != PASSED:
                        broken = f"{outcome.step.name}: {outcome.state}"
                    if outcome.step.proves and outcome.state == FAILED and outcome.harmful:
                        self.without.add(outcome.step.proves)
        finally:
            if self.worker is not None:
                self.worker.stop()

    def spare(self) -> Worker:
        """A process for the next measurement."""
        self.number += 1
        return Worker(self.setting, self.number)

    def run_group(self, group: list[Step], broken: str) -> list[Outcome]:
        """Outcomes of steps that run at the same time."""
        waiting, outcomes, running = [], [], list[Job]()
        for step in group:
            skipped = self.skipped(step, broken)
            if skipped is None:
                waiting.append(step)
            else:
                outcomes.append(skipped)
        try:
            while waiting or running:
                while waiting and len(running) < self.setting.slots:
                    running.append(self.job(waiting.pop(0)))
                for job in list(running):
                    outcome = job.outcome()
                    if outcome is not None:
                        running.remove(job)
                        outcomes.append(outcome)
                time.sleep(0.02)
        finally:
            for job in running:
                job.process.stop()
        return outcomes

    def skipped(self, step: Step, broken: str) -> Outcome | None:
        """Why a step does not run."""
        if broken:
            return Outcome(step, DROPPED, broken)
        if step.needs_gpu and self.setting.dry:
            return Outcome(step, UNABLE, "needs a GPU")
        if "{sanitizer}" in step.command and self.setting.sanitizer is None:
            return Outcome(step, UNABLE, "compute-sanitizer is not installed")
        left = self.end - time.monotonic()
        if left < step.estimate:
            return Outcome(step, DROPPED, f"takes about {step.estimate:.0f} s, {left:.0f} are left")
        return None

    def job(self, step: Step) -> Job:
        """Starts a step; the process for the next measurement starts beside it."""
        slug = re.sub(r"[^a-z0-9]+", "-", step.name.lower()).strip("-")
        record, log = self.setting.work / f"{slug}.json", self.setting.work / f"{slug}.log"
        record.unlink(missing_ok=True)
        limit = min(step.limit, max(self.end - time.monotonic(), 1.0))
        if not step.measure:
            command = [self.setting.filled(word) for word in step.command]
            process: Process = Process(command, self.setting.environment(step), log)
            return Job(step, process, record, limit)
        worker = self.worker or self.spare()
        self.worker = self.spare()
        worker.begin(step, record, log, limit, self.without)
        return Job(step, worker, record, limit)


def plan_text(steps: Sequence[Step], setting: Setting, seconds: float) -> str:
    """What will run, and for about how long."""
    lines, total = [], 0.0
    for group in groups(tuple(steps)):
        spent = estimate(group, setting.slots)
        names = (
            group[0].name
            if len(group) == 1
            else f"{len(group)} beside each other: " + ("; ".join(step.name for step in group))
        )
        note = "" if total + spent <= seconds else "  (only with more --seconds)"
        lines.append(f"{total:5.0f} s  {names}, about {spent:.0f} s{note}")
        total += spent
    return "\n".join(lines)
