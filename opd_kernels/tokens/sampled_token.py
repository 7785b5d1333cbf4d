"""The sampled-token baseline: log-ratio rewards, discounted returns, the clipped policy loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_kernels import _checks, debugging
from opd_kernels.options import reduce_rows

__all__ = ["returns_to_go", "sampled_token_advantages", "sampled_token_loss"]


def returns_to_go(rewards: Tensor, gamma: float, *, mask: Tensor | None = None) -> Tensor:
    """Discounted sums of the rewards from each token on.

    Over the last dimension, the tokens of a sequence::

        R_t = sum over t' >= t of gamma^(t' - t) r_t'

    gamma = 0 gives the rewards themselves (token level), gamma = 1 their plain sums to the end
    (causal sequence level).

    Shapes and dtypes: ``rewards`` (..., T) floating, ``mask`` of the same shape, bool or integer;
    returns (..., T), float32 (float64 for float64). ``gamma`` is a number in [0, 1].

    Where ``mask`` is False the reward counts as 0, whatever it holds, and the return is 0. Such
    positions still count as steps: a reward behind a gap of n is discounted n times more. (Code
    that starts again after every gap agrees if a sequence's unmasked positions are adjacent.)

    Gradients: ``rewards``. Time is T log T and memory a few tensors of the rewards' size; sums are
    taken pairwise, so that they stay accurate for thousands of tokens.

    Errors: ``TypeError`` or ``ValueError`` for a gamma, dtypes and shapes that are not allowed.

    Example::

        >>> returns_to_go(torch.tensor([1.0, 2.0, 4.0]), 0.5)
        tensor([3., 4., 4.])

    Source: arXiv 2603.25562, where the rewards are log-ratios of teacher and student.
    """
    _checks.check_gamma(gamma)
    rewards = _checks.check_token_values(rewards, "rewards")
    if rewards.ndim == 0:
        raise ValueError("rewards is a scalar, expected (..., T)")
    keep = _flags(mask, rewards, "rewards")
    returns = _selected(rewards, keep, _arithmetic(rewards))
    # After the step of length n every position holds the sum of the 2 n rewards from it on.
    step, factor = 1, float(gamma)
    least = torch.finfo(returns.dtype).tiny
    while step < returns.shape[-1] and factor >= least:
        later = returns[..., step:]
        returns = torch.cat([returns[..., :-step] + factor * later, returns[..., -step:]], -1)
        step, factor = 2 * step, factor * factor
    return returns if keep is None else torch.where(keep, returns, 0)


def sampled_token_advantages(
    teacher_logprobs: Tensor,
    old_logprobs: Tensor,
    gamma: float = 0.0,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """What the teacher thinks of the tokens that the student sampled, as advantages.

    With q the teacher and p_old the student that made the rollout::

        r_t = log q(y_t) - log p_old(y_t)    A_t = sum over t' >= t of gamma^(t' - t) r_t'

    At gamma = 0, while the student is still the one that made the rollout, ``sampled_token_loss``
    has in expectation the gradient of the reverse KL of the full distributions, token by token.

    Shapes and dtypes: both log-probs floating, of one shape (..., T); ``mask`` as in
    ``returns_to_go``; returns (..., T), float32 (float64 where an input is).

    Gradients: none, the advantages are detached. Nothing is clipped or normalised: a token that the
    teacher rules out (-inf) has advantage -inf, so mask it or clamp the log-probs.

    Errors: ``TypeError`` or ``ValueError`` for a gamma, dtypes and shapes that are not allowed.

    Example::

        >>> teacher, student = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0])
        >>> sampled_token_advantages(teacher, student)
        tensor([ 2., -1.])

    Source: arXiv 2603.25562, sampled-token distillation.
    """
    teacher_logprobs = _checks.check_token_values(teacher_logprobs, "teacher_logprobs")
    old_logprobs = _checks.check_token_values(old_logprobs, "old_logprobs")
    _checks.check_like(old_logprobs, teacher_logprobs, "old_logprobs", "teacher_logprobs")
    dtype = _arithmetic(teacher_logprobs, old_logprobs)
    rewards = teacher_logprobs.detach().to(dtype) - old_logprobs.detach().to(dtype)
    return returns_to_go(rewards, gamma, mask=mask)


def sampled_token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip: float | None = 0.2,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """PPO's clipped policy loss of the sampled tokens.

    Per token, with c = ``clip``::

        ratio = exp(log p(y) - log p_old(y))
        L = -min(ratio A, clip(ratio, 1 - c, 1 + c) A)
        dL/dlog p(y) = -ratio A, and 0 where the clipped one is smaller

    Shapes and dtypes: ``logprobs``, ``old_logprobs``, ``advantages`` floating, of one shape, and
    ``mask`` of that shape, bool or integer. Arithmetic is float32 (float64 where an input is), and
    so is the loss.

    Args:
        logprobs: of the sampled tokens under the student that is trained; get the gradient.
        old_logprobs: under the student that made the rollout; constant.
        advantages: constant; ``sampled_token_advantages`` or others.
        clip: c, a number from 0 on; None: no clipping.
        mask: False or 0: the token has loss 0 and gradient exactly 0, whatever the inputs hold.
        reduction: "none" gives the loss per token, "sum", or "mean", which divides by
            ``normalizer`` or, without one, by the number of unmasked tokens (at least 1).
        normalizer: a number or 0-d tensor, for instance the global token count. Its value is not
            looked at: clamp a count that may be 0.

    Gradients: ``logprobs`` only. A ratio has no second bound for negative advantages (dual clip).

    Errors: ``TypeError`` or ``ValueError`` for shapes, devices, dtypes and values that are not
    allowed.

    Example::

        advantages = sampled_token_advantages(teacher_logprobs, old_logprobs)
        loss = sampled_token_loss(logprobs, old_logprobs, advantages, mask=mask)
        loss.backward()

    Source: arXiv 2603.25562, sampled-token distillation; the clipped objective is arXiv 1707.06347,
    equation 7.
    """
    logprobs = _checks.check_token_values(logprobs, "logprobs")
    old_logprobs = _checks.check_token_values(old_logprobs, "old_logprobs")
    advantages = _checks.check_token_values(advantages, "advantages")
    _checks.check_like(old_logprobs, logprobs, "old_logprobs", "logprobs")
    _checks.check_like(advantages, logprobs, "advantages", "logprobs")
    _checks.check_clip(clip)
    _checks.check_reduction(reduction, normalizer, logprobs.device)
    keep = _flags(mask, logprobs, "logprobs")
    if debugging.on_outside_of_operators():
        debugging.check_sampled(logprobs, old_logprobs, advantages, normalizer, keep)
    dtype = _arithmetic(logprobs, old_logprobs, advantages)
    cost = _selected(-advantages.detach(), keep, dtype)
    log_ratio = _selected(logprobs, keep, dtype) - _selected(old_logprobs.detach(), keep, dtype)
    # Clipped as a logarithm, so that an overflowing ratio has gradient 0 and not 0 times infinity.
    if clip is None:
        log_ratio = log_ratio.clamp(max=math.log(torch.finfo(dtype).max) - 1)
    else:
        lowest = math.log1p(-clip) if clip < 1 else -math.inf
        log_ratio = torch.where(
            cost > 0, log_ratio.clamp(min=lowest), log_ratio.clamp(max=math.log1p(clip))
        )
    return reduce_rows(cost * log_ratio.exp(), None, keep, reduction, normalizer)


def _flags(mask: Tensor | None, values: Tensor, name: str) -> Tensor | None:
    """The mask as bool, one flag per value."""
    if mask is None:
        return None
    _checks.check_flags(mask, "mask", "compare: mask != 0")
    _checks.check_like(mask, values, "mask", name)
    return mask != 0


def _selected(values: Tensor, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The values, 0 where they are left out, so that neither they nor their gradients are used."""
    values = values.to(dtype)
    return values if keep is None else torch.where(keep, values, 0)


def _arithmetic(*tensors: Tensor) -> torch.dtype:
    """float64 where an input is, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32
