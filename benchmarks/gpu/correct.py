"""Does it run at all: every kernel of a backend at one K, small inputs, against float64."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from gpu.steps import HEADS, OUTSIDE, PIECES
from opd_kernels import EntryGradient, LinearLogits, score_ids, select_topk
from opd_kernels.testing import Case, check, inputs, serves

# Odd, so that rows begin at every misalignment; and as wide as real ones, so that few rows are
# spread over clusters.
VOCAB, FEW_VOCAB = 20011, 151669
FEW_ROWS, MANY_ROWS, FAMILY_ROWS = (1, 2, 33, 64), 300, 40
DRY_VOCAB, DRY_ROWS = 1501, (1, 3)


def cases(piece: str, backend: str, k: int, device: str) -> Iterator[Case]:
    """What is tried, the plainest first."""
    if piece in (*OUTSIDE, HEADS):
        yield from full_heads(k, device) if piece == HEADS else members(piece, k, device)
        return
    dry = device == "cpu"
    few, many = [(rows, FEW_VOCAB) for rows in FEW_ROWS], (MANY_ROWS, VOCAB)
    if dry:
        few, many = [(DRY_ROWS[0], DRY_VOCAB)], (DRY_ROWS[1], DRY_VOCAB)
    for rows, vocab in few if piece == "few rows" else [many]:
        plain = Case(
            rows=(rows,), student_vocab=vocab, teacher_vocab=vocab, k=k, reduction="none",
            student_dtype="bfloat16", teacher_dtype="bfloat16",
        )  # fmt: skip
        yield plain
        yield replace(plain, banned="few", mask="bool", temperature="rows", upstream="random")
    if piece == "few rows":
        return
    yield replace(plain, inplace=True, teacher_content="quantised")
    yield replace(plain, teacher="topk_int64")
    yield replace(plain, student_dtype="float32", teacher_dtype="float32", upstream="random")
    yield replace(plain, student_dtype="float16", teacher_dtype="float16", banned="half")
    small = replace(plain, rows=(3,) if dry else (70,), hidden=24 if dry else 192)
    for linear in (small, replace(small, head="bias", frozen=True)):
        if serves(linear, backend, device):
            yield linear


def members(outside: str, k: int, device: str) -> Iterator[Case]:
    """Every divergence that goes with ``outside``, and what else its kernels are asked for."""
    dry = device == "cpu"
    rows, vocab = (DRY_ROWS[1], DRY_VOCAB) if dry else (FAMILY_ROWS, VOCAB)
    kinds = {"generalize": inputs.WITHOUT_SKEW, "sample": inputs.SAMPLED}
    for divergence in kinds.get(outside, inputs.MEMBERS):
        plain = Case(
            rows=(rows,), student_vocab=vocab, teacher_vocab=vocab, k=k, reduction="none",
            student_dtype="bfloat16", teacher_dtype="bfloat16", divergence=divergence,
            outside=outside, token="likely" if outside == "sample" else "none",
        )  # fmt: skip
        yield plain
    yield replace(plain, banned="few", mask="bool", temperature="rows", upstream="random")
    yield replace(plain, student_dtype="float32", teacher_dtype="float16", inplace=True)
    yield replace(plain, clip=2.0, floor=-9.0, upstream="random", support="student")
    yield replace(plain, teacher="topk_int64", carried="tail")
    if outside != "renormalize" and not dry:  # rows of which each is spread over a cluster
        yield replace(plain, rows=(2,), student_vocab=FEW_VOCAB, teacher_vocab=FEW_VOCAB)
    yield replace(plain, watched=True, k=9)


def full_heads(k: int, device: str) -> Iterator[Case]:
    """Full softmaxes from hidden states: what is computed once, by pieces, or at K + 1 ids."""
    dry = device == "cpu"
    rows, vocab = (2, 301) if dry else (FAMILY_ROWS, VOCAB)
    # In 16 bits hidden states and weights are small integers: PyTorch may add up parts of a product
    # in 16 bits, which the budgets of others do not allow for.
    exact = {"student_dtype": "bfloat16", "student_content": inputs.EXACT}
    mean = Case(
        rows=(rows,), student_vocab=vocab, teacher_vocab=vocab, k=k, hidden=24 if dry else 192,
        divergence="reverse_kl", outside="bucket", teacher="topk_int32", carried="both",
        teacher_temperature="one",
    )  # fmt: skip
    each = replace(mean, reduction="none", mask="bool", temperature="rows", upstream="random")
    sampled = replace(each, background="sampled", token="any", temperature="float")
    for plain in (mean, each, sampled):
        yield plain
        yield replace(plain, teacher="linear", head="all")
    yield replace(mean, **exact)
    yield replace(sampled, **exact, logsumexp="float32", watched=True)
    yield replace(mean, student_content=inputs.EXACT, teacher="linear", support="student")
    yield replace(mean, token="any", logsumexp="float64", frozen=True)
    yield replace(mean, divergence="jsd", outside="truncate", vocab_size=vocab - 7)


def check_scores(backend: str, k: int, device: str) -> None:
    """``score_ids`` of logits and of a head beside float64; the products are exact."""
    generator = torch.Generator().manual_seed(k)
    hidden, weight = (
        torch.randint(-2, 3, (n, 24), generator=generator).float() for n in (5, DRY_VOCAB)
    )
    ids = torch.rand(5, DRY_VOCAB, generator=generator).topk(k).indices
    logits = hidden.double() @ weight.double().t()
    wanted = logits.gather(-1, ids), (logits / 0.7).logsumexp(-1)
    head = LinearLogits(hidden.to(device), weight.to(device))
    for source in (head, logits.float().to(device)):
        found = score_ids(source, ids.to(device), temperature=0.7, backend=backend)
        assert found.logsumexp is not None
        for mine, exact in zip((found.logits, found.logsumexp), wanted, strict=True):
            torch.testing.assert_close(mine.double().cpu(), exact, rtol=1e-6, atol=1e-6)


def check_adding(backend: str, k: int, device: str) -> None:
    """The third form of the gradient's kernel: added to what is there, as the reference does."""
    generator = torch.Generator().manual_seed(k)
    teacher, grad = (torch.randn(5, 2003, generator=generator) for _ in range(2))
    entries, upstream = torch.randn(5, k, generator=generator), torch.rand(5, generator=generator)
    added = []
    for name, where in (("reference", "cpu"), (backend, device)):
        ids = select_topk(teacher.to(where), k, backend=name).ids
        there = grad.to(where, copy=True)
        EntryGradient(ids, entries.to(where)).add_to_(there, upstream.to(where), backend=name)
        added.append(there.cpu())
    torch.testing.assert_close(added[1], added[0])


def main(piece: str, backend: str, k: int, device: str) -> int:
    """Prints each case before it runs: a kernel that hangs is the last one."""
    if device == "cpu":
        from gpu import dry

        dry.install()
    begin, count = time.monotonic(), 0
    for case in cases(piece, backend, k, device):
        print(f"{time.monotonic() - begin:5.1f} s  {case}", flush=True)
        check(case, backend, device)
        count += 1
    others = {HEADS: check_scores} | dict.fromkeys(PIECES, check_adding)
    if piece in others:
        others[piece](backend, k, device)
        count += 1
    print(f"{count} passed in {time.monotonic() - begin:.1f}s")
    return 0
