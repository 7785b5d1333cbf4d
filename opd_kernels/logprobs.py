"""``token_logprobs``: log-probs of given tokens, in one read of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_kernels import _checks, _ops, debugging
from opd_kernels._arguments import Allowed, Tail
from opd_kernels._autograd import BackgroundLoss, Request, Token
from opd_kernels._collectives import agree
from opd_kernels.distributed import Sharded, VocabShard, from_dtensor, sharded
from opd_kernels.head import LinearLogits
from opd_kernels.linear import token_logprobs_of_head
from opd_kernels.options import Call, resolve
from opd_kernels.selection import vocab_of
from opd_kernels.sides import values_at
from opd_kernels.stats import Side

__all__ = ["token_logprobs"]


def token_logprobs(
    logits: Tensor | LinearLogits,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    inplace_grad: bool = False,
    vocab_shard: VocabShard | None = None,
    backend: str | None = None,
) -> Tensor:
    """The log-prob of one token per row, as ``log_softmax`` and ``gather`` give it.

    With logits z, the token y and W = min(V, vocab_size)::

        log p_y = z_y / T - log sum over [0, W) of exp(z / T)
        d log p_y / dz_v = (1[v = y] - p_v) / T  for v < W, 0 beyond

    Shapes and dtypes: ``logits`` (..., V), float16, bfloat16, float32 or float64, last stride 1, or
    ``LinearLogits``, whose logits exist a few hundred rows at a time in forward and a few thousand
    columns at a time in backward; ``token_ids`` int32 or int64 (...); returns (...), float32
    (float64 for float64), in nats. The logits are read once, and once more in backward.

    Args:
        logits: what gets the gradient; of ``LinearLogits`` hidden states, weight and bias.
        token_ids: y. One outside of [0, W) makes its row NaN, unless the row is masked; its
            gradient too, even if the log-prob is left out afterwards. So pass the mask here.
        temperature: T; a float or a constant tensor per row.
        mask: bool or integer per row; False or 0: the row is not read and has log-prob 0 and
            gradient 0, whatever it holds.
        vocab_size: W, for padded vocabularies.
        inplace_grad: as in ``topk_rkl``; refused for ``LinearLogits``.
        vocab_shard: as in ``topk_rkl``, and so are DTensors.
        backend: as in ``topk_rkl``.

    NaN or +inf in a row makes it NaN, and so does a row of only -inf. A logit of -inf at y is -inf.

    Gradients: ``logits``. Kept for backward: them, and a few numbers per row. Differentiating twice
    raises ``RuntimeError``.

    Errors: ``ValueError`` or ``TypeError`` for shapes, devices, dtypes and values that are not
    allowed. With ``OPD_KERNELS_DEBUG=1`` a token outside of [0, W) raises.

    A loss of ``topk_divergence`` and these log-probs come from one call, with one gradient:
    ``return_token_logprobs=True``.

    Example::

        with torch.no_grad():
            teacher_logprobs = token_logprobs(teacher_logits, tokens, mask=mask)
        logprobs = token_logprobs(student_logits, tokens, mask=mask)
        advantages = sampled_token_advantages(teacher_logprobs, logprobs, mask=mask)

    Source: the log-softmax of the sampled token, as policy gradients use it.
    """
    least = 1 if vocab_shard is None else 0
    given = from_dtensor(logits, "logits", inplace_grad)
    if isinstance(logits, LinearLogits) and inplace_grad:
        raise ValueError("inplace_grad=True reuses the memory of logits; leave it out")
    if isinstance(given, Sharded):
        rows = given.shape
    elif isinstance(logits, LinearLogits):
        _checks.check_head(logits.hidden, logits.weight, logits.bias, "LinearLogits ", least)
        rows = logits.shape
    else:
        rows = _checks.check_logits(logits, "logits", least=least).shape[:-1]
    device = logits.device
    _checks.check_token_ids(token_ids, rows, device)
    call = resolve(
        {
            "temperature": temperature,
            "mask": mask,
            "vocab_size": vocab_size,
            "inplace_grad": inplace_grad,
            "backend": backend,
        },
        rows,
        device,
    )
    source = sharded(given, vocab_shard, "vocab_shard")
    agree([("logits", source)], {"vocab_size": vocab_size})
    width = call.range(vocab_of(source))
    if debugging.on_outside_of_operators():
        debugging.check_tokens(token_ids, width, call.mask, "the logits'")
    ids = token_ids[..., None]
    ids = torch.where((ids < 0) | (ids >= width), -1, ids).to(torch.int32)
    if not isinstance(source, Tensor):
        return token_logprobs_of_head(source, ids, width, call)
    everything = Allowed(width, None, call.mask)
    request = Request(ids, everything, call.objective, call.inplace, call.backend)
    side = _side(source, ids, width, call)
    assert side.shares is not None
    token = Token(token_ids, *side.shares, width)
    return BackgroundLoss.apply(source, None, request, None, token)[1]


def _side(logits: Tensor, ids: Tensor, width: int, call: Call) -> Side:
    """The tokens apart from the rest, so that a probability near 1 keeps its digits."""
    temperature = call.objective.temperature
    reading = Tail(width, temperature, ids, False)
    tail, _ = _ops.tail_logsumexp(logits.detach(), call.mask, reading, call.backend)
    values = values_at(logits, ids, Allowed(width, None, call.mask), call.backend)
    return Side(temperature, values, tail=tail).with_shares()
