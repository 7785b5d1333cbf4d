"""On-policy distillation with TRL's trainer and the loss of opd_kernels.

The teacher is a model in this process, or a server that speaks vLLM's or SGLang's format. Models
are names on the hub or folders; prompts are a data set's column "prompt", as text or as messages.

    # the teacher in process
    python examples/distill_trl.py --student Qwen/Qwen3-1.7B --teacher Qwen/Qwen3-8B \\
        --dataset trl-lib/DeepMath-103K --output distilled

    # several GPUs, rollouts by vLLM beside the training
    accelerate launch examples/distill_trl.py --student Qwen/Qwen3-1.7B --teacher Qwen/Qwen3-8B \\
        --dataset trl-lib/DeepMath-103K --vllm

    # the teacher behind a server, which has to allow K log-probs
    vllm serve Qwen/Qwen3-32B --max-logprobs 32
    python examples/distill_trl.py --student Qwen/Qwen3-1.7B --dataset trl-lib/DeepMath-103K \\
        --teacher-server http://localhost:8000 --teacher-model Qwen/Qwen3-32B

    # adapters instead of all weights (pip install peft), metrics to TensorBoard
    python examples/distill_trl.py --student Qwen/Qwen3-1.7B --teacher Qwen/Qwen3-8B \\
        --dataset trl-lib/DeepMath-103K --lora-rank 32 --lr 1e-4 --report-to tensorboard

    # tiny random models on a CPU, under a minute: the whole path, nothing learnt
    python examples/distill_trl.py --smoke

Watch ``student_mass`` (docs/recipes/student-mass.md). Where the tokenizers of student and teacher
differ, a warning says what to pass as ``--masked-tokens``, and as ``masked_ids``, ``banned_ids``
and ``vocab_size`` of the config.

Needs Python 3.11 and, from a clone of the repository: pip install ".[trl]"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import torch
    from datasets import Dataset, load_dataset, load_from_disk
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from opd_kernels.integrations.trl import TopKDistillationConfig, TopKDistillationTrainer
except ImportError as error:
    needs = "pip install 'trl>=1.16' 'transformers>=5.0' requests, on Python 3.11 or later"
    raise SystemExit(f"{error}; this script needs: {needs}") from None


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the options, the description as it stands."""


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what it does not have is TRL's default, or the paper's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--student", help="name or folder of the model to train")
    add("--teacher", help="name or folder of the teacher, to run in this process")
    add("--teacher-server", help="URL of the teacher's server, in place of --teacher")
    add("--teacher-model", help="the name under which the server has the teacher")
    add("--teacher-api", choices=("vllm", "sglang"), default="vllm", help="the server's format")
    add("--dataset", help='name or folder of a data set with a column "prompt"')
    add("--split", default="train", help="part of the data set to train on")
    add("--output", type=Path, default=Path("distilled"), help="folder for checkpoints and student")
    add("--k", type=int, default=32, help="size of the teacher's support")
    add("--steps", type=int, default=200, help="updates of the student")
    add("--batch", type=int, default=4, help="prompts at a time, of each process")
    add("--accumulation", type=int, default=8, help="such batches in a step")
    add("--new-tokens", type=int, default=1024, help="longest response")
    add("--lr", type=float, default=2e-6, help="peak learning rate; higher for LoRA, such as 1e-4")
    add("--top-p", type=float, default=0.9, help="nucleus that rollouts are sampled from")
    add(
        "--masked-tokens",
        nargs="*",
        default=[],
        help='left out at their first occurrence, in the paper: "<" think "<|im_end|>"',
    )
    add("--lora-rank", type=int, default=0, help="train LoRA adapters of this rank; 0: all weights")
    add("--lora-alpha", type=float, help="their scale (default: twice the rank)")
    add(
        "--lora-targets",
        nargs="+",
        metavar="MODULE",
        default=["all-linear"],
        help="names of the layers that get adapters, never the output head",
    )
    add("--vllm", action="store_true", help="vLLM generates, in this process")
    add("--report-to", default="none", help="where metrics go: none, tensorboard, wandb, ...")
    add("--save-steps", type=int, default=50, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--smoke", action="store_true", help="tiny random models, a few steps on a CPU")
    options = parser.parse_args(arguments)
    missing = [
        name
        for name, value in (
            ("--student", options.student),
            ("--dataset", options.dataset),
            ("--teacher or --teacher-server", options.teacher or options.teacher_server),
        )
        if not value
    ]
    if missing and not options.smoke:
        parser.error(f"{', '.join(missing)} is missing; --smoke needs none of them")
    if options.teacher and options.teacher_server:
        parser.error("--teacher and --teacher-server are both given, expected one of them")
    if options.teacher_model and not options.teacher_server:
        parser.error("--teacher-model needs --teacher-server; for a model in here: --teacher")
    if options.lora_rank < 0:
        parser.error(f"--lora-rank is {options.lora_rank}, allowed is 0 or more")
    return options


def adapters(options: argparse.Namespace) -> Any:
    """What PEFT is told; None where all weights are trained."""
    if not options.lora_rank:
        return None
    from peft import LoraConfig  # pip install peft

    targets = options.lora_targets
    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )


def config(options: argparse.Namespace) -> TopKDistillationConfig:
    """What TRL is told."""
    smoke = options.smoke
    return TopKDistillationConfig(
        str(options.output),
        max_steps=3 if smoke else options.steps,
        max_completion_length=16 if smoke else options.new_tokens,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.lr,
        k=options.k,
        top_p=options.top_p,
        masked_tokens=options.masked_tokens,
        teacher_server_url=options.teacher_server,
        teacher_server_model=options.teacher_model,
        teacher_server_api=options.teacher_api,
        use_vllm=options.vllm,
        use_cpu=smoke,
        bf16=not smoke and torch.accelerator.is_available(),
        save_steps=options.save_steps,
        logging_steps=1,
        report_to=options.report_to,
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words and their ids, nothing else."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(509))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def tiny_model(layers: int) -> LlamaForCausalLM:
    """A Llama of random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def trainer_of(options: argparse.Namespace) -> TopKDistillationTrainer:
    """Models and data by name, or tiny ones."""
    args, peft_config = config(options), adapters(options)
    if options.smoke:
        prompts = [f"w{i} w{2 * i + 1} w{i + 40}" for i in range(96)]
        return TopKDistillationTrainer(
            tiny_model(1),
            None if options.teacher_server else tiny_model(2),
            args,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tiny_tokenizer(),
            peft_config=peft_config,
        )
    folder = Path(options.dataset)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        dataset = load_from_disk(options.dataset)  # as save_to_disk leaves it
        dataset = dataset[options.split] if isinstance(dataset, dict) else dataset
    else:
        dataset = load_dataset(options.dataset, split=options.split)
    return TopKDistillationTrainer(
        options.student, options.teacher, args, train_dataset=dataset, peft_config=peft_config
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and save."""
    options = parse_options(arguments)
    trainer = trainer_of(options)
    trainer.train(resume_from_checkpoint=options.resume or None)
    trainer.save_model()
    who = "the student's adapters are" if options.lora_rank else "the student is"
    print(f"{who} in {options.output}/")


if __name__ == "__main__":
    main()
