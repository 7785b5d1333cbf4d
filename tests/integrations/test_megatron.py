"""The adapter to Megatron-LM, without Megatron-LM: stand-ins of its modules, float64 as the judge.

Two gloo ranks share the vocabulary in the second half; each check there is a function that every
rank runs, and a test of its own.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cached_logits import READ_BACK, B, S, V, cached, exact, logits
from peer_checks import assert_agree, bound, graded
from ranks import as_rank, outcomes, run_ranks
from torch import Tensor, nn

from opd_kernels import VocabShard
from opd_kernels.integrations import _hooks, megatron

WORLD = 2
CACHED = "megatron.training.distillation.cached_logits_loss"
WHOLE: dict[str, Any] = {"vocab_shard": "whole"}


def mask_of(dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, S): zeros, ones and a fraction."""
    mask = (torch.arange(B * S).reshape(B, S) % 3 != 0).to(dtype)
    mask[0, 1] = 0.5
    return mask


def labels_of(vocab: int = V) -> Tensor:
    return torch.randint(vocab, (B, S), generator=torch.Generator().manual_seed(3))


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """(B, S) in float64, of logits (S, B, V)."""
    logp = student.double().log_softmax(-1)
    return -logp.gather(-1, labels.T[..., None])[..., 0].T


# The function that Megatron calls.


