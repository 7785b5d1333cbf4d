"""The loss modes against verl 0.9.1 itself: its engines, its loss and its metrics.

Faults of verl's loss that tests here show, each named for it: the clamp at 0 drops gradients; the
truncated forward KL is negative; an entry of -inf makes the loss NaN; an id that the student does
not have raises; Megatron counts floored probabilities in student_mass, and its cross entropy
overwrites logits that another loss may still need.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    DP_SIZE,
    LENGTHS,
    TEMPERATURES,
    TOKENS,
    Inputs,
    configured,
    inputs,
    micro_batch,
    predicting,
    restated_rows,
    under_fsdp,
)
from pages import ROOT
from peer_checks import assert_agree, bound, graded
from ranks import run_ranks
from torch import Tensor
from verl.trainer.distillation import losses
from verl.utils.ulysses import slice_input_tensor
from verl.workers.utils.padding import no_padding_2_padding

from opd_kernels.integrations import verl
from opd_kernels.integrations._hooks import check_parameters

OWN, OURS = "forward_kl_topk", "opd_topk_forward_kl_truncate"
FLOORS = (None, -4.0)
OVERLAP = "distillation/overlap_ratio"
SHARE = DP_SIZE / TOKENS

verl.register()


def final(given: Inputs, mode: str, **options: Any) -> tuple[Tensor, list[Tensor]]:
    return graded(
        lambda logits: under_fsdp(given, mode, logits=logits, **options)[0], given.student
    )


def exact(given: Inputs, floor: float | None = None) -> tuple[Tensor, list[Tensor]]:
    """verl's loss without its clamp at 0, in float64."""
    batch = micro_batch(given)
    mask = batch["response_mask"].to_padded_tensor(0)

    def loss(logits: Tensor) -> Tensor:
        rows = restated_rows(given, logits, floor)["distillation_losses"]
        return (no_padding_2_padding(rows, batch) * mask).sum() / TOKENS * DP_SIZE

    return graded(loss, given.student.double())


def error_of(given: Inputs) -> float:
    return bound(given.student / min(TEMPERATURES), given.logprobs)


def test_what_is_called_takes_what_it_took() -> None:
    """``register`` has looked at what it replaces."""
    from verl.models.mcore import util

    check_parameters(slice_input_tensor, ["x", "dim", "padding", "group"], verl.TESTED)
    for name in ("preprocess_thd_engine", "preprocess_bshd_engine"):
        assert getattr(util, name).__code__.co_varnames[0] == "input_ids"


@pytest.mark.parametrize("floor", FLOORS)
def test_loss_gradient_and_metrics_are_verls_where_it_is_right(floor: float | None) -> None:
    given, options = inputs(), {"log_prob_min_clamp": floor}
    _, expected = under_fsdp(given, OWN, **options)
    assert expected["distillation/loss_min"] > 0  # so nothing is clamped at 0
    error = error_of(given)
    ours = final(given, OURS, **options)
    assert_agree(ours, final(given, OWN, **options), 2 * error, SHARE)
    assert_agree(ours, exact(given, floor), error, SHARE)
    _, metrics = under_fsdp(given, OURS, **options)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=2 * error), name
    assert metrics[OVERLAP] == expected[OVERLAP] > 0


@pytest.mark.parametrize("clamp", [None, 0.5])
def test_verls_upper_clamp_applies(clamp: float | None) -> None:
    given, options = inputs(), {"loss_max_clamp": clamp}
    ours, own = (final(given, mode, **options) for mode in (OURS, OWN))
    assert_agree(ours, own, 2 * error_of(given), SHARE)
    unclamped, _ = exact(given)
    assert (ours[0] < 0.9 * unclamped) == (clamp is not None)


