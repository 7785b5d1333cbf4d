"""CPU benchmark of ``topk_divergence``'s members that take full softmaxes.

    python benchmarks/divergences.py [--rows 256 --vocab 151936 --k 64 --dtype bfloat16 --threads 2]

After the members, in the same run: careful eager (top-k in the logits' dtype, one float32
log-sum-exp a side) and naive eager (float32 copies, both log-softmaxes). Not in turn with ours,
because a virtual machine may take back the gigabytes that eager frees, and who gets fresh memory
next pays for it. The yardsticks are
what a member has to move: the teacher once, the student twice, a gradient once; so three stream
reads, and memset of a fresh gradient, or of warm memory for ``inplace_grad``. Outputs are checked
against the float64 reference before anything is timed. ``--json`` appends a line.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch
from cpu import SETS, Run, describe, forward, forward_backward, measure
from peers import MEMBERS, as_output, careful_full, check_member, naive_full
from torch import Tensor

from opd_kernels import topk_divergence


def inplace(loss: Any, students: list[Tensor], teachers: list[Tensor], k: int) -> Run:
    """The gradient in the logits' own memory, which holds the logits again in the next round."""

    def run(i: int) -> None:
        loss(as_output(students[i % SETS]), teachers[i % SETS], k, inplace_grad=True).backward()

    return run


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
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each, in turns")
    parser.add_argument("--no-eager", action="store_true", help="leave the peers out")
    parser.add_argument("--json", type=Path, help="append the result as one line to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape, k, dtype = (options.rows, options.vocab), options.k, getattr(torch, options.dtype)
    students = [(torch.randn(shape) * 2.5).to(dtype).requires_grad_() for _ in range(SETS)]
    teachers = [(torch.randn(shape) * 2.5).to(dtype) for _ in range(SETS)]
    words = torch.int16 if dtype.itemsize == 2 else torch.int32
    as_words = [teacher.view(words) for teacher in teachers]
    if teachers[0].nbytes % 8 == 0:
        as_words = [teacher.flatten().view(torch.int64) for teacher in teachers]
    warm = torch.zeros(shape, dtype=dtype)

    runs: dict[str, Run] = {
        "stream read": lambda i: as_words[i % SETS].sum(),
        "memset, fresh": lambda i: torch.empty(shape, dtype=dtype).zero_(),
        "memset, warm": lambda i: warm.zero_(),
    }
    eager: dict[str, Run] = {}
    spare = [student.detach().clone() for student in students]
    for name, (divergence, outside) in MEMBERS.items():
        loss = functools.partial(topk_divergence, divergence=divergence, outside=outside)
        peers = tuple(
            functools.partial(peer, divergence=divergence, outside=outside)
            for peer in (careful_full, naive_full)
        )
        check_member(loss, peers, students[0], teachers[0], k)
        runs[f"{name}, forward"] = forward(loss, students, teachers, k)
        runs[f"{name}, forward + backward"] = forward_backward(loss, students, teachers, k)
        runs[f"{name}, in place"] = inplace(loss, spare, teachers, k)
        if not options.no_eager:
            eager[f"{name}, careful eager"] = forward_backward(peers[0], students, teachers, k)
            eager[f"{name}, naive eager"] = forward_backward(peers[1], students, teachers, k)
    report(measure(runs, options.rounds) | measure(eager, options.rounds), options)


def report(result: dict[str, float], options: argparse.Namespace) -> None:
    """Prints times and ratios; appends them as JSON where asked."""
    reads = 3 * result["stream read"]
    ratios: dict[str, float] = {}
    for name in MEMBERS:
        both = result[f"{name}, forward + backward"]
        ratios[f"{name} / (3 stream reads + fresh memset)"] = both / (
            reads + result["memset, fresh"]
        )
        ratios[f"{name}, in place / (3 stream reads + warm memset)"] = result[
            f"{name}, in place"
        ] / (reads + result["memset, warm"])
        for peer in ("careful eager", "naive eager"):
            if f"{name}, {peer}" in result:
                ratios[f"{name}, {peer} / ours"] = result[f"{name}, {peer}"] / both
    where = describe()
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(
        f"{options.rows} x {options.vocab} {options.dtype}, K = {options.k}, {options.threads} "
        "threads\n"
    )
    for name, ms in result.items():
        print(f"{name:44s} {ms:9.2f} ms")
    print()
    for name, ratio in ratios.items():
        print(f"{name:66s} {ratio:6.2f}")
    if options.json:
        shape = {
            name: getattr(options, name) for name in ("rows", "vocab", "k", "dtype", "threads")
        }
        line = json.dumps({**where, **shape, "milliseconds": result, "ratios": ratios})
        with options.json.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
