"""The comparison of objectives: its tasks, rollouts, arms, a run's resumption, its report."""

from __future__ import annotations

import copy
import multiprocessing
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

for package in ("matplotlib", "tensorboard", "tqdm", "transformers"):
    pytest.importorskip(package, reason="the comparison needs it")
STUDIES = Path(__file__).resolve().parents[2] / "studies"
sys.path.insert(0, str(STUDIES))

import compare_objectives as command  # noqa: E402
from comparison import arms, models, pairs, results, rollouts, tasks, training  # noqa: E402
from comparison.vocabulary import (  # noqa: E402
    IDS,
    PAD,
    STOP_IDS,
    STUDENT_END,
    STUDENT_VOCAB,
    TEACHER_END,
    TEACHER_VOCAB,
    THINK,
    WORDS,
    encode,
    student_tokenizer,
    teacher_tokenizer,
)
from tensorboard.backend.event_processing.event_accumulator import (  # noqa: E402
    EventAccumulator,
)

from opd_kernels import compare_tokenizers  # noqa: E402

KINDS = [tasks.Arithmetic, tasks.World]


def solve(episode: Any, rng: random.Random) -> None:
    while not episode.done:
        episode.say([*episode.expert(rng), STUDENT_END])


@pytest.mark.parametrize("kind", KINDS)
def test_the_expert_solves_every_problem_in_the_words_and_turns_allowed(kind: Any) -> None:
    rng = random.Random(0)
    for _ in range(200):
        episode = kind.sample(rng)
        words = [*episode.prompt]
        turns = 0
        while not episode.done:
            said = [THINK, *episode.expert(rng), STUDENT_END]
            assert len(said) <= episode.new_tokens
            words += [*said, *episode.say(said)]
            turns += 1
        assert episode.success
        assert turns <= episode.turn_limit
        assert set(words) <= set(WORDS)


def test_only_the_exact_answer_at_the_end_of_a_turn_that_ended_counts() -> None:
    rng = random.Random(1)
    for _ in range(50):
        episode = tasks.Arithmetic.sample(rng)
        value, signs = episode.numbers[0], zip(episode.operators, episode.numbers[1:], strict=True)
        for sign, number in signs:
            value = eval(f"({value} {'*' if sign == '.' else sign} {number}) % 10")
        right, wrong = str(value), str((value + 1) % 10)
        for said, success in [
            (["answer", right, STUDENT_END], True),
            ([THINK, "answer", right, TEACHER_END], True),
            (["answer", wrong, STUDENT_END], False),
            (["answer", right], False),
            (["answer", right, wrong, STUDENT_END], False),
            ([right, STUDENT_END], False),
            ([], False),
        ]:
            episode.say(said)
            assert episode.success is success, said


def test_a_world_obeys_only_actions_that_are_possible() -> None:
    world = tasks.World(
        rooms=["hall", "study", "attic"],
        here=0,
        thing="key",
        thing_at=1,
        inside="box",
        others={},
        containers={1: "box"},
        target="attic",
    )

    def do(*words: str) -> list[str]:
        return world.say([*words, STUDENT_END])

    assert "hall here wall west study east ." in " ".join(do("go", "west"))
    assert "study here hall west attic east box closed ." in " ".join(do("go", "east"))
    assert "held" not in do("take", "key")
    assert "key here box open" in " ".join(do("open", "it"))
    assert "box open key held" in " ".join(do("take", "key"))
    assert not world.success
    do("go", "east")
    do("drop", "key")
    assert world.success
    assert world.done


def test_a_world_ends_after_its_last_turn() -> None:
    world = tasks.World.sample(random.Random(0))
    for _ in range(world.turn_limit):
        assert not world.done
        world.say(["need", STUDENT_END])
    assert world.done
    assert not world.success


@pytest.fixture(scope="module")
def student() -> Any:
    torch.manual_seed(0)
    return models.build(STUDENT_VOCAB, 32, layers=2).eval()


