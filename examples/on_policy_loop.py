"""On-policy distillation as one loop to copy: generate, score, step.

    python examples/on_policy_loop.py    # three minutes on two cores, in the demo's environment

The pair is the demo's: SmolLM2-135M-Instruct and a copy without two of its layers. For your own,
replace the two lines that load them; with ``transformers`` that is ``from_pretrained`` twice.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import smollm2
import torch
from torch.nn import functional as F

from opd_kernels import LinearLogits, linear_topk_rkl, predicting, response_mask


def main(arguments: list[str] | None = None) -> None:
    """Train the student; print a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="updates of the student")
    parser.add_argument("--batch", type=int, default=8, help="prompts in a step")
    parser.add_argument("--new-tokens", type=int, default=48, help="longest response")
    parser.add_argument("--k", type=int, default=32, help="size of the teacher's support")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    random.seed(0)

    tokenizer, teacher = smollm2.load_teacher()  # frozen
    student = smollm2.prune_layers(teacher, dropped=[14, 15])
    prompts, _ = smollm2.read_prompts(Path(__file__).parent / "prompts.txt")
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2.5e-5, weight_decay=0.0)

    for step in range(options.steps):
        chats = [[{"role": "user", "content": p}] for p in random.sample(prompts, options.batch)]
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        # The student answers. The tokenizer pads on the left.
        sampling = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0}
        tokens = student.generate(**batch, **sampling, max_new_tokens=options.new_tokens)
        prompt_length = batch["input_ids"].shape[1]
        mask = response_mask(tokens, prompt_length, eos_ids=tokenizer.eos_token_id)
        attention = F.pad(batch["attention_mask"], (0, tokens.shape[1] - prompt_length), value=1)
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": tokens, "attention_mask": attention, "position_ids": positions}

        # The teacher scores the answers. Neither model computes all logits.
        with torch.no_grad():
            hidden = teacher.model(**inputs, use_cache=False).last_hidden_state
        scores = LinearLogits(hidden, teacher.lm_head.weight)

        # The student learns. Position t predicts token t + 1.
        hidden = student.model(**inputs, use_cache=False).last_hidden_state
        loss, stats = linear_topk_rkl(
            hidden,
            student.lm_head.weight,
            scores,
            options.k,
            mask=predicting(mask),
            return_stats=True,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mass = stats.student_mass[predicting(mask)].mean()
        print(
            f"step {step + 1}: loss {loss.item():.3f}, student mass {mass.item():.3f}", flush=True
        )


if __name__ == "__main__":
    main()
