"""``make test-gpu``: builds the package and runs every test on a GPU, in under ten minutes.

    python tests/run_gpu.py [--fuzz-minutes 2] [--only TEXT] [--device cuda]

Uses the environment that is there and no network. The build compiles the CUDA kernels for the GPU
that is there; it fails where a backend that the GPU should have does not serve it. After the build
the steps run beside each other, one for each core: most of them wait for Triton's compiler. At the
end, alone, Nsight Compute profiles a call of each backend, where there is one and it may. Logs are
in build/test-gpu/. The last line says how many passed; exit status 0: none failed, 1: some did, 2:
no GPU, or no such step. ``TRITON_INTERPRET=1 python tests/run_gpu.py --device cpu`` tries the steps
out without a GPU.
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
GPU_TESTS = ("tests/test_gpu.py", "tests/test_gpu_linear.py")
# Or the suite's conftest.py puts an emulation in the place of the CUDA backend.
NO_EMULATION = {"OPD_KERNELS_EMULATED": "none"}
# Files that take as long as all others together.
SUITE_PARTS = (
    ("tests/test_differential.py",),
    ("tests/test_linear.py",),
    ("tests/test_aot.py", "tests/test_build.py"),
    ("tests/test_cubins.py", "tests/test_races.py", "tests/test_cuda.py"),
)
# Together less than ten minutes, with what is left for the profile; fuzzers have their own.
BUILD_SECONDS = 180
STEP_SECONDS = 360
LEFT_SECONDS = 45
# As long as the steps before it leave it.
PROFILE_SECONDS = 90
# Backends that have to serve a device after the build.
REQUIRED = {"cuda": ("cuda", "triton"), "cpu": ("triton",)}
# Fuzzers of a backend side by side, each with a seed of its own; one where not named.
FUZZERS = {"triton": 4, "cuda": 2}
SANITIZERS = {
    # What torch probes for and does without are errors of the API, too.
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": (),
    "synccheck": (),
    # No filter by kernel: it would not see what other kernels write, and call it uninitialised.
    "initcheck": ("--check-api-memory-access", "no"),
}
SANITIZER_EXIT = 99
# Not imported here: the package may not be built yet.
SERVING = """
import json, sys, torch
from opd_kernels import backends
device, required = torch.device(sys.argv[1]), sys.argv[2:]
names = [name for name in backends.MODULES if name != "cpu"]
reasons = {name: backends.load(name).refusal(device, (torch.float32,), 1) for name in names}
print(json.dumps([name for name in names if reasons[name] is None]))
for name in required:
    reason = reasons.get(name, "not in this version")
    if reason is not None:
        sys.exit(f"{name} does not serve {device}: {reason}")
"""
# What pytest and the fuzzer say at their end.
SUMMARY = re.compile(r"^=*\s*((?:\d+ [a-z]+, )*\d+ [a-z]+) in [\d.]+s|^(\d+ cases), ", re.MULTILINE)
# Of compute-sanitizer's log: a report, the places in device code that it names, torch's own code.
REPORT = re.compile(
    r"^={9} (?!COMPUTE-SANITIZER|\w+ SUMMARY)(\S.*(?:\n={9} {2,}.*)*)", re.MULTILINE
)
PLACE = re.compile(r"(?:^={9} +|\baccess |\) )at (\S.*)|Device Frame: ?(\S.*)", re.MULTILINE)
TORCH = re.compile(r"(?:0x[0-9a-f]+ in )?(?:\S+ )?(?:at|at_cuda_detail|c10|cub|thrust)::")


@dataclass(frozen=True)
class Step:
    """A command; ``skip`` says why it does not run, ``unable`` what it says where it cannot.

    With ``informs`` what it prints is shown, and to fail is no failure.
    """

    name: str
    command: Sequence[str]
    seconds: float = STEP_SECONDS
    environment: dict[str, str] = field(default_factory=dict)
    counts: bool = True
    skip: str = ""
    unable: str = ""
    informs: bool = False

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


def build(device: str) -> Step:
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e"]
    environment = {"OPD_KERNELS_REQUIRE_NATIVE": "1"}
    if device == "cuda":
        environment |= {"OPD_KERNELS_BUILD_CUDA": "1", "OPD_KERNELS_CUDA_ARCHS": architecture()}
    return Step("build", [*command, "."], BUILD_SECONDS, environment, counts=False)


def architecture() -> str:
    """The GPU's own, as the build names it: one is compiled in seconds, all of them in minutes."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def serving(device: str) -> Step:
    command = [sys.executable, "-c", SERVING, device, *REQUIRED.get(device, ())]
    return Step("kernels", command, 60, counts=False)


def tests(device: str, names: Sequence[str], fuzz_minutes: float) -> list[Step]:
    """Every step after the build; ``names`` are the backends that serve the device.

    Those that take longest come first: there may be more steps than cores.
    """
    kernels = [name for name in reversed(names) if name != "reference"]
    return [
        # The other parts have no tests that run on a device.
        *suite(f"suite on {device}", SUITE_PARTS[:2], {"OPD_KERNELS_TEST_DEVICE": device}),
        *gpu_tests(device, names),
        *(fuzz(name, seed, device, fuzz_minutes) for name, seed in fuzzers(names)),
        *suite("cpu suite", SUITE_PARTS, {"TRITON_INTERPRET": "0", "OPD_KERNELS_TEST_DEVICE": ""}),
        *(sanitizer(tool, name, device) for name in kernels for tool in SANITIZERS),
    ]


