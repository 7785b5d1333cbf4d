"""``python -m opd_kernels``: prints what is installed and checks that it computes right.

Prints versions, devices and backends, what the build left out, and why. Then checks every backend
on every device that it serves against float64. The checks take ten seconds, or longer on a slow
machine. Exit status: 0 no check failed, 1 a check failed, 2 nothing could be checked or the
arguments are wrong.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import platform
import random
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import opd_kernels
from opd_kernels import backends, testing
from opd_kernels.backends import _build, cpu
from opd_kernels.testing import Case
from opd_kernels.testing.cases import REAL_WIDTHS, draw_case, snippet

FLOAT32 = (torch.float32,)
# The fewest cases that each backend is checked on, however slow the machine. Triton has fewer: it
# compiles kernels for seconds before nearly every case.
LEAST_CASES = 30
LEAST_COMPILED_CASES = len(REAL_WIDTHS)


def devices() -> list[torch.device]:
    """The CPU and each GPU that torch sees."""
    found = [torch.device("cpu")]
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        if module.is_available():
            found += [torch.device(kind, index) for index in range(module.device_count())]
    return found


def versions() -> Iterator[str]:
    """The lines about versions and compiled kernels."""
    system = f"{platform.system()} {platform.machine()}"
    yield f"opd_kernels {opd_kernels.__version__} in {Path(opd_kernels.__file__).parent}"
    yield f"Python {platform.python_version()}, {system}"
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError as error:
        triton = f"missing ({error})"
    cuda = torch.version.cuda or "none"
    yield f"torch {torch.__version__} for CUDA {cuda}, triton {triton}"
    yield cpu_kernels()
    try:
        module = importlib.import_module("opd_kernels._cuda")
    except ImportError:
        yield "CUDA kernels missing; the list of backends says why"
        return
    runtime, driver = module.runtime_version, module.driver_version()
    yield (
        f"CUDA kernels for {module.architectures}, runtime {_cuda_version(runtime)}, "
        f"driver {_cuda_version(driver) if driver else 'missing'}"
    )


def cpu_kernels() -> str:
    """The line about the compiled module for CPUs."""
    if cpu.backend.unavailable() is not None:
        return "CPU kernels missing; the list of backends says why"
    reason = cpu.single_threaded()
    threads = "OpenMP" if reason is None else f"one thread: {reason}"
    compiler = _build.record().get("compiler", "an unknown compiler")
    return f"CPU kernels built with {compiler}, {threads}"


def _cuda_version(number: int) -> str:
    """CUDA's version number as text: 13000 gives 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"


def describe(device: torch.device) -> str:
    """The line about a device: its name, its size and what it can run."""
    if device.type == "cpu":
        sets = ", ".join(cpu.instruction_sets())
        kernels = f"uses {cpu.INSTRUCTION_SET} of {sets}" if sets else "no compiled kernels"
        count = torch.get_num_threads() if cpu.single_threaded() is None else 1
        threads = "1 thread" if count == 1 else f"{count} threads"
        return f"cpu: {_cpu_name()}, {threads}, {kernels}"
    properties = getattr(torch, device.type).get_device_properties(device)
    line = f"{device}: {properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    if device.type == "cuda":
        line += f", compute capability {properties.major}.{properties.minor}"
        line += f", {properties.multi_processor_count} multiprocessors"
    return line


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def availability(name: str, found: list[torch.device]) -> str:
    """The devices that a backend serves, and why it does not serve others that it is made for."""
    module = backends.load(name)
    kinds = [kind for kind, natives in backends.NATIVE.items() if name in natives]
    refusals = {device: module.refusal(device, FLOAT32, 1) for device in found}
    parts = []
    served = [str(device) for device, reason in refusals.items() if reason is None]
    if served:
        parts.append(f"available on {', '.join(served)}")
    for device, reason in refusals.items():
        if reason is not None and device.type in kinds:
            parts.append(f"not on {device}: {reason}")
    if not parts:
        missing = getattr(module, "unavailable", lambda: None)()
        parts.append(f"not available: {missing or 'torch sees no device for it'}")
    return "; ".join(parts)


