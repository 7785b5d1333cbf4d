"""Teacher and students of the language of a thousand words, and what they begin with."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from choosing.language import JUDGE, SPLITS, TRAIN, TUNE, Chain, JudgeChain, noisy
from comparison import models
from comparison.pairs import HELD_OUT_SEED, TEACHER_SEED, SmallPair, training_seed
from comparison.rollouts import Rollouts
from comparison.tasks import sample_episodes
from comparison.vocabulary import FILLED_VOCAB, student_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from opd_kernels import compare_tokenizers

# The share of training texts with noise. A teacher without any fails wherever a student has some.
TEACHER_NOISE = 0.005
STUDENT_NOISE = {0.7: 0.38, 0.9: 0.08, 0.98: 0.0}  # by the mass on the support that it leaves


@dataclass(frozen=True)
class Sizes:
    """How large and how long everything is."""

    teacher_steps: int
    student_steps: int
    planned_steps: int
    batch: int
    tune_problems: int
    judge_problems: int
    teacher_shape: tuple[int, int] = (128, 3)  # width and layers
    student_shape: tuple[int, int] = (96, 2)
    warm_up: int = 5
    curve_points: int = 4
    probe_every: int = 20
    timed_steps: int = 6
    new_tokens: int = 48

    def teacher(self) -> LlamaForCausalLM:
        """0.72 million parameters."""
        return models.build(FILLED_VOCAB, *self.teacher_shape)

    def student(self) -> LlamaForCausalLM:
        """0.32 million parameters."""
        return models.build(FILLED_VOCAB, *self.student_shape)


class ChainPair(SmallPair):
    """The pair of a seed, its student with a given mass on the teacher's support."""

    name = "chain"

    def __init__(self, folder: Path, sizes: Sizes, seed: int, start: float, k: int) -> None:
        """Load the models that were prepared."""
        self.seed, self.k, self.sizes, self.batch = seed, k, sizes, sizes.batch
        self.teacher = models.load(sizes.teacher(), folder / "teacher.pt")
        self.teacher.requires_grad_(False).eval()
        self.student = models.load(sizes.student(), student_path(folder, seed, start))
        self.tokenizers = compare_tokenizers(student_tokenizer(), student_tokenizer())

    def rollouts(self, step: int, top_p: float) -> tuple[Rollouts, Tensor]:
        """Training problems, new in every step, the same for all arms of a seed."""
        return self.on(TRAIN, self.batch, training_seed(self.seed, step), top_p)

    def on(self, split: str, count: int, seed: int, top_p: float) -> tuple[Rollouts, Tensor]:
        """The student's rollouts on problems of a split, and which of them succeeded."""
        return self._play(self._episodes(split, count, seed), top_p)

    def tuning(self) -> tuple[Rollouts, Tensor]:
        """Rollouts on the tuning problems, one set for all."""
        return self.on(TUNE, self.sizes.tune_problems, HELD_OUT_SEED, 1.0)

    def teacher_answers(self) -> Rollouts:
        """An expert's, to judged problems."""
        rng = random.Random(HELD_OUT_SEED + 1)
        return models.demonstrations((JudgeChain,), self.sizes.judge_problems, rng, dialect=False)

    def _held_out_episodes(self) -> list[Chain]:
        return self._episodes(JUDGE, self.sizes.judge_problems, HELD_OUT_SEED)

    def _episodes(self, split: str, count: int, seed: int) -> list[Chain]:
        episodes = sample_episodes((SPLITS[split],), count, random.Random(seed))
        for episode in episodes:
            episode.new_tokens = self.sizes.new_tokens
        return episodes


def student_path(folder: Path, seed: int, start: float) -> Path:
    """The student of a seed that begins with that mass."""
    return folder / f"student-{seed}-{start}.pt"


def prepare_teacher(folder: Path, sizes: Sizes, tick: Callable[[], None]) -> None:
    """Train the teacher on the expert's answers to training problems, with a little noise."""
    torch.manual_seed(TEACHER_SEED)
    model = sizes.teacher()
    _fit(model, sizes.teacher_steps, TEACHER_SEED, TEACHER_NOISE, tick)
    models.save(folder / "teacher.pt", model.state_dict())


def prepare_student(
    folder: Path, sizes: Sizes, seed: int, start: float, tick: Callable[[], None]
) -> None:
    """Train a student, not to the end, with the noise that leaves it that mass."""
    torch.manual_seed(seed)
    model = sizes.student()
    _fit(model, sizes.student_steps, seed, STUDENT_NOISE[start], tick)
    models.save(student_path(folder, seed, start), model.state_dict())


def checksums(folder: Path) -> dict[str, str]:
    """Checksums of a folder's models, because runs on other models are not comparable."""
    found = {}
    for path in sorted(folder.glob("*.pt")):
        digest = hashlib.sha256()
        for name, value in torch.load(path, weights_only=True).items():
            digest.update(name.encode())
            digest.update(value.contiguous().numpy().tobytes())
        found[path.stem] = digest.hexdigest()[:16]
    return found


def _fit(
    model: LlamaForCausalLM, steps: int, seed: int, noise: float, tick: Callable[[], None]
) -> None:
    models.train_on_demonstrations(
        model, steps=steps, seed=seed, dialect=False, turns=((noisy(noise),),), tick=tick
    )
