"""The toy study: its estimators against exact gradients, its checker, and its whole path."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from opd_kernels import sampled_token_advantages, sampled_token_loss

STUDIES = Path(__file__).resolve().parents[2] / "studies"
HORIZON, WIDTH = 4, 5


def load(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(STUDIES))
    return importlib.import_module(name)


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "toy.control")


@pytest.fixture
def estimators(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "toy.estimators")


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "toy.report")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    return load(monkeypatch, "toy_variance")


def every_sequence() -> Tensor:
    """All sequences of two tokens, (2^T, T)."""
    return torch.tensor(list(itertools.product((0, 1), repeat=HORIZON)))


def prefix_table(sequences: Tensor, *shape: int) -> Tensor:
    """Random values for every prefix, gathered along every sequence, (2^T, T, *shape)."""
    table = torch.randn(HORIZON, 2**HORIZON, *shape, dtype=torch.float64)
    codes = torch.zeros(len(sequences), dtype=torch.long)
    rows = []
    for step in range(HORIZON):
        rows.append(table[step, codes])
        codes = 2 * codes + sequences[:, step]
    return torch.stack(rows, 1)


def expected_gradient(estimators: ModuleType, gamma: float) -> tuple[Tensor, Tensor]:
    """The estimator's mean over all sequences, and the gradient of the KL of sequences."""
    torch.manual_seed(0)
    tokens = every_sequence()
    features = prefix_table(tokens, WIDTH)
    teacher = prefix_table(tokens, 2).log_softmax(-1)
    weight = torch.randn(WIDTH, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    student = (features @ weight + bias).log_softmax(-1)
    chosen = tokens.unsqueeze(-1)
    p, q = (side.gather(-1, chosen).squeeze(-1) for side in (student, teacher))
    total = p.sum(-1)
    exact = torch.autograd.grad((total.exp() * (total - q.sum(-1))).sum(), [weight, bias])
    one_hot = torch.nn.functional.one_hot(tokens, 2)
    slopes = (one_hot - student.exp()).detach()
    advantages = sampled_token_advantages(q, p.detach(), gamma)

    def alone(values: Tensor) -> Tensor:
        return values.repeat_interleave(estimators.MICRO_BATCH, 0).unsqueeze(0)

    gradients = estimators.micro_batch_gradients(alone(features), alone(slopes), alone(advantages))
    mean = (total.exp().detach().unsqueeze(-1) * gradients[0]).sum(0)
    return mean, torch.cat([exact[0].flatten(), exact[1]])


def test_at_gamma_one_the_estimator_averages_to_the_gradient_of_the_sequence_kl(
    estimators: ModuleType,
) -> None:
    mean, exact = expected_gradient(estimators, 1.0)
    torch.testing.assert_close(mean, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 0.75])
def test_below_gamma_one_the_estimator_is_biased(estimators: ModuleType, gamma: float) -> None:
    mean, exact = expected_gradient(estimators, gamma)
    assert (mean - exact).norm() > 0.01 * exact.norm()


def walk_with_gradient(control: ModuleType, policy: object, task: object, draws: Tensor) -> Tensor:
    """Inputs (R, B, T, 3) of trajectories that depend on the policy's parameters."""
    state, inputs = torch.full(draws.shape[:2], task.start), []
    for step in range(control.HORIZON):
        identity = torch.full_like(state, task.identity)
        time = torch.full_like(state, step / control.HORIZON)
        inputs.append(torch.stack([identity, state / 3, time], -1))
        mean, std = control.gaussian(policy(inputs[-1])[1])
        state = state + mean + std * draws[..., step]
    return torch.stack(inputs, 2)