@pytest.mark.parametrize("task", ["arithmetic", "world", "mixed"])
def test_rollouts_are_what_the_model_says_to_the_squeezed_sequences(
    student: Any, task: str
) -> None:
    """Greedy choices, with cache and gaps, are those of one pass over the sequences without."""
    episodes = tasks.sample_episodes(task, 6, random.Random(3))
    # With tied embeddings a random model repeats itself; turns have to end at different places.
    model = copy.deepcopy(student)
    torch.manual_seed(2)
    head = torch.randn(STUDENT_VOCAB, 32)
    head[STOP_IDS[0]] *= 2
    model.lm_head.weight = torch.nn.Parameter(head)
    played = rollouts.play(model, episodes, top_p=1.0, greedy=True)
    logits = model(input_ids=played.tokens).logits
    response = played.response
    lengths = {int((turn == n).sum()) for turn in played.turn for n in range(int(turn.max()) + 1)}
    assert len(lengths) > 2
    real = (played.tokens != IDS[PAD]) | response
    assert not (real[:, 1:] & ~real[:, :-1]).any()
    assert torch.equal(logits[:, :-1].argmax(-1)[response[:, 1:]], played.tokens[response])


def test_a_turn_ends_at_its_first_stop_and_other_rows_go_on(student: Any) -> None:
    episodes = tasks.sample_episodes("mixed", 8, random.Random(4))
    torch.manual_seed(1)
    played = rollouts.play(student, episodes, top_p=1.0)
    stops = torch.isin(played.tokens, torch.tensor(STOP_IDS)) & played.response
    for row, (turn, stop) in enumerate(zip(played.turn, stops, strict=True)):
        limit = episodes[row].turn_limit
        assert turn.max() < limit
        for number in range(int(turn.max()) + 1):
            here = (turn == number).nonzero()[:, 0]
            assert (here.diff() == 1).all()
            assert len(here) <= episodes[row].new_tokens
            assert stop[here].sum() <= 1
            assert not stop[here[:-1]].any()


def random_scores(k: int, vocab: int = 7, teacher_vocab: int = 9) -> arms.Scores:
    generator = torch.Generator().manual_seed(5)
    student = torch.randn(4, vocab, generator=generator, dtype=torch.float32) * 2
    teacher = torch.randn(4, teacher_vocab, generator=generator) * 2
    tokens = torch.randint(vocab, (4,), generator=generator)
    return arms.Scores(student.requires_grad_(), teacher, tokens, k, [])


def full_reverse_kl(scores: arms.Scores) -> Tensor:
    log_p, log_q = scores.log_probs
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("loss", [arms.lsm, arms.truncated, arms.tail_bucket, arms.student_support])
def test_on_the_whole_vocabulary_every_objective_is_the_reverse_kl(loss: Any) -> None:
    scores = random_scores(k=7)
    torch.testing.assert_close(loss(scores), full_reverse_kl(scores), rtol=1e-4, atol=1e-5)


