"""verl's distillation with the losses of this package, as loss modes of their own.

verl's entry point loads ``verl_plugin``, which calls ``register``; that imports verl.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_kernels._arguments import Allowed, exp
from opd_kernels._ordering import in_order
from opd_kernels.api import topk_divergence
from opd_kernels.distributed import Sharded, VocabShard
from opd_kernels.divergences import Divergence, forward_kl, jsd, reverse_kl
from opd_kernels.integrations._hooks import announce, check_parameters, megatron_shard
from opd_kernels.options import backend_name
from opd_kernels.sides import values_at
from opd_kernels.stats import Stats, logsumexp
from opd_kernels.support import TopK

__all__ = ["MODES", "Mode", "register", "topk_losses"]

TESTED = "verl 0.9.1"
# What carries the losses from the model's forward to the loss. Not verl's "distillation_losses":
# a fused kernel of an engine writes its own loss there, whatever the mode.
LOSSES = "opd_kernels_losses"
WATCHED = ("teacher_mass", "student_mass", "overlap", "valid_k")


class Mode(NamedTuple):
    """What a loss mode computes: the options of this name of ``topk_divergence``."""

    divergence: Divergence
    outside: str


MODES = {
    "opd_topk_reverse_kl": Mode(reverse_kl(), "renormalize"),  # the paper's
    "opd_topk_forward_kl": Mode(forward_kl(), "renormalize"),
    "opd_topk_jsd": Mode(jsd(), "renormalize"),
    "opd_topk_reverse_kl_bucket": Mode(reverse_kl(), "bucket"),
    "opd_topk_forward_kl_bucket": Mode(forward_kl(), "bucket"),
    "opd_topk_jsd_bucket": Mode(jsd(), "bucket"),
    "opd_topk_reverse_kl_generalize": Mode(reverse_kl(), "generalize"),
    "opd_topk_forward_kl_truncate": Mode(forward_kl(), "truncate"),  # forward_kl_topk, not clamped
}
_registered: dict[str, Mode] = {}


def register(modes: Mapping[str, Mode] = MODES) -> None:
    """Makes loss modes known to verl: ``distillation.distillation_loss.loss_mode=NAME``.

    The entry point calls it for ``MODES`` in every process that imports verl. Call it for others in
    a module that ``VERL_USE_EXTERNAL_MODULES`` names. A second call with the same modes does
    nothing. verl's own modes keep their functions.

    Args:
        modes: a ``Mode`` for each new name.

    Errors: ``ImportError`` where verl is missing or its functions take other parameters than in the
    version this was tested with; verl's ``ValueError`` for a name that is taken.

    Example::

        register({"opd_topk_mixed": Mode(mixed(forward=0.3), "renormalize")})
    """
    from verl.trainer.distillation import losses
    from verl.workers.utils.padding import no_padding_2_padding

    expected = ["config", "distillation_config", "data", "student_logits", "data_format"]
    check_parameters(losses.compute_topk_loss, expected, TESTED)
    expected = ["config", "distillation_config", "model_output", "data"]
    check_parameters(losses.compute_forward_kl_topk, expected, TESTED)
    check_parameters(no_padding_2_padding, ["tensor", "data"], TESTED)
    new = {name: mode for name, mode in modes.items() if _registered.get(name) != mode}
    settings = losses.DistillationLossSettings(names=list(new), use_topk=True)
    losses.register_distillation_loss(settings)(_final_loss)
    if not _registered:
        losses.compute_topk_loss = _dispatching(losses.compute_topk_loss)
    _registered.update(new)


def topk_losses(
    student_logits: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    mode: Mode,
    *,
    topk: int | None = None,
    log_prob_min_clamp: float | None = None,
    vocab_shard: VocabShard | None = None,
) -> dict[str, Tensor]:
    """The loss of each row and what verl logs of it, as its ``compute_forward_kl_topk`` does.

    With p the student's softmax and q the teacher's over all ids, S the ``topk`` best of the given
    entries (None: all of them) and f ``log_prob_min_clamp``::

        opd_kernels_losses       topk_divergence of the mode, with logp_floor=f
        student_mass             sum over S of p          teacher_mass   sum over S of q
        overlap_count            how many of S are among the student's ``topk`` best
        overlap_token_advantage  their mean of e^b (a - b), a = max(log p, f), b = max(log q, f)

    Shapes and dtypes: ``student_logits`` (B, T, V), or this rank's columns with ``vocab_shard``,
    divided by the temperature already; ``teacher_logprobs`` floating and ``teacher_ids`` int32 or
    int64 (B, T, K), of temperature 1. Returns (B, T) each, float32 (float64 for float64), the count
    int64.

    Entries with a log-prob of -inf or at most -1000 and ids outside of the vocabulary take no part.
    Rows that verl fills up, with log-prob 0 at all of two or more entries, have all zeros and are
    not read. Gradients: ``student_logits``, from the losses alone. No value is read on the host.

    Errors: those of ``topk_divergence`` and ``TopK.from_tensors``.

    Example::

        mode = MODES["opd_topk_reverse_kl_bucket"]
        found = topk_losses(student_logits / temperature, logprobs, ids, mode, topk=32)
        loss = (found["opd_kernels_losses"] * mask).sum() / batch_num_tokens * dp_size

    Source: verl 0.9.1, ``verl.trainer.distillation``.
    """
    floor = log_prob_min_clamp
    support = TopK.from_tensors(teacher_logprobs, teacher_ids, k=topk)
    mask = support.present
    if teacher_logprobs.shape[-1] > 1:  # all of probability 1 are no distribution, but filler
        mask = mask & (teacher_logprobs != 0).any(-1)
    losses, stats = topk_divergence(
        student_logits,
        support,
        divergence=mode.divergence._replace(logp_floor=floor),
        outside=mode.outside,
        mask=mask,
        reduction="none",
        vocab_shard=vocab_shard,
        return_stats=WATCHED,
    )
    stats = stats._replace(**{name: torch.where(mask, getattr(stats, name), 0) for name in WATCHED})
    count = (stats.overlap * stats.valid_k).round().long()
    student = student_logits.detach()
    source = student if vocab_shard is None else Sharded(student, vocab_shard)
    entries = values_at(source, support.ids, _whole(source, mask), backend_name(None))
    return {
        LOSSES: losses,
        "student_mass": stats.student_mass,
        "teacher_mass": stats.teacher_mass,
        "overlap_count": count,
        "overlap_token_advantage": _overlap_advantage(entries, support, stats, count, floor),
    }


def _whole(source: Tensor | Sharded, mask: Tensor) -> Allowed:
    """All ids of the student's vocabulary, in rows that count."""
    return Allowed(source.vocab if isinstance(source, Sharded) else source.shape[-1], None, mask)


