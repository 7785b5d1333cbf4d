"""NeMo-RL's loss: its formula restated in float64, and its workers' calls, without the package."""

from __future__ import annotations

import logging
import math
import pickle
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peer_checks import assert_agree, bound, graded
from rank_pool import Pool
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from opd_kernels.integrations import _hooks, nemo_rl
from opd_kernels.integrations.nemo_rl import DistillationLossFn

B, S, V, K = 3, 7, 50, 5
TOKS = 37.0  # of the whole batch
CONFIGS = [
    ("mixed", 0.5, False),
    ("mixed", 0.25, False),
    ("mixed", 1.0, False),
    ("forward", 0.5, False),
    ("reverse", 0.5, False),
    ("forward", 0.5, True),
]
MIXED, ZERO_OUTSIDE = CONFIGS[0], CONFIGS[-1]


def config(kl_type: str, weight: float, zero_outside: bool) -> SimpleNamespace:
    return SimpleNamespace(
        kl_type=kl_type, mixed_kl_weight=weight, zero_outside_topk=zero_outside, unknown=1
    )


def restated(logits: Tensor, data: dict[str, Any], settings: tuple[str, float, bool]) -> Tensor:
    """NeMo-RL's loss of whole logits (B, S or more, V), divided by the tokens of the batch."""
    kl_type, weight, zero_outside = settings
    ids = data["teacher_topk_indices"]
    length = ids.shape[1]
    logits = logits[:, :length]
    if zero_outside:
        logp = logits.log_softmax(-1).gather(-1, ids)
    else:
        logp = logits.gather(-1, ids).log_softmax(-1)
    logq = data["teacher_topk_logits"].to(logits.dtype).log_softmax(-1)
    forward, reverse = logq.exp() * (logq - logp), logp.exp() * (logp - logq)
    share = {"forward": 1.0, "reverse": 0.0, "mixed": weight}[kl_type]
    rows = (share * forward + (1 - share) * reverse).sum(-1)[:, :-1]
    if "token_mask" not in data:
        return rows.mean()
    mask = data["token_mask"][:, 1:length] * data["sample_mask"][:, None]
    return torch.where(mask != 0, rows * mask, 0).sum() / TOKS