def test_the_tail_bucket_is_the_kl_of_the_distributions_with_the_rest_merged() -> None:
    scores = random_scores(k=3)
    p, q = (x.double().exp() for x in scores.log_probs)
    ids = scores.support.ids.long()
    p, q = (torch.cat([x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, True)], -1) for x in (p, q))
    torch.testing.assert_close(
        arms.tail_bucket(scores).double(), (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-6
    )


def test_without_renormalisation_the_loss_can_be_negative() -> None:
    student = torch.tensor([[-9.0, -9.0, 5.0]])
    scores = arms.Scores(student, torch.tensor([[4.0, 4.0, 0.0]]), torch.tensor([0]), 2, [])
    assert arms.truncated(scores).item() < 0
    assert arms.tail_bucket(scores).item() > 0
    assert arms.lsm(scores).item() == pytest.approx(0, abs=1e-6)


def test_the_students_support_is_the_students_best_with_the_teachers_logits() -> None:
    scores = random_scores(k=3)
    best = scores.student.detach().topk(3).indices
    log_p = scores.student.gather(-1, best).log_softmax(-1)
    log_q = scores.teacher.gather(-1, best).log_softmax(-1)
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(arms.student_support(scores), wanted, rtol=1e-4, atol=1e-5)


def test_the_sampled_token_pulls_its_log_prob_by_the_log_ratio() -> None:
    scores = random_scores(k=3)
    arms.sampled_token(scores).sum().backward()
    said_p, said_q = scores.said
    p = scores.log_probs[0].exp().detach()
    wanted = (said_p - said_q).detach()[:, None] * (F.one_hot(scores.tokens, 7) - p)
    torch.testing.assert_close(scores.student.grad, wanted)


class TinyPair:
    """Models of a few thousand parameters in the place of the comparison's."""

    name, seed, k = "mixed", 0, 4
    batch = 8

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.teacher = models.build(TEACHER_VOCAB, 16, layers=1).requires_grad_(False).eval()
        self.student = models.build(STUDENT_VOCAB, 16, layers=1)
        self.tokenizers = compare_tokenizers(student_tokenizer(), teacher_tokenizer())

    rollouts = pairs.SmallPair.rollouts
    held_out = pairs.SmallPair.held_out
    teacher_answers = pairs.SmallPair.teacher_answers
    autocast = pairs.SmallPair.autocast
    _play = pairs.SmallPair._play
    _held_out_episodes = pairs.SmallPair._held_out_episodes
    held_out_episodes = 4


def test_the_gradient_of_a_step_is_the_token_means_and_its_variance_that_of_its_parts() -> None:
    pair = TinyPair()
    rng = random.Random(0)
    batch = models.demonstrations("mixed", 8, rng, dialect=True)
    frozen = SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
    row = training.update(pair, arms.LSM_TOP_P, frozen, batch)
    got = [p.grad.clone() for p in pair.student.parameters()]
    gradients, counts = [], []
    for part in (batch, *(batch[i : i + 2] for i in range(0, 8, 2))):
        pair.student.zero_grad()
        loss = arms.lsm(training.score(pair, part, []))
        loss.mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in pair.student.parameters()]))
        counts.append(len(loss))
    whole, parts = gradients[0], torch.stack(gradients[1:])
    shares = torch.tensor(counts[1:]) / counts[0]
    variance = 4 / 3 * (shares * (parts - whole).square().sum(1)).sum()
    scale = min(1.0, 1 / float(whole.norm()))  # clipped
    torch.testing.assert_close(
        torch.cat([g.flatten() for g in got]), whole * scale, rtol=1e-3, atol=1e-6
    )
    assert row["grad_norm"] == pytest.approx(float(whole.norm()), rel=1e-4)
    assert row["grad_variance"] == pytest.approx(float(variance), rel=1e-2)
    assert row["tokens"] == counts[0] == int(batch.response.sum())


def test_masking_leaves_out_the_special_tokens_of_every_turn_and_nothing_else() -> None:
    pair = TinyPair()
    said = encode(["now", STUDENT_END])
    tokens = torch.tensor([encode(["<user>", "goal"]) + said + encode(["<user>", "goal"]) + said])
    turn = torch.tensor([[-1, -1, 0, 0, -1, -1, 1, 1]])
    sequences = rollouts.Rollouts(tokens, turn)
    kept = {arm.name: training.kept_tokens(pair, arm, sequences).tolist() for arm in arms.ARMS}
    for arm in arms.ARMS:
        wanted = [True, False, True, False] if arm.masking else [True] * 4
        assert kept[arm.name] == wanted, arm.name
    assert set(pair.tokenizers.masked_ids) == {IDS[STUDENT_END], IDS[TEACHER_END], IDS[THINK]}
    assert IDS[THINK] in pair.tokenizers.banned_ids


def test_a_step_of_which_everything_is_masked_changes_nothing() -> None:
    pair = TinyPair()
    (masking,) = (arm for arm in arms.ARMS if arm.masking)
    tokens = torch.tensor([encode(["<user>", "goal", STUDENT_END])] * 4)
    turn = torch.tensor([[-1, -1, 0]] * 4)
    before = [p.detach().clone() for p in pair.student.parameters()]
    optimizer = torch.optim.SGD(pair.student.parameters(), lr=1.0)
    row = training.update(pair, masking, optimizer, rollouts.Rollouts(tokens, turn))
    assert row["tokens"] == row["loss"] == row["grad_norm"] == 0
    assert all(map(torch.equal, pair.student.parameters(), before))


