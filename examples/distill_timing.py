"""What the loss costs the demo: its time on logits, and time and memory with the heads."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from smollm2 import autocast
from torch import Tensor
from torch.nn import functional as F

from opd_kernels import LinearLogits, linear_topk_rkl, select_topk, topk_rkl

Run = Callable[[], object]


def careful_eager(student_logits: Tensor, teacher_logits: Tensor, k: int) -> Tensor:
    """The same loss per row in eager PyTorch, with fp32 copies of K entries a row only."""
    values, ids = torch.topk(teacher_logits, k)
    log_p = student_logits.gather(-1, ids).float().log_softmax(-1)
    log_q = values.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def median_seconds(*runs: Run, repeats: int = 9) -> list[float]:
    """Time of each, taken in turns."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, times in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return [median(times) for times in seconds]


def resident(field: str) -> int:
    """Bytes of this process in RAM: VmRSS now, VmHWM the most since it was reset."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    [line] = [line for line in status.splitlines() if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024


def peak_growth(run: Run) -> int | None:
    """Bytes by which the process grew at most during the run; None where that cannot be asked."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or the run reuses what was freed before, unseen
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
        before = resident("VmRSS")
    except (OSError, TypeError, AttributeError):  # not Linux, or another C library
        return None
    run()
    return resident("VmHWM") - before


@dataclass
class LossTiming:
    """Forward plus backward of the loss alone, on one training batch of logits."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fused: float  # seconds, median
    eager: float  # seconds, median
    checked: int  # rows whose loss and gradient were compared
    agree: bool


def time_loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, k: int) -> LossTiming:
    """Time `topk_rkl` beside `careful_eager`, after comparing what they return."""

    def fused_rows(logits: Tensor) -> Tensor:
        return topk_rkl(logits, teacher_logits, k, mask=mask, reduction="none")

    def fused_mean(logits: Tensor) -> Tensor:
        return topk_rkl(logits, teacher_logits, k, mask=mask)

    def eager_rows(logits: Tensor) -> Tensor:
        return torch.where(mask, careful_eager(logits, teacher_logits, k), 0.0)

    def eager_mean(logits: Tensor) -> Tensor:
        return eager_rows(logits).sum() / mask.sum()

    leaf = student_logits.detach().requires_grad_()
    # torch.topk breaks a tie at the edge of the support as it likes: both answers are right there.
    top = torch.topk(teacher_logits, k + 1).values
    untied = mask & (top[..., k - 1] > top[..., k])
    results = []
    for rows in (fused_rows(leaf), eager_rows(leaf)):
        (gradient,) = torch.autograd.grad(rows.sum(), leaf)
        results.append((rows.detach()[untied], gradient[untied].float()))
    (fused_loss, fused_gradient), (eager_loss, eager_gradient) = results
    # Gradients were rounded to the logits' dtype, 8 bits of mantissa for bf16.
    agree = torch.allclose(fused_loss, eager_loss, rtol=1e-4, atol=1e-5) and torch.allclose(
        fused_gradient, eager_gradient, rtol=2**-7, atol=1e-6
    )
    fused, eager = median_seconds(
        lambda: torch.autograd.grad(fused_mean(leaf), leaf),
        lambda: torch.autograd.grad(eager_mean(leaf), leaf),
    )
    return LossTiming(
        shape=tuple(student_logits.shape),
        dtype=student_logits.dtype,
        fused=fused,
        eager=eager,
        checked=int(untied.sum()),
        agree=agree,
    )


@dataclass
class Form:
    """Both heads and the loss, forward plus backward."""

    seconds: float  # median
    peak_bytes: int | None  # by which the process grew


@dataclass
class HeadTiming:
    """The loss from hidden states, and from the logits that the heads make of them."""

    shape: tuple[int, ...]  # (B, T, H)
    vocab: int
    linear: Form
    logits: Form
    agree: bool


def time_heads(
    hidden: tuple[Tensor, Tensor],
    heads: tuple[Tensor, Tensor],
    mask: Tensor,
    k: int,
    dtype: torch.dtype,
) -> HeadTiming:
    """Time `linear_topk_rkl` beside heads and `topk_rkl`; of student and teacher, heads frozen.

    The logits form keeps both models' logits until it returns, as a plain training step does.
    """
    leaf, teacher_hidden = hidden[0].detach().requires_grad_(), hidden[1].detach()
    head, teacher_head = (weight.detach() for weight in heads)

    def from_hidden() -> Tensor:
        with autocast(dtype):
            teacher = LinearLogits(teacher_hidden, teacher_head)
            loss = linear_topk_rkl(leaf, head, teacher, k, mask=mask)
        return torch.autograd.grad(loss, leaf)[0]

    def from_logits() -> Tensor:
        with autocast(dtype):
            teacher_logits = F.linear(teacher_hidden, teacher_head)
            logits = F.linear(leaf, head)
        loss = topk_rkl(logits, teacher_logits, k, mask=mask)
        return torch.autograd.grad(loss, leaf)[0]

    # On one support and in fp32, for logits in bf16 are rounded and nearly tied ones may change.
    with autocast(dtype):
        support = select_topk(LinearLogits(teacher_hidden, teacher_head), k, mask=mask)
    losses = [
        linear_topk_rkl(leaf, head, support, mask=mask),
        topk_rkl(F.linear(leaf, head), support, mask=mask),
    ]
    ours, theirs = (torch.autograd.grad(loss, leaf)[0] for loss in losses)
    agree = torch.allclose(*losses, rtol=1e-4) and torch.allclose(
        ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item()
    )
    seconds = median_seconds(from_hidden, from_logits, repeats=5)
    linear, logits = (
        Form(time_taken, peak_growth(run))
        for time_taken, run in zip(seconds, (from_hidden, from_logits), strict=True)
    )
    return HeadTiming(tuple(leaf.shape), len(head), linear, logits, agree)