def test_16_bit_logits_are_as_exact_as_float32() -> None:
    given = inputs()
    given = given._replace(student=given.student.to(torch.bfloat16))
    batch, config = micro_batch(given), configured(OURS)

    def loss(logits: Tensor) -> Tensor:
        found = losses.compute_topk_loss(
            **config, data=batch, student_logits=logits, data_format="thd"
        )
        return found[verl.LOSSES].sum() / logits.shape[1]

    def expected(logits: Tensor) -> Tensor:
        logp = logits[0].log_softmax(-1).gather(-1, given.ids.long())
        rows = (given.logprobs.exp() * (given.logprobs - logp)).sum(-1)
        return rows[given.logprobs[:, 1] < 0].sum() / logits.shape[1]

    found = graded(loss, given.student)
    judged = graded(expected, given.student.double())
    assert_agree(found, judged, error_of(given), 1 / sum(LENGTHS))


@pytest.mark.parametrize("mode", verl.MODES)
def test_every_mode_trains_beside_a_task_reward(mode: str) -> None:
    """The policy loss reads the same logits; gradients add up."""
    given = inputs()
    both = {"use_task_rewards": True, "distillation_loss_coef": 0.5}
    sum_, (grad,) = final(given, mode, **both)
    alone, (alone_grad,) = final(given, mode)
    rewards, (rewards_grad,) = final(given, mode, **{**both, "distillation_loss_coef": 0.0})
    torch.testing.assert_close(sum_, rewards + 0.5 * alone)
    torch.testing.assert_close(grad, rewards_grad + 0.5 * alone_grad)
    assert rewards_grad.any()
    assert alone_grad.any()


def test_the_clamp_at_zero_drops_gradients_in_verl() -> None:
    """Where the student is sharper than the teacher. Float64 says that there is one."""
    given = inputs(sharp=True)
    right = exact(given)
    assert_agree(final(given, OURS), right, error_of(given), SHARE)
    _, (clamped,) = final(given, OWN)
    has_none = (clamped[0, predicting()] == 0).all(-1)
    lost = has_none & (right[1][0][0, predicting()] != 0).any(-1)
    assert lost.sum() >= 2
    assert not has_none.all()


def test_the_truncated_forward_kl_is_negative_in_verl() -> None:
    """It is no divergence; with a bucket for the rest of the vocabulary it is one."""
    given = inputs(sharp=True)
    _, metrics = under_fsdp(given, OURS)
    assert metrics["distillation/loss_min"] < -0.01
    _, hidden = under_fsdp(given, OWN)
    assert hidden["distillation/loss_min"] == 0
    for mode in verl.MODES:
        if not mode.endswith("truncate"):
            assert under_fsdp(given, mode)[1]["distillation/loss_min"] > -1e-5


def test_an_entry_of_minus_infinity_makes_the_loss_nan_in_verl() -> None:
    """Without a floor; the clamp takes the row's gradient away."""
    given = inputs()
    row = predicting()[0]
    given.logprobs[row, 4:] = -math.inf
    loss, (grad,) = final(given, OWN)
    assert loss.isnan()
    assert not grad[0, row].any()
    for mode in verl.MODES:
        loss, (grad,) = final(given, mode)
        assert loss.isfinite()
        assert grad.isfinite().all()
        assert grad[0, row].any()


def test_entries_and_vocabularies_that_do_not_fit_raise_in_verl() -> None:
    """A teacher with more ids than the student."""
    given = inputs()
    given.ids[LENGTHS[0] - 3, 0] = 128
    with pytest.raises((RuntimeError, IndexError)):
        final(given, OWN)
    loss, _ = final(given, OURS)
    assert loss.isfinite()


@pytest.mark.parametrize("aggregation", ["token-mean", "token-sum", "seq-mean-token-mean"])
def test_the_normaliser_is_verls(aggregation: str) -> None:
    given, options = inputs(), {"loss_agg_mode": aggregation}
    ours, own = (final(given, mode, **options) for mode in (OURS, OWN))
    assert_agree(ours, own, 2 * error_of(given) * DP_SIZE)