class InterruptionError(Exception):
    pass


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(tmp_path: Path) -> None:
    budget = training.Budget(steps=4, lr=1e-3, warm_up=2, checkpoint_every=2)
    ticks: list[int] = []

    def stop_after_three() -> None:
        ticks.append(1)
        if len(ticks) == 3:
            raise InterruptionError

    def count() -> None:
        ticks.append(1)

    arm = arms.SAMPLED_TOKEN
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    training.run(TinyPair(), arm, budget, whole, lambda: None)
    with pytest.raises(InterruptionError):
        training.run(TinyPair(), arm, budget, broken, stop_after_three)
    assert not list((broken / "runs").glob("*")) if (broken / "runs").exists() else True
    ticks.clear()
    training.run(TinyPair(), arm, budget, broken, count)
    assert len(ticks) == 4
    path = training.result_path(whole, "mixed", arm, 0)
    assert path.read_text() == (broken / "runs" / path.name).read_text()
    rows = [results._read(out / "steps" / f"{path.stem}.csv") for out in (whole, broken)]
    for row in (*rows[0], *rows[1]):
        del row["seconds"]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4
    assert not list((broken / "checkpoints").glob("*"))
    for out in (whole, broken):
        board = EventAccumulator(str(out / "tensorboard" / path.stem)).Reload()
        assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4]


def test_all_arms_of_a_seed_meet_the_same_problems(tmp_path: Path) -> None:
    prompts = []
    for top_p in (1.0, 0.9):
        batch, _ = TinyPair().rollouts(7, top_p)
        first = (batch.turn >= 0).int().argmax(1)
        prompts.append([row[:n].tolist() for row, n in zip(batch.tokens, first, strict=True)])
    assert prompts[0] == prompts[1]


def make_results(folder: Path, names: Sequence[str]) -> None:
    budget = training.Budget(steps=2, lr=1e-3)
    by_name = {arm.name: arm for arm in (arms.TEACHER, arms.BEFORE, *arms.ARMS)}
    for name in names:
        steps = training.Budget(steps=0, lr=1e-3) if name in ("teacher", "before") else budget
        training.run(TinyPair(), by_name[name], steps, folder, lambda: None)


def test_the_report_prints_again_from_its_csv_files_alone(tmp_path: Path) -> None:
    make_results(tmp_path / "output", ["teacher", "before", "LSM + top-p", "sampled-token"])
    kept = tmp_path / "kept"
    results.collect(tmp_path / "output", kept)
    steps = tmp_path / "steps"
    shutil.move(tmp_path / "output" / "steps", steps)
    shutil.rmtree(tmp_path / "output")
    text = results.report(kept)
    assert text.splitlines()[0] == "**mixed**, 1 seed"
    shown = [line.split(" | ")[0].strip("| ") for line in text.splitlines()[4:8]]
    assert shown == ["teacher", "before", "sampled-token", "LSM + top-p"]
    teacher, before, *runs = results._read(kept / "runs.csv")
    assert before["grad_norm"] == ""
    assert float(teacher["reverse_kl"]) == pytest.approx(0, abs=1e-6)
    for row in runs:
        logged = results._read(steps / f"mixed-{row['arm'].replace(' + ', '-')}-0.csv")
        mean = sum(float(line["grad_norm"]) for line in logged) / 2
        assert float(row["grad_norm"]) == pytest.approx(mean, rel=1e-4)
    for name in ("success.png", "positions.png", "table.md"):
        assert (kept / name).stat().st_size > 0


def test_ordinary_scores_are_those_of_models_that_cannot_say_the_special_tokens() -> None:
    scores = random_scores(k=3)
    special = [int(scores.tokens[0]), 5]
    rows = ~torch.isin(scores.tokens, torch.tensor(special))
    assert 0 < rows.sum() < 4
    without = training.observe(training.ordinary(scores, special))
    kept = [i for i in range(7) if i not in special]
    log_p, log_q = (
        logits.detach()[rows][:, kept].double().log_softmax(-1)
        for logits in (scores.student, scores.teacher)
    )
    said = torch.tensor([kept.index(int(t)) for t in scores.tokens[rows]])[:, None]
    wanted = {
        "reverse_kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "forward_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
        "teacher_score": log_q.gather(-1, said)[:, 0],
        "gap": (log_q - log_p).gather(-1, said)[:, 0],
    }
    for name, rows_wanted in wanted.items():
        torch.testing.assert_close(without[name].double(), rows_wanted, rtol=1e-5, atol=1e-6)


