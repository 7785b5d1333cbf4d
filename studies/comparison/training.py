"""One run of the comparison: rollouts, the arm's loss, updates, and what is logged of them."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from comparison.arms import TEACHER, Arm, Scores
from comparison.models import hidden_states, save
from comparison.rollouts import Rollouts
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel

from opd_kernels import TokenizerComparison, predicting, special_token_mask, topk_rkl

MICRO_BATCHES = 4
CLIP_NORM = 1.0
POSITION_BIN, POSITIONS = 4, 64


class Pair(Protocol):
    """A teacher, a student and what they talk about."""

    name: str
    seed: int
    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizers: TokenizerComparison
    k: int

    def rollouts(self, step: int, top_p: float) -> tuple[Rollouts, Tensor | None]:
        """The student's rollouts of a step, and which of them succeeded, (B,) bool."""

    def held_out(self) -> tuple[Rollouts, dict[str, Tensor]]:
        """The student's rollouts on held-out problems; by way of sampling, which succeeded."""

    def teacher_answers(self) -> Rollouts:
        """What an expert or the teacher says to held-out problems."""

    def autocast(self) -> AbstractContextManager:
        """The precision that both models compute in."""


@dataclass(frozen=True)
class Budget:
    """How long a run is."""

    steps: int
    lr: float
    warm_up: int = 5
    checkpoint_every: int = 20


def score(pair: Pair, sequences: Rollouts, banned: Sequence[int]) -> Scores:
    """Both models' logits where a response token is predicted; heads meet no other position."""
    rows = predicting(sequences.response)
    with pair.autocast():
        with torch.no_grad():
            hidden = hidden_states(pair.teacher, sequences.tokens)
            teacher = pair.teacher.lm_head(hidden[rows])
        student = pair.student.lm_head(hidden_states(pair.student, sequences.tokens)[rows])
    tokens = sequences.tokens[sequences.response]
    return Scores(student, teacher, tokens, pair.k, banned, sequences.response)


def kept_tokens(pair: Pair, arm: Arm, sequences: Rollouts) -> Tensor:
    """Which response tokens (M,) take part: with masking, no special token's first in a turn."""
    kept = sequences.response
    if arm.masking:
        for number in range(int(sequences.turn.max()) + 1):
            turn = sequences.turn == number
            masked = special_token_mask(sequences.tokens, pair.tokenizers.masked_ids, mask=turn)
            kept = kept & (masked | ~turn)
    return kept[sequences.response]


@torch.no_grad()
def observe(scores: Scores) -> dict[str, Tensor]:
    """What is watched at each response token, (M,)."""
    log_p, log_q = scores.log_probs
    said_p, said_q = scores.said
    _, stats = topk_rkl(
        scores.student.detach().float(),
        scores.support,
        vocab_size=scores.vocab,
        reduction="none",
        return_stats=("student_mass", "teacher_mass"),
    )
    return {
        "reverse_kl": F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1),
        "forward_kl": F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1),
        "student_mass": stats.student_mass,
        "teacher_mass": stats.teacher_mass,
        "teacher_score": said_q,
        "gap": said_q - said_p,
    }


def update(
    pair: Pair,
    arm: Arm,
    optimizer: torch.optim.Optimizer,
    batch: Rollouts,
    *,
    clip: float | None = CLIP_NORM,
    watch: Callable[[Scores], dict[str, Tensor]] = observe,
) -> dict[str, Any]:
    """One step on a batch in micro-batches; loss, gradient norm and variance, what is watched.

    The step's gradient is the token mean. Its variance is that of the micro-batches' gradients g_i,
    weighted with their shares w_i of the tokens: n / (n - 1) sum_i w_i |g_i - sum_j w_j g_j|^2.
    """
    banned = pair.tokenizers.banned_ids if arm.masking else ()
    parameters = [p for p in pair.student.parameters() if p.requires_grad]
    size = len(batch) // MICRO_BATCHES
    parts = [batch[i : i + size] for i in range(0, len(batch), size)]
    kept = [kept_tokens(pair, arm, part) for part in parts]
    total = sum(int(k.sum()) for k in kept)
    optimizer.zero_grad()
    loss, squares, watched = 0.0, 0.0, []
    for part, keep in zip(parts, kept, strict=True):
        scores = score(pair, part, banned)
        rows = arm.loss(scores)
        mean = torch.where(keep, rows, 0.0).sum() / keep.sum().clamp(min=1)
        share = int(keep.sum()) / max(1, total)
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(mean, parameters), strict=True
        ):
            squares += share * float(gradient.square().sum())
            if parameter.grad is None:
                parameter.grad = gradient.mul_(share)
            else:
                parameter.grad.add_(gradient, alpha=share)
        loss += share * mean.item()
        # Whatever an arm leaves out, all are watched on the same support.
        watched.append(watch(replace(scores, banned=()) if banned else scores))
    limit = math.inf if clip is None else clip
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    optimizer.step()
    n = len(parts)
    tokens = {name: torch.cat([w[name] for w in watched]) for name in watched[0]}
    return {
        "loss": loss,
        "grad_norm": norm,
        "grad_variance": max(0.0, squares - norm**2) * n / (n - 1),
        "tokens": total,
        **{name: float(values.mean()) for name, values in tokens.items()},
    }


