"""Megatron-LM: distillation from cached top-K log-probs, on logits (S, B, V/tp).

``install`` puts the kernels under Megatron's own ``--logits-load-dir``. ``loss_func`` is for a
``forward_step`` of your own; it needs megatron-core alone, or nothing with a ``vocab_shard``.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opd_kernels._checks import check_number
from opd_kernels.api import topk_divergence
from opd_kernels.distributed import VocabShard
from opd_kernels.integrations._hooks import announce, check_parameters, megatron_shard
from opd_kernels.logprobs import token_logprobs
from opd_kernels.support import TopK

__all__ = ["install", "loss_func", "topk_kl_div"]

TRAINER = "Megatron-LM"
KNOWN = "Megatron-LM's main branch of 2026-08-22"
CACHED_LOSS = "megatron.training.distillation.cached_logits_loss"
# What Megatron's saver writes where a row has fewer entries. The id -1 beside it does not survive
# its 17 bits: it is read back as 131071. So the value alone says that an entry is absent.
SENTINEL = -1e3


def install() -> None:
    """Replaces the loss under Megatron's ``--logits-load-dir`` by ``topk_kl_div`` of this module.

    Call it once in ``pretrain_gpt.py`` or ``pretrain_hybrid.py``, before ``pretrain``. Reading the
    teacher's files, the mask, ``--logits-load-kd-loss-alpha``, reductions and reports stay
    Megatron's. A second call changes nothing.

    The captured logits are copied where the cross-entropy overwrites their memory: Megatron's does
    in float32 (training without ``--bf16`` and ``--fp16``), Transformer Engine's in any dtype
    (``--cross-entropy-fusion-impl te``).

    Errors: ``ImportError`` for a Megatron-LM without ``megatron.training.distillation``, or where
    what is replaced takes other parameters.

    Example::

        from opd_kernels.integrations import megatron

        if __name__ == "__main__":
            megatron.install()
            ...
            pretrain(...)
    """
    cached: Any = importlib.import_module(CACHED_LOSS)
    if cached.topk_kl_div is topk_kl_div:
        return
    check_parameters(
        cached.topk_kl_div,
        (
            "student_logits",
            "teacher_topk_logprobs",
            "teacher_topk_indices",
            "tp_size",
            "tp_rank",
            "tp_group",
            "add_ghost_token",
        ),
        KNOWN,
    )
    capture = cached.StudentLogitsCapture
    check_parameters(capture._capture_logits, ("self", "module", "input", "output"), KNOWN)
    cached.topk_kl_div = topk_kl_div
    capture._capture_logits = _with_copies(capture._capture_logits)


def topk_kl_div(
    student_logits: Tensor,
    teacher_topk_logprobs: Tensor,
    teacher_topk_indices: Tensor,
    tp_size: int,
    tp_rank: int,
    tp_group: dist.ProcessGroup | None,
    add_ghost_token: bool = False,
) -> Tensor:
    """Megatron's function of this name: forward KL on cached entries, one part a rank.

    With full softmaxes p of the student and q of the teacher, the entries S of a row, and P and Q
    what they hold of p and q::

        L = sum over S of q (log q - log p)
            + (1 - Q) (log(1 - Q) - log(1 - P))     with a ghost token

    Shapes: ``student_logits`` (S, B, V/tp); the teacher's (S, B, K), of any floating and integer
    dtype, the same on all ranks. Columns lie side by side in the order of ranks. An entry is absent
    where its log-prob is at or below -1000, or its id outside of the vocabulary; its share is the
    ghost's.

    Returns (B, S), contiguous. The parts of all ranks sum to L: rank 0 has L, all others 0. The
    caller sums them, as ``LossFuncCallable`` does with ``all_reduce``; each rank calls backward.

    Gradients: ``student_logits``, of the rank's own columns, not divided by ``tp_size``. They are
    not changed.

    Errors: those of ``topk_divergence``.

    Example::

        part = topk_kl_div(logits, logprobs, ids, tp_size, tp_rank, tp_group, add_ghost_token=True)
        loss = (part * loss_mask).sum()
        dist.all_reduce(loss, group=tp_group)

    Source: Megatron-LM, megatron/training/distillation/cached_logits_loss.py.
    """
    shard = None
    if tp_size > 1:
        width = student_logits.shape[-1]
        shard = VocabShard(tp_rank * width, tp_size * width, tp_group)
    announce(TRAINER, f"topk_kl_div{', ghost token' if add_ghost_token else ''}")
    loss = topk_divergence(
        student_logits,
        _entries(teacher_topk_logprobs, teacher_topk_indices),
        divergence="forward_kl",
        outside=_outside(add_ghost_token),
        vocab_shard=shard,
        reduction="none",
    )
    if tp_rank > 0:  # counted on rank 0; the gradient of each rank's columns stays
        loss = loss - loss.detach()
    return loss.transpose(0, 1).contiguous()


def loss_func(
    loss_mask: Tensor,
    output_tensor: Tensor,
    model: nn.Module | None = None,
    *,
    teacher_logprobs: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    labels: Tensor | None = None,
    kd_loss_alpha: float = 1.0,
    add_ghost_token: bool = True,
    sequence_first: bool = False,
    vocab_size: int | None = None,
    vocab_shard: VocabShard | Literal["whole"] | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A ``loss_func`` for a ``forward_step`` whose model returns logits, not losses.

    With L of ``topk_kl_div`` and m of ``loss_mask``, over the rows of this micro-batch::

        loss = alpha sum of m L + (1 - alpha) sum of m (-log p[label])

    Both parts come from one read of the logits and have one gradient. Rows of m = 0 are not read.

    Shapes: ``output_tensor``, the logits as ``GPTModel`` returns them without labels, (B, S, V/tp);
    ``loss_mask`` and ``labels`` (B, S); the teacher's (B, S, K), with the rules of ``topk_kl_div``.
    With ``sequence_first`` the logits are (S, B, V/tp) and the teacher's (S, B, K), as Megatron's
    saver writes them. Under context parallelism all are this rank's part of the sequence. Packed
    sequences are one row, B = 1.

    Args:
        loss_mask: factor of each row, as Megatron's; also what counts tokens.
        output_tensor: the logits.
        model: as Megatron's schedules pass it; where it is in evaluation mode, the loss is the
            cross-entropy alone, as under ``--logits-load-dir``.
        teacher_logprobs: the cached log-probs, at temperature 1; not needed in evaluation.
        teacher_ids: their ids.
        labels: needed for the cross-entropy: with an alpha below 1, and in evaluation.
        kd_loss_alpha: alpha, as ``--logits-load-kd-loss-alpha``.
        add_ghost_token: as Megatron's loss always does. Without it what is outside is left out.
        sequence_first: as above.
        vocab_size: the number of real ids; columns beyond are padding and take no part. None counts
            them in, as Megatron does.
        vocab_shard: the columns of this rank. None asks ``megatron.core.parallel_state``, "whole"
            is logits that are not split. A ``VocabShard`` has its own ``vocab_size``, and its ranks
            may have different widths.

    Returns (loss, number of tokens, report), sums over this rank's rows, which Megatron's schedules
    normalise and sum over data-parallel and context-parallel ranks. The loss is the same on all
    tensor-parallel ranks: do not sum it over them. The report has the keys of Megatron's.

    Gradients: ``output_tensor``, of the rank's own columns.

    Errors: ``ValueError`` for an alpha outside [0, 1] and for tensors that are missing;
    ``ImportError`` without megatron-core where it is asked; and those of ``topk_divergence``.

    Example::

        def forward_step(data_iterator, model):
            batch = get_batch(data_iterator)
            logits = model(batch.tokens, batch.position_ids, batch.attention_mask)  # no labels
            teacher = {"teacher_logprobs": batch.logprobs, "teacher_ids": batch.ids}
            return logits, partial(loss_func, batch.loss_mask, model=model, **teacher)

    Source: Megatron-LM, pretrain_gpt.py and megatron/training/distillation/cached_logits_loss.py.
    """
    check_number(kd_loss_alpha, "kd_loss_alpha", "a number from 0 to 1")
    if not 0 <= kd_loss_alpha <= 1:
        raise ValueError(f"kd_loss_alpha is {kd_loss_alpha}, allowed is 0 to 1")
    rows = loss_mask.T if sequence_first else loss_mask
    tokens = labels.T if labels is not None and sequence_first else labels
    where: dict[str, Any] = {"mask": rows != 0, **_columns(output_tensor, vocab_size, vocab_shard)}
    weight = rows.float()
    num_tokens = loss_mask.sum().detach().to(torch.int)
    distils = model is None or model.training
    if tokens is None and (kd_loss_alpha < 1 or not distils):
        raise ValueError(
            "the cross-entropy needs labels (in evaluation, and with kd_loss_alpha below 1); pass "
            "labels= to loss_func"
        )
    if tokens is not None and not distils:
        loss = -(token_logprobs(output_tensor, tokens, **where) * weight).sum()
        return loss, num_tokens, {"lm loss": _report(loss, num_tokens)}
    if teacher_logprobs is None or teacher_ids is None:
        raise ValueError(
            "the distillation needs the cached log-probs and their ids; pass teacher_logprobs= and "
            "teacher_ids= to loss_func"
        )
    announce(TRAINER, f"loss_func{', ghost token' if add_ghost_token else ''}")
    found: Any = topk_divergence(
        output_tensor,
        _entries(teacher_logprobs, teacher_ids),
        divergence="forward_kl",
        outside=_outside(add_ghost_token),
        weight=weight,
        reduction="sum",
        token_ids=tokens,
        return_token_logprobs=tokens is not None,
        **where,
    )
    if tokens is None:
        parts = {"logits distillation loss": found, "total loss": found}
    else:
        distillation, lm = found[0], -(found[1] * weight).sum()
        total = kd_loss_alpha * distillation + (1 - kd_loss_alpha) * lm
        parts = {"lm loss": lm, "logits distillation loss": distillation, "total loss": total}
    report = {name: _report(part, num_tokens) for name, part in parts.items()}
    return parts["total loss"], num_tokens, report


