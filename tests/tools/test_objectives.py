"""The study of objectives: its plan and rules, its splits, its records, its statistics, a run."""

from __future__ import annotations

import json
import math
import random
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("matplotlib", "tensorboard", "tqdm", "transformers"):
    pytest.importorskip(package, reason="the study needs it")
STUDIES = Path(__file__).resolve().parents[2] / "studies"
sys.path.insert(0, str(STUDIES))

import objectives as command  # noqa: E402
from choosing import (  # noqa: E402
    arms,
    failures,
    intervals,
    language,
    pair,
    plan,
    probes,
    real,
    records,
    report,
    runs,
)
from comparison import training  # noqa: E402
from comparison.arms import Scores  # noqa: E402
from comparison.models import demonstrations  # noqa: E402
from comparison.vocabulary import FILLERS, STUDENT_END  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def finished(line: plan.Run, score: float, judged: float = 0.0, before: float = 0.2) -> dict:
    """A line of runs.csv, as text."""
    values = {"tune_score": score, "tune_before": before, "judge_success": judged}
    return dict(zip(plan.KEY, line.key, strict=True)) | {n: str(v) for n, v in values.items()}


# --- the plan


def test_the_plan_stays_within_its_number_of_runs_and_a_larger_one_is_refused() -> None:
    assert plan.FULL.largest() <= plan.MOST_RUNS == 100
    assert plan.FULL.seeds == (0, 1, 2)
    assert plan.SCREEN_SEED not in plan.FULL.seeds
    with pytest.raises(ValueError, match="22 runs, allowed are 21"):
        replace(plan.FULL, most_runs=21).stages([])


def test_a_factor_changes_nothing_else_and_the_baseline_has_no_k() -> None:
    lines = plan.FULL.around(arms.BUCKET.name)
    for line in lines:
        changed = [n for n, v in asdict(line.setting).items() if v != getattr(plan.CENTRE, n)]
        assert len(changed) == 1
        assert (line.arm in arms.WITHOUT_SUPPORT) <= (changed != ["k"])
        assert (line.arm == arms.BUCKET.name) <= (changed != ["clip"])
    assert len({line.key for line in lines}) == len(lines)
    assert {line.setting.difference() for line in lines} == set(plan.FULL.factors)


def screened(scores: dict[str, float]) -> list[dict[str, str]]:
    """Arms at the better of two rates; the other is worse by 0.1."""
    rows = []
    for line in plan.FULL.screening():
        score = scores.get(line.arm, 0.3)
        rows.append(finished(line, score if line.setting.lr == 3e-4 else score - 0.1))
    return rows


def test_the_screening_keeps_the_references_the_bucket_and_the_best_three_that_gained() -> None:
    best = {"sample": 0.9, "generalize + top-p": 0.8, "mixed 0.5 + top-p": 0.7, plan.ALWAYS[0]: 0.0}
    kept = plan.FULL.survivors(screened(best))
    assert kept == [
        "sampled-token",
        "LSM + top-p",
        "bucket + top-p",
        "sample",
        "generalize + top-p",
        "mixed 0.5 + top-p",
    ]
    worse = {arm.name: 0.1 for arm in arms.ARMS} | {"sample": 0.25}
    kept = ["sampled-token", "LSM + top-p", "bucket + top-p", "sample"]
    assert plan.FULL.survivors(screened(worse)) == kept


def test_judged_problems_decide_nothing() -> None:
    rows = screened({"sample": 0.9, "generalize + top-p": 0.8})
    for line in plan.FULL.stages(rows)[1]:
        rows.append(finished(line, 0.5 + 0.1 * (line.arm == "sample"), judged=random.random()))
    stages = plan.FULL.stages(rows)
    assert {line.arm for line in stages[2]} == {*plan.ALWAYS, "sample"}
    others = [row | {"judge_success": str(1 - float(row["judge_success"]))} for row in rows]
    assert plan.FULL.stages(others) == stages
    assert not [name for name in plan.seen(rows)[0] if "judge" in name]