@pytest.mark.parametrize("absent_id", [-1, READ_BACK, 0])
@pytest.mark.parametrize("ghost", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_kl_div_is_float64s(dtype: torch.dtype, ghost: bool, absent_id: int) -> None:
    student, (logprobs, ids) = logits(3.0, 0, dtype), cached(absent_id=absent_id)
    weights = mask_of()

    found = graded(
        lambda x: (megatron.topk_kl_div(x, logprobs, ids, 1, 0, None, ghost) * weights).sum(),
        student,
    )
    wanted = graded(lambda x: (exact(x, logprobs, ids, ghost).T * weights).sum(), student.double())
    assert_agree(found, wanted, bound(student))


def test_losses_are_batch_first_and_contiguous() -> None:
    student, (logprobs, ids) = logits(3.0, 0, torch.float32), cached()
    before = student.clone()
    loss = megatron.topk_kl_div(student, logprobs, ids, 1, 0, None, True)
    assert loss.shape == (B, S)
    assert loss.is_contiguous()
    assert torch.equal(student, before)
    exactly = exact(student, logprobs, ids).T
    torch.testing.assert_close(loss.double(), exactly, rtol=0, atol=bound(student))


def test_rows_without_entries_have_loss_0() -> None:
    student, (logprobs, ids) = logits(3.0, 0, torch.float32), cached()
    logprobs[2], ids[2] = -1e3, READ_BACK
    loss, [gradient] = graded(
        lambda x: megatron.topk_kl_div(x, logprobs, ids, 1, 0, None, True).sum(), student
    )
    assert loss.isfinite()
    assert gradient[2].abs().max() <= 4 * bound(student)
    assert gradient[3].abs().max() > 0.01


# loss_func.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("sequence_first", [True, False])
def test_loss_func_is_the_weighted_sum(
    sequence_first: bool, alpha: float, dtype: torch.dtype
) -> None:
    student, (logprobs, ids), mask = logits(3.0, 0, dtype), cached(), mask_of()
    labels = labels_of().masked_fill(mask == 0, -100)
    reports: list[dict[str, Tensor]] = []

    def ours(x: Tensor) -> Tensor:
        tensors = (x, logprobs, ids)
        logits, values, at = (
            tensors if sequence_first else (tensor.transpose(0, 1) for tensor in tensors)
        )
        loss, tokens, report = megatron.loss_func(
            mask,
            logits,
            teacher_logprobs=values,
            teacher_ids=at,
            labels=labels,
            kd_loss_alpha=alpha,
            sequence_first=sequence_first,
            **WHOLE,
        )
        assert tokens.dtype == torch.int
        assert tokens == int(mask.sum())
        reports.append(report)
        return loss

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        lm = cross_entropy(x, labels.clamp(min=0))
        return (exact(x, logprobs, ids).T * mask).sum(), (lm * mask).sum()

    def wanted(x: Tensor) -> Tensor:
        distillation, lm = parts(x)
        return alpha * distillation + (1 - alpha) * lm

    found, error = graded(ours, student), bound(student)
    assert_agree(found, graded(wanted, student.double()), error)
    distillation, lm = parts(student.double())
    tokens = float(int(mask.sum()))
    total = alpha * distillation + (1 - alpha) * lm
    sums = {"logits distillation loss": distillation, "lm loss": lm, "total loss": total}
    assert reports[0].keys() == sums.keys()
    for name, value in sums.items():
        expected = torch.tensor([value, tokens], dtype=torch.float32)
        torch.testing.assert_close(reports[0][name], expected, rtol=1e-6, atol=error * S * B)


def test_masked_rows_are_not_read_and_the_schedule_may_divide_in_place() -> None:
    student, (logprobs, ids), mask = logits(3.0, 0, torch.float32), cached(), mask_of()
    dead = (mask == 0).T
    student[dead], logprobs[dead] = math.nan, math.nan

    def ours(x: Tensor) -> Tensor:
        teacher = {"teacher_logprobs": logprobs, "teacher_ids": ids}
        loss, tokens, _ = megatron.loss_func(mask, x, sequence_first=True, **teacher, **WHOLE)
        loss /= torch.clamp(tokens, min=1)
        loss /= 2  # micro-batches
        return loss

    def wanted(x: Tensor) -> Tensor:
        rows = exact(x, logprobs, ids).T * mask
        return rows.sum() / int(mask.sum()) / 2

    loss, [gradient] = graded(ours, student)
    clean, logprobs = student.nan_to_num(), logprobs.nan_to_num()
    expected = graded(wanted, clean.double())
    assert_agree((loss, [gradient]), expected, bound(clean), share=1 / int(mask.sum()) / 2)
    assert (gradient[dead] == 0).all()


def test_a_micro_batch_without_tokens_has_loss_0_and_gradient_0() -> None:
    student, (logprobs, ids) = logits(3.0, 0, torch.bfloat16), cached()
    teacher = {"teacher_logprobs": logprobs, "teacher_ids": ids}
    loss, [gradient] = graded(
        lambda x: megatron.loss_func(torch.zeros(B, S), x, sequence_first=True, **teacher, **WHOLE)[
            0
        ],
        student,
    )
    assert loss == 0
    assert (gradient == 0).all()


def test_strided_slices_of_padded_logits() -> None:
    """Part of a longer sequence, and columns beyond the true vocabulary."""
    logprobs, ids = cached()
    wide = torch.randn(2 * S, B, V + 14, generator=torch.Generator().manual_seed(5))
    wide[..., V:] = 30.0  # would win every softmax
    teacher = {"teacher_logprobs": logprobs, "teacher_ids": ids}

    def ours(x: Tensor) -> Tensor:
        return megatron.loss_func(
            mask_of(), x[::2], vocab_size=V, sequence_first=True, **teacher, **WHOLE
        )[0]

    def wanted(x: Tensor) -> Tensor:
        return (exact(x[::2, :, :V], logprobs, ids).T * mask_of()).sum()

    found = graded(ours, wide)
    assert_agree(found, graded(wanted, wide.double()), bound(wide))
    assert (found[1][0][..., V:] == 0).all()


def test_context_parallel_parts_and_packed_rows_sum_to_the_whole() -> None:
    """The ranks of a context-parallel group hold the ends and the middle of each sequence."""
    mask, labels = mask_of(), labels_of()
    x, logprobs, ids = (
        tensor.transpose(0, 1) for tensor in (logits(3.0, 0, torch.float32), *cached())
    )

    def sums(of: Callable[[Tensor], Tensor]) -> Tensor:
        """(loss, tokens) of some rows, or of all in another shape."""
        loss, tokens, _ = megatron.loss_func(
            of(mask),
            of(x),
            teacher_logprobs=of(logprobs),
            teacher_ids=of(ids),
            labels=of(labels),
            kd_loss_alpha=0.5,
            **WHOLE,
        )
        return torch.stack([loss.double(), tokens.double()])

    whole = sums(lambda tensor: tensor)
    ends, middle = torch.tensor([0, 1, 5, 6]), torch.tensor([2, 3, 4])
    parts = sums(lambda tensor: tensor[:, ends]) + sums(lambda tensor: tensor[:, middle])
    packed = sums(lambda tensor: tensor.flatten(0, 1)[None])
    for found in (parts, packed):
        torch.testing.assert_close(found, whole, rtol=1e-6, atol=bound(x) * S * B)


def test_entries_of_minus_infinity_are_absent() -> None:
    student, (logprobs, ids) = logits(3.0, 0, torch.float32), cached()
    infinite = logprobs.masked_fill(logprobs == -1e3, -math.inf)
    found, wanted = (
        megatron.topk_kl_div(student, x, ids, 1, 0, None, True) for x in (infinite, logprobs)
    )
    assert torch.equal(found, wanted)


def test_the_gradient_leads_back_a_student_that_left_the_tail() -> None:
    """log(1 - P) is -30 here, far beyond what 1 - P in float32 shows."""
    student, (logprobs, ids) = torch.zeros(S, B, V), cached()
    student.scatter_(-1, ids[..., :1], 35.0)
    found = graded(
        lambda x: megatron.topk_kl_div(x, logprobs, ids, 1, 0, None, True).sum(), student
    )
    wanted = graded(lambda x: exact(x, logprobs, ids).sum(), student.double())
    assert_agree(found, wanted, bound(student))


class Model(nn.Module):
    """Only its mode is read."""


def test_in_evaluation_the_loss_is_the_cross_entropy() -> None:
    student, mask = logits(3.0, 0, torch.float32), mask_of()
    model = Model().eval()
    loss, tokens, report = megatron.loss_func(
        mask,
        student,
        model,
        labels=labels_of(),
        sequence_first=True,
        **WHOLE,
    )
    expected = (cross_entropy(student, labels_of()) * mask).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=bound(student) * S * B)
    assert list(report) == ["lm loss"]
    torch.testing.assert_close(report["lm loss"], torch.stack([loss, tokens.float()]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kd_loss_alpha": 1.5}, ValueError, "allowed is 0 to 1"),
        ({"kd_loss_alpha": 0.5}, ValueError, "pass labels="),
        ({"model": Model().eval()}, ValueError, "pass labels="),
        ({"teacher_ids": None}, ValueError, "pass teacher_logprobs= and teacher_ids="),
        ({"vocab_shard": "all"}, ValueError, 'allowed are a VocabShard, "whole" and None'),
        ({"vocab_shard": None}, ImportError, "install megatron-core, or pass vocab_shard="),
    ],
)
def test_what_cannot_be_raises(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "megatron", None)
    logprobs, ids = cached()
    teacher = {"teacher_logprobs": logprobs, "teacher_ids": ids, "sequence_first": True}
    with pytest.raises(error, match=message):
        megatron.loss_func(
            mask_of(), logits(3.0, 0, torch.float32), **{**teacher, **WHOLE, **options}
        )


