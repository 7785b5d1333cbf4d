"""Where a loss on one sampled token is weak, as the paper says: measured before any step is taken.

Two of the paper's three failure modes, on rollouts of the students that the centre's runs begin
with. The third, special tokens, needs a pair that writes them differently: the other comparison's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from choosing.language import Chain
from choosing.pair import ChainPair, Sizes
from choosing.plan import CENTRE
from choosing.probes import PROBED
from choosing.runs import judge
from comparison.pairs import training_seed
from comparison.rollouts import Rollouts, play
from comparison.tasks import sample_episodes
from comparison.training import observe, score
from comparison.vocabulary import decode
from torch import Tensor

UNKNOWN = "?"  # an unused row of the embedding
SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of all tokens, those with the most signal
EVERY = 4  # words between two prefixes
STEP = 10_000  # no run has that many: problems that no run trains on

Rows = list[dict[str, Any]]


class Continued:
    """An episode of which some words are written already; as many may follow as from its start."""

    turn_limit = 1

    def __init__(self, episode: Chain, words: Sequence[str]) -> None:
        """The words go on from the episode's prompt."""
        self.episode, self.words = episode, list(words)
        self.prompt, self.new_tokens = [*episode.prompt, *words], episode.new_tokens
        self.done = self.success = False

    def say(self, words: list[str]) -> list[str]:
        """Take the rest."""
        answer = self.episode.say([*self.words, *words])
        self.done, self.success = True, self.episode.success
        return answer


def measure(sizes: Sizes, folder: Path, seeds: Sequence[int]) -> dict[str, Rows]:
    """Lines of the CSV files, by their names; ``before.csv`` has the students' judgement."""
    signals: Rows = []
    reliability: Rows = []
    before: Rows = []
    for seed in seeds:
        torch.manual_seed(seed)
        pair = ChainPair(folder, sizes, seed, CENTRE.start, int(CENTRE.k))
        draw = _drawing(sizes, seed)
        episodes = draw()
        rollouts = play(pair.student.eval(), episodes, top_p=1.0)
        signals += [{"seed": seed, **row} for row in signal(pair, rollouts)]
        success = torch.tensor([episode.success for episode in episodes])
        reliability += [{"seed": seed, **row} for row in continued(pair, rollouts, success, draw)]
        judged = judge(pair)
        before.append({"seed": seed, **{k: v for k, v in judged.items() if k != "positions"}})
    return {"signals.csv": signals, "reliability.csv": reliability, "before.csv": before}


def _drawing(sizes: Sizes, seed: int) -> Callable[[], list[Chain]]:
    """The same problems each time, none of them said yet."""

    def draw() -> list[Chain]:
        rng = random.Random(training_seed(seed, STEP))
        episodes = sample_episodes((Chain,), sizes.judge_problems, rng)
        for episode in episodes:
            episode.new_tokens = sizes.new_tokens
        return episodes

    return draw


def signal(pair: ChainPair, rollouts: Rollouts) -> Rows:
    """How each objective's signal, the norm of a token's gradient by its logits, is shared out.

    ``lowered`` is the share of tokens whose own logit the step lowers, ``signal_lowered`` that of
    the signal on them.
    """
    with torch.no_grad():
        scores = score(pair, rollouts, ())
    scores.student.requires_grad_()
    rows: Rows = []
    for name, loss in PROBED.items():
        (gradient,) = torch.autograd.grad(loss(scores).sum(), scores.student)
        sizes = gradient.norm(dim=-1)
        lowered = gradient.gather(-1, scores.tokens[:, None])[:, 0] > 0
        of_lowered = {
            "lowered": float(lowered.float().mean()),
            "signal_lowered": float(sizes[lowered].sum() / sizes.sum()),
        }
        held = sizes.sort(descending=True).values.cumsum(0) / sizes.sum()
        for share in SHARES:
            place = max(1, round(share * len(sizes))) - 1
            curve = {"share_of_tokens": share, "share_of_signal": float(held[place])}
            rows.append({"objective": name, **curve, **of_lowered})
    return rows


@torch.no_grad()
def continued(
    pair: ChainPair, rollouts: Rollouts, success: Tensor, draw: Callable[[], list[Chain]]
) -> Rows:
    """What the teacher makes of the student's first words, and the gap at the word after them."""
    said = [
        decode(row[own].tolist())
        for row, own in zip(rollouts.tokens, rollouts.response, strict=True)
    ]
    gaps = torch.zeros(rollouts.tokens.shape)
    gaps[rollouts.response] = observe(score(pair, rollouts, ()))["gap"]
    rows: Rows = []
    for written in range(0, max(map(len, said)), EVERY):
        chosen = [
            i
            for i, words in enumerate(said)
            if len(words) > written and UNKNOWN not in words[:written]
        ]
        if len(chosen) < len(said) / 4:
            break  # what is left is the rollouts that ramble
        problems = draw()
        episodes = [Continued(problems[i], said[i][:written]) for i in chosen]
        play(pair.teacher, episodes, top_p=1.0)
        at = [int(rollouts.response[i].nonzero()[written]) for i in chosen]
        rows.append(
            {
                "written": written,
                "rollouts": len(chosen),
                "teacher_success": sum(e.success for e in episodes) / len(episodes),
                "student_success": float(success[chosen].float().mean()),
                "gap": float(gaps[chosen, at].mean()),
            }
        )
    return rows