@pytest.mark.parametrize(("lead", "best"), [(0.005, "sample"), (0.02, arms.PENALIZED.name)])
def test_a_single_call_wins_where_it_is_within_the_tie(lead: float, best: str) -> None:
    scores = {"sampled-token": 0.9, "sample": 0.6, arms.BUCKET.name: 0.597}
    scores[arms.PENALIZED.name] = 0.6 + lead
    lines = plan.FULL.central(list(scores))
    assert plan.winner([finished(line, scores[line.arm]) for line in lines]) == best


def test_the_demos_pair_runs_the_papers_form_and_the_winner_on_two_seeds(tmp_path: Path) -> None:
    jobs = real.jobs(tmp_path, "sample")
    ran = [(job.arguments[2].name, job.arguments[1], job.steps) for job in jobs]
    each = [("before", 0), ("LSM + top-p", 60), ("sample", 60)]
    assert ran == [(arm, (seed,), steps) for seed in (0, 1) for arm, steps in each]
    assert len({job.path for job in jobs}) == 6
    jobs[1].path.parent.mkdir(parents=True)
    result = dict.fromkeys(real.COLUMNS, 0.5) | {"arm": "LSM + top-p", "length": 3.0}
    jobs[1].path.write_text(json.dumps(result))
    real.collect(jobs, tmp_path)
    assert "| LSM + top-p | 0.5 | 0.5 | 0.500 |" in report._smollm2(tmp_path / "smollm2.csv")


def test_a_stage_waits_for_all_runs_of_the_one_before() -> None:
    rows = screened({})
    assert len(plan.FULL.stages(rows[:-1])) == 1
    assert len(plan.FULL.stages(rows)) == 2


# --- the language


def test_a_problem_is_in_one_split_whatever_draws_it() -> None:
    rng = random.Random(0)
    for name, kind in language.SPLITS.items():
        assert {language.split_of(kind.sample(rng).prompt) for _ in range(100)} == {name}
    noisy = language.noisy(0.3)
    assert {language.split_of(noisy.sample(rng).prompt) for _ in range(100)} == {language.TRAIN}
    prompts = {tuple(language.JudgeChain.sample(rng).prompt) for _ in range(300)}
    assert len(prompts) > 250


def test_noise_is_fillers_before_that_share_of_the_words_and_the_rest_solves_the_problem() -> None:
    rng, counts = random.Random(1), []
    for _ in range(200):
        chain = language.noisy(0.2).sample(rng)
        words = chain.expert(rng)
        counts.append(sum(word in FILLERS for word in words) / (len(words)))
        chain.say([*(word for word in words if word not in FILLERS), STUDENT_END])
        assert chain.success
    # One filler in eleven without any noise: three lines, of which a quarter have one.
    assert sum(counts) / 200 == pytest.approx(0.2 / 1.2 + 0.75 / 24 / 1.2, abs=0.02)


# --- the arms


def random_scores(k: int = 3, vocab: int = 40) -> Scores:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(6, vocab, generator=generator) * 2 for _ in range(2))
    tokens = torch.randint(vocab, (6,), generator=generator)
    response = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 1, 0]], dtype=torch.bool)
    return Scores(student.requires_grad_(), teacher, tokens, k, [], response)


@pytest.mark.parametrize("arm", arms.ARMS, ids=lambda arm: arm.name)
def test_every_arm_has_a_loss_of_each_token_and_a_gradient(arm: Any) -> None:
    scores = random_scores()
    loss = arm.loss(scores)
    assert loss.shape == (6,)
    (gradient,) = torch.autograd.grad(loss.sum(), scores.student)
    assert gradient.isfinite().all()
    assert (gradient.abs().sum(-1) > 0).all()
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(6), atol=1e-5, rtol=0)


