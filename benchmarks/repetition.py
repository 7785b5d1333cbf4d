"""How often ids repeat in the supports of neighbouring tokens, on a language model's own answers.

    python benchmarks/repetition.py [--prompts 112 --tokens 160 --k 8,32,64]

SmolLM2-135M-Instruct answers the demo's prompts (``make demo`` installs it) and takes its k best
ids at every token of the answers; answers follow each other as in a packed batch, padding is left
out. A line for each k: the share of (token, entry) pairs whose id is the first of its kind in a
block of so many consecutive tokens, mean of the blocks; and in how many of all tokens the commonest
id is. What a kernel reads of a head once for each block instead of once for each token shrinks to
that share.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BLOCKS = (1, 4, 16, 64, 256, 512, 2048, 8192)


def distinct_share(ids: Tensor, block: int) -> float:
    """Distinct ids / ids of whole blocks of rows of (N, K) ids; NaN where there is no block."""
    blocks = ids[: len(ids) // block * block].reshape(-1, block * ids.shape[1])
    ordered = blocks.sort(-1).values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return float(first.float().mean())


def commonest(ids: Tensor) -> float:
    """Share of the rows of (N, K) ids, distinct in each row, that have the commonest id."""
    return int(ids.flatten().bincount().max()) / len(ids)


def answers(prompts: int, tokens: int, k: int) -> Tensor:
    """The model's k best ids at each token of its answers, best first."""
    sys.path.insert(0, str(EXAMPLES))
    import smollm2

    tokenizer, model = smollm2.load_teacher()
    training, held_out = smollm2.read_prompts(EXAMPLES / "prompts.txt")
    chosen = (training + held_out)[:prompts]
    sequences = smollm2.sample(model, tokenizer, chosen, tokens, torch.bfloat16)
    found = []
    with torch.no_grad():
        for start in range(0, len(sequences), 8):
            some = sequences[slice(start, start + 8)]
            logits = smollm2.response_logits(model, some, torch.bfloat16)
            found.append(logits[some.mask].float().topk(k).indices)
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=112, help="that the model answers")
    parser.add_argument("--tokens", type=int, default=160, help="longest answer")
    parser.add_argument("--k", default="8,32,64", help="sizes of the support, by commas")
    options = parser.parse_args()
    torch.manual_seed(0)
    widths = [int(k) for k in options.k.split(",")]
    ids = answers(options.prompts, options.tokens, max(widths))
    print(f"{len(ids)} tokens; distinct ids, % of all in blocks of so many tokens")
    print("    k" + "".join(f"{block:8d}" for block in BLOCKS) + "  commonest id in % of tokens")
    for k in widths:
        shares = [100 * distinct_share(ids[:, :k], block) for block in BLOCKS]
        print(f"{k:5d}" + "".join(f"{share:8.1f}" for share in shares), end="")
        print(f"{100 * commonest(ids[:, :k]):12.1f}")


if __name__ == "__main__":
    main()
