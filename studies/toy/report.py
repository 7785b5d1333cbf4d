"""What the toy study leaves behind and concludes: rows of CSV, claims that are checked, a table."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from statistics import fmean

Curve = Mapping[float, float]  # gamma -> value
CONVERT: Mapping[str, Callable[[str], object]] = {"float": float, "int": int, "str": str}


@dataclass(frozen=True)
class Training:
    """Means over the iterations since the row before, of the run with one gamma and seed."""

    gamma: float
    seed: int
    iteration: int  # the last of them
    variance: float  # between the micro-batches' gradients
    reverse_kl: float  # nats per trajectory
    miss: float  # |last state - target|


@dataclass(frozen=True)
class FrozenStudent:
    """The estimator with one gamma at a student of the token-level run."""

    gamma: float
    seed: int
    task: str
    iteration: int
    variance: float
    squared_bias: float  # ‖E g_gamma - E g_1‖²; an estimate without bias, so it can be negative
    squared_bias_error: float  # its standard error
    signal: float  # ‖E g_1‖², of the gradient of the sequence-level KL


@dataclass(frozen=True)
class Visit:
    """States at one step over many trajectories of a trained student, or of a teacher."""

    who: str  # "teacher", or the student's gamma
    seed: int
    task: str
    step: int
    mean: float
    std: float


@dataclass(frozen=True)
class Study:
    """Everything that was measured."""

    training: Sequence[Training]
    frozen: Sequence[FrozenStudent]
    visits: Sequence[Visit]

    @property
    def gammas(self) -> list[float]:
        """Every gamma that was trained with, rising."""
        return sorted({row.gamma for row in self.training})

    @property
    def seeds(self) -> list[int]:
        """Every seed, rising."""
        return sorted({row.seed for row in self.training})

    @property
    def checkpoints(self) -> list[int]:
        """Iterations at which a student was frozen, rising."""
        return sorted({row.iteration for row in self.frozen})


FILES = (
    ("training", "variance.csv", Training),
    ("frozen", "bias.csv", FrozenStudent),
    ("visits", "trajectories.csv", Visit),
)


def write_study(folder: Path, study: Study) -> None:
    """Write one CSV file for each kind of row, six digits a number."""
    for name, file_name, row_type in FILES:
        with (folder / file_name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([field.name for field in fields(row_type)])
            for row in getattr(study, name):
                values = asdict(row).values()
                writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])


def read_study(folder: Path) -> Study:
    """Read what `write_study` wrote."""
    kinds = {}
    for name, file_name, row_type in FILES:
        convert = {field.name: CONVERT[str(field.type)] for field in fields(row_type)}
        with (folder / file_name).open(newline="", encoding="utf-8") as file:
            kinds[name] = [
                row_type(**{column: convert[column](text) for column, text in line.items()})
                for line in csv.DictReader(file)
            ]
    return Study(**kinds)


@dataclass(frozen=True)
class Claim:
    """That a quantity rises, or falls, from every gamma to the next, for every seed."""

    name: str
    rises: bool
    curves: Mapping[int, Curve]  # seed -> curve

    def holds(self, seed: int, lower: float, upper: float) -> bool:
        """Whether it goes the claimed way from `lower` to `upper`; equal or NaN is a no."""
        first, second = self.curves[seed][lower], self.curves[seed][upper]
        return second > first if self.rises else second < first

    @property
    def holds_everywhere(self) -> bool:
        """Whether every comparison holds."""
        return all(
            self.holds(seed, *pair)
            for seed, curve in self.curves.items()
            for pair in pairwise(sorted(curve))
        )


def training_variance(study: Study, seed: int) -> Curve:
    """Variance of a micro-batch's gradient, mean over training."""
    return {
        gamma: fmean(r.variance for r in study.training if (r.gamma, r.seed) == (gamma, seed))
        for gamma in study.gammas
    }


def frozen_variance(study: Study, seed: int) -> Curve:
    """Variance over that of the lowest gamma at the same student, mean over the frozen students."""
    rows = [row for row in study.frozen if row.seed == seed]
    least = study.gammas[0]
    base = {(r.task, r.iteration): r.variance for r in rows if r.gamma == least}
    return {
        gamma: fmean(r.variance / base[r.task, r.iteration] for r in rows if r.gamma == gamma)
        for gamma in study.gammas
    }


def relative_bias(rows: Iterable[FrozenStudent]) -> float:
    """‖E g_gamma - E g_1‖ / ‖E g_1‖, the rows' gradients as parts of one; 0 if lost in noise."""
    rows = list(rows)
    squared = sum(row.squared_bias for row in rows)
    return math.sqrt(max(squared, 0.0) / sum(row.signal for row in rows))


def bias(study: Study, seed: int) -> Curve:
    """Relative bias over both tasks, mean over the frozen students."""
    return {
        gamma: fmean(
            relative_bias(
                row
                for row in study.frozen
                if (row.gamma, row.seed, row.iteration) == (gamma, seed, iteration)
            )
            for iteration in study.checkpoints
        )
        for gamma in study.gammas
    }


