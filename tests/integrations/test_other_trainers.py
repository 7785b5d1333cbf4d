"""The classes of docs/trainers.md against the trainers' formulas in float64.

Each is taken from the page as it stands and called as its trainer calls it. No trainer is imported.
The losses of ROLL and of verl-recipe's gkd are restated as they are, and what is wrong with them is
shown.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pages import DOCS, snippets
from peer_checks import assert_agree, bound, graded
from rank_pool import Pool
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from opd_kernels import TopK, VocabShard, topk_divergence

V, K, TEMPERATURE = 61, 7, 1.5
DTYPES = [torch.float32, torch.bfloat16]


@cache
def page(title: str) -> dict[str, Any]:
    """What the snippet of a section defines."""
    (source,) = (each.source for each in snippets(DOCS / "trainers.md") if each.title == title)
    names: dict[str, Any] = {"__name__": title}
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        exec(compile(source, f"trainers.md: {title}", "exec"), names)
    return names


def logits(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2.5 * torch.randn(*shape, generator=generator)).to(dtype)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double() for tensor in tensors]


def jensen_shannon(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """Entry by entry: forward KL at 0, reverse KL at 1. -inf is an absent entry."""
    present = (logp > -math.inf) & (logq > -math.inf)
    logp, logq = logp.masked_fill(~present, -1.0), logq.masked_fill(~present, -1.0)
    p, q = logp.exp(), logq.exp()
    if beta in (0.0, 1.0):
        value = q * (logq - logp) if beta == 0.0 else p * (logp - logq)
    else:
        m = (beta * q + (1 - beta) * p).log()
        value = beta * q * (logq - m) + (1 - beta) * p * (logp - m)
    return value.masked_fill(~present, 0.0).sum(-1)


# ROLL. Its divergences and the function that calls them, restated in the dtype of their inputs.

OBJECTIVES = (
    "forward_kl",
    "reverse_kl",
    "adaptive_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "js_divergence",
)


def roll_config(objective: str) -> SimpleNamespace:
    return SimpleNamespace(
        kd_objective=objective,
        kd_temperature=TEMPERATURE,
        teacher_temperature=0.75,
        skew_lambda=0.125,
        adaptive_kl_alpha=0.5,
    )


def roll_own(config: SimpleNamespace) -> Callable[..., Tensor]:
    """ROLL's VariousDivergence: what -inf has made of a product is filled with 0."""

    def divergence(
        logits: Tensor,
        teacher_probs: Tensor,
        teacher_log_probs: Tensor,
        teacher_inf_mask: Tensor,
    ) -> Tensor:
        z, q, logq = logits / config.kd_temperature, teacher_probs, teacher_log_probs
        logp = z.log_softmax(-1)
        p, skew = logp.exp(), config.skew_lambda

        def total(entries: Tensor) -> Tensor:
            return entries.masked_fill(z.isinf() | teacher_inf_mask, 0.0).sum(-1)

        forward, reverse = total(q * (logq - logp)), total(p * (logp - logq))
        if config.kd_objective == "adaptive_kl":
            ordered, order = q.sort(-1)
            gap = (ordered - p.gather(-1, order)).abs().detach()
            tail = ordered.cumsum(-1) <= config.adaptive_kl_alpha
            share = (gap * ~tail).sum(-1) / gap.sum(-1)
            return share * forward + (1 - share) * reverse
        if config.kd_objective == "skewed_forward_kl":
            return total(q * (logq - (skew * q + (1 - skew) * p).log()))
        if config.kd_objective == "skewed_reverse_kl":
            return total(p * (logp - ((1 - skew) * q + skew * p).log()))
        if config.kd_objective == "js_divergence":
            m = ((p + q) / 2 + 1e-9).log()
            return total((q * ((q + 1e-9).log() - m) + p * ((p + 1e-9).log() - m)) / 2)
        return forward if config.kd_objective == "forward_kl" else reverse

    return divergence


