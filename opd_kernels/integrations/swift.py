"""ms-swift's ``gkd_loss`` on this package's kernels, with a teacher's top-K.

A file for ``--external_plugins``::

    from opd_kernels.integrations import swift

    swift.install()
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_kernels.api import topk_divergence
from opd_kernels.integrations._hooks import (
    LOG,
    announce,
    check_parameters,
    generalized_jsd,
    megatron_shard,
)
from opd_kernels.selection import select_topk
from opd_kernels.support import TopK

__all__ = ["gkd_loss", "install"]

KNOWN = "ms-swift 4.6.0"
DEFINED = "swift.rlhf_trainers.gkd_loss"
# They import gkd_loss by name. One that is not loaded yet takes what DEFINED has then.
IMPORTERS = (
    "swift.rlhf_trainers.gkd_trainer",
    "swift.megatron.trainers.gkd_trainer",
    "swift.ray.megatron.loss.gkd",
)
# The two functions that ms-swift passes as gather_fn: of whole rows, and of Megatron's shards.
WHOLE = f"{DEFINED}.default_gather"
SHARDS = "swift.megatron.trainers.gkd_utils.tp_gather_topk"
PARAMETERS = (
    "student_logits",
    "teacher_output",
    "labels",
    "beta",
    "temperature",
    "gather_fn",
    "log_softmax_fn",
    "kl_div_fn",
    "chunk_size",
)


class _Own(NamedTuple):
    """ms-swift's functions, as they were before ``install``."""

    gkd_loss: Callable[..., Any]
    to_topk: Callable[..., Any]


def install() -> None:
    """Puts ``gkd_loss`` in the place of ms-swift's, for its three GKD trainers.

    They are the one on transformers, the one on Megatron and the one on Ray. A local teacher's
    top-K, ``TeacherOutput.to_topk``, becomes ``select_topk`` on the rows that count. No trainer is
    imported. A second call changes nothing.

    Errors: ``ImportError`` without ms-swift, and where its functions take other parameters than
    those of the version that this was tested with.

    Example::

        # opd.py, for swift rlhf --rlhf_type gkd --gkd_logits_topk 64 --external_plugins opd.py
        from opd_kernels.integrations import swift

        swift.install()
    """
    _own()  # before its functions are replaced
    defined = import_module(DEFINED)
    defined.TeacherOutput.to_topk = _to_topk
    for name in (DEFINED, *IMPORTERS):
        if name in sys.modules:
            sys.modules[name].gkd_loss = gkd_loss  # type: ignore[attr-defined]


def gkd_loss(
    student_logits: Tensor,
    teacher_output: Any,
    labels: Tensor,
    beta: float,
    temperature: float,
    gather_fn: Callable[..., Any] | None = None,
    *,
    log_softmax_fn: Callable[..., Any] | None = None,
    kl_div_fn: Callable[..., Any] | None = None,
    chunk_size: int = 512,
) -> tuple[Tensor, Tensor]:
    """ms-swift's ``gkd_loss``: (sum of the rows' losses, number of rows).

    With S the teacher's K entries of a row, p and q the softmaxes over S of both sides' logits
    divided by ``temperature``, and m = beta q + (1 - beta) p::

        beta 0: KL(q || p)    beta 1: KL(p || q)    else: beta KL(q || m) + (1 - beta) KL(p || m)

    Args:
        student_logits: (B, T, V), or this rank's columns with ms-swift's gather of shards.
        teacher_output: ms-swift's ``TeacherOutput``: ``topk_logprobs`` and ``topk_indices``
            (B, T', K), log-probs or logits. Its ``labels`` (B, T'), where they are there, say which
            of its rows belong to the student's, in order; T' may be another length then.
        labels: (B, T), shifted; a row with -100 is masked. So is a row whose teacher entries are
            all infinite: it is not counted.
        beta: as above, in [0, 1].
        temperature: divides both sides; a float above 0.
        gather_fn: ms-swift's own say whether logits are whole or split over Megatron's
            tensor-parallel group. None: they are whole.
        log_softmax_fn, kl_div_fn, chunk_size: not used, as in ms-swift with a top-K. By name alone,
            as its trainers pass them.

    Without a top-K (ms-swift's ``gkd_logits_topk`` unset), and with another ``gather_fn``,
    ms-swift's own function runs, and a warning says so once.

    Returns two 0-d tensors: the sum, float32 (float64 where an input is), and the count, int64.

    Gradients: ``student_logits``. It is not copied: what a mask leaves out is not read. Each
    tensor-parallel rank gets the gradient of its own columns, counted once.

    Absent entries (teacher -inf, ids outside of the student's vocabulary) take no part. No value is
    read on the host: where student's and teacher's labels leave different numbers of rows, which
    ms-swift's own function asserts, the sum is NaN.

    Errors: as in ``topk_divergence``.

    Example::

        teacher_output = TeacherOutput(topk_logprobs=logprobs, topk_indices=ids, labels=labels)
        total, count = gkd_loss(logits, teacher_output, labels, beta=0.5, temperature=1.0)
        (total / count).backward()

    Source: ms-swift, ``swift/rlhf_trainers/gkd_loss.py``.
    """
    why = _refusal(teacher_output, gather_fn)
    if why is not None:
        _announce_own(why)
        given = {"gather_fn": gather_fn, "log_softmax_fn": log_softmax_fn, "kl_div_fn": kl_div_fn}
        functions = {name: function for name, function in given.items() if function is not None}
        total, count = _own().gkd_loss(
            student_logits,
            teacher_output,
            labels,
            beta,
            temperature,
            chunk_size=chunk_size,
            **functions,
        )
        return total, count
    announce("ms-swift", f"gkd_loss on the teacher's top-K, beta {beta}")
    topk, factor = _support(teacher_output, labels)
    mask = (labels != -100) & ~topk.logits.isinf().all(-1)
    whole = gather_fn is None or _name(gather_fn) == WHOLE
    total = topk_divergence(
        student_logits,
        topk,
        divergence=generalized_jsd(beta),
        temperature=temperature,
        mask=mask,
        reduction="sum",
        vocab_shard=None if whole else megatron_shard(student_logits.shape[-1]),
    )
    return total * factor, mask.sum()


