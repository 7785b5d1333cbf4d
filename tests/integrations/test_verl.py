"""The loss modes for verl, by verl's calling convention: formulas restated in float64.

tests/peers/verl compares with verl itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import verl_standin
from formulas import full, kl, mixture, renormalised, with_tail
from peer_checks import assert_agree, bound, graded
from rank_pool import Pool
from torch import Tensor
from verl_standin import OWN, Engine, LossConfig

from opd_kernels.integrations import verl
from opd_kernels.integrations.verl import LOSSES, MODES, topk_losses

V, K = 60, 4
FLOORS = (None, -3.0)
# Two sequences, their responses, and which tokens of these count.
LENGTHS, RESPONSES = (7, 5), (4, 2)
MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0]])
UNDER_FSDP, UNDER_MEGATRON = (SimpleNamespace(strategy=name) for name in ("fsdp2", "megatron"))


def inputs(seed: int = 0, rows: tuple[int, ...] = (1, sum(LENGTHS))) -> tuple[Tensor, ...]:
    """Tempered student logits, and the teacher's K best: log-probs and ids int32."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 2 * torch.randn(*rows, V, generator=generator)
    student = (teacher + 2 * torch.randn(*rows, V, generator=generator)) / 0.7
    logprobs, ids = teacher.log_softmax(-1).topk(K)
    return student, logprobs, ids.int()


def sequences(tensor: Tensor) -> Tensor:
    """Rows (1, n, ...) as a nested tensor of two sequences, which is how verl holds them."""
    parts = list(tensor[0].split(list(LENGTHS)))
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def batch(logprobs: Tensor, ids: Tensor, **more: Any) -> dict[str, Any]:
    teacher = {"teacher_logprobs": sequences(logprobs), "teacher_ids": sequences(ids)}
    return {**teacher, "responses": RESPONSES, "response_mask": MASK, **more}


def configured(mode: str, **options: Any) -> SimpleNamespace:
    return SimpleNamespace(distillation_loss=LossConfig(mode, **options))


def restated(name: str, student: Tensor, logprobs: Tensor, ids: Tensor, floor: float | None) -> Any:
    """A mode's losses by its formula; the teacher's log-probs are of the whole vocabulary."""
    ids = ids.long()
    if name.endswith("_bucket"):
        logp = with_tail(student, ids)
        rest = torch.log1p(-logprobs.exp().sum(-1, keepdim=True))
        logq = torch.cat([logprobs, rest], -1)
    elif name.endswith(("_truncate", "_generalize")):
        logp, logq = full(student, ids), logprobs
    else:
        logp, logq = renormalised(student, ids), logprobs.log_softmax(-1)
    if floor is not None:
        logp, logq = (x.clamp(min=floor) for x in (logp, logq))
    if "_jsd" in name:
        m = mixture(logp, logq, 0.5)
        return (kl(logp, m) + kl(logq, m)) / 2
    if "_forward_kl" in name:
        return kl(logq, logp)
    more = (logq.exp() - logp.exp()).sum(-1) if name.endswith("_generalize") else 0
    return kl(logp, logq) + more


def restated_statistics(
    student: Tensor, logprobs: Tensor, ids: Tensor, floor: float | None
) -> dict[str, Tensor]:
    """As verl computes them; ties in the student's order go to the lower id."""
    ids = ids.long()
    logp = full(student, ids)
    order = student.argsort(dim=-1, descending=True, stable=True)[..., : ids.shape[-1]]
    shared = (ids[..., None] == order[..., None, :]).any(-1)
    a, b = (x if floor is None else x.clamp(min=floor) for x in (logp, logprobs))
    gain = torch.where(shared, b.exp() * (a - b), 0).sum(-1)
    return {
        "student_mass": logp.exp().sum(-1),
        "teacher_mass": logprobs.exp().sum(-1),
        "overlap_count": shared.sum(-1),
        "overlap_token_advantage": gain / shared.sum(-1).clamp(min=1),
    }


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """verl's module of losses, with the modes in it."""
    module = verl_standin.install(monkeypatch)
    verl.register()
    return module


@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_its_formula(mode: str, dtype: torch.dtype, floor: float | None) -> None:
    student, logprobs, ids = inputs()
    student = student.to(dtype)
    weight = torch.linspace(-1, 2, student.shape[1])
    found = graded(
        lambda x: (
            topk_losses(x, logprobs, ids, MODES[mode], log_prob_min_clamp=floor)[LOSSES] * weight
        ).sum(),
        student,
    )
    expected = graded(
        lambda x: (restated(mode, x, logprobs.double(), ids, floor) * weight).sum(),
        student.double(),
    )
    # The served log-probs leave the tail to float32, as docs/divergences.md says.
    error = 2 * bound(student, logprobs)
    assert expected[1][0].abs().max() > 100 * error
    assert_agree(found, expected, error)


