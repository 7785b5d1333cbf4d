"""The comparison's CSV files, and the table and plots that are made of nothing else."""

from __future__ import annotations

import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from comparison.arms import ARMS, BEFORE, TEACHER
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
    draw_steps(results / "steps.png", _read(results / "steps.csv"))
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


STEP_PANELS = {
    "success": "success of the rollouts as the arm samples them",
    "reverse_kl": "reverse KL on the rollouts",
    "grad_norm": "gradient norm",
    "grad_variance": "gradient variance",
    "student_mass": "student mass on the support",
    "gap": "log-prob gap, teacher - student",
}


def draw_steps(path: Path, rows: Sequence[Row]) -> None:
    """Curves by step, mean over seeds: a row for each task, a column for each quantity."""
    tasks = _grouped(rows, "task")
    figure, axes = plt.subplots(
        len(tasks), len(STEP_PANELS), figsize=(22, 3.2 * len(tasks)), squeeze=False
    )
    for line, (task, of_task) in zip(axes, tasks.items(), strict=True):
        for ax, (name, title) in zip(line, STEP_PANELS.items(), strict=True):
            if name.startswith("grad"):
                ax.set_yscale("log")
            _curves(ax, of_task, "step", name)
            ax.set_title(f"{task}: {title}", fontsize=9)
    _save(figure, axes, path)


def draw_positions(path: Path, rows: Sequence[Row]) -> None:
    """How far the teacher disagrees with what the student said, by position in the response.

    Only where an arm's runs have ``FEWEST_TOKENS`` or more.
    """
    tasks = _grouped(rows, "task")
    figure, axes = plt.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4), squeeze=False)
    for ax, (task, of_task) in zip(axes[0], tasks.items(), strict=True):
        _curves(ax, of_task, "position", "gap", weight="tokens")
        ax.set_title(f"{task}: log q - log p of the said token", fontsize=9)
        ax.set_xlabel(f"position in the response, the first {POSITIONS}")
    _save(figure, axes, path)


def _curves(ax: Axes, rows: Sequence[Row], x: str, y: str, weight: str = "") -> None:
    """A curve for each arm: means over seeds, weighted by a column if one is named."""
    by_arm = _grouped([row for row in rows if row.get(y)], "arm")
    limits = None
    for arm in sorted(by_arm, key=lambda arm: (arm == OFF_SCALE, ORDER.index(arm))):
        points = []
        for at, here in _grouped(by_arm[arm], x).items():
            weights = [float(row[weight]) for row in here] if weight else [1.0] * len(here)
            total = sum(weights)
            if not weight or total >= FEWEST_TOKENS:
                values = (float(row[y]) * w for row, w in zip(here, weights, strict=True))
                points.append((int(at), sum(values) / total))
        points.sort()
        xs, ys = [at for at, _ in points], [value for _, value in points]
        ax.plot(xs, ys, label=arm, color=COLORS[arm], linewidth=1.2)
        if arm != OFF_SCALE:
            limits = ax.get_ylim()
    if limits is not None:
        ax.set_ylim(limits)
    ax.set_visible(bool(by_arm))


def _save(figure: plt.Figure, axes: Sequence[Sequence[Axes]], path: Path) -> None:
    labels = {}
    for ax in (ax for line in axes for ax in line):
        handles, names = ax.get_legend_handles_labels()
        labels.update(zip(names, handles, strict=True))
    figure.legend(labels.values(), labels, loc="lower center", ncol=5, fontsize=9)
    figure.tight_layout(rect=(0, 0.6 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=80)
    plt.close(figure)


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