def _overlap_advantage(
    entries: Tensor, support: TopK, stats: Stats, count: Tensor, floor: float | None
) -> Tensor:
    """The mean (...) of e^b (a - b) over the entries that the student has among its best.

    ``entries`` (..., K): the student's logits at the support. Those among its best are the first
    ``count`` of them by (logit descending, id ascending). Their log-probs follow from the mass.
    """
    total = logsumexp(entries) - stats.student_mass.log()  # over the vocabulary
    student = entries - total[..., None]
    teacher = support.logits
    if floor is not None:
        student, teacher = student.clamp(min=floor), teacher.clamp(min=floor)
    gain = exp(teacher) * (student - teacher)
    ids, ordered = in_order(support.ids, entries, support.k)
    last = (count - 1).clamp(min=0)[..., None]
    last_id, least = ids.gather(-1, last), ordered.gather(-1, last)
    shared = (entries > least) | ((entries == least) & (support.ids <= last_id))
    return torch.where(shared & (count[..., None] > 0), gain, 0).sum(-1) / count.clamp(min=1)


def _dispatching(own: Callable[..., Any]) -> Callable[..., Any]:
    """verl's ``compute_topk_loss``, which computes the forward KL whatever the mode, and ours."""

    @wraps(own)
    def compute_topk_loss(
        config: Any, distillation_config: Any, data: Any, student_logits: Tensor, data_format: str
    ) -> Any:
        loss_config = distillation_config.distillation_loss
        if loss_config.loss_mode not in _registered:
            return own(config, distillation_config, data, student_logits, data_format)
        _check_options(loss_config)
        if config.strategy == "megatron":
            teacher = _megatron_teacher(data, data_format)
            # Columns that pad the vocabulary are in verl's softmax, too.
            shard = megatron_shard(student_logits.shape[-1])
        elif config.strategy in ("fsdp", "fsdp2", "veomni"):
            teacher, shard = _fsdp_teacher(data), None
        else:
            raise NotImplementedError(
                f"strategy is {config.strategy!r}, and {loss_config.loss_mode} is for fsdp, fsdp2, "
                "veomni and megatron; use one of them, or a loss_mode of verl's"
            )
        mode, floor = _registered[loss_config.loss_mode], loss_config.log_prob_min_clamp
        announce("verl", f"{loss_config.loss_mode} ({mode.outside}, log-prob floor {floor})")
        logits = _kept(student_logits, data, mode)
        return topk_losses(
            logits,
            *teacher,
            mode,
            topk=loss_config.topk,
            log_prob_min_clamp=floor,
            vocab_shard=shard,
        )

    return compute_topk_loss


