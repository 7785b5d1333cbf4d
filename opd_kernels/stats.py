"""What to watch while distilling: masses of the support, its overlap, entropies."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opd_kernels._arguments import Temperature, compute_dtype, exp, wide_dtype
from opd_kernels._ordering import repeats

__all__ = ["Stats"]


class Stats(NamedTuple):
    """Detached per-row tensors (...), NaN in masked rows; None where they were not asked for.

    With S the support, p = softmax(z / T) and q = softmax(t / T') over all ids of their own side::

        teacher_mass = sum over S of q          student_mass = sum over S of p
        teacher_entropy = -sum of q log q       student_entropy = -sum of p log p      (nats)
        overlap = share of S that is among the K best allowed ids of the other side
        valid_k = how many entries of the support are present

    Dtypes: float32; of float64 inputs masses and entropies are float64. ``mask``, bool (...), says
    which rows count.

    Full softmaxes run over the ids below ``vocab_size``, banned ones included. S is the K entries,
    without a token that ``include_token`` adds. An id listed twice counts twice in ``valid_k`` and
    once elsewhere. A support without a present entry has masses and overlap 0.

    A ``TopK`` teacher has its mass at its own ``temperature``, that of its log-sum-exp, and NaN
    without one. It does not hold its entropy, which is NaN.

    NaN or +inf anywhere in a row makes its masses and its entropy NaN, unlike the loss of
    ``topk_rkl``, which only sees the support. So does a row of only -inf, which is no distribution.

    The loss of ``topk_rkl`` does not see ``student_mass``, because both sides are renormalised:
    watch it.
    """

    teacher_mass: Tensor
    student_mass: Tensor
    overlap: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor
    valid_k: Tensor
    mask: Tensor

    def mean(self) -> Stats:
        """Means over the rows that count, 0-d; NaN if there are none."""
        count = self.mask.sum()

        def mean(values: Tensor | None) -> Tensor | None:
            return None if values is None else torch.where(self.mask, values, 0).sum() / count

        return Stats._make([*map(mean, self[:-1]), self.mask.any()])

    def __repr__(self) -> str:
        """The means, which takes a synchronisation on GPUs, and how many rows they are of."""
        if not isinstance(self.mask, Tensor):  # what a pytree's map made of the tensors
            return f"Stats({', '.join(f'{name}={x!r}' for name, x in self._asdict().items())})"
        try:
            shown = [f"{name}={float(x):.4g}" for name, x in self.mean()._given()]
            rows = f"means of {int(self.mask.sum())} of {self.mask.numel()} rows"
            if not self.mask.ndim:  # one row, or means already
                return f"Stats({', '.join(shown)})"
        except RuntimeError:  # no values: under vmap, or fake tensors
            shown, rows = [name for name, _ in self._given()], f"rows {tuple(self.mask.shape)}"
        return f"Stats({', '.join([*shown, rows])})"

    def _given(self) -> list[tuple[str, Tensor]]:
        return [(n, x) for n, x in zip(NAMES, self, strict=False) if x is not None]


NAMES = Stats._fields[:-1]


def logsumexp(x: Tensor) -> Tensor:
    """That of the last dimension, without MKL as well; -inf of only -inf."""
    top = x.amax(-1, keepdim=True)
    # The largest adds exactly 1.
    more = exp(x - torch.where(top == -torch.inf, 0, top)).sum(-1) - 1
    return top[..., 0] + torch.log1p(more)


class Side(NamedTuple):
    """What is known of one side's rows.

    ``values`` (..., C), the logits at the listed ids, and which of these are ``repeated``; outside
    of the ids the log-sum-exp ``tail`` (...) and the ``entropy`` (...) of the softmax there. Or
    ``logsumexp`` (...) over everything. ``best`` (..., K): its own best ids.

    ``shares``, float64, follow from these: log-probs (..., C) at the listed ids, and the full
    log-sum-exp (...). Both are NaN where the row is no distribution.
    """

    temperature: Temperature | None = None  # of a number, torch.compile would make an input
    values: Tensor | None = None
    repeated: Tensor | None = None
    tail: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    best: Tensor | None = None
    shares: tuple[Tensor, Tensor] | None = None

    def with_shares(self) -> Side:
        """The same, with the shares."""
        assert self.values is not None
        assert self.temperature is not None
        value, rows = self.temperature
        wide = wide_dtype(self.values.device)
        scaled = self.values.to(wide) / (value if rows is None else rows.to(wide)[..., None])
        if self.logsumexp is not None:
            total = self.logsumexp.to(wide)
        elif self.tail is not None:
            total = torch.logaddexp(logsumexp(self.once(scaled)), self.tail.to(wide))
        else:
            total = scaled.new_full(scaled.shape[:-1], torch.nan)
        total = torch.where(total.isfinite(), total, torch.nan)
        log_p = (scaled - total[..., None]).clamp(max=0)
        if self.logsumexp is not None:  # which may be a number although an entry is +inf
            log_p = log_p.masked_fill(scaled == torch.inf, torch.nan)
        return self._replace(shares=(log_p, total))

    def once(self, values: Tensor) -> Tensor:
        """The values with -inf where an id is listed again."""
        return values if self.repeated is None else values.masked_fill(self.repeated, -torch.inf)


def measure(
    names: tuple[str, ...],
    ids: Tensor,
    present: Tensor,
    unique: Tensor,
    sides: tuple[Side, Side],
    mask: Tensor | None,
) -> Stats:
    """The named statistics of a support: ids (..., K), which are present, which for the first time.

    ``sides`` are (student, teacher); the first K of their listed ids are the support's.
    """
    student, teacher = sides
    k = ids.shape[-1]
    found: dict[str, Tensor] = {"valid_k": present.sum(-1).float()}
    for side, values in (("student", student), ("teacher", teacher)):
        if f"{side}_mass" in names or f"{side}_entropy" in names:
            assert values.values is not None
            assert values.shares is not None
            dtype = compute_dtype(values.values)
            log_p, total = values.shares
            p = exp(log_p)
            mass = torch.where(unique, p[..., :k], 0).sum(-1)
            # A row that is no distribution has no mass, also if no entry is present.
            found[f"{side}_mass"] = mass.where(total == total, torch.nan).to(dtype)
            if f"{side}_entropy" in names:
                found[f"{side}_entropy"] = _entropy(values, p, log_p, total).to(dtype)
    if "overlap" in names:
        best = student.best if student.best is not None else teacher.best
        assert best is not None
        listed = torch.cat((torch.where(unique, ids, -1), best), -1)
        shared = repeats(listed)[..., k:] & (best >= 0)
        found["overlap"] = shared.sum(-1) / unique.sum(-1).clamp(min=1)
    rows = mask if mask is not None else torch.ones_like(found["valid_k"], dtype=torch.bool)
    kept = [found[name].masked_fill(~rows, torch.nan) if name in names else None for name in NAMES]
    return Stats._make([*kept, rows])


def _entropy(side: Side, p: Tensor, log_p: Tensor, total: Tensor) -> Tensor:
    """-sum of p log p over everything: terms of the listed ids, and of the tail as a whole.

    Each term is 0 or more. NaN where the tail's own entropy is not known.
    """
    if side.entropy is None or side.tail is None:
        return torch.full_like(total, torch.nan)
    listed = torch.where(side.once(log_p) == -torch.inf, 0, p * log_p).sum(-1)
    log_tail = (side.tail.to(total.dtype) - total).clamp(max=0)
    rest = torch.where(log_tail == -torch.inf, 0, exp(log_tail) * (log_tail - side.entropy))
    return 0 - (listed + rest)  # not -0
