"""One run: steps with an arm at a setting, its curve on tuning problems, and its judgement."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from choosing.arms import BY_NAME
from choosing.pair import ChainPair, Sizes
from choosing.plan import CENTRE, MOST_SECONDS, SCREENING, Run
from choosing.probes import probe, watch
from comparison.rollouts import Rollouts
from comparison.training import evaluate, observe, score, update

AVERAGED = 5  # rows of steps that make one that is kept; the first ones are kept each
FIRST_STEPS = 10


def run(
    plan: Run,
    steps: int,
    sizes: Sizes,
    models: Path,
    path: Path,
    reserve: float,
    tick: Callable[[], None],
) -> None:
    """Do a run of at most ``MOST_SECONDS`` of one core and leave its lines in a file.

    A run stops early where the next step and its evaluation, `reserve`, would pass that limit; its
    line says how many steps it did. Every step draws from a generator of its own seed and step.
    """
    begun = time.process_time()
    pair = ChainPair(models, sizes, plan.seed, plan.setting.start, int(plan.setting.k))
    training = Training(pair, plan)
    marks = {round(steps * (i + 1) / sizes.curve_points) for i in range(sizes.curve_points)}
    training.look(0)
    for number in range(steps):
        spent = time.process_time() - begun
        if spent * (number + 1) / max(1, number) + reserve > MOST_SECONDS and number:
            break
        training.step(number, number % sizes.probe_every == 0)
        if number + 1 in marks:
            training.look(number + 1)
        tick()
    done = len(training.steps)
    if training.curve[-1]["step"] != done:
        training.look(done)
    line = {"planned": steps, "steps": done, **training.summary()}
    positions = []
    if plan.stage != SCREENING:
        judged = judge(pair)
        positions = judged.pop("positions")
        line.update(judged)
    line["core_seconds"] = time.process_time() - begun
    tables = {
        "runs": [line],
        "steps": list(thinned(training.steps)),
        "curve": training.curve,
        "probes": training.probes,
        "positions": positions,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"key": plan.key, "tables": tables}))
    partial.replace(path)


class Training:
    """What a run has learnt and noted so far."""

    def __init__(self, pair: ChainPair, plan: Run) -> None:
        """Begin at the pair's student."""
        self.pair, self.setting, self.arm = pair, plan.setting, BY_NAME[plan.arm]
        self.optimizer = torch.optim.AdamW(
            pair.student.parameters(), lr=plan.setting.lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.steps: list[dict[str, Any]] = []
        self.curve: list[dict[str, Any]] = []
        self.probes: list[dict[str, Any]] = []

    def step(self, number: int, probed: bool) -> None:
        """Roll out, probe if it is time, update."""
        pair, clip = self.pair, self.setting.clip
        torch.manual_seed(1_000_003 * pair.seed + number)
        batch, success = pair.rollouts(number, self.arm.top_p)
        if probed:
            self.probes += [{"step": number + 1, **row} for row in probe(pair, batch)]
        for group in self.optimizer.param_groups:
            group["lr"] = self.setting.lr * min(1.0, (number + 1) / pair.sizes.warm_up)
        limit = None if math.isinf(clip) else clip
        row = update(pair, self.arm, self.optimizer, batch, clip=limit, watch=watch)
        row["clipped"] = float(row["grad_norm"] > clip)
        row["success"] = float(success.float().mean())
        self.steps.append({"step": number + 1, **row})

    def look(self, step: int) -> None:
        """Note a point of the curve, on tuning problems and the centre's support."""
        torch.manual_seed(self.pair.seed)
        sequences, success = self.pair.tuning()
        point = {
            "tune_success": float(success.float().mean()),
            "tune_mass": mass(self.pair, sequences),
        }
        self.curve.append({"step": step, **point})

    def summary(self) -> dict[str, float]:
        """What decisions read, and means over the steps."""
        last = self.curve[1:][-2:]
        return {
            "tune_before": self.curve[0]["tune_success"],
            "tune_score": fmean(point["tune_success"] for point in last),
            "start_mass": self.curve[0]["tune_mass"],
            "clipped": fmean(row["clipped"] for row in self.steps),
            "grad_norm": fmean(row["grad_norm"] for row in self.steps),
            "tokens": sum(row["tokens"] for row in self.steps),
        }


@torch.no_grad()
def mass(pair: ChainPair, sequences: Rollouts) -> float:
    """The student's on the teacher's K best, K as at the centre."""
    own, pair.k = pair.k, int(CENTRE.k)
    found = observe(score(pair, sequences, ()))["student_mass"].mean()
    pair.k = own
    return float(found)


def judge(pair: ChainPair) -> dict[str, Any]:
    """What the judged problems say, on the centre's support."""
    torch.manual_seed(pair.seed)
    pair.k = int(CENTRE.k)
    found = evaluate(pair)
    bins = found.pop("gap_by_position")
    positions = [dict(zip(("position", "gap", "tokens"), one, strict=True)) for one in bins]
    left_out = {name for name in found if name.startswith("ordinary_")}
    named = {f"judge_{name}": value for name, value in found.items() if name not in left_out}
    return {**named, "positions": positions}


def thinned(steps: Sequence[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """The first rows, then means of every few."""
    yield from (dict(row) for row in steps[:FIRST_STEPS])
    for i in range(FIRST_STEPS, len(steps), AVERAGED):
        few = steps[i : i + AVERAGED]
        means = {name: fmean(row[name] for row in few) for name in few[0]}
        yield {**means, "step": few[-1]["step"]}


def timed(sizes: Sizes, models: Path, arm: str, seed: int) -> tuple[float, float]:
    """Core seconds of a step of an arm at the centre, its share of a probe included; of the rest.

    The rest is loading, the curve and the judgement.
    """
    begun = time.process_time()
    pair = ChainPair(models, sizes, seed, CENTRE.start, int(CENTRE.k))
    training = Training(pair, Run(SCREENING, arm, CENTRE, seed))
    training.look(0)
    loading = time.process_time() - begun
    training.step(0, True)
    times = []
    for number in range(1, 1 + sizes.timed_steps):
        start = time.process_time()
        training.step(number, False)
        times.append(time.process_time() - start)
    start = time.process_time()
    probe(pair, pair.rollouts(0, 1.0)[0])
    probing = time.process_time() - start
    start = time.process_time()
    training.look(len(training.steps))
    looking = time.process_time() - start
    start = time.process_time()
    judge(pair)
    judging = time.process_time() - start
    rest = loading + sizes.curve_points * looking + judging
    return fmean(times) + probing / sizes.probe_every, rest
