"""The plot of the toy study."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean, geometric_mean

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from toy.control import HORIZON, TASKS
from toy.report import Study, Training, bias, frozen_variance

COLORS = ("tab:blue", "tab:cyan", "tab:green", "tab:orange", "tab:red")


def _draw_training(axes: Axes, study: Study, value: Callable[[Training], float]) -> None:
    """Fifty points: the geometric mean over seeds as a line, their range as a band."""
    for gamma, color in zip(study.gammas, COLORS, strict=True):
        runs = []
        for seed in study.seeds:
            rows = [r for r in study.training if (r.gamma, r.seed) == (gamma, seed)]
            width = max(1, len(rows) // 50)
            parts = [rows[i : i + width] for i in range(0, len(rows), width)]
            runs.append([fmean(map(value, part)) for part in parts])
            ends = [part[-1].iteration for part in parts]
        points = list(zip(*runs, strict=True))
        middle = [geometric_mean(point) for point in points]
        axes.plot(ends, middle, color=color, label=f"gamma = {gamma:g}")
        axes.fill_between(
            ends, list(map(min, points)), list(map(max, points)), color=color, alpha=0.2, lw=0
        )
    axes.set(xlabel="iteration", yscale="log")


def _draw_trade(axes: Axes, study: Study) -> None:
    right = axes.twinx()
    for curve, side, color in ((bias, axes, "tab:purple"), (frozen_variance, right, "tab:brown")):
        runs = [curve(study, seed) for seed in study.seeds]
        for run in runs:
            side.plot(study.gammas, [run[g] for g in study.gammas], "o", color=color, alpha=0.4)
        means = [fmean(run[g] for run in runs) for g in study.gammas]
        side.plot(study.gammas, means, color=color)
        side.tick_params(axis="y", labelcolor=color)
        side.spines["top"].set_visible(False)
    axes.set_ylabel("relative bias", color="tab:purple")
    axes.set(xlabel="gamma", xticks=study.gammas, title="Bias and variance at the same students")
    right.set_ylabel("variance over that of gamma = 0", color="tab:brown")
    right.set_yscale("log")


def _draw_visits(axes: Axes, study: Study) -> None:
    who = [(f"{gamma:g}", color, "-") for gamma, color in zip(study.gammas, COLORS, strict=True)]
    who.append(("teacher", "black", "--"))
    steps = range(HORIZON + 1)
    for task in TASKS:
        axes.axhline(task.target, color="tab:gray", lw=0.8, ls=":")
        for name, color, style in who:
            rows = [v for v in study.visits if (v.who, v.task) == (name, task.name)]
            mean = [fmean(v.mean for v in rows if v.step == step) for step in steps]
            std = [fmean(v.std for v in rows if v.step == step) for step in steps]
            label = name if (name, task) == ("teacher", TASKS[0]) else None
            axes.plot(steps, mean, color=color, ls=style, lw=1.2, label=label)
            low, high = ([m + sign * d for m, d in zip(mean, std, strict=True)] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=color, alpha=0.1, lw=0)
    axes.set(xlabel="step of the trajectory", xticks=range(0, HORIZON + 1, 5))
    axes.set(ylabel="state, mean and std", title="Trajectories after training")
    axes.legend(loc="center right")


def draw_study(path: Path, study: Study) -> None:
    """Draw variance, learning, the trade-off and the trajectories as a PNG."""
    figure, grid = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    (variance, learning), (trade, visits) = grid
    _draw_training(variance, study, lambda row: row.variance)
    variance.set(title="Variance of the output layer's gradient", ylabel="sum over coordinates")
    variance.legend(ncols=2)
    _draw_training(learning, study, lambda row: row.reverse_kl)
    learning.set(title="KL(student || teacher) on own trajectories", ylabel="nats per trajectory")
    _draw_trade(trade, study)
    _draw_visits(visits, study)
    for axes in (variance, learning, visits):
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
