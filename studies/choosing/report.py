"""Tables and figures of the choice of objectives, from the CSV files alone."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from choosing import figures
from choosing.intervals import (
    PLACES,
    SAMPLINGS,
    TOKENS,
    Row,
    arms_of,
    at,
    by_row,
    by_seed,
    interval,
    last_of_each_seed,
    paired,
    pooled,
    probed,
    signal_to_noise,
    token_variance,
)
from choosing.plan import ALWAYS, CENTRAL, FACTOR, SCREENING, Plan, seen
from choosing.probes import PROBED
from choosing.records import Records

SAMPLED, LSM = ALWAYS
JUDGED = "judge_success"
WATCHED = ("judge_student_mass", "judge_reverse_kl")
FAILURES = ("signals.csv", "reliability.csv", "before.csv")
COMPARED = Path(__file__).parents[1] / "results" / "comparison" / "runs.csv"


def report(folder: Path, plan: Plan) -> str:
    """Print what the CSV files say; the text and the figures are saved beside them."""
    records = Records(folder)
    runs, curve, steps, probes = (records.read(n) for n in ("runs", "curve", "steps", "probes"))
    signals, reliability, before = (read(folder / name) for name in FAILURES)
    parts = [
        _lengths(runs),
        _screening(runs, plan),
        _centre(runs, before),
        _levels(runs, before),
        _factors(runs, plan),
        _samplings(runs, plan),
        _curves(curve),
        _drift(probes),
        _noise(probes),
        _places(probes),
        _signals(signals),
        _reliability(reliability),
        _smollm2(folder / "smollm2.csv"),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "table.md").write_text(text)
    if any(row["stage"] == CENTRAL for row in runs):
        figures.draw_choice(folder / "success.png", runs, curve, before)
        figures.draw_factors(folder / "factors.png", runs, plan)
        figures.draw_mechanism(folder / "mechanism.png", steps, curve, probes)
    if signals:
        figures.draw_failures(folder / "failures.png", signals, reliability, read(COMPARED))
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


def _line(rows: Sequence[Row], sampled: Sequence[Row], lsm: Sequence[Row]) -> list[object]:
    """Success, differences to both references, mass, share of clipped steps."""
    ours = by_seed(rows, JUDGED)
    columns = (JUDGED, *WATCHED, "clipped")
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


def _centre(runs: Sequence[Row], before: Sequence[Row]) -> str:
    groups = {arm: at(runs, arm) for arm in arms_of(runs)}
    sampled, lsm = (groups.get(arm, []) for arm in ALWAYS)
    lines = [[arm, *_line(rows, sampled, lsm)] for arm, rows in groups.items()]
    if before:
        values = [f"{fmean(by_row(before, name)):.3f}" for name in (JUDGED, *WATCHED)]
        lines.insert(0, ["before any step", values[0], "", "", *values[1:], ""])
    seeds = len({row["seed"] for rows in groups.values() for row in rows})
    return _table(f"The centre, {seeds} seeds", ["arm", *_HEAD], lines)


def _levels(runs: Sequence[Row], before: Sequence[Row]) -> str:
    groups = {"before any step": before, **{arm: at(runs, arm) for arm in arms_of(runs)}}
    lines = [
        [arm, *(f"{fmean(by_row(rows, column)):.3f}" for column in SAMPLINGS)]
        for arm, rows in groups.items()
        if rows
    ]
    head = ["arm", *SAMPLINGS.values()]
    return _table("The centre, by how answers are sampled: success", head, lines)


def _samplings(runs: Sequence[Row], plan: Plan) -> str:
    """Differences to both references, answers sampled in three ways."""
    lines = []
    for factor, level in [("", 0.0), *plan.factors]:
        arms = arms_of(runs, FACTOR if factor else CENTRAL)
        groups = {arm: at(runs, arm, factor, level) for arm in arms}
        sampled = groups.get(SAMPLED) or at(runs, SAMPLED)
        lsm = groups.get(LSM, [])
        for arm, rows in groups.items():
            if not rows or rows is sampled:
                continue
            found: list[object] = []
            for other in (sampled, lsm):
                for column in SAMPLINGS:
                    pair = paired(by_seed(rows, column), by_seed(other, column))
                    found.append(None if rows is other else pair)
            lines.append([f"{factor} {level:g}" if factor else "centre", arm, *found])
    ways = list(SAMPLINGS.values())
    head = [
        "",
        "arm",
        *(f"minus {SAMPLED}, {w}" for w in ways),
        *(f"minus {LSM}, {w}" for w in ways),
    ]
    return _table("By how answers are sampled: differences of success", head, lines)


def _factors(runs: Sequence[Row], plan: Plan) -> str:
    lines = []
    for factor, level in plan.factors:
        groups = {arm: at(runs, arm, factor, level) for arm in arms_of(runs, FACTOR)}
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
    for arm in arms_of(of_stage):
        points = {
            step: by_seed((r for r in at(of_stage, arm) if int(r["step"]) == step), "tune_success")
            for step in steps
        }
        last = paired(points[steps[-1]], points[steps[-2]]) if len(steps) > 1 else None
        means = (f"{fmean(p.values()):.3f}" if p else None for p in points.values())
        lines.append([arm, *means, last])
    head = ["arm", *(f"step {step}" for step in steps), "last minus the one before"]
    return _table("Success on tuning problems by step, at the centre", head, lines)


def _drift(probes: Sequence[Row]) -> str:
    lines = []
    for arm in arms_of(probes):
        groups = probed(probes, arm)
        seeds = sorted({seed for _, seed in groups})
        of_seeds = {
            name: {seed: fmean(by_row(groups[name, seed], "drift")) for seed in seeds}
            for name in PROBED
        }
        drifts = [interval(list(values.values())) for values in of_seeds.values()]
        lines.append([arm, *drifts, paired(of_seeds["bucket"], of_seeds["lsm"])])
    head = ["states of", *PROBED, "bucket minus lsm"]
    title = (
        "On the same states: growth of the mass for a step of length 1 against each objective's "
        "gradient"
    )
    return _table(title, head, lines)


def _noise(probes: Sequence[Row]) -> str:
    lines = []
    baseline = pooled(probes, "sampled", token_variance)
    for name in PROBED if baseline else ():
        found = interval(list(pooled(probes, name, signal_to_noise).values()))
        own = pooled(probes, name, token_variance)
        ratio = interval([baseline[seed] / own[seed] for seed in own])
        lines.append([name, *(x.level for x in (found, ratio) if x is not None)])
    title = f"Noise of the gradient at {TOKENS} tokens, on the states of all arms at the centre"
    return _table(title, ["objective", "signal to noise", "sampled token's variance over"], lines)


def _places(probes: Sequence[Row]) -> str:
    lines: list[list[object]] = []
    for arm in arms_of(probes):
        rows = [row for row in at(probes, arm) if row["objective"] == "lsm"]
        first = [row for row in rows if row["step"] == "1"]
        for when, here in (("first", first), ("last", last_of_each_seed(rows))):
            lines.append([arm, when, *(f"{fmean(by_row(here, name)):.4f}" for name in PLACES)])
    head = ["arm", "probe", *(name.removeprefix("outside_") for name in PLACES)]
    return _table("Where the student's mass outside of the support is", head, lines)


def read(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _level(rows: Sequence[Row], column: str) -> str:
    found = interval(by_row(rows, column))
    return "" if found is None else found.level


def _signals(rows: Sequence[Row]) -> str:
    lines = []
    for name in dict.fromkeys(row["objective"] for row in rows):
        of_name = [row for row in rows if row["objective"] == name]
        shares = []
        for share in (0.01, 0.1):
            here = [row for row in of_name if float(row["share_of_tokens"]) == share]
            shares.append(_level(here, "share_of_signal"))
        # The same at every share: one line a seed.
        last = [row for row in of_name if float(row["share_of_tokens"]) == 1]
        lowered = [_level(last, column) for column in ("lowered", "signal_lowered")]
        lines.append([name, *shares, *lowered])
    head = ["objective", "top 1 % of tokens", "top 10 %", "tokens lowered", "signal on those"]
    title = (
        "Before any step: how the norm of each token's gradient is shared out, and how many tokens "
        "have their own logit lowered"
    )
    return _table(title, head, lines)


def _reliability(rows: Sequence[Row]) -> str:
    lines = []
    for written in dict.fromkeys(row["written"] for row in rows):
        here = [row for row in rows if row["written"] == written]
        columns = ("teacher_success", "student_success", "gap")
        lines.append([written, *(_level(here, column) for column in columns)])
    head = ["words by the student", "success, rest by the teacher", "by the student", "gap there"]
    return _table("Before any step: what the teacher makes of the student's words", head, lines)


def _smollm2(path: Path) -> str:
    rows = read(path)
    head = list(rows[0]) if rows else []
    numbers = {"reverse_kl", "forward_kl", "student_mass", "teacher_mass"}
    lines = [
        [f"{float(value):.3f}" if name in numbers else value for name, value in row.items()]
        for row in rows
    ]
    return _table("The demo's SmolLM2 pair", [name.replace("_", " ") for name in head], lines)
