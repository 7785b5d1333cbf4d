"""Fifteen minutes on a GPU, spent on what is worth most first: ``make gpu``, ``make gpu PART=2``.

    python benchmarks/gpu --part 1 [--output build/gpu] [--seconds 360] [--commit abc123]
    python benchmarks/gpu --part 2                 # after part 1 was read and one thing changed
    python benchmarks/gpu --part 1 --device cpu    # a dry run: emulation, interpreter
    python benchmarks/gpu --modules 90a            # builds the modules to bring along

Needs no network, and of the environment torch, triton, pytest, hypothesis, pybind11 and ninja; the
modules are built with nvcc unless they were brought along. The folder that ``--output`` names gets
a JSON file, a table and an archive of logs for each part. The last line counts what passed. Exit
status 0: no step failed, 1: some did, 2: no GPU. A goal that is missed is no failure.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path

# Modules of this folder are imported as gpu.x, and the package is this checkout's.
ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT / "benchmarks"), str(ROOT)]

from gpu.steps import PARTS, SECONDS  # noqa: E402

PACKAGES = ("torch", "triton", "pytest", "hypothesis", "pybind11", "ninja")


def missing(device: str) -> str:
    """What a run needs and does not find, or nothing."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed for {sys.executable}"
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return ""


def run_part(options: argparse.Namespace) -> int:
    """Runs a part; returns the exit status."""
    from gpu.package import commit
    from gpu.record import Record, step_line
    from gpu.runner import Runner, Setting, plan_text

    reason = missing(options.device)
    if reason:
        print(
            "make gpu needs an NVIDIA GPU and an environment with torch for CUDA, triton, pytest, "
            f"hypothesis, pybind11 and ninja: {reason}"
        )
        return 2
    seconds = SECONDS[options.part] if options.seconds is None else options.seconds
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    work = ROOT / "build" / "gpu-logs" / f"{options.device}-{options.part}"
    shutil.rmtree(work, ignore_errors=True)
    setting = Setting(
        options.device, work, max(os.cpu_count() or 1, 2),
        sanitizer if Path(sanitizer).exists() else None,
    )  # fmt: skip
    steps = [step for step in PARTS[options.part] if options.only in step.name or step.fatal]
    print(plan_text(steps, setting, seconds), flush=True)
    record = Record(options.part, options.output, work, {"commit": options.commit or commit()})
    runner = Runner(setting, seconds)
    try:
        runner.run(
            steps, lambda outcome: (record.keep(outcome), print(step_line(outcome), flush=True))
        )
    finally:
        record.write()
        print("\n" + "\n".join(record.screen()), flush=True)
    return int(record.failed)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, choices=sorted(PARTS), default=1, help="default 1")
    parser.add_argument("--seconds", type=float, help="drops later steps; default 360, part 2 240")
    parser.add_argument("--only", default="", metavar="TEXT", help="steps whose name has this")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--commit", help="where there is no git")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu", help="results")
    parser.add_argument("--modules", metavar="ARCH", help="build modules to bring along, and end")
    # What steps call.
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--package", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--correct", metavar="PIECE,BACKEND,K", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds is {options.seconds:g}, allowed are numbers above 0")
    if not any(options.only in step.name for step in PARTS[options.part]):
        parser.error(f"no step of part {options.part} has {options.only!r} in its name")
    if options.modules:
        from gpu import package

        package.build_ahead(options.modules)
        return 0
    if options.package:
        from gpu import package

        return package.main(options.device)
    if options.worker:
        from gpu import worker

        return worker.main(options.device)
    if options.warm:
        from gpu import warm

        return warm.main(options.device)
    if options.correct:
        from gpu import correct

        piece, backend, k = options.correct.split(",")
        return correct.main(piece, backend, int(k), options.device)
    return run_part(options)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the steps are stopped on the way out
    sys.exit(main())