@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_verls(dtype: torch.dtype, floor: float | None) -> None:
    student, logprobs, ids = inputs(rows=(3, 50))
    student = (student if dtype == torch.float32 else student.round()).to(dtype)  # ties
    mode = MODES["opd_topk_reverse_kl"]
    found = topk_losses(student, logprobs, ids, mode, log_prob_min_clamp=floor)
    expected = restated_statistics(student.double(), logprobs.double(), ids, floor)
    assert set(found) == {LOSSES, *expected}
    assert len(set(expected["overlap_count"].flatten().tolist())) > 2
    for name, values in expected.items():
        error = 0 if name == "overlap_count" else bound(student, logprobs)
        torch.testing.assert_close(found[name].double(), values.double(), rtol=0, atol=error)
        assert not found[name].requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_order_width_and_strides_of_the_inputs_do_not_matter(mode: str) -> None:
    student, logprobs, ids = inputs()
    expected = topk_losses(student, logprobs, ids, MODES[mode])

    # The sampled token comes first in addition to the K best, in any order; ids are int64.
    more, those = student.new_full((*student.shape[:2], 1), -30.0), ids[..., :1] * 0 + V - 1
    present = (ids == V - 1).any(-1, keepdim=True)
    wider = torch.cat([more.masked_fill(present, -math.inf), logprobs.flip(-1)], -1)
    listed = torch.cat([those, ids.flip(-1)], -1).long()
    buffer = torch.full((student.shape[1], 3, V), math.nan)
    buffer[:, 1] = student[0]
    strided = buffer[:, 1][None]
    found = topk_losses(strided, wider, listed, MODES[mode], topk=K)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_absent_entries_and_filler_rows_take_no_part(mode: str) -> None:
    student, logprobs, ids = inputs()
    logprobs, ids = logprobs.clone(), ids.clone()
    logprobs[0, 3, 2:] = -math.inf
    ids[0, 4, 1] = V + 7  # the teacher's vocabulary is larger
    logprobs[0, 5] = -math.inf  # no entry at all
    logprobs[0, 6], ids[0, 6] = 0.0, 0  # what verl fills up with
    student[0, 6] = math.inf
    student.requires_grad_()
    found = topk_losses(student, logprobs, ids, MODES[mode], log_prob_min_clamp=-9.0)
    (grad,) = torch.autograd.grad(found[LOSSES].sum(), student)
    for values in found.values():
        assert values.isfinite().all()
        assert (values[0, 5:7] == 0).all()
    assert grad.isfinite().all()
    assert (grad[0, 5:7] == 0).all()

    # Row 3 has two entries, row 4 those but the second.
    kept = [topk_losses(student[:, 3:4], logprobs[:, 3:4, :2], ids[:, 3:4, :2], MODES[mode])]
    others = torch.tensor([0, 2, 3])
    part = (logprobs[:, 4:5, others], ids[:, 4:5, others])
    kept.append(topk_losses(student[:, 4:5], *part, MODES[mode]))
    without_floor = topk_losses(student, logprobs, ids, MODES[mode])
    for row, alone in zip((3, 4), kept, strict=True):
        for name in (LOSSES, "teacher_mass", "student_mass"):
            torch.testing.assert_close(without_floor[name][0, row], alone[name][0, 0])


def test_only_filler_has_loss_and_gradient_zero() -> None:
    student = torch.full((2, 3, V), math.nan, requires_grad=True)
    filler = torch.zeros(2, 3, K)
    found = topk_losses(student, filler, filler.int(), MODES["opd_topk_jsd_bucket"])
    (grad,) = torch.autograd.grad(found[LOSSES].sum(), student)
    assert all((values == 0).all() for values in (*found.values(), grad))


@pytest.mark.parametrize("k", [1, K])
def test_a_teacher_that_is_certain_is_no_filler(k: int) -> None:
    """Its sampled token may be listed twice."""
    student, logprobs, ids = inputs()
    logprobs[..., 0], logprobs[..., 1:] = 0.0, -40.0
    logprobs[..., 1], ids[..., 1] = logprobs[..., 0], ids[..., 0]
    mode = MODES["opd_topk_forward_kl_truncate"]
    found = topk_losses(student, logprobs[..., :k], ids[..., :k], mode)
    expected = -full(student, ids[..., :1].long())[..., 0]
    torch.testing.assert_close(found[LOSSES], expected, rtol=0, atol=bound(student, logprobs))


