"""What the demo leaves behind: a table, the metrics of every step, and a plot."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from distill_timing import HeadTiming, LossTiming
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

Evaluation = Mapping[str, Tensor]  # metric -> per-sequence values
LABELS = {
    "reverse_kl": "reverse KL, full vocabulary",
    "forward_kl": "forward KL, full vocabulary",
    "student_mass": "student mass on the support",
    "teacher_mass": "teacher mass on the support",
    "loss": "loss (topk_rkl)",
}


@dataclass
class Step:
    """One optimiser step; `loss` is cross-entropy in the warm start, then the distillation's."""

    phase: str
    step: int
    loss: float
    tokens: int  # response tokens
    seconds: float
    student_mass: float | None = None
    teacher_mass: float | None = None
    heldout_reverse_kl: float | None = None  # after this step, where it was measured


def write_metrics(path: Path, steps: Sequence[Step]) -> None:
    """Write one CSV row per step."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Step)])
        writer.writeheader()
        writer.writerows(asdict(step) for step in steps)


def heldout_table(name: str, before: Evaluation, after: Evaluation) -> list[str]:
    """Lines that compare the means over the held-out sequences called `name`."""
    lines = [
        "",
        f"held-out, {name} ({len(before['loss'])} sequences)",
        f"  {'per token':<30}{'before':>9}{'after':>9}{'change':>9}",
    ]
    for metric, label in LABELS.items():
        old, new = before[metric].mean().item(), after[metric].mean().item()
        # A frozen teacher on fixed sequences does not change.
        change = "" if metric == "teacher_mass" else f"{(new - old) / old:>+9.1%}"
        lines.append(f"  {label:<30}{old:>9.4f}{new:>9.4f}{change}")
    return lines


def loss_lines(timing: LossTiming) -> list[str]:
    """Lines on the time of the loss; a speed-up only where the outputs agreed."""
    dtype = str(timing.dtype).removeprefix("torch.")
    lines = [
        "",
        f"loss, forward and backward, logits {shape_text(timing.shape)} {dtype}",
        f"  topk_rkl       {timing.fused * 1e3:8.1f} ms",
        f"  careful eager  {timing.eager * 1e3:8.1f} ms",
    ]
    if timing.agree:
        lines.append(
            f"  speed-up       {timing.eager / timing.fused:8.1f} x "
            f"(loss and gradient agree on the {timing.checked} rows without a tie at the edge)"
        )
    else:
        lines.append("  LOSS OR GRADIENT DIFFER: no speed-up to report")
    return lines


def head_lines(timing: HeadTiming) -> list[str]:
    """Lines on time and memory of heads and loss together."""
    lines = [
        "",
        f"heads and loss, forward and backward, hidden states {shape_text(timing.shape)}, "
        f"{timing.vocab} ids, heads frozen",
    ]
    for name, form in (("linear_topk_rkl", timing.linear), ("heads, topk_rkl", timing.logits)):
        line = f"  {name:<15}{form.seconds * 1e3:8.1f} ms"
        if form.peak_bytes is not None:
            line += f"   the process grows by {form.peak_bytes / 1e6:.0f} MB"
        lines.append(line)
    if timing.agree:
        lines.append("  loss and gradient agree on one support, in float32")
    else:
        lines.append("  LOSS OR GRADIENT DIFFER")
    return lines


def shape_text(shape: Sequence[int]) -> str:
    """Sizes as one writes them."""
    return " x ".join(str(size) for size in shape)


def write_timings(path: Path, loss: LossTiming, heads: HeadTiming) -> None:
    """Write one CSV row per measured form; memory only where it was measured."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "form", "seconds", "peak_bytes", "agree"])
        writer.writerow(["loss", "topk_rkl", loss.fused, None, loss.agree])
        writer.writerow(["loss", "careful eager", loss.eager, None, loss.agree])
        for name, form in (("linear_topk_rkl", heads.linear), ("heads, topk_rkl", heads.logits)):
            writer.writerow(["heads and loss", name, form.seconds, form.peak_bytes, heads.agree])


def _plot_loss(axes: Axes, steps: Sequence[Step]) -> None:
    axes.plot([s.step for s in steps], [s.loss for s in steps], color="tab:blue")
    axes.set(title="Training loss on own rollouts", ylabel="per token (nats)")


def _plot_mass(axes: Axes, steps: Sequence[Step]) -> None:
    for who, color in (("teacher", "tab:gray"), ("student", "tab:orange")):
        mass = [getattr(s, f"{who}_mass") for s in steps]
        axes.plot([s.step for s in steps], mass, color=color, label=who)
    axes.set(title="Mass on the teacher's top K", ylabel="probability mass", ylim=(None, 1.0))
    axes.legend(loc="upper left", ncols=2)


def _plot_heldout(axes: Axes, steps: Sequence[Step], before: float) -> None:
    points = [(s.step, s.heldout_reverse_kl) for s in steps if s.heldout_reverse_kl is not None]
    x, y = zip((0, before), *points, strict=True)
    axes.axhline(before, color="tab:gray", linestyle="--", linewidth=1, label="before")
    axes.plot(x, y, color="tab:green", marker="o", label="during the on-policy phase")
    axes.set(
        title="Held-out KL(student || teacher)",
        ylabel="full vocabulary, per token (nats)",
        ylim=(0, 1.15 * max(y)),
    )
    axes.annotate(f"{y[-1] / before - 1:+.0%}", (x[-1], y[-1]), (0, -16), ha="right",
                  textcoords="offset points", color="tab:green")  # fmt: skip
    axes.legend(loc="lower left")


def draw_curves(path: Path, steps: Sequence[Step], heldout_before: float) -> None:
    """Draw loss, mass on the support and held-out reverse KL of the on-policy phase as a PNG."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 4), layout="constrained")
    _plot_loss(left, steps)
    _plot_mass(middle, steps)
    _plot_heldout(right, steps, heldout_before)
    for axes in (left, middle, right):
        axes.set_xlabel("on-policy step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