def masses(scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
    ids = scores.teacher.topk(scores.k).indices
    return tuple(
        side.double().softmax(-1).gather(-1, ids).sum(-1)
        for side in (scores.student, scores.teacher)
    )


def test_the_penalty_is_what_the_student_lacks_of_the_teachers_mass() -> None:
    scores = random_scores()
    surer = torch.tensor([[False], [True]] * 3)
    student = torch.where(surer, 2 * scores.teacher, scores.student.detach())
    scores = replace(scores, student=student.requires_grad_())
    ours, theirs = masses(scores)
    assert 0 < (ours < theirs).sum() < 6
    lost = arms.lost_mass(scores)
    wanted = (theirs - ours).relu()
    torch.testing.assert_close(lost.double(), wanted, atol=1e-6, rtol=0)
    got, expected = (torch.autograd.grad(x.sum(), scores.student)[0] for x in (lost, wanted))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    both = arms.penalized(scores) - arms.LSM_TOP_P.loss(scores)
    torch.testing.assert_close(both.double(), arms.PENALTY * wanted, atol=1e-6, rtol=0)


def test_the_discounted_return_adds_up_later_tokens_of_the_same_sequence() -> None:
    scores = random_scores()
    said = scores.tokens[:, None]
    log_p, log_q = (
        x.detach().log_softmax(-1).gather(-1, said)[:, 0] for x in (scores.student, scores.teacher)
    )
    r = log_q - log_p
    g = arms.DISCOUNT
    returns = [step for a, b, c in (r[:3], r[3:]) for step in (a + g * b + g * g * c, b + g * c, c)]
    torch.testing.assert_close(arms.discounted(scores), -torch.stack(returns))


# --- what is measured


@pytest.mark.parametrize("objective", ["lsm", "bucket"])
def test_the_drift_is_what_the_mass_does_along_the_gradient(objective: str) -> None:
    scores = random_scores()
    logits = scores.student.detach().double().requires_grad_()
    ids = scores.teacher.topk(scores.k).indices
    exact = replace(scores, student=logits, teacher=scores.teacher.double())
    (gradient,) = torch.autograd.grad(probes.PROBED[objective](exact).sum(), logits)
    moved = [
        (logits - step * gradient).softmax(-1).gather(-1, ids).sum(-1) for step in (1e-4, -1e-4)
    ]
    wanted = ((moved[0] - moved[1]) / 2e-4).detach()
    torch.testing.assert_close(
        probes.drift(scores, objective).double(), wanted, atol=2e-6, rtol=1e-4
    )


@pytest.fixture
def tiny(tmp_path: Path) -> Any:
    """A pair of a few thousand parameters, prepared as all are."""
    folder = tmp_path / "models"
    pair.prepare_teacher(folder, command.SMOKE, lambda: None)
    pair.prepare_student(folder, command.SMOKE, 0, plan.CENTRE.start, lambda: None)
    return folder


def test_a_probes_drift_is_that_of_a_small_step_of_all_weights(tiny: Path) -> None:
    chosen = pair.ChainPair(tiny, command.SMOKE, 0, plan.CENTRE.start, 32)
    batch = demonstrations((language.Chain,), 8, random.Random(0), dialect=False)
    chosen.student.double()
    chosen.teacher.double()
    rows = {row["objective"]: row for row in probes.probe(chosen, batch)}
    weights = [p for p in chosen.student.parameters() if p.requires_grad]

    def mass() -> torch.Tensor:
        scores = training.score(chosen, batch, ())
        return scores.student.softmax(-1).gather(-1, scores.support.ids.long()).sum(-1).mean()

    scores = training.score(chosen, batch, ())
    gradient = torch.autograd.grad(probes.PROBED["bucket"](scores).mean(), weights)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradient))
    assert rows["bucket"]["norm"] == pytest.approx(norm, rel=1e-3)
    step, found = 1e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            for weight, g in zip(weights, gradient, strict=True):
                weight -= sign * step / norm * g
            found.append(float(mass()))
            for weight, g in zip(weights, gradient, strict=True):
                weight += sign * step / norm * g
    assert rows["bucket"]["drift"] == pytest.approx((found[0] - found[1]) / (2 * step), rel=1e-2)
    outside = sum(value for name, value in rows["lsm"].items() if name.startswith("outside_"))
    assert outside == pytest.approx(1 - rows["lsm"]["student_mass"], abs=1e-5)