@pytest.mark.parametrize("mode", MODES)
def test_both_calls_of_verl_under_fsdp(losses: ModuleType, mode: str) -> None:
    """Forward computes the losses of packed rows, and the loss takes those of the responses."""
    student, logprobs, ids = inputs()
    config, data = configured(mode, log_prob_min_clamp=-3.0), batch(logprobs, ids)

    def loss(logits: Tensor) -> Tensor:
        found = losses.compute_topk_loss(UNDER_FSDP, config, data, logits, "thd")
        output = {name: sequences(values) for name, values in found.items()}
        rows, metrics = verl._final_loss(UNDER_FSDP, config, output, data)
        assert metrics == {"distillation/student_mass": pytest.approx(mass, rel=1e-5)}
        return (rows * MASK).sum() / MASK.sum()

    def expected(logits: Tensor) -> Tensor:
        rows = sequences(restated(mode, logits, logprobs.double(), ids, -3.0))
        return (verl_standin.no_padding_2_padding(rows, data) * MASK).sum() / MASK.sum()

    statistics = restated_statistics(student.double(), logprobs.double(), ids, -3.0)
    masses = verl_standin.no_padding_2_padding(sequences(statistics["student_mass"]), data)
    mass = masses[MASK.bool()].mean().item()
    assert_agree(
        graded(loss, student),
        graded(expected, student.double()),
        2 * bound(student, logprobs),
        1 / MASK.sum().item(),
    )