def inputs(dtype: torch.dtype = torch.float32, vocab: int = V) -> tuple[Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def randn(scale: float) -> Tensor:
        return scale * torch.randn(B, S, vocab, generator=generator)

    logits = randn(3.0).to(dtype)
    values, ids = randn(2.0).topk(K)
    return logits, {
        "input_ids": torch.zeros(B, S, dtype=torch.long),
        "token_mask": torch.arange(S) >= torch.tensor([[2], [1], [4]]),
        "sample_mask": torch.tensor([1.0, 0.0, 0.5]),
        "teacher_topk_logits": values,
        "teacher_topk_indices": ids,
    }


def loss_of(settings: tuple[str, float, bool], data: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The adapter, as a function of the logits."""
    loss_fn = DistillationLossFn(config(*settings))
    toks = torch.tensor(TOKS)
    return lambda logits: loss_fn(logits, data, torch.tensor(2.0), toks)[0]


def check(logits: Tensor, data: dict[str, Any], settings: tuple[str, float, bool]) -> None:
    """The adapter agrees with the formula, at the same logits."""
    found = graded(loss_of(settings, data), logits)
    expected = graded(lambda x: restated(x, data, settings), logits.double())
    share = 1 / TOKS if "token_mask" in data else 1 / (B * (S - 1))
    assert_agree(found, expected, bound(logits) * B * S * share, share)


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_the_formulas(
    dtype: torch.dtype, settings: tuple[str, float, bool]
) -> None:
    logits, data = inputs(dtype)
    check(logits, data, settings)


@pytest.mark.parametrize("settings", [MIXED, ZERO_OUTSIDE], ids=str)
def test_without_masks_it_is_the_mean_of_all_positions_but_the_last(
    settings: tuple[str, float, bool],
) -> None:
    logits, data = inputs()
    del data["token_mask"]
    check(logits, data, settings)


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32, torch.bfloat16])
def test_masks_of_any_dtype(kind: torch.dtype) -> None:
    logits, data = inputs()
    data["token_mask"] = data["token_mask"].to(kind)
    check(logits, data, MIXED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_in_16_bits(dtype: torch.dtype) -> None:
    logits, data = inputs()
    data["teacher_topk_logits"] = data["teacher_topk_logits"].to(dtype)
    for settings in (MIXED, ZERO_OUTSIDE):
        check(logits, data, settings)


def test_strided_logits_and_supports() -> None:
    logits, data = inputs()
    wide = torch.zeros(B, 2 * S, V)
    wide[:, ::2] = logits
    for name in ("teacher_topk_logits", "teacher_topk_indices"):
        data[name] = torch.stack([data[name], data[name]], 1)[:, 0]
        assert not data[name].is_contiguous()
    found = graded(lambda x: loss_of(MIXED, data)(x[:, ::2]), wide)
    expected = graded(lambda x: restated(x[:, ::2], data, MIXED), wide.double())
    assert_agree(found, expected, bound(logits) * B * S / TOKS, 1 / TOKS)


def test_int32_ids_in_any_order() -> None:
    logits, data = inputs()
    order = torch.randperm(K, generator=torch.Generator().manual_seed(1))
    for name in ("teacher_topk_logits", "teacher_topk_indices"):
        data[name] = data[name][..., order]
    settled = loss_of(MIXED, dict(data))(logits)
    data["teacher_topk_indices"] = data["teacher_topk_indices"].int()
    assert torch.equal(loss_of(MIXED, data)(logits), settled)
    data["teacher_topk_indices"] = data["teacher_topk_indices"].long()
    check(logits, data, MIXED)


def test_all_masked_is_zero_with_a_graph() -> None:
    """Also where the count of the batch is 0, and the logits are NaN."""
    _, data = inputs()
    data["sample_mask"] = torch.zeros(B)
    logits = torch.full((B, S, V), math.nan, requires_grad=True)
    loss_fn = DistillationLossFn(config(*MIXED))
    loss, metrics = loss_fn(logits, data, torch.tensor(0.0), torch.tensor(0))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert metrics["loss"] == loss.item() == 0.0
    assert torch.equal(gradient, torch.zeros(B, S, V))


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_infinite_entries_of_the_teacher_make_no_nan(settings: tuple[str, float, bool]) -> None:
    """NeMo-RL's own loss is NaN or infinite there. Here the entries are left out."""
    logits, data = inputs()
    data["teacher_topk_logits"][..., -1] = -math.inf
    found = graded(loss_of(settings, data), logits)
    for name in ("teacher_topk_logits", "teacher_topk_indices"):
        data[name] = data[name][..., :-1]
    expected = graded(lambda x: restated(x, data, settings), logits.double())
    assert_agree(found, expected, bound(logits) * B * S / TOKS, 1 / TOKS)


def test_ids_beyond_the_students_vocabulary_are_left_out() -> None:
    """In NeMo-RL's tensor-parallel path such an id is an entry whose logit is 0."""
    logits, data = inputs()
    data["teacher_topk_indices"][..., 0] = V + 3
    found = graded(loss_of(MIXED, data), logits)
    for name in ("teacher_topk_logits", "teacher_topk_indices"):
        data[name] = data[name][..., 1:]
    expected = graded(lambda x: restated(x, data, MIXED), logits.double())
    assert_agree(found, expected, bound(logits) * B * S / TOKS, 1 / TOKS)


def test_metrics_are_a_float_and_the_number_of_samples() -> None:
    logits, data = inputs()
    loss, metrics = DistillationLossFn(config(*MIXED))(logits, data, None, torch.tensor(TOKS))
    assert metrics == {"loss": loss.item(), "num_valid_samples": B}
    assert type(metrics["loss"]) is float


def test_without_a_count_the_batchs_own_is_taken() -> None:
    logits, data = inputs()
    loss_fn = DistillationLossFn(config(*MIXED))
    own = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]).sum()
    for count in (own, own.item()):
        expected = loss_fn(logits, data, None, count)[0]
        assert torch.equal(loss_fn(logits, data, None, None)[0], expected)