def _final_loss(
    config: Any, distillation_config: Any, model_output: dict[str, Any], data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """(losses (B, T) of the responses, verl's metrics), in place of verl's own function.

    verl's also replaces negative losses by 0, which takes their gradient away.
    """
    from verl.trainer.distillation import losses
    from verl.workers.utils.padding import no_padding_2_padding

    if LOSSES not in model_output:
        raise ValueError(
            f"loss_mode is {distillation_config.distillation_loss.loss_mode}, but the engine "
            "computed the losses itself, in a fused kernel that knows the forward KL only; set "
            "actor_rollout_ref.model.use_fused_kernels=False"
        )
    ours = model_output[LOSSES]
    _, metrics = losses.compute_forward_kl_topk(
        config, distillation_config, {**model_output, "distillation_losses": ours}, data
    )
    return no_padding_2_padding(ours, data), metrics


def _check_options(loss_config: Any) -> None:
    """Raises for what would train nothing."""
    if loss_config.use_policy_gradient:
        raise ValueError(
            f"use_policy_gradient is True: the loss of {loss_config.loss_mode} would be a constant "
            "factor of the sampled token's log-prob. It does not depend on that token, so the "
            "expected gradient is 0; set distillation.distillation_loss.use_policy_gradient=False"
        )


def _kept(student_logits: Tensor, data: Any, mode: Mode) -> Tensor:
    """Logits that stay as they are until backward has read them.

    Engines compute the log-prob of the sampled token from the same logits, in place: Megatron's
    cross entropy in forward, that of flash-attn in backward, which autograd does not notice.
    """
    from verl.utils.tensordict_utils import get_non_tensor_data

    read_again = mode.outside != "renormalize" and student_logits.requires_grad
    if not read_again or get_non_tensor_data(data=data, key="distillation_only", default=False):
        return student_logits
    return student_logits.clone()


def _fsdp_teacher(data: Any) -> tuple[Tensor, Tensor]:
    """Log-probs and ids (1, tokens, K) of this sequence-parallel rank's part of the packed rows."""
    from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor

    logprobs, ids = (data[name].values()[None] for name in ("teacher_logprobs", "teacher_ids"))
    if get_ulysses_sequence_parallel_world_size() > 1:
        logprobs, ids = (slice_input_tensor(tensor, dim=1) for tensor in (logprobs, ids))
    return logprobs, ids


def _megatron_teacher(data: Any, data_format: str) -> tuple[Tensor, Tensor]:
    """Log-probs and ids of this context-parallel rank's rows, (1, tokens, K) or (B, T, K)."""
    from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine

    split = preprocess_thd_engine if data_format == "thd" else preprocess_bshd_engine
    logprobs, ids = (split(data[name])[0] for name in ("teacher_logprobs", "teacher_ids"))
    return logprobs, ids