def test_at_gamma_one_the_measured_signal_is_that_of_the_gradient_through_the_trajectories(
    control: ModuleType, estimators: ModuleType
) -> None:
    # Two ways to one number: scores of sampled actions, and the exact KL of each step with states
    # differentiated along the trajectory.
    task = control.TASKS[0]
    teacher = control.train_teachers(task, [torch.Generator().manual_seed(1)], 60)
    student = control.Policies.fresh([torch.Generator().manual_seed(2)])
    frozen = estimators.measure_frozen(
        student, teacher, task, (0.0, 1.0), [torch.Generator().manual_seed(3)], 16, 512
    )
    student.adam(1.0)
    draws = control.noise([torch.Generator().manual_seed(4)], 2048)
    inputs = walk_with_gradient(control, student, task, draws)
    divergence = control.reverse_kl(student(inputs)[1], teacher(inputs)[1]).sum(-1).mean()
    gradient = torch.autograd.grad(divergence, student.parameters[-2:])
    exact = sum(part.square().sum().item() for part in gradient)
    assert frozen.signal[0, 0].item() == pytest.approx(exact, rel=0.1)
    assert frozen.squared_bias[0, 0] > 0.1 * exact
    assert frozen.squared_bias[1, 0] == 0


def test_densities_and_divergences_are_those_of_normal_distributions(control: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 100, 2, generator=generator, dtype=torch.float64)
    actions = torch.randn(100, generator=generator, dtype=torch.float64)
    p, q = (torch.distributions.Normal(*control.gaussian(side)) for side in (student, teacher))
    torch.testing.assert_close(control.log_prob(student, actions), p.log_prob(actions))
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(control.reverse_kl(student, teacher), expected)


