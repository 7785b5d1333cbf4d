"""The comparison's CSV files, and the table and plots that are made of nothing else."""

from __future__ import annotations

import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from comparison.arms import ARMS, BEFORE, SAMPLED_TOKEN, TEACHER
from comparison.training import CLIP_NORM, MICRO_BATCHES, POSITIONS
from matplotlib.axes import Axes

Row = dict[str, str]
FILES = ("runs.csv", "steps.csv", "positions.csv")
FEWEST_TOKENS = 100  # that a point of the plot by position is the mean of
STEP_EVERY = 5  # of the steps' rows, that many are averaged into one that is kept
ORDER = [TEACHER.name, BEFORE.name, *(arm.name for arm in ARMS)]
COLORS = dict(
    zip(ORDER, ("gray", "black", *(f"C{i}" for i in (0, 1, 2, 3, 4, 5, 6, 8))), strict=True)
)
# It collapses: panels are scaled to the others, which it leaves.
OFF_SCALE = "no renormalisation + top-p"
# Two ways to sample the held-out answers, and the 97.5 % points of Student's t by number of values.
SUCCESS = {"success": "whole distribution", "success_top_p": "nucleus of 0.9"}
T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306}
# Columns that are means over a run's steps.
OF_STEPS = ("grad_norm", "grad_variance", "seconds")
COLUMNS = {
    "success": "success",
    "success_top_p": "top-p 0.9",
    "success_greedy": "greedy",
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "teacher_score": "teacher's score",
    "ordinary_reverse_kl": "reverse KL, ordinary",
    "ordinary_forward_kl": "forward KL, ordinary",
    "ordinary_teacher_score": "score, ordinary",
    "student_mass": "student mass",
    "length": "length",
    "grad_norm": "grad norm",
    "grad_norm_deviation": "its deviation",
    "clipped": "steps clipped",
    "grad_variance": "grad variance",
    "relative_variance": "relative variance",
    "tokens": "tokens",
}


LEGEND = """\
Means over seeds ± half of their range; one teacher and one set of 128 held-out problems (SmolLM2:
32 prompts) serve all. K is 8 (SmolLM2: 32). Success and all that is of rollouts: held-out problems,
sampled at temperature 1 and top-p 1; top-p 0.9 and greedy: success when sampled so. Reverse
KL(student || teacher) is on the student's rollouts, forward KL(teacher || student) on an expert's
answers (SmolLM2: the teacher's), full vocabulary, nats per token; the teacher's score is its
log-prob of what the student said. "Ordinary" figures are without the special tokens that student
and teacher write differently, as tokens and in both distributions. Student mass is what the
student's distribution holds on the teacher's best K. Over training: mean and standard deviation of
the gradient norm (before clipping at 1), the share of steps that were clipped (before AdamW, which
takes no notice of a gradient's scale that lasts), the variance between a step's four micro-batches,
and this over the squared norm without that noise, a ratio that is noisy itself. "Masking" leaves
the first special token of each kind in a turn out as a position, and what student and teacher write
differently (<think>, both end tokens) out of the support; students may stop at either end token, in
every arm. The arms of a seed meet the same problems; what they say to them differs, and so does the
number of tokens that they learn from.
"""


def collect(output: Path, results: Path) -> None:
    """Gather the runs of an output folder in three CSV files: runs, steps, positions."""
    runs, steps, positions = [], [], []
    for path in sorted((output / "runs").glob("*.json")):
        result = json.loads(path.read_text())
        what = {name: result[name] for name in ("task", "arm", "seed")}
        for start, gap, count in result.pop("gap_by_position"):
            positions.append({**what, "position": start, "gap": _short(gap), "tokens": count})
        logged = output / "steps" / f"{path.stem}.csv"
        rows = _read(logged) if logged.exists() else []
        for name in OF_STEPS:
            result[name] = _mean(rows, name)
        norms = [float(row["grad_norm"]) for row in rows]
        result["grad_norm_deviation"] = statistics.stdev(norms) if len(norms) > 1 else None
        result["clipped"] = statistics.fmean(norm > CLIP_NORM for norm in norms) if norms else None
        result["tokens"] = sum(int(row["tokens"]) for row in rows) if rows else None
        result["relative_variance"] = _relative_variance(rows)
        runs.append({name: _short(value) for name, value in result.items()})
        for i in range(0, len(rows), STEP_EVERY):
            few = rows[i : i + STEP_EVERY]
            means = {name: _short(_mean(few, name)) for name in few[0] if name != "seconds"}
            steps.append({**what, **means, "step": few[-1]["step"]})
    results.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(FILES, (runs, steps, positions), strict=True):
        rows.sort(key=lambda row: (row["task"], int(row["seed"]), ORDER.index(row["arm"])))
        _write(results / name, rows)


def report(results: Path) -> str:
    """Print what the CSV files say: the table as text; it and the plots are saved beside them."""
    runs = _read(results / "runs.csv")
    text = "\n\n".join(_table(task, rows) for task, rows in _grouped(runs, "task").items())
    text = f"{text}\n\n{LEGEND}"
    (results / "table.md").write_text(text)
    draw_success(results / "success.png", runs)
    draw_positions(results / "positions.png", _read(results / "positions.csv"))
    return text


