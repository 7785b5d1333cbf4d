"""What Nsight Compute counts in one forward and one backward call of a backend.

Where a backend cannot be profiled the reason is told: there is no ``ncu`` (on the PATH, in
/usr/local/cuda, in /opt/nvidia/nsight-compute), or no permission to read the counters. Clocks are
left as they are.
"""

from __future__ import annotations

import argparse
import csv
import glob
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from gpu.runner import OWN_GROUP
from opd_kernels import topk_rkl

BENCHMARKS = Path(__file__).resolve().parents[1]
PATHS = [str(BENCHMARKS), str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")]
FINDS_US = {"PYTHONPATH": os.pathsep.join(filter(None, PATHS))}
SECONDS = 35
# Ours and Nsight Compute's names. Shared memory is what the kernel asks for.
METRICS = {
    "ns": ("gpu__time_duration.sum",),
    "dram_percent": ("dram__throughput.avg.pct_of_peak_sustained_elapsed",),
    "read_bytes": ("dram__bytes_read.sum",),
    "written_bytes": ("dram__bytes_write.sum",),
    "warps_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "instructions": ("smsp__inst_executed.sum",),
    "issue_percent": ("smsp__issue_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
    "shared_bytes": ("launch__shared_mem_per_block_static", "launch__shared_mem_per_block_dynamic"),
}
# Of what --print-units base leaves.
UNITS = {"s": 1e9, "second": 1e9, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6}
UNITS |= {"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}

Kernel = dict[str, "float | str"]


def find_ncu() -> str | None:
    """The profiler, the last version of those that are there for themselves."""
    versions = sorted(glob.glob("/opt/nvidia/nsight-compute/*/ncu"), reverse=True)
    candidates = [shutil.which("ncu") or "", "/usr/local/cuda/bin/ncu", *versions]
    return next((path for path in candidates if Path(path).is_file()), None)


def profile(backend: str, *arguments: str) -> tuple[list[Kernel], str]:
    """(what was counted in each kernel, why there is nothing)."""
    ncu = find_ncu()
    if ncu is None:
        return [], "Nsight Compute (ncu) is not installed"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        metrics = ",".join(name for names in METRICS.values() for name in names)
        options = ["--target-processes", "application-only", "--profile-from-start", "off"]
        options += ["--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base"]
        options += ["--log-file", str(log), "--metrics", metrics]
        command = [ncu, *options, sys.executable, "-m", "gpu.profiler", backend, *arguments]
        # A file, not a pipe, which the profiled process would hold open after ncu was stopped.
        printed = Path(folder) / "printed"
        with printed.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | FINDS_US,
                **OWN_GROUP,
            )  # fmt: skip
            try:
                code = process.wait(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return [], f"ncu took longer than {SECONDS} s"
        said = log.read_text(errors="replace") if log.exists() else ""
        output = printed.read_text(errors="replace")
    kernels = parsed(said)
    if kernels:
        return kernels, ""
    return [], reason(f"{output}\n{said}") or f"exit status {code}"


def parsed(log: str) -> list[Kernel]:
    """The rows of the table in a log: a line of names, a line of units, a line for each kernel."""
    lines = log.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    rows = list(csv.DictReader(lines[start:]))
    return [kernel(row, rows[0]) for row in rows[1:] if row.get("Kernel Name")]


def kernel(row: dict[str, str], units: dict[str, str]) -> Kernel:
    """A row of the table under our names; what was not counted is left out."""
    counts: Kernel = {
        "kernel": row["Kernel Name"],
        "block": row.get("Block Size", ""),
        "grid": row.get("Grid Size", ""),
    }
    for ours, names in METRICS.items():
        values = [(row.get(name) or "").replace(",", "") for name in names]
        if all(value[:1].isdigit() for value in values):
            factors = [UNITS.get(units[name].split("/")[0], 1.0) for name in names]
            counts[ours] = sum(float(v) * f for v, f in zip(values, factors, strict=True))
    return counts


def reason(output: str) -> str:
    """The profiler's error, or the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("==ERROR==")]
    return next(iter(errors), "".join(lines[-1:])).removeprefix("==ERROR==").strip()


def call(backend: str, rows: int, vocab: int, k: int, device: torch.device) -> None:
    """What is profiled: a forward and a backward call, after others that compile and warm up."""
    student = torch.randn(rows, vocab, dtype=torch.bfloat16, device=device).mul_(3)
    teacher = torch.randn_like(student).mul_(3)
    student.requires_grad_()
    upstream = torch.ones(rows, device=device)
    start, stop = counters(device)

    def step() -> None:
        loss = topk_rkl(student, teacher, k, reduction="none", backend=backend)
        torch.autograd.grad(loss, student, upstream)

    step()
    start()
    step()
    stop()


def counters(device: torch.device) -> tuple[Callable[[], object], Callable[[], object]]:
    """What begins and ends the part that is profiled."""
    if device.type != "cuda":
        return lambda: None, lambda: None
    torch.cuda.synchronize()
    return torch.cuda.profiler.start, lambda: (torch.cuda.synchronize(), torch.cuda.profiler.stop())


def main() -> None:
    """The process that is profiled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", help="the backend that is called, such as cuda or triton")
    parser.add_argument("--rows", type=int, required=True, help="number of tokens, N")
    parser.add_argument("--vocab", type=int, required=True, help="size of the vocabulary, V")
    parser.add_argument("--k", type=int, required=True, help="size of the support, K")
    parser.add_argument("--device", required=True, help="device of the tensors, such as cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    call(options.backend, options.rows, options.vocab, options.k, device)


if __name__ == "__main__":
    main()
