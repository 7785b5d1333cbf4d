"""NeMo-RL: a ``loss_fn`` with its ``DistillationLossFn``'s loss, from the student's logits."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from opd_kernels.api import topk_divergence
from opd_kernels.distributed import Sharded, VocabShard, from_dtensor
from opd_kernels.divergences import Divergence, forward_kl, mixed, reverse_kl
from opd_kernels.integrations._hooks import announce, check_parameters
from opd_kernels.support import TopK

__all__ = ["DistillationLossFn"]

KNOWN = "NeMo-RL 0.7.0 and its main branch of August 2026"
# What the workers call; it passes a loss of input type LOGIT the logits as they are.
PREPARED = (
    "logits",
    "data",
    "loss_fn",
    "vocab_parallel_rank",
    "vocab_parallel_group",
    "context_parallel_group",
    "sampling_params",
    "d2t",
    "chunk_size",
)


class DistillationLossFn:
    """NeMo-RL's distillation loss: ``loss_fn`` for ``distillation_train``.

    With the teacher's K logits t and the student's logits z at a position's ids S::

        p = softmax(z[S])    q = softmax(t)    w = mixed_kl_weight
        forward: KL(q || p)    reverse: KL(p || q)    mixed: w KL(q || p) + (1 - w) KL(p || q)

    ``zero_outside_topk`` with the forward KL: p is of the softmax over the whole vocabulary. The
    loss is the sum over positions of ``token_mask`` (of the next position) times ``sample_mask``,
    divided by ``global_valid_toks`` + 1e-8; without these masks the mean over all positions but the
    last. Temperatures are applied by NeMo-RL's workers, to both sides.

    Args:
        cfg: ``master_config.loss_fn``, with ``kl_type`` ("forward", "reverse" or "mixed"),
            ``mixed_kl_weight`` in [0, 1] and ``zero_outside_topk``; or a mapping of these, as
            NeMo-RL had it up to 0.7.

    Errors: ``ValueError`` for other values, and for ``zero_outside_topk`` with the reverse or the
    mixed KL: the entropy outside of the support that NeMo-RL adds there is in no member of
    ``topk_divergence``. ``ImportError`` where NeMo-RL prepares a loss's input otherwise than in the
    versions that this class was written for.

    Example, after ``setup(...)`` in ``examples/run_distillation.py``::

        loss_fn = DistillationLossFn(master_config.loss_fn)

    Source: ``nemo_rl/algorithms/loss/loss_functions.py`` in NVIDIA-NeMo/RL.
    """

    def __init__(self, cfg: Any) -> None:
        """Reads the configuration, and raises for what is not served."""
        read = cfg.__getitem__ if isinstance(cfg, Mapping) else cfg.__getattribute__
        self.kl_type: str = read("kl_type")
        self.mixed_kl_weight: float = read("mixed_kl_weight")
        self.zero_outside_topk: bool = read("zero_outside_topk")
        self.divergence = _divergence(self.kl_type, self.mixed_kl_weight)
        if self.zero_outside_topk and self.kl_type != "forward":
            raise ValueError(
                f"zero_outside_topk with kl_type {self.kl_type!r} adds the student's entropy "
                "outside of the support, which no loss of this package has; keep the loss_fn that "
                'NeMo-RL\'s setup() returns, or set kl_type to "forward"'
            )
        if "nemo_rl" in sys.modules:  # on the driver: before the first step
            _interfaces()

    @property
    def loss_type(self) -> Any:
        """``LossType.TOKEN_LEVEL``: normalised by the global number of tokens."""
        return _interfaces().LossType.TOKEN_LEVEL

    @property
    def input_type(self) -> Any:
        """``LossInputType.LOGIT``: workers pass the logits as they are."""
        return _interfaces().LossInputType.LOGIT

    def __call__(
        self,
        logits: Tensor,
        data: Mapping[str, Any],
        global_valid_seqs: Tensor | None,
        global_valid_toks: Tensor | float | None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of a micro-batch, and NeMo-RL's metrics of it.

        Args:
            logits: of the student, (B, S, V); gets the gradient. A DTensor with Shard(-1) over
                tensor-parallel ranks, and with Shard(1) over a mesh dimension "cp"; or under
                Megatron (B, S / cp, V / tp), of the groups in ``megatron.core.parallel_state``.
                Longer than the teacher's S where sequences were padded.
            data: ``teacher_topk_logits`` and ``teacher_topk_indices`` (B, S, K), ``input_ids``
                (B, S), ``token_mask`` (B, S) and ``sample_mask`` (B,).
            global_valid_seqs: not used, as in NeMo-RL.
            global_valid_toks: what the sum is divided by; None: this call's own count.

        Returns the loss, the same on all tensor- and context-parallel ranks, and {"loss": float,
        "num_valid_samples": int}. The float is one synchronisation, which NeMo-RL's loss has too.

        The gradient is such that the trainer's own scaling makes that of the whole batch: with
        DTensors each context-parallel rank has that of its own positions, under Megatron times
        their number, by which its loss is divided.

        Errors: ``ValueError`` for logits that are shorter than the teacher's positions, or of a
        length that context-parallel ranks cannot hold two chunks of, and for masks that are shorter
        than the teacher's.
        """
        announce("NeMo-RL", self._name())
        parallel = _parallel(logits)
        part = parallel.logits
        context = parallel.context
        rows = part.shape[1] * context.size
        teacher = self._teacher(data, part.device)
        _check_length(rows, context.size, teacher)
        weight, normalizer = _weights(data, teacher.shape, global_valid_toks, part.device)
        weight = context.own(pad(weight, (0, rows - weight.shape[1])))
        loss = topk_divergence(
            part,
            _own_rows(teacher, rows, context),
            divergence=self.divergence,
            outside="truncate" if self.zero_outside_topk else "renormalize",
            mask=weight != 0,
            weight=weight,
            normalizer=normalizer,
            vocab_shard=parallel.shard,
        )
        loss = context.sum(loss)
        return loss, {"loss": loss.item(), "num_valid_samples": data["input_ids"].shape[0]}

    def _name(self) -> str:
        """For the log line."""
        weight = f" {self.mixed_kl_weight}" if self.kl_type == "mixed" else ""
        return f"{self.kl_type}{weight} KL" + ", zero_outside_topk" * self.zero_outside_topk

    def _teacher(self, data: Mapping[str, Any], device: torch.device) -> TopK:
        """The support. With ``zero_outside_topk`` all of the teacher's probability is in it."""
        ids = data["teacher_topk_indices"].to(device)
        logits = data["teacher_topk_logits"].to(device)
        if not self.zero_outside_topk:
            return TopK(ids, logits)
        if logits.dtype != torch.float64:
            logits = logits.float()
        total = logits.logsumexp(-1)
        return TopK(ids, logits, total, torch.full_like(total, -torch.inf))