def test_micro_batches_average_to_the_gradient_that_trains(
    control: ModuleType, estimators: ModuleType
) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    students, teachers = control.Policies.fresh(generators), control.Policies.fresh(generators)
    rollouts = control.roll_out(students, control.TASKS[1], control.noise(generators, 32))
    students.adam(1.0)
    features, outputs = students(rollouts.inputs)
    logprobs = control.log_prob(outputs, rollouts.actions)
    teacher = control.log_prob(teachers(rollouts.inputs)[1], rollouts.actions)
    advantages = sampled_token_advantages(teacher, logprobs.detach(), 0.5)
    loss = sampled_token_loss(logprobs, logprobs.detach(), advantages, clip=None, reduction="sum")
    weight, bias = torch.autograd.grad(loss / 32, students.parameters[-2:])
    gradients = estimators.micro_batch_gradients(
        features.detach(), estimators.scores(outputs, rollouts.actions), advantages
    )
    assert gradients.shape == (2, 32 // estimators.MICRO_BATCH, 2 * (control.HIDDEN + 1))
    expected = torch.cat([weight.flatten(1), bias.flatten(1)], 1)
    torch.testing.assert_close(gradients.mean(1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [0.0, 0.1, 1.0])
def test_squared_norms_of_means_are_estimated_without_bias_and_the_error_is_not_understated(
    estimators: ModuleType, size: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = size * torch.linspace(-1, 1, 6, dtype=torch.float64)
    noise = torch.randn(4000, 16, 6, generator=generator, dtype=torch.float64)
    estimate, error = estimators.squared_norm(truth + noise)
    expected, spread = truth.square().sum().item(), estimate.std().item()
    assert estimate.mean().item() == pytest.approx(expected, abs=4 * spread / 4000**0.5)
    ratio = error.square().mean().sqrt().item() / spread
    # Far from zero the jackknife's variance is right, at zero about twice the true one.
    assert 0.95 < ratio < (1.1 if size == 1 else 1.6)


def ideal(reports: ModuleType) -> object:
    """A study in which variance rises and bias falls with gamma, for two seeds."""
    gammas, seeds = (0.0, 0.5, 1.0), (1, 2)
    training = [
        reports.Training(gamma, seed, iteration, 1 + gamma + seed, 0.5, 0.1)
        for gamma in gammas
        for seed in seeds
        for iteration in (10, 20)
    ]
    frozen = [
        reports.FrozenStudent(gamma, seed, task, iteration, 2 + gamma, 1 - gamma, 0.1, 4.0)
        for gamma in gammas
        for seed in seeds
        for task in ("left", "right")
        for iteration in (0, 20)
    ]
    return reports.Study(training, frozen, [])


def test_the_checker_accepts_the_ordering_of_the_paper(reports: ModuleType) -> None:
    text, good = reports.report(ideal(reports))
    assert good
    assert "NO" not in text
    assert text.endswith(
        "The paper's ordering holds: the variance rises with gamma; the bias falls.\n"
    )


@pytest.mark.parametrize(
    ("kind", "change", "claim"),
    [
        ("training", {"variance": 9.0}, "variance in training rises from gamma 0 to 0.5: NO, 1"),
        ("frozen", {"variance": 9.0}, "variance at the same student rises from gamma 0 to 0.5: NO"),
        ("frozen", {"squared_bias": 0.1}, "relative bias falls from gamma 0 to 0.5: NO, 1 of 2"),
        ("frozen", {"squared_bias": float("nan")}, "relative bias falls from gamma 0 to 0.5: NO"),
    ],
)
def test_the_checker_rejects_one_seed_with_a_wrong_ordering(
    reports: ModuleType, kind: str, change: dict[str, float], claim: str
) -> None:
    whole = ideal(reports)
    rows = [
        dataclasses.replace(row, **change) if (row.gamma, row.seed) == (0.0, 2) else row
        for row in getattr(whole, kind)
    ]
    text, good = reports.report(dataclasses.replace(whole, **{kind: rows}))
    assert not good
    assert claim in text
    assert text.endswith("The paper's ordering does NOT hold.\n")


def test_the_results_in_the_repository_are_of_the_full_size_and_give_their_table(
    reports: ModuleType,
) -> None:
    folder = STUDIES / "results" / "toy"
    results = reports.read_study(folder)
    assert results.gammas == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert results.seeds == [42, 43, 2026]
    assert results.checkpoints[-1] == max(row.iteration for row in results.training) == 2000
    text, _ = reports.report(results)
    assert text == (folder / "table.md").read_text(encoding="utf-8")


def test_the_gammas_of_a_seed_start_from_one_student_with_the_same_draws(
    study: ModuleType, control: ModuleType
) -> None:
    students = study.Students(1e-3)
    teachers = control.Policies.fresh(study.streams(study.TEACH))
    _, divergence, miss = students.update(control.TASKS[0], teachers)
    for first in (divergence.view(5, 3), miss.view(5, 3)):
        torch.testing.assert_close(first, first[:1].expand(5, 3))
        assert first[0].unique().numel() == 3
    _, divergence, _ = students.update(control.TASKS[1], teachers)
    assert divergence.unique().numel() == 15


def test_every_run_is_discounted_with_its_own_gamma(study: ModuleType) -> None:
    zeros = torch.zeros(15, 1, 3)
    first = study.discounted(zeros + 1, zeros)[:, 0, 0].view(5, 3)
    expected = [1 + gamma + gamma**2 for gamma in study.GAMMAS]
    torch.testing.assert_close(first, torch.tensor(expected).unsqueeze(-1).expand(5, 3))


def test_two_runs_write_the_same_bytes_and_a_report_repeats_table_and_plot(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["variance.csv", "bias.csv", "trajectories.csv", "table.md", "toy.png"]
    kept = []
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        monkeypatch.chdir(tmp_path / run)
        assert study.main(["--smoke"]) == 0
        folder = tmp_path / run / "demo_output" / "toy"
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)
        kept.append([(folder / name).read_bytes() for name in names[:4]])
    assert kept[0] == kept[1]
    for name in ("table.md", "toy.png"):
        (folder / name).unlink()
    judged = study.main(["--report", "--output", str(folder)])
    assert judged == (0 if b"ordering of the paper holds" in kept[0][3] else 1)
    assert (folder / "table.md").read_bytes() == kept[0][3]
    assert (folder / "toy.png").stat().st_size > 0


def test_a_report_without_results_names_the_missing_files(
    study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main(["--report", "--output", str(tmp_path)]) == 2
    assert "variance.csv, bias.csv, trajectories.csv" in capsys.readouterr().err


def test_without_matplotlib_the_script_says_what_to_install() -> None:
    program = (
        "import runpy, sys; sys.modules['matplotlib'] = None; "
        f"sys.path.insert(0, {str(STUDIES)!r}); runpy.run_path("
        f"{str(STUDIES / 'toy_variance.py')!r}, run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 2
    assert "pip install" in run.stderr
    assert "matplotlib" in run.stderr
