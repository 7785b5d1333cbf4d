"""Recipes whose packages are too large for the environment of `make test`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from causal_models import MASK, TOKENS, K, model_of
from pages import DOCS, Snippet, snippets
from torch import Tensor, nn

from opd_kernels import distill_loss

PACKAGES = {"logging": "wandb", "peft": "bitsandbytes"}


def large() -> list[pytest.param]:
    """The snippets that import one of these packages."""
    return [
        pytest.param(snippet, id=snippet.title)
        for page, package in PACKAGES.items()
        for snippet in snippets(DOCS / "recipes" / f"{page}.md")
        if re.search(rf"^import {package}$", snippet.source, re.MULTILINE)
    ]


def dense(layer: nn.Module) -> nn.Linear:
    """A linear layer with the values of one in 4 bits."""
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    result = nn.Linear(*reversed(weight.shape), bias=False)
    result.weight = nn.Parameter(weight, requires_grad=False)
    return result


def test_gradients_pass_weights_in_4_bits() -> None:
    """Also on CPUs, where bitsandbytes packs weights for inference in evaluation mode."""
    from bitsandbytes.nn import Linear4bit

    def gradient(quantised: bool) -> Tensor:
        student = model_of(hidden_size=64, intermediate_size=64, head_dim=16).float()
        for layer in student.model.layers:
            for name in ("gate_proj", "up_proj", "down_proj"):
                packed = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
                packed.load_state_dict(getattr(layer.mlp, name).state_dict())
                packed.to("cpu")  # quantises
                packed.requires_grad_(False)
                setattr(layer.mlp, name, packed if quantised else dense(packed))
        distill_loss(student.train(), TOKENS, model_of(seed=5).float(), mask=MASK, k=K).backward()
        return student.model.layers[0].self_attn.v_proj.weight.grad

    torch.testing.assert_close(gradient(quantised=True), gradient(quantised=False))


@pytest.mark.parametrize("snippet", large())
def test_snippet_runs(
    snippet: Snippet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    source = "\n" * (snippet.line - 1) + snippet.source
    exec(compile(source, str(snippet.page), "exec"), {"__name__": "snippet"})
    assert re.search(r"loss -?\d+\.\d+", capsys.readouterr().out)


def test_every_package_has_a_snippet() -> None:
    assert len(large()) == len(PACKAGES)
