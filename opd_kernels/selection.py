"""``select_topk``: the teacher's support as a value of its own, to cache or to send."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_kernels import _checks, _ops
from opd_kernels._arguments import Allowed, Head
from opd_kernels.head import LinearLogits, as_autocast
from opd_kernels.options import allowed, backend_name, bool_mask
from opd_kernels.support import TopK

__all__ = ["select_topk"]


@torch.no_grad()
def select_topk(
    logits: Tensor | LinearLogits,
    k: int,
    *,
    mask: Tensor | None = None,
    banned_ids: Sequence[int] | Tensor | None = None,
    vocab_size: int | None = None,
    with_logsumexp: bool = False,
    backend: str | None = None,
) -> TopK:
    """The k best ids of each row and their logits, exactly.

    Order: (value descending, id ascending); ties go to the lower id, -0 equals +0, NaN ranks
    highest.

    Shapes and dtypes: logits (..., V), float16, bfloat16, float32 or float64, last stride 1;
    or ``LinearLogits``, whose rows are computed a few hundred at a time and not kept;
    returns ids int32 and logits float32 (float64 for float64), both (..., k). Only ids in
    [0, min(V, vocab_size)) that are not in ``banned_ids`` can be selected; where fewer than k can
    be, and in rows whose ``mask`` is False (not read), the id is -1 and the logit -inf.
    ``with_logsumexp`` adds the full log-sum-exp of each row, which ``return_stats`` can use.

    Gradients: none. Memory: the outputs (``with_logsumexp``: a float32 copy of a few rows besides;
    ``LinearLogits``: its workspace).

    Errors: ``ValueError`` for k outside [1, V], a last stride other than 1, a mask of another
    shape, a backend that cannot serve the call; ``TypeError`` for other dtypes.

    Example::

        support = select_topk(teacher_logits, 32)
        loss = topk_rkl(student_logits, support)
    """
    if isinstance(logits, LinearLogits):
        rows, vocab = logits.shape, logits.vocab
    else:
        *_, vocab = _checks.check_logits(logits, "logits").shape
        rows = logits.shape[:-1]
    device = logits.device
    _checks.check_k(k, vocab)
    _checks.check_vocab_size(vocab_size)
    _checks.check_flag(with_logsumexp, "with_logsumexp")
    backend = backend_name(backend)
    mask = bool_mask(mask, rows, device)
    which = allowed(vocab, vocab_size, banned_ids, mask, device)
    ids, values, sums = select(logits, k, which, with_logsumexp, backend)
    return TopK(ids, values, sums if with_logsumexp else None)


def select(
    logits: Tensor | LinearLogits, k: int, allowed: Allowed, with_logsumexp: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, values, log-sum-exps) of the k best; no log-sum-exps unless they are asked for."""
    if isinstance(logits, Tensor):
        return _ops.select(logits.detach(), k, allowed, with_logsumexp, backend)
    # Checked again: autocast may have allowed mixed dtypes there and be off here.
    _checks.check_head(logits.hidden, logits.weight, logits.bias, "LinearLogits ")
    hidden, weight, bias = as_autocast(logits.hidden, logits.weight, logits.bias)
    bias = None if bias is None else bias.detach()
    head = Head(hidden.detach(), weight.detach(), bias, logits.scale, logits.softcap)
    return _ops.select_linear(head, k, allowed, with_logsumexp, backend)
