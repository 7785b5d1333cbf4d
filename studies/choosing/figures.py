"""Figures of the choice of objectives, from lines of the CSV files alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from choosing.arms import BY_NAME
from choosing.intervals import (
    TOKENS,
    Row,
    arms_of,
    at,
    by_seed,
    interval,
    paired,
    probed,
    signal_to_noise,
)
from choosing.plan import ALWAYS, Plan, seen, winner
from choosing.probes import PROBED
from comparison.arms import BEFORE
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

SAMPLED, LSM = ALWAYS
JUDGED = "judge_success"
OBJECTIVES = {"lsm": "LSM", "bucket": "bucket", "sampled": "sampled token"}
COLORS = {"lsm": "C3", "bucket": "C2", "sampled": "C0"}


def draw_choice(path: Path, runs: Sequence[Row], curve: Sequence[Row]) -> None:
    """At the centre: success with intervals, and the student's mass by step."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    arms = arms_of(runs)
    for place, arm in enumerate(reversed(arms)):
        values = list(by_seed(at(runs, arm), JUDGED).values())
        found = interval(values)
        if found is not None:
            axes[0].barh(place, found.mean, xerr=found.half, color=_color(arm), capsize=4)
            axes[0].plot(values, [place] * len(values), "o", color="black", markersize=3)
    before = [float(r["tune_success"]) for r in curve if r["step"] == "0" and r["arm"] in arms]
    if before:
        axes[0].axvline(fmean(before), color="black", linestyle=":", label="before")
        axes[0].legend(fontsize=9)
    axes[0].set_yticks(range(len(arms)), list(reversed(arms)))
    axes[0].set(xlabel="share of judged problems solved", xlim=(0, None))
    for arm in arms:
        _band(axes[1], at(curve, arm), "tune_mass", color=_color(arm), label=arm)
    axes[1].set(xlabel="step", ylabel="student's mass on the teacher's 32 best")
    axes[1].legend(fontsize=8)
    _save(figure, path, axes)


def draw_factors(path: Path, runs: Sequence[Row], plan: Plan) -> None:
    """At every level of every factor: differences to the sampled token of the same seed."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    levels = [("", 0.0), *plan.factors]
    best = winner(seen(runs))
    for shift, arm in enumerate(arm for arm in (LSM, best) if arm is not None):
        label: str | None = arm
        for place, (name, level) in enumerate(levels):
            sampled = at(runs, SAMPLED, name, level) or at(runs, SAMPLED)
            ours = by_seed(at(runs, arm, name, level), JUDGED)
            found = paired(ours, by_seed(sampled, JUDGED))
            if found is not None:
                y = -place - 0.2 * shift
                style = {"fmt": "D", "color": _color(arm), "capsize": 3, "label": label}
                axis.errorbar(found.mean, y, xerr=found.half, **style)
                label = None
    names = [f"{name} {level:g}" if name else "centre" for name, level in levels]
    axis.set_yticks([-i for i in range(len(levels))], names)
    axis.set_xlabel(f"share of judged problems solved, minus that of {SAMPLED}")
    axis.axvline(0, color="black", linewidth=1)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=9)
    _save(figure, path, [axis])


def draw_mechanism(
    path: Path, steps: Sequence[Row], curve: Sequence[Row], probes: Sequence[Row]
) -> None:
    """At the centre: success by step; drift under two objectives; signal to noise."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for arm in arms_of(curve):
        _band(axes[0], at(curve, arm), "tune_success", color=_color(arm), label=arm)
    axes[0].set(xlabel="step", ylabel="share of tuning problems solved")
    axes[0].legend(fontsize=8)
    for name in ("lsm", "bucket"):
        label = f"gradient of {OBJECTIVES[name]}"
        _band(axes[1], at(steps, LSM), f"drift_{name}", color=COLORS[name], label=label)
    axes[1].axhline(0, color="black", linewidth=1)
    axes[1].set(xlabel="step", ylabel=f"dP/dt in logits, on the states of {LSM}")
    axes[1].legend(fontsize=9)
    for place, name in enumerate(PROBED):
        groups = probed(probes, SAMPLED)
        found = interval([signal_to_noise(rows) for (o, _), rows in groups.items() if o == name])
        if found is not None:
            axes[2].bar(place, found.mean, yerr=found.half, color=COLORS[name], capsize=4)
    axes[2].set_xticks(range(len(PROBED)), [OBJECTIVES[name] for name in PROBED])
    axes[2].set_ylabel(f"signal to noise at {TOKENS} tokens, states of {SAMPLED}")
    _save(figure, path, axes)


def draw_failures(
    path: Path, signals: Sequence[Row], reliability: Sequence[Row], compared: Sequence[Row]
) -> None:
    """The paper's three: an imbalanced signal, a teacher that gets lost, special tokens."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for name, label in OBJECTIVES.items():
        rows = [row for row in signals if row["objective"] == name]
        style = {"color": COLORS[name], "label": label}
        _band(axes[0], rows, "share_of_signal", by="share_of_tokens", **style)
    axes[0].set(
        xlabel="share of tokens, those with the largest gradient first",
        ylabel="their share of the gradients' norms",
        xscale="log",
    )
    axes[0].legend(fontsize=9)
    for column, color in (("teacher_success", "C1"), ("student_success", "C4")):
        label = f"finished by the {column.removesuffix('_success')}"
        _band(axes[1], reliability, column, by="written", color=color, label=label)
    axes[1].set(
        xlabel="words that the student has written",
        ylabel="share of problems solved",
        ylim=(0, None),
    )
    axes[1].legend(fontsize=9)
    _special(axes[2], compared)
    _save(figure, path, axes)


def _special(ax: Axes, compared: Sequence[Row]) -> None:
    """The other comparison's pairs, which write special tokens differently, before training."""
    before = [r for r in compared if r["arm"] == BEFORE.name and r["task"] != "smollm2"]
    names = ("reverse_kl", "forward_kl")
    for shift, prefix in enumerate(("", "ordinary_")):
        for place, name in enumerate(names):
            found = interval([float(row[prefix + name]) for row in before])
            if found is not None:
                label = ("all tokens", "without special tokens")[shift] if not place else None
                style = {"color": ("C1", "C4")[shift], "capsize": 4, "label": label}
                ax.bar(place + 0.4 * shift, found.mean, 0.38, yerr=found.half, **style)
    ax.set_xticks([place + 0.2 for place in range(2)], [n.replace("_kl", " KL") for n in names])
    ax.set_ylabel("nats per token, students of the other comparison")
    if before:
        ax.legend(fontsize=9)


def _band(
    ax: Axes, rows: Sequence[Row], column: str, *, color: str, label: str, by: str = "step"
) -> None:
    """The mean over seeds by another column, and its interval."""
    groups: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        groups[float(row[by])].append(float(row[column]))
    xs = sorted(groups)
    found = [interval(groups[x]) for x in xs]
    means = [f.mean for f in found if f]
    halves = [(f.half or 0.0) for f in found if f]
    ax.plot(xs, means, color=color, label=label, linewidth=1.4)
    low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
    ax.fill_between(xs, low, high, color=color, alpha=0.12, linewidth=0)


def _color(arm: str) -> str:
    return to_hex(plt.get_cmap("tab20")(2 * list(BY_NAME).index(arm) % 19))


def _save(figure: plt.Figure, path: Path, axes: Iterable[Axes]) -> None:
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