def _entries(logprobs: Tensor, ids: Tensor) -> TopK:
    absent = logprobs <= SENTINEL
    normalised = torch.zeros(logprobs.shape[:-1], device=logprobs.device)
    return TopK(ids.masked_fill(absent, -1), logprobs, logsumexp=normalised)


def _outside(add_ghost_token: bool) -> str:
    return "bucket" if add_ghost_token else "truncate"


def _columns(
    logits: Tensor, vocab_size: int | None, shard: VocabShard | Literal["whole"] | None
) -> dict[str, Any]:
    """The options that say which columns these logits are."""
    if isinstance(shard, VocabShard):
        return {"vocab_shard": shard, "vocab_size": vocab_size}
    if shard is None:
        return {"vocab_shard": _own_columns(logits.shape[-1], vocab_size), "vocab_size": vocab_size}
    if shard != "whole":
        raise ValueError(f'vocab_shard is {shard!r}, allowed are a VocabShard, "whole" and None')
    return {"vocab_size": vocab_size}


def _own_columns(width: int, vocab_size: int | None) -> VocabShard | None:
    try:
        return megatron_shard(width, vocab_size)
    except ModuleNotFoundError as error:
        raise ImportError(
            "loss_func asks megatron.core which columns the logits are, and it is not installed; "
            'install megatron-core, or pass vocab_shard=VocabShard(...), or "whole"'
        ) from error


def _report(total: Tensor, num_tokens: Tensor) -> Tensor:
    """(2,): a sum over rows and their number; Megatron adds them up over ranks and divides."""
    return torch.cat([total.detach().view(1), num_tokens.view(1)])


def _with_copies(capture: Any) -> Any:
    """Megatron's hook, which then keeps a copy of logits that the cross-entropy overwrites."""

    @functools.wraps(capture)
    def captured(self: Any, module: nn.Module, input: Any, output: Any) -> None:
        before = self._logits
        capture(self, module, input, output)
        if self._logits is not before and _overwritten(module, self._logits):
            self._logits = self._logits.clone()

    return captured


def _overwritten(output_layer: nn.Module, logits: Tensor) -> bool:
    """Whether the cross-entropy writes into the memory of these logits.

    Transformer Engine's does so unseen by autograd's version counter.
    """
    config = getattr(output_layer, "config", None)
    fused = getattr(config, "cross_entropy_loss_fusion", False)
    engine = fused and getattr(config, "cross_entropy_fusion_impl", "native") == "te"
    return engine or logits.dtype == torch.float32
