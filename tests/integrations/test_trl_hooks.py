"""The losses of TRL's GKD, GOLD, SDFT and SDPO beside those that take their place."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("trl", reason="what is replaced is TRL's")

from formulas import kl, mixture, renormalised, with_tail
from peer_checks import assert_agree, bound, graded
from trl import DistillationTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.gold import GOLDTrainer
from trl.experimental.iw_opd import IWOPDTrainer
from trl.experimental.sdft import SDFTTrainer, sdft_trainer
from trl.experimental.sdft.loss_utils import compute_topk_self_distillation_loss
from trl.experimental.sdpo import SDPOTrainer, sdpo_trainer

from opd_kernels.integrations.trl import (
    topk_jsd_loss,
    topk_self_distillation_loss,
    use_topk_loss,
)

B, T, V, K = 3, 7, 50, 6
BETAS = [0.0, 0.3, 0.5, 1.0]
OUTSIDE = ["renormalize", "bucket"]
COUNTED = T + 3  # rows with a label
KEPT = (slice(None), slice(1, -1))  # of (B, T, V): rows apart in memory, as trainers pass them


def logits(scale: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(B, T + 2, V, generator=generator, dtype=torch.float64)).to(dtype)


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Student and teacher. In 16 bits the student's logits are a grid, so that none are equal."""
    student, teacher = logits(2.0, 0, dtype), logits(1.5, 1, dtype)
    if dtype == torch.bfloat16:
        student = (logits(1.0, 0).argsort(-1) / 8 - 3).to(dtype)
    return student, teacher


def factors() -> Tensor:
    """What TRL multiplies rows by: importance ratios, at most 1 here, and a mask."""
    mask = torch.arange(T) < torch.tensor([[T], [0], [3]])
    return mask * torch.linspace(0.3, 1.0, B * T).view(B, T)


def labels() -> Tensor:
    """(B, T): one row whole, one without any label, one in part."""
    counted = torch.arange(T) < torch.tensor([[T], [0], [3]])
    return torch.where(counted, torch.arange(B * T).view(B, T), -100)


def options(alpha: float, outside: str) -> dict[str, Any]:
    tail = outside == "bucket"
    return {
        "distillation_topk": K,
        "distillation_alpha": alpha,
        "distillation_add_tail": tail,
    }


def restated(student: Tensor, teacher: Tensor, beta: float, outside: str, ids: Tensor) -> Tensor:
    """A row's loss on given ids; -1 is no entry."""
    if outside == "bucket":
        logp, logq = with_tail(student, ids), with_tail(teacher, ids)
    else:
        logp, logq = renormalised(student, ids), renormalised(teacher, ids)
    if beta in (0, 1):
        return kl(logp, logq) if beta else kl(logq, logp)
    m = mixture(logp, logq, beta)
    return beta * kl(logq, m) + (1 - beta) * kl(logp, m)


def rows_of(function: Callable[..., Tensor], teacher: Tensor, **options: Any) -> Callable[..., Any]:
    """The weighted sum of a function's rows, of the student's slice."""
    return lambda student: (function(student[KEPT], teacher[KEPT], **options) * factors()).sum()


