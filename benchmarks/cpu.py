"""CPU benchmark of ``topk_rkl`` with its yardsticks in the same run.

    python benchmarks/cpu.py [--rows 256 --vocab 151936 --k 64 --dtype bfloat16 --threads 2]

Yardsticks: a stream read of the teacher, memset of a freshly allocated gradient and of warm memory,
careful eager (top-k in the logits' dtype, log-softmax of K float32 entries) and naive eager
(float32 copies, full log-softmaxes), each also through ``torch.compile``. Inputs rotate through
three sets, so that nothing is found in a cache. Everything is measured in turn, round by round, and
the medians and their ratios are printed: a machine that changes speed changes both sides of a
ratio. A result is printed only after the outputs were checked against the float64 reference.
``--json`` appends a line.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peers import as_output, careful_eager, naive_eager

import opd_kernels
from opd_kernels import select_topk, topk_rkl
from opd_kernels.backends import cpu

SETS = 3
Run = Callable[[int], object]


def contents(rows: int, vocab: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Teachers: random logits with a language model's spread, and the rows that are unusual."""
    ramp = torch.linspace(-10, 10, vocab).expand(rows, vocab)
    cluster = (torch.arange(vocab) // 4096 == 3) * 8.0
    return {
        "random": lambda: torch.randn(rows, vocab) * 2.5,
        "ascending": ramp.clone,
        "descending": ramp.neg,
        "all equal": lambda: torch.zeros(rows, vocab),
        "clustered": lambda: torch.randn(rows, vocab) * 0.1 + cluster,
    }


def forward(loss: Callable[..., torch.Tensor], students: list, teachers: list, k: int) -> Run:
    def run(i: int) -> None:
        with torch.no_grad():
            loss(students[i % SETS], teachers[i % SETS], k)

    return run


def forward_backward(
    loss: Callable[..., torch.Tensor], students: list, teachers: list, k: int
) -> Run:
    def run(i: int) -> None:
        student = students[i % SETS]
        loss(student, teachers[i % SETS], k).backward()
        student.grad = None

    return run


def inplace(students: list, teachers: list, k: int) -> Run:
    """The gradient in the logits' own memory; their values are gone afterwards, only time
    counts."""

    def run(i: int) -> None:
        student = as_output(students[i % SETS])
        topk_rkl(student, teachers[i % SETS], k, inplace_grad=True).backward()

    return run


def measure(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, measured in turn, in another order in each round.

    The memory that one run gives back, or threads that still spin, may cost the next one time.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs.items()), random.Random(0).shuffle
    for round_ in range(rounds + 1):
        shuffle(order)
        for name, run in order:
            start = time.perf_counter()
            run(round_)
            if round_ > 0:  # the first one warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def check(student: torch.Tensor, teacher: torch.Tensor, k: int) -> None:
    """The benchmarked call against float64 on a few rows; raises if they differ."""
    a, b = student[:8].detach().requires_grad_(), teacher[:8]
    topk_rkl(a, b, k).backward()
    z = a.detach().double().requires_grad_()
    expected = topk_rkl(z, b.double(), k, backend="reference")
    expected.backward()
    torch.testing.assert_close(topk_rkl(a, b, k).double(), expected, rtol=1e-5, atol=1e-7)
    tolerance = torch.finfo(a.dtype).eps
    torch.testing.assert_close(a.grad.double(), z.grad, rtol=tolerance, atol=1e-7)
    # The peers compute the same, where no two values tie (torch.topk breaks ties as it likes).
    a, b = torch.randn(8, a.shape[-1]), torch.randn(8, a.shape[-1])
    for peer in (careful_eager, naive_eager):
        torch.testing.assert_close(topk_rkl(a, b, k), peer(a, b, k), rtol=1e-3, atol=1e-5)


def describe() -> dict[str, object]:
    """Machine, versions and commit."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": model,
        "instruction_set": cpu.INSTRUCTION_SET,
        "torch": torch.__version__,
        "opd_kernels": opd_kernels.__version__,
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=256, help="tokens")
    parser.add_argument("--vocab", type=int, default=151936, help="columns of the logits")
    parser.add_argument("--k", type=int, default=64, help="size of the support")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["float32", "float16", "bfloat16"],
        help="of the logits",
    )
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and the kernels")
    parser.add_argument(
        "--rounds", type=int, default=15, help="measurements of each form, in turns"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, help="append the result as one line to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows, vocab, k, dtype = options.rows, options.vocab, options.k, getattr(torch, options.dtype)

    made = contents(rows, vocab)
    students = [(torch.randn(rows, vocab) * 2.5).to(dtype).requires_grad_() for _ in range(SETS)]
    teachers = [made["random"]().to(dtype) for _ in range(SETS)]
    check(students[0], teachers[0], k)

    as_words = [
        teacher.view(torch.int16 if dtype.itemsize == 2 else torch.int32) for teacher in teachers
    ]
    if rows * vocab * dtype.itemsize % 8 == 0:
        as_words = [teacher.flatten().view(torch.int64) for teacher in teachers]
    warm = torch.zeros(rows, vocab, dtype=dtype)
    runs: dict[str, Run] = {
        "stream read": lambda i: as_words[i % SETS].sum(),
        "memset, fresh": lambda i: torch.empty(rows, vocab, dtype=dtype).zero_(),
        "memset, warm": lambda i: warm.zero_(),
        "select": lambda i: select_topk(teachers[i % SETS], k),
        "forward": forward(topk_rkl, students, teachers, k),
        "forward + backward": forward_backward(topk_rkl, students, teachers, k),
        "careful eager": forward_backward(careful_eager, students, teachers, k),
        "naive eager": forward_backward(naive_eager, students, teachers, k),
    }
    if not options.no_compile:
        for name, loss in (("careful", careful_eager), ("naive", naive_eager)):
            compiled = torch.compile(loss)
            runs[f"{name} compiled"] = forward_backward(compiled, students, teachers, k)
    result = measure(runs, options.rounds)
    ratios: dict[str, float] = {}
    for name in list(made)[1:]:
        unusual = [made[name]().to(dtype) for _ in range(SETS)]
        runs = {
            "forward, random": forward(topk_rkl, students, teachers, k),
            "forward + backward, random": forward_backward(topk_rkl, students, teachers, k),
            f"forward, {name}": forward(topk_rkl, students, unusual, k),
            f"forward + backward, {name}": forward_backward(topk_rkl, students, unusual, k),
        }
        times = measure(runs, options.rounds)
        for what in ("forward", "forward + backward"):
            result[f"{what}, {name}"] = times[f"{what}, {name}"]
            ratios[f"{name} / random rows, {what}"] = (
                times[f"{what}, {name}"] / times[f"{what}, random"]
            )
    result |= measure(
        {
            "stream read again": lambda i: as_words[i % SETS].sum(),
            "memset, warm again": lambda i: warm.zero_(),
            "in place": inplace(students, teachers, k),
        },
        options.rounds,
    )
    report(result, ratios, options, describe())


def report(
    result: dict[str, float], unusual: dict[str, float], options: argparse.Namespace, where: dict
) -> None:
    """Prints times, bandwidths and ratios; appends them as JSON where asked."""
    both, stream = result["forward + backward"], result["stream read"]
    again = result["stream read again"] + result["memset, warm again"]
    nbytes = options.rows * options.vocab * getattr(torch, options.dtype).itemsize
    ratios = {
        "forward + backward / (stream read + fresh memset)": both
        / (stream + result["memset, fresh"]),
        "in place / (stream read + warm memset)": result["in place"] / again,
        "forward / stream read": result["forward"] / stream,
    }
    for name in ("careful eager", "naive eager", "careful compiled", "naive compiled"):
        if name in result:
            ratios[f"{name} / ours"] = result[name] / both
    ratios |= unusual
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(
        f"{options.rows} x {options.vocab} {options.dtype}, K = {options.k}, {options.threads} "
        f"threads\n"
    )
    for name, ms in result.items():
        print(f"{name:34s} {ms:9.2f} ms {nbytes / ms / 1e6:8.1f} GB/s of one (N, V)")
    print()
    for name, ratio in ratios.items():
        print(f"{name:52s} {ratio:6.2f}")
    if options.json:
        shape = {
            name: getattr(options, name) for name in ("rows", "vocab", "k", "dtype", "threads")
        }
        line = json.dumps({**where, **shape, "milliseconds": result, "ratios": ratios})
        with options.json.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
