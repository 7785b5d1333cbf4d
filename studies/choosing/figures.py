"""Figures of the choice of objectives, from lines of the CSV files alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from choosing.arms import BUCKET, BY_NAME
from choosing.intervals import (
    PLACES,
    SAMPLINGS,
    TOKENS,
    Row,
    arms_of,
    at,
    by_seed,
    interval,
    last_of_each_seed,
    paired,
    pooled,
    signal_to_noise,
)
from choosing.plan import ALWAYS, Plan, seen, winner
from choosing.probes import PROBED
from comparison.arms import BEFORE
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

SAMPLED, LSM = ALWAYS
SHOWN = ("judge_success", "judge_success_greedy")
NAMES = {"lr": "learning rate", "k": "K", "start": "mass at the start"}
OBJECTIVES = {"lsm": "LSM", "bucket": "bucket", "sampled": "sampled-token"}
PROBED_ARMS = {"lsm": LSM, "bucket": BUCKET.name, "sampled": SAMPLED}
PROBED_ONCE = "lsm"  # what a probe's lines have in common is read off these


def draw_choice(
    path: Path, runs: Sequence[Row], curve: Sequence[Row], before: Sequence[Row]
) -> None:
    """At the centre: success, answers sampled in two ways, and the student's mass by step."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    arms = arms_of(runs)
    for ax, column in zip(axes, SHOWN, strict=False):
        for place, arm in enumerate(reversed(arms)):
            values = list(by_seed(at(runs, arm), column).values())
            found = interval(values)
            if found is None:
                continue
            ax.barh(place, found.mean, color=_color(arm))
            ax.plot(values, [place - 0.2] * len(values), "o", color="black", markersize=3)
            gained = paired(by_seed(at(runs, arm), column), by_seed(at(runs, SAMPLED), column))
            if gained is not None and arm != SAMPLED:
                ax.errorbar(found.mean, place + 0.1, xerr=gained.half, color="black", capsize=3)
                ax.text(1.27, place, str(gained), ha="right", va="center", fontsize=9)
        if before:
            mean = fmean(float(row[column]) for row in before)
            ax.axvline(mean, color="black", linestyle=":", linewidth=1)
        ax.set_yticks(range(len(arms)), list(reversed(arms)) if ax is axes[0] else [""] * len(arms))
        ax.set(xlabel=f"share of judged problems solved, {SAMPLINGS[column]}", xlim=(0, 1.28))
        ax.set_title(f"minus {SAMPLED}", loc="right", fontsize=9)
        ax.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    for arm in arms:
        _band(axes[2], _changes(at(curve, arm), "tune_mass"), "change", **_style(arm))
    axes[2].axhline(0, color="black", linewidth=1)
    axes[2].set(xlabel="step", ylabel="change of the student's mass on the support")
    axes[2].set_ylim(-0.16, None)
    axes[2].legend(fontsize=8, loc="lower right", ncols=2)
    _save(figure, path, axes)


def draw_factors(path: Path, runs: Sequence[Row], plan: Plan) -> None:
    """At every level of every factor: differences to the sampled token of the same seed."""
    figure, axes = plt.subplots(
        1, 2, figsize=(12, 5), layout="constrained", sharex=True, sharey=True
    )
    levels = [("", 0.0), *plan.factors]
    best = winner(seen(runs))
    for ax, column in zip(axes, SHOWN, strict=True):
        for shift, arm in enumerate(arm for arm in (LSM, best) if arm is not None):
            label: str | None = arm
            for place, (name, level) in enumerate(levels):
                sampled = at(runs, SAMPLED, name, level) or at(runs, SAMPLED)
                ours = by_seed(at(runs, arm, name, level), column)
                found = paired(ours, by_seed(sampled, column))
                if found is not None:
                    y = -place - 0.2 * shift
                    style = {"fmt": "D", "color": _color(arm), "capsize": 3, "label": label}
                    ax.errorbar(found.mean, y, xerr=found.half, **style)
                    label = None
        ax.set_xlabel(f"success minus {SAMPLED}'s, {SAMPLINGS[column]}")
        ax.axvline(0, color="black", linewidth=1)
    names = [
        "no clipping" if level == math.inf else f"{NAMES[name]} {level:g}" if name else "centre"
        for name, level in levels
    ]
    axes[0].set_yticks([-i for i in range(len(levels))], names)
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize=9)
    _save(figure, path, axes)


