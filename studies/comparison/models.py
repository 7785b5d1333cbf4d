"""The small transformers, and their training by cross-entropy on an expert's episodes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from comparison.rollouts import Rollouts
from comparison.tasks import Task, sample_episodes
from comparison.vocabulary import (
    IDS,
    PAD,
    STUDENT_END,
    STUDENT_VOCAB,
    TEACHER_END,
    TEACHER_VOCAB,
    THINK,
    encode,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

# How often the teacher's own turns begin and end in its dialect. Independent draws: whatever the
# student writes, the teacher has seen it.
THINK_RATE, TEACHER_END_RATE = 0.5, 0.9


def build(vocab: int, width: int, layers: int = 4) -> LlamaForCausalLM:
    """A Llama of `layers` layers with tied embeddings, 4 heads."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 16 * 16,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=IDS[PAD],
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def new_teacher() -> LlamaForCausalLM:
    """3.2 million parameters."""
    return build(TEACHER_VOCAB, 256)


def new_student() -> LlamaForCausalLM:
    """1.8 million parameters."""
    return build(STUDENT_VOCAB, 192)


def demonstrations(task: Task, count: int, rng: random.Random, dialect: bool) -> Rollouts:
    """Episodes that an expert plays, in the student's plain markup or in the teacher's dialect."""
    rows = []
    for episode in sample_episodes(task, count, rng):
        row = [(word, -1) for word in episode.prompt]
        for number in range(episode.turn_limit):
            if episode.done:
                break
            said = episode.expert(rng)
            if dialect and rng.random() < THINK_RATE:
                said = [THINK, *said]
            end = TEACHER_END if dialect and rng.random() < TEACHER_END_RATE else STUDENT_END
            said = [*said, end]
            row += [(word, number) for word in said]
            row += [(word, -1) for word in episode.say(said)]
        words, turns = zip(*row, strict=True)
        rows.append((encode(words), turns))
    length = max(len(ids) for ids, _ in rows)
    tokens = torch.full((count, length), IDS[PAD])
    turn = torch.full((count, length), -1)
    for i, (ids, turns) in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids)
        turn[i, : len(ids)] = torch.tensor(turns)
    return Rollouts(tokens, turn)


def train_on_demonstrations(
    model: PreTrainedModel,
    *,
    steps: int,
    seed: int,
    dialect: bool,
    turns: Sequence[Task] = ("arithmetic", "world"),
    lr: float = 1e-3,
    batch: int = 8,
    tick: Callable[[], None] = lambda: None,
) -> float:
    """Fit the model to an expert's episodes, the tasks taking `turns`; the last losses' mean."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, steps))
    recent = 0.0
    for step in range(steps):
        task = turns[step % len(turns)]
        # An episode of the world is about three times as long.
        count = batch if task == "world" else 3 * batch
        sequences = demonstrations(task, count, rng, dialect)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=sequences.tokens, use_cache=False).logits
        # All tokens, not the expert's alone: a world that repeats itself teaches to look things up.
        targets = sequences.tokens[:, 1:].masked_fill(sequences.tokens[:, 1:] == IDS[PAD], -100)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent += (loss.item() - recent) / min(step + 1, 50)
        tick()
    return recent


def load(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    """The model with the weights of a file."""
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def save(path: Path, state: object) -> None:
    """Write the file whole or not at all: a run may be killed at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _warm_cosine(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / 30)
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def hidden_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What the head gets, (B, T, H), of sequences padded at the right."""
    return model.model(input_ids=tokens, use_cache=False).last_hidden_state
