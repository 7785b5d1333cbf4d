"""A toy of on-policy distillation: the discount of the return-to-go trades bias for variance.

A student is distilled from sampled actions alone. With r_t = log q(a_t | s_t) - log p(a_t | s_t),
the advantage of an action is the return-to-go of these rewards, discounted by gamma: gamma = 0 is
the token level, gamma = 1 the sequence level, whose expected gradient is that of KL(student ||
teacher) of whole trajectories. arXiv 2603.25562 bounds the variance in the worst case by O(T²) at
gamma = 0 and O(T⁴) at gamma = 1, and shows the trade on a toy (section 2.1, appendix E) that this
script repeats.

From the paper: two mirrored tasks in one dimension, from +2 to -3 ("left") and from -2 to +3
("right"), s' = s + δ with δ ~ N(μ, σ); the policy is a three-layer MLP of about 4K parameters with
task, state and normalised time as inputs, μ and σ as outputs; each task has a teacher of its own,
trained with REINFORCE, and one student learns both, the tasks alternating; gamma in {0, .25, .5,
.75, 1}, seeds 42, 43 and 2026, 2000 iterations of 64 trajectories; the variance of the output
layer's gradient between 8 micro-batches.

Chosen here: T = 20; two hidden layers of 60 tanh units, 4022 parameters; σ = 0.1 + softplus; the
teachers' cost, 0.8 Σ δ² + 2 (s_T - target)²; Adam at 1e-3 for students, without clipping or a
baseline; the task changes at every iteration. Teachers and initial students differ by seed; the
five gammas of a seed start from one student and see the same random draws. The variance divides by
7, not by 8 as in the paper. Mirrored tasks ask for opposite steps in the same state, so the student
has to read the task: multi-task distillation from two experts, in miniature.

Runs with different gammas soon hold different students, so the estimators are compared at the same
students too: at four iterations of each token-level run, every gamma's gradient is estimated from
the same 32,768 trajectories of either task. Its bias is the distance of its expectation from that
of gamma = 1.

What does not repeat: the paper saw students at gamma = 1 settle away from the targets, and its
variance lie orders of magnitude above that of small gammas in several runs. Here the students of
every gamma end within 0.2 of the targets on average; at gamma = 1 they only come closer to their
teachers more slowly, and the variance at the same students is 18 times that of gamma = 0.

Checked: for every seed and from every gamma to the next, the variance rises, in training and at the
same students, as the paper reports it; and the bias falls, which the paper argues with and does not
measure (at gamma = 1 it is 0 by definition). The exit code is 0 if so, 1 if not, 2 if a package or
a file is missing or an option is wrong.

    python studies/toy_variance.py             # minutes on one core
    python studies/toy_variance.py --smoke     # the whole path in seconds, not judged
    python studies/toy_variance.py --report    # table, plot and verdict from the CSV files
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    import torch
    from torch import Generator, Tensor
    from toy.control import (
        HORIZON,
        TASKS,
        Policies,
        Rollouts,
        Task,
        log_prob,
        noise,
        reverse_kl,
        roll_out,
        train_teachers,
    )
    from toy.estimators import (
        measure_frozen,
        micro_batch_gradients,
        scores,
        total_variance,
    )
    from toy.plot import draw_study
    from toy.report import (
        FILES,
        FrozenStudent,
        Study,
        Training,
        Visit,
        read_study,
        report,
        write_study,
    )
    from tqdm import tqdm

    from opd_kernels import sampled_token_advantages, sampled_token_loss
except ImportError as error:
    print(f"{error}; the toy study needs: pip install tqdm matplotlib", file=sys.stderr)
    raise SystemExit(2) from None

GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEEDS = (42, 43, 2026)
TRAJECTORIES = 64
RESULTS = Path(__file__).parent / "results" / "toy"
OTHER = Path("demo_output") / "toy"
ROW_EVERY = 10  # iterations that one row of variance.csv averages
# Uses of randomness; every seed has a stream of its own for each.
TRAIN, MEASURE, VISIT, TEACH = range(4)  # and TEACH + 1 for the second task


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; results of other sizes than the kept ones go elsewhere."""
    parser = argparse.ArgumentParser(
        description="Bias and variance of sampled-token distillation by discount, on toy tasks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--iterations", type=int, default=2000, help="updates of every student")
    parser.add_argument(
        "--teacher-iterations", type=int, default=1000, help="REINFORCE updates of every teacher"
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's, for students")
    parser.add_argument(
        "--output", type=Path, help=f"result folder; {RESULTS}, but {OTHER} for other sizes"
    )
    parser.add_argument("--report", action="store_true", help="train nothing, read the CSV files")
    parser.add_argument("--smoke", action="store_true", help="a few iterations; not judged")
    options = parser.parse_args(arguments)
    options.groups, options.group_size = 64, 512
    sizes = ("iterations", "teacher_iterations", "lr")
    other = any(getattr(options, name) != parser.get_default(name) for name in sizes)
    options.output = options.output or (OTHER if other or options.smoke else RESULTS)
    if options.smoke:
        options.iterations, options.teacher_iterations = 20, 20
        options.groups, options.group_size = 4, 16
    if min(options.iterations, options.teacher_iterations) < 1:
        parser.error("--iterations and --teacher-iterations must be at least 1")
    return options


def streams(use: int) -> list[Generator]:
    """One generator for each seed, not used for anything else."""
    return [Generator().manual_seed(1000 * seed + use) for seed in SEEDS]


class Students:
    """All runs as one batch of policies, gamma by gamma and within a gamma seed by seed."""

    def __init__(self, learning_rate: float) -> None:
        """Start the runs of a seed from one student."""
        self.generators = streams(TRAIN)
        self.policies = Policies.fresh(self.generators).repeat(len(GAMMAS))
        self.optimizer = self.policies.adam(learning_rate)

    def update(self, task: Task, teachers: Policies) -> tuple[Tensor, Tensor, Tensor]:
        """Train once on own trajectories; variance, reverse KL and miss of each run in them."""
        draws = noise(self.generators, TRAJECTORIES).repeat(len(GAMMAS), 1, 1)
        rollouts = roll_out(self.policies, task, draws)
        features, outputs = self.policies(rollouts.inputs)
        logprobs = log_prob(outputs, rollouts.actions)
        with torch.no_grad():
            teacher_outputs = teachers.repeat(len(GAMMAS))(rollouts.inputs)[1]
            teacher_logprobs = log_prob(teacher_outputs, rollouts.actions)
        advantages = discounted(teacher_logprobs, logprobs.detach())
        loss = sampled_token_loss(
            logprobs, logprobs.detach(), advantages, clip=None, reduction="sum"
        )
        self.optimizer.zero_grad()
        (loss / TRAJECTORIES).backward()
        self.optimizer.step()
        gradients = micro_batch_gradients(
            features.detach(), scores(outputs, rollouts.actions), advantages
        )
        divergence = reverse_kl(outputs.detach(), teacher_outputs).sum(-1).mean(-1)
        return total_variance(gradients), divergence, missed(rollouts, task)


def discounted(teacher_logprobs: Tensor, logprobs: Tensor) -> Tensor:
    """Advantages (R, B, T), each run's with its own gamma."""
    pairs = zip(
        GAMMAS, teacher_logprobs.chunk(len(GAMMAS)), logprobs.chunk(len(GAMMAS)), strict=True
    )
    return torch.cat([sampled_token_advantages(q, p, gamma) for gamma, q, p in pairs])


def missed(rollouts: Rollouts, task: Task) -> Tensor:
    """Mean distance (R) of the last state from the target."""
    return (rollouts.states[..., -1] - task.target).abs().mean(-1)


def training_rows(iteration: int, values: Tensor) -> list[Training]:
    """Rows of one stretch of training from values (iterations, 3, R)."""
    by_run = values.mean(0).view(3, len(GAMMAS), len(SEEDS)).tolist()
    return [
        Training(gamma, seed, iteration, *(by_run[kind][g][s] for kind in range(3)))
        for g, gamma in enumerate(GAMMAS)
        for s, seed in enumerate(SEEDS)
    ]


def frozen_rows(
    iteration: int,
    students: Policies,
    teachers: Sequence[Policies],
    generators: Sequence[Generator],
    options: argparse.Namespace,
) -> list[FrozenStudent]:
    """Rows of every gamma's estimator at one student for each seed."""
    rows = []
    for task, experts in zip(TASKS, teachers, strict=True):
        frozen = measure_frozen(
            students, experts, task, GAMMAS, generators, options.groups, options.group_size
        )
        measured = torch.stack(
            [frozen.variance, frozen.squared_bias, frozen.squared_bias_error, frozen.signal], -1
        ).tolist()
        rows += [
            FrozenStudent(gamma, seed, task.name, iteration, *measured[g][s])
            for g, gamma in enumerate(GAMMAS)
            for s, seed in enumerate(SEEDS)
        ]
    return rows


def visit_rows(students: Policies, teachers: Sequence[Policies], count: int) -> list[Visit]:
    """Rows of where trained students and teachers go; `count` trajectories each."""
    rows = []
    everyone = [f"{gamma:g}" for gamma in GAMMAS] + ["teacher"]
    for task, experts in zip(TASKS, teachers, strict=True):
        draws = noise(streams(VISIT), count)
        walks = roll_out(students, task, draws.repeat(len(GAMMAS), 1, 1)).states
        states = torch.cat([walks, roll_out(experts, task, draws).states])
        std, mean = torch.std_mean(states.view(len(everyone), len(SEEDS), count, -1), 2)
        rows += [
            Visit(who, seed, task.name, t, mean[w, s, t].item(), std[w, s, t].item())
            for w, who in enumerate(everyone)
            for s, seed in enumerate(SEEDS)
            for t in range(HORIZON + 1)
        ]
    return rows


def run_study(options: argparse.Namespace) -> Study:
    """Train teachers and students and measure, with a progress bar."""
    iterations = options.iterations
    teachers = []
    for number, task in enumerate(TASKS):
        print(f"teachers of the {task.name} task", flush=True)
        teachers.append(train_teachers(task, streams(TEACH + number), options.teacher_iterations))
    students, measuring = Students(options.lr), streams(MEASURE)
    checkpoints = {0, iterations // 20, iterations // 4, iterations}
    training, frozen, stretch = [], [], []
    progress = tqdm(range(iterations + 1), desc="students", file=sys.stdout)
    for iteration in progress:
        if iteration in checkpoints:
            # The first gamma is 0: these are the students of the token-level runs.
            token_level = students.policies.first(len(SEEDS))
            frozen += frozen_rows(iteration, token_level, teachers, measuring, options)
        if iteration == iterations:
            break
        turn = iteration % len(TASKS)
        stretch.append(torch.stack(students.update(TASKS[turn], teachers[turn])))
        if len(stretch) == ROW_EVERY or iteration + 1 == iterations:
            training += training_rows(iteration + 1, torch.stack(stretch))
            progress.set_postfix(kl=f"{training[-1].reverse_kl:.3g}")
            stretch = []
    final = students.policies.repeat(1)
    return Study(training, frozen, visit_rows(final, teachers, options.group_size))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or read the study; table, plot and exit code."""
    options = parse_options(arguments)
    if options.report:
        missing = [name for _, name, _ in FILES if not (options.output / name).is_file()]
        if missing:
            print(
                f"{options.output} lacks {', '.join(missing)}: run without --report first",
                file=sys.stderr,
            )
            return 2
    else:
        options.output.mkdir(parents=True, exist_ok=True)
        write_study(options.output, run_study(options))
    study = read_study(options.output)
    text, good = report(study)
    print(text, end="")
    (options.output / "table.md").write_text(text, encoding="utf-8")
    draw_study(options.output / "toy.png", study)
    if options.smoke:
        print("smoke run: not judged")
    return 0 if good or options.smoke else 1


if __name__ == "__main__":
    raise SystemExit(main())
