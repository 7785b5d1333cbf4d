"""Which runs there are: a centre, one factor at a time around it, stages, and what drops an arm.

Rules, written before any run:

1. *Screening.* Every arm runs once, on a student of its own seed, at each of ``screen_rates``. Its
   score is its success on the tuning problems, the mean of the last two points of the curve, at
   the better rate. ``ALWAYS`` and the bucket go on; of the others those `kept` with the highest
   score, unless they end below the student that they began with.
2. *Centre.* Those arms run on the seeds that are judged.
3. *Factors.* The baseline, the paper's form and the winner run at every other level of every
   factor, the baseline not where only the support changes, the winner not where only clipping does.
   The winner is, of the arms that went on and are neither of ``ALWAYS``, the one with the highest
   mean score on the tuning problems at the centre.

Two changes came later. After the screening, before any judged number was read: the bucket had
missed the first three by 0.016, two problems of 128. It goes on all the same, because it is what
this package recommended until then. To stay within the number of runs, the winner lost those
without clipping. After the centre, whose results had been seen: LSM with the penalty led the bucket
by 0.001. Of arms within
``TIE`` of the best, one that is a single call of the package wins: it is what a default can be.

Decisions read the columns of ``TUNING`` and no others: the judged problems decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean

from choosing.arms import (
    ARMS,
    BUCKET,
    LSM_TOP_P,
    SAMPLED_TOKEN,
    SEVERAL_CALLS,
    WITHOUT_SUPPORT,
)

MOST_RUNS, MOST_SECONDS = 100, 75.0
SCREENING, CENTRAL, FACTOR = "screening", "centre", "factor"
SCREEN_SEED = 10
ALWAYS = (SAMPLED_TOKEN.name, LSM_TOP_P.name)
TIE = 0.01  # of success on the tuning problems: four problems of three seeds' 384


@dataclass(frozen=True)
class Setting:
    """What a run is done at."""

    lr: float = 1e-4
    clip: float = 1.0  # of the gradient's norm; inf: off
    k: int = 32
    start: float = 0.9  # about the student's mass on the teacher's 32 best, before

    def difference(self) -> tuple[str, float] | None:
        """The factor and level that is not the centre's."""
        for name, value in asdict(self).items():
            if value != getattr(CENTRE, name):
                return name, value
        return None


CENTRE = Setting()
SETTING = ("lr", "clip", "k", "start")
KEY = ("stage", "arm", *SETTING, "seed")
TUNING = (*KEY, "tune_score", "tune_before")
Row = Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """One line of the plan."""

    stage: str
    arm: str
    setting: Setting
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        """As it stands in a CSV file."""
        values = [getattr(self.setting, name) for name in SETTING]
        return (self.stage, self.arm, *(str(float(v)) for v in values), str(self.seed))


def key_of(row: Row) -> tuple[str, ...]:
    """The key of a run in a CSV file."""
    return tuple(row[name] for name in KEY)


def seen(rows: Sequence[Row]) -> list[dict[str, str]]:
    """What decisions may see of finished runs."""
    return [{name: row[name] for name in TUNING} for row in rows]


@dataclass(frozen=True)
class Plan:
    """The runs that there are."""

    arms: tuple[str, ...] = tuple(arm.name for arm in ARMS)
    screen_rates: tuple[float, ...] = (CENTRE.lr, 3e-4)
    kept: int = 3
    seeds: tuple[int, ...] = (0, 1, 2)
    factors: tuple[tuple[str, float], ...] = (
        *(("lr", lr) for lr in (3e-5, 3e-4)),
        ("clip", float("inf")),
        *(("k", k) for k in (4, 8, 16)),
        *(("start", mass) for mass in (0.7, 0.98)),
    )
    most_runs: int = MOST_RUNS

    def screening(self) -> list[Run]:
        """Every arm at each rate."""
        return [
            Run(SCREENING, arm, replace(CENTRE, lr=lr), SCREEN_SEED)
            for arm in self.arms
            for lr in self.screen_rates
        ]

    def central(self, arms: Sequence[str]) -> list[Run]:
        """The arms that go on, seed by seed."""
        return [Run(CENTRAL, arm, CENTRE, seed) for seed in self.seeds for arm in arms]

    def around(self, winner: str) -> list[Run]:
        """One factor at a time, level by level, seed by seed."""
        return [
            Run(FACTOR, arm, replace(CENTRE, **{name: level}), seed)
            for name, level in self.factors
            for seed in self.seeds
            for arm in (*ALWAYS, winner)
            if not (name == "k" and arm in WITHOUT_SUPPORT)
            if not (name == "clip" and arm == winner)
        ]

    def survivors(self, rows: Sequence[Row]) -> list[str]:
        """The arms that the screening leaves, in the order of the plan."""
        found = scores(rows, SCREENING)
        before = fmean(float(row["tune_before"]) for row in rows if row["stage"] == SCREENING)
        sure = (*ALWAYS, BUCKET.name)
        others = [arm for arm in self.arms if arm not in sure and found[arm] >= before]
        best = sorted(others, key=lambda arm: -found[arm])[: self.kept]
        return [arm for arm in self.arms if arm in (*sure, *best)]

    def stages(self, rows: Sequence[Row]) -> list[list[Run]]:
        """The stages that finished runs determine; each is known when the one before is done.

        Raises:
            ValueError: if there are more runs than are allowed.
        """
        done = {key_of(row) for row in rows}
        rows = seen(rows)
        stages = [self.screening()]
        if _finished(stages[-1], done):
            stages.append(self.central(self.survivors(rows)))
            best = winner(rows) if _finished(stages[-1], done) else None
            if best is not None:
                stages.append(self.around(best))
        count = sum(map(len, stages))
        if count > self.most_runs:
            raise ValueError(
                f"the plan has {count} runs, allowed are {self.most_runs}: take out levels or arms"
            )
        return stages

    def largest(self) -> int:
        """How many runs there are if the screening leaves all that it may."""
        sure = (*ALWAYS, BUCKET.name)
        others = [arm for arm in self.arms if arm not in sure][: self.kept]
        stages = self.screening(), self.central([*sure, *others]), self.around(BUCKET.name)
        return sum(map(len, stages))


FULL = Plan()
# Every stage, with as little as has all of its cases.
SMOKE = Plan(
    arms=(*ALWAYS, BUCKET.name, "generalize + top-p"),
    screen_rates=(CENTRE.lr,),
    kept=1,
    seeds=(0, 1),
    factors=(("k", 4), ("start", 0.7)),
)


def scores(rows: Sequence[Row], stage: str) -> dict[str, float]:
    """The mean over seeds of each arm, at the better of its settings."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["stage"] == stage:
            rates = found.setdefault(row["arm"], {})
            rates.setdefault(row["lr"], []).append(float(row["tune_score"]))
    return {arm: max(map(fmean, rates.values())) for arm, rates in found.items()}


def winner(rows: Sequence[Row]) -> str | None:
    """The best at the centre of what is neither the baseline nor the paper's form."""
    found = {arm: score for arm, score in scores(rows, CENTRAL).items() if arm not in ALWAYS}
    near = [arm for arm, score in found.items() if score >= max(found.values()) - TIE]
    single = [arm for arm in near if arm not in SEVERAL_CALLS]
    return max(single or near, key=lambda arm: found[arm]) if found else None


def _finished(runs: Sequence[Run], done: set[tuple[str, ...]]) -> bool:
    return all(run.key in done for run in runs)
