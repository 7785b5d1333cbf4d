"""The losses: ``topk_divergence``, ``topk_rkl``, which is one of them, and its linear form."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from opd_kernels import _checks
from opd_kernels.distributed import Sharded, Source, VocabShard, as_shards, from_dtensor, of_shards
from opd_kernels.entries import check_teacher, row_losses
from opd_kernels.head import LinearLogits
from opd_kernels.options import (
    MEMBER_DEFAULTS,
    DivergenceOptions,
    Options,
    RowOptions,
    check_names,
    resolve,
)
from opd_kernels.stats import NAMES as STATS
from opd_kernels.stats import Stats
from opd_kernels.support import TopK

__all__ = ["linear_topk_rkl", "topk_divergence", "topk_rkl"]


@overload
def topk_rkl(
    student: Tensor | LinearLogits,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...


@overload
def topk_rkl(
    student: Tensor | LinearLogits,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None = None,
    *,
    return_stats: Literal[True] | Sequence[str],
    **options: Unpack[Options],
) -> tuple[Tensor, Stats]: ...


@overload
def topk_rkl(
    student: Tensor | LinearLogits,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None = None,
    *,
    return_stats: bool | Sequence[str],
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Stats]: ...


def topk_rkl(
    student: Tensor | LinearLogits,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None = None,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    banned_ids: Sequence[int] | Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    inplace_grad: bool = False,
    vocab_shard: VocabShard | None = None,
    teacher_vocab_shard: VocabShard | Literal["whole"] | None = None,
    return_stats: bool | Sequence[str] = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Stats]:
    """Renormalised reverse KL of the student to the teacher on the teacher's top-K support.

    With student logits z, teacher logits t and S the teacher's k best allowed ids of a row::

        p = softmax(z[S] / T)    q = softmax(t[S] / T')    L = sum over S of p (log p - log q)
        dL/dz_v = p_v (log p_v - log q_v - L) / T  for v in S, 0 elsewhere

    Shapes and dtypes: ``student``, logits (..., V), and ``teacher``, logits (..., V_t) or a
    ``TopK`` (..., K), with the same leading shape: one row per token, no causal shift inside.
    float16, bfloat16, float32 or float64; leading dimensions may have any strides, the last must
    have stride 1. Either side may be a ``LinearLogits``, hidden states (..., H) and a head; for a
    student see ``linear_topk_rkl``. Arithmetic is float32 (float64 where an input is); the loss is
    float32 (float64).
    Logits may be DTensors with Shard(-1) on one dimension of their mesh: the loss is that of the
    local rows, a plain tensor, and the gradient has the DTensor's placements.

    Args:
        student: what gets the gradient.
        teacher: constant; its logits, or a support that was selected before or by a server.
        k: size of the support; 32 for logits (the paper's), the width of a ``TopK``.
        temperature: T, divides both sides' logits; a float or a constant tensor per row. There is
            no T squared factor. A float outside (0, inf) raises; in a tensor, and under
            ``torch.compile``, where checking would synchronise or recompile, it makes NaN.
        teacher_temperature: T' where the teacher's differs.
        mask: bool or integer per row; False or 0: the row has loss 0 and gradient 0, whatever it
            holds, and kernels do not read it.
        weight: floating factor per row, multiplies the loss; differentiable.
        banned_ids: ids that never enter the support, a sequence or an int tensor on the device.
        vocab_size: only ids below it can enter the support; for padded vocabularies.
        reduction: "none" gives the loss per row, "sum", or "mean", which divides by ``normalizer``
            or, without one, by the number of unmasked rows (at least 1), not by the weights' sum.
        normalizer: a number or 0-d tensor, for instance the global token count. Its value is not
            looked at: clamp a count that may be 0.
        inplace_grad: let backward write the gradient into the memory of ``student``, whose
            values are gone then. Another function of the logits whose backward needs their values
            afterwards gets PyTorch's error about in-place modification. Refused for leaves, views
            of leaves and rows that overlap. A compiled function plans memory itself: no effect
            there.
        vocab_shard: which columns of the vocabulary this rank holds of ``student`` (of a
            ``LinearLogits`` the rows of its weight), and of a teacher that is split alike. Ids are
            those of the whole vocabulary; a ``TopK`` is whole. All ranks get the loss of the whole
            rows, and each the gradient of its own columns: it is counted once, so do not divide
            or sum it over the group. Takes two exchanges of a few numbers a row.
        teacher_vocab_shard: the teacher's own columns where they are others, or "whole" where every
            rank has the whole teacher, of which it then reads a part.
        return_stats: also return ``Stats``, per row and detached: True for all, or names as in
            ``("student_mass", "overlap")``, the others being None then. The teacher's come from the
            pass that selects. The student's mass, entropy and the overlap take one read of its
            logits together; of a ``LinearLogits`` one product with the whole head, in pieces,
            without a gradient and rounded to the head's dtype.
        backend: "cpu", "cuda", "triton" or "reference"; None picks the best for the device. One
            that is named is used or raises.

    Returns the loss, or with ``return_stats`` (loss, ``Stats``). Masked rows of ``Stats`` are NaN;
    ``stats.mean()`` is over the others.

    Gradients: ``student`` (in its dtype; hidden states, weight and bias of a ``LinearLogits``) and
    ``weight``. Kept for backward: 8 bytes per row and entry; the logits only with ``inplace_grad``.
    Differentiating twice raises ``RuntimeError``.

    Absent entries (id -1, outside the vocabulary, banned, or teacher -inf) take no part. A student
    value of -inf has p = 0. NaN or +inf at an entry that takes part makes its row NaN and no other.
    The loss is never clamped: rounding may make it about -1e-7.

    Errors: ``ValueError`` or ``TypeError`` for shapes, devices, dtypes and values that are not
    allowed, ``ValueError`` for other DTensors. k = 1 warns: one renormalised entry has loss and
    gradient 0. Values of tensors are not looked at, but for ``OPD_KERNELS_DEBUG=1`` or ``debug()``,
    which raise with the first bad row.

    Example::

        logits = student(input_ids).logits                      # (B, T, V)
        with torch.no_grad():
            teacher_logits = teacher(input_ids).logits
        mask = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))  # position t predicts t + 1
        loss = topk_rkl(logits, teacher_logits, k=32, mask=mask)
        loss.backward()

    Source: arXiv 2603.25562, teacher top-K local support matching.
    """
    options: Options = {
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "mask": mask,
        "weight": weight,
        "banned_ids": banned_ids,
        "vocab_size": vocab_size,
        "reduction": reduction,
        "normalizer": normalizer,
        "inplace_grad": inplace_grad,
        "vocab_shard": vocab_shard,
        "teacher_vocab_shard": teacher_vocab_shard,
        "backend": backend,
    }
    loss, _, stats = _topk_divergence(_checked(student, options), teacher, k, return_stats, options)
    return loss if stats is None else (loss, stats)


@overload
def topk_divergence(
    student: Tensor | LinearLogits,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None = None,
    *,
    return_stats: Literal[False] = False,
    return_token_logprobs: Literal[False] = False,
    **options: Unpack[DivergenceOptions],
) -> Tensor: ...


@overload
def topk_divergence(
    student: Tensor | LinearLogits,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None = None,
    *,
    return_stats: Literal[True] | Sequence[str],
    return_token_logprobs: Literal[False] = False,
    **options: Unpack[DivergenceOptions],
) -> tuple[Tensor, Stats]: ...


@overload
def topk_divergence(
    student: Tensor | LinearLogits,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None = None,
    *,
    return_stats: Literal[False] = False,
    return_token_logprobs: Literal[True],
    **options: Unpack[DivergenceOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def topk_divergence(
    student: Tensor | LinearLogits,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None = None,
    *,
    return_stats: Literal[True] | Sequence[str],
    return_token_logprobs: Literal[True],
    **options: Unpack[DivergenceOptions],
) -> tuple[Tensor, Tensor, Stats]: ...


@overload
def topk_divergence(
    student: Tensor | LinearLogits,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None = None,
    *,
    return_stats: bool | Sequence[str],
    return_token_logprobs: Literal[False] = False,
    **options: Unpack[DivergenceOptions],
) -> Tensor | tuple[Tensor, Stats]: ...


@overload
def topk_divergence(
    student: Tensor | LinearLogits,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None = None,
    *,
    return_stats: bool | Sequence[str],
    return_token_logprobs: Literal[True],
    **options: Unpack[DivergenceOptions],
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Stats]: ...


@overload
def topk_divergence(
    student: Tensor | LinearLogits,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None = None,
    *,
    return_stats: bool | Sequence[str] = False,
    return_token_logprobs: bool = False,
    **options: Unpack[DivergenceOptions],
) -> Tensor | tuple[Tensor, Stats] | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Stats]: ...


def topk_divergence(
    student: Tensor | LinearLogits,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None = None,
    *,
    return_stats: bool | Sequence[str] = False,
    return_token_logprobs: bool = False,
    **options: Unpack[DivergenceOptions],
) -> Tensor | tuple[Tensor, Stats] | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Stats]:
    """A divergence between student and teacher on the K most likely tokens; ``topk_rkl`` is one.

    With a = log p of the student and b = log q of the teacher at the entries of the support S, the
    divergence is a weighted sum over S of::

        p (a - b)    q (b - a)    p (a - m)    q (b - m)      m = log(beta q + (1 - beta) p)

    and with c, the sum of its derivatives by all a, the gradient is K entries and a background::

        dL/dz_v = (slope_v - c p_v) / T  for v in S       alpha p_v / T  elsewhere

    ``outside`` says what p and q are, and what becomes of the probability outside of S:

    - "renormalize": p and q are softmaxes over S (the paper's). alpha = 0.
    - "truncate": full softmaxes, summed over S only. Training with the reverse KL is known to
      collapse: the loss falls as the student leaves S. The first call warns.
    - "bucket": full softmaxes; all that is outside is one more entry.
    - "generalize": full softmaxes; adds (reverse - forward) (q - p) at each entry, which is then at
      least 0, and exactly 0 where p = q. Reverse and forward KL only. With the reverse KL a student
      that leaves S pays at most Q: one that was far from its teacher did.
    - "sample": full softmaxes; reverse KL only. ``token_ids`` y ~ p stands for what is outside: the
      loss is the sum over S of p (a - b), and a - b at y if y is not in S. The gradient is not the
      derivative of this value. Its slopes are those of policy gradients, p (a - b) on S and a - b
      at y, and its mean over y is the full reverse KL's gradient. Sample y from the student at
      ``temperature``, without top-p and top-k.

    Args:
        student: logits (..., V) or ``LinearLogits``; what gets the gradient.
        teacher: logits (..., V_t), a ``TopK`` or ``LinearLogits``; constant. Outside of
            "renormalize" a ``TopK`` has to carry ``logsumexp`` or ``tail_logsumexp``, of the same
            temperature.
        k: size of the support; 32 for logits, the width of a ``TopK``.
        divergence: a ``Divergence``, or "reverse_kl", "forward_kl", "jsd" (beta 1/2).
        outside: as above.
        support: whose K most likely tokens: "teacher", or "student", which needs the teacher's
            logits.
        token_ids: int (...), the sampled token of each row. On their own they change nothing. One
            outside of the student's vocabulary makes its row NaN where it is used, unless the row
            is masked.
        background: "exact", or "sampled" for a student of ``LinearLogits``: backward then takes
            alpha / T at ``token_ids``, y, alone for alpha p / T, and nothing where y is in S. Its
            mean over y is the exact gradient if y ~ softmax(z / T) over the ids below
            ``vocab_size``, at the loss's own temperature. With top-p or a stale policy it is
            biased. It raises with "sample", ``include_token`` and ``return_token_logprobs``. Where
            alpha is 0 it changes nothing.
        student_logsumexp: (...), constant, for a student of ``LinearLogits``: the log-sum-exp of
            z / T over the ids below ``vocab_size``, of the same weights. Forward then computes the
            listed logits only, unless the student's entropy or the overlap is asked for. The tail
            is what they leave of it, at least 2^-24 of it.
        include_token: the sampled token joins the support as one more entry.
        return_token_logprobs: also return log p of ``token_ids``, per row (...) and differentiable,
            as ``token_logprobs`` gives it: of softmax(z / T) at this ``temperature``, over the ids
            below ``vocab_size``, 0 in masked rows, never weighted or reduced.
        return_stats: as in ``topk_rkl``. S is the K entries, without a token that joins them. The
            divergence, the token log-probs and these share one read of the student in forward.

    Returns the loss, followed by the token log-probs and then by ``Stats``, where they are asked
    for: loss, (loss, logprobs), (loss, stats) or (loss, logprobs, stats). Upstream gradients of
    loss and log-probs make one gradient in one backward. Statistics are detached, the entropy too.

    All other arguments, and the rules for absent entries, masked rows and NaN, are those of
    ``topk_rkl``. Full softmaxes run over the ids below ``vocab_size`` of their own side; banned ids
    are in them, outside of S. There an id that a ``TopK`` lists twice counts once, NaN or +inf
    anywhere in a row makes it NaN, and what a teacher gives exactly 0 outside of S is absent.

    Shapes and dtypes: as in ``topk_rkl``; token log-probs are float32 (float64 for float64).
    Gradients: as there. Kept for backward: K entries and two numbers a row; outside of
    "renormalize" and with token log-probs the student's logits as well, which backward reads again,
    and for the log-probs one more number an entry and a row.

    A student of ``LinearLogits`` never has logits of shape (N, V); references to its tensors and
    K + 2 numbers a row are kept for backward, or the gradients. "renormalize" on the teacher's
    support costs k H multiplications a row, as in ``linear_topk_rkl``. Full softmaxes and token
    log-probs take one product with the head in forward. A trained head's exact background takes
    four products in all, or three where the loss is reduced, on the teacher's support, without
    token log-probs, not float16 and with no float64 teacher of a narrower head: forward makes the
    gradient then, and backward runs once. The sampled background takes k + 1 columns in backward.
    Memory: the gradients, in float32 while they are added up, and the workspace of
    ``LinearLogits``.

    Errors: as in ``topk_rkl``; ``ValueError`` for unknown names and combinations that do not exist,
    and for ``return_token_logprobs`` without ``token_ids``.

    Example::

        loss = topk_divergence(student_logits, teacher_logits, 64, outside="bucket")
        loss = topk_divergence(student_logits, teacher_logits, divergence=jsd(0.1))
        loss, logprobs, stats = topk_divergence(
            student_logits,
            teacher_logits,
            token_ids=tokens,
            return_token_logprobs=True,
            return_stats=("student_mass", "student_entropy"),
        )
        (loss - (advantages * logprobs).mean()).backward()

    Source: arXiv 2603.25562 for "renormalize"; docs/divergences.md names the others'.
    """
    check_names(options, "topk_divergence", DivergenceOptions)
    _checks.check_flag(return_token_logprobs, "return_token_logprobs")
    if return_token_logprobs and options.get("token_ids") is None:
        raise ValueError(
            "return_token_logprobs=True needs token_ids, the sampled token of each row"
        )
    complete: DivergenceOptions = {**MEMBER_DEFAULTS, **options}
    loss, logprobs, stats = _topk_divergence(
        _checked(student, complete), teacher, k, return_stats, complete, return_token_logprobs
    )
    if logprobs is None:
        return loss if stats is None else (loss, stats)
    return (loss, logprobs) if stats is None else (loss, logprobs, stats)


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
    return_stats: Literal[False] = False,
    **options: Unpack[Options],
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
    return_stats: Literal[True] | Sequence[str],
    **options: Unpack[Options],
) -> tuple[Tensor, Stats]: ...


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
    return_stats: bool | Sequence[str],
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Stats]: ...


def linear_topk_rkl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Tensor | TopK | LinearLogits,
    k: int | None = None,
    *,
    student_bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    return_stats: bool | Sequence[str] = False,
    **options: Unpack[Options],
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
    ``LinearLogits`` includes them. ``return_stats`` does compute the student's logits, once for
    ``student_mass``, ``student_entropy`` and ``overlap`` together, a few hundred rows at a time and
    without a gradient; all of them, the k entries too, have the product's precision there.
    ``backend`` "cuda" has no kernels for hidden states; None takes "triton" on such GPUs.

    Gradients: ``student_hidden``, ``student_weight``, ``student_bias`` and ``weight``, each only if
    it is needed: with a frozen head nothing of shape (V, H) is made. The head's gradient is dense
    and the same bits on every run. Ids that occur in every row cost no more than others.
    Kept for backward: ids, 8 bytes per row and entry (4 more with a softcap), and references to
    hidden states and weight. Differentiating twice raises ``RuntimeError``.

    Errors: ``ValueError`` or ``TypeError`` as in ``topk_rkl``; ``ValueError`` for a DTensor weight,
    unless the hidden states are a DTensor as well, as ``LinearLogits`` describes: under FSDP2 call
    it inside of the wrapped module's forward.

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
    least = 1 if options.get("vocab_shard") is None else 0
    _checks.check_head(student_hidden, student_weight, student_bias, "student_", least)
    _checks.check_factor(logit_scale, "logit_scale")
    if logit_softcap is not None:
        _checks.check_factor(logit_softcap, "logit_softcap")
    check_names(options, "linear_topk_rkl")
    head = LinearLogits._unchecked(
        student_hidden, student_weight, student_bias, logit_softcap, logit_scale
    )
    student = from_dtensor(head, "student")
    loss, _, stats = _topk_divergence(student, teacher, k, return_stats, options)
    return loss if stats is None else (loss, stats)


def _checked(student: object, options: Options) -> Source:
    """The student, once its parts fit."""
    student = from_dtensor(student, "student", options.get("inplace_grad"))
    if isinstance(student, Sharded):
        return student
    least = 1 if options.get("vocab_shard") is None else 0  # a rank may hold no column
    if not isinstance(student, LinearLogits):
        return _checks.check_logits(student, "student", least=least)
    # Checked again: autocast may have allowed mixed dtypes where it was made and be off here.
    _checks.check_head(student.hidden, student.weight, student.bias, "LinearLogits ", least)
    return student


def _topk_divergence(
    student: Source,
    teacher: object,
    k: int | None,
    return_stats: bool | Sequence[str],
    options: Options,
    with_logprobs: bool = False,
) -> tuple[Tensor, Tensor | None, Stats | None]:
    """``topk_divergence`` of a student that is checked, and of a divergence if there is a name.

    Returns (loss, token log-probs, stats), None for what is not asked for.
    """
    names = _stats_names(return_stats)
    device = student.device
    rows = student.shape[:-1] if isinstance(student, Tensor) else student.shape
    of_head = not (isinstance(student, Tensor) or of_shards(student))
    student, teacher = as_shards(
        student, teacher, options.get("vocab_shard"), options.get("teacher_vocab_shard")
    )
    teacher = check_teacher(teacher, k, rows, device)
    call = resolve(options, rows, device)
    if options.get("inplace_grad") and of_head:
        raise ValueError(
            "inplace_grad=True reuses the memory of logits, and student is hidden states and a "
            "head, which has none; leave it out"
        )
    if names is not None or with_logprobs:
        call = call._replace(stats=names, with_logprobs=with_logprobs)
    losses = row_losses(student, teacher, k, call, depth=2)
    loss = call.reduce(losses.loss)
    if losses.gradient is not None:
        loss = loss + losses.gradient
    return loss, losses.logprobs, losses.stats


def _stats_names(return_stats: object) -> tuple[str, ...] | None:
    """The statistics that are asked for, or None."""
    if isinstance(return_stats, _checks.FLAGS):
        return STATS if return_stats else None
    if isinstance(return_stats, str) or not isinstance(return_stats, Sequence):
        raise TypeError(
            f"return_stats is a {type(return_stats).__name__}, expected True, False or names as in "
            '("student_mass",)'
        )
    for name in return_stats:
        _checks.check_choice(name, "a name in return_stats", STATS)
    return tuple(return_stats)


def spelled(function: Callable[..., Any], taken: type[RowOptions]) -> inspect.Signature:
    """The signature of a function with the options that it takes as keywords written out."""
    own = inspect.signature(function)
    options = [
        parameter
        for name, parameter in inspect.signature(topk_rkl).parameters.items()
        if name in taken.__annotations__
    ]
    options += [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=_written(taken, name)
        )
        for name, default in MEMBER_DEFAULTS.items()
        if name in taken.__annotations__
    ]
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    return own.replace(parameters=[*parameters, *options])


def _written(taken: type[RowOptions], name: str) -> str:
    """An option's annotation as the source has it, like those of all other parameters."""
    return str(taken.__annotations__[name].__forward_arg__)


linear_topk_rkl.__signature__ = spelled(linear_topk_rkl, Options)  # type: ignore[attr-defined]
topk_divergence.__signature__ = spelled(topk_divergence, DivergenceOptions)  # type: ignore[attr-defined]
