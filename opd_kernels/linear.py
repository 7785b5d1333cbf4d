"""``linear_topk_rkl``: the loss from hidden states and a head, without the student's logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from opd_kernels import _checks, _ops
from opd_kernels import stats as _stats
from opd_kernels._autograd import GatherDot
from opd_kernels.backends import AUTO
from opd_kernels.head import LinearLogits, shaped
from opd_kernels.losses import Call, given_support, support_size, teacher_logits
from opd_kernels.selection import ban_bitmap, bool_mask, select_linear
from opd_kernels.stats import Stats
from opd_kernels.support import TopK

__all__ = ["linear_topk_rkl"]


@overload
def linear_topk_rkl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None = None,
    *,
    student_bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    banned_ids: Sequence[int] | Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def linear_topk_rkl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None = None,
    *,
    student_bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    banned_ids: Sequence[int] | Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Stats]: ...


def linear_topk_rkl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None = None,
    *,
    student_bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    banned_ids: Sequence[int] | Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Stats]:
    """``topk_rkl`` on the logits of a head; only k logits of each row are computed.

    With hidden states h, head W and b, scale s, softcap c and S the teacher's k best allowed ids::

        z_v = cap(s (W_v . h + b_v))  for v in S       cap(x) = c tanh(x / c), or x
        L = sum over S of p (log p - log q)            p = softmax(z[S] / T), q as in topk_rkl
        dL/dh = sum of dL/dz_v z'_v W_v    dL/dW_v = sum over rows of dL/dz_v z'_v h

    A row costs k H multiplications instead of V H, in forward and in backward. No tensor of shape
    (N, V) exists.

    Shapes and dtypes: ``student_hidden`` (..., H), ``student_weight`` (V, H), ``student_bias`` (V,)
    or None, of one dtype of float16, bfloat16, float32 or float64, last strides 1; under autocast
    of any, as ``torch.nn.functional.linear`` takes them, but read in the precision that they have:
    nothing is cast. Products, sums and the student's logits are float32 (float64 where an input
    is) and never rounded to a narrower dtype; the loss is float32 (float64).

    Args:
        student_hidden: what the head gets: after the model's last norm.
        student_weight: the head's weight; the embedding's where they are tied.
        teacher: constant, with the same leading shape: logits (..., V_t), a ``TopK``, or
            ``LinearLogits``, its hidden states and head, whose logits are computed a few hundred
            rows at a time.
        k: size of the support; 32 (the paper's), for a ``TopK`` its width.
        student_bias: the head's bias.
        logit_softcap: c, above 0, where the model has one (Gemma 2: 30).
        logit_scale: s, above 0, where the model multiplies its logits (Cohere) or divides them
            (Granite: 1 / logits_scaling).

    An adapter on the head, a quantised weight without its scales or a forgotten softcap makes a
    wrong loss in silence: ``head_of`` reads a model's head whole, or refuses it.

    All other arguments are those of ``topk_rkl``, and so are the rules for absent entries, masked
    rows, NaN and reductions. Masked rows are not read; only a GPU's matrix product of a
    ``LinearLogits`` includes them. ``return_stats`` does compute the student's logits, a few
    hundred rows at a time. ``backend`` "cuda" has no kernels for hidden states; None takes "triton"
    on such GPUs.

    Gradients: ``student_hidden``, ``student_weight``, ``student_bias`` and ``weight``, each only if
    it is needed: with a frozen head nothing of shape (V, H) is made. The head's gradient is dense
    and the same bits on every run. Ids that occur in every row cost no more than others.
    Kept for backward: ids, 8 bytes per row and entry (4 more with a softcap), and references to
    hidden states and weight. Differentiating twice raises ``RuntimeError``.

    Errors: ``ValueError`` or ``TypeError`` as in ``topk_rkl``; ``ValueError`` for a sharded
    (DTensor) weight, under FSDP2 call it inside of the wrapped module's forward.

    Example::

        hidden = student.model(input_ids).last_hidden_state          # (B, T, H)
        with torch.no_grad():
            teacher_hidden = teacher.model(input_ids).last_hidden_state
        logits = head_of(teacher)(teacher_hidden)
        head = head_of(student)
        loss = linear_topk_rkl(hidden, teacher=logits, k=32, mask=mask, **head.as_student)
        loss.backward()

    Source: arXiv 2603.25562, teacher top-K local support matching; what its loss needs of a head.
    """
    _checks.check_head(student_hidden, student_weight, student_bias, "student_")
    _checks.check_factor(logit_scale, "logit_scale")
    if logit_softcap is not None:
        _checks.check_factor(logit_softcap, "logit_softcap")
    _checks.check_vocab_size(vocab_size)
    _checks.check_flag(return_stats, "return_stats")
    _checks.check_backend(backend)
    rows, device = student_hidden.shape[:-1], student_hidden.device
    backend = AUTO if backend is None else backend
    mask = bool_mask(mask, rows, device)
    vocab = student_weight.shape[0]
    support, limit, banned = _support_of(
        teacher, k, rows, device, vocab, vocab_size, banned_ids, mask, backend
    )
    if teacher_temperature is None:
        teacher_temperature = temperature
    call = Call(
        rows, device, support.k, mask, temperature, teacher_temperature, weight, reduction,
        normalizer,
    )  # fmt: skip
    # An entry of value -inf is absent: its row of the head is not read, and a softcap's slope
    # cannot make its gradient NaN.
    ids = torch.where(support.logits == -torch.inf, -1, support.ids)
    logits, slots = GatherDot.apply(
        student_hidden, student_weight, student_bias, ids, mask, banned, limit, backend
    )
    logits = shaped(logits, logit_scale, logit_softcap)
    loss = call.loss(
        logits, support.logits, slots, limit=support.k, banned=None, inplace=False, backend=backend
    )
    if not return_stats:
        return loss
    bias = None if student_bias is None else student_bias.detach()
    stats = _stats.measure(
        LinearLogits(
            student_hidden.detach(), student_weight.detach(), bias, logit_softcap, logit_scale
        ),
        teacher,
        support,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        limit=limit,
        vocab_size=vocab_size,
        mask=mask,
        banned=banned,
    )
    return loss, stats


def _support_of(
    teacher: Tensor | TopK | LinearLogits,
    k: int | None,
    rows: torch.Size,
    device: torch.device,
    vocab: int,
    vocab_size: int | None,
    banned_ids: Sequence[int] | Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[TopK, int, Tensor | None]:
    """(the teacher's support, the limit of its ids, the bitmap of banned ones)."""

    def allowed(limit: int) -> tuple[int, Tensor | None]:
        limit = limit if vocab_size is None else min(limit, vocab_size)
        return limit, None if banned_ids is None else ban_bitmap(banned_ids, limit, device)

    if isinstance(teacher, TopK):
        values, ids, _, limit = given_support(teacher, k, rows, vocab, device)
        return TopK(ids, values), *allowed(limit)
    if isinstance(teacher, LinearLogits):
        _checks.check_same_rows(rows, teacher.shape)
        _checks.check_same_device(teacher.hidden, device, "teacher")
        k, limit = support_size(k, vocab, teacher.vocab)
        limit, banned = allowed(limit)
        return select_linear(teacher, k, limit, banned, mask, False, backend), limit, banned
    logits = teacher_logits(teacher, rows, device)
    k, limit = support_size(k, vocab, logits.shape[-1])
    limit, banned = allowed(limit)
    return TopK(*_ops.select(logits, k, limit, banned, mask, backend)), limit, banned
