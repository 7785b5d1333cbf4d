"""The demo's SmolLM2 pair, longer than the demo: the paper's form and the winner, two seeds."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from choosing.arms import BY_NAME, LSM_TOP_P
from compare_objectives import distil
from comparison.arms import BEFORE
from comparison.jobs import Job, work_through
from comparison.pairs import SmolLM2Pair, prepare_smollm2
from comparison.training import Budget, result_path

SEEDS = (0, 1)
WARM_STEPS = 24
BUDGET = Budget(steps=60, lr=2.5e-5, checkpoint_every=5)
COLUMNS = ("arm", "seed", "steps", "reverse_kl", "forward_kl", "student_mass", "teacher_mass")


def jobs(output: Path, winner: str) -> list[Job]:
    """Before, the paper's form and the winner; they go on from checkpoints."""
    found = []
    for seed in SEEDS:
        for arm in (BEFORE, LSM_TOP_P, BY_NAME[winner]):
            budget = BUDGET if arm is not BEFORE else Budget(steps=0, lr=0.0)
            path = result_path(output, SmolLM2Pair.name, arm, seed)
            found.append(
                Job(path, budget.steps, distil, (SmolLM2Pair, (seed,), arm, budget, output))
            )
    return found


def run(output: Path, results: Path, winner: str, workers: int) -> None:
    """Do what is missing; the CSV file is written again after each run."""
    folder = output / "models"
    warm = Job(folder / "smollm2.pt", WARM_STEPS, prepare_smollm2, (folder, WARM_STEPS))
    work_through("warm start", [warm], workers)
    todo = jobs(output, winner)
    work_through("smollm2", todo, workers, lambda path: collect(todo, results))
    collect(todo, results)


def collect(todo: Sequence[Job], results: Path) -> None:
    """Write what is done as a CSV file."""
    done = [json.loads(job.path.read_text()) for job in todo if job.path.exists()]
    results.mkdir(parents=True, exist_ok=True)
    with (results / "smollm2.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(done)