# SDFT and SDPO: the same loss.


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("alpha", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_self_distillation_has_trls_loss_and_gradient(
    alpha: float, outside: str, dtype: torch.dtype
) -> None:
    student, teacher = pair(dtype)
    given = options(alpha, outside)
    found = graded(rows_of(topk_self_distillation_loss, teacher, **given), student)
    exact = rows_of(compute_topk_self_distillation_loss, teacher.double(), **given)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    error = bound(student, teacher, dtype=arithmetic)
    assert found[0].dtype == arithmetic
    assert_agree(found, graded(exact, student.double()), error)


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("alpha", BETAS)
def test_self_distillation_is_the_restated_formula(alpha: float, outside: str) -> None:
    student, teacher = pair()
    found = graded(
        rows_of(topk_self_distillation_loss, teacher, **options(alpha, outside)), student
    )

    def formula(s: Tensor) -> Tensor:
        ids = s.topk(K).indices
        return (restated(s, teacher.double(), alpha, outside, ids)[KEPT] * factors()).sum()

    assert_agree(found, graded(formula, student.double()), bound(student, teacher))


def test_a_row_that_is_masked_afterwards_has_gradient_zero() -> None:
    student, teacher = pair()
    given = options(0.5, "bucket")
    _, (gradient,) = graded(rows_of(topk_self_distillation_loss, teacher, **given), student)
    counted = torch.zeros(B, T + 2, dtype=torch.bool)
    counted[KEPT] = factors() > 0
    assert (gradient[~counted] == 0).all()
    assert (gradient[counted] != 0).any(-1).all()


class Copies(TorchDispatchMode):
    """Sizes of the tensors that are made, other than views of what there is."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.sizes.append(leaf.numel())
        return result


def test_slices_are_not_copied() -> None:
    student, teacher = pair()
    student.requires_grad_()
    calls: list[Callable[[], Tensor]] = [
        lambda: topk_jsd_loss(student[KEPT], teacher[KEPT], labels(), k=K),
        lambda: topk_self_distillation_loss(student[KEPT], teacher[KEPT], **options(0.5, "bucket")),
    ]
    for call in calls:
        with Copies(student, teacher) as copies:
            call()
        assert 0 < max(copies.sizes) < student[KEPT].numel()


# What TRL gets wrong in SDFT and SDPO.


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("alpha", BETAS)
def test_trl_is_not_finite_where_the_teacher_gives_minus_infinity(
    alpha: float, outside: str
) -> None:
    student, teacher = pair()
    best = student.topk(K).indices
    teacher = teacher.scatter(-1, best[..., 1:2], -math.inf)
    given = options(alpha, outside)
    loss, (gradient,) = graded(
        rows_of(compute_topk_self_distillation_loss, teacher, **given), student
    )
    assert not (loss.isfinite() and gradient.isfinite().all())

    found = graded(rows_of(topk_self_distillation_loss, teacher, **given), student)
    ids = best.clone()
    ids[..., 1] = -1

    def formula(s: Tensor) -> Tensor:
        if outside == "bucket":
            return (restated(s, teacher.double(), alpha, outside, ids)[KEPT] * factors()).sum()
        left = torch.cat([best[..., :1], best[..., 2:]], -1)
        return (restated(s, teacher.double(), alpha, outside, left)[KEPT] * factors()).sum()

    assert_agree(found, graded(formula, student.double()), bound(student, teacher))


def test_trl_loses_the_gradient_of_a_tail_below_1e_7() -> None:
    student, teacher = pair(torch.float64)
    best = student.topk(K).indices
    student = student.scatter_add(-1, best, torch.full(best.shape, 30.0, dtype=torch.float64))
    given = options(0.0, "bucket")
    _, (trls,) = graded(rows_of(compute_topk_self_distillation_loss, teacher, **given), student)
    found = graded(rows_of(topk_self_distillation_loss, teacher, **given), student)

    def formula(s: Tensor) -> Tensor:
        return (restated(s, teacher, 0.0, "bucket", best)[KEPT] * factors()).sum()

    exact = graded(formula, student)
    assert_agree(found, exact, bound(student, teacher, dtype=torch.float64))
    # The tail's part of the forward KL's gradient, q, is about 1/2: TRL leaves it out.
    assert (trls - exact[1][0]).abs().max() > 0.1


def test_trl_computes_bfloat16_logits_in_bfloat16() -> None:
    student, teacher = pair(torch.bfloat16)
    given = options(1.0, "bucket")
    exact, _ = graded(
        rows_of(compute_topk_self_distillation_loss, teacher.double(), **given), student.double()
    )
    trls, _ = graded(rows_of(compute_topk_self_distillation_loss, teacher, **given), student)
    found, _ = graded(rows_of(topk_self_distillation_loss, teacher, **given), student)
    assert (trls - exact).abs() > 100 * (found - exact).abs()


def test_of_equal_logits_the_lower_id_enters_where_trl_leaves_it_open() -> None:
    student, teacher = torch.zeros(1, V), logits(1.5, 1)[0, :1]
    rows = topk_self_distillation_loss(student, teacher, **options(1.0, "renormalize"))
    exact = restated(student.double(), teacher.double(), 1.0, "renormalize", torch.arange(K)[None])
    torch.testing.assert_close(rows.double(), exact, rtol=0, atol=bound(student, teacher))


# GKD and GOLD: TRL's loss where the support is the vocabulary, so all else about it is the same.


NORMALISED: list[dict[str, Any]] = [
    {},
    {"labels": labels()},
    {"labels": labels(), "reduction": "sum"},
    {"labels": labels(), "num_items_in_batch": 17},
    {"labels": labels(), "num_items_in_batch": torch.tensor(17)},
    {"reduction": "sum", "temperature": 0.7},
    {"labels": labels(), "temperature": 1.7},
    {"labels": torch.full((B, T), -100)},
]


@pytest.mark.parametrize("given", NORMALISED, ids=lambda given: ", ".join(given) or "none")
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_all_tokens_in_the_support_the_jsd_is_trls(
    beta: float, given: dict[str, Any], dtype: torch.dtype
) -> None:
    student, teacher = pair(dtype)
    given = {"beta": beta} | given
    found = graded(
        lambda s: topk_jsd_loss(s[KEPT], teacher[KEPT], k=V, outside="renormalize", **given),
        student,
    )
    for trainer in (GKDTrainer, GOLDTrainer):
        exact = graded(
            lambda s, own=trainer.generalized_jsd_loss: own(
                s[KEPT], teacher.double()[KEPT], **given
            ),
            student.double(),
        )
        error = bound(student, teacher, temperature=given.get("temperature", 1.0), dtype=dtype)
        assert_agree(found, exact, error)


@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("beta", BETAS)
def test_the_jsd_on_a_support_is_the_restated_formula(
    beta: float, outside: str, support: str
) -> None:
    student, teacher = pair()
    heat = 1.3
    ids = (teacher if support == "teacher" else student).topk(K).indices
    found = graded(
        lambda s: topk_jsd_loss(
            s[KEPT], teacher[KEPT], labels(), beta, heat, k=K, outside=outside, support=support
        ),
        student,
    )

    def formula(s: Tensor) -> Tensor:
        rows = restated(s / heat, teacher.double() / heat, beta, outside, ids)[KEPT]
        return rows[labels() != -100].mean()

    exact = graded(formula, student.double())
    assert_agree(found, exact, bound(student, teacher, temperature=heat), 1 / COUNTED)
    if outside == "bucket":
        whole = GKDTrainer.generalized_jsd_loss(
            student[KEPT], teacher[KEPT], labels(), beta, temperature=heat
        )
        assert 0 < found[0] < whole


def test_rows_without_a_label_may_hold_anything() -> None:
    student, teacher = pair()
    expected = graded(lambda s: topk_jsd_loss(s[KEPT], teacher[KEPT], labels(), k=K), student)
    ignored = torch.zeros(B, T + 2, 1, dtype=torch.bool)
    ignored[KEPT] = (labels() == -100)[..., None]
    broken = [x.masked_fill(ignored, math.nan) for x in (student, teacher)]
    found = graded(lambda s: topk_jsd_loss(s[KEPT], broken[1][KEPT], labels(), k=K), broken[0])
    assert_agree(found, expected, 0.0)
    own = GKDTrainer.generalized_jsd_loss
    _, (gradient,) = graded(lambda s: own(s[KEPT], broken[1][KEPT], labels()), broken[0])
    assert gradient.isnan().any(), "TRL's gradient of such rows is NaN"


@pytest.mark.parametrize("beta", BETAS)
def test_trls_jsd_is_not_finite_where_the_teacher_gives_minus_infinity(beta: float) -> None:
    student, teacher = pair()
    teacher[..., V - 5 :] = -math.inf  # padding of the vocabulary
    own = GKDTrainer.generalized_jsd_loss
    assert not own(student[KEPT], teacher[KEPT], labels(), beta).isfinite()
    found = graded(lambda s: topk_jsd_loss(s[KEPT], teacher[KEPT], labels(), beta, k=K), student)
    ids = teacher.topk(K).indices

    def formula(s: Tensor) -> Tensor:
        rows = restated(s, teacher.double(), beta, "bucket", ids)[KEPT]
        return rows[labels() != -100].mean()

    exact = graded(formula, student.double())
    assert_agree(found, exact, bound(student, teacher), 1 / COUNTED)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_reductions_over_the_vocabulary_are_refused(reduction: str) -> None:
    student, teacher = pair()
    with pytest.raises(ValueError, match=r"reduction is .*allowed are 'batchmean', 'sum'"):
        topk_jsd_loss(student, teacher, reduction=reduction, k=K)
    topk_jsd_loss(student, teacher, reduction=reduction, num_items_in_batch=5, k=K)


# The hooks.


def generalized_jsd(trainer: Any, **options: Any) -> Tensor:
    student, teacher = pair()
    return trainer.generalized_jsd_loss(student[KEPT], teacher[KEPT], labels(), 1.0, **options)


@pytest.mark.parametrize("trainer", [GKDTrainer, GOLDTrainer])
def test_a_trainers_jsd_is_replaced_and_put_back(trainer: Any) -> None:
    before, raw = generalized_jsd(trainer), vars(trainer)["generalized_jsd_loss"]
    student, teacher = pair()
    expected = topk_jsd_loss(student[KEPT], teacher[KEPT], labels(), 1.0, k=K, support="student")
    defaults = topk_jsd_loss(student[KEPT], teacher[KEPT], labels(), 1.0, k=32, outside="bucket")
    with use_topk_loss(trainer, K, support="student"):
        assert generalized_jsd(trainer) == expected != before
        with use_topk_loss(trainer):
            assert generalized_jsd(trainer) == defaults
        assert generalized_jsd(trainer) == expected
    assert generalized_jsd(trainer) == before
    assert vars(trainer)["generalized_jsd_loss"] is raw


def test_a_subclass_is_replaced_alone() -> None:
    class Mine(GKDTrainer):
        pass

    before = generalized_jsd(GKDTrainer)
    hook = use_topk_loss(Mine, K)
    assert generalized_jsd(Mine) != before == generalized_jsd(GKDTrainer)
    hook.close()
    assert "generalized_jsd_loss" not in vars(Mine)
    hook.close()


def test_gold_compares_probabilities_of_other_tokenizers_as_trl_does() -> None:
    student, teacher = (x.softmax(-1) for x in pair())
    arguments = (student, teacher, None, 0.3, 1.0, "batchmean", True)
    expected = GOLDTrainer.generalized_jsd_loss(*arguments)
    with use_topk_loss(GOLDTrainer, K):
        assert GOLDTrainer.generalized_jsd_loss(*arguments) == expected
        with use_topk_loss(GOLDTrainer, K):
            assert GOLDTrainer.generalized_jsd_loss(*arguments) == expected
        logits_alone = GOLDTrainer.generalized_jsd_loss(*pair(), None, 0.3, 1.0, "sum", False, 5)
    assert logits_alone == topk_jsd_loss(*pair(), None, 0.3, num_items_in_batch=5, k=K)


@pytest.mark.parametrize(
    ("trainer", "module"), [(SDFTTrainer, sdft_trainer), (SDPOTrainer, sdpo_trainer)]
)
def test_self_distillation_is_replaced_in_the_trainers_module(trainer: Any, module: Any) -> None:
    class Mine(trainer):
        pass

    own = module.compute_topk_self_distillation_loss
    for given in (trainer, Mine):
        with use_topk_loss(given):
            assert module.compute_topk_self_distillation_loss is topk_self_distillation_loss
        assert module.compute_topk_self_distillation_loss is own


def test_the_parameters_and_defaults_are_trls() -> None:
    def shape(function: Any) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert shape(topk_jsd_loss)[:7] == shape(GKDTrainer.generalized_jsd_loss)
    gold = [entry for entry in shape(GOLDTrainer.generalized_jsd_loss) if "probs" not in entry[0]]
    assert shape(topk_jsd_loss)[:7] == gold
    assert shape(topk_self_distillation_loss) == shape(compute_topk_self_distillation_loss)


@pytest.mark.parametrize("trainer", [DistillationTrainer, IWOPDTrainer, dict])
def test_other_classes_are_refused(trainer: Any) -> None:
    expected = "expected the class GKDTrainer, GOLDTrainer, SDFTTrainer, SDPOTrainer"
    with pytest.raises(TypeError, match=f"trainer is {trainer.__name__}, {expected}"):
        use_topk_loss(trainer)


def test_an_object_is_refused() -> None:
    made = object.__new__(GKDTrainer)
    with pytest.raises(TypeError, match="trainer is an object of class GKDTrainer, expected the"):
        use_topk_loss(made)


def test_options_are_checked_before_the_training() -> None:
    with pytest.raises(ValueError, match="SDFTTrainer takes no k and outside here"):
        use_topk_loss(SDFTTrainer, 64, outside="bucket")
    with pytest.raises(ValueError, match="outside is 'sample', allowed are"):
        use_topk_loss(GKDTrainer, outside="sample")
    with pytest.raises(ValueError, match="support is 'both', allowed are"):
        use_topk_loss(GKDTrainer, support="both")
    with pytest.raises(ValueError, match="k is 0"):
        use_topk_loss(GKDTrainer, 0)


def test_another_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(lambda logits: logits))
    with pytest.raises(ImportError, match=r"this adapter was tested with TRL 1\.16\.0"):
        use_topk_loss(GKDTrainer)
    monkeypatch.setattr(sdft_trainer, "compute_topk_self_distillation_loss", lambda logits: logits)
    with pytest.raises(ImportError, match=r"this adapter was tested with TRL 1\.16\.0"):
        use_topk_loss(SDFTTrainer)