def _refusal(teacher_output: Any, gather_fn: Callable[..., Any] | None) -> str | None:
    """Why ms-swift's own function has to run, or None."""
    if not teacher_output.is_topk_mode:
        return "the teacher has no top-K; set gkd_logits_topk"
    if gather_fn is not None and _name(gather_fn) not in (WHOLE, SHARDS):
        return f"gather_fn is {_name(gather_fn)}"
    return None


@cache
def _announce_own(why: str) -> None:
    """Logs once in a process that ms-swift's own loss runs, and why."""
    LOG.warning("ms-swift: its own gkd_loss runs, not opd_kernels': %s", why)


def _support(teacher_output: Any, labels: Tensor) -> tuple[TopK, Tensor | float]:
    """(the teacher's entries at the student's rows, 1, or NaN unless both have as many rows)."""
    logprobs, ids = teacher_output.topk_logprobs, teacher_output.topk_indices
    theirs = teacher_output.labels
    if theirs is None or theirs is labels:
        return TopK(ids, logprobs), 1.0
    ours, theirs = (x.flatten() != -100 for x in (labels, theirs))
    # The teacher's rows that count, first; a student's row takes the one of its rank.
    order = (~theirs).to(torch.uint8).argsort(stable=True)
    rows = order.index_select(0, (ours.cumsum(0) - 1).clamp(0, order.numel() - 1))
    ids, logprobs = (
        x.flatten(0, -2).index_select(0, rows).unflatten(0, labels.shape) for x in (ids, logprobs)
    )
    return TopK(ids, logprobs), torch.where(ours.sum() == theirs.sum(), 1.0, torch.nan)


def _to_topk(self: Any, k: int, topk_fn: Callable[..., Any] | None = None) -> Any:
    """``TeacherOutput.to_topk``; rows whose label is -100 are not read."""
    if self.is_topk_mode or self.full_logits is None or topk_fn is not None:
        return _own().to_topk(self, k, topk_fn)
    mask = None if self.labels is None else self.labels != -100
    topk = select_topk(self.full_logits, k, mask=mask)
    return type(self)(topk_logprobs=topk.logits, topk_indices=topk.ids.long(), labels=self.labels)


def _name(function: Callable[..., Any]) -> str:
    """Full name of a function, or of the type of another callable."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


@cache
def _own() -> _Own:
    """ms-swift's functions, once their parameters are those that are known."""
    defined = import_module(DEFINED)
    own = _Own(defined.gkd_loss, defined.TeacherOutput.to_topk)
    check_parameters(own.gkd_loss, PARAMETERS, KNOWN)
    check_parameters(own.to_topk, ("self", "k", "topk_fn"), KNOWN)
    return own