def test_signal_and_noise_of_micro_batches_are_without_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    counts, size = [100, 300, 200, 400], 50
    shares = torch.tensor(counts) / sum(counts)
    signal, noise = 0.02 * torch.ones(size), 3.0
    found = []
    for _ in range(3000):
        each = torch.randn(4, size, generator=generator) * noise / size**0.5
        # A token has variance noise^2 in all, a micro-batch that over its number of tokens.
        parts = signal + each / torch.tensor(counts)[:, None] ** 0.5
        found.append(probes._moments(parts, shares, torch.zeros(size), counts))
    mean = {name: sum(row[name] for row in found) / 3000 for name in ("signal", "token_variance")}
    assert mean["token_variance"] == pytest.approx(noise**2, rel=0.03)
    assert mean["signal"] == pytest.approx(float(signal.square().sum()), rel=0.03)


def test_the_shares_of_the_signal_are_those_of_sorted_gradients(tiny: Path) -> None:
    chosen = pair.ChainPair(tiny, command.SMOKE, 0, plan.CENTRE.start, 32)
    batch = demonstrations((language.Chain,), 40, random.Random(0), dialect=False)
    rows = [row for row in failures.signal(chosen, batch) if row["objective"] == "sampled"]
    scores = training.score(chosen, batch, ())
    p, q = (x.detach().softmax(-1) for x in (scores.student, scores.teacher))
    said = scores.tokens[:, None]
    # -(log q - log p) of the said token times (one-hot - p).
    advantage = (q.gather(-1, said).log() - p.gather(-1, said).log())[:, 0]
    norms = advantage.abs() * (torch.zeros_like(p).scatter(-1, said, 1.0) - p).norm(dim=-1)
    norms = norms.sort(descending=True).values
    for row in rows:
        first = norms[: max(1, round(row["share_of_tokens"] * len(norms)))]
        assert row["share_of_signal"] == pytest.approx(float(first.sum() / norms.sum()), rel=1e-4)
        assert row["lowered"] == pytest.approx(float((advantage < 0).float().mean()))


def test_the_teacher_goes_on_from_the_students_words(tiny: Path) -> None:
    rng = random.Random(0)
    problem = language.Chain.sample(rng)
    words = problem.expert(rng)
    told = failures.Continued(problem, words[:-1])
    assert told.prompt == [*problem.prompt, *words[:-1]]
    told.say([words[-1], STUDENT_END])
    assert told.success
    assert told.done
    chosen = pair.ChainPair(tiny, command.SMOKE, 0, plan.CENTRE.start, 32)
    drawn = []

    def draw() -> list[language.Chain]:
        rng = random.Random(1)
        drawn.append([language.Chain.sample(rng) for _ in range(8)])
        return drawn[-1]

    batch = demonstrations((language.Chain,), 8, random.Random(1), dialect=False)
    success = torch.arange(8) % 2 == 0
    rows = failures.continued(chosen, batch, success, draw)
    assert [row["written"] for row in rows] == list(range(0, 4 * len(rows), 4))
    assert (rows[0]["rollouts"], rows[0]["student_success"]) == (8, 0.5)
    # One set of problems a prefix: who has answered takes no more words.
    assert len(drawn) == len(rows) == len({id(problems[0]) for problems in drawn})


