"""``OPD_KERNELS_DEBUG=1`` and ``debug()``: every call reads values and raises at the first bad row.

The checks of an operator's arguments run inside the operator, where every tensor has values: under
``torch.compile``, ``vmap`` and ``torch.func.grad`` too. ``_ops`` calls them. The losses call those
of arguments that no operator takes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ParamSpec

import torch
from torch import Tensor

from opd_kernels._arguments import Allowed, Head, Objective, flat, unpack_bitmap
from opd_kernels._checks import LARGEST_TEMPERATURE, LEAST_TEMPERATURE, check_flag
from opd_kernels._ordering import repeats

__all__ = ["debug"]

VARIABLE = "OPD_KERNELS_DEBUG"
# Elements that are looked at together; a check needs a few times as much memory.
_PIECE_ELEMENTS = 1 << 22
_LOGITS = "numbers and -inf"
# Rounding a log-prob b to bfloat16 changes its probability by a factor of up to exp(|b| / 512). The
# sum of q |b| is an entropy, at most about 12, so the probabilities add up to 1.03 at most.
_LARGEST_SHARE = 1.1
_ROUNDING = 2.0**-6  # logits that were rounded to bfloat16 in two ways, relative
_TEMPERATURES = f"{LEAST_TEMPERATURE:.3g} to {LARGEST_TEMPERATURE:.3g}"
P = ParamSpec("P")


def _wanted(environment: Mapping[str, str]) -> bool:
    """Whether the environment asks for checks."""
    value = environment.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} is {value!r}, allowed are 1 (check values) and 0")
    return value == "1"


# One switch for the whole process: a call reads one attribute. A context variable would cost more.
ON = _wanted(os.environ)


def on_outside_of_operators() -> bool:
    """Whether a function that a compiler may trace checks values; traced, it never does.

    A compiler that sees ``ON`` would compile again when it changes.
    """
    return not torch.compiler.is_compiling() and ON


@contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Calls inside of the block look at values and raise with the first bad row.

    ``OPD_KERNELS_DEBUG=1`` in the environment, read when ``opd_kernels`` is imported, does the same
    for the whole process; ``debug(False)`` turns it off for a block.

    What raises ``ValueError``, in unmasked rows only:

    - a mask that leaves no row of one or more;
    - temperatures that are not above 0 and finite, in tensors too;
    - ids of a ``TopK`` that are neither -1 nor in the student's vocabulary, unless their logit is
      -inf: the global ids of a vocabulary shard, for instance;
    - NaN and +inf in logits of student and teacher, at all ids that may be selected: below
      ``vocab_size`` and not banned, banned ones too where softmaxes are full: those of a
      divergence, of masses and entropies, of token log-probs;
    - NaN and infinities in hidden states, in a teacher's head at these ids and in the student's
      head at the ids of the support; a bias may be -inf;
    - entries of a ``TopK`` that hold more probability than 1 by its ``logsumexp``, and
      ``token_logits`` that are not of the ``token_ids``, where the entries show it;
    - ``token_ids`` outside of the student's vocabulary, where the loss uses them;
    - NaN and infinities in ``weight`` and in the weights of a ``Divergence``, a ``normalizer`` that
      is not above 0 and finite;
    - ``add_to_`` and ``dense`` of an ``EntryGradient``: ids outside of [0, V) but for -1, repeated
      ids, NaN and infinities in ``entry_grad`` and ``upstream``;
    - ``sampled_token_loss``: NaN and infinities, but for ``logprobs`` of -inf.

    The message names the argument, the row by its leading indices, what is there and what is
    allowed. Masked rows are not read.

    The checks synchronise with the device and read all logits: a call takes about ten times as
    long. Results are the same bits. Under ``torch.compile`` and ``vmap`` only arguments of
    operators are checked: not ``weight``, ``normalizer`` and ``sampled_token_loss``. There a mapped
    dimension comes first in the row, and a temperature that is not allowed shows as NaN.
    ``torch.func.grad`` checks all. Nothing is checked while a CUDA graph is captured, nor in
    backward.

    The switch is the process's: other threads see it as well, so turn it on in one of them.

    Example::

        with opd_kernels.debug():
            loss = topk_rkl(student, teacher, mask=mask)
    """
    global ON
    check_flag(enabled, "enabled")
    before, ON = ON, bool(enabled)
    try:
        yield
    finally:
        ON = before


