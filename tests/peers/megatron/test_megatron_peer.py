"""The adapter on megatron-core: its groups, schedule and cross-entropy, on two gloo ranks.

megatron-core has no loss on cached log-probs; ``as_megatron`` of tests/helpers computes as
Megatron-LM's main branch does. Where that is right, ours agrees with it; where it is not, a test
is named for the fault, and ours agrees with float64.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cached_logits import READ_BACK, B, K, S, V, as_megatron, cached, exact, logits
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from peer_checks import assert_agree, bound, graded
from ranks import as_rank, outcomes, run_ranks
from torch import Tensor, nn

from opd_kernels.integrations import megatron

WORLD = 2
WIDTH = V // WORLD
IMPORTING = 600.0  # seconds: a minute where others compute


def mask_of() -> Tensor:
    return (torch.arange(B * S).reshape(B, S) % 3 != 0).float()


def labels_of() -> Tensor:
    return torch.randint(V, (B, S), generator=torch.Generator().manual_seed(3))


def mine(tensor: Tensor, rank: int) -> Tensor:
    return tensor[..., rank * WIDTH : (rank + 1) * WIDTH]


def cross_entropy(student: Tensor) -> Tensor:
    """(B, S) in float64."""
    logp = student.double().log_softmax(-1)
    return -logp.gather(-1, labels_of().T[..., None])[..., 0].T


def error_of_one_minus_p(student: Tensor, ids: Tensor) -> float:
    """What Megatron's 1 - P, a float32 near 0, adds to a row's error: its rounding over 1 - P."""
    p = student.double().softmax(-1)
    on_support = p.gather(-1, ids.clamp(max=V - 1)).masked_fill(ids >= V, 0.0).sum(-1)
    return (K + 2) * torch.finfo(torch.float32).eps / (1 - on_support).min().item()


def in_megatron(losses: Any, student: Tensor, rank: int) -> tuple[Tensor, list[Tensor]]:
    """A loss as Megatron makes it of all ranks' parts, and its gradient on this rank's columns."""
    part = mine(student, rank).clone().requires_grad_()
    # Megatron's logits are no leaf; its arithmetic overwrites those in float32.
    rows = losses(part * 1.0)
    loss = (rows.view(-1).float() * mask_of().view(-1)).sum()
    dist.all_reduce(loss, group=parallel_state.get_tensor_model_parallel_group())
    return loss.detach(), list(torch.autograd.grad(loss, part))


def whole(losses: Any, student: Tensor, rank: int) -> tuple[Tensor, list[Tensor]]:
    """The same of (B, S) losses of all columns, in float64."""
    loss, [gradient] = graded(lambda x: (losses(x) * mask_of()).sum(), student.double())
    return loss, [mine(gradient, rank)]


def both(rank: int, student: Tensor, logprobs: Tensor, ids: Tensor, ghost: bool = True) -> Any:
    """Loss and gradient of Megatron, of ours and of float64."""
    split = (WORLD, rank, parallel_state.get_tensor_model_parallel_group(), ghost)
    theirs = in_megatron(lambda x: as_megatron(x, logprobs, ids, *split), student, rank)
    ours = in_megatron(lambda x: megatron.topk_kl_div(x, logprobs, ids, *split), student, rank)
    return theirs, ours, whole(lambda x: exact(x, logprobs, ids, ghost).T, student, rank)


# Where Megatron is right.


def check_ours_is_megatrons(rank: int, dtype: torch.dtype, ghost: bool) -> None:
    student, (logprobs, ids) = logits(3.0, 0, dtype), cached()
    theirs, ours, wanted = both(rank, student, logprobs, ids, ghost)
    assert_agree(ours, wanted, bound(student))
    assert_agree(theirs, wanted, bound(student) + error_of_one_minus_p(student, ids))


def check_schedule(rank: int) -> None:
    """The loss that Megatron's own schedule makes of ``loss_func``, with its groups."""
    student, (logprobs, ids), mask = logits(3.0, 0, torch.bfloat16), cached(), mask_of()
    model, reports, config = nn.Module(), [], SimpleNamespace(timers=None)
    config.calculate_per_token_loss = False
    teacher = {"teacher_logprobs": logprobs, "teacher_ids": ids, "labels": labels_of()}

    def ours(x: Tensor) -> Tensor:
        loss_func = partial(
            megatron.loss_func,
            mask,
            model=model,
            sequence_first=True,
            kd_loss_alpha=0.25,
            **teacher,
        )
        loss, tokens = schedules.forward_step_calc_loss(
            model, x, loss_func, config, None, False, 2, reports
        )
        assert tokens == mask.sum()
        return loss

    def wanted(x: Tensor) -> Tensor:
        rows = 0.25 * exact(x, logprobs, ids).T + 0.75 * cross_entropy(x)
        return (rows * mask).sum() / mask.sum() / 2

    loss, [gradient] = graded(wanted, student.double())
    found = graded(ours, mine(student, rank))
    share = 1 / mask.sum().item() / 2
    assert_agree(found, (loss, [mine(gradient, rank)]), bound(student), share)
    assert list(reports[0]) == ["lm loss", "logits distillation loss", "total loss"]