class RollStrategy:
    """What ROLL's strategies do around a divergence."""

    def op_compute_gather_by_teacher_indices(self, logits: Tensor, ids: Tensor | None) -> Any:
        return logits if ids is None else logits.gather(-1, ids)

    def op_compute_topk_probs_and_indices(
        self, logits: Tensor, topk: int, config: SimpleNamespace
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = logits / config.kd_temperature / config.teacher_temperature
        best, ids = logits.topk(topk)
        return best.softmax(-1), best.log_softmax(-1), ids, best.isinf()

    def op_compute_various_divergence(
        self,
        loss_callable: Callable[..., Tensor],
        logits: Tensor,
        probs: Tensor,
        log_probs: Tensor,
        ids: Tensor | None,
        inf_mask: Tensor,
        labels: Tensor,
    ) -> Tensor:
        gathered = self.op_compute_gather_by_teacher_indices(logits, ids)
        rows = loss_callable(
            logits=gathered,
            teacher_probs=probs,
            teacher_log_probs=log_probs,
            teacher_inf_mask=inf_mask,
        )
        return rows.masked_fill_(labels == -100, 0.0).sum()


def roll_ours(config: SimpleNamespace, **options: Any) -> Callable[..., Tensor]:
    worker = SimpleNamespace(strategy=RollStrategy(), kl_loss_func=roll_own(config))
    page("ROLL")["TopKDivergence"](config, worker.kl_loss_func, **options).attach(worker)

    def loss(logits: Tensor, *rest: Any) -> Tensor:
        strategy = worker.strategy
        return strategy.op_compute_various_divergence(worker.kl_loss_func, logits, *rest)

    return loss


def roll_theirs(config: SimpleNamespace) -> Callable[..., Tensor]:
    def loss(logits: Tensor, *rest: Any) -> Tensor:
        named = {"loss_callable": roll_own(config), "logits": logits}
        names = ("probs", "log_probs", "ids", "inf_mask", "labels")
        return RollStrategy().op_compute_various_divergence(
            **named, **dict(zip(names, rest, strict=True))
        )

    return loss


def roll_inputs(absent: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels; ``absent`` of the teacher's K best are -inf in some rows."""
    student, teacher = logits(3, 5, V + 2, seed=0)[..., :V], logits(3, 5, V, seed=1)
    if absent:
        teacher[1:, ::2, K - absent :] = -math.inf
    labels = torch.full((3, 5), 7)
    labels[:, 3:] = labels[2] = -100
    return student, teacher, labels


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_roll_is_float64s(objective: str, dtype: torch.dtype) -> None:
    config, strategy = roll_config(objective), RollStrategy()
    student, teacher, labels = roll_inputs()
    student = student.to(dtype)  # a slice stays one: the last dimension is not dense
    sides = strategy.op_compute_topk_probs_and_indices(teacher.double(), K, config)
    exact = graded(lambda z: roll_theirs(config)(z, *sides, labels), *wide(student))
    sides = strategy.op_compute_topk_probs_and_indices(teacher, K, config)
    found = graded(lambda z: roll_ours(config)(z, *sides, labels), student)
    # ROLL's JS has 1e-9 inside its logarithms, which moves an entry by about 1e-9.
    error = bound(student, teacher, temperature=TEMPERATURE * 0.75) + 1e-7
    assert_agree(found, exact, error)
    assert found[1][0][labels == -100].eq(0).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rolls_absent_entries_take_no_part(objective: str) -> None:
    """The loss is that of the entries that are left, in float64."""
    config, strategy = roll_config(objective), RollStrategy()
    student, teacher, labels = roll_inputs(absent=2)
    few = teacher.isinf().any(-1)
    sides = strategy.op_compute_topk_probs_and_indices(teacher, K, config)
    assert sides[3].any()
    assert not sides[3].all()
    found = graded(lambda z: roll_ours(config)(z, *sides, labels), student)

    def expected(z: Tensor) -> Tensor:
        parts = []
        for k, rows in ((K - 2, few), (K, ~few)):
            sides = strategy.op_compute_topk_probs_and_indices(teacher.double()[rows], k, config)
            parts.append(roll_theirs(config)(z[rows], *sides, labels[rows]))
        return torch.stack(parts).sum()

    error = bound(student, teacher, temperature=TEMPERATURE * 0.75) + 1e-7
    assert_agree(found, graded(expected, *wide(student)), error)


def test_roll_hands_a_whole_vocabulary_to_its_own_divergence() -> None:
    config = roll_config("reverse_kl")
    student, teacher, labels = roll_inputs()
    logq = (teacher / TEMPERATURE).log_softmax(-1)
    rest = (logq.exp(), logq, None, logq.isinf(), labels)
    assert torch.equal(roll_ours(config)(student, *rest), roll_theirs(config)(student, *rest))


def test_roll_with_all_rows_masked_is_0() -> None:
    config, strategy = roll_config("adaptive_kl"), RollStrategy()
    student, teacher, labels = roll_inputs()
    sides = strategy.op_compute_topk_probs_and_indices(teacher, K, config)
    loss, (grad,) = graded(lambda z: roll_ours(config)(z, *sides, labels.fill_(-100)), student)
    assert loss == 0
    assert not grad.any()


def test_rolls_own_gradient_is_nan_where_the_teacher_is_minus_inf() -> None:
    """With two of its six divergences, though the loss is finite."""
    student, teacher, labels = roll_inputs(absent=2)
    wrong = set()
    for objective in OBJECTIVES:
        config = roll_config(objective)
        sides = RollStrategy().op_compute_topk_probs_and_indices(teacher, K, config)
        loss, (grad,) = graded(lambda z: roll_theirs(config)(z, *sides, labels), student)  # noqa: B023
        assert loss.isfinite()
        if grad.isnan().any():
            wrong.add(objective)
        _, (grad,) = graded(lambda z: roll_ours(config)(z, *sides, labels), student)  # noqa: B023
        assert grad.isfinite().all()
    assert wrong == {"reverse_kl", "adaptive_kl"}


# Under tensor parallelism: two ranks, each with half of the columns.


def sharded(
    group: Any, section: str, student: Tensor, call: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """(loss, gradient of this rank's columns); the shard goes to ``call``."""
    width = 32
    start = width * torch.distributed.get_rank(group)
    columns = pad(student, (0, 2 * width - V))[..., start : start + width]
    shard = VocabShard(start, V, group)
    loss, (grad,) = graded(lambda z: call(page(section), z, shard), columns)
    return loss, grad


def roll_on_a_rank(group: Any, objective: str) -> tuple[Tensor, Tensor]:
    config = roll_config(objective)
    student, teacher, labels = roll_inputs(absent=2)
    sides = RollStrategy().op_compute_topk_probs_and_indices(teacher, K, config)

    def call(_: dict[str, Any], z: Tensor, shard: VocabShard) -> Tensor:
        return roll_ours(config, vocab_shard=shard)(z, *sides, labels)

    return sharded(group, "ROLL", student, call)


def modelopt_on_a_rank(group: Any) -> tuple[Tensor, Tensor]:
    student, teacher = logits(5, 3, V, seed=0), logits(5, 3, V, seed=1)
    padded = pad(teacher, (0, 3), value=50.0)  # columns beyond the vocabulary, however large
    start = 32 * torch.distributed.get_rank(group)

    def call(names: dict[str, Any], z: Tensor, shard: VocabShard) -> Tensor:
        criterion = names["TopKLogitsLoss"](TEMPERATURE, top_k=K, vocab_shard=shard)
        rows, over_ranks, _ = criterion((z, None), (padded[..., start : start + 32], None))
        assert not over_ranks
        return rows.sum()

    return sharded(group, "ModelOpt", student, call)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


def assert_like_one_process(
    ranks: list[tuple[Tensor, Tensor]], whole: tuple[Tensor, list[Tensor]], error: float
) -> None:
    """Each rank has the whole loss and, counted once, the gradient of its columns."""
    joined = torch.cat([grad for _, grad in ranks], -1)
    assert joined[..., V:].eq(0).all()
    for loss, _ in ranks:
        assert_agree((loss, [joined[..., :V]]), whole, error)


@pytest.mark.parametrize("objective", ["reverse_kl", "adaptive_kl"])
def test_roll_on_two_ranks_is_one_process(pool: Pool, objective: str) -> None:
    config = roll_config(objective)
    student, teacher, labels = roll_inputs(absent=2)
    sides = RollStrategy().op_compute_topk_probs_and_indices(teacher, K, config)
    whole = graded(lambda z: roll_ours(config)(z, *sides, labels), student)
    error = 2 * bound(student, teacher, temperature=TEMPERATURE * 0.75)
    assert_like_one_process(pool.run(roll_on_a_rank, objective), whole, error)


def modelopt(z: Tensor, teacher: Tensor, reverse: bool) -> Tensor:
    """ModelOpt's loss of each token, (S, B)."""
    ids = teacher.topk(K).indices
    logp, logq = ((x.gather(-1, ids) / TEMPERATURE).log_softmax(-1) for x in (z, teacher))
    return jensen_shannon(logp, logq, float(reverse))


def test_modelopt_on_two_ranks_is_float64s(pool: Pool) -> None:
    student, teacher = logits(5, 3, V, seed=0), logits(5, 3, V, seed=1)
    exact = graded(lambda z: modelopt(z, teacher.double(), False).sum(), *wide(student))
    error = bound(student, teacher, temperature=TEMPERATURE)
    assert_like_one_process(pool.run(modelopt_on_a_rank), exact, error)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modelopt_is_float64s(reverse: bool, dtype: torch.dtype) -> None:
    student = logits(3, 5, V, seed=0, dtype=dtype).transpose(0, 1)  # (S, B), not contiguous
    teacher = logits(5, 3, V + 9, seed=1, dtype=dtype)[..., :V]
    weight = torch.arange(15.0).reshape(3, 5) - 4  # (B, S)
    criterion = page("ModelOpt")["TopKLogitsLoss"](TEMPERATURE, reverse, K)

    def ours(z: Tensor) -> Tensor:
        rows, *_ = criterion(z, teacher)
        return (rows * weight).sum()

    exact = graded(
        lambda z: (modelopt(z, teacher.double(), reverse).T * weight).sum(), *wide(student)
    )
    error = 10 * bound(student, teacher, temperature=TEMPERATURE)  # the largest weight
    assert_agree(graded(ours, student), exact, error)


def test_modelopts_balancer_finds_the_criterion() -> None:
    """It looks for "Logits" in the class's name, and takes subclasses of torch's _Loss."""
    criterion = page("ModelOpt")["TopKLogitsLoss"]
    assert "Logits" in criterion.__name__
    assert issubclass(criterion, torch.nn.modules.loss._Loss)


# Axolotl.

HIDDEN = 16


def axolotl_inputs(dtype: torch.dtype) -> SimpleNamespace:
    batch = SimpleNamespace()
    batch.hidden = logits(2, 6, HIDDEN, seed=0, dtype=dtype)
    batch.weight = (logits(V, HIDDEN, seed=1) / 4).to(dtype)
    batch.bias = logits(V, seed=2, dtype=dtype)
    entries = torch.tensor([[1, 3, K, 0, 5, 2], [K, 2, 0, 4, 1, 6]])
    batch.valid = torch.arange(K) < entries[..., None]
    raw, batch.ids = (logits(2, 6, V, seed=3) / TEMPERATURE).topk(K)
    normalised = raw.masked_fill(~batch.valid, -math.inf).log_softmax(-1)
    batch.logq = normalised.masked_fill(~batch.valid, 0.0)  # what the collator pads with
    batch.labels = torch.randint(V, (2, 6), generator=torch.Generator().manual_seed(4))
    batch.labels[:, :2] = -100
    return batch


def axolotl(
    batch: SimpleNamespace,
    beta: float,
    normalize: bool,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """The loss that Axolotl reports, but for the padding, which is in no softmax."""
    z = hidden @ weight.T + bias
    entries = (z / TEMPERATURE).gather(-1, batch.ids).masked_fill(~batch.valid, -math.inf)
    whole = (z / TEMPERATURE).logsumexp(-1, keepdim=True)
    left = batch.valid.any(-1, keepdim=True)
    own = entries.masked_fill(~left, 0.0).logsumexp(-1, keepdim=True)
    logp = entries - (own if normalize else whole)
    soft = jensen_shannon(logp, batch.logq.double().masked_fill(~batch.valid, -math.inf), beta)
    hard = cross_entropy(
        z[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
    )
    return 0.75 * TEMPERATURE**2 * soft.sum() + 0.25 * hard


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:.*truncate")
def test_axolotl_is_float64s(beta: float, normalize: bool, dtype: torch.dtype) -> None:
    batch = axolotl_inputs(dtype)
    leaves = (batch.hidden, batch.weight, batch.bias)
    exact = graded(lambda *x: axolotl(batch, beta, normalize, *x), *wide(*leaves))
    module = page("Axolotl")["TopKLogprobLoss"](
        0.25, 0.75, TEMPERATURE, beta, normalize_topk=normalize
    )

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return module(weight, hidden, batch.ids, batch.logq, batch.valid.int(), batch.labels, bias)

    found = graded(ours, *leaves)
    assert_axolotl(found, exact, batch, dtype)


def assert_axolotl(found: Any, exact: Any, batch: SimpleNamespace, dtype: torch.dtype) -> None:
    """A product over H numbers is off by H eps times the sum of magnitudes."""
    hidden, weight = batch.hidden.double(), batch.weight.double()
    magnitude = (hidden.abs() @ weight.abs().T).max().item()
    eps = torch.finfo(dtype).eps
    rows = batch.hidden.shape[0] * batch.hidden.shape[1]
    z = hidden @ weight.T
    row = TEMPERATURE**2 * (bound(z, batch.logq, dtype=dtype) + 4 * HIDDEN * eps * magnitude)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=0.0, atol=rows * row)
    # A gradient of hidden states sums over V ids, one of the head over the rows.
    scales = (V * weight.abs().max(), rows * hidden.abs().max(), torch.tensor(float(rows)))
    for gradient, expected, scale in zip(found[1], exact[1], scales, strict=True):
        torch.testing.assert_close(
            gradient.double(), expected, rtol=eps, atol=4 * row * scale.item()
        )


@pytest.mark.parametrize("normalize", [True, False])
def test_axolotl_with_nothing_to_learn_is_0(normalize: bool) -> None:
    batch = axolotl_inputs(torch.bfloat16)
    batch.valid[:], batch.labels[:], batch.hidden[:] = False, -100, math.nan
    module = page("Axolotl")["TopKLogprobLoss"](
        temperature=TEMPERATURE, beta=0.0, normalize_topk=normalize
    )
    rest = (batch.ids, batch.logq, batch.valid, batch.labels)
    loss, grads = graded(lambda h, w: module(w, h, *rest), batch.hidden, batch.weight)
    assert loss == 0
    assert not any(grad.any() for grad in grads)


# slime.


def slime_inputs() -> tuple[SimpleNamespace, dict[str, Any], Tensor, list[Tensor]]:
    totals, responses = [7, 9, 4], [4, 8, 1]
    student = logits(1, 24, V, seed=0)  # 20 tokens, and padding
    student[:, 20:] = math.nan
    teachers = [logits(n, V, seed=10 + n) for n in responses]
    best = [teacher.log_softmax(-1).topk(K) for teacher in teachers]
    fields = [torch.stack([b.indices.float(), b.values], 1) for b in best]
    fields[1][2, 1, 4:] = -1000.0  # a server that listed fewer
    batch = {"total_lengths": totals, "response_lengths": responses, "teacher_topk": fields}
    batch["loss_masks"] = [torch.arange(n) % 3 != 1 for n in responses]
    return SimpleNamespace(rollout_temperature=0.7, context_parallel_size=1), batch, student, fields


def sum_of_sample_mean(batch: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """slime's, without context parallelism."""

    def reduce(x: Tensor) -> Tensor:
        parts = zip(x.split(batch["response_lengths"]), batch["loss_masks"], strict=True)
        return sum(
            ((part * mask).sum() / mask.sum().clamp(min=1) for part, mask in parts), x[:0].sum()
        )

    return reduce


def test_slime_is_float64s() -> None:
    args, batch, student, fields = slime_inputs()
    reduce = sum_of_sample_mean(batch)

    def expected(z: Tensor) -> Tensor:
        rows, end = [], 0
        for total, field in zip(batch["total_lengths"], fields, strict=True):
            end += total
            chunk = z[0, end - len(field) - 1 : end - 1] / args.rollout_temperature
            ids, logq = field[:, 0].long(), field[:, 1].double()
            present = logq > -1000
            logq = logq.masked_fill(~present, -math.inf)
            logp = chunk.log_softmax(-1).gather(-1, ids).masked_fill(~present, -math.inf)
            inside = torch.zeros_like(chunk).scatter(-1, ids, present.double()) > 0
            tail = chunk.masked_fill(inside, -math.inf).logsumexp(-1) - chunk.logsumexp(-1)
            rest = (1 - logq.exp().sum(-1)).log()
            rows.append(jensen_shannon(logp, logq, 1.0) + tail.exp() * (tail - rest))
        return reduce(torch.cat(rows))

    exact = graded(expected, *wide(student[:, :20]))
    loss, (grad,) = graded(lambda z: page("slime")["topk_loss"](args, batch, z, reduce)[0], student)
    assert grad[:, 20:].eq(0).all()
    # A served tail is what rounded log-probs leave, so its logarithm is off by eps / tail.
    least = min((1 - f[:, 1].double().exp().sum(-1)).min().item() for f in fields)
    of_tail = K * torch.finfo(torch.float32).eps / least
    error = bound(student[:, :20], *(f[:, 1] for f in fields), temperature=0.7) + of_tail
    assert_agree((loss, [grad[:, :20]]), exact, error)


def test_slimes_metrics_are_detached_and_context_parallelism_raises() -> None:
    args, batch, student, _ = slime_inputs()
    student.requires_grad_()
    loss, metrics = page("slime")["topk_loss"](args, batch, student, sum_of_sample_mean(batch))
    assert all(torch.equal(value, loss) and not value.requires_grad for value in metrics.values())
    args.context_parallel_size = 2
    with pytest.raises(NotImplementedError, match="context_parallel_size"):
        page("slime")["topk_loss"](args, batch, student, sum_of_sample_mean(batch))


# OpenRLHF and SkyRL: a model that returns (log-probs of actions, output), and whose logits have
# been divided in place by a temperature.

SEQUENCES = torch.randint(V, (3, 9), generator=torch.Generator().manual_seed(5))
ACTIONS = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
TEACHER = logits(3, 9, V, seed=6)


class Policy(torch.nn.Module):
    """Both trainers' model. Its parameters are its logits."""

    def __init__(self, student: Tensor) -> None:
        super().__init__()
        self.student = student

    def forward(self, sequences: Tensor, actions: Any, attention_mask: Tensor) -> Any:
        logits = self.student * 1.0
        output = {"logits": logits}
        logits.div_(TEMPERATURE)
        return torch.zeros(ACTIONS.shape), output


def teacher_topk(sequences: Tensor, attention_mask: Tensor) -> TopK:
    assert torch.equal(sequences, SEQUENCES)
    assert attention_mask.shape == SEQUENCES.shape
    values, ids = TEACHER.topk(K)
    return TopK(ids, values)


def reverse_kl_of_actions(z: Tensor) -> Tensor:
    """(B, A), float64."""
    teacher = TEACHER.double()[:, 4:8]
    ids = teacher.topk(K).indices
    sides = (x.gather(-1, ids) / TEMPERATURE for x in (z[:, 4:8], teacher))
    return jensen_shannon(*(side.log_softmax(-1) for side in sides), 1.0)


def openrlhf(student: Tensor, **info: Any) -> Tensor:
    trainer = SimpleNamespace(actor=Policy(student))
    loss_class = page("OpenRLHF and SkyRL")["OpenRLHFLoss"]
    trainer.actor_loss_fn = loss_class(teacher_topk, trainer.actor, TEMPERATURE)
    log_probs, _ = trainer.actor(SEQUENCES, ACTIONS, attention_mask=torch.ones(3, 9))
    loss, clip_ratio, ppo_kl, vllm_kl = trainer.actor_loss_fn(
        log_probs, log_probs, log_probs, action_mask=ACTIONS, rollout_log_probs=None, **info
    )
    assert clip_ratio.detach() == ppo_kl.detach() == 0
    assert vllm_kl is None
    return loss


@pytest.mark.parametrize("tokens", [None, 40.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_openrlhf_is_float64s(tokens: float | None, dtype: torch.dtype) -> None:
    student = logits(3, 9, V, seed=7, dtype=dtype)
    info: dict[str, Any] = {"dp_size": 4, "batch_num_tokens": None, "global_batch_size": None}
    normalizer = ACTIONS.sum().item()
    if tokens is not None:
        info["batch_num_tokens"], normalizer = torch.tensor(tokens), tokens / 4
    exact = graded(
        lambda z: (reverse_kl_of_actions(z) * ACTIONS).sum() / normalizer, *wide(student)
    )
    found = graded(lambda z: openrlhf(z, **info), student.float())
    error = bound(student, TEACHER, temperature=TEMPERATURE)
    assert_agree(found, exact, error, share=1 / normalizer)


def skyrl(student: Tensor, weight: Tensor, **config: Any) -> Tensor:
    worker = SimpleNamespace(model=Policy(student))
    loss_class = page("OpenRLHF and SkyRL")["SkyRLLoss"]
    worker.policy_loss_fn = loss_class(teacher_topk, worker.model, TEMPERATURE)
    log_probs, _ = worker.model(SEQUENCES, 4, attention_mask=torch.ones(3, 9))
    loss, _ = worker.policy_loss_fn(
        log_probs,
        log_probs,
        weight,
        config=SimpleNamespace(**{"use_kl_loss": False, **config}),
        loss_mask=ACTIONS.float(),
        rollout_logprobs=None,
    )
    return loss


def skyrl_weight(reduction: str) -> Tensor:
    """What SkyRL makes of advantages of 1."""
    ones, tokens = torch.ones(ACTIONS.shape), ACTIONS.sum(-1, keepdim=True)
    if reduction == "token_mean":
        return ones / ACTIONS.sum()
    if reduction == "sequence_mean":
        return ones / (len(ones) * tokens.clamp(min=1))
    return ones / (len(ones) * 16)  # seq_mean_token_sum_norm, max_seq_len 16


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "seq_mean_token_sum_norm"])
def test_skyrl_is_float64s(reduction: str) -> None:
    student, weight = logits(3, 9, V, seed=7), skyrl_weight(reduction)
    exact = graded(lambda z: (reverse_kl_of_actions(z) * ACTIONS * weight).sum(), *wide(student))
    error = bound(student, TEACHER, temperature=TEMPERATURE)
    share = weight.max().item()
    assert_agree(graded(lambda z: skyrl(z, weight), student), exact, error, share=share)


def test_what_openrlhf_and_skyrl_cannot_do_raises() -> None:
    packed = logits(1, 27, V, seed=7).requires_grad_()
    with pytest.raises(NotImplementedError, match="packed"):
        openrlhf(packed)
    with pytest.raises(NotImplementedError, match="packed"):
        skyrl(packed, skyrl_weight("token_mean"))
    student = logits(3, 9, V, seed=7).requires_grad_()
    with pytest.raises(NotImplementedError, match="use_kl_loss"):
        skyrl(student, skyrl_weight("token_mean"), use_kl_loss=True)


# verl-recipe's gkd: "kl" is truncated, "rkl" renormalised. Its backward is written by hand, for one
# rank's columns. Entries of other ranks are worth 0, and at column 0.

GKD = {
    "kl": {"divergence": "forward_kl", "outside": "truncate"},
    "rkl": {"divergence": "reverse_kl", "outside": "renormalize"},
}


def gkd_loss(name: str, z: Tensor, logq: Tensor, ids: Tensor) -> Tensor:
    """The sum over rows."""
    if name == "kl":
        return (logq.exp() * (logq - z.log_softmax(-1).gather(-1, ids))).sum()
    return jensen_shannon(z.gather(-1, ids).log_softmax(-1), logq.log_softmax(-1), 1.0).sum()


def gkd_gradient(name: str, z: Tensor, logq: Tensor, ids: Tensor, ranks: int) -> Tensor:
    """As the lines of gkd write it on each rank, side by side."""
    if name == "kl":
        dense, entries = z.softmax(-1), -logq.exp()
    else:
        logp = z.gather(-1, ids).log_softmax(-1)
        slope = logp - logq.log_softmax(-1)
        entries = logp.exp() * (slope - (logp.exp() * slope).sum(-1, keepdim=True))
        dense = torch.zeros_like(z)
    width, row = z.shape[-1] // ranks, torch.arange(len(z))[:, None]
    shards = []
    for start in range(0, z.shape[-1], width):
        inside = (ids >= start) & (ids < start + width)
        shard = dense[:, start : start + width].clone()
        # An id that is there twice is written twice; it is not added up.
        shard[row, (ids - start).masked_fill(~inside, 0)] += entries.masked_fill(~inside, 0.0)
        shards.append(shard)
    return torch.cat(shards, -1)


def gkd_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """float64; every row has the second rank's first token, and ids of both ranks after it."""
    student, teacher = logits(8, 60, seed=0).double(), logits(8, 60, seed=1).double()
    teacher[:, 30], teacher[:, 0] = teacher.max() + 1, teacher.min()
    logq, ids = teacher.log_softmax(-1).topk(12)
    assert ((ids < 30).any(-1) & (ids >= 30).any(-1)).all()
    return student, logq, ids


def ours_on_a_rank(group: Any, name: str) -> tuple[Tensor, Tensor]:
    student, logq, ids = gkd_inputs()
    start = 30 * torch.distributed.get_rank(group)
    teacher = TopK(ids, logq, logsumexp=torch.zeros(len(ids), dtype=torch.float64))
    options: dict[str, Any] = {**GKD[name], "vocab_shard": VocabShard(start, 60, group)}
    loss, (grad,) = graded(
        lambda z: topk_divergence(z, teacher, reduction="sum", **options),
        student[:, start : start + 30],
    )
    return loss, grad


@pytest.mark.parametrize("name", GKD)
def test_gkd_at_tp_2_loses_the_gradient_of_the_token_at_local_column_0(
    pool: Pool, name: str
) -> None:
    student, logq, ids = gkd_inputs()
    whole, halves = (gkd_gradient(name, student, logq, ids, ranks) for ranks in (1, 2))
    other = torch.arange(60) != 30
    torch.testing.assert_close(halves[:, other], whole[:, other])
    without = student.softmax(-1)[:, 30] if name == "kl" else torch.zeros(8, dtype=torch.float64)
    torch.testing.assert_close(halves[:, 30], without)
    assert (halves - whole).norm() > 0.1 * whole.norm()

    exact = graded(lambda z: gkd_loss(name, z, logq, ids), student)
    ranks = pool.run(ours_on_a_rank, name)
    found = (ranks[0][0], [torch.cat([grad for _, grad in ranks], -1)])
    assert_agree(found, exact, bound(student, logq, dtype=torch.float64))


def test_gkds_forward_gradient_is_not_that_of_its_loss() -> None:
    """Which is Q p - q: the entries hold Q < 1 of the teacher. gkd's is p - q."""
    student, logq, ids = gkd_inputs()
    (exact,) = graded(lambda z: gkd_loss("kl", z, logq, ids), student)[1]
    held = logq.exp().sum(-1, keepdim=True)
    assert held.max() < 0.999
    difference = gkd_gradient("kl", student, logq, ids, 1) - exact
    torch.testing.assert_close(difference, (1 - held) * student.softmax(-1))
    (exact,) = graded(lambda z: gkd_loss("rkl", z, logq, ids), student)[1]
    torch.testing.assert_close(gkd_gradient("rkl", student, logq, ids, 1), exact)