def draw_mechanism(
    path: Path, steps: Sequence[Row], curve: Sequence[Row], probes: Sequence[Row]
) -> None:
    """At the centre: success by step; force on the mass; where it goes; signal to noise."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    success, force, places, noise = axes.flat
    for arm in arms_of(curve):
        _band(success, _changes(at(curve, arm), "tune_success"), "change", **_style(arm))
    success.set(xlabel="step", ylabel="change of the share of tuning problems solved")
    success.legend(fontsize=8)
    for name in ("lsm", "bucket"):
        label = f"gradient of {OBJECTIVES[name]}"
        _band(force, at(steps, LSM), f"drift_{name}", color=_color(PROBED_ARMS[name]), label=label)
    force.axhline(0, color="black", linewidth=1)
    force.set(xlabel="step", ylabel=f"dP/dt in logits, on the states of {LSM}")
    force.legend(fontsize=9)
    _places(places, probes)
    for place, name in enumerate(PROBED):
        values = list(pooled(probes, name, signal_to_noise).values())
        found = interval(values)
        if found is not None:
            noise.bar(
                place, found.mean, yerr=found.half, color=_color(PROBED_ARMS[name]), capsize=4
            )
            noise.plot([place] * len(values), values, "o", color="black", markersize=3)
    noise.set_xticks(range(len(PROBED)), [OBJECTIVES[name] for name in PROBED])
    noise.axhline(0, color="black", linewidth=1)
    noise.set_ylabel(f"gradient's signal to noise at {TOKENS} tokens")
    _save(figure, path, axes.flat)


def _places(ax: Axes, probes: Sequence[Row]) -> None:
    """Mass outside of the support by what it is on: in the first probe, and in each arm's last."""
    bars: dict[str, list[Row]] = {}
    for arm in arms_of(probes):
        rows = [row for row in at(probes, arm) if row["objective"] == PROBED_ONCE]
        if arm == LSM:
            bars = {"before": [row for row in rows if row["step"] == "1"], **bars}
        bars[arm] = last_of_each_seed(rows)
    for place, rows in enumerate(reversed(bars.values())):
        left = 0.0
        for shade, name in enumerate(PLACES):
            mean = fmean(float(row[name]) for row in rows)
            label = name.removeprefix("outside_") if place == 0 else None
            ax.barh(place, mean, left=left, color=str(0.3 + 0.2 * shade), label=label)
            left += mean
    ax.set_yticks(range(len(bars)), list(reversed(bars)))
    ax.set_xlabel("student's mass outside of the support, by what it is on, at the end")
    ax.legend(fontsize=9)


def draw_failures(
    path: Path, signals: Sequence[Row], reliability: Sequence[Row], compared: Sequence[Row]
) -> None:
    """The paper's three: an imbalanced signal, a teacher that gets lost, special tokens."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for name, label in OBJECTIVES.items():
        rows = [row for row in signals if row["objective"] == name]
        style = {"color": _color(PROBED_ARMS[name]), "label": label}
        _band(axes[0], rows, "share_of_signal", by="share_of_tokens", **style)
    axes[0].set(
        xlabel="share of tokens, those with the largest gradient first",
        ylabel="their share of the gradients' norms",
        xscale="log",
        ylim=(0, 1.02),
        title="imbalance",
    )
    axes[0].legend(fontsize=9)
    for column, color in (("teacher_success", "C1"), ("student_success", "0.4")):
        label = f"finished by the {column.removesuffix('_success')}"
        _band(axes[1], reliability, column, by="written", color=color, label=label)
    axes[1].set(
        xlabel="words that the student has written",
        ylabel="share of problems solved",
        ylim=(0, 1.02),
        title="the teacher's reliability",
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
                style = {"color": ("C7", "C9")[shift], "capsize": 4, "label": label}
                ax.bar(place + 0.4 * shift, found.mean, 0.38, yerr=found.half, **style)
    ax.set_xticks([place + 0.2 for place in range(2)], [n.replace("_kl", " KL") for n in names])
    ax.set(ylabel="nats per token, the earlier comparison", title="special tokens")
    if before:
        ax.legend(fontsize=9)


def _band(
    ax: Axes,
    rows: Sequence[Row],
    column: str,
    *,
    color: str,
    label: str,
    by: str = "step",
    shaded: bool = True,
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
    if shaded:
        ax.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)


def _changes(rows: Sequence[Row], column: str) -> list[Row]:
    """Lines with the change of a column since step 0 of the same seed."""
    start = {row["seed"]: float(row[column]) for row in rows if int(row["step"]) == 0}
    return [{**row, "change": str(float(row[column]) - start[row["seed"]])} for row in rows]


def _style(arm: str) -> dict[str, Any]:
    """Of an arm's line; more than two intervals in a panel hide each other."""
    return {"color": _color(arm), "label": arm, "shaded": arm in (LSM, BUCKET.name)}


def _color(arm: str) -> str:
    return to_hex(plt.get_cmap("tab20")(2 * list(BY_NAME).index(arm) % 19))


def _save(figure: plt.Figure, path: Path, axes: Iterable[Axes]) -> None:
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
