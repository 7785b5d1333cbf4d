"""ModelOpt's ``TopKLogitsKLLoss`` beside ``topk_divergence``: both models' logits (S, B, V/tp).

ModelOpt has no adapter: ``TopKLogitsLoss`` here is what goes into ``DistillationConfig.criterion``.
"""

from __future__ import annotations

import inspect
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from modelopt.torch.distill.plugins.megatron import DistillationConfig, TopKLogitsKLLoss
from peer_checks import assert_agree, bound, graded
from ranks import as_rank, outcomes, run_ranks
from torch import Tensor, nn

from opd_kernels import VocabShard, topk_divergence

WORLD, S, B, V, K = 2, 7, 3, 50, 12
IMPORTING = 600.0  # seconds: a minute where others compute
Flags = tuple[Tensor, bool, bool]


class TopKLogitsLoss(nn.Module):
    """ModelOpt's interface. Its balancer finds the loss by "Logits" in the class's name."""

    def __init__(self, temperature: float = 1.0, reverse: bool = False, top_k: int = 1024) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "k": top_k,
            "divergence": "reverse_kl" if reverse else "forward_kl",
            "temperature": temperature,
            "reduction": "none",
        }

    def forward(self, predictions: Any, targets: Any) -> Flags:
        """((B, S) losses, whether to sum them over ranks, whether the sequence is split)."""
        if isinstance(predictions, tuple):  # a column-parallel layer returns its bias, too
            predictions, targets = predictions[0], targets[0]
        shard, width = None, predictions.shape[-1]
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        if ranks > 1:
            start = parallel_state.get_tensor_model_parallel_rank() * width
            group = parallel_state.get_tensor_model_parallel_group()
            shard = VocabShard(start, ranks * width, group)
        loss = topk_divergence(predictions, targets, vocab_shard=shard, **self.options)
        return loss.transpose(0, 1).contiguous(), False, False


def logits(scale: float, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(S, B, V, generator=generator)).to(dtype)


def mask_of() -> Tensor:
    return (torch.arange(B * S).reshape(B, S) % 3 != 0).float()


def exact(student: Tensor, teacher: Tensor, temperature: float, reverse: bool) -> Tensor:
    """(B, S) in float64: both renormalised on the teacher's K best."""
    values, ids = teacher.double().topk(K)
    logq = (values / temperature).log_softmax(-1)
    logp = (student.double().gather(-1, ids) / temperature).log_softmax(-1)
    target, other = (logp, logq) if reverse else (logq, logp)
    return (target.exp() * (target - other)).sum(-1).T


def reduced(flags: Flags) -> Tensor:
    """As Megatron-LM's loss_func for ModelOpt does; every rank calls backward on it."""
    losses, summed, sequence_parallel = flags
    assert not sequence_parallel
    loss = (losses.view(-1).float() * mask_of().view(-1)).sum()
    if summed:
        dist.all_reduce(loss)
    return loss


def theirs(ranks: int, temperature: float, reverse: bool) -> Any:
    return TopKLogitsKLLoss(
        SimpleNamespace(tensor_model_parallel_size=ranks), temperature, reverse, K
    )


def check_agreement(
    rank: int, dtype: torch.dtype, temperature: float, reverse: bool, ranks: int = WORLD
) -> None:
    """Ours is float64's; ModelOpt's loss is, and its gradient by a factor of ``ranks`` too large.

    The ratio of the two gradients is exactly ``ranks`` wherever a row counts.
    """
    student, teacher = logits(3.0, 0, dtype), logits(1.5, 1, torch.float32)
    width = V // ranks
    columns = slice(rank * width, (rank + 1) * width)
    part, targets = student[..., columns], teacher[..., columns]
    loss, [gradient] = graded(
        lambda x: (exact(x, teacher, temperature, reverse) * mask_of()).sum(), student.double()
    )
    error = bound(student, teacher, temperature=temperature)
    ours = graded(lambda x: reduced(TopKLogitsLoss(temperature, reverse, K)(x, targets)), part)
    assert_agree(ours, (loss, [gradient[..., columns]]), error)

    peer = theirs(ranks, temperature, reverse)
    found, [too_large] = graded(lambda x: reduced(peer(x, targets)), part)
    assert_agree((found, [too_large / ranks]), (loss, [gradient[..., columns]]), error)


CHECKS: dict[str, Any] = {
    "fault: at TP 2 the gradient is 2.000 times too large, forward": partial(
        check_agreement, dtype=torch.float32, temperature=1.0, reverse=False
    ),
    "fault: at TP 2 the gradient is 2.000 times too large, reverse": partial(
        check_agreement, dtype=torch.bfloat16, temperature=2.0, reverse=True
    ),
}


def on_rank(rank: int) -> dict[str, str]:
    """What went wrong in each check."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=WORLD)
    return outcomes(CHECKS, rank)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_ranks(__file__, tmp_path_factory.mktemp("modelopt"), WORLD, IMPORTING)


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name: str, ranks: list[dict[str, str]]) -> None:
    for found in ranks:
        assert found[name] == "", found[name]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_one_rank_ours_is_modelopts(
    dtype: torch.dtype, temperature: float, reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 1)
    check_agreement(0, dtype, temperature, reverse, ranks=1)


def test_the_interface_of_a_criterion() -> None:
    assert list(inspect.signature(TopKLogitsKLLoss.forward).parameters) == [
        "self",
        "predictions",
        "targets",
    ]
    assert "criterion" in inspect.signature(DistillationConfig).parameters
    criterion = {("output_layer", "output_layer"): TopKLogitsLoss()}
    assert DistillationConfig(criterion=criterion).criterion is criterion


if __name__ == "__main__":
    as_rank(on_rank, WORLD)