# NeMo-RL's workers.


class LossType(Enum):
    TOKEN_LEVEL = "token_level"


class LossInputType(Enum):
    LOGIT = "logit"
    DISTILLATION = "distillation"


def prepare_loss_input(
    logits: Tensor,
    data: dict[str, Any],
    loss_fn: Any,
    vocab_parallel_rank: int | None = None,
    vocab_parallel_group: dist.ProcessGroup | None = None,
    context_parallel_group: dist.ProcessGroup | None = None,
    sampling_params: Any = None,
    d2t: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    assert loss_fn.input_type == LossInputType.LOGIT
    return {"logits": logits}, data


@pytest.fixture
def loss_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A stand-in for ``nemo_rl.algorithms.loss``."""
    names = ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss")
    modules = [ModuleType(name) for name in names]
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    modules[-1].prepare_loss_input = prepare_loss_input
    modules[-1].interfaces = SimpleNamespace(LossType=LossType, LossInputType=LossInputType)
    nemo_rl._interfaces.cache_clear()
    yield modules[-1]
    nemo_rl._interfaces.cache_clear()


def worker(loss_fn: Any, logits: Tensor, data: dict[str, Any], **groups: Any) -> Tensor:
    """A micro-batch: the worker prepares the loss's input, and calls the loss with it."""
    assert loss_fn.loss_type == LossType.TOKEN_LEVEL
    loss_input, data = prepare_loss_input(logits, data, loss_fn, **groups)
    loss, _ = loss_fn(
        data=data, global_valid_seqs=None, global_valid_toks=torch.tensor(TOKS), **loss_input
    )
    return loss


@pytest.mark.parametrize("mapping", [False, True])
def test_a_worker_calls_what_it_was_sent(loss_module: ModuleType, mapping: bool) -> None:
    """Pickled, with the configuration of NeMo-RL's main branch or that of its releases."""
    logits, data = inputs()
    given = config(*MIXED)
    loss_fn = DistillationLossFn(vars(given) if mapping else given)
    sent = pickle.loads(pickle.dumps(loss_fn))
    found = graded(lambda x: worker(sent, x, data), logits)
    expected = graded(lambda x: restated(x, data, MIXED), logits.double())
    assert_agree(found, expected, bound(logits) * B * S / TOKS, 1 / TOKS)


def test_logits_that_the_worker_divided_by_a_temperature(loss_module: ModuleType) -> None:
    """In place, as its DTensor and Megatron workers do; the teacher's worker does as well."""
    logits, data = inputs()
    data["teacher_topk_logits"] /= 0.7
    loss_fn = DistillationLossFn(config(*MIXED))
    found = graded(lambda x: worker(loss_fn, (1 * x).div_(0.7), data), logits)
    expected = graded(lambda x: restated(x / 0.7, data, MIXED), logits.double())
    error = bound(logits, temperature=0.7) * B * S / TOKS
    assert_agree(found, expected, error, 1 / TOKS)


def test_packed_sequences(loss_module: ModuleType) -> None:
    """One call a sequence, of a slice of packed logits that is padded; the data is not."""
    logits, data = inputs()
    lengths, padded = [4, S, 6], [4, 8, 8]
    packed = torch.cat([torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in logits])[None]
    loss_fn = DistillationLossFn(config(*MIXED))
    starts = [i * (S + 1) for i in range(B)]
    parts = [
        {k: v[i : i + 1, : lengths[i]] if v.ndim > 1 else v[i : i + 1] for k, v in data.items()}
        for i in range(B)
    ]

    def by_sequence(x: Tensor) -> Tensor:
        sequences = zip(starts, padded, parts, strict=True)
        return sum(worker(loss_fn, x.narrow(1, at, n), part) for at, n, part in sequences)

    def formula(x: Tensor) -> Tensor:
        slices = [x[:, at : at + length] for at, length in zip(starts, lengths, strict=True)]
        return sum(restated(x, part, MIXED) for x, part in zip(slices, parts, strict=True))

    found = graded(by_sequence, packed)
    expected = graded(formula, packed.double())
    assert_agree(found, expected, bound(logits) * B * S / TOKS, 1 / TOKS)


def test_another_convention_is_refused_on_the_driver(loss_module: ModuleType) -> None:
    loss_module.prepare_loss_input = lambda logits, data: None
    with pytest.raises(ImportError, match=r"tested with NeMo-RL 0\.7\.0"):
        DistillationLossFn(config(*MIXED))


@pytest.mark.parametrize("kl_type", ["reverse", "mixed"])
def test_zero_outside_topk_without_a_member_raises(kl_type: str) -> None:
    with pytest.raises(ValueError, match=f"'{kl_type}' adds the student's entropy .* keep the"):
        DistillationLossFn(config(kl_type, 0.5, True))


def test_values_that_nemo_rl_does_not_have_raise() -> None:
    with pytest.raises(ValueError, match="kl_type is 'jsd', allowed are forward, reverse, mixed"):
        DistillationLossFn(config("jsd", 0.5, False))
    with pytest.raises(ValueError, match=r"mixed_kl_weight is 1\.5, allowed is 0 to 1"):
        DistillationLossFn(config("mixed", 1.5, False))


def test_sequences_that_do_not_fit_raise() -> None:
    logits, data = inputs()
    loss = loss_of(MIXED, data)
    with pytest.raises(ValueError, match=r"logits have 6 positions .*_indices 7"):
        loss(logits[:, :-1])
    data["token_mask"] = data["token_mask"][:, :-1]
    with pytest.raises(ValueError, match="token_mask has 6 positions and teacher_topk_indices 7"):
        loss(logits)


def test_the_log_says_once_which_loss_runs(caplog: pytest.LogCaptureFixture) -> None:
    _hooks.announce.cache_clear()
    logits, data = inputs()
    with caplog.at_level(logging.WARNING, "opd_kernels"):
        for settings in (MIXED, MIXED, ZERO_OUTSIDE):
            loss_of(settings, data)(logits)
    assert [record.getMessage().partition("opd_kernels' ")[2] for record in caplog.records] == [
        "mixed 0.5 KL",
        "forward KL, zero_outside_topk",
    ]


# Several ranks: tensor-parallel within a pair, context-parallel between the pairs.

RANKS, PAIR = 4, 2
ROWS = 8  # with padding: two chunks for each of two ranks


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(RANKS)
    yield pool
    pool.close()


def whole(settings: tuple[str, float, bool], vocab: int = V) -> tuple[Any, Any, float]:
    """(padded logits, data, the formula's loss and gradient of them, the bound of a loss)."""
    logits, data = inputs(vocab=vocab)
    logits = torch.nn.functional.pad(logits, (0, 0, 0, ROWS - S), value=1.0)
    expected = graded(lambda x: restated(x, data, settings), logits.double())
    return (logits, data), expected, bound(logits) * B * S / TOKS


def balanced(x: Any, rank: int) -> Any:
    """A context-parallel rank's positions: a chunk from either end."""
    chunks = x.chunk(2 * PAIR, 1)
    return torch.cat([chunks[rank], chunks[2 * PAIR - 1 - rank]], 1)


def under_megatron(world: dist.ProcessGroup, settings: tuple[str, float, bool]) -> None:
    """The gradient is that of the own positions times their ranks, as NeMo-RL divides by them."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    context, tensor = divmod(dist.get_rank(world), PAIR)
    state = SimpleNamespace(
        model_parallel_is_initialized=lambda: True,
        get_tensor_model_parallel_group=lambda: pairs[context],
        get_context_parallel_group=lambda: across[tensor],
    )
    (logits, data), (loss, (gradient,)), error = whole(settings)
    columns = slice(tensor * V // PAIR, (tensor + 1) * V // PAIR)
    part, own = (balanced(x, context)[..., columns] for x in (logits, gradient))
    sys.modules["megatron.core.parallel_state"] = state
    try:
        found = graded(loss_of(settings, data), part)
    finally:
        del sys.modules["megatron.core.parallel_state"]
    assert_agree(found, (loss, [PAIR * own]), error, PAIR / TOKS)


def on_a_mesh(world: dist.ProcessGroup, settings: tuple[str, float, bool]) -> None:
    """The gradient is that of the own positions, which FSDP sums up to the scaling of its loss."""
    mesh = init_device_mesh("cpu", (PAIR, PAIR), mesh_dim_names=("cp", "tp"))
    context, tensor = divmod(dist.get_rank(world), PAIR)
    (logits, data), (loss, (gradient,)), error = whole(settings)
    columns = slice(tensor * V // PAIR, (tensor + 1) * V // PAIR)
    part, own = (balanced(x, context)[..., columns] for x in (logits, gradient))

    def of_local(x: Tensor) -> Tensor:
        made = DTensor.from_local(x, mesh, [Shard(1), Shard(-1)])
        return loss_of(settings, data)(made)

    assert_agree(graded(of_local, part), (loss, [own]), error, 1 / TOKS)


def unevenly(world: dist.ProcessGroup, settings: tuple[str, float, bool]) -> None:
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    (logits, data), (loss, (gradient,)), error = whole(settings)
    made = distribute_tensor(logits, mesh, [Shard(-1)]).requires_grad_()
    value = loss_of(settings, data)(made)
    (found,) = torch.autograd.grad(value, made)
    own = distribute_tensor(gradient, mesh, [Shard(-1)]).to_local()
    assert own.shape[-1] != V / RANKS
    assert_agree((value.detach(), [found.to_local()]), (loss, [own]), error, 1 / TOKS)


def in_odd_chunks(world: dist.ProcessGroup) -> None:
    mesh = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("cp", "tp"))
    logits, data = inputs()
    made = DTensor.from_local(logits, mesh, [Shard(1), Shard(-1)])
    with pytest.raises(ValueError, match="7 positions on each of 4 context-parallel ranks"):
        loss_of(MIXED, data)(made)


@pytest.mark.parametrize("settings", [MIXED, ZERO_OUTSIDE], ids=str)
def test_megatrons_groups(pool: Pool, settings: tuple[str, float, bool]) -> None:
    pool.run(under_megatron, settings)


@pytest.mark.parametrize("settings", [MIXED, ZERO_OUTSIDE], ids=str)
def test_a_mesh_counts_a_gradient_once_for_all_context_parallel_ranks(
    pool: Pool, settings: tuple[str, float, bool]
) -> None:
    """NeMo-RL's own loss counts it once for each of them."""
    pool.run(on_a_mesh, settings)


@pytest.mark.parametrize("settings", [MIXED, ZERO_OUTSIDE], ids=str)
def test_a_vocabulary_that_ranks_do_not_divide(
    pool: Pool, settings: tuple[str, float, bool]
) -> None:
    """NeMo-RL's own loss takes the last rank's columns for those of lower ids."""
    pool.run(unevenly, settings)


def test_sequences_without_two_chunks_a_rank_raise(pool: Pool) -> None:
    pool.run(in_odd_chunks)


def test_megatron_that_is_not_initialized_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DTensor worker may have imported it."""
    state = SimpleNamespace(model_parallel_is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)
    logits, data = inputs()
    check(logits, data, MIXED)