def test_a_masked_token_has_no_gradient() -> None:
    given = inputs()
    _, (grad,) = final(given, "opd_topk_jsd_bucket")
    counted = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    counted[predicting()] = micro_batch(given)["response_mask"].values().bool()
    assert torch.equal(grad[0].abs().sum(-1) > 0, counted)


def test_policy_gradients_of_a_loss_are_refused() -> None:
    with pytest.raises(ValueError, match="use_policy_gradient=False"):
        under_fsdp(inputs(), OURS, use_policy_gradient=True)


# Two tensor-parallel ranks.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("megatron")
    return run_ranks(str(Path(__file__).with_name("megatron_rank.py")), folder, 2)


@pytest.mark.parametrize("floor", FLOORS)
def test_megatrons_loss_gradient_and_metrics_are_verls(
    ranks: list[dict[str, Any]], floor: float | None
) -> None:
    for rank in ranks:
        found = rank[f"floor {floor}"]
        assert found["gradient"] > 1e-2
        for judge in ("", " float64"):
            assert found[f"loss off{judge}"] <= 2 * found["error"]
            assert found[f"gradient off{judge}"] <= 8 * found["error"]
            assert found[f"overlap_count off{judge}"] == 0
            assert found[f"overlap_token_advantage off{judge}"] <= 2 * found["error"]
        assert found["student_mass off float64"] <= found["error"]
        assert found["teacher_mass off float64"] <= found["error"]


@pytest.mark.parametrize("mode", verl.MODES)
def test_a_megatron_mode_is_one_processs(ranks: list[dict[str, Any]], mode: str) -> None:
    for rank in ranks:
        found = rank[mode]
        assert found["gradient"] > 1e-2
        assert found["loss off"] <= 2 * found["error"]
        assert found["gradient off"] <= 8 * found["error"]


def test_megatron_counts_floored_probabilities_in_verls_student_mass(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        plain, floored = rank["floor None"], rank["floor -4.0"]
        assert plain["verl's student_mass off float64"] <= plain["error"]
        assert floored["verl's student_mass off float64"] > 0.01 > 10 * floored["error"]


@pytest.mark.parametrize("mode", verl.MODES)
def test_megatrons_cross_entropy_overwrites_float32_logits(
    ranks: list[dict[str, Any]], mode: str
) -> None:
    """The adapter has a copy where it reads them again."""
    for rank in ranks:
        found = rank[f"overwritten {mode}"]
        assert found["logits changed"] > 1 > found["unchanged"]
        assert found["gradient off"] == 0


# The entry point.


def run_with_entry_point(folder: Path, lines: str, expected: str) -> str:
    """What a process prints that finds pyproject.toml's entry point in an installed package."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(r'\[project\.entry-points\."verl\.plugins"\]\n(\w+) = "([^"]+)"', text)
    assert section
    info = folder / "opd_kernels_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: opd_kernels_plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[verl.plugins]\n{section[1]} = {section[2]}\n")
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "VERL_USE_EXTERNAL_PLUGINS": "auto"}
    done = subprocess.run(
        [sys.executable, "-c", lines],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert expected in done.stdout + done.stderr, done.stdout + done.stderr
    return done.stdout


CONFIGURED = f"""
from verl.workers.config import DistillationLossConfig
print(DistillationLossConfig(loss_mode="{OURS}", use_policy_gradient=False).loss_settings.use_topk)
"""


def test_the_entry_point_registers_the_modes(tmp_path: Path) -> None:
    run_with_entry_point(tmp_path, CONFIGURED, "True")


def test_a_broken_plugin_fails_with_an_unknown_mode(tmp_path: Path) -> None:
    """verl hides why a plugin fails to load."""
    broken = "import opd_kernels.integrations.verl as ours; del ours.register\n"
    run_with_entry_point(tmp_path, broken + CONFIGURED, f"Unsupported loss mode: {OURS}")
