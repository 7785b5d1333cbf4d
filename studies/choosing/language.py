"""Arithmetic in a language of a thousand words, its problems parted by who may see them.

The words that carry the task are those of the comparison. Some lines are opened by a filler, drawn
in Zipf's proportions from 896: where one may stand there is a long tail, and elsewhere the next
word is all but certain. Who speaks with noise puts any filler before any word: that is how a
student has less of its mass on the teacher's support, and knows the task all the same.
"""

from __future__ import annotations

import itertools
import random
import zlib
from typing import ClassVar

from comparison.tasks import Arithmetic
from comparison.vocabulary import FILLERS

FILLER_RATE = 0.2
TRAIN, TUNE, JUDGE = "train", "tune", "judge"
_ZIPF = list(itertools.accumulate(1 / (i + 1) for i in range(len(FILLERS))))


def filler(rng: random.Random) -> list[str]:
    """One filler in Zipf's proportions, or none."""
    if rng.random() >= FILLER_RATE:
        return []
    return rng.choices(FILLERS, cum_weights=_ZIPF)


class Chain(Arithmetic):
    """Three operations modulo ten. A problem is of one split, whatever draws it."""

    steps: ClassVar = ["a", "b", "c"]
    opener: ClassVar = staticmethod(filler)
    split: ClassVar[str] = TRAIN
    noise: ClassVar[float] = 0.0

    @classmethod
    def sample(cls, rng: random.Random) -> Chain:
        """Draw until the problem is of the class's split."""
        while True:
            chain = super().sample(rng)
            if split_of(chain.prompt) == cls.split:
                return chain

    def expert(self, rng: random.Random) -> list[str]:
        """The expert's words, and noise before some of them."""
        words = []
        for word in super().expert(rng):
            if rng.random() < self.noise:
                words.append(rng.choice(FILLERS))
            words.append(word)
        return words


class TuneChain(Chain):
    """A tenth of all problems: curves, screening and the choice of the winner see it."""

    split = TUNE


class JudgeChain(Chain):
    """Another tenth, that only what is reported sees."""

    split = JUDGE


SPLITS = {TRAIN: Chain, TUNE: TuneChain, JUDGE: JudgeChain}


def noisy(rate: float) -> type[Chain]:
    """Training problems whose expert puts noise before that share of the words."""
    return type("NoisyChain", (Chain,), {"noise": rate})


def split_of(prompt: list[str]) -> str:
    """The split of a problem, by a checksum of its words."""
    return {0: TUNE, 1: JUDGE}.get(zlib.crc32(" ".join(prompt).encode()) % 10, TRAIN)
