"""Peak memory of the forms that ``benchmarks/cpu.py`` times, at the same shape.

    python benchmarks/peak_memory.py [--rows 256 --vocab 151936 --k 64 --dtype bfloat16 --threads 2]

Each form runs forward and backward in a fresh process, after one such call that allocates what is
allocated once (operators, threads, compiled code). Then the peak of the resident set is reset, and
the figure is by how much it grows in a second call. The gradient is part of it for every form, and
is written to once more after backward, as the layer below would read it: memory that comes zeroed
from the system counts in full. Student and teacher logits are there before and do not count.
``--json`` appends a line. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch
from cpu import describe
from peers import careful_eager, naive_eager

from opd_kernels import topk_rkl

FORMS = ("ours", "careful eager", "careful compiled", "naive eager", "naive compiled")


def resident(field: str) -> int:
    """Bytes of a field of this process's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def peak_here(form: str, options: argparse.Namespace) -> int:
    """Bytes by which this process peaks in forward and backward of one form."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape, dtype = (options.rows, options.vocab), getattr(torch, options.dtype)
    student = (torch.randn(shape) * 2.5).to(dtype).requires_grad_()
    teacher = (torch.randn(shape) * 2.5).to(dtype)
    loss = {"ours": topk_rkl, "careful": careful_eager, "naive": naive_eager}[form.split()[0]]
    if form.endswith("compiled"):
        loss = torch.compile(loss)

    def call() -> None:
        loss(student, teacher, options.k).backward()
        student.grad.add_(0)
        student.grad = None

    call()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="append the result as one line to this file")
    parser.add_argument("--form", choices=FORMS, help="measure one form in this process")
    options = parser.parse_args()
    if options.form:
        print(peak_here(options.form, options))
        return
    peaks = {}
    gradient = options.rows * options.vocab * getattr(torch, options.dtype).itemsize
    print(f"{'gradient':18s} {gradient / 1e6:8.1f} MB")
    for form in FORMS:
        command = [sys.executable, *sys.argv, "--form", form]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks[form] = int(done.stdout)
        print(f"{form:18s} {peaks[form] / 1e6:8.1f} MB", flush=True)
    if options.json:
        names = ("rows", "vocab", "k", "dtype", "threads")
        shape = {name: getattr(options, name) for name in names}
        line = {**describe(), **shape, "gradient_bytes": gradient, "peak_bytes": peaks}
        with options.json.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
