"""The pairs of teacher and student: the small ones, and SmolLM2's of the demo."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import distill_smollm2
import smollm2
import torch
from comparison import models
from comparison.rollouts import Rollouts, play, squeezed
from comparison.tasks import Episode, sample_episodes
from comparison.vocabulary import student_tokenizer, teacher_tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_kernels import compare_tokenizers

TEACHER_SEED = 7
HELD_OUT_SEED = 10_000_019  # of the problems and, plus one, of the expert's answers to them


def training_seed(seed: int, step: int) -> int:
    """Of a step's problems: none that the models' first training or the evaluation draws from."""
    return 1_000_003 * (seed + 1) + step


class SmallPair:
    """A teacher of 3.2 and a student of 1.8 million parameters on one task or both mixed."""

    k = 8
    batch = 32
    held_out_episodes = 128

    def __init__(self, task: str, seed: int, folder: Path) -> None:
        """Load the models that `prepare` has trained."""
        self.name, self.seed = task, seed
        self.teacher = models.load(models.new_teacher(), folder / "teacher.pt")
        self.teacher.requires_grad_(False).eval()
        self.student = models.load(models.new_student(), folder / f"student-{seed}.pt")
        self.tokenizers = compare_tokenizers(student_tokenizer(), teacher_tokenizer())

    def rollouts(self, step: int, top_p: float) -> tuple[Rollouts, Tensor]:
        """New problems in every step, the same for all arms of a seed."""
        rng = random.Random(training_seed(self.seed, step))
        return self._play(sample_episodes(self.name, self.batch, rng), top_p)

    def held_out(self) -> tuple[Rollouts, dict[str, Tensor]]:
        """One set of problems for all: sampled as the student is, in its nucleus, and greedily."""
        sampled, success = self._play(self._held_out_episodes(), 1.0)
        _, nucleus = self._play(self._held_out_episodes(), 0.9)
        _, greedy = self._play(self._held_out_episodes(), 1.0, greedy=True)
        return sampled, {"": success, "_top_p": nucleus, "_greedy": greedy}

    def teacher_answers(self) -> Rollouts:
        """An expert's, in the student's markup."""
        rng = random.Random(HELD_OUT_SEED + 1)
        return models.demonstrations(self.name, self.held_out_episodes, rng, dialect=False)

    def autocast(self) -> AbstractContextManager:
        """Single precision."""
        return nullcontext()

    def _held_out_episodes(self) -> list[Episode]:
        return sample_episodes(self.name, self.held_out_episodes, random.Random(HELD_OUT_SEED))

    def _play(
        self, episodes: Sequence[Episode], top_p: float, greedy: bool = False
    ) -> tuple[Rollouts, Tensor]:
        self.student.eval()
        sequences = play(self.student, episodes, top_p=top_p, greedy=greedy)
        self.student.train()
        return sequences, torch.tensor([episode.success for episode in episodes])


# The demo's warm start: its sizes are its defaults.
OPTIONS = distill_smollm2.parse_options([])
OPTIONS.dtype = torch.bfloat16
PROMPTS = distill_smollm2.HERE / "prompts.txt"


class SmolLM2Pair:
    """The demo's pair: SmolLM2-135M-Instruct, and a copy with fewer layers, warmed up."""

    name = "smollm2"
    k = 32
    batch = 16

    def __init__(self, seed: int, folder: Path) -> None:
        """Load the teacher, and the student that `prepare` has warmed up."""
        self.seed = seed
        self.tokenizer, self.teacher = smollm2.load_teacher()
        self.student = smollm2.prune_layers(self.teacher, OPTIONS.drop_layers)
        models.load(self.student, folder / "smollm2.pt")
        answers = torch.load(folder / "smollm2_answers.pt", weights_only=True)
        self.answers = Rollouts(answers["tokens"], answers["turn"])
        self.tokenizers = compare_tokenizers(self.tokenizer, self.tokenizer)
        self.training, self.held_out_prompts = smollm2.read_prompts(PROMPTS)

    def rollouts(self, step: int, top_p: float) -> tuple[Rollouts, None]:
        """Answers to training prompts drawn without replacement."""
        prompts = random.Random(training_seed(self.seed, step)).sample(self.training, self.batch)
        return answers_of(self.student, self.tokenizer, prompts, top_p), None

    def held_out(self) -> tuple[Rollouts, dict[str, Tensor]]:
        """Answers to the held-out prompts; nothing tells right from wrong."""
        return answers_of(self.student, self.tokenizer, self.held_out_prompts, 1.0), {}

    def teacher_answers(self) -> Rollouts:
        """The teacher's answers to the held-out prompts, sampled once."""
        return self.answers

    def autocast(self) -> AbstractContextManager:
        """Matrix products in bfloat16, as in the demo."""
        return smollm2.autocast(torch.bfloat16)


def answers_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], top_p: float
) -> Rollouts:
    """One answer to each prompt."""
    sampled = smollm2.sample(
        model, tokenizer, prompts, OPTIONS.new_tokens, OPTIONS.dtype, top_p=top_p
    )
    turn = torch.full_like(sampled.ids, -1)
    turn[:, -sampled.response.shape[1] :][sampled.response] = 0
    return squeezed(sampled.ids, turn, sampled.attention)


def prepare_teacher(folder: Path, steps: int, tick: Callable[[], None]) -> None:
    """Train the small teacher on an expert's episodes in its dialect."""
    torch.manual_seed(TEACHER_SEED)
    model = models.new_teacher()
    models.train_on_demonstrations(
        model,
        steps=steps,
        seed=TEACHER_SEED,
        dialect=True,
        turns=("arithmetic", "world", "world"),
        tick=tick,
    )
    models.save(folder / "teacher.pt", model.state_dict())


def prepare_student(folder: Path, seed: int, steps: int, tick: Callable[[], None]) -> None:
    """Train a small student on an expert's episodes, not to the end."""
    torch.manual_seed(seed)
    model = models.new_student()
    models.train_on_demonstrations(model, steps=steps, seed=seed, dialect=False, tick=tick)
    models.save(folder / f"student-{seed}.pt", model.state_dict())


def prepare_smollm2(folder: Path, warm_steps: int, tick: Callable[[], None]) -> None:
    """Warm the demo's student up on the teacher's answers, as the demo does."""
    torch.manual_seed(TEACHER_SEED)
    tokenizer, teacher = smollm2.load_teacher()
    training, held_out = smollm2.read_prompts(PROMPTS)
    options = argparse.Namespace(**{**vars(OPTIONS), "warm_steps": warm_steps})
    count = min(OPTIONS.demonstrations, warm_steps * OPTIONS.batch_size)
    demonstrated = random.Random(TEACHER_SEED).sample(training, count)
    demonstrations = smollm2.sample(
        teacher, tokenizer, demonstrated, options.new_tokens, options.dtype
    )
    answers = answers_of(teacher, tokenizer, held_out, 1.0)
    models.save(folder / "smollm2_answers.pt", {"tokens": answers.tokens, "turn": answers.turn})
    student = smollm2.prune_layers(teacher, options.drop_layers)
    distill_smollm2.warm_start(student, demonstrations, options)
    models.save(folder / "smollm2.pt", student.state_dict())
    for _ in range(warm_steps):
        tick()