# install, on a stand-in of Megatron's module.


class Capture:
    """Keeps the logits of the last forward, as Megatron's class does."""

    def __init__(self) -> None:
        self._logits: Tensor | None = None

    def _capture_logits(self, module: nn.Module, input: Any, output: Any) -> None:
        if module.training:
            self._logits = output


def stand_in() -> Any:
    module: Any = ModuleType(CACHED)

    def topk_kl_div(
        student_logits: Tensor,
        teacher_topk_logprobs: Tensor,
        teacher_topk_indices: Tensor,
        tp_size: int,
        tp_rank: int,
        tp_group: Any,
        add_ghost_token: bool = False,
    ) -> Tensor:
        raise AssertionError("was to be replaced")

    module.topk_kl_div = topk_kl_div
    module.StudentLogitsCapture = type("StudentLogitsCapture", (Capture,), dict(vars(Capture)))
    return module


@pytest.fixture
def cached_loss(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Megatron's module, in place of what is installed."""
    module = stand_in()
    parts = CACHED.split(".")
    for depth in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(parts[depth - 1]))
    monkeypatch.setitem(sys.modules, CACHED, module)
    return module


def test_install_replaces_the_loss_once(cached_loss: Any, caplog: Any) -> None:
    _hooks.announce.cache_clear()
    megatron.install()
    assert cached_loss.topk_kl_div is megatron.topk_kl_div
    hook = cached_loss.StudentLogitsCapture._capture_logits
    megatron.install()
    assert cached_loss.StudentLogitsCapture._capture_logits is hook
    student, (logprobs, ids) = logits(3.0, 0, torch.float32), cached()
    with caplog.at_level(logging.WARNING, "opd_kernels"):
        for _ in range(2):
            cached_loss.topk_kl_div(student, logprobs, ids, 1, 0, None, add_ghost_token=True)
    assert caplog.messages == ["Megatron-LM: the loss is opd_kernels' topk_kl_div, ghost token"]


@pytest.mark.parametrize("what", ["topk_kl_div", "StudentLogitsCapture"])
def test_install_refuses_another_signature(cached_loss: Any, what: str) -> None:
    if what == "topk_kl_div":
        cached_loss.topk_kl_div = lambda logits, temperature: logits
    else:
        cached_loss.StudentLogitsCapture._capture_logits = lambda self, output: None
    before = cached_loss.topk_kl_div
    with pytest.raises(ImportError, match="this adapter was tested with Megatron-LM's main"):
        megatron.install()
    assert cached_loss.topk_kl_div is before