def test_a_sequence_parallel_rank_gets_its_part_of_the_teacher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, logprobs, ids = inputs()
    mode, ranks = "opd_topk_reverse_kl_bucket", 5
    whole = topk_losses(student, logprobs, ids, MODES[mode])[LOSSES][0]
    rows = -(-whole.shape[0] // ranks)
    padded = torch.nn.functional.pad(student, (0, 0, 0, rows * ranks - whole.shape[0]))
    found = []
    for rank in range(ranks):
        losses = verl_standin.install(monkeypatch, Engine(sequence_parallel=(rank, ranks)))
        verl.register()
        part = padded[:, rank * rows : (rank + 1) * rows]
        data = batch(logprobs, ids)
        found.append(
            losses.compute_topk_loss(UNDER_FSDP, configured(mode), data, part, "thd")[LOSSES][0]
        )
    torch.testing.assert_close(torch.cat(found)[: whole.shape[0]], whole, rtol=0, atol=0)


def test_megatrons_unpacked_rows(losses: ModuleType) -> None:
    """(B, T, V): sequences are filled up to the longest."""
    student, logprobs, ids = inputs()
    mode = "opd_topk_forward_kl_bucket"
    packed = topk_losses(student, logprobs, ids, MODES[mode])[LOSSES]
    unpacked = sequences(student).to_padded_tensor(1.0)
    data = batch(logprobs, ids)
    found = losses.compute_topk_loss(UNDER_MEGATRON, configured(mode), data, unpacked, "bshd")
    expected = sequences(packed).to_padded_tensor(0.0)
    torch.testing.assert_close(found[LOSSES], expected, rtol=0, atol=0)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


def test_two_tensor_parallel_ranks_have_one_processs_loss_and_gradient(pool: Pool) -> None:
    """Counted once, on each rank for its own columns: no factor of the number of ranks."""
    lengths = [length + length % 2 for length in LENGTHS]
    student, _, _ = inputs(rows=(1, sum(lengths)))
    _, logprobs, ids = inputs()
    teacher = sequences(logprobs), sequences(ids)
    for results in pool.run(verl_standin.on_rank, list(MODES), student, teacher, limit=60):
        for found, grad, expected, expected_grad in results:
            error = bound(student, logprobs)
            for values, exact in zip(found, expected, strict=True):
                torch.testing.assert_close(values, exact, rtol=0, atol=error)
            assert expected_grad.abs().max() > 1e-2
            torch.testing.assert_close(grad, expected_grad, rtol=0, atol=4 * error)


class InPlace(torch.autograd.Function):
    """A cross entropy that uses the logits' memory where autograd does not see it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, where: str) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.where = where
        if where == "forward":
            logits.data.fill_(7.0)
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        if ctx.where == "backward":
            logits.data.fill_(7.0)
        return torch.zeros_like(logits), None


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("mode", MODES)
def test_a_log_prob_that_overwrites_the_logits_leaves_the_gradient(
    losses: ModuleType, mode: str, where: str
) -> None:
    student, logprobs, ids = inputs()
    data = batch(logprobs, ids)

    def gradient(overwritten: bool) -> Tensor:
        leaf = student.clone().requires_grad_()
        logits = leaf * 1.0
        found = losses.compute_topk_loss(UNDER_FSDP, configured(mode), data, logits, "thd")
        loss = found[LOSSES].sum()
        if overwritten:
            loss = InPlace.apply(logits, where) + loss
        return torch.autograd.grad(loss, leaf)[0]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=0, atol=0)


def test_logits_are_copied_only_where_they_may_be_overwritten(losses: ModuleType) -> None:
    student, logprobs, ids = inputs()
    full_softmax, renormalize = (MODES[f"opd_topk_jsd{end}"] for end in ("_bucket", ""))
    trained = student.requires_grad_()
    shared = batch(logprobs, ids)
    alone = batch(logprobs, ids, distillation_only=True)
    assert verl._kept(trained, shared, full_softmax) is not trained
    assert verl._kept(trained, shared, renormalize) is trained
    assert verl._kept(trained, alone, full_softmax) is trained
    evaluated = student.detach()
    assert verl._kept(evaluated, shared, full_softmax) is evaluated


def test_negative_losses_keep_their_gradient(losses: ModuleType) -> None:
    """verl's own function raises them to 0, which takes it away."""
    student, logprobs, ids = inputs()
    student = (3 * student).requires_grad_()  # more on the support than the teacher has there
    config, data = configured("opd_topk_forward_kl_truncate"), batch(logprobs, ids)
    found = losses.compute_topk_loss(UNDER_FSDP, config, data, student, "thd")
    found[LOSSES] = found[LOSSES] - 2
    output = {name: sequences(values) for name, values in found.items()}
    rows, _ = verl._final_loss(UNDER_FSDP, config, output, data)
    clamped, _ = losses.compute_forward_kl_topk(
        UNDER_FSDP, config, {**output, "distillation_losses": output[LOSSES]}, data
    )
    negative = rows < 0
    assert negative[MASK.bool()].any()
    grads = [
        torch.autograd.grad(values[negative].sum(), student, retain_graph=True)[0]
        for values in (rows, clamped)
    ]
    assert grads[0].abs().max() > 1e-3
    assert not grads[1].any()


def test_verls_own_modes_stay_verls(losses: ModuleType) -> None:
    student, logprobs, ids = inputs()
    data = batch(logprobs, ids)
    found = losses.compute_topk_loss(UNDER_FSDP, configured(OWN), data, student, "thd")
    assert set(found) == {"distillation_losses"}


def test_registering_twice_changes_nothing(losses: ModuleType) -> None:
    wrapped = losses.compute_topk_loss
    verl.register()
    assert losses.compute_topk_loss is wrapped


def test_more_modes_can_be_registered(losses: ModuleType) -> None:
    student, logprobs, ids = inputs()
    mode = verl.Mode(MODES["opd_topk_jsd"].divergence._replace(beta=0.1), "bucket")
    verl.register({"mine": mode})
    data = batch(logprobs, ids)
    found = losses.compute_topk_loss(UNDER_FSDP, configured("mine"), data, student, "thd")
    expected = topk_losses(student, logprobs, ids, mode)
    torch.testing.assert_close(found[LOSSES], expected[LOSSES], rtol=0, atol=0)
    with pytest.raises(ValueError, match="already registered"):
        verl.register({"mine": MODES["opd_topk_jsd"]})


def test_what_is_not_ours_raises(losses: ModuleType) -> None:
    student, logprobs, ids = inputs()
    mode, data = "opd_topk_jsd", batch(logprobs, ids)
    for strategy, options, error, message in (
        ("fsdp", {"use_policy_gradient": True}, ValueError, "use_policy_gradient=False"),
        ("torchtitan", {}, NotImplementedError, "torchtitan"),
    ):
        actor = SimpleNamespace(strategy=strategy)
        with pytest.raises(error, match=message):
            losses.compute_topk_loss(actor, configured(mode, **options), data, student, "thd")
    fused = {"distillation_losses": sequences(student[..., 0])}
    with pytest.raises(ValueError, match="use_fused_kernels=False"):
        verl._final_loss(UNDER_FSDP, configured(mode), fused, data)


def test_another_verl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = verl_standin.install(monkeypatch)
    own = losses.compute_topk_loss
    losses.compute_topk_loss = lambda config, data: own
    with pytest.raises(ImportError, match=r"verl 0\.9\.1"):
        verl.register()
    assert not verl._registered