def test_the_relative_variance_is_without_the_noise_in_the_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    signal = torch.ones(50) / 50**0.5
    rows = []
    for _ in range(400):
        parts = signal + torch.randn(4, 50, generator=generator) * 0.3
        norm, variance = float(parts.mean(0).norm()), float(parts.var(0).sum())
        rows.append({"grad_norm": str(norm), "grad_variance": str(variance)})
    assert results._relative_variance(rows) == pytest.approx(50 * 0.09, rel=0.05)
    assert results._relative_variance([]) is None


def test_logits_are_those_that_predict_the_tokens_beside_them() -> None:
    pair = TinyPair()
    batch = models.demonstrations("mixed", 3, random.Random(1), dialect=True)
    scores = training.score(pair, batch, ())
    at = 0
    for tokens, response in zip(batch.tokens, batch.response, strict=True):
        for position in response.nonzero()[:, 0].tolist():
            for model, logits in ((pair.student, scores.student), (pair.teacher, scores.teacher)):
                wanted = model(input_ids=tokens[None, :position]).logits[0, -1]
                torch.testing.assert_close(logits[at], wanted, rtol=1e-4, atol=1e-5)
            assert scores.tokens[at] == tokens[position]
            at += 1
    assert at == len(scores.tokens)


def test_rollouts_stay_in_the_nucleus_and_are_not_cut_without_one(student: Any) -> None:
    outside = {}
    for top_p in (0.5, 1.0):
        torch.manual_seed(0)
        episodes = tasks.sample_episodes("mixed", 8, random.Random(5))
        played = rollouts.play(student, episodes, top_p=top_p)
        logits = student(input_ids=played.tokens).logits[:, :-1][played.response[:, 1:]]
        said = played.tokens[played.response][:, None]
        p, order = logits.softmax(-1).sort(descending=True)
        rank = (order == said).int().argmax(-1, keepdim=True)
        above = (p.cumsum(-1) - p).gather(-1, rank)  # the mass of what is more likely
        outside[top_p] = (above >= top_p + 1e-4).float().mean().item()
        if top_p == 1.0:
            assert (above >= 0.5).float().mean() > 0.2
            assert (rank >= 50).any()  # the library's own default would cut there
    assert outside == {0.5: 0.0, 1.0: 0.0}


def test_what_an_arm_masks_takes_no_part_in_its_gradient() -> None:
    pair = TinyPair()
    arm = next(arm for arm in arms.ARMS if arm.masking)
    batch = models.demonstrations("world", 4, random.Random(2), dialect=True)
    frozen = SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
    row = training.update(pair, arm, frozen, batch)
    got = torch.cat([p.grad.flatten() for p in pair.student.parameters()])
    scores = training.score(pair, batch, pair.tokenizers.banned_ids)
    support = scores.support
    assert not torch.isin(support.ids, torch.tensor(pair.tokenizers.banned_ids)).any()
    special = torch.tensor([IDS[STUDENT_END], IDS[TEACHER_END], IDS[THINK]])
    # An expert says each of them at most once in a turn.
    kept = ~torch.isin(scores.tokens, special)
    log_p = scores.student.gather(-1, support.ids.long()).log_softmax(-1)
    log_q = support.logits.log_softmax(-1)
    loss = (log_p.exp() * (log_p - log_q)).sum(-1)[kept].mean()
    pair.student.zero_grad()
    loss.backward()
    wanted = torch.cat([p.grad.flatten() for p in pair.student.parameters()])
    scale = min(1.0, 1 / float(wanted.norm()))
    torch.testing.assert_close(got, wanted * scale, rtol=1e-3, atol=1e-6)
    assert row["tokens"] == int(kept.sum())
    assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)


@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_held_out_problems_are_not_those_of_training(task: str) -> None:
    pair = TinyPair()
    pair.name, pair.held_out_episodes = task, 64
    held_out = {tuple(episode.prompt) for episode in pair._held_out_episodes()}
    trained: set[tuple[str, ...]] = set()
    for seed in range(3):
        for step in range(50):
            rng = random.Random(pairs.training_seed(seed, step))
            trained |= {tuple(e.prompt) for e in tasks.sample_episodes(task, pair.batch, rng)}
    # Of the few different first views of a world some come again.
    assert len(held_out & trained) <= 0.2 * len(held_out)


