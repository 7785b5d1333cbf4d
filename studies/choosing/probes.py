"""The mechanism: what each objective does to the mass on the same states, and its noise."""

from __future__ import annotations

from typing import Any

import torch
from choosing.arms import BUCKET
from choosing.pair import ChainPair
from comparison.arms import LSM_TOP_P, SAMPLED_TOKEN, Scores
from comparison.rollouts import Rollouts
from comparison.training import MICRO_BATCHES, observe, score
from comparison.vocabulary import IDS, STUDENT_END, TEACHER_END, TEACHER_VOCAB
from torch import Tensor

PROBED = {"lsm": LSM_TOP_P.loss, "bucket": BUCKET.loss, "sampled": SAMPLED_TOKEN.loss}


def watch(scores: Scores) -> dict[str, Tensor]:
    """What the comparison watches, and the drift of the mass under LSM and the bucket."""
    return {
        **observe(scores),
        **{f"drift_{name}": drift(scores, name) for name in ("lsm", "bucket")},
    }


def drift(scores: Scores, objective: str) -> Tensor:
    """How fast the mass P of each row grows if its logits follow the objective's gradient g.

    dP/dt = - sum_j dP/dz_j g_j = - (sum over S of p_j g_j - P sum_j p_j g_j)
    """
    logits = scores.student.detach().float().requires_grad_()
    alone = Scores(logits, scores.teacher, scores.tokens, scores.k, scores.banned)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(PROBED[objective](alone).sum(), logits)
    moved = logits.detach().softmax(-1) * gradient
    ids = scores.support.ids.long()
    mass = logits.detach().softmax(-1).gather(-1, ids).sum(-1)
    return mass * moved.sum(-1) - moved.gather(-1, ids).sum(-1)


def probe(pair: ChainPair, batch: Rollouts) -> list[dict[str, Any]]:
    """One row for each objective: its gradient by all weights on a batch, without a step.

    ``drift`` is the growth of the batch's mean mass for a step of length 1 against the gradient;
    ``signal`` the squared norm of the expected gradient, without the noise of the micro-batches,
    ``token_variance`` their variance as that of one token. Signal to noise at n tokens is n times
    the first over the second.
    """
    parameters = [p for p in pair.student.parameters() if p.requires_grad]
    size = len(batch) // MICRO_BATCHES
    parts = [batch[i : i + size] for i in range(0, len(batch), size)]
    gradients: dict[str, list[Tensor]] = {name: [] for name in (*PROBED, "mass")}
    counts, places = [], []
    for part in parts:
        scores = score(pair, part, ())
        counts.append(len(scores.tokens))
        mass = scores.log_probs[0].gather(-1, scores.support.ids.long()).exp().sum(-1)
        rows = {**{name: loss(scores) for name, loss in PROBED.items()}, "mass": mass}
        for name, values in rows.items():
            parts_of = torch.autograd.grad(values.mean(), parameters, retain_graph=True)
            gradients[name].append(torch.cat([g.flatten() for g in parts_of]))
        places.append({"student_mass": mass.detach(), **outside(scores)})
    shares = (torch.tensor(counts) / sum(counts)).to(gradients["mass"][0].dtype)
    of_mass = torch.stack(gradients.pop("mass")).T @ shares
    means = {name: float(torch.cat([p[name] for p in places]).mean()) for name in places[0]}
    return [
        {"objective": name, **_moments(torch.stack(each), shares, of_mass, counts), **means}
        for name, each in gradients.items()
    ]


def _moments(
    gradients: Tensor, shares: Tensor, of_mass: Tensor, counts: list[int]
) -> dict[str, float]:
    """Of n micro-batches' gradients (n, P) with their numbers of tokens and shares w of all N.

    A token's variance is v = N / (n - 1) sum_i w_i |g_i - g|^2; of the squared norm of g, v / N is
    noise.
    """
    mean = gradients.T @ shares
    total, norm = sum(counts), float(mean.norm())
    spread = float(shares @ (gradients - mean).square().sum(1))
    variance = spread * total / (len(counts) - 1)
    return {
        "drift": -float(mean @ of_mass) / max(norm, 1e-12),
        "norm": norm,
        "signal": norm**2 - variance / total,
        "token_variance": variance,
    }


@torch.no_grad()
def outside(scores: Scores) -> dict[str, Tensor]:
    """Where the student's mass outside of the support is: fillers, markup, words, unused rows."""
    left = scores.log_probs[0].detach().exp().scatter(-1, scores.support.ids.long(), 0.0)
    markup = [IDS[STUDENT_END], IDS[TEACHER_END]]
    words = left[:, : len(IDS)].sum(-1) - left[:, markup].sum(-1)
    return {
        "outside_fillers": left[:, TEACHER_VOCAB:].sum(-1),
        "outside_markup": left[:, markup].sum(-1),
        "outside_words": words,
        "outside_unused": left[:, len(IDS) : TEACHER_VOCAB].sum(-1),
    }