def gpu_tests(device: str, names: Sequence[str]) -> list[Step]:
    """What needs GPU tensors; fails where a backend that serves the device is left out."""
    kernels = ",".join(name for name in names if name != "reference")
    environment = NO_EMULATION | {"OPD_KERNELS_GPU_BACKENDS": kernels}
    skip = without_gpu(device)
    return [
        pytest(f"gpu tests: {label(file)}", file, environment=environment, skip=skip)
        for file in GPU_TESTS
    ]


def suite(name: str, parts: Sequence[Sequence[str]], environment: dict[str, str]) -> list[Step]:
    """A step for each part and one for what is in none."""
    ignored = [f"--ignore={file}" for part in (*parts, GPU_TESTS) for file in part]
    # Triton 3.6's interpreter does not run on today's numpy, and here are real GPUs to benchmark.
    others = ["tests", *ignored, "-k", "not gpu_benchmark"]
    steps = [(label(part[0]), part) for part in parts]
    return [
        pytest(f"{name}: {what}", *arguments, environment=environment)
        for what, arguments in (*steps, ("others", others))
    ]


def label(file: str) -> str:
    return Path(file).stem.removeprefix("test_")


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


def sanitizer(tool: str, name: str, device: str) -> Step:
    """A tool of compute-sanitizer on a backend's tests that are made for it."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    there = Path(program).exists()
    skip = without_gpu(device) or ("" if there else "compute-sanitizer is not installed")
    under = [program, "--tool", tool, "--error-exitcode", str(SANITIZER_EXIT), *SANITIZERS[tool]]
    step = pytest(f"{tool} {name}", *GPU_TESTS, "-k", f"sanitized and {name}")
    # Every tensor in an allocation of its own, whose end the tool knows.
    environment = NO_EMULATION | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*under, *step.command]
    unable = "Device not supported"
    return Step(step.name, command, environment=environment, skip=skip, unable=unable)


def profile(device: str, names: Sequence[str]) -> Step:
    """Nsight Compute on a call of each backend, one line for each kernel."""
    command = [sys.executable, "benchmarks/profile_gpu.py", "--device", device]
    command += [name for name in names if name != "reference"]
    skip = without_gpu(device)
    return Step("profile", command, PROFILE_SECONDS, counts=False, skip=skip, informs=True)


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
        if self.step.unable and self.step.unable in text:
            return Result(self.step, "skipped", f"{self.step.name}: {self.step.unable}")
        reason = self.failure(code, text, summary, seconds)
        if reason and self.step.informs:
            reason = f"{self.step.name}: {reason if code is None else last_line(text) or reason}"
            return Result(self.step, "skipped", reason, summary, seconds)
        return Result(self.step, "FAILED" if reason else "passed", reason, summary, seconds)

    def failure(self, code: int | None, text: str, summary: str, seconds: float) -> str:
        """What is wrong with how it ended, or nothing."""
        if code is None:
            return f"stopped after {seconds:.0f} s"
        if code == SANITIZER_EXIT and not re.search("failed|error", summary) and all_in_torch(text):
            code = 0
        if code:
            return f"exit status {code}"
        if self.step.counts and not re.search(r"[1-9]\d* (passed|cases)", summary):
            return "nothing ran"
        return ""

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


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def all_in_torch(text: str) -> bool:
    """Whether what compute-sanitizer reports, and it reports something, is in torch's kernels."""
    reports = [PLACE.findall(report) for report in REPORT.findall(text)]
    places = ["".join(place) for report in reports for place in report]
    return all(reports) and bool(places) and all(map(TORCH.match, places))


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
    elif result.step.informs and result.seconds:
        print(result.step.log.read_text(errors="replace"), end="", flush=True)


def verdict(results: Sequence[Result]) -> str:
    """The one line."""
    states = Counter(result.state for result in results)
    reasons = dict.fromkeys(result.reason for result in results if result.state == "skipped")
    line = f"test-gpu: {states['passed']} passed, {states['FAILED']} failed"
    return f"{line}, {states['skipped']} skipped ({'; '.join(reasons)})" if reasons else line


def run_all(device: str, fuzz_minutes: float, only: str) -> list[Result]:
    """Every step whose name contains ``only``; nothing after a failed build."""
    tested = time.monotonic() + BUILD_SECONDS + max(STEP_SECONDS, 60 * fuzz_minutes + 180)
    results: list[Result] = []

    def keep(steps: Sequence[Step], end: float = tested) -> bool:
        wanted = [step for step in steps if only in step.name]
        for result in run(wanted, end, slots=max(os.cpu_count() or 1, 2)):
            report(result)
            results.append(result)
        return all(result.state != "FAILED" for result in results)

    if keep([build(device)]):
        (found,) = run([serving(device)], tested, slots=1)
        if found.state == "FAILED":
            report(found)
            return [*results, found]
        names = json.loads(found.step.log.read_text().splitlines()[-1])
        keep(tests(device, names, fuzz_minutes))
        keep([profile(device, names)], tested + LEFT_SECONDS)
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
            f"hypothesis, pybind11, ninja, nvcc and a C++17 compiler: {reason}"
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
