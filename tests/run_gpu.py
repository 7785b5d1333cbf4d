"""``make test-gpu``: builds the package and runs every test on a GPU, in under ten minutes.

    python tests/run_gpu.py [--fuzz-minutes 2] [--only TEXT] [--device cuda]

Uses the environment that is there and no network. After the build the steps run beside each other,
one for each core: most of them wait for Triton's compiler. Their logs are in build/test-gpu/. The
last line says how many passed; exit status 0: none failed, 1: some did, 2: no GPU, or no such step.
``TRITON_INTERPRET=1 python tests/run_gpu.py --device cpu`` tries the steps out without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "test-gpu"
TAIL = 40  # lines of a failed step's log to show
PACKAGES = ("torch", "triton", "pytest", "hypothesis", "pybind11", "ninja")
PYTEST_OPTIONS = ("-rfEs", "--tb=short", "--disable-warnings")
GPU_TESTS = "tests/test_gpu.py"
# Files that take as long as all others together.
SUITE_PARTS = (
    ("tests/test_differential.py",),
    ("tests/test_aot.py", "tests/test_build.py"),
)
# Together nine minutes; fuzzers have their own.
BUILD_SECONDS = 180
STEP_SECONDS = 360
# Fuzzers of a backend side by side, each with a seed of its own; one where not named.
FUZZERS = {"triton": 4}
SANITIZERS = {
    # What torch probes for and does without are errors of the API, too.
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": (),
    "synccheck": (),
}
# Not imported here: the package may not be built yet.
SERVING = """
import json, sys, torch
from opd_kernels import backends
device = torch.device(sys.argv[1])
names = [name for name in backends.MODULES if name != "cpu"]
reasons = {name: backends.load(name).refusal(device, (torch.float32,), 1) for name in names}
serving = [name for name in names if reasons[name] is None]
print(json.dumps(serving) if serving != ["reference"] else reasons)
sys.exit(serving == ["reference"])
"""
# What pytest and the fuzzer say at their end.
SUMMARY = re.compile(r"^=*\s*((?:\d+ [a-z]+, )*\d+ [a-z]+) in [\d.]+s|^(\d+ cases), ", re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """A command; ``skip`` says why it does not run, ``unable`` what it says where it cannot."""

    name: str
    command: Sequence[str]
    seconds: float = STEP_SECONDS
    environment: dict[str, str] = field(default_factory=dict)
    counts: bool = True
    skip: str = ""
    unable: str = ""

    @property
    def log(self) -> Path:
        return LOGS / f"{re.sub(r'[^a-z0-9]+', '-', self.name)}.log"


@dataclass(frozen=True)
class Result:
    """How a step ended: "passed", "FAILED" or "skipped", and why."""

    step: Step
    state: str
    reason: str = ""
    summary: str = ""
    seconds: float = 0.0


# What there is to run


def build() -> Step:
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e"]
    environment = {"OPD_KERNELS_REQUIRE_NATIVE": "1"}
    return Step("build", [*command, "."], BUILD_SECONDS, environment, counts=False)


def serving(device: str) -> Step:
    return Step("kernels", [sys.executable, "-c", SERVING, device], 60, counts=False)


def tests(device: str, names: Sequence[str], fuzz_minutes: float) -> list[Step]:
    """Every step after the build; ``names`` are the backends that serve the device."""
    return [
        *suite("cpu suite", SUITE_PARTS, {"TRITON_INTERPRET": "0", "OPD_KERNELS_TEST_DEVICE": ""}),
        # The other parts have no tests that run on a device.
        *suite(f"suite on {device}", SUITE_PARTS[:1], {"OPD_KERNELS_TEST_DEVICE": device}),
        pytest("gpu tests", GPU_TESTS, skip=without_gpu(device)),
        *(fuzz(name, seed, device, fuzz_minutes) for name, seed in fuzzers(names)),
        *(sanitizer(tool, device) for tool in SANITIZERS),
    ]


def suite(name: str, parts: Sequence[Sequence[str]], environment: dict[str, str]) -> list[Step]:
    """A step for each part and one for what is in none."""
    ignored = [f"--ignore={file}" for part in parts for file in part]
    # Triton 3.6's interpreter does not run on today's numpy, and here are real GPUs to benchmark.
    others = ["tests", *ignored, f"--ignore={GPU_TESTS}", "-k", "not gpu_benchmark"]
    steps = [(Path(part[0]).stem.removeprefix("test_"), part) for part in parts]
    return [
        pytest(f"{name}: {label}", *arguments, environment=environment)
        for label, arguments in (*steps, ("others", others))
    ]


def pytest(
    name: str, *arguments: str, environment: dict[str, str] | None = None, skip: str = ""
) -> Step:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *PYTEST_OPTIONS]
    return Step(name, [*command, *arguments], environment=environment or {}, skip=skip)


def fuzzers(names: Sequence[str]) -> list[tuple[str, int]]:
    return [(name, seed) for name in names for seed in range(FUZZERS.get(name, 1))]


def fuzz(name: str, seed: int, device: str, minutes: float) -> Step:
    command = [sys.executable, "-m", "opd_kernels.fuzz", "--backend", name, "--device", device]
    command += ["--minutes", str(minutes), "--seed", str(seed), "--output", str(LOGS)]
    return Step(f"fuzz {name}, seed {seed}", command, 60 * minutes + 180)


def sanitizer(tool: str, device: str) -> Step:
    """A tool of compute-sanitizer on the tests that are made for it."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    there = Path(program).exists()
    skip = without_gpu(device) or ("" if there else "compute-sanitizer is not installed")
    under = [program, "--tool", tool, "--error-exitcode", "99", *SANITIZERS[tool]]
    step = pytest(tool, GPU_TESTS, "-k", "sanitized", skip=skip)
    # Every tensor in an allocation of its own, whose end the tool knows.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*under, *step.command]
    return Step(tool, command, environment=environment, skip=skip, unable="Device not supported")


