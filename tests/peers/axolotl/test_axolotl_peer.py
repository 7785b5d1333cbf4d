"""``topk_divergence`` of hidden states against Axolotl 0.19.0's fused loss, and both in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from axolotl.integrations.kd.kernels.liger import LigerFusedLinearKLTopKLogprobLoss
from peer_checks import bound, graded
from torch import Tensor

from opd_kernels import LinearLogits, TopK, topk_divergence
from opd_kernels.integrations._hooks import check_parameters, generalized_jsd

B, S, H, V, K = 2, 12, 32, 90, 8
BETAS = (0.0, 0.25, 0.5, 1.0)
PADDING = -1e9  # what Axolotl's collator writes, with id 0


def eighths(seed: int, *shape: int) -> Tensor:
    """Multiples of 1/8 in [-1, 1]: the head's products are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator) / 8


HIDDEN, HEAD = eighths(0, B, S, H), eighths(1, V, H)


class Batch:
    """As Axolotl's collator makes it: normalised at the temperature, 0 in the mask is padding."""

    def __init__(self, temperature: float = 1.0, ragged: bool = False) -> None:
        self.temperature = temperature
        entries, self.ids = (eighths(2, B, S, H) @ HEAD.T).topk(K)
        self.mask = torch.ones(B, S, K, dtype=torch.int)
        self.mask[:, :3] = 0  # the prompt
        if ragged:
            widths = 2 + torch.arange(B * S).reshape(B, S) % (K - 1)
            self.mask *= torch.arange(K) < widths[..., None]
        there = self.mask.bool()
        scaled = (entries / temperature).masked_fill(~there, -torch.inf)
        self.logprobs = scaled.log_softmax(-1).masked_fill(~there, PADDING)
        self.ids = self.ids.masked_fill(~there, 0)
        self.labels = torch.zeros(B, S, dtype=torch.long)
        # Then no column of the head adds up more than K rows.
        assert self.ids[there].bincount().max() <= K

    def theirs(self, beta: float, normalize: bool = True) -> tuple[Tensor, list[Tensor]]:
        """Axolotl's reported loss, and its gradients of hidden states and head."""
        loss = LigerFusedLinearKLTopKLogprobLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            temperature=self.temperature,
            beta=beta,
            compiled=False,
            chunk_size=7,
            compute_ce_loss=False,
            normalize_topk=normalize,
        )
        return graded(
            lambda x, w: loss(w, x, self.ids, self.logprobs, self.mask, self.labels), HIDDEN, HEAD
        )

    def ours(self, beta: float, normalize: bool = True) -> tuple[Tensor, list[Tensor]]:
        """The same loss by one call."""
        ids = self.ids.masked_fill(self.mask == 0, -1)
        # Where the student's softmax is full, the teacher has no more than these entries.
        whole = torch.zeros(B, S)
        teacher = TopK(ids, self.logprobs, whole, torch.full_like(whole, -torch.inf))

        def loss(hidden: Tensor, head: Tensor) -> Tensor:
            return self.temperature**2 * topk_divergence(
                LinearLogits(hidden, head),
                teacher,
                divergence=generalized_jsd(beta),
                outside="renormalize" if normalize else "truncate",
                temperature=self.temperature,
                teacher_temperature=1.0,
                mask=self.mask.any(-1),
                reduction="sum",
            )

        return graded(loss, HIDDEN, HEAD)

    def exact(
        self, beta: float, normalize: bool = True, padding: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """The formula in float64; ``padding`` keeps it in the student's softmax."""
        there = self.mask.bool()

        def loss(hidden: Tensor, head: Tensor) -> Tensor:
            full = hidden @ head.T / self.temperature
            a, b = full.gather(-1, self.ids), self.logprobs.double()
            total = full if not normalize else a
            if normalize and not padding:
                total = a.masked_fill(~there, -torch.inf)[there.any(-1)]
                total = total.new_zeros(B, S).masked_scatter(there.any(-1), total.logsumexp(-1))
            else:
                total = total.logsumexp(-1)
            a = (a - total[..., None])[there]
            b = b[there]
            m = torch.log(beta * b.exp() + (1 - beta) * a.exp()) if 0 < beta < 1 else None
            forward = (b.exp() * (b - (a if m is None else m))).sum()
            reverse = (a.exp() * (a - (b if m is None else m))).sum()
            share = 1 - beta if m is None else beta
            return self.temperature**2 * (share * forward + (1 - share) * reverse)

        return graded(loss, HIDDEN.double(), HEAD.double())

    def error(self, many: int = K) -> float:
        """Bound of the loss, a sum of B S rows, and of a gradient, sums of ``many`` products.

        They are entries of the logits' gradient, which are off by 4 bounds, and factors of at most
        1; the sum itself is off by less than one bound more for each.
        """
        entries = self.logprobs[self.mask.bool()]
        row = bound(HIDDEN @ HEAD.T, entries[None], temperature=self.temperature)
        assert 5 * many >= B * S
        return 5 * row * many * max(self.temperature**2, 1.0)


def agree(found: tuple[Tensor, Any], expected: tuple[Tensor, Any], error: float) -> None:
    for x, exact in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(x.double(), exact.double(), rtol=0.0, atol=error)
        assert exact.abs().max() > 20 * error


def apart(found: tuple[Tensor, Any], expected: tuple[Tensor, Any], error: float) -> None:
    """Loss and both gradients are off by far more than rounding."""
    for x, exact in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert (x - exact).abs().max() > 10 * error


def test_the_class_takes_what_it_took() -> None:
    check_parameters(
        LigerFusedLinearKLTopKLogprobLoss.__init__,
        [
            "self",
            "weight_hard_loss",
            "weight_soft_loss",
            "temperature",
            "beta",
            "ignore_index",
            "compiled",
            "chunk_size",
            "compute_ce_loss",
            "normalize_topk",
        ],
        "Axolotl 0.19.0",
    )
    check_parameters(
        LigerFusedLinearKLTopKLogprobLoss.forward,
        [
            "self",
            "lm_head_weight",
            "student_hidden_states",
            "target_token_ids",
            "target_logprobs",
            "target_mask",
            "true_labels",
            "student_bias",
        ],
        "Axolotl 0.19.0",
    )


@pytest.mark.parametrize("beta", BETAS)
def test_loss_and_gradients_are_axolotls(beta: float) -> None:
    batch = Batch()
    agree(batch.ours(beta), batch.exact(beta), batch.error())
    agree(batch.theirs(beta), batch.exact(beta), batch.error())


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_so_they_are_with_the_students_full_softmax(beta: float) -> None:
    batch = Batch()
    agree(batch.ours(beta, False), batch.exact(beta, False), batch.error(B * S))
    agree(batch.theirs(beta, False), batch.exact(beta, False), batch.error(B * S))


# What is wrong in Axolotl.


@pytest.mark.parametrize("beta", BETAS)
def test_at_temperature_2_axolotls_gradient_is_a_quarter_of_that_of_its_loss(beta: float) -> None:
    batch = Batch(temperature=2.0)
    exact, theirs = batch.exact(beta), batch.theirs(beta)
    agree(batch.ours(beta), exact, batch.error())
    quarter = [x / 4 for x in exact[1]]
    agree((theirs[0] / 4, theirs[1]), (exact[0] / 4, quarter), batch.error() / 4)
    for x, right in zip(theirs[1], exact[1], strict=True):
        assert (x - right).abs().max() > 10 * batch.error()


@pytest.mark.parametrize("beta", BETAS)
def test_with_ragged_entries_axolotls_student_softmax_has_the_padding_in_it(beta: float) -> None:
    batch = Batch(ragged=True)
    exact, theirs = batch.exact(beta), batch.theirs(beta)
    agree(batch.ours(beta), exact, batch.error())
    agree(theirs, batch.exact(beta, padding=True), batch.error())
    apart(theirs, exact, batch.error())
