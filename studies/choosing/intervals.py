"""Means, intervals and paired differences of lines of the CSV files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from choosing.plan import CENTRAL, CENTRE, FACTOR, SETTING
from comparison.results import T_95

Row = Mapping[str, str]
PLACES = ("outside_fillers", "outside_words", "outside_markup", "outside_unused")
TOKENS = 1000  # that signal to noise is given at
# How answers to the judged problems are sampled.
SAMPLINGS = {
    "judge_success": "temperature 1",
    "judge_success_top_p": "nucleus of 0.9",
    "judge_success_greedy": "greedy",
}


class Interval(NamedTuple):
    """A mean and the half width of its 95 % interval by Student's t; None for one value."""

    mean: float
    half: float | None
    count: int

    def __str__(self) -> str:
        """A difference for a table: with its sign."""
        return f"{self.mean:+.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")

    @property
    def level(self) -> str:
        """A level for a table: without a sign."""
        return str(self).lstrip("+")


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


def by_row(rows: Iterable[Row], column: str) -> list[float]:
    """A column as numbers."""
    return [float(row[column]) for row in rows]


def last_of_each_seed(rows: Iterable[Row]) -> list[Row]:
    """The line of each seed's last step."""
    return list({row["seed"]: row for row in sorted(rows, key=lambda r: int(r["step"]))}.values())


def arms_of(runs: Sequence[Row], stage: str = CENTRAL) -> list[str]:
    """The arms that a stage has lines of, in their order."""
    return list(dict.fromkeys(row["arm"] for row in runs if row["stage"] == stage))


def token_variance(rows: Sequence[Row]) -> float:
    """The mean over probes."""
    return fmean(by_row(rows, "token_variance"))


def signal_to_noise(rows: Sequence[Row]) -> float:
    """At ``TOKENS`` tokens, a ratio of means over probes: single probes are noisy."""
    noise = token_variance(rows) / TOKENS
    return fmean(by_row(rows, "signal")) / noise if noise > 0 else float("nan")


def pooled(
    probes: Iterable[Row], objective: str, value: Callable[[Sequence[Row]], float]
) -> dict[str, float]:
    """A value by seed, of the probes on the states of all arms at the centre."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in probes:
        if row["stage"] == CENTRAL and row["objective"] == objective:
            groups[row["seed"]].append(row)
    return {seed: value(rows) for seed, rows in sorted(groups.items())}


def probed(probes: Sequence[Row], arm: str) -> dict[tuple[str, str], list[Row]]:
    """Of an arm at the centre: probes by objective and seed."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in at(probes, arm):
        groups[row["objective"], row["seed"]].append(row)
    return groups
