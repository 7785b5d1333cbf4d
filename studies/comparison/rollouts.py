"""What models write: batches of sequences, and episodes played with the generation library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from comparison.tasks import Episode
from comparison.vocabulary import ASSISTANT, IDS, PAD, STOP_IDS, decode, encode
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

PAD_ID = IDS[PAD]


@dataclass
class Rollouts:
    """Sequences padded at the right: prompts, what the model said, what the world answered."""

    tokens: Tensor  # (B, T) int64
    turn: Tensor  # (B, T) int64: which of the model's turns a token belongs to, -1 for none

    @property
    def response(self) -> Tensor:
        """True on the model's tokens."""
        return self.turn >= 0

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.tokens)

    def __getitem__(self, rows: slice | Tensor) -> Rollouts:
        """Some of the sequences, without the columns that only padded them."""
        tokens, turn = self.tokens[rows], self.turn[rows]
        width = int(((turn >= 0).any(0).nonzero().max() + 1).item())
        return Rollouts(tokens[:, :width], turn[:, :width])


@torch.no_grad()
def play(
    model: PreTrainedModel, episodes: Sequence[Episode], *, top_p: float, greedy: bool = False
) -> Rollouts:
    """Let the model act in all episodes until they are done.

    The key-value cache stays from turn to turn. Rows are of one length while they are played, with
    padding wherever a row had less to say, which the attention mask hides; it is squeezed out of
    what is returned.
    """
    tokens = _padded([encode(episode.prompt) for episode in episodes], left=True)
    turn = torch.full_like(tokens, -1)
    real = tokens != PAD_ID
    cache = DynamicCache(config=model.config)
    for number in range(max(episode.turn_limit for episode in episodes)):
        width = tokens.shape[1]
        attention = real.long()
        attention[:, -1] = 1  # rows that are done go on, unread
        tokens = model.generate(
            input_ids=tokens,
            attention_mask=attention,
            past_key_values=cache,
            generation_config=GenerationConfig(
                max_new_tokens=max(e.new_tokens for e in episodes if not e.done),
                do_sample=not greedy,
                temperature=None if greedy else 1.0,
                top_p=None if greedy else top_p,
                top_k=None if greedy else 0,
                eos_token_id=STOP_IDS,
                pad_token_id=PAD_ID,
            ),
        )
        said = tokens[:, width:]
        stopped = torch.isin(said, torch.tensor(STOP_IDS))
        speaking = stopped.cumsum(1) - stopped.long() == 0
        active = torch.tensor([not episode.done for episode in episodes])
        limits = torch.tensor([episode.new_tokens for episode in episodes])
        speaking &= active[:, None] & (torch.arange(said.shape[1]) < limits[:, None])
        answers = [
            [] if episode.done else episode.say(decode(row[keep].tolist()))
            for episode, row, keep in zip(episodes, said, speaking, strict=True)
        ]
        turn = torch.cat([turn, torch.where(speaking, number, -1)], 1)
        real = torch.cat([real, speaking], 1)
        if all(episode.done for episode in episodes):
            break
        heard = _padded([encode(words) for words in answers], left=True)
        real = torch.cat([real, heard != PAD_ID], 1)
        heard[:, -1] = IDS[ASSISTANT]
        tokens = torch.cat([tokens, heard], 1)
        turn = torch.cat([turn, torch.full_like(heard, -1)], 1)
    return squeezed(tokens, turn, real)


def _padded(rows: Sequence[Sequence[int]], *, left: bool = False) -> Tensor:
    width = max(1, *(len(row) for row in rows))
    tokens = torch.full((len(rows), width), PAD_ID)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(len(row))
        tokens[i, columns] = torch.tensor(row, dtype=tokens.dtype)
    return tokens


def squeezed(tokens: Tensor, turn: Tensor, real: Tensor) -> Rollouts:
    """Sequences without the gaps in them: real tokens moved to the front of each row."""
    order = torch.argsort(real.int(), dim=1, descending=True, stable=True)
    order = order[:, : int(real.sum(1).max())]
    kept = real.gather(1, order)
    return Rollouts(
        tokens.gather(1, order).where(kept, PAD_ID), turn.gather(1, order).where(kept, -1)
    )