@pytest.mark.parametrize(
    ("dtype", "fused", "copies"),
    [
        (torch.float32, None, True),
        (torch.bfloat16, None, False),
        (torch.bfloat16, "native", False),
        (torch.bfloat16, "te", True),
    ],
)
def test_captured_logits_survive_what_overwrites_them(
    cached_loss: Any, dtype: torch.dtype, fused: str | None, copies: bool
) -> None:
    megatron.install()
    capture, module = cached_loss.StudentLogitsCapture(), Model()
    module.config = SimpleNamespace(
        cross_entropy_loss_fusion=fused is not None, cross_entropy_fusion_impl=fused or "te"
    )
    weight = torch.randn(4, V, requires_grad=True)
    output = torch.ones(S, B, 4, dtype=dtype) @ weight.to(dtype)
    before = output.detach().clone()
    capture._capture_logits(module, (), output)
    assert (capture._logits is output) is not copies
    with torch.no_grad():
        output.exp_()
    assert torch.equal(capture._logits, before) is copies
    capture._logits.sum().backward()  # a copy is not cut off from the model
    assert weight.grad is not None
    kept = capture._logits
    capture._capture_logits(module.eval(), (), None)  # not captured: nothing to copy
    assert capture._logits is kept


# Two ranks that share the vocabulary.


def columns(rank: int, width: int) -> slice:
    return slice(rank * width, (rank + 1) * width)


def check_parts(rank: int, dtype: torch.dtype, ghost: bool) -> None:
    """Megatron sums the parts of all ranks, and each calls backward with an upstream of 1."""
    width, mask = V // WORLD, mask_of()
    student, (logprobs, ids) = logits(3.0, 0, dtype), cached()
    part = student[..., columns(rank, width)].clone().requires_grad_()
    losses = megatron.topk_kl_div(part, logprobs, ids, WORLD, rank, dist.group.WORLD, ghost)
    loss = (losses.view(-1).float() * mask.view(-1)).sum()
    dist.all_reduce(loss)
    (gradient,) = torch.autograd.grad(loss, part)
    wanted = graded(lambda x: (exact(x, logprobs, ids, ghost).T * mask).sum(), student.double())
    mine = wanted[1][0][..., columns(rank, width)]
    assert_agree((loss.detach(), [gradient]), (wanted[0], [mine]), bound(student))


def check_parallel_state(rank: int) -> None:
    """``loss_func`` asks Megatron's state; the padded vocabulary is cut at its true size."""
    padded, width = V + 14, (V + 14) // WORLD
    state = SimpleNamespace(
        get_tensor_model_parallel_world_size=lambda: WORLD,
        get_tensor_model_parallel_rank=lambda: rank,
        get_tensor_model_parallel_group=lambda: dist.group.WORLD,
    )
    names = ("megatron", "megatron.core", "megatron.core.parallel_state")
    sys.modules |= dict(zip(names, (ModuleType(""), ModuleType(""), state), strict=True))
    for vocab_size in (V, None):
        check_mixed(columns(rank, width), padded, {"vocab_size": vocab_size})


def check_uneven(rank: int) -> None:
    """An explicit shard: 13 columns and the rest; then all, and an empty rank."""
    for cut in (13, V):
        mine = slice(0, cut) if rank == 0 else slice(cut, V)
        shard = VocabShard(mine.start, V, dist.group.WORLD)
        check_mixed(mine, V, {"vocab_shard": shard})


def check_mixed(mine: slice, padded: int, options: dict[str, Any]) -> None:
    """Distillation and cross-entropy of all columns, from the columns ``mine``."""
    mask, labels, alpha = mask_of(), labels_of(), 0.25
    student, (logprobs, ids) = logits(3.0, 0, torch.float32, padded), cached()
    size = options.get("vocab_size") or (V if "vocab_shard" in options else padded)
    teacher = {"teacher_logprobs": logprobs, "teacher_ids": ids, "labels": labels}

    def ours(x: Tensor) -> Tensor:
        return megatron.loss_func(
            mask, x, sequence_first=True, kd_loss_alpha=alpha, **teacher, **options
        )[0]

    def wanted(x: Tensor) -> Tensor:
        real = x[..., :size]
        lm = cross_entropy(real, labels)
        return ((alpha * exact(real, logprobs, ids).T + (1 - alpha) * lm) * mask).sum()

    found = graded(ours, student[..., mine])
    loss, [gradient] = graded(wanted, student.double())
    assert_agree(found, (loss, [gradient[..., mine]]), bound(student))


CHECKS: dict[str, Any] = {
    "parts in float32": partial(check_parts, dtype=torch.float32, ghost=True),
    "parts in bfloat16": partial(check_parts, dtype=torch.bfloat16, ghost=True),
    "parts without a ghost": partial(check_parts, dtype=torch.float32, ghost=False),
    "parallel state": check_parallel_state,
    "uneven shards": check_uneven,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(__file__, tmp_path_factory.mktemp("megatron"), WORLD)


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks_loss_and_gradient_are_those_of_one(
    name: str, ranks: list[dict[str, Any]]
) -> None:
    for found in ranks:
        assert found[name] == "", found[name]


if __name__ == "__main__":
    as_rank(partial(outcomes, CHECKS), WORLD)