def test_the_evaluation_samples_as_it_is_in_the_nucleus_and_greedily(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair, calls = TinyPair(), []
    monkeypatch.setattr(
        pairs, "play", lambda *_, **options: calls.append(options) or rollouts.Rollouts(*[None] * 2)
    )
    pair.held_out()
    assert [(call["top_p"], call["greedy"]) for call in calls] == [
        (1.0, False),
        (0.9, False),
        (1.0, True),
    ]


def test_a_run_trains_the_student(tmp_path: Path) -> None:
    pair = TinyPair()
    before = [p.detach().clone() for p in pair.student.parameters()]
    training.run(pair, arms.LSM_TOP_P, training.Budget(2, 1e-2), tmp_path, lambda: None)
    after = [p.detach() for p in pair.student.parameters()]
    moved = [float((a - b).abs().max()) for a, b in zip(after, before, strict=True)]
    # Adam's first steps have the length of the rate, which warms up to it in five.
    assert 0.25e-2 < max(moved) < 1e-2


# --- the command


def test_only_a_whole_run_goes_to_the_results_that_are_kept(tmp_path: Path) -> None:
    whole = [["run"], ["report"], ["run", "--seeds", "2", "1", "0", "--output", str(tmp_path)]]
    other = [["--seeds", "5"], ["--tasks", "world"], ["--without-smollm2"], ["--smoke"]]
    for line in whole:
        assert command.parse_options(line).results == command.RESULTS
    for line in other:
        options = command.parse_options(["run", *line])
        assert options.results == options.output / "results"
        given = command.parse_options(["run", *line, "--output", "a", "--results", "b"])
        assert (given.output, given.results) == (Path("a"), Path("b"))
    assert command.parse_options(["run", "--smoke"]).output != command.OUTPUT


def test_what_is_named_twice_is_run_once() -> None:
    once = command.parse_options(["run", "--seeds", "1", "0", "--tasks", "world"])
    twice = command.parse_options(["run", "--seeds", "1", "0", "1", "--tasks", "world", "world"])
    jobs = [command.comparisons(options, command.FULL) for options in (once, twice)]
    assert jobs[0] == jobs[1]
    assert len({job.path for job in jobs[0]}) == len(jobs[0]) == 2 * 10 + 4


def test_a_folder_of_other_sizes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.keep_sizes(tmp_path, command.FULL)
    command.keep_sizes(tmp_path, command.FULL)
    assert command.main(["run", "--smoke", "--output", str(tmp_path)]) == 2
    assert "begun with other sizes" in capsys.readouterr().err


def test_a_report_of_nothing_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs.csv").touch()
    assert command.main(["report", "--results", str(tmp_path)]) == 2
    assert "has no steps.csv, positions.csv" in capsys.readouterr().err


def leave(path: Path, tick: Any) -> None:
    tick()
    path.touch()


def never_end(path: Path, tick: Any) -> None:
    path.with_suffix(".begun").touch()
    time.sleep(600)


def fail(path: Path, tick: Any) -> None:
    while not path.with_name("endless.begun").exists():
        time.sleep(0.05)
    raise ValueError("broken")


def test_jobs_that_are_done_are_not_repeated_and_an_error_ends_all(tmp_path: Path) -> None:
    def job(name: str, work: Any, leaves: str = "") -> Any:
        return command.Job(tmp_path / name, 1, work, (tmp_path / (leaves or name),))

    (tmp_path / "done").touch()
    started = time.monotonic()
    with pytest.raises(ValueError, match="broken"):
        command.work_through(
            "test",
            [
                job("done", leave, "repeated"),
                job("first", leave),
                job("endless", never_end),
                job("failing", fail),
                *(job(f"later {i}", never_end) for i in range(3)),
            ],
            2,
        )
    assert time.monotonic() - started < 120
    assert (tmp_path / "first").exists()
    assert not (tmp_path / "repeated").exists()
    assert not list(tmp_path.glob("later 2*"))
    assert not multiprocessing.active_children()
