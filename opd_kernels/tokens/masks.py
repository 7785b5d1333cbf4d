"""Which positions take part: responses, special tokens, first occurrences."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from opd_kernels import _checks

__all__ = ["first_occurrences", "predicting", "response_mask", "special_token_mask"]


def response_mask(
    tokens: Tensor,
    prompt_length: int | Tensor,
    *,
    eos_ids: int | Sequence[int] | Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """True on the tokens of the response, up to and including the first end of sequence.

    ::

        after[b, t] = t >= prompt_length[b]  and  attention_mask[b, t]
        mask[b, t]  = after[b, t]  and  no eos at any t' < t with after[b, t']

    Shapes and dtypes: ``tokens`` (B, T), int32 or int64, prompt and response together; also (T,) or
    more leading dimensions. Returns bool of the same shape. It marks the tokens themselves. The
    logits at position t predict token t + 1, so beside logits pass ``predicting`` of the mask.

    Args:
        tokens: ids of prompt, response and padding.
        prompt_length: where the response begins, padding on the left included: an int for batches
            that are padded on the left, a tensor (B,) where each sequence has its own.
        eos_ids: what ends a response, one id or several; None: nothing does.
        attention_mask: bool or integer, shape of ``tokens``; 0 takes the position out. A response
            that was cut off before its end and padded with an eos id needs it: its first padding
            looks like its end.

    Gradients: none. Nothing is read on the host.

    Errors: ``TypeError`` or ``ValueError`` for dtypes and shapes that are not allowed, and for a
    negative int as ``prompt_length``.

    Example::

        >>> tokens = torch.tensor([[5, 6, 7, 2, 2], [0, 5, 8, 9, 2]])
        >>> response_mask(tokens, 2, eos_ids=[2]).int().tolist()
        [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    """
    tokens = _checks.check_tokens(tokens)
    _checks.check_prompt_length(prompt_length, tokens)
    start = prompt_length.unsqueeze(-1) if isinstance(prompt_length, Tensor) else prompt_length
    mask = (torch.arange(tokens.shape[-1], device=tokens.device) >= start).expand(tokens.shape)
    if attention_mask is not None:
        mask = mask & _flags(attention_mask, tokens, "attention_mask")
    if eos_ids is None:
        return mask.clone()
    if isinstance(eos_ids, Tensor):
        eos_ids = eos_ids.reshape(-1)
    if isinstance(eos_ids, bool):
        raise TypeError("eos_ids is a bool, expected an id or several")
    several = [int(eos_ids)] if isinstance(eos_ids, (int, Integral)) else eos_ids
    ends = mask & _among(tokens, _ids(several, tokens))
    return mask & (ends.cumsum(-1) == ends.int())


def predicting(mask: Tensor) -> Tensor:
    """A mask of tokens at the positions whose logits predict them.

    Position t of a causal model's logits predicts token t + 1::

        out[..., t] = mask[..., t + 1]    out[..., T - 1] = False

    Shapes and dtypes: (..., T), bool or integer; returns bool of the same shape, to go beside whole
    logits (no slicing needed).

    Errors: ``TypeError`` for other dtypes, ``ValueError`` for a scalar.

    Example::

        >>> predicting(torch.tensor([[0, 0, 1, 1]])).int().tolist()
        [[0, 1, 1, 0]]
    """
    mask = _checks.check_flags(mask, "mask", "compare: mask != 0")
    if mask.ndim == 0:
        raise ValueError("mask is a scalar, expected flags (..., T)")
    mask = mask != 0
    return torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], -1)


def first_occurrences(
    tokens: Tensor, ids: Sequence[int] | Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """True where an id appears for the first time in its sequence, for each id separately.

    ::

        out[b, t] = tokens[b, t] in ids  and  mask[b, t]
                    and  no t' < t with tokens[b, t'] = tokens[b, t] and mask[b, t']

    Shapes and dtypes: ``tokens`` (..., T), int32 or int64; ``ids`` a sequence or an int tensor on
    their device; ``mask`` of the tokens' shape, bool or integer: other positions are overlooked.
    Returns bool of that shape. Time is that of a sort, for any number of ids; nothing is read on
    the host.

    Errors: ``TypeError`` or ``ValueError`` for dtypes, shapes and devices that are not allowed.

    Example::

        >>> first_occurrences(torch.tensor([[7, 3, 7, 4, 3]]), [3, 7]).int().tolist()
        [[1, 1, 0, 0, 0]]
    """
    tokens = _checks.check_tokens(tokens)
    wanted = _among(tokens, _ids(ids, tokens))
    if mask is not None:
        wanted = wanted & _flags(mask, tokens, "mask")
    # Tokens that are not wanted share one key of their own, so that they hide no wanted one.
    keys = torch.where(wanted, tokens, torch.iinfo(tokens.dtype).min)
    ordered, order = keys.sort(dim=-1, stable=True)
    first = torch.ones_like(wanted)
    first[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return torch.zeros_like(wanted).scatter(-1, order, first) & wanted


def special_token_mask(tokens: Tensor, ids: Sequence[int] | Tensor, *, mask: Tensor) -> Tensor:
    """The mask without the first occurrence of each of the ids.

    ``mask & ~first_occurrences(tokens, ids, mask=mask)``, the special-token masking of the paper.
    It leaves out *positions*: at a token that student and teacher write differently, the teacher
    judges the format. ``banned_ids`` of ``topk_rkl`` leaves out ids.

    Shapes and dtypes: as ``first_occurrences``; ``mask`` is needed, most often ``response_mask``'s.
    Returns bool of its shape, for tokens: beside logits pass ``predicting`` of it.

    Errors: as ``first_occurrences``.

    Example::

        >>> tokens = torch.tensor([[27, 5, 27, 6]])
        >>> special_token_mask(tokens, [27], mask=torch.ones_like(tokens)).int().tolist()
        [[0, 1, 1, 1]]

    Source: arXiv 2603.25562; its ids are ``token_ids(tokenizer, ["<", "think", "<|im_end|>"])``.
    """
    keep = _flags(mask, _checks.check_tokens(tokens), "mask")
    return keep & ~first_occurrences(tokens, ids, mask=keep)


def _flags(mask: Tensor, tokens: Tensor, name: str) -> Tensor:
    """A mask as bool, one flag per token."""
    _checks.check_flags(mask, name, "compare: mask != 0")
    _checks.check_like(mask, tokens, name, "tokens")
    return mask != 0


def _ids(ids: Sequence[int] | Tensor, tokens: Tensor) -> Tensor:
    """Ids on the tokens' device."""
    return _checks.as_ids(ids, tokens.device, "ids", "tokens is")


def _among(tokens: Tensor, ids: Tensor) -> Tensor:
    """Whether each token is one of the ids. (``torch.isin`` synchronises for many ids.)"""
    if ids.numel() == 0:
        return torch.zeros_like(tokens, dtype=torch.bool)
    ids, _ = ids.long().sort()
    slots = torch.searchsorted(ids, tokens.long().contiguous()).clamp(max=ids.numel() - 1)
    return ids[slots] == tokens
