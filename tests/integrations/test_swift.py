"""``integrations.swift`` against a stand-in of ms-swift's calling convention and float64."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peer_checks import assert_agree, bound, graded
from torch import Tensor

from opd_kernels.integrations import swift

B, T, V, K = 3, 7, 50, 6
IGNORED = -100


@dataclass
class TeacherOutput:
    """As ms-swift has it."""

    full_logits: Tensor | None = None
    topk_logprobs: Tensor | None = None
    topk_indices: Tensor | None = None
    labels: Tensor | None = None

    @property
    def is_topk_mode(self) -> bool:
        return self.topk_logprobs is not None and self.topk_indices is not None

    def to_topk(self, k: int, topk_fn: Any = None) -> TeacherOutput:
        values, ids = topk_fn(self.full_logits, k)
        return TeacherOutput(None, values, ids, self.labels)


def default_gather(logits: Tensor, indices: Tensor) -> Tensor:
    return logits.gather(-1, indices)


def tp_gather_topk(logits: Tensor, indices: Tensor) -> Tensor:
    raise AssertionError("the adapter reads shards itself")


default_gather.__module__ = swift.DEFINED
tp_gather_topk.__module__ = "swift.megatron.trainers.gkd_utils"


def own_gkd_loss(
    student_logits: Tensor,
    teacher_output: TeacherOutput,
    labels: Tensor,
    beta: float,
    temperature: float,
    gather_fn: Callable[..., Any] = default_gather,
    log_softmax_fn: Callable[..., Any] = torch.log_softmax,
    kl_div_fn: Callable[..., Any] | None = None,
    chunk_size: int = 512,
) -> Any:
    return (gather_fn, log_softmax_fn, chunk_size), int((labels != IGNORED).sum())


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of ms-swift that defines its loss; no other of its modules is loaded."""
    module = ModuleType(swift.DEFINED)
    module.gkd_loss = own_gkd_loss
    module.TeacherOutput = type("TeacherOutput", (TeacherOutput,), {})
    monkeypatch.setitem(sys.modules, swift.DEFINED, module)
    caches = (swift._own, swift._announce_own, swift.announce)
    for each in caches:
        each.cache_clear()
    yield module
    for each in caches:
        each.cache_clear()


def logits(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, V, generator=generator)).to(dtype)


def some_labels() -> Tensor:
    """Shifted: a prompt of other length in each row, and the last position."""
    labels = torch.arange(B * T).reshape(B, T) % V
    return labels.masked_fill(
        (torch.arange(T) < torch.tensor([[2], [0], [4]])) | (torch.arange(T) == T - 1), IGNORED
    )


def served() -> TeacherOutput:
    """Entries from a server: a row without any, a row with one, ids beyond the vocabulary."""
    logprobs, ids = logits(1, B, T).log_softmax(-1).topk(K)
    logprobs[0, 3], ids[0, 3] = -math.inf, 0
    logprobs[1, 2, 1:] = -math.inf
    logprobs[1, 3, ::2] = -math.inf
    ids[1, 4, 2] = V + 5
    return TeacherOutput(None, logprobs, ids)


def restated(beta: float, temperature: float, teacher: TeacherOutput, labels: Tensor) -> Any:
    """ms-swift's formula on the rows that it keeps, without what is absent."""
    theirs = labels if teacher.labels is None else teacher.labels
    logq, ids = teacher.topk_logprobs[theirs != IGNORED], teacher.topk_indices[theirs != IGNORED]
    covered = ~logq.isinf().all(-1)

    def loss(student: Tensor) -> Tensor:
        a = student[labels != IGNORED]
        total = student.new_zeros(())
        for row in covered.nonzero().flatten().tolist():
            there = (logq[row] > -math.inf) & (ids[row] < student.shape[-1])
            a_row = (a[row, ids[row, there]] / temperature).log_softmax(-1)
            b_row = (logq[row, there].double() / temperature).log_softmax(-1)
            m = torch.log(beta * b_row.exp() + (1 - beta) * a_row.exp())
            forward = (b_row.exp() * (b_row - (m if 0 < beta < 1 else a_row))).sum()
            reverse = (a_row.exp() * (a_row - (m if 0 < beta < 1 else b_row))).sum()
            weight = beta if 0 < beta < 1 else 1 - beta
            total = total + weight * forward + (1 - weight) * reverse
        return total

    return loss, int(covered.sum())


