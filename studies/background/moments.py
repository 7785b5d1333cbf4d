"""Noise, signal and bias of an estimator on a pair, summed over each prompt's rows; intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from background.estimators import Estimator, nucleus
from background.pair import Pair
from torch import Tensor

from opd_kernels import LinearLogits, select_topk, topk_divergence

Make = Callable[..., Estimator]  # from log-probs of student and teacher
BATCH = 16  # prompts of a step, as in the demo
DRAWS = ("top_p", "stale")
RESAMPLES = 2000
PIECE = 64


@dataclass
class Squares:
    """Squared norms of vectors that each row has, n prompts.

    ``head`` are the inner products of what the prompts add to the head's gradient.
    """

    logits: Tensor  # (n,)
    hidden: Tensor  # (n,)
    head: Tensor  # (n, n)

    @classmethod
    def of(cls, rows: Tensor, pair: Pair) -> Squares:
        """Of gradients by the logits, (N, V)."""
        products = (rows @ rows.T) * (pair.student @ pair.student.T)
        across = _by_prompt(products, pair.prompt)
        return cls(
            _by_prompt(rows.square().sum(-1).double(), pair.prompt),
            _by_prompt((rows @ pair.head).square().sum(-1).double(), pair.prompt),
            _by_prompt(across.T.contiguous(), pair.prompt).double(),
        )

    def resampled(self, counts: Tensor) -> dict[str, Tensor]:
        """Means by space where prompts count so often, (R, n), of n in all.

        Sums over a prompt's tokens; of the head, a batch's squared norm over its prompts. Pairs of
        different prompts stand for the pairs of a batch.
        """
        n = counts.shape[-1]
        alone = self.head.diag()
        crossed = ((counts @ (self.head - alone.diag())) * counts).sum(-1) / (n * (n - 1))
        return {
            "logits": counts @ self.logits / n,
            "hidden": counts @ self.hidden / n,
            "head": counts @ alone / n + (BATCH - 1) * crossed,
        }


@dataclass
class Moments:
    """Of one estimator: the exact gradient, the covariance's trace, the distance of each mean."""

    signal: Squares
    noise: dict[str, Tensor]  # (n,), by space
    bias: dict[str, Squares]  # by draw


class Measurement:
    """A pair's log-probs, and what estimators do on them."""

    def __init__(self, pair: Pair, top_p: float) -> None:
        """Read the head, once for the student, the stale student and the teacher."""
        self.pair = pair
        self.log_p, self.log_old, self.log_q = (
            (hidden @ pair.head.T).double().log_softmax(-1)
            for hidden in (pair.student, pair.stale, pair.teacher)
        )
        self.nucleus = torch.cat([nucleus(rows, top_p) for rows in self.log_p.split(PIECE)])

    def moments(self, make: Make, make_stale: Make | None = None) -> Moments:
        """Sums over y of an estimator, row by row, then over prompts.

        `make_stale` also takes the log-probs of the policy that made a stale rollout; without it
        the estimator does not know of them.
        """
        exact, top_p, stale = (torch.empty_like(self.log_p, dtype=torch.float32) for _ in range(3))
        noise = []
        for start in range(0, len(self.log_p), PIECE):
            piece = slice(start, start + PIECE)
            log_p, log_q, log_old = (x[piece] for x in (self.log_p, self.log_q, self.log_old))
            estimator = make(log_p, log_q)
            other = make_stale(log_p, log_q, log_old) if make_stale else estimator
            mean = estimator.mean(log_p.exp())
            noise.append(torch.stack(estimator.noise(self.pair.head)))
            exact[piece] = mean
            top_p[piece] = estimator.mean(self.nucleus[piece]) - mean
            stale[piece] = other.mean(log_old.exp()) - mean
        logits, hidden = torch.cat(noise, -1)
        by_space = {
            "logits": logits,
            "hidden": hidden,
            "head": logits * self.pair.student.double().square().sum(-1),
        }
        return Moments(
            Squares.of(exact, self.pair),
            {space: _by_prompt(rows, self.pair.prompt) for space, rows in by_space.items()},
            {
                draw: Squares.of(rows, self.pair)
                for draw, rows in zip(DRAWS, (top_p, stale), strict=True)
            },
        )


def resampled(
    measurement: Measurement, moments: Moments, draws: int, *, k: int, divergence: str, outside: str
) -> dict[str, float]:
    """Noise of the head's gradient as the package gives it for tokens that are drawn, over the sum.

    With two standard errors over the draws to each side. Float32.
    """
    pair, p = measurement.pair, measurement.log_p.exp()
    head = pair.head.clone().requires_grad_()
    teacher = select_topk(LinearLogits(pair.teacher, pair.head), k, with_logsumexp=True)
    logsumexp = (pair.student @ pair.head.T).logsumexp(-1)
    generator = torch.Generator().manual_seed(0)

    def gradient(**options: object) -> Tensor:
        loss = topk_divergence(
            LinearLogits(pair.student, head),
            teacher,
            divergence=divergence,
            outside=outside,
            reduction="sum",
            **options,
        )
        return torch.autograd.grad(loss, head)[0]

    exact = gradient()
    found = []
    for _ in range(draws):
        tokens = p.multinomial(1, generator=generator)[:, 0]
        sampled = gradient(background="sampled", token_ids=tokens, student_logsumexp=logsumexp)
        found.append((sampled - exact).square().sum().double())
    ratios = torch.stack(found) / moments.noise["head"].sum()
    mean, error = ratios.mean().item(), 2 * (ratios.var() / draws).sqrt().item()
    return {
        "resampled": mean,
        "resampled_low": mean - error,
        "resampled_high": mean + error,
    }


def table_rows(moments: Moments, token: Moments) -> list[dict[str, str | float]]:
    """An estimator's figures in each space, beside those of the sampled-token loss.

    Each is followed by its 95 % interval, percentiles of a bootstrap over prompts.
    """
    counts = _resamples(len(moments.signal.logits))
    signals, rows = moments.signal.resampled(counts), []
    for space, signal in signals.items():
        noise = counts @ moments.noise[space]
        row: dict[str, str | float] = {"space": space}
        _add(row, "noise_over_signal", noise / counts.shape[-1] / signal)
        _add(row, "of_sampled_token", noise / (counts @ token.noise[space]))
        for draw, squares in moments.bias.items():
            ratio = squares.resampled(counts)[space] / signal
            _add(row, f"bias_{draw}", ratio.clamp(min=0).sqrt())
        rows.append(row)
    return rows


def _resamples(prompts: int) -> Tensor:
    """How often each prompt counts, (1 + RESAMPLES, n); once each in the first row."""
    drawn = torch.randint(prompts, (RESAMPLES, prompts), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(drawn.shape, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    return torch.cat([torch.ones_like(counts[:1]), counts])


def _add(row: dict[str, str | float], name: str, values: Tensor) -> None:
    low, high = values[1:].quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    row |= {name: values[0].item(), f"{name}_low": low, f"{name}_high": high}


def _by_prompt(rows: Tensor, prompt: Tensor) -> Tensor:
    """Sums over the rows of each prompt, (n, ...)."""
    sums = rows.new_zeros(int(prompt.max()) + 1, *rows.shape[1:])
    return sums.index_add_(0, prompt, rows)