def test_without_clipping_a_step_takes_the_whole_gradient(tiny: Path) -> None:
    chosen = pair.ChainPair(tiny, command.SMOKE, 0, plan.CENTRE.start, 32)
    batch = demonstrations((language.Chain,), 8, random.Random(0), dialect=False)
    norms = {}
    for clip in (1e-4, None):
        optimizer = torch.optim.SGD(chosen.student.parameters(), lr=0.0)
        row = training.update(chosen, arms.BUCKET, optimizer, batch, clip=clip)
        grads = [p.grad for p in chosen.student.parameters() if p.grad is not None]
        norms[clip] = torch.cat([g.flatten() for g in grads]).norm().item()
    assert norms[1e-4] == pytest.approx(1e-4, rel=0.02)
    assert norms[None] == pytest.approx(row["grad_norm"], rel=1e-4)
    assert norms[None] > 2e-4


# --- a run


def do(line: plan.Run, folder: Path, steps: int = 2, reserve: float = 0.0) -> dict[str, Any]:
    path = folder.parent / "run.json"
    runs.run(line, steps, command.SMOKE, folder, path, reserve, lambda: None)
    return json.loads(path.read_text())["tables"]


def test_screening_reads_no_judged_problem(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(rng: random.Random) -> None:
        raise AssertionError("judged")

    monkeypatch.setattr(language.JudgeChain, "sample", refuse)
    line = plan.Run(plan.SCREENING, arms.BUCKET.name, plan.CENTRE, 0)
    tables = do(line, tiny)
    assert not [name for name in tables["runs"][0] if name.startswith("judge")]
    with pytest.raises(AssertionError, match="judged"):
        do(replace(line, stage=plan.CENTRAL), tiny)


def test_a_run_stops_where_the_next_step_would_pass_the_limit_and_says_so(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = plan.Run(plan.CENTRAL, arms.BUCKET.name, plan.CENTRE, 0)
    tables = do(line, tiny, steps=4, reserve=plan.MOST_SECONDS)
    assert (tables["runs"][0]["planned"], tables["runs"][0]["steps"]) == (4, 1)
    assert tables["curve"][-1]["step"] == 1
    kept = records.Records(tmp_path / "kept")
    kept.begin()
    kept.add(line.key, tables)
    assert "1 runs of 1 steps, planned were 4; 1 were cut" in report.report(kept.folder, plan.FULL)


def test_the_slowest_arm_decides_how_many_steps_all_runs_have() -> None:
    times = {"a": (0.1, 5.0), "b": (0.5, 10.0)}
    whole = (plan.MOST_SECONDS / command.SLOWER - 10.0) / 0.5
    assert command.decided(times, 1000)["steps"] == int(whole)
    assert command.decided(times, 20)["steps"] == 20


# --- statistics and records


def test_paired_differences_and_their_interval() -> None:
    ours, theirs = (
        {"0": 0.5, "1": 0.6, "2": 0.9, "7": 1.0},
        {"0": 0.4, "1": 0.4, "2": 0.6, "8": 0.0},
    )
    found = intervals.paired(ours, theirs)
    # Differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, t with two degrees of freedom 4.303.
    assert found.mean == pytest.approx(0.2)
    assert found.half == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert found.count == 3
    assert str(found) == "+0.200 ± 0.248"
    assert intervals.interval([0.3]) == (0.3, None, 1)
    assert intervals.paired({"0": 1.0}, {"1": 1.0}) is None


def test_lines_of_a_run_that_was_interrupted_while_it_was_written_go(tmp_path: Path) -> None:
    line = plan.Run(plan.CENTRAL, arms.BUCKET.name, plan.CENTRE, 0)
    other = replace(line, seed=1)
    tables: dict[str, list] = {name: [{columns[0]: 1}] for name, columns in records.COLUMNS.items()}
    kept = records.Records(tmp_path)
    kept.begin()
    kept.add(line.key, tables)
    whole = {path.name: path.read_text() for path in tmp_path.glob("*.csv")}
    broken = {**tables, "runs": []}
    kept.add(other.key, broken)
    with kept.path("runs").open("a") as file:
        file.write(",".join(other.key))  # killed within the line
    steps = records.Records(tmp_path).read("steps")
    assert {plan.key_of(row) for row in steps} == {line.key}
    kept.begin()
    assert {path.name: path.read_text() for path in tmp_path.glob("*.csv")} == whole


def test_a_smoke_run_goes_on_where_it_was_stopped_and_reports_from_its_files_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.process_time()
    options = [
        "run",
        "--smoke",
        "--output",
        str(tmp_path / "out"),
        "--results",
        str(tmp_path / "r"),
    ]
    assert command.main([*options, "--most", "3"]) == 0
    runs_file = tmp_path / "r" / "runs.csv"
    first = runs_file.read_text()
    assert len(first.splitlines()) == 1 + 3
    assert command.main(options) == 0
    assert time.process_time() - started < 60
    text = runs_file.read_text()
    assert text.startswith(first)
    rows = records.Records(tmp_path / "r").read("runs")
    keys = [plan.key_of(row) for row in rows]
    assert sorted(keys) == sorted(line.key for stage in plan.SMOKE.stages(rows) for line in stage)
    assert {row["stage"] for row in rows} == {plan.SCREENING, plan.CENTRAL, plan.FACTOR}
    assert all((row["judge_success"] == "") == (row["stage"] == plan.SCREENING) for row in rows)
    # Nothing is left to do; and a report needs the CSV files only.
    capsys.readouterr()
    assert command.main(options) == 0
    assert runs_file.read_text() == text
    assert command.main(["failures", *options[1:]]) == 0
    capsys.readouterr()
    assert command.main(["report", *options[1:]]) == 0
    (tmp_path / "out").rename(tmp_path / "away")
    printed = capsys.readouterr().out
    figures = ("success.png", "factors.png", "mechanism.png", "failures.png")
    for name in ("table.md", *figures):
        (tmp_path / "r" / name).unlink()
    assert command.main(["report", *options[1:]]) == 0
    assert capsys.readouterr().out in printed
    table = (tmp_path / "r" / "table.md").read_text()
    for title in ("Screening", "The centre, 2 seeds", "One factor", "On the same states", "Where"):
        assert f"**{title}" in table
    assert table.count("**Before any step: ") == 2
    for name in figures:
        assert (tmp_path / "r" / name).stat().st_size > 0
    # Other models than those that the results were begun with are refused.
    assert command.main(["run", *options[1:], "--output", str(tmp_path / "away")]) == 0
    (tmp_path / "away" / "models" / "teacher.pt").unlink()
    settings = tmp_path / "r" / "settings.json"
    settings.write_text(settings.read_text().replace('"teacher": "', '"teacher": "0'))
    assert command.main(["run", *options[1:], "--output", str(tmp_path / "away")]) == 2
    assert "begun with other models" in capsys.readouterr().err


def test_a_run_is_the_same_whenever_it_is_done(tiny: Path) -> None:
    line = plan.Run(plan.CENTRAL, "sample", plan.CENTRE, 0)
    torch.manual_seed(5)
    first = do(line, tiny)
    torch.manual_seed(6)
    second = do(line, tiny)
    for tables in (first, second):
        del tables["runs"][0]["core_seconds"]
    assert first == second
    # The longer run looks at its curve after other steps, which its steps take no notice of.
    assert do(line, tiny, steps=3)["steps"][:2] == first["steps"]


def test_the_command_prints_the_plan_and_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["plan", "--results", str(tmp_path)]) == 0
    assert "At most 100 runs in all, 0 done." in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert command.main(["smollm2", "--results", str(tmp_path)]) == 2
    assert "has no winner yet" in capsys.readouterr().err
    assert command.main(["report", "--results", str(tmp_path)]) == 2
    assert "has no runs" in capsys.readouterr().err