def check_cross_entropy(rank: int) -> None:
    """Ours at an alpha of 0 is Megatron's ``vocab_parallel_cross_entropy``."""
    student, (logprobs, ids), mask = logits(3.0, 0, torch.bfloat16), cached(), mask_of()
    teacher = {"teacher_logprobs": logprobs, "teacher_ids": ids, "labels": labels_of()}

    def theirs(x: Tensor) -> Tensor:
        losses = tensor_parallel.vocab_parallel_cross_entropy(x, labels_of().T.contiguous())
        return (losses.T * mask).sum()

    def ours(x: Tensor) -> Tensor:
        return megatron.loss_func(mask, x, sequence_first=True, kd_loss_alpha=0.0, **teacher)[0]

    wanted = whole(cross_entropy, student, rank)
    for loss in (theirs, ours):
        assert_agree(graded(loss, mine(student, rank)), wanted, bound(student))


def check_model(rank: int) -> None:
    """A ``GPTModel`` without labels, its vocabulary padded to 64: its logits get the gradient."""
    padded, mask = 64, mask_of()
    logprobs, ids = (x.transpose(0, 1) for x in cached())
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        tensor_model_parallel_size=WORLD,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    layers = get_gpt_layer_local_spec(normalization="LayerNorm")
    model = GPTModel(config, layers, padded, S, position_embedding_type="learned_absolute")
    positions = torch.arange(S).expand(B, S)
    causal = torch.ones(1, 1, S, S, dtype=torch.bool).triu(1)
    output = model(labels_of(), positions, causal)
    output.retain_grad()
    teacher = {"teacher_logprobs": logprobs, "teacher_ids": ids, "vocab_size": V}
    loss_func = partial(megatron.loss_func, mask, model=model, **teacher)
    config.calculate_per_token_loss = True
    loss, tokens = schedules.forward_step_calc_loss(
        model, output, loss_func, config, None, False, 2, []
    )
    loss.backward()

    parts = [torch.empty_like(output) for _ in range(WORLD)]
    dist.all_gather(parts, output.detach())
    student = torch.cat(parts, -1)
    wanted, [gradient] = graded(
        lambda x: (exact(x[..., :V], logprobs, ids) * mask).sum(), student.double()
    )
    columns = gradient[..., rank * padded // WORLD : (rank + 1) * padded // WORLD]
    assert output.grad is not None
    assert_agree((loss.detach(), [output.grad]), (wanted, [columns]), bound(student))
    assert tokens == mask.sum()
    assert all(parameter.grad is not None for parameter in model.parameters())


# Where it is not.


def check_overwritten_logits(rank: int) -> None:
    """Megatron's cross-entropy leaves a softmax in float32 logits, and distilling it then fails."""
    student, (logprobs, ids) = logits(3.0, 0, torch.float32), cached()
    split = (WORLD, rank, parallel_state.get_tensor_model_parallel_group(), True)

    def after_cross_entropy(copies: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(the weights' stand-in, the captured logits, the cross-entropy)"""
        leaf = mine(student, rank).clone().requires_grad_()
        output = leaf * 1.0
        captured = output.clone() if copies else output  # a copy is what ``install`` captures
        lm = tensor_parallel.vocab_parallel_cross_entropy(output, labels_of().T.contiguous()).T
        return leaf, captured, lm

    leaf, captured, lm = after_cross_entropy(copies=False)
    softmax = mine(student.double().softmax(-1), rank)
    torch.testing.assert_close(captured.double(), softmax, rtol=0, atol=bound(student))
    theirs = lm + as_megatron(captured, logprobs, ids, *split)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(theirs.sum(), leaf)
    leaf, captured, lm = after_cross_entropy(copies=True)
    ours = 0.75 * lm + 0.25 * megatron.topk_kl_div(captured, logprobs, ids, *split)
    (gradient,) = torch.autograd.grad((ours * mask_of()).sum(), leaf)
    _, [expected] = whole(
        lambda x: 0.75 * cross_entropy(x) + 0.25 * exact(x, logprobs, ids).T, student, rank
    )
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=4 * bound(student))


def check_minus_infinity(rank: int) -> None:
    """An entry of -inf is 0 (-inf - x) in Megatron's sum."""
    student, (logprobs, ids) = logits(3.0, 0, torch.float32), cached()
    infinite = logprobs.masked_fill(logprobs == -1e3, -math.inf)
    ids = ids.where(ids < V, torch.full_like(ids, V - 1))
    split = (WORLD, rank, parallel_state.get_tensor_model_parallel_group(), True)
    part = mine(student, rank).clone()
    theirs = as_megatron(part.clone(), infinite, ids, *split)
    dist.all_reduce(theirs)
    ours = in_megatron(lambda x: megatron.topk_kl_div(x, infinite, ids, *split), student, rank)
    assert theirs.isnan().any()
    assert_agree(ours, whole(lambda x: exact(x, infinite, ids).T, student, rank), bound(student))


def check_padding_of_minus_infinity(rank: int) -> None:
    """An absent entry is looked up at the last column, and 0 (-1000 + inf) is NaN there."""
    student, (logprobs, ids) = logits(3.0, 0, torch.float32), cached()
    student[..., -1] = -math.inf
    here = (ids < V - 1) | (ids == READ_BACK)
    logprobs = logprobs.masked_fill(~here, -1e3)
    split = (WORLD, rank, parallel_state.get_tensor_model_parallel_group(), True)
    theirs = as_megatron(mine(student, rank).clone(), logprobs, ids, *split)
    dist.all_reduce(theirs)
    ours = in_megatron(lambda x: megatron.topk_kl_div(x, logprobs, ids, *split), student, rank)
    wanted = whole(lambda x: exact(x[..., : V - 1], logprobs, ids).T, student, rank)
    assert theirs.isnan().any()
    assert_agree(ours, wanted, bound(student))


def check_tail_that_the_student_left(rank: int) -> None:
    """1 - P is 0 in float32: Megatron clamps it, and no gradient leads the student back."""
    logprobs, ids = cached()
    student = torch.zeros(S, B, V)
    student.scatter_(-1, ids[..., :1], 20.0)
    theirs, ours, wanted = both(rank, student, logprobs, ids)
    outside = torch.ones(S, B, V, dtype=torch.bool).scatter_(-1, ids.clamp(max=V - 1), False)
    chosen = mine(outside & (mask_of().T[..., None] > 0), rank)
    assert (wanted[1][0][chosen] < -1e-3).all()
    assert (theirs[1][0][chosen].abs() < 1e-6).all()
    assert_agree(ours, wanted, bound(student))


CHECKS: dict[str, Any] = {
    "ours is Megatron's in float32": partial(
        check_ours_is_megatrons, dtype=torch.float32, ghost=True
    ),
    "ours is Megatron's in bfloat16": partial(
        check_ours_is_megatrons, dtype=torch.bfloat16, ghost=True
    ),
    "ours is Megatron's without a ghost": partial(
        check_ours_is_megatrons, dtype=torch.float32, ghost=False
    ),
    "loss_func in Megatron's schedule": check_schedule,
    "loss_func on a GPTModel": check_model,
    "alpha 0 is Megatron's cross-entropy": check_cross_entropy,
    "fault: float32 logits are overwritten": check_overwritten_logits,
    "fault: an entry of -inf is NaN": check_minus_infinity,
    "fault: padding columns of -inf are NaN": check_padding_of_minus_infinity,
    "fault: no gradient to a tail that the student left": check_tail_that_the_student_left,
}


def on_rank(rank: int) -> dict[str, str]:
    """What went wrong in each check."""
    # Megatron's layers ask CUDA for a device and for the random state of dropout, which is off.
    torch.cuda.current_device = lambda: "cpu"
    tensor_parallel.random.CudaRNGStatesTracker.fork = lambda *name: contextlib.nullcontext()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=WORLD)
    return outcomes(CHECKS, rank)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_ranks(__file__, tmp_path_factory.mktemp("megatron"), WORLD, IMPORTING)


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name: str, ranks: list[dict[str, str]]) -> None:
    for found in ranks:
        assert found[name] == "", found[name]


def test_the_conventions_that_the_adapter_is_written_for() -> None:
    schedule = list(inspect.signature(schedules.forward_step_calc_loss).parameters)
    assert schedule[:3] == ["model", "output_tensor", "loss_func"]
    assert inspect.signature(GPTModel.forward).parameters["labels"].default is None
    assert "fp32_output" in inspect.signature(Float16Module.forward).parameters
    for name in ("world_size", "rank", "group"):
        assert callable(getattr(parallel_state, f"get_tensor_model_parallel_{name}"))


if __name__ == "__main__":
    as_rank(on_rank, WORLD)
