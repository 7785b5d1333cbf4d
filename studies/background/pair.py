"""What the study measures on: hidden states of a student, of the same student before, of a teacher.

All three are read at the tokens of the student's own answers, and share one LM head.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@dataclass
class Pair:
    """N rows, each of which predicts a token of a response; float32."""

    student: Tensor  # (N, H), what the head gets
    stale: Tensor  # (N, H), of the student that the on-policy steps began with
    teacher: Tensor  # (N, H)
    head: Tensor  # (V, H)
    prompt: Tensor  # (N,) int64, ascending from 0: which prompt a row belongs to


def random_pair(prompts: int = 6, tokens: int = 5, width: int = 8, vocab: int = 40) -> Pair:
    """A stand-in of the same form, in no time: numbers that mean nothing."""
    generator = torch.Generator().manual_seed(0)
    rows = prompts * tokens

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # Students that lack the same direction, so that prompts agree on the gradient.
    student, lacking = draw(rows, width) + draw(width), draw(width)
    stale, teacher = student + 0.1 * draw(rows, width), student + lacking + 0.5 * draw(rows, width)
    prompt = torch.arange(prompts).repeat_interleave(tokens)
    return Pair(student, stale, teacher, draw(vocab, width), prompt)


def smollm2_pair(options: argparse.Namespace) -> Pair:
    """Train the demo's student as the demo does, on less; it answers the held-out prompts.

    Raises:
        ImportError: if a package that the demo needs is missing.
    """
    sys.path.insert(0, str(EXAMPLES))
    import distill_smollm2 as demo
    from smollm2 import Responses, load_teacher, prune_layers, read_prompts, response_hidden, sample
    from transformers import set_seed

    of_demo = demo.parse_options([])
    of_demo.dtype = getattr(torch, of_demo.dtype)
    for name in ("warm_steps", "demonstrations", "batch_size", "new_tokens"):
        setattr(of_demo, name, getattr(options, name))
    set_seed(of_demo.seed)
    tokenizer, teacher = load_teacher()
    student = prune_layers(teacher, of_demo.drop_layers)
    training, held_out = read_prompts(EXAMPLES / "prompts.txt")
    held_out = held_out[: options.prompts]

    def answer(prompts: list[str], top_p: float, model: torch.nn.Module = student) -> Responses:
        return sample(model, tokenizer, prompts, of_demo.new_tokens, of_demo.dtype, top_p)

    demonstrations = answer(random.sample(training, of_demo.demonstrations), 0.9, teacher)
    demo.warm_start(student, demonstrations, of_demo)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    trainer = demo.Trainer(student, of_demo.lr, of_demo.steps)
    batches = demo.shuffled_batches(len(training), of_demo.batch_size)
    for number in range(of_demo.steps):
        rollouts = answer([training[i] for i in next(batches).tolist()], 0.9)
        loss, *masses = demo.on_policy_step(student, teacher, rollouts, trainer, of_demo)
        print(f"on-policy step {number + 1}: loss {loss:.3f}, masses {masses}", flush=True)

    sequences = answer(held_out, 1.0)

    @torch.no_grad()
    def rows(model: torch.nn.Module) -> Tensor:
        return response_hidden(model, sequences, torch.float32)[sequences.mask]

    current, scored = rows(student), rows(teacher)
    student.load_state_dict(before)
    prompt = sequences.mask.nonzero()[:, 0]
    return Pair(current, rows(student), scored, student.lm_head.weight.detach(), prompt)