def ordinary(scores: Scores, special: Sequence[int]) -> Scores:
    """The scores of all other tokens, by models that do not know the special ones."""
    ids = torch.tensor(special, dtype=torch.long)
    known = torch.ones(scores.vocab, dtype=torch.bool).index_fill(0, ids, False)
    rows = known[scores.tokens]
    student, teacher = (
        logits[rows, : scores.vocab][:, known] for logits in (scores.student, scores.teacher)
    )
    tokens = (known.cumsum(0) - 1)[scores.tokens[rows]]
    return Scores(student, teacher, tokens, scores.k, ())


@torch.no_grad()
def evaluate(pair: Pair) -> dict[str, Any]:
    """Held-out problems: success, divergences on own and on expert's words, gap by position.

    ``ordinary_`` figures are without the special tokens that the pair disagrees about: neither as
    tokens that were said, nor in the two distributions.
    """
    sequences, successes = pair.held_out()
    (watched, words), (expert, expert_words) = (
        _watch(pair, s) for s in (sequences, pair.teacher_answers())
    )
    position = (sequences.response.cumsum(1) - 1)[sequences.response]
    bins = []
    for start in range(0, POSITIONS, POSITION_BIN):
        here = (position >= start) & (position < start + POSITION_BIN)
        if here.any():
            bins.append([start, float(watched["gap"][here].mean()), int(here.sum())])
    return {
        **{f"success{how}": float(which.float().mean()) for how, which in successes.items()},
        "reverse_kl": float(watched["reverse_kl"].mean()),
        "forward_kl": float(expert["forward_kl"].mean()),
        "teacher_score": float(watched["teacher_score"].mean()),
        "ordinary_reverse_kl": float(words["reverse_kl"].mean()),
        "ordinary_forward_kl": float(expert_words["forward_kl"].mean()),
        "ordinary_teacher_score": float(words["teacher_score"].mean()),
        "student_mass": float(watched["student_mass"].mean()),
        "teacher_mass": float(watched["teacher_mass"].mean()),
        "length": float(sequences.response.sum(1).float().mean()),
        "gap_by_position": bins,
    }


def _watch(
    pair: Pair, sequences: Rollouts, size: int = 16
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is watched of all response tokens, and of the ordinary ones."""
    parts = []
    for start in range(0, len(sequences), size):
        scores = score(pair, sequences[start : start + size], ())
        special = pair.tokenizers.masked_ids
        whole = observe(scores)
        parts.append((whole, observe(ordinary(scores, special)) if special else whole))
    whole, words = (
        {name: torch.cat([part[name] for part in kind]) for name in kind[0]}
        for kind in zip(*parts, strict=True)
    )
    return whole, words


def run(pair: Pair, arm: Arm, budget: Budget, output: Path, tick: Callable[[], None]) -> None:
    """Train the pair's student with one arm; goes on from a checkpoint if there is one.

    Every step draws from a generator of its own seed and step, so all arms meet the same problems,
    and a run that was interrupted ends as one that was not.
    """
    path = result_path(output, pair.name, arm, pair.seed)
    name = path.stem
    checkpoint = output / "checkpoints" / f"{name}.pt"
    student = pair.student
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=budget.lr, betas=(0.9, 0.95), weight_decay=0.0)
    steps: list[dict[str, Any]] = []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        steps = saved["steps"]
    student.train()
    for _ in steps:
        tick()
    board = SummaryWriter(output / "tensorboard" / name, purge_step=len(steps) + 1)
    for number in range(len(steps), budget.steps):
        start = time.perf_counter()
        torch.manual_seed(1_000_003 * pair.seed + number)
        batch, success = pair.rollouts(number, arm.top_p)
        for group in optimizer.param_groups:
            group["lr"] = budget.lr * min(1.0, (number + 1) / budget.warm_up)
        row = {"step": number + 1, **update(pair, arm, optimizer, batch)}
        row["success"] = None if success is None else float(success.float().mean())
        row["seconds"] = time.perf_counter() - start
        steps.append(row)
        for key, value in row.items():
            if value is not None:
                board.add_scalar(key, value, number + 1)
        if (number + 1) % budget.checkpoint_every == 0 and number + 1 < budget.steps:
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
            save(checkpoint, {**state, "steps": steps})
        tick()
    board.close()
    torch.manual_seed(pair.seed)
    if arm == TEACHER:
        pair.student = pair.teacher
    if steps:
        _write_steps(output / "steps" / f"{name}.csv", steps)
    what = {"task": pair.name, "arm": arm.name, "seed": pair.seed, "steps": len(steps)}
    # Written last and whole: with it the run counts as done.
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**what, **evaluate(pair)}, indent=1))
    partial.replace(path)
    checkpoint.unlink(missing_ok=True)


def _write_steps(path: Path, steps: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(steps[0]))
        writer.writeheader()
        writer.writerows(steps)


def result_path(output: Path, task: str, arm: Arm, seed: int) -> Path:
    """Where a run leaves its result."""
    return output / "runs" / f"{task}-{arm.name.replace(' + ', '-').replace(' ', '_')}-{seed}.json"