def without_gpu(device: str) -> str:
    return "" if device == "cuda" else "needs a GPU"


def missing(device: str) -> str:
    """What this needs and does not find, or nothing."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed for {sys.executable}"
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return ""


# Running it


class Job:
    """A step that runs, with all its descendants in a session of their own."""

    def __init__(self, step: Step) -> None:
        self.step, self.started = step, time.monotonic()
        with step.log.open("w") as log:
            self.process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=os.environ | shared_environment() | step.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def result(self, end: float) -> Result | None:
        """None while it runs; stopped when its time or all time is up."""
        now, code = time.monotonic(), self.process.poll()
        if code is None and now < min(end, self.started + self.step.seconds):
            return None
        self.stop()
        seconds = now - self.started
        text = self.step.log.read_text(errors="replace")
        summary = summarised(text)
        if code is None:
            return Result(self.step, "FAILED", f"stopped after {seconds:.0f} s", summary, seconds)
        if self.step.unable and self.step.unable in text:
            return Result(self.step, "skipped", f"{self.step.name}: {self.step.unable}")
        reason = f"exit status {code}" if code else ""
        if not reason and self.step.counts and not re.search(r"[1-9]\d* (passed|cases)", summary):
            reason = "nothing ran"
        return Result(self.step, "FAILED" if reason else "passed", reason, summary, seconds)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def shared_environment() -> dict[str, str]:
    """Steps share the machine's cores and what Triton has compiled."""
    return {
        "OMP_NUM_THREADS": "2",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TRITON_CACHE_DIR": str(LOGS / "triton"),
        "PYTHONUNBUFFERED": "1",
    }


def summarised(text: str) -> str:
    """What a program's last summary says."""
    found = SUMMARY.findall(text)
    return "".join(found[-1]) if found else ""


def run(steps: Sequence[Step], end: float, slots: int) -> Iterator[Result]:
    """Runs the steps, so many at once, and yields results as they come."""
    LOGS.mkdir(parents=True, exist_ok=True)
    waiting, running = [step for step in steps if not step.skip], list[Job]()
    yield from (Result(step, "skipped", step.skip) for step in steps if step.skip)
    try:
        while waiting or running:
            while waiting and len(running) < slots:
                running.append(Job(waiting.pop(0)))
            for job in list(running):
                result = job.result(end)
                if result is not None:
                    running.remove(job)
                    yield result
            time.sleep(0.05)
    finally:
        for job in running:
            job.stop()


# Saying how it went


def report(result: Result) -> None:
    """A line for a step, and the end of its log if it failed."""
    what = "; ".join(part for part in (result.summary, result.reason) if part)
    print(f"{result.state:8}{result.step.name:32}{result.seconds:5.0f} s  {what}", flush=True)
    if result.state == "FAILED":
        lines = result.step.log.read_text(errors="replace").splitlines()
        print("\n".join(f"    {line}" for line in lines[-TAIL:]))
        print(f"    (all of it: {result.step.log})", flush=True)


def verdict(results: Sequence[Result]) -> str:
    """The one line."""
    states = Counter(result.state for result in results)
    reasons = dict.fromkeys(result.reason for result in results if result.state == "skipped")
    line = f"test-gpu: {states['passed']} passed, {states['FAILED']} failed"
    return f"{line}, {states['skipped']} skipped ({'; '.join(reasons)})" if reasons else line


def run_all(device: str, fuzz_minutes: float, only: str) -> list[Result]:
    """Every step whose name contains ``only``; nothing after a failed build."""
    end = time.monotonic() + BUILD_SECONDS + max(STEP_SECONDS, 60 * fuzz_minutes + 180)
    results: list[Result] = []

    def keep(steps: Sequence[Step]) -> bool:
        wanted = [step for step in steps if only in step.name]
        for result in run(wanted, end, slots=max(os.cpu_count() or 1, 2)):
            report(result)
            results.append(result)
        return all(result.state != "FAILED" for result in results)

    if keep([build()]):
        (found,) = run([serving(device)], end, slots=1)
        if found.state == "FAILED":
            report(found)
            return [*results, found]
        names = json.loads(found.step.log.read_text().splitlines()[-1])
        keep(tests(device, names, fuzz_minutes))
    return results


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run")
    parser.add_argument("--fuzz-minutes", type=float, default=2.0, help="of each fuzzer")
    parser.add_argument("--only", default="", metavar="TEXT", help="steps whose name has this")
    options = parser.parse_args(arguments)
    reason = missing(options.device)
    if reason:
        print(
            "test-gpu needs an NVIDIA GPU and an environment with torch for CUDA, triton, pytest, "
            f"hypothesis, pybind11, ninja and a C++17 compiler: {reason}"
        )
        return 2
    started = time.monotonic()
    results = run_all(options.device, options.fuzz_minutes, options.only)
    if not results:
        print(f"test-gpu: no step's name contains {options.only!r}")
        return 2
    print(f"{time.monotonic() - started:.0f} s, logs in {LOGS}\n{verdict(results)}")
    return int(any(result.state == "FAILED" for result in results))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the steps are stopped on the way out
    sys.exit(main())