def _readable(argument: object) -> bool:
    """Whether a tensor has values that the host may read now."""
    if not isinstance(argument, Tensor):
        return True
    return not (
        argument.is_meta
        or torch._C._functorch.is_batchedtensor(argument)
        or torch._subclasses.fake_tensor.is_fake(argument)
        or (argument.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _looks(check: Callable[P, None]) -> Callable[P, None]:
    """A check that is left out where values cannot be read."""

    @functools.wraps(check)
    def looked(*args: P.args, **kwargs: P.kwargs) -> None:
        if all(map(_readable, flat(args))):
            with torch.no_grad():
                check(*args, **kwargs)

    return looked


@_looks
def check_select(logits: Tensor, allowed: Allowed) -> None:
    """Logits that a support is selected from."""
    _check_mask(allowed.mask)
    _check_logits(logits, allowed, _rows(logits, allowed.mask), "teacher logits")


@_looks
def check_divergence(
    student: Tensor, teacher: Tensor, ids: Tensor | None, allowed: Allowed, objective: Objective
) -> None:
    """What the divergence gets, on a given support or on one that it selects."""
    _check_mask(allowed.mask)
    rows = _rows(student, allowed.mask)
    for (value, values), name in (
        (objective.temperature, "temperature"),
        (objective.teacher_temperature, "teacher_temperature"),
    ):
        if values is None:
            _check_temperature(value, name)
        else:
            _check_temperatures(values, rows, name)
    if ids is None:
        _check_logits(teacher, allowed, rows, "teacher logits")
    else:
        vocab, count = student.shape[-1], ids.shape[-1]
        if vocab <= count + 2:  # a head's listed logits: what takes no part has ids just beyond
            vocab += count
        _check_ids(ids, teacher, vocab, rows)
        _check_entries(teacher, ids, allowed, rows)
    _check_logits(student, allowed, rows, "student")


@_looks
def check_support(ids: Tensor, values: Tensor, vocab: int, mask: Tensor | None) -> None:
    """A given support's ids, of a student whose vocabulary may be spread over ranks."""
    _check_ids(ids, values, vocab, _rows(ids, mask))


@_looks
def check_row(logits: Tensor, name: str, width: int, mask: Tensor | None) -> None:
    """Logits of which every one below ``width`` is in a full softmax."""
    _check_logits(logits, Allowed(width, None, mask), _rows(logits, mask), name)


@_looks
def check_student(logits: Tensor, allowed: Allowed) -> None:
    """The student's logits, before an operator reads them that does not know whose they are."""
    _check_logits(logits, allowed, _rows(logits, allowed.mask), "student")


@_looks
def check_student_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, used: Allowed) -> None:
    """The same of hidden states and a head whose logits are computed at all these ids."""
    _check_finite(hidden, _rows(hidden, used.mask), "student_hidden")
    _check_head(weight, bias, _allowed(used, weight.device), "student_")


@_looks
def check_tokens(
    token_ids: Tensor, width: int, mask: Tensor | None, whose: str = "the student's"
) -> None:
    """Sampled tokens that a loss uses, or whose log-probs are asked for."""
    _check(
        token_ids,
        _Rows(token_ids.shape, mask, token_ids.device),
        lambda some, _: (some < 0) | (some >= width),
        "token_ids",
        f"0 to {width - 1} ({whose} vocabulary)",
        "mask the row",
    )


@_looks
def check_shares(
    ids: Tensor, logits: Tensor, logsumexp: Tensor, temperature: float, mask: Tensor | None
) -> None:
    """What the entries of a given support hold of its full softmax."""
    present = (ids >= 0) & (logits != -torch.inf)
    present &= ~repeats(torch.where(present, ids, -1))
    scaled = torch.where(present, logits / temperature, -torch.inf)
    _check(
        (scaled.logsumexp(-1) - logsumexp).exp(),
        _rows(ids, mask),
        lambda some, _: some > _LARGEST_SHARE,
        "the probability of the TopK's entries by its logsumexp",
        "0 to 1",
        "logsumexp is of the same logits at the TopK's temperature, 0 for log-probs only",
    )


@_looks
def check_token_logits(
    token_ids: Tensor, token_logits: Tensor, ids: Tensor, logits: Tensor, mask: Tensor | None
) -> None:
    """A given support's logit of the sampled token is that of its entry, if it has one."""
    rows = _rows(ids, mask)
    expected = token_logits[..., None]

    def bad(some: Tensor, index: Tensor) -> Tensor:
        value = rows.of(expected, index)
        off = (some - value).abs() > _ROUNDING * (1 + some.abs())
        return off & (rows.of(ids, index) == rows.of(token_ids[..., None], index))

    _check(
        logits,
        rows,
        bad,
        "the TopK's logit of the token in token_ids",
        "what its token_logits hold",
        "the loss and the TopK need the same token_ids, moved alike",
    )


@_looks
def check_head(head: Head, allowed: Allowed) -> None:
    """A teacher's hidden states and head."""
    _check_mask(allowed.mask)
    _check_finite(head.hidden, _rows(head.hidden, allowed.mask), "LinearLogits hidden")
    _check_head(head.weight, head.bias, _allowed(allowed, head.weight.device), "LinearLogits ")


@_looks
def check_selected(values: Tensor, mask: Tensor | None) -> None:
    """The k best of a head's logits."""
    name = "logits of LinearLogits, rounded to their dtype"
    _check(values, _rows(values, mask), _nan_or_inf, name, _LOGITS, "use a wider dtype")


@_looks
def check_gather(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, allowed: Allowed
) -> None:
    """A student's hidden states and head, and the ids of the support."""
    limit = allowed.limit
    _check_mask(allowed.mask)
    rows = _rows(hidden, allowed.mask)
    _check_ids(ids, None, weight.shape[0], rows)
    _check_finite(hidden, rows, "student_hidden")
    used = torch.zeros(limit + 1, dtype=torch.bool, device=ids.device)
    for index in rows.pieces(ids.shape[-1]):
        some = rows.of(ids, index).long()
        used[torch.where((some >= 0) & (some < limit), some, limit)] = True
    _check_head(weight, bias, used[:limit] & _allowed(allowed, ids.device), "student_")


@_looks
def check_scatter(
    vocab: int, known: str, entry_grad: Tensor, ids: Tensor, upstream: Tensor
) -> None:
    """What is added to a dense gradient or becomes one; ``known`` says whence its vocabulary is."""
    rows = _rows(ids, None)
    allowed = f"-1 and 0 to {vocab - 1} ({known})"
    source = "pass what TopKReverseKL.apply returned for these rows"
    _check(ids, rows, lambda some, _: (some < -1) | (some >= vocab), "ids", allowed, source)
    _check(
        ids,
        rows,
        lambda some, _: repeats(some) & (some >= 0),
        "ids",
        "each id once in a row",
        source,
    )

    def bad(some: Tensor, index: Tensor) -> Tensor:
        return (rows.of(ids, index) >= 0) & ~some.isfinite()

    _check(entry_grad, rows, bad, "entry_grad", "finite numbers", "look at the loss they are of")
    _check_factors(upstream, rows, "upstream")


@_looks
def check_call(
    temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    weight: Tensor | None,
    normalizer: float | Tensor | None,
    mask: Tensor | None,
    weights: Tensor | None = None,
) -> None:
    """What a loss takes and no operator gets: temperatures as the caller wrote them, factors."""
    _check_mask(mask)
    for value, name in (
        (temperature, "temperature"),
        (teacher_temperature, "teacher_temperature"),
    ):
        if isinstance(value, Tensor) and value.ndim:
            _check_temperatures(value, _Rows(value.shape, mask, value.device), name)
        else:
            _check_temperature(float(value), name)
    if weight is not None:
        _check_factors(weight, _Rows(weight.shape, mask, weight.device), "weight")
    if weights is not None:
        _check_factors(weights, _rows(weights, mask), "the divergence's weights")
    _check_normalizer(normalizer)


@_looks
def check_sampled(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    normalizer: float | Tensor | None,
    mask: Tensor | None,
) -> None:
    """What the sampled-token loss gets."""
    _check_mask(mask)
    _check_normalizer(normalizer)
    rows = _Rows(logprobs.shape, mask, logprobs.device)
    remedy = "mask the token or clamp its log-prob"
    named = {"old_logprobs": old_logprobs, "advantages": advantages}
    _check(logprobs, rows, _nan_or_inf, "logprobs", _LOGITS, remedy)
    for name, values in named.items():
        _check(values, rows, _not_finite, name, "finite numbers", remedy)


class _Rows:
    """The unmasked rows of tensors with the leading shape ``shape``."""

    def __init__(self, shape: torch.Size, mask: Tensor | None, device: torch.device) -> None:
        kept = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask
        self.shape = shape
        self.single = not shape  # indexed as one of one
        self.indices = (kept[None] if self.single else kept).nonzero()

    def pieces(self, width: int) -> Iterator[Tensor]:
        """Indices of rows, some at a time."""
        return iter(self.indices.split(max(_PIECE_ELEMENTS // max(width, 1), 1)))

    def of(self, tensor: Tensor, index: Tensor) -> Tensor:
        """These rows of a tensor (..., C), as (R, C)."""
        return (tensor[None] if self.single else tensor)[index.unbind(-1)]


def _rows(tensor: Tensor, mask: Tensor | None) -> _Rows:
    """The unmasked rows of a tensor (..., C)."""
    return _Rows(tensor.shape[:-1], mask, tensor.device)


def _check(
    values: Tensor,
    rows: _Rows,
    bad: Callable[[Tensor, Tensor], Tensor],
    name: str,
    allowed: str,
    remedy: str,
) -> None:
    """Raises at the first element of unmasked rows, (..., C) or (...), that is bad."""
    wide = values.ndim > len(rows.shape)
    values = values if wide else values[..., None]
    for index in rows.pieces(values.shape[-1]):
        some = rows.of(values, index)
        flags = bad(some, index)
        if bool(flags.any()):
            row, column = flags.nonzero()[0].tolist()
            leading = () if rows.single else tuple(index[row].tolist())
            where = f"at {[*leading, column]}, " if wide else ""
            raise ValueError(
                f"{name}: {some[row, column].item()} {where}in row {leading}, allowed are "
                f"{allowed}; {remedy}"
            )


def _nan_or_inf(values: Tensor, _: Tensor) -> Tensor:
    return ~(values < torch.inf)


def _not_finite(values: Tensor, _: Tensor) -> Tensor:
    return ~values.isfinite()


def _allowed(allowed: Allowed, device: torch.device) -> Tensor:
    """Bool (limit,): the ids that may be selected."""
    if allowed.banned is None:
        return torch.ones(allowed.limit, dtype=torch.bool, device=device)
    return ~unpack_bitmap(allowed.banned, allowed.limit)


def _check_mask(mask: Tensor | None) -> None:
    if mask is not None and mask.numel() and not bool(mask.any()):
        raise ValueError(
            f"mask leaves none of {mask.numel()} rows, so the loss is 0; is it True where a row "
            "counts, and of the tokens that the logits predict?"
        )


def _check_logits(logits: Tensor, allowed: Allowed, rows: _Rows, name: str) -> None:
    """NaN and +inf at ids that may be selected."""
    selectable = None if allowed.banned is None else _allowed(allowed, logits.device)

    def bad(some: Tensor, _: Tensor) -> Tensor:
        flags = ~(some < torch.inf)
        return flags if selectable is None else flags & selectable

    remedy = "look for overflow in the model, or mask the row"
    _check(logits[..., : allowed.limit], rows, bad, name, _LOGITS, remedy)


def _check_entries(values: Tensor, ids: Tensor, allowed: Allowed, rows: _Rows) -> None:
    """NaN and +inf at entries that are present."""
    limit, selectable = allowed.limit, _allowed(allowed, ids.device)

    def bad(some: Tensor, index: Tensor) -> Tensor:
        row_ids = rows.of(ids, index)
        inside = (row_ids >= 0) & (row_ids < limit)
        return ~(some < torch.inf) & inside & selectable[torch.where(inside, row_ids, 0).long()]

    remedy = "write the id -1 where there is no entry"
    _check(values, rows, bad, "teacher logits (TopK)", _LOGITS, remedy)


def _check_ids(ids: Tensor, values: Tensor | None, vocab: int, rows: _Rows) -> None:
    """Ids outside the student's vocabulary, at entries that are not absent by their value."""

    def bad(some: Tensor, index: Tensor) -> Tensor:
        outside = (some < -1) | (some >= vocab)
        return outside if values is None else outside & (rows.of(values, index) != -torch.inf)

    allowed = f"-1 and 0 to {vocab - 1} (the student has a vocabulary of {vocab})"
    remedy = "of a vocabulary shard pass local ids, and -1 where an entry is absent"
    _check(ids, rows, bad, "teacher ids (TopK)", allowed, remedy)


def _check_temperature(temperature: float, name: str) -> None:
    if not LEAST_TEMPERATURE <= temperature <= LARGEST_TEMPERATURE:
        raise ValueError(f"{name} is {temperature}, allowed are {_TEMPERATURES}")


def _check_temperatures(temperatures: Tensor, rows: _Rows, name: str) -> None:
    """A temperature per row; the bounds are float32's."""

    def bad(some: Tensor, _: Tensor) -> Tensor:
        some = some if some.dtype == torch.float64 else some.float()
        return ~((some >= LEAST_TEMPERATURE) & (some <= LARGEST_TEMPERATURE))

    _check(temperatures, rows, bad, name, _TEMPERATURES, "mask the row, or look where it was made")


def _check_factors(factors: Tensor, rows: _Rows, name: str) -> None:
    _check(
        factors,
        rows,
        _not_finite,
        name,
        "finite numbers",
        "mask the row, or look where it was made",
    )


def _check_normalizer(normalizer: float | Tensor | None) -> None:
    if normalizer is not None and not 0 < float(normalizer) < torch.inf:
        raise ValueError(
            f"normalizer is {float(normalizer)}, allowed are finite numbers above 0; clamp a count "
            "that may be 0: .clamp(min=1)"
        )


def _check_finite(values: Tensor, rows: _Rows, name: str) -> None:
    remedy = "look for overflow in the model, or mask the row"
    _check(values, rows, _not_finite, name, "finite numbers", remedy)


def _check_head(weight: Tensor, bias: Tensor | None, used: Tensor, prefix: str) -> None:
    """A head's weight (V, H) and bias (V,) at the ids that are used, (limit,)."""
    rows, remedy = (
        _Rows(used.shape, used, used.device),
        "look at the optimizer's steps, or ban the id",
    )
    weight = weight[: len(used)]
    _check(weight, rows, _not_finite, f"{prefix}weight", "finite numbers", remedy)
    if bias is not None:
        bias = bias[: len(used)]
        _check(bias, rows, _nan_or_inf, f"{prefix}bias", _LOGITS, remedy)