def _divergence(kl_type: str, weight: float) -> Divergence:
    """What NeMo-RL calls its types of KL."""
    if not 0 <= weight <= 1:
        raise ValueError(f"mixed_kl_weight is {weight}, allowed is 0 to 1")
    if kl_type == "mixed":
        return mixed(weight)
    if kl_type not in ("forward", "reverse"):
        raise ValueError(f"kl_type is {kl_type!r}, allowed are forward, reverse, mixed")
    return forward_kl() if kl_type == "forward" else reverse_kl()


@cache
def _interfaces() -> Any:
    """NeMo-RL's enums, once its calling convention is the one that this module serves."""
    from nemo_rl.algorithms.loss import interfaces, prepare_loss_input

    check_parameters(prepare_loss_input, PREPARED, KNOWN)
    return interfaces


class _Context(NamedTuple):
    """The ranks that share a sequence. Of 2 ``size`` chunks, each has one from either end."""

    group: dist.ProcessGroup | None = None
    size: int = 1
    factor: int = 1  # of the gradient

    def own(self, rows: Any) -> Any:
        """This rank's positions of a tensor or ``TopK`` (B, positions)."""
        if self.size == 1:
            return rows
        rank, length = dist.get_rank(self.group), rows.shape[1] // (2 * self.size)
        join = TopK.cat if isinstance(rows, TopK) else torch.cat
        chunks = (rank, 2 * self.size - 1 - rank)
        return join([rows[:, i * length : (i + 1) * length] for i in chunks], 1)

    def sum(self, loss: Tensor) -> Tensor:
        """The loss of whole sequences."""
        return loss if self.size == 1 else _Sum.apply(loss, self.group, self.factor)