def default(device: torch.device, *, hidden: bool = False) -> str:
    """The name of the backend that ``backend=None`` takes, for logits or hidden states."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = backends.resolve(backends.AUTO, device, FLOAT32, 1, hidden=hidden)
    return next(name for name in backends.MODULES if backends.load(name) is module)


def defaults(device: torch.device) -> str:
    """The line about ``backend=None``; hidden states are named if they get another backend."""
    for_logits, for_hidden = default(device), default(device, hidden=True)
    line = f"backend=None on {device} takes {for_logits!r}"
    return line if for_hidden == for_logits else f"{line}, for hidden states {for_hidden!r}"


@dataclass
class Outcome:
    """The cases that a backend passed on a device, and the one that failed."""

    backend: str
    device: torch.device
    cases: int = 0
    failure: tuple[Case, Exception] | None = None


def check(name: str, device: torch.device, seconds: float) -> Outcome:
    """Checks cases until one fails, or until time is up and enough cases have passed."""
    outcome = Outcome(name, device)
    end, generator = time.monotonic() + seconds, random.Random(0)
    least = LEAST_COMPILED_CASES if name == "triton" else LEAST_CASES
    random_cases = (draw_case(generator, float64=name == "reference") for _ in itertools.count())
    for number, case in enumerate(itertools.chain(REAL_WIDTHS, random_cases)):
        if testing.serves(case, name, device):
            try:
                testing.check(case, name, device)
            except Exception as error:
                outcome.failure = case, error
                break
            outcome.cases += 1
        # A backend that refuses every case would never pass enough of them.
        if time.monotonic() > end and (outcome.cases >= least or number >= 100 * least):
            break
    return outcome


def check_all(found: list[torch.device], seconds: float) -> int:
    """Checks and prints every backend on every device that it serves; returns the exit status."""
    pairs = [
        (name, device)
        for device in found
        for name in backends.MODULES
        if backends.load(name).refusal(device, FLOAT32, 1) is None
    ]
    outcomes: list[Outcome] = []
    for name, device in pairs:
        start = time.monotonic()
        outcome = check(name, device, seconds / len(pairs))
        outcomes.append(outcome)
        took = f"{outcome.cases:6} cases in {time.monotonic() - start:4.1f} s"
        verdict = "FAILED on the next" if outcome.failure else "no failure"
        print(f"  {name:10} {device!s:8} {took}, {verdict}", flush=True)
    failed = False
    for outcome in outcomes:
        if outcome.failure is not None:
            failed = True
            case, error = outcome.failure
            print(
                f"\nFAILED: {outcome.backend} on {outcome.device}, {type(error).__name__}: {error}"
            )
            print("This program repeats it:\n")
            print(snippet(case, outcome.backend, str(outcome.device), error))
    if failed:
        print("Please report this with everything that is printed here.")
        return 1
    if not any(outcome.cases for outcome in outcomes):
        print("Nothing could be checked.")
        return 2
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m opd_kernels", description=__doc__)
    parser.add_argument(
        "--no-check", action="store_true", help="print versions and backends, check nothing"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        help="time for all checks; slow machines take longer (default: 10)",
    )
    options = parser.parse_args(arguments)
    if not (options.seconds > 0 and math.isfinite(options.seconds)):
        parser.error(f"--seconds is {options.seconds}, allowed are finite numbers above 0")

    for message in (
        "k=1: a support of one entry",
        'reverse KL with outside="truncate"',
        "opd_kernels runs on one thread",
    ):
        warnings.filterwarnings("ignore", message=message)
    found = devices()
    for line in versions():
        print(line)
    for device in found:
        print(describe(device))
    print("\nbackends")
    for name in backends.MODULES:
        print(f"  {name:10} {availability(name, found)}")
    for device in found:
        print(f"  {defaults(device)}")
    if _build.record().get("missing"):
        print("  to reinstall: pip install --force-reinstall --no-deps --no-cache-dir SOURCE")
    if options.no_check:
        return 0
    print("\nchecks against float64", flush=True)
    return check_all(found, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
