"""Token log-probs beside a loss and on their own under torch.compile and torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from opd_kernels import token_logprobs, topk_divergence

N, V, K = 6, 40, 5
OUTSIDES = ["renormalize", "bucket", "sample"]
TOKENS = torch.tensor([0, 39, 7, -100, 3, 3])
MASK = torch.tensor([True, True, True, False, True, True])


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


def step(
    z: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor, mask: Any, outside: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return topk_divergence(
        z,
        teacher,
        K,
        outside=outside,
        token_ids=tokens,
        mask=mask,
        temperature=1.3,
        return_token_logprobs=True,
    )


@pytest.mark.parametrize("outside", [*OUTSIDES, "alone"])
def test_compiles_whole_with_dynamic_shapes(outside: str) -> None:
    """Both upstream gradients, or that of the loss alone, of the log-probs alone."""

    def run(z: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor, mask: Any) -> Any:
        if outside == "alone":
            return (token_logprobs(z * 2, tokens, mask=mask, temperature=1.3),) * 2
        return step(z * 2, teacher, tokens, mask, outside)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
    for rows in (N, N - 2):
        z = logits(rows, V).requires_grad_()
        rest = logits(rows, V, seed=1), TOKENS[:rows].clone(), MASK[:rows].clone()
        for first, second in ((1, 1), (1, 0), (0, 1)):
            outputs, grads = [], []
            for function in (compiled, run):
                outputs.append(function(z, *rest))
                loss, logp = outputs[-1]
                grads.append(torch.autograd.grad(first * loss.sum() + second * logp.sum(), z)[0])
            torch.testing.assert_close(*outputs)
            torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


@pytest.mark.parametrize("outside", OUTSIDES)
def test_functional_gradients_are_those_of_backward(outside: str) -> None:
    z, teacher, mix = logits(N, V).requires_grad_(), logits(N, V, seed=1), logits(N, seed=2)

    def objective(z: torch.Tensor) -> torch.Tensor:
        loss, logp = step(z, teacher, TOKENS, MASK, outside)
        return loss + (mix * logp).sum()

    objective(z).backward()
    assert torch.equal(torch.func.grad(objective)(z.detach()), z.grad)
    leaf = z.detach().requires_grad_()
    (mix * token_logprobs(leaf, TOKENS, mask=MASK)).sum().backward()
    alone = torch.func.grad(lambda x: (mix * token_logprobs(x, TOKENS, mask=MASK)).sum())
    assert torch.equal(alone(leaf.detach()), leaf.grad)


@pytest.mark.parametrize("outside", OUTSIDES)
def test_mapped_rows_are_those_of_a_loop(outside: str) -> None:
    z, teacher = logits(3, N, V), logits(3, N, V, seed=1)
    tokens = TOKENS.expand(3, N).roll(1, 0)

    def value(z: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        loss, logp = step(z, teacher, tokens, MASK, outside)
        return loss + logp.square().sum() + token_logprobs(z, tokens, mask=MASK).sum()

    mapped = torch.vmap(lambda *rows: step(*rows, MASK, outside))(z, teacher, tokens)
    alone = torch.vmap(lambda z, y: token_logprobs(z, y, mask=MASK))(z, tokens)
    grads = torch.vmap(torch.func.grad(value))(z, teacher, tokens)
    for i in range(3):
        for ours, wanted in zip(
            mapped, step(z[i], teacher[i], tokens[i], MASK, outside), strict=True
        ):
            assert torch.equal(ours[i], wanted)
        assert torch.equal(alone[i], token_logprobs(z[i], tokens[i], mask=MASK))
        torch.testing.assert_close(
            grads[i], torch.func.grad(value)(z[i], teacher[i], tokens[i]), rtol=1e-6, atol=1e-7
        )
