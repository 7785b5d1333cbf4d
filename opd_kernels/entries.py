"""The pipeline of a loss: select the support, gather the student's values, compute the divergence.

The fused operator does all three where both sides are logits and nobody asks for the support.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from opd_kernels import _checks
from opd_kernels._arguments import Allowed
from opd_kernels._autograd import BackgroundLoss, Request, TopKReverseKL
from opd_kernels._collectives import agree
from opd_kernels._linear_autograd import GatherDot
from opd_kernels._shards import gathered
from opd_kernels.backends import plain
from opd_kernels.distributed import Parted, Sharded, Source, of_shards, widened
from opd_kernels.divergences import RENORMALIZE
from opd_kernels.head import LinearLogits
from opd_kernels.linear import losses_of_head
from opd_kernels.options import Call
from opd_kernels.selection import vocab_of
from opd_kernels.sides import Support, find_support, stats_of, token_of, watched
from opd_kernels.stats import Side, Stats
from opd_kernels.support import TopK


class RowLosses(NamedTuple):
    """Per-row losses (...); ids and gradient entries (..., K) of the logits they are computed from.

    With ``logprobs`` (...) of the sampled tokens and ``stats``, if they were asked for. Where there
    is a ``gradient``, a scalar 0, it belongs to the reduced loss and has its gradient.
    """

    loss: Tensor
    ids: Tensor
    entry_grad: Tensor
    logprobs: Tensor | None = None
    stats: Stats | None = None
    gradient: Tensor | None = None


def row_losses(
    student: Source,
    teacher: Source | TopK,
    k: int | None,
    call: Call,
    depth: int,
) -> RowLosses:
    """The loss of each row; masked rows have 0. The user's code is ``depth`` frames above."""
    k, limit = _support_size(student, teacher, k, call.support)
    simple = not (call.needs_tails or call.with_token or call.support == "student")
    if not simple or call.background != "exact" or call.student_logsumexp is not None:
        _check_sources(student, teacher, call)
    _warn_about_losses(k, call, depth + 3)
    agree([("student", student), ("teacher", teacher)], described(k, call))
    if call.needs_tails:
        student, teacher = widened(student, teacher)
    device, backend, objective = student.device, call.backend, call.objective
    allowed = call.allowed(limit, device)
    simple = simple and call.stats is None
    if simple and isinstance(teacher, Tensor) and isinstance(student, Tensor):
        request = Request(None, allowed, objective, call.inplace, backend)
        loss, ids, entry_grad = TopKReverseKL.apply(student, teacher.detach(), k, request)
        return RowLosses(loss, ids, entry_grad)
    support = find_support(student, teacher, k, allowed, call)
    gradient: Tensor | None = None
    given = isinstance(teacher, TopK)
    if not isinstance(student, Tensor) and call.needs_tails:
        found = losses_of_head(student, support, k, allowed, call)
        support, gradient = support._replace(student=found.side), found.gradient
        sides = watched(student, teacher, support, allowed, call)
        losses = RowLosses(found.loss, support.ids, support.values, found.logprobs)
    else:
        sides = watched(student, teacher, support, allowed, call)
        losses = _losses(student, support, sides[0], k, allowed, given, call)
    if call.stats is None:
        return losses._replace(gradient=gradient)
    ids, values = support.ids[..., :k], support.values[..., :k]
    stats = stats_of(ids, values, sides, allowed, call.stats, repeated=given)
    return losses._replace(stats=stats, gradient=gradient)


