"""Tables and figures of the choice of objectives, from the CSV files alone."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from choosing.arms import BY_NAME
from choosing.plan import (
    ALWAYS,
    CENTRAL,
    CENTRE,
    FACTOR,
    SCREENING,
    SETTING,
    Plan,
    seen,
    winner,
)
from choosing.probes import PROBED
from choosing.records import Records
from comparison.results import T_95
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

Row = Mapping[str, str]
SAMPLED, LSM = ALWAYS
TOKENS = 1000  # that signal to noise is given at
JUDGED = "judge_success"
PLACES = ("outside_fillers", "outside_words", "outside_markup", "outside_unused")


class Interval(NamedTuple):
    """A mean and the half width of its 95 % interval by Student's t; None for one value."""

    mean: float
    half: float | None
    count: int

    def __str__(self) -> str:
        """As it stands in a table."""
        return f"{self.mean:+.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")


def interval(values: Sequence[float]) -> Interval | None:
    """Of independent values; None of none."""
    if not values:
        return None
    count, half = len(values), None
    if count in T_95:
        half = T_95[count] * stdev(values) / count**0.5
    return Interval(fmean(values), half, count)


def paired(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Interval | None:
    """Interval of two arms' differences by seed; only seeds that both arms have."""
    return interval([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def by_seed(rows: Iterable[Row], column: str) -> dict[str, float]:
    """One value for each seed."""
    return {row["seed"]: float(row[column]) for row in rows if row[column]}


def at(rows: Iterable[Row], arm: str, factor: str = "", level: float = 0.0) -> list[Row]:
    """The judged runs of an arm at the centre or at another level of a factor."""
    stage = FACTOR if factor else CENTRAL
    wanted = {name: float(getattr(CENTRE, name)) for name in SETTING}
    if factor:
        wanted[factor] = float(level)
    return [
        row
        for row in rows
        if (row["stage"], row["arm"]) == (stage, arm)
        and all(float(row[name]) == value for name, value in wanted.items())
    ]


def report(folder: Path, plan: Plan) -> str:
    """Print what the CSV files say; the text and the figures are saved beside them."""
    records = Records(folder)
    runs, curve, steps, probes = (records.read(n) for n in ("runs", "curve", "steps", "probes"))
    parts = [
        _lengths(runs),
        _screening(runs, plan),
        _centre(runs),
        _factors(runs, plan),
        _curves(curve),
        _mechanism(probes),
        _places(probes),
        _smollm2(folder / "smollm2.csv"),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "table.md").write_text(text)
    if any(row["stage"] == CENTRAL for row in runs):
        draw_success(folder / "success.png", runs, plan)
        draw_mechanism(folder / "mechanism.png", steps, curve, probes)
    return text


def _table(title: str, head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    if not lines:
        return ""
    cells = [[("" if cell is None else str(cell)) for cell in line] for line in lines]
    rows = [head, ["---"] * len(head), *cells]
    return f"**{title}**\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _lengths(runs: Sequence[Row]) -> str:
    seconds = [float(row["core_seconds"]) for row in runs]
    cut = [row for row in runs if int(row["steps"]) < int(row["planned"])]
    steps = sorted({int(row["steps"]) for row in runs})
    planned = sorted({int(row["planned"]) for row in runs})
    return (
        f"{len(runs)} runs of {_span(steps)} steps, planned were {_span(planned)}; "
        f"{len(cut)} were cut to stay below the limit of core seconds. A run took "
        f"{fmean(seconds):.0f} core seconds in the mean, {max(seconds):.0f} at most. Intervals: "
        "95 % by Student's t, over seeds; differences are paired by seed. Success and mass: judged "
        "problems, temperature 1."
    )


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def _screening(runs: Sequence[Row], plan: Plan) -> str:
    of_stage = [row for row in runs if row["stage"] == SCREENING]
    scores = {(r["arm"], float(r["lr"])): f"{float(r['tune_score']):.3f}" for r in of_stage}
    whole = len(scores) == len(plan.screening())
    kept = plan.survivors(seen(runs)) if whole else []
    lines = [
        [arm, *(scores.get((arm, lr)) for lr in plan.screen_rates), "yes" if arm in kept else ""]
        for arm in plan.arms
    ]
    head = ["arm", *(f"lr {lr:g}" for lr in plan.screen_rates), "goes on"]
    return _table("Screening: success on tuning problems, one seed", head, lines)


def _arms(runs: Sequence[Row], stage: str = CENTRAL) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in runs if row["stage"] == stage))


def _line(rows: Sequence[Row], sampled: Sequence[Row], lsm: Sequence[Row]) -> list[object]:
    """Success, differences to both references, mass, share of clipped steps."""
    ours = by_seed(rows, JUDGED)
    columns = (JUDGED, "judge_student_mass", "judge_reverse_kl", "clipped")
    mean = {name: fmean(by_seed(rows, name).values()) for name in columns}
    differences = [paired(ours, by_seed(other, JUDGED)) for other in (sampled, lsm)]
    return [
        f"{mean[JUDGED]:.3f}",
        *(
            None if rows is other else d
            for d, other in zip(differences, (sampled, lsm), strict=True)
        ),
        *(f"{mean[name]:.3f}" for name in columns[1:]),
    ]


_HEAD = ("success", f"minus {SAMPLED}", f"minus {LSM}", "student mass", "reverse KL", "clipped")


def _centre(runs: Sequence[Row]) -> str:
    groups = {arm: at(runs, arm) for arm in _arms(runs)}
    sampled, lsm = (groups.get(arm, []) for arm in ALWAYS)
    lines = [[arm, *_line(rows, sampled, lsm)] for arm, rows in groups.items()]
    seeds = len({row["seed"] for rows in groups.values() for row in rows})
    return _table(f"The centre, {seeds} seeds", ["arm", *_HEAD], lines)


def _factors(runs: Sequence[Row], plan: Plan) -> str:
    lines = []
    for factor, level in plan.factors:
        groups = {arm: at(runs, arm, factor, level) for arm in _arms(runs, FACTOR)}
        # Where the support alone changes, the baseline is the centre's.
        sampled = groups.get(SAMPLED) or at(runs, SAMPLED)
        lsm = groups.get(LSM, [])
        lines += [
            [f"{factor} {level:g}", arm, *_line(rows, sampled, lsm)]
            for arm, rows in groups.items()
            if rows
        ]
    return _table("One factor at a time", ["factor", "arm", *_HEAD], lines)


def _curves(curve: Sequence[Row]) -> str:
    lines = []
    of_stage = [row for row in curve if row["stage"] == CENTRAL]
    steps = sorted({int(row["step"]) for row in of_stage})
    for arm in _arms(of_stage):
        points = {
            step: by_seed((r for r in at(of_stage, arm) if int(r["step"]) == step), "tune_success")
            for step in steps
        }
        last = paired(points[steps[-1]], points[steps[-2]]) if len(steps) > 1 else None
        means = (f"{fmean(p.values()):.3f}" if p else None for p in points.values())
        lines.append([arm, *means, last])
    head = ["arm", *(f"step {step}" for step in steps), "last minus the one before"]
    return _table("Success on tuning problems by step, at the centre", head, lines)


def signal_to_noise(rows: Iterable[Row]) -> float:
    """At ``TOKENS`` tokens, a ratio of sums over probes: single probes are noisy."""
    rows = list(rows)
    noise = sum(float(row["token_variance"]) for row in rows) / TOKENS
    return sum(float(row["signal"]) for row in rows) / noise if noise > 0 else float("nan")


def _probed(probes: Sequence[Row], arm: str) -> dict[tuple[str, str], list[Row]]:
    """Of an arm at the centre: probes by objective and seed."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in at(probes, arm):
        groups[row["objective"], row["seed"]].append(row)
    return groups


def _mechanism(probes: Sequence[Row]) -> str:
    lines = []
    for arm in _arms(probes):
        groups = _probed(probes, arm)
        seeds = sorted({seed for _, seed in groups})
        drifts, ratios = [], []
        for name in PROBED:
            of_seeds = [groups[name, seed] for seed in seeds]
            drifts.append(interval([fmean(by_row(rows, "drift")) for rows in of_seeds]))
            ratios.append(interval([signal_to_noise(rows) for rows in of_seeds]))
        lines.append([arm, *drifts, *ratios])
    head = ["states of", *(f"drift, {n}" for n in PROBED), *(f"signal/noise, {n}" for n in PROBED)]
    title = (
        "On the same states: growth of the mass for a step of length 1 against each objective's "
        f"gradient, and its signal to noise at {TOKENS} tokens"
    )
    return _table(title, head, lines)


def by_row(rows: Iterable[Row], column: str) -> list[float]:
    """A column as numbers."""
    return [float(row[column]) for row in rows]


def _places(probes: Sequence[Row]) -> str:
    lines: list[list[object]] = []
    for arm in _arms(probes):
        rows = [row for row in at(probes, arm) if row["objective"] == "lsm"]
        last = max(int(row["step"]) for row in rows)
        for step in dict.fromkeys((1, last)):
            here = [row for row in rows if int(row["step"]) == step]
            lines.append([arm, step, *(f"{fmean(by_row(here, name)):.4f}" for name in PLACES)])
    head = ["arm", "step", *(name.removeprefix("outside_") for name in PLACES)]
    return _table("Where the student's mass outside of the support is", head, lines)


def _smollm2(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    head = list(rows[0]) if rows else []
    numbers = {"reverse_kl", "forward_kl", "student_mass", "teacher_mass"}
    lines = [
        [f"{float(value):.3f}" if name in numbers else value for name, value in row.items()]
        for row in rows
    ]
    return _table("The demo's SmolLM2 pair", [name.replace("_", " ") for name in head], lines)


def draw_success(path: Path, runs: Sequence[Row], plan: Plan) -> None:
    """Bars of success at the centre; the differences to the sampled token at every level."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    arms = _arms(runs)
    for place, arm in enumerate(reversed(arms)):
        values = list(by_seed(at(runs, arm), JUDGED).values())
        found = interval(values)
        if found is not None:
            axes[0].barh(place, found.mean, xerr=found.half, color=_color(arm), capsize=4)
            axes[0].plot(values, [place] * len(values), "o", color="black", markersize=3)
    axes[0].set_yticks(range(len(arms)), list(reversed(arms)))
    axes[0].set(xlabel="share of judged problems solved, centre", xlim=(0, None))
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
                axes[1].errorbar(found.mean, y, xerr=found.half, **style)
                label = None
    names = [f"{name} {level:g}" if name else "centre" for name, level in levels]
    axes[1].set_yticks([-i for i in range(len(levels))], names)
    axes[1].set_xlabel(f"success minus {SAMPLED}'s, same seed")
    axes[1].axvline(0, color="black", linewidth=1)
    if axes[1].get_legend_handles_labels()[0]:
        axes[1].legend(fontsize=9)
    _save(figure, path, axes)


def draw_mechanism(
    path: Path, steps: Sequence[Row], curve: Sequence[Row], probes: Sequence[Row]
) -> None:
    """By step at the centre: success, mass; drift under two objectives; signal to noise."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for arm in _arms(curve):
        style = {"color": _color(arm), "label": arm}
        _band(axes[0, 0], at(curve, arm), "tune_success", **style)
        _band(axes[0, 1], at(curve, arm), "tune_mass", **style)
    axes[0, 0].set(xlabel="step", ylabel="share of tuning problems solved")
    axes[0, 1].set(xlabel="step", ylabel="student's mass on the teacher's 32 best")
    axes[0, 0].legend(fontsize=8)
    for column, style in (("drift_lsm", "C3"), ("drift_bucket", "C2")):
        label = f"gradient of {column.removeprefix('drift_')}"
        _band(axes[1, 0], at(steps, LSM), column, color=style, label=label)
    axes[1, 0].axhline(0, color="black", linewidth=1)
    axes[1, 0].set(xlabel="step", ylabel=f"growth of the mass in logits, states of {LSM}")
    axes[1, 0].legend(fontsize=9)
    for place, name in enumerate(PROBED):
        groups = _probed(probes, SAMPLED)
        found = interval([signal_to_noise(rows) for (o, _), rows in groups.items() if o == name])
        if found is not None:
            axes[1, 1].bar(place, found.mean, yerr=found.half, color=f"C{place}", capsize=4)
    axes[1, 1].set_xticks(range(len(PROBED)), list(PROBED))
    axes[1, 1].set_ylabel(f"signal to noise at {TOKENS} tokens, states of {SAMPLED}")
    _save(figure, path, axes.flat)


def _band(ax: Axes, rows: Sequence[Row], column: str, *, color: str, label: str) -> None:
    """The mean over seeds by step, and its interval."""
    by_step: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        by_step[round(float(row["step"]))].append(float(row[column]))
    xs = sorted(by_step)
    found = [interval(by_step[x]) for x in xs]
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
