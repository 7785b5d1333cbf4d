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

    # tiny random models on a CPU, under a minute: the whole path, nothing learnt
    python examples/distill_trl.py --smoke

Watch ``student_mass``: the loss does not hold the student on the teacher's support
(docs/recipes.md, "When student_mass falls"). Where the tokenizers of student and teacher differ, a
warning tells what to pass as ``--masked-tokens``, and as ``masked_ids``, ``banned_ids`` and
``vocab_size`` of the config.

Needs: pip install "opd_kernels[trl]"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset, load_dataset, load_from_disk
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opd_kernels.integrations.trl import TopKDistillationConfig, TopKDistillationTrainer


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what it does not have is TRL's default, or the paper's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", help="name or folder of the model to train")
    parser.add_argument("--teacher", help="name or folder of the teacher, to run in this process")
    parser.add_argument("--teacher-server", help="URL of the teacher's server, in its place")
    parser.add_argument("--teacher-model", help="the name under which the server has the teacher")
    parser.add_argument("--teacher-api", choices=("vllm", "sglang"), default="vllm")
    parser.add_argument("--dataset", help='name or folder of a data set with a column "prompt"')
    parser.add_argument("--split", default="train")
    parser.add_argument("--output", type=Path, default=Path("distilled"))
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4, help="prompts at a time, of each process")
    parser.add_argument("--accumulation", type=int, default=8, help="such batches in a step")
    parser.add_argument("--new-tokens", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=2e-6)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument(
        "--masked-tokens",
        nargs="*",
        default=[],
        help='left out at their first occurrence, in the paper: "<" think "<|im_end|>"',
    )
    parser.add_argument("--vllm", action="store_true", help="vLLM generates, in this process")
    parser.add_argument("--save-steps", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--smoke", action="store_true", help="tiny random models, a few CPU steps")
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
    return options


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
        report_to="none",
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
    args = config(options)
    if options.smoke:
        prompts = [f"w{i} w{2 * i + 1} w{i + 40}" for i in range(96)]
        return TopKDistillationTrainer(
            tiny_model(1),
            None if options.teacher_server else tiny_model(2),
            args,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tiny_tokenizer(),
        )
    folder = Path(options.dataset)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        dataset = load_from_disk(options.dataset)  # as save_to_disk leaves it
        dataset = dataset[options.split] if isinstance(dataset, dict) else dataset
    else:
        dataset = load_dataset(options.dataset, split=options.split)
    return TopKDistillationTrainer(options.student, options.teacher, args, train_dataset=dataset)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and save."""
    options = parse_options(arguments)
    trainer = trainer_of(options)
    trainer.train(resume_from_checkpoint=options.resume or None)
    trainer.save_model()
    print(f"the student is in {options.output}/")


if __name__ == "__main__":
    main()