class _Sum(torch.autograd.Function):
    """The sum over ranks that all call backward; the gradient is the upstream's times a factor."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, group: dist.ProcessGroup, factor: int) -> Tensor:
        ctx.factor = factor
        total = loss.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream[0] * ctx.factor, None, None


class _Parallel(NamedTuple):
    """The logits that are here, and who has the others."""

    logits: Tensor
    shard: VocabShard | None
    context: _Context


def _parallel(logits: Any) -> _Parallel:
    """Groups from a DTensor's mesh, or from Megatron's state where workers run on Megatron."""
    local = from_dtensor(logits, "logits")
    if isinstance(local, Sharded):
        mesh = logits.device_mesh
        context = mesh.get_group("cp") if "cp" in (mesh.mesh_dim_names or ()) else None
        return _of_groups(local.part, local.shard, context)
    state: Any = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return _Parallel(logits, None, _Context())
    group, width = state.get_tensor_model_parallel_group(), logits.shape[-1]
    shard = VocabShard(dist.get_rank(group) * width, width * dist.get_world_size(group), group)
    return _of_groups(logits, shard, state.get_context_parallel_group(), megatron=True)


def _of_groups(
    logits: Any, shard: VocabShard, context: dist.ProcessGroup | None, megatron: bool = False
) -> _Parallel:
    """Without what a group of one rank is not needed for."""
    size = 1 if context is None else dist.get_world_size(context)
    return _Parallel(
        logits,
        shard if shard.ranks > 1 else None,
        _Context(context, size, size if megatron else 1),
    )


def _check_length(rows: int, ranks: int, teacher: TopK) -> None:
    """Raises unless the logits of all ranks cover the teacher's positions, in two chunks each."""
    if rows % (2 * ranks) and ranks > 1:
        raise ValueError(
            f"logits have {rows // ranks} positions on each of {ranks} context-parallel ranks, "
            "expected two chunks of equal length; set make_sequence_length_divisible_by to a "
            "multiple of twice the ranks"
        )
    if rows < teacher.shape[1]:
        raise ValueError(
            f"logits have {rows} positions on all context-parallel ranks and teacher_topk_indices "
            f"{teacher.shape[1]}; both must be of the same padded sequences"
        )


def _weights(
    data: Mapping[str, Any],
    shape: torch.Size,
    toks: Tensor | float | None,
    device: torch.device,
) -> tuple[Tensor, Tensor | float]:
    """(the factor of each position's loss but the last (B, S - 1), what their sum is divided by).

    A position's mask is that of the token that it predicts.
    """
    batch, length = shape
    if not ("token_mask" in data and "sample_mask" in data):
        return torch.ones(batch, length - 1, device=device), batch * (length - 1)
    token_mask = data["token_mask"]
    if token_mask.shape[1] < length:
        raise ValueError(
            f"token_mask has {token_mask.shape[1]} positions and teacher_topk_indices {length}; "
            "both must be of the same padded sequences"
        )
    weight = (token_mask[:, 1:length] * data["sample_mask"].unsqueeze(-1)).float()
    return weight, (weight.sum() if toks is None else toks) + 1e-8


def _own_rows(teacher: TopK, rows: int, context: _Context) -> TopK:
    """The teacher at this rank's positions, with absent entries where sequences were padded."""
    batch, length = teacher.shape
    padded = teacher if length == rows else teacher.pad(batch, rows)
    own: TopK = context.own(padded)
    return own
