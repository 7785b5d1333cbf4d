"""CPU benchmark of losses with full softmaxes from hidden states, with yardsticks in the same run.

    python benchmarks/family.py [--quick] [--threads 2] [--rounds 9]

The student is hidden states and a trained head, the teacher's support and log-sum-exps are given,
the loss is the bucket, reduced by its mean. Yardsticks: ``linear_topk_rkl``'s backward; the head
with careful eager, which needs the student's logits; the chunked matrix products that the exact
background is made of, alone and into memory that is there. ``score_ids`` is beside its product.

What is compared is timed in turn, round by round, with the caches full of something else. A ratio
is the median of the rounds' ratios. The gradients of the exact background were compared with those
of eager before. ``--quick`` runs the path on tiny shapes; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from heads import HeadPoint, head_of, shared_ids
from timing import cold
from torch import Tensor
from torch.nn.functional import linear

from opd_kernels import LinearLogits, TopK, linear_topk_rkl, score_ids, topk_divergence

WORKSPACE = 64 << 20  # bytes of logits that exist at a time
Call = Callable[[], object]


def eager_bucket(logits: Tensor, teacher: TopK) -> Tensor:
    """One log-sum-exp, K gathered logits, and the tail from what they leave."""
    whole = logits.logsumexp(-1, keepdim=True)
    a = logits.gather(-1, teacher.ids.long()) - whole
    assert teacher.logsumexp is not None
    assert teacher.tail_logsumexp is not None
    b = teacher.logits - teacher.logsumexp[:, None].float()
    a_tail = torch.log1p(-a.exp().sum(-1).clamp(max=1 - 2.0**-24))
    b_tail = (teacher.tail_logsumexp - teacher.logsumexp).float()
    return ((a.exp() * (a - b)).sum(-1) + a_tail.exp() * (a_tail - b_tail)).mean()


def chunked_products(
    hidden: Tensor, weight: Tensor, kinds: str, workspace: int = WORKSPACE
) -> None:
    """Products with the head in pieces of rows; of "fhw" the logits, and both gradients'."""
    rows = max(workspace // (weight.shape[0] * weight.element_size()), 128)
    logits = hidden.new_zeros(min(rows, len(hidden)), len(weight))
    of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, len(hidden), rows):
        some = hidden[start : start + rows]
        part = logits[: len(some)]
        for kind in kinds:
            if kind == "f":
                torch.mm(some, weight.t(), out=part)
            elif kind == "h":
                torch.mm(part, weight, out=of_hidden[start : start + rows])
            else:
                of_weight.addmm_(part.t(), some)


def measure(calls: dict[str, Callable[[], Call]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, in turn; what prepares a call is not timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, prepare in calls.items():
            call = prepare()
            cold(torch.device("cpu"))
            begin = time.perf_counter()
            call()
            if turn:  # the first is a warm-up
                times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes; figures mean nothing")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each comparison")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    point = HeadPoint(512, 49152, 576, 32, "float32")
    if asked.quick:
        point, asked.rounds = HeadPoint(6, 500, 24, 8, "float32"), 2
    device = torch.device("cpu")
    hidden, weight = (leaf.requires_grad_() for leaf in head_of(point, point.hidden, device))
    frozen = LinearLogits(hidden.detach(), weight.detach())
    student = LinearLogits(hidden, weight)
    logits = linear(hidden, weight).detach()
    teacher = score_ids(logits + torch.randn_like(logits), shared_ids(point, device))
    tokens = logits.softmax(-1).multinomial(1)[:, 0]
    known = logits.logsumexp(-1)
    leaves = hidden, weight

    bucket = partial(topk_divergence, student, teacher, outside="bucket")
    sampled = partial(bucket, background="sampled", token_ids=tokens)
    # Tokens of another row's support, which that row's gradient touches anyway, as in text.
    shared = partial(sampled, token_ids=teacher.ids.roll(1, 0)[:, 0].long())

    def by_row() -> Tensor:
        return bucket(reduction="none")

    expected = torch.autograd.grad(eager_bucket(linear(hidden, weight), teacher), leaves)
    for loss in (bucket(), by_row().mean()):
        for mine, theirs in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
            error = float((mine - theirs).norm() / theirs.norm())
            if not error <= 1e-4:
                raise AssertionError(f"a gradient differs from eager's by {error:.3g}")

    def fresh(call: Call) -> Callable[[], Call]:
        def prepare() -> Call:
            hidden.grad = weight.grad = None
            return call

        return prepare

    def both(loss: Callable[[], Tensor]) -> Callable[[], Call]:
        return fresh(lambda: loss().sum().backward())

    def backward(loss: Callable[[], Tensor]) -> Callable[[], Call]:
        def prepare() -> Call:
            hidden.grad = weight.grad = None
            return loss().backward

        return prepare

    values = hidden.detach(), weight.detach()
    memory = torch.zeros_like(logits)
    groups: list[tuple[dict[str, Callable[[], Call]], list[tuple[str, str]]]] = [
        (
            {
                "linear_topk_rkl, backward": backward(lambda: linear_topk_rkl(*leaves, teacher)),
                "sampled, backward": backward(sampled),
                "sampled, shared tokens, backward": backward(shared),
                "LM head + careful eager": both(
                    lambda: eager_bucket(linear(hidden, weight), teacher)
                ),
                "sampled": both(sampled),
                "sampled, log-sum-exp given": both(partial(sampled, student_logsumexp=known)),
            },
            [
                ("sampled, backward", "linear_topk_rkl, backward"),
                ("sampled, shared tokens, backward", "linear_topk_rkl, backward"),
                ("LM head + careful eager", "sampled"),
                ("LM head + careful eager", "sampled, log-sum-exp given"),
            ],
        ),
        (
            {
                "three chunked products": fresh(partial(chunked_products, *values, "fhw")),
                "exact, mean": both(bucket),
                "four chunked products": fresh(partial(chunked_products, *values, "ffhw")),
                "exact, per row": both(by_row),
            },
            [
                ("exact, mean", "three chunked products"),
                ("exact, per row", "four chunked products"),
            ],
        ),
        (
            {
                "chunked product": fresh(partial(chunked_products, *values, "f")),
                "one product": fresh(partial(torch.mm, values[0], values[1].t(), out=memory)),
                "score_ids": fresh(partial(score_ids, frozen, teacher.ids)),
            },
            [("score_ids", "chunked product"), ("score_ids", "one product")],
        ),
    ]
    print(f"{point}, {asked.threads} threads, torch {torch.__version__}")
    for calls, ratios in groups:
        times = measure(calls, asked.rounds)
        for name, some in times.items():
            print(f"{name:32} {statistics.median(some):9.2f} ms  (least {min(some):.2f})")
        for above, below in ratios:
            each = [a / b for a, b in zip(times[above], times[below], strict=True)]
            print(f"    {above} / {below}: {statistics.median(each):.3f}", flush=True)


if __name__ == "__main__":
    main()