def _table(task: str, runs: Sequence[Row]) -> str:
    """A Markdown table of means over seeds, with half of their range."""
    shown = [name for name in COLUMNS if any(row.get(name) for row in runs)]
    seeds = len({row["seed"] for row in runs})
    lines = [
        f"**{task}**, {seeds} seed{'s' if seeds > 1 else ''}",
        "",
        "| arm | " + " | ".join(COLUMNS[name] for name in shown) + " |",
        "|---|" + "---|" * len(shown),
    ]
    by_arm = _grouped(runs, "arm")
    for arm in sorted(by_arm, key=ORDER.index):
        cells = [_cell([r.get(name) for r in by_arm[arm]]) for name in shown]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(fields: Sequence[str | None]) -> str:
    """Mean ± half range; where runs lack the value, of how many it is."""
    values = [float(field) for field in fields if field]
    if not values:
        return ""
    mean, spread = statistics.fmean(values), (max(values) - min(values)) / 2
    digits = 0 if abs(mean) >= 1000 else 1 if abs(mean) >= 10 else 3
    text = f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(values) > 1 else "")
    return text if len(values) == len(fields) else f"{text} ({len(values)} of {len(fields)})"


def draw_success(path: Path, runs: Sequence[Row]) -> None:
    """Success of each arm, and its difference to the sampled token's, over tasks and seeds.

    A dot is a pair of task and seed; the line is the 95 % interval of the mean by Student's t, of
    the paired differences on the right.
    """
    success = {
        (row["arm"], row["task"], row["seed"]): [float(row[name]) for name in SUCCESS]
        for row in runs
        if all(row.get(name) for name in SUCCESS)
    }
    names = [arm for arm in ORDER if arm != TEACHER.name and any(key[0] == arm for key in success)]
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 0.9 + 0.52 * len(names)), sharey=True, layout="constrained"
    )
    for column, label in enumerate(SUCCESS.values()):
        for place, arm in enumerate(names):
            pairs = {key[1:]: value[column] for key, value in success.items() if key[0] == arm}
            sampled = {pair: success.get((SAMPLED_TOKEN.name, *pair)) for pair in pairs}
            differences = [pairs[pair] - base[column] for pair, base in sampled.items() if base]
            y, style = len(names) - place + 0.17 - 0.34 * column, {"color": f"C{column}"}
            _interval(axes[0], list(pairs.values()), y, label if place == 0 else None, **style)
            if arm != SAMPLED_TOKEN.name:
                _interval(axes[1], differences, y, None, **style)
    axes[0].set_yticks(range(len(names), 0, -1), names)
    axes[0].set(xlabel="share of held-out problems solved", xlim=(-0.02, None))
    axes[1].set(xlabel="difference to the sampled token, same task and seed")
    axes[1].axvline(0, color="black", linewidth=1)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncol=2, fontsize=10)
    for ax in axes:
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _interval(ax: Axes, values: Sequence[float], y: float, label: str | None, **style: Any) -> None:
    ax.plot(values, [y] * len(values), "o", markersize=4, alpha=0.3, markeredgewidth=0, **style)
    if not values:
        return
    error = None
    if len(values) in T_95:
        error = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.fmean(values)
    ax.errorbar(mean, y, xerr=error, fmt="D", markersize=6, capsize=3, label=label, **style)


def draw_positions(path: Path, rows: Sequence[Row]) -> None:
    """How far the teacher disagrees with what the student said, by position in the response.

    Only where an arm's runs have ``FEWEST_TOKENS`` or more.
    """
    tasks = _grouped(rows, "task")
    rows_of_panels = -(-len(tasks) // 2)
    figure, axes = plt.subplots(
        rows_of_panels, 2, figsize=(11, 3.6 * rows_of_panels), squeeze=False, layout="constrained"
    )
    for ax, (task, of_task) in zip_longest(axes.flat, tasks.items(), fillvalue=("", [])):
        _curves(ax, of_task)
        ax.set_title(task, fontsize=11)
        ax.set_xlabel(f"position in the response, the first {POSITIONS}")
        ax.set_ylabel("log q - log p of the said token")
    labels = {}
    for ax in axes.flat:
        handles, names = ax.get_legend_handles_labels()
        labels.update(zip(names, handles, strict=True))
    figure.legend(labels.values(), labels, loc="outside lower center", ncol=3, fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _curves(ax: Axes, rows: Sequence[Row]) -> None:
    """The gap by position of each arm: means over seeds, weighted by their tokens."""
    by_arm = _grouped([row for row in rows if row.get("gap")], "arm")
    limits = None
    for arm in sorted(by_arm, key=lambda arm: (arm == OFF_SCALE, ORDER.index(arm))):
        points = []
        for position, group in _grouped(by_arm[arm], "position").items():
            counts = [float(row["tokens"]) for row in group]
            if sum(counts) >= FEWEST_TOKENS:
                gaps = (float(row["gap"]) * n for row, n in zip(group, counts, strict=True))
                points.append((int(position), sum(gaps) / sum(counts)))
        points.sort()
        xs, ys = [x for x, _ in points], [y for _, y in points]
        label = f"{arm} (off the scale)" if arm == OFF_SCALE else arm
        ax.plot(xs, ys, label=label, color=COLORS[arm], linewidth=1.4)
        if arm != OFF_SCALE:
            limits = ax.get_ylim()
    if limits is not None:
        ax.set_ylim(limits)
    ax.set_visible(bool(by_arm))


def _grouped(rows: Iterable[Row], key: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return groups


def _relative_variance(rows: Sequence[Row]) -> float | None:
    """The variance of a micro-batch's gradient over the squared norm of what is expected of it.

    That norm is the step's, which the noise of its micro-batches has made larger, without that.
    """
    variance = sum(float(row["grad_variance"]) for row in rows)
    signal = sum(float(row["grad_norm"]) ** 2 for row in rows) - variance / MICRO_BATCHES
    return variance / signal if signal > 0 else None


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [float(row[name]) for row in rows if row[name] != ""]
    return statistics.fmean(values) if values else None


def _short(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
