"""``select_topk``: the teacher's support as a value of its own, to cache or to send."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_kernels import _checks, _ops
from opd_kernels.backends import AUTO
from opd_kernels.head import LinearLogits, as_autocast
from opd_kernels.stats import row_logsumexp
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
    _checks.check_backend(backend)
    limit = vocab if vocab_size is None else min(vocab, vocab_size)
    mask = bool_mask(mask, rows, device)
    banned = None if banned_ids is None else ban_bitmap(banned_ids, limit, device)
    backend = AUTO if backend is None else backend
    if isinstance(logits, LinearLogits):
        return select_linear(logits, k, limit, banned, mask, with_logsumexp, backend)
    ids, values = _ops.select(logits.detach(), k, limit, banned, mask, backend)
    logsumexp = row_logsumexp(logits, limit, mask) if with_logsumexp else None
    return TopK(ids, values, logsumexp)


def select_linear(
    head: LinearLogits,
    k: int,
    limit: int,
    banned: Tensor | None,
    mask: Tensor | None,
    with_logsumexp: bool,
    backend: str,
) -> TopK:
    """The k best of a head's logits."""
    # Checked again: autocast may have allowed mixed dtypes there and be off here.
    _checks.check_head(head.hidden, head.weight, head.bias, "LinearLogits ")
    tensors = as_autocast(head.hidden, head.weight, head.bias)
    hidden, weight, bias = (None if tensor is None else tensor.detach() for tensor in tensors)
    ids, values, logsumexp = _ops.select_linear(
        hidden, weight, bias, head.scale, head.softcap, k, limit, banned, mask, with_logsumexp,
        backend,
    )  # fmt: skip
    return TopK(ids, values, logsumexp if with_logsumexp else None)


def bool_mask(mask: Tensor | None, rows: torch.Size, device: torch.device) -> Tensor | None:
    """The mask as bool, checked against the rows."""
    if mask is None:
        return None
    _checks.check_mask(mask, rows, device)
    return recordable(mask if mask.dtype == torch.bool else mask != 0)


def recordable(tensor: Tensor) -> Tensor:
    """The per-row tensor, or a copy if autograd cannot save it: it was made in inference mode."""
    if (
        torch.compiler.is_compiling()
        or not tensor.is_inference()
        or torch.is_inference_mode_enabled()
    ):
        return tensor
    return tensor.clone()


def ban_bitmap(banned_ids: Sequence[int] | Tensor, limit: int, device: torch.device) -> Tensor:
    """uint8 bitmap, bit b of byte i standing for id 8 i + b, padded to whole 64-bit words.

    Ids outside [0, limit) are ignored. Built on the device without reading a value on the host.
    """
    banned_ids = _checks.as_banned_ids(banned_ids, device)
    words = (limit + 63) // 64
    outside = (banned_ids < 0) | (banned_ids >= limit)
    # Ids outside go to one more flag behind the bitmap.
    slots = torch.where(outside, words * 64, banned_ids.long())
    flags = torch.zeros(words * 64 + 1, dtype=torch.uint8, device=device)
    flags = flags.index_fill(0, slots, 1)[:-1].view(-1, 8)
    bits = torch.arange(8, dtype=torch.uint8, device=device)
    return (flags << bits).sum(-1, dtype=torch.uint8)