def agrees(student: Tensor, teacher: TeacherOutput, labels: Tensor, beta: float, t: float) -> None:
    """The adapter's sum, gradient and count are those of the formula in float64."""
    exact, count = restated(beta, t, teacher, labels)
    found = graded(
        lambda x: swift.gkd_loss(x[:, :-1], teacher, labels, beta, t)[0],
        torch.cat([student, student[:, :1]], 1),
    )
    expected = graded(lambda x: exact(x[:, :-1]), torch.cat([student, student[:, :1]], 1).double())
    assert_agree(found, expected, bound(student, teacher.topk_logprobs, temperature=t))
    assert expected[0] > 0
    counted = swift.gkd_loss(student, teacher, labels, beta, t)[1]
    assert counted.dtype == torch.int64
    assert counted == count > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("beta", [0, 0.25, 0.5, 1.0])
def test_sum_gradient_and_count_are_the_formulas(
    beta: float, temperature: float, dtype: torch.dtype
) -> None:
    agrees(logits(0, B, T, dtype=dtype), served(), some_labels(), beta, temperature)


def test_one_packed_row_with_labels_of_its_own() -> None:
    labels = some_labels().reshape(1, B * T)
    teacher = served()
    packed = TeacherOutput(
        None, teacher.topk_logprobs.flatten(0, 1)[None], teacher.topk_indices.flatten(0, 1)[None]
    )
    packed.labels = labels.clone()
    agrees(logits(0, 1, B * T), packed, labels, 0.5, 1.0)


def test_a_teacher_with_another_prompt_scores_the_same_response() -> None:
    """Self-distillation: as many rows count on both sides, at other places, in order."""
    labels = some_labels()
    longer = torch.full((B, T + 4), IGNORED)
    counts = (labels != IGNORED).sum(1).tolist()
    for row, (count, start) in enumerate(zip(counts, (5, 0, 3), strict=True)):
        longer[row, start : start + count] = 1
    logprobs, ids = logits(1, B, T + 4).log_softmax(-1).topk(K)
    teacher = TeacherOutput(None, logprobs, ids, longer)
    agrees(logits(0, B, T), teacher, labels, 0.5, 1.5)


def test_other_numbers_of_rows_make_the_sum_nan() -> None:
    labels, teacher = some_labels(), served()
    teacher.labels = labels.clone()
    student = logits(0, B, T)
    assert swift.gkd_loss(student, teacher, labels, 0.5, 1.0)[0].isfinite()
    teacher.labels[0, 2] = IGNORED
    assert swift.gkd_loss(student, teacher, labels, 0.5, 1.0)[0].isnan()
    nothing = torch.full_like(labels, IGNORED)
    assert swift.gkd_loss(student, teacher, nothing, 0.5, 1.0)[0].isnan()


@pytest.mark.parametrize("nothing", ["labels", "entries"])
def test_without_a_row_the_sum_is_zero_and_has_a_gradient(nothing: str) -> None:
    labels, teacher = some_labels(), served()
    if nothing == "labels":
        labels.fill_(IGNORED)
    else:
        teacher.topk_logprobs.fill_(-math.inf)
    student = logits(0, B, T).fill_(math.nan).requires_grad_()
    total, count = swift.gkd_loss(student, teacher, labels, 0.5, 1.0)
    total.backward()
    assert total == 0
    assert count == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_beta_outside_of_its_range_raises(beta: float) -> None:
    with pytest.raises(ValueError, match="beta is"):
        swift.gkd_loss(logits(0, B, T), served(), some_labels(), beta, 1.0)


