"""CPU benchmark of statistics and token log-probs beside ``topk_rkl``, from logits and a head.

    python benchmarks/stats.py [--rows 256 --vocab 151936 --k 64 --hidden 1024 --threads 2]

Forward and backward into a fresh gradient, each beside the loss alone. Then loss, log-prob of the
sampled token and the student's entropy one after the other in eager, after ours and not in turn:
who gets the gigabytes that eager frees pays for them. From hidden states the yardstick is one
product with the head, a few rows at a time. What is timed is checked against float64 before.
``--json`` appends a line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu import SETS, Run, describe, measure
from peers import careful_eager
from torch import Tensor

from opd_kernels import linear_topk_rkl, topk_divergence, topk_rkl
from opd_kernels.backends import plain

MASSES = ("teacher_mass", "student_mass")
ENTROPIES = (*MASSES, "teacher_entropy", "student_entropy")
Total = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def alone(student: Tensor, teacher: Tensor, tokens: Tensor, k: int) -> Tensor:
    return topk_rkl(student, teacher, k)


def with_stats(names: tuple[str, ...]) -> Total:
    """The loss, with some statistics beside it."""

    def total(student: Tensor, teacher: Tensor, tokens: Tensor, k: int) -> Tensor:
        return topk_rkl(student, teacher, k, return_stats=names)[0]

    return total


def with_logprobs(names: tuple[str, ...]) -> Total:
    """The loss and the token's log-prob, both differentiated, with some statistics beside them."""

    def total(student: Tensor, teacher: Tensor, tokens: Tensor, k: int) -> Tensor:
        loss, logprobs, _ = topk_divergence(
            student, teacher, k, token_ids=tokens, return_stats=names, return_token_logprobs=True
        )
        return loss - logprobs.mean()

    return total


def eager(student: Tensor, teacher: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(loss - mean log-prob, entropies), each from the logits themselves."""
    loss = careful_eager(student, teacher, k)
    logprobs = student.float().log_softmax(-1).gather(-1, tokens[:, None])
    with torch.no_grad():
        log_p = student.float().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
    return loss - logprobs.mean(), entropy


RUNS: dict[str, Total] = {
    "loss": alone,
    "masses": with_stats(MASSES),
    "masses, entropies": with_stats(ENTROPIES),
    "masses, entropies, log-probs": with_logprobs(ENTROPIES),
    "log-probs, entropy": with_logprobs(("student_entropy",)),
}


def check(student: Tensor, teacher: Tensor, tokens: Tensor, k: int) -> None:
    """What is benchmarked against float64 on a few rows; raises if they differ."""
    a, b, y = student[:8].detach().requires_grad_(), teacher[:8], tokens[:8]
    loss, logprobs, stats = topk_divergence(
        a, b, k, token_ids=y, return_stats=ENTROPIES, return_token_logprobs=True
    )
    (loss - logprobs.mean()).backward()
    z = a.detach().double().requires_grad_()
    expected = topk_rkl(z, b.double(), k, backend="reference")
    log_p = z.log_softmax(-1)
    expected = expected - log_p.gather(-1, y[:, None]).mean()
    expected.backward()
    torch.testing.assert_close((loss - logprobs.mean()).double(), expected, rtol=1e-5, atol=1e-6)
    eps, largest = torch.finfo(a.dtype).eps, z.grad.abs().amax(-1, keepdim=True)
    if not bool(((a.grad.double() - z.grad).abs() <= eps * z.grad.abs() + 1e-6 * largest).all()):
        raise AssertionError("the gradient is outside its budget")
    log_p, log_q = log_p.detach(), b.double().log_softmax(-1)
    best = b.double().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    for name, values in (
        ("student_mass", log_p.gather(-1, best).exp().sum(-1)),
        ("teacher_mass", log_q.gather(-1, best).exp().sum(-1)),
        ("student_entropy", -(log_p.exp() * log_p).sum(-1)),
        ("teacher_entropy", -(log_q.exp() * log_q).sum(-1)),
    ):
        torch.testing.assert_close(getattr(stats, name).double(), values, rtol=1e-5, atol=1e-7)


def from_hidden_states(options: argparse.Namespace, teachers: list[Tensor]) -> dict[str, Run]:
    """The same with hidden states and a frozen head, and one product with that head."""
    dtype, k = teachers[0].dtype, options.k
    hidden = torch.randn(options.rows, options.hidden).to(dtype).requires_grad_()
    weight = (0.1 * torch.randn(options.vocab, options.hidden)).to(dtype)

    def product(_: int) -> None:
        with torch.no_grad():
            for _ in plain.head_logits(hidden, weight, None, None):
                pass

    def run(names: tuple[str, ...] | bool) -> Run:
        def once(i: int) -> None:
            result: Any = linear_topk_rkl(hidden, weight, teachers[i % SETS], k, return_stats=names)
            (result[0] if names else result).backward()
            hidden.grad = None

        return once

    return {
        "hidden states: head product": product,
        "hidden states: loss": run(False),
        "hidden states: masses": run(MASSES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=256, help="tokens")
    parser.add_argument("--vocab", type=int, default=151936, help="columns of the logits")
    parser.add_argument("--k", type=int, default=64, help="size of the support")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the hidden states")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and the kernels")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each, in turns")
    parser.add_argument("--json", type=Path, help="append the result as one line to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape, k, dtype = (options.rows, options.vocab), options.k, torch.bfloat16
    students = [(torch.randn(shape) * 2.5).to(dtype).requires_grad_() for _ in range(SETS)]
    teachers = [(torch.randn(shape) * 2.5).to(dtype) for _ in range(SETS)]
    tokens = torch.randint(options.vocab, (options.rows,))
    check(students[0], teachers[0], tokens, k)

    def run(total: Callable[..., Tensor]) -> Run:
        def once(i: int) -> None:
            student = students[i % SETS]
            total(student, teachers[i % SETS], tokens, k).backward()
            student.grad = None

        return once

    result = measure({name: run(total) for name, total in RUNS.items()}, options.rounds)
    result |= measure(from_hidden_states(options, teachers), options.rounds)
    peer = {"log-probs, entropy: eager": run(lambda *args: eager(*args)[0])}
    result |= measure(peer, max(options.rounds // 3, 1))
    report(result, options)


def report(result: dict[str, float], options: argparse.Namespace) -> None:
    """Prints times and ratios; appends them as JSON where asked."""
    ratios = {f"{name} / loss": result[name] / result["loss"] for name in RUNS if name != "loss"}
    ours = result["log-probs, entropy"]
    ratios["log-probs, entropy: eager / ours"] = result["log-probs, entropy: eager"] / ours
    more = result["hidden states: masses"] - result["hidden states: loss"]
    product = result["hidden states: head product"]
    ratios["hidden states: what masses add / head product"] = more / product
    where = describe()
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(
        f"{options.rows} x {options.vocab} bfloat16, K = {options.k}, H = {options.hidden}, "
        f"{options.threads} threads, forward + backward\n"
    )
    for name, ms in result.items():
        print(f"{name:44s} {ms:9.2f} ms")
    print()
    for name, ratio in ratios.items():
        print(f"{name:50s} {ratio:6.2f}")
    if options.json:
        shape = {
            name: getattr(options, name) for name in ("rows", "vocab", "k", "hidden", "threads")
        }
        line = json.dumps({**where, **shape, "milliseconds": result, "ratios": ratios})
        with options.json.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
