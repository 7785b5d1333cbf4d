"""The examples that a user copies run, on tiny models in place of those that they download."""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the examples need it")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))]
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture(autouse=True)
def _examples_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


def tiny_pair() -> tuple[Any, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=CHAT,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=16,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return tokenizer, LlamaForCausalLM(config).requires_grad_(False).eval()


def test_the_on_policy_loop_trains_on_the_rows_that_predict_responses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf", reason="the demo's model needs it")
    import on_policy_loop

    import opd_kernels

    tokenizer, teacher = tiny_pair()
    before = copy.deepcopy(teacher.state_dict())
    monkeypatch.setattr(on_policy_loop.smollm2, "load_teacher", lambda: (tokenizer, teacher))
    calls = []

    def recorded(own: Any, scores: Any, k: int, **options: Any) -> Any:
        calls.append((own.hidden.detach(), scores, options["mask"]))
        return opd_kernels.topk_divergence(own, scores, k, **options)

    monkeypatch.setattr(on_policy_loop, "topk_divergence", recorded)
    on_policy_loop.main(steps=2, batch_size=3, new_tokens=5, k=8)
    printed = capsys.readouterr().out
    assert len(re.findall(r"^step \d: loss \d\.\d+, student mass 0\.\d+$", printed, re.M)) == 2
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    (first, scores, mask), (second, *_) = calls
    assert mask.shape == first.shape[:2] == scores.hidden.shape[:2]
    # Rollouts of three prompts have five tokens at most, the last of which predicts nothing.
    assert mask.any(-1).all()
    assert not mask[:, :-6].any()
    assert not mask[:, -1].any()
    assert not first.isnan().any()
    assert not second.isnan().any()


def test_tensor_parallel_training_is_that_of_one_process() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")])
    )
    command = [*launcher, str(EXAMPLES / "tensor_parallel.py"), "3"]
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    pattern = r"^loss (0\.\d+), in one process (0\.\d+)$"
    losses = [[float(x) for x in found] for found in re.findall(pattern, run.stdout, re.M)]
    assert len(losses) == 3
    assert losses[2][0] < losses[0][0]
    for loss, single in losses:
        assert loss == pytest.approx(single, rel=1e-4)


def test_the_tensor_parallel_example_says_how_it_is_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["tensor_parallel.py"])
    with pytest.raises(SystemExit, match="torchrun --standalone"):
        runpy.run_path(str(EXAMPLES / "tensor_parallel.py"), run_name="__main__")


def test_every_option_of_a_script_has_a_help() -> None:
    root = EXAMPLES.parent
    scripts = [
        path
        for folder in ("benchmarks", "examples", "studies")
        for path in sorted((root / folder).glob("*.py"))
    ]
    scripts += [root / "benchmarks" / "gpu" / "__main__.py", root / "opd_kernels" / "fuzz.py"]
    options = 0
    for path in scripts:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                options += 1
                assert any(word.arg == "help" for word in node.keywords), ast.unparse(node)
    assert options > 50


@pytest.mark.parametrize(
    ("script", "lacking", "package"),
    [
        ("examples/on_policy_loop.py", "transformers", "transformers gguf"),
        ("examples/distill_trl.py", "datasets", "trl>=1.16"),
        ("benchmarks/plot.py", "matplotlib", "matplotlib"),
    ],
)
def test_a_script_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, script: str, lacking: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, lacking, None)
    monkeypatch.delitem(sys.modules, "smollm2", raising=False)
    with pytest.raises(SystemExit, match=rf"{lacking}.* needs: pip install .*{package}"):
        runpy.run_path(str(EXAMPLES.parent / script), run_name="__main__")


def test_the_loop_prints_its_help_for_what_is_no_number_of_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gguf", reason="the demo's model needs it")
    monkeypatch.setattr(sys, "argv", ["on_policy_loop.py", "--help"])
    with pytest.raises(SystemExit, match=r"on_policy_loop.py \[STEPS\]"):
        runpy.run_path(str(EXAMPLES / "on_policy_loop.py"), run_name="__main__")


def test_every_option_of_the_trl_script_has_a_help(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="the script needs it")
    import distill_trl

    parsers = []
    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(
        argparse.ArgumentParser,
        "parse_args",
        lambda self, *given: parsers.append(self) or parse(self, *given),
    )
    options = distill_trl.parse_options(["--smoke"])
    assert options.report_to == "none"
    (parser,) = parsers
    assert all(action.help for action in parser._actions)
    text = parser.format_help()
    assert "(default: 32)" in text
    assert "accelerate launch examples/distill_trl.py" in text


def test_the_trl_script_trains_adapters_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("trl", "peft", "tensorboard"):
        pytest.importorskip(package, reason="the script needs it for these options")
    import distill_trl

    options = ["--batch", "2", "--accumulation", "1", "--k", "8", "--lora-rank", "4"]
    options += ["--report-to", "tensorboard", "--output", str(tmp_path)]
    distill_trl.main(["--smoke", *options])
    assert "the student's adapters are in" in capsys.readouterr().out
    kept = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (kept["r"], kept["lora_alpha"]) == (4, 8)
    assert "lm_head" not in kept["target_modules"]
    assert list(tmp_path.rglob("events.out.tfevents.*"))


BENCHMARKS = EXAMPLES.parent / "benchmarks"


def test_the_readmes_plot_is_drawn_from_records_of_one_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs it")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import plot

    time, memory = plot.newest("cpu.jsonl"), plot.newest("memory.jsonl")
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    assert (
        f"{time['rows']} tokens with a vocabulary of {time['vocab']:,}, {time['dtype']}" in readme
    )
    times = time["milliseconds"]
    least, most = (
        times[name] / times["forward + backward"] for name in ("careful eager", "naive eager")
    )
    assert f"{least:.0f} to {most:.0f} times" in readme
    plot.draw(tmp_path / "plot.png", time, memory)
    assert (tmp_path / "plot.png").stat().st_size > 0
    with pytest.raises(SystemExit, match="different shapes"):
        plot.draw(tmp_path / "plot.png", time, memory | {"k": 1})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_peak_memory_counts_the_gradient_and_what_eager_allocates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import peak_memory

    options = argparse.Namespace(rows=64, vocab=200_000, k=8, dtype="float32", threads=1)
    gradient = options.rows * options.vocab * 4
    threads = torch.get_num_threads()
    try:
        ours, naive = (peak_memory.peak_here(form, options) for form in ("ours", "naive eager"))
    finally:
        torch.set_num_threads(threads)
    assert 0.9 < ours / gradient < 1.2
    # Both log-softmaxes are float32 as the gradient itself. The process may reuse a few free pages.
    assert naive / gradient > 1.9