def test_the_loss_says_once_that_it_runs(
    trainer: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        swift.gkd_loss(logits(0, B, T), served(), some_labels(), 0.5, 1.0)
    messages = [record.message for record in caplog.records]
    assert messages == [
        "ms-swift: the loss is opd_kernels' gkd_loss on the teacher's top-K, beta 0.5"
    ]


def test_a_teacher_without_a_topk_gets_ms_swifts_own_loss(
    trainer: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = TeacherOutput(full_logits=logits(1, B, T))
    for _ in range(2):
        found = swift.gkd_loss(
            logits(0, B, T), teacher, some_labels(), 0.5, 1.0, tp_gather_topk, chunk_size=7
        )
    assert found == ((tp_gather_topk, torch.log_softmax, 7), int((some_labels() != IGNORED).sum()))
    assert len(caplog.records) == 1
    assert "gkd_logits_topk" in caplog.text


def test_another_gather_gets_ms_swifts_own_loss(
    trainer: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    def mine(x: Tensor, ids: Tensor) -> Tensor:
        return x.gather(-1, ids)

    found = swift.gkd_loss(
        logits(0, B, T), served(), some_labels(), 0.5, 1.0, mine, log_softmax_fn=torch.softmax
    )
    assert found[0] == (mine, torch.softmax, 512)
    assert "mine" in caplog.text
    for _ in range(2):  # a new one at each step is logged once
        swift.gkd_loss(logits(0, B, T), served(), some_labels(), 0.5, 1.0, partial(mine))
    assert len(caplog.records) == 2


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (4, 2)])
def test_a_gather_of_shards_becomes_this_ranks_columns(
    ranks: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mpu = SimpleNamespace(
        get_tensor_model_parallel_world_size=lambda: ranks,
        get_tensor_model_parallel_rank=lambda: rank,
        get_tensor_model_parallel_group=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", mpu)
    given: dict[str, Any] = {}

    def divergence(student: Tensor, *_: Any, **options: Any) -> Tensor:
        given.update(options)
        return student.sum()

    monkeypatch.setattr(swift, "topk_divergence", divergence)
    swift.gkd_loss(logits(0, B, T), served(), some_labels(), 0.5, 1.0, tp_gather_topk)
    shard = given["vocab_shard"]
    assert (shard is None) == (ranks == 1)
    if shard is not None:
        assert (shard.start, shard.vocab_size, shard.group) == (rank * V, ranks * V, None)
    swift.gkd_loss(logits(0, B, T), served(), some_labels(), 0.5, 1.0, default_gather)
    assert given["vocab_shard"] is None


def test_install_replaces_the_loss_where_it_is_and_where_it_is_imported(
    trainer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = ModuleType(swift.IMPORTERS[1])
    loaded.gkd_loss = own_gkd_loss
    monkeypatch.setitem(sys.modules, swift.IMPORTERS[1], loaded)
    for _ in range(2):
        swift.install()
        assert trainer.gkd_loss is loaded.gkd_loss is swift.gkd_loss
    assert not {swift.IMPORTERS[0], swift.IMPORTERS[2]} & set(sys.modules)
    teacher = trainer.TeacherOutput(full_logits=logits(1, B, T))
    assert trainer.gkd_loss(logits(0, B, T), teacher, some_labels(), 0.5, 1.0)[0][2] == 512


@pytest.mark.parametrize("changed", ["gkd_loss", "to_topk"])
def test_install_refuses_other_parameters(changed: str, trainer: ModuleType) -> None:
    def other(self: Any) -> None: ...

    setattr(trainer if changed == "gkd_loss" else trainer.TeacherOutput, changed, other)
    with pytest.raises(ImportError, match=r"ms-swift 4\.6\.0; install that version"):
        swift.install()


def test_a_local_teachers_topk_is_that_of_the_rows_that_count(trainer: ModuleType) -> None:
    swift.install()
    whole, labels = logits(1, B, T, dtype=torch.bfloat16), some_labels()
    whole[0, 0] = math.nan  # its label is -100: not read
    found = trainer.TeacherOutput(full_logits=whole, labels=labels).to_topk(K)
    values, ids = whole.float().sort(dim=-1, descending=True, stable=True)
    counted = labels != IGNORED
    assert type(found) is trainer.TeacherOutput
    assert found.labels is labels
    assert found.topk_indices.dtype == torch.int64
    assert torch.equal(found.topk_indices[counted], ids[counted][:, :K])
    assert torch.equal(found.topk_logprobs[counted], values[counted][:, :K])
    assert found.topk_logprobs[~counted].eq(-math.inf).all()
    agrees(logits(0, B, T), found, labels, 0.5, 1.0)


def test_a_topk_function_of_the_callers_is_kept(trainer: ModuleType) -> None:
    swift.install()
    teacher = trainer.TeacherOutput(full_logits=logits(1, B, T))
    found = teacher.to_topk(K, lambda x, k: (x[..., :k], torch.arange(k).expand(B, T, k)))
    assert torch.equal(found.topk_indices[0, 0], torch.arange(K))