def _losses(
    student: Source,
    support: Support,
    side: Side,
    k: int,
    allowed: Allowed,
    given: bool,
    call: Call,
) -> RowLosses:
    """The losses of a support, which may be ``given``; ``side`` is what is known of the student."""
    ids, values = support.entries()
    backend, objective = call.backend, call.objective
    if not isinstance(student, Tensor):
        logits, slots = _gathered(student, ids, values, support.known, allowed, given, call)
        among_slots = allowed._replace(limit=ids.shape[-1], banned=None)
        request = Request(slots, among_slots, objective, False, backend)
        return RowLosses(*TopKReverseKL.apply(logits, values, k, request))
    request = Request(ids, allowed, objective, call.inplace, backend)
    if not call.needs_tails:
        return RowLosses(*TopKReverseKL.apply(student, values, k, request))
    tails = support.tails(call.range(vocab_of(student))) if call.full else None
    token = token_of(student, side, allowed, call) if call.with_logprobs else None
    loss, logprob, found, entry_grad, *_ = BackgroundLoss.apply(
        student, values, request, tails, token
    )
    return RowLosses(loss, found, entry_grad, logprob if call.with_logprobs else None)


def described(k: int, call: Call) -> dict[str, object]:
    """What the ranks of a VocabShard have to agree on."""
    return {
        "k": k,
        "outside": call.objective.outside,
        "support": call.support,
        "include_token": call.include_token,
        "return_token_logprobs": call.with_logprobs,
        "return_stats": call.stats,
        "background": call.background,
        "vocab_size": call.vocab_size,
        "student_logsumexp": call.student_logsumexp is not None,
        "mask": call.mask is not None,
    }


def check_teacher(
    teacher: object, k: int | None, rows: torch.Size, device: torch.device
) -> Source | TopK:
    """The teacher, once it fits the student's rows and k."""
    if isinstance(teacher, TopK):
        teacher.check()
        shape, tensor = teacher.shape, teacher.ids
    elif isinstance(teacher, Sharded):
        shape, tensor = teacher.shape, teacher.tensor
    elif isinstance(teacher, LinearLogits):
        shape, tensor = teacher.shape, teacher.hidden
    elif isinstance(teacher, Tensor):
        tensor = _checks.check_logits(teacher, "teacher")
        shape = tensor.shape[:-1]
    else:
        raise TypeError(
            f"teacher is a {type(teacher).__name__}, expected a tensor of logits (..., V), a TopK "
            "or a LinearLogits"
        )
    _checks.check_same_rows(rows, shape)
    _checks.check_same_device(tensor, device, "teacher")
    if isinstance(teacher, TopK):
        _checks.check_k_matches(k, teacher.k)
    elif k is not None:
        _checks.check_k(k, vocab_of(teacher))
    return teacher


def _support_size(
    student: Source,
    teacher: Source | TopK,
    k: int | None,
    support: str,
) -> tuple[int, int]:
    """(k, limit): entries of a row, and below which ids they are."""
    vocab = vocab_of(student)
    if isinstance(teacher, TopK):
        return teacher.k, vocab
    selected_from = vocab if support == "student" else vocab_of(teacher)
    if k is None:
        k = min(_checks.DEFAULT_K, selected_from)
    elif support == "student":
        _checks.check_k(k, selected_from, "student")
    return k, min(vocab, vocab_of(teacher))


def _check_sources(student: Source, teacher: Source | TopK, call: Call) -> None:
    """Raises unless both sides have what the loss needs of them."""
    outside = call.objective.outside
    _check_head_options(student, call)
    if call.support == "student" and isinstance(teacher, TopK):
        raise ValueError(
            "support=\"student\" needs the teacher's values at the student's ids, and teacher is a "
            "TopK of its own; pass the teacher's logits or a LinearLogits, or leave support out if "
            "the TopK's ids are the student's"
        )
    if isinstance(teacher, TopK) and call.with_token and teacher.token_logits is None:
        what = "include_token=True" if call.include_token else f"outside={outside!r}"
        raise ValueError(
            f"{what} needs the teacher's value at the sampled token, and this TopK has no "
            "token_logits; pass token_ids to select_topk or TopK.from_logprobs"
        )
    if not call.full:
        return
    if isinstance(teacher, TopK):
        _check_full_support(teacher, call)