def claims(study: Study) -> list[Claim]:
    """The variance as the paper reports it, and the bias that it argues with, seed by seed."""
    quantities = (
        ("variance in training", True, training_variance),
        ("variance at the same student", True, frozen_variance),
        ("relative bias", False, bias),
    )
    return [
        Claim(name, rises, {seed: curve(study, seed) for seed in study.seeds})
        for name, rises, curve in quantities
    ]


def claim_lines(claim: Claim) -> list[str]:
    """One Markdown item for each pair of neighbouring gammas, with every seed's numbers."""
    lines = []
    gammas = sorted(next(iter(claim.curves.values())))
    for lower, upper in pairwise(gammas):
        held = sum(claim.holds(seed, lower, upper) for seed in claim.curves)
        numbers = ", ".join(f"{c[lower]:.3g} to {c[upper]:.3g}" for c in claim.curves.values())
        lines.append(
            f"- {claim.name} {'rises' if claim.rises else 'falls'} from gamma {lower:g} to "
            f"{upper:g}: {'yes' if held == len(claim.curves) else 'NO'}, {held} of "
            f"{len(claim.curves)} seeds ({numbers})"
        )
    return lines


def summary_table(study: Study, checked: Sequence[Claim]) -> list[str]:
    """A Markdown row for each gamma, means over seeds; the learning over the last tenth."""
    last = max(row.iteration for row in study.training)
    lines = [
        "| gamma | variance in training | at the same student, over gamma 0's | relative bias | "
        "reverse KL at the end | miss at the end |",
        "|---|---|---|---|---|---|",
    ]
    for gamma in study.gammas:
        end = [r for r in study.training if r.gamma == gamma and r.iteration > 0.9 * last]
        cells = [fmean(curve[gamma] for curve in claim.curves.values()) for claim in checked]
        cells += [fmean(row.reverse_kl for row in end), fmean(row.miss for row in end)]
        lines.append(f"| {gamma:g} | " + " | ".join(f"{cell:.3g}" for cell in cells) + " |")
    return lines


def bias_table(study: Study) -> list[str]:
    """A Markdown row for each frozen iteration: relative bias and how sure it is."""
    gammas = study.gammas[:-1]
    lines = [
        "| iteration | " + " | ".join(f"gamma {gamma:g}" for gamma in gammas) + " |",
        "|---" * (1 + len(gammas)) + "|",
    ]
    for iteration in study.checkpoints:
        cells = []
        for gamma in gammas:
            rows = [r for r in study.frozen if (r.gamma, r.iteration) == (gamma, iteration)]
            size = relative_bias(rows)
            error = math.hypot(*(row.squared_bias_error for row in rows))
            strength = sum(row.squared_bias for row in rows) / error
            cells.append(f"{size:.3f} ({strength:.1f})")
        lines.append(f"| {iteration} | " + " | ".join(cells) + " |")
    return lines


def single_lines(study: Study) -> list[str]:
    """How often the claims hold without any averaging."""
    students: dict[tuple[int, str, int], dict[float, float]] = {}
    for row in study.frozen:
        key = (row.seed, row.task, row.iteration)
        students.setdefault(key, {})[row.gamma] = row.squared_bias
    falls = [b < a for c in students.values() for a, b in pairwise(c[g] for g in sorted(c))]
    times: dict[tuple[int, int], dict[float, float]] = {}
    for point in study.training:
        times.setdefault((point.seed, point.iteration), {})[point.gamma] = point.variance
    rises = [b > a for c in times.values() for a, b in pairwise(c[g] for g in sorted(c))]
    return [
        f"- bias falls in {sum(falls)} of {len(falls)} comparisons of neighbouring gammas at one "
        "frozen student and task",
        f"- variance rises in {sum(rises)} of {len(rises)} comparisons of neighbouring gammas at "
        "one seed and row of variance.csv",
    ]


def report(study: Study) -> tuple[str, bool]:
    """The Markdown text and whether every claim holds."""
    checked = claims(study)
    good = all(claim.holds_everywhere for claim in checked)
    last = max(row.iteration for row in study.training)
    lines = [
        "# Toy study: what the discount of the return-to-go does",
        "",
        f"{len(study.gammas)} gammas, seeds {', '.join(map(str, study.seeds))}, {last} iterations. "
        "Variance and bias are of the gradient on the output layer; reverse KL in nats per "
        "trajectory. Made by `python studies/toy_variance.py`, which says what each number is.",
        "",
        *summary_table(study, checked),
        "",
        "Relative bias at the students of the token-level run, seeds and tasks as one gradient; in "
        "brackets the squared bias over its standard error. At gamma 1 it is 0 by definition:",
        "",
        *bias_table(study),
        "",
        "Checked, seed by seed:",
        "",
        *(line for claim in checked for line in claim_lines(claim)),
        "",
        "Not averaged, for information:",
        "",
        *single_lines(study),
        "",
        "The paper's ordering holds: the variance rises with gamma; the bias falls."
        if good
        else "The paper's ordering does NOT hold.",
    ]
    return "\n".join(lines) + "\n", good