def _check_head_options(student: Source, call: Call) -> None:
    """Raises for a background or a log-sum-exp that does not fit the student and the loss."""
    if isinstance(student, Tensor) or of_shards(student):
        for name, given in (
            ('background="sampled"', call.background == "sampled"),
            ("student_logsumexp", call.student_logsumexp is not None),
        ):
            if given:
                raise ValueError(
                    f"{name} saves products with a head, and student is logits; leave it out, or "
                    "pass a LinearLogits"
                )
        return
    if call.background != "sampled" or not call.needs_tails:
        return
    if call.token_ids is None:
        raise ValueError('background="sampled" needs token_ids, the sampled token of each row')
    for name, given in (
        ('outside="sample"', call.objective.outside == "sample"),
        ("include_token=True", call.include_token),
        ("return_token_logprobs=True", call.with_logprobs),
    ):
        if given:
            raise ValueError(
                f'background="sampled" is biased with {name}, where the gradient depends on the '
                'sampled token; pass background="exact"'
            )


def _check_full_support(teacher: TopK, call: Call) -> None:
    """Raises unless a TopK says what its entries hold of the full softmax, at T'."""
    outside = call.objective.outside
    if teacher.logsumexp is None and teacher.tail_logsumexp is None:
        raise ValueError(
            f"outside={outside!r} needs the teacher's full log-sum-exp, and this TopK has neither "
            "logsumexp nor tail_logsumexp; TopK.from_logprobs and "
            "select_topk(..., with_logsumexp=True) give it, and outside='renormalize' needs none"
        )
    given = call.teacher_temperature
    if isinstance(given, Tensor) or given != teacher.temperature:
        shown = "a tensor" if isinstance(given, Tensor) else given
        raise ValueError(
            f"teacher_temperature is {shown} and the TopK's log-sum-exp is of temperature "
            f"{teacher.temperature}; outside={outside!r} needs both the same: pass "
            f"teacher_temperature={teacher.temperature}, or a TopK of that temperature, or "
            "outside='renormalize', which needs no log-sum-exp"
        )


def _gathered(
    student: Parted,
    ids: Tensor,
    values: Tensor,
    known: Tensor | None,
    allowed: Allowed,
    given: bool,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """(the student's logits at the ids, their slots)."""
    # An entry of value -inf is absent: its row of the head is not read, and a softcap's slope
    # cannot make its gradient NaN.
    ids = torch.where(values == -torch.inf, -1, ids)
    if isinstance(student, Sharded):
        return gathered(student, ids, known, allowed, given, call.inplace, call.backend)
    logits, slots = GatherDot.apply(
        student.hidden, student.weight, student.bias, ids, allowed, call.backend
    )
    return plain.shaped(logits, student.scale, student.softcap), slots


def _warn_about_losses(k: int, call: Call, stacklevel: int) -> None:
    """Warns of losses that are 0 or that are known to fail."""
    if torch.compiler.is_compiling():
        return
    outside = call.objective.outside
    if k == 1 and outside == RENORMALIZE and not call.include_token:
        warnings.warn(
            "k=1: a support of one entry renormalises to probability 1 on both sides, so the loss "
            "and its gradient are identically 0; use k=2 or more (the paper's is 32)",
            stacklevel=stacklevel,
        )
    weights = call.divergence[:4]
    if not any(isinstance(weight, Tensor) or weight for weight in weights):
        warnings.warn(
            "all weights of the divergence are 0, so the loss and its gradient are 0; set one, as "
            "in Divergence(reverse=1.0)",
            stacklevel=stacklevel,
        )
    if outside == "truncate" and (isinstance(weights[0], Tensor) or weights[0]):
        _warn_about_collapse(stacklevel + 1)


@functools.cache
def _warn_about_collapse(stacklevel: int) -> None:
    """Once: a loss that pushes probability off the support."""
    warnings.warn(
        'reverse KL with outside="truncate" falls as the student leaves the support (its least '
        "value is at a mass of Q / e there), and training with it is known to collapse; use "
        'outside="bucket" or "sample"',
        stacklevel=stacklevel,
    )
