"""``TopK``: a teacher's support as a value; also made from a server's log-probs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data._utils.collate import default_collate_fn_map

from opd_kernels import _payload
from opd_kernels._arguments import wide_dtype
from opd_kernels._checks import (
    ID_DTYPES,
    LOGIT_DTYPES,
    check_dense,
    check_factor,
    check_int,
    check_local,
    check_number,
    check_vocab_size,
)
from opd_kernels._ordering import MAX_ID, ordered, repeats, resized

__all__ = ["TopK"]

# Servers and trainers write "no entry" as -1e3, -1e4, -9999 or -inf; no log-prob of a token that a
# model lists among its best is near that.
SENTINEL = -1e3
# What a server's list cannot resolve: log-probs are float32, so 1 - Q is known to about 2^-24.
LEAST_TAIL = 2.0**-24
# The fields with one number per row, in order; each may be None.
PER_ROW = ("logsumexp", "tail_logsumexp", "token_logits")


@dataclass(frozen=True, eq=False, repr=False)
class TopK:
    """The teacher's K entries of each row: ids and logits, in any order.

    Shapes and dtypes: ``ids`` int32 or int64 (..., K); ``logits`` floating (..., K), logits or
    log-probs (they differ by a constant per row, which the renormalisation cancels).

    ``topk_rkl`` needs no more. What needs the teacher's whole distribution reads further fields,
    floating (...) or None. With the teacher's logits t over its vocabulary V and the entries S::

        logsumexp      = log sum over V of exp(t / temperature)
        tail_logsumexp = log sum over V without S of exp(t / temperature)
        token_logits   = t at the sampled token, not divided

    Logits, log-sum-exps and ``token_logits`` are on one scale: all of logits, or all of log-probs,
    whose ``logsumexp`` is 0 at temperature 1. ``temperature`` is a float. An absent entry is not in
    S, so the tail holds its share, and that of banned ids.

    An entry is absent where its id is -1, outside the vocabulary or banned, or its logit is -inf.

    No value is read here, so sentinels and repeated ids stay. A sentinel is a logit like any other:
    id 0 with -1e4 as the last entry turned a loss of 0.36 into 3263. Repeated ids are entries of
    their own, whose gradients add up: a sampled token that was listed twice turned 0.366 into
    0.396. ``from_tensors`` and ``from_logprobs`` remove both.

    It behaves as a container over its leading dimensions: ``topk[2:5]`` slices rows,
    ``topk.to(...)`` moves, ``TopK.cat`` concatenates, ``TopK.stack`` and ``default_collate`` stack,
    ``torch.utils._pytree`` maps over the tensors that are there, ``torch.export`` takes it, and
    ``torch.load`` does with ``weights_only=True``.

    Errors: ``TypeError`` for wrong dtypes and a temperature that is no number, ``ValueError`` for
    shapes and devices that do not match and a temperature that is not above 0.

    Example::

        topk = TopK(ids=torch.tensor([[3, 1]]), logits=torch.tensor([[2.0, 0.5]]))
        loss = topk_rkl(student_logits, topk)
    """

    ids: Tensor
    logits: Tensor
    logsumexp: Tensor | None = None
    tail_logsumexp: Tensor | None = None
    token_logits: Tensor | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Checks shapes and dtypes; values are not read."""
        self.check()
        if type(self.temperature) is not float:  # a NumPy number would not load from a file
            object.__setattr__(self, "temperature", float(self.temperature))

    def check(self) -> None:
        """Raises unless the tensors make a support; values are not read.

        ``torch.utils._pytree`` may have put anything in their place, so the losses call this again.
        """
        per_row = self._per_row()
        others = {"logits": self.logits, **per_row}
        for name, tensor in {"ids": self.ids, **others}.items():
            _check_tensor(tensor, name)
        if self.ids.dtype not in ID_DTYPES:
            raise TypeError(f"TopK ids have dtype {self.ids.dtype}, allowed are int32 and int64")
        for name, tensor in others.items():
            if not tensor.dtype.is_floating_point:
                raise TypeError(f"TopK {name} have dtype {tensor.dtype}, expected a floating dtype")
            if tensor.device != self.ids.device:
                raise ValueError(
                    f"TopK ids are on {self.ids.device} and {name} on {tensor.device}; move one"
                )
        if self.ids.ndim == 0 or self.ids.shape != self.logits.shape:
            raise ValueError(
                f"TopK ids have shape {tuple(self.ids.shape)} and logits "
                f"{tuple(self.logits.shape)}; both must be (..., K)"
            )
        if self.ids.shape[-1] < 1:
            raise ValueError("TopK has width 0, allowed is 1 or more entries per row")
        for name, tensor in per_row.items():
            if tensor.shape != self.ids.shape[:-1]:
                raise ValueError(
                    f"TopK {name} has shape {tuple(tensor.shape)}, expected one per row: "
                    f"{tuple(self.ids.shape[:-1])}"
                )
        check_factor(self.temperature, "TopK temperature")

    @property
    def k(self) -> int:
        """Entries per row."""
        return self.ids.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """Leading shape: one element per row."""
        return self.ids.shape[:-1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.ids.device

    def __len__(self) -> int:
        """Size of the first leading dimension."""
        if not self.shape:
            raise TypeError("a TopK of a single row has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[TopK]:
        """Over the first leading dimension."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> TopK:
        """Rows by any index of the leading dimensions; the K entries stay together."""
        index = _index_rows(index, self.ids.ndim - 1)
        return self._map(lambda tensor: tensor[index])

    def __repr__(self) -> str:
        """Dtypes and shapes of what is there, not values."""
        names = ["ids", "logits", *self._per_row(), *(["temperature"] * (self.temperature != 1))]
        shown = (f"{name}={_describe(getattr(self, name))}" for name in names)
        return f"TopK({', '.join(shown)}, device={getattr(self.ids, 'device', None)})"

    def to(self, *args: Any, **kwargs: Any) -> TopK:
        """As ``Tensor.to``; a dtype applies to all but the ids.

        A log-sum-exp in bfloat16 or float16 holds the tail only to some percent. On devices without
        float64 it is float32.
        """
        logits = self.logits.to(*args, **kwargs)
        # By place they follow device and dtype, in this order.
        flags = [flag for flag in args if isinstance(flag, bool)]
        how: dict[str, Any] = dict(zip(("non_blocking", "copy"), flags, strict=False))
        how |= {name: kwargs[name] for name in ("non_blocking", "copy") if name in kwargs}

        def moved(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.float64 and wide_dtype(logits.device) != torch.float64:
                tensor = tensor.float()
            return tensor.to(*args, **kwargs)

        return TopK(self.ids.to(logits.device, **how), logits, **self._rest(moved))

    def pin_memory(self) -> TopK:
        """In page-locked memory; ``DataLoader(pin_memory=True)`` calls it."""
        return self._map(Tensor.pin_memory)

    def detach(self) -> TopK:
        """Without graph."""
        return self._map(Tensor.detach)

    def reshape(self, *shape: Any) -> TopK:
        """Other leading dimensions, of which one may be -1; as ints or one tuple of them."""
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = tuple(shape[0])
        ids, logits = (x.reshape(*shape, self.k) for x in (self.ids, self.logits))
        return TopK(ids, logits, **self._rest(lambda tensor: tensor.reshape(shape)))

    def pad(self, *rows: int, k: int | None = None) -> TopK:
        """Filled up with absent entries to leading dimensions ``rows`` and to width ``k``.

        ``topk.pad(k=64)`` makes each row wider, ``topk.pad(128)`` makes 128 rows of a sequence, at
        its end. New rows are without entries, and NaN in the fields per row. Their loss is 0, but
        NaN with ``include_token`` or ``outside="sample"``. Mask them: they count in the mean.
        Before ``TopK.cat`` and ``TopK.stack`` this makes parts of one width and length.

        Errors: ``ValueError`` for a size below what is there, or for another number of dimensions.

        Example::

            batch = TopK.stack([sequence.pad(longest) for sequence in sequences])
        """
        _check_width(k)
        for size in rows:
            check_int(size, "pad's size")
        old, new = (*self.shape, self.k), (*(rows or self.shape), self.k if k is None else k)
        if len(new) != len(old) or any(size < given for size, given in zip(new, old, strict=True)):
            raise ValueError(
                f"pad got leading shape {tuple(new[:-1])} and width {new[-1]}, but the TopK has "
                f"{tuple(self.shape)} and {self.k}; expected as many dimensions, none smaller"
            )
        # From the last dimension on, (before, after) each.
        added = [
            n for size, given in zip(new[::-1], old[::-1], strict=True) for n in (0, size - given)
        ]
        pad = torch.nn.functional.pad
        return TopK(
            pad(self.ids, added, value=-1),
            pad(self.logits, added, value=-torch.inf),
            **self._rest(lambda tensor: pad(tensor, added[2:], value=torch.nan)),
        )

    @staticmethod
    def cat(parts: Iterable[TopK], dim: int = 0) -> TopK:
        """Concatenates along a leading dimension.

        A field that may be None is kept where all parts have it. All parts are of one temperature,
        or it is a ``ValueError``.
        """
        parts = _one_width(parts, "cat")
        dim = _leading(dim, len(parts[0].shape), parts[0], "cat")
        _check_same_size(parts, "cat", dim)
        return _joined(torch.cat, parts, dim, "cat")

    @staticmethod
    def stack(parts: Iterable[TopK], dim: int = 0) -> TopK:
        """Joins along a new leading dimension, as ``TopK.cat`` joins along one that is there.

        ``torch.utils.data.default_collate`` does it with the supports of a batch.
        """
        parts = _one_width(parts, "stack")
        dim = _leading(dim, len(parts[0].shape) + 1, parts[0], "stack")
        _check_same_size(parts, "stack")
        return _joined(torch.stack, parts, dim, "stack")

    @staticmethod
    def from_logprobs(
        logprobs: Any,
        ids: Any = None,
        *,
        k: int | None = None,
        token_ids: Any = None,
        device: torch.device | str | None = None,
    ) -> TopK:
        """A server's top-K log-probs as a ``TopK``.

        ``logprobs`` alone is nested lists down to one element per position, which is one of

        - None (vLLM's first position);
        - a mapping from token id to log-prob (vLLM's ``prompt_logprobs``): a number, an object with
          ``.logprob`` or a mapping with ``"logprob"``;
        - a list of ``(logprob, id, ...)`` (SGLang's ``input_top_logprobs``) or of
          ``{"id": 5, "logprob": -0.1}`` (TGI); the id may be called ``"token_id"`` (Dynamo) or be
          written ``"token": "token_id:5"`` (vLLM's chat completions);
        - such an entry with the others of its position in ``"top_logprobs"`` (llama.cpp, vLLM's
          chat completions).

        With ``ids``, both are arrays, tensors or nested lists of the same shape (TRL, verl). Read
        on the host.

        Ids in text are ASCII decimal digits without leading zeros, ``"5"`` or ``"token_id:5"``; a
        ``"token"`` that is ``"5"`` is text. A flat list of entries is refused, because it may be
        the tokens of a sequence (SGLang's ``input_token_logprobs``) as well as one position; so is
        a position whose first entry alone has no log-prob, as in SGLang's.

        Ragged lengths are padded with absent entries to the longest of each level; log-probs at or
        below -1000, None and negative ids are absent. An id that is listed twice counts once, with
        its larger log-prob. Of more than ``k`` entries (vLLM lists the sampled token besides the K
        best) the k largest are kept; ``k=None`` keeps all, and is the longest position. NaN stays,
        ahead of all others. An empty list is no position at all.

        ``token_ids`` are the sampled tokens, one per position: an array, a tensor or nested lists,
        ragged as the positions or padded. They are looked up before the list is cut to k, and
        ``token_logits`` is what is listed for them: -inf at or below -1000, NaN where the token id
        is negative (-100) or None, and where a position has no entries.

        Returns ids int32 (..., k) in order (log-prob descending, id ascending), logits float32,
        logsumexp 0 where a position has entries (log-probs are normalised) and NaN where not, at
        temperature 1, and with ``token_ids`` token_logits float32.

        Errors: ``TypeError`` for an element that is none of these, for ids that are not integers,
        log-probs that are not real numbers, and a k that is not an int; ``ValueError`` for k
        outside [1, 2**31 - 1], for ``ids`` and ``logprobs`` of different shapes, for ids beyond
        int32, for ``token_ids`` of another shape than the positions, or that their position does
        not list. The message names the place in the payload.

        Example::

            teacher = TopK.from_logprobs(response.prompt_logprobs, k=32)
        """
        _check_width(k)
        if logprobs is None:
            raise TypeError(
                "logprobs is None, expected a server's payload; did the request ask for it? "
                "(vLLM: prompt_logprobs=32)"
            )
        if ids is None:
            entries = _payload.from_positions(logprobs)
        else:
            entries = _payload.from_arrays(ids, logprobs)
        # Before the entries are cut to k.
        given = (
            None if token_ids is None else _payload.token_logprobs(*entries, token_ids, SENTINEL)
        )
        best_ids, best = _canonical(*entries, k)
        tokens = None if given is None else torch.from_numpy(given)
        topk = TopK(best_ids, best, _normalised(best_ids, best), token_logits=tokens)
        return topk if device is None else topk.to(device)

    @staticmethod
    @torch.no_grad()
    def from_tensors(
        logprobs: Tensor,
        ids: Tensor,
        valid: Tensor | None = None,
        sentinel: float = SENTINEL,
        k: int | None = None,
    ) -> TopK:
        """Log-probs and ids that lie on a device as a ``TopK``, without synchronising.

        With the present entries of a row, (id i, log-prob l), each id once with its largest l::

            ids, logits = the first k of them by (l descending, i ascending)

        An entry is absent where ``valid`` is False, where its log-prob is at or below
        ``sentinel`` (compared in the log-probs' dtype) or -inf, and where its id is below 0 or
        above 2**31 - 1. NaN stays, ahead of all others.

        Shapes and dtypes: ``logprobs`` float16, bfloat16, float32 or float64 (..., K); ``ids``
        int32 or int64, and ``valid`` bool or None, of the same shape and device (a row mask is
        ``mask[..., None].expand_as(ids)``). All may be nested tensors of sequences (T_i, K), whose
        rows are then one after another, (T_1 + T_2 + ..., K). ``k=None`` keeps the width K; below
        it the k largest stay, above it absent entries follow.

        Returns ids int32 (..., k), logits float32, and logsumexp 0 where a row has entries
        (log-probs are normalised) and NaN where not, at temperature 1; ``present`` says which rows
        have any. Log-probs of the sampled tokens go in with
        ``dataclasses.replace(topk, token_logits=...)``.

        Gradients: none. Memory: a few times the inputs while it works.

        Errors: ``TypeError`` for other types and dtypes, a k that is no int, a sentinel that is no
        number; ``ValueError`` for shapes or devices that do not match, k outside [1, 2**31 - 1], a
        sentinel of NaN, nested tensors with gaps or of other lengths (lengths are compared on the
        CPU only).

        Example::

            topk = TopK.from_tensors(batch["teacher_logprobs"], batch["teacher_ids"], k=32)
            loss = topk_rkl(student_logits, topk, mask=response_mask & topk.present)
        """
        _check_width(k)
        check_number(sentinel, "sentinel", "a number")
        if sentinel != sentinel:
            raise ValueError("sentinel is NaN, allowed are numbers and -inf (then all are entries)")
        logprobs, ids, valid = _parallel(logprobs, ids, valid)
        # A sentinel that the dtype does not hold was -inf when the log-probs were stored.
        if sentinel < torch.finfo(logprobs.dtype).min:
            sentinel = -torch.inf
        width = max(ids.shape[-1], 1) if k is None else k
        best_ids, best = ordered(ids, logprobs, valid, sentinel, width)
        return TopK(best_ids, best, _normalised(best_ids, best))

    @property
    def present(self) -> Tensor:
        """Bool (...): the rows that have an entry, an id of 0 or above with a logit above -inf.

        NaN counts. What is banned or outside the student's vocabulary is not known here.
        """
        return ((self.ids >= 0) & (self.logits != -torch.inf)).any(-1)

    def tail(self) -> Tensor:
        """The log-sum-exp (...) of what is not listed, at ``temperature``.

        ``tail_logsumexp`` if there is one. Else what the entries leave of ``logsumexp``, with the
        entries S that are present, each id once, and Q their share::

            Q    = sum over S of exp(logits / temperature - logsumexp)
            tail = logsumexp + log(max(1 - Q, 2^-24))

        The floor is what float32 log-probs resolve: a tail that small is noise, and 0 would make
        its logarithm infinite.

        Returns float64, float32 on devices without it; NaN where ``logsumexp`` is, and -inf where
        that is -inf. Gradients: none. No value is read on the host.

        Errors: ``ValueError`` without ``tail_logsumexp`` and ``logsumexp``.

        Example::

            tail_mass = (topk.tail() - topk.logsumexp).exp()
        """
        # No decorator: torch.compile cannot call a decorated method of a TopK that it made itself.
        dtype = wide_dtype(self.device)
        if self.tail_logsumexp is not None:
            return self.tail_logsumexp.detach().to(dtype)
        if self.logsumexp is None:
            raise ValueError(
                "TopK has neither tail_logsumexp nor logsumexp, so what its entries leave of the "
                "teacher's distribution is unknown; make it with select_topk(..., "
                "with_logsumexp=True) or TopK.from_logprobs"
            )
        present = (self.ids >= 0) & (self.logits != -torch.inf)
        counted = present & ~repeats(torch.where(present, self.ids, -1))
        scaled = torch.where(counted, self.logits.detach().to(dtype) / self.temperature, -torch.inf)
        total = self.logsumexp.detach().to(dtype)
        # In this form 1 - Q keeps its digits where Q is near 1.
        rest = -torch.expm1(scaled.logsumexp(-1) - total)
        tail = total + rest.clamp(min=LEAST_TAIL).log()
        return tail.masked_fill(total == -torch.inf, -torch.inf)

    def validate(self, vocab_size: int) -> TopK:
        """Raises ``ValueError`` for ids that are neither -1 nor in [0, vocab_size); returns self.

        Reads the values, so it synchronises with the device: call it where a support enters, not in
        every step.
        """
        check_int(vocab_size, "vocab_size")
        check_vocab_size(vocab_size)
        bad = (self.ids < -1) | (self.ids >= vocab_size)
        count = int(bad.sum())
        if count:
            where = tuple(int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"TopK has {count} ids outside [0, {vocab_size}), the first is "
                f"{int(self.ids[where])} at {where}; use the student's vocabulary size, and -1 "
                f"for absent entries"
            )
        return self

    def _map(self, fn: Callable[[Tensor], Tensor]) -> TopK:
        return TopK(fn(self.ids), fn(self.logits), **self._rest(fn))

    def _rest(self, fn: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The fields besides ids and logits: fn of each tensor, and the temperature."""
        mapped = {name: fn(tensor) for name, tensor in self._per_row().items()}
        return {**mapped, "temperature": self.temperature}

    def _per_row(self) -> dict[str, Tensor]:
        """The tensors with one number per row that are there."""
        given = {name: getattr(self, name) for name in PER_ROW}
        return {name: tensor for name, tensor in given.items() if tensor is not None}


def _check_tensor(tensor: object, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"TopK {name} is a {type(tensor).__name__}, expected a tensor; lists go to "
            "TopK.from_logprobs"
        )
    check_local(tensor, f"TopK {name}")
    check_dense(tensor, f"TopK {name}")


def _one_width(parts: Iterable[TopK], name: str) -> list[TopK]:
    """The parts as a list, once they are one or more supports of one width."""
    try:
        each = iter(parts)
    except TypeError as error:
        given = type(parts).__name__
        raise TypeError(f"TopK.{name} got a {given}, expected a sequence of TopK") from error
    parts = list(each)
    if not parts:
        raise ValueError(f"TopK.{name} got no parts, expected one or more")
    for part in parts:
        if not isinstance(part, TopK):
            raise TypeError(f"TopK.{name} got a {type(part).__name__} among its parts, not a TopK")
    widths = sorted({part.k for part in parts})
    if len(widths) > 1:
        raise ValueError(
            f"TopK.{name} got widths {widths}, expected one; give from_logprobs a k, or call "
            f".pad(k={widths[-1]}) on the parts"
        )
    return parts


def _check_same_size(parts: list[TopK], name: str, joined: int | None = None) -> None:
    """Raises unless leading shapes are equal, except in the dimension that is joined."""

    def others(part: TopK) -> list[int]:
        return [size for i, size in enumerate(part.shape) if i != joined]

    for part in parts:
        if len(part.shape) != len(parts[0].shape) or others(part) != others(parts[0]):
            raise ValueError(
                f"TopK.{name} got leading shapes {tuple(parts[0].shape)} and {tuple(part.shape)}, "
                "which do not fit; call .pad(size) on the parts"
            )


def _leading(dim: int, row_dims: int, part: TopK, name: str) -> int:
    """The dimension, counted from the first."""
    check_int(dim, "dim")
    if not -row_dims <= dim < row_dims:
        raise ValueError(f"TopK.{name} got dim {dim}, but the leading shape is {tuple(part.shape)}")
    return dim % row_dims


def _joined(join: Callable[..., Tensor], parts: list[TopK], dim: int, name: str) -> TopK:
    temperatures = sorted({part.temperature for part in parts})
    if len(temperatures) > 1:
        raise ValueError(
            f"TopK.{name} got parts of temperatures {temperatures}, expected one; it is what their "
            "log-sum-exps are of, so make all parts at one temperature"
        )
    per_row = [part._per_row() for part in parts]
    kept = [field for field in PER_ROW if all(field in tensors for tensors in per_row)]
    rest: dict[str, Any] = {field: join([x[field] for x in per_row], dim) for field in kept}
    ids, logits = (join([getattr(x, field) for x in parts], dim) for field in ("ids", "logits"))
    return TopK(ids, logits, **rest, temperature=temperatures[0])


def _check_width(k: object) -> None:
    """Raises unless k is None or a number of entries."""
    if k is None:
        return
    check_int(k, "k")
    if not 1 <= k <= MAX_ID:  # type: ignore[operator]
        raise ValueError(f"k is {k}, allowed is 1 or more, to {MAX_ID}")


def _parallel(logprobs: object, ids: object, valid: object) -> tuple[Tensor, Tensor, Tensor | None]:
    """Dense tensors of one shape (..., K); nested ones are flattened to their rows."""
    given = {"logprobs": logprobs, "ids": ids} | ({} if valid is None else {"valid": valid})
    allowed = {"logprobs": LOGIT_DTYPES, "ids": ID_DTYPES, "valid": (torch.bool,)}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name} is a {type(tensor).__name__}, expected a tensor; lists and arrays go to "
                "TopK.from_logprobs"
            )
        check_local(tensor, name)
        if tensor.dtype not in allowed[name]:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed[name])
            raise TypeError(
                f"{name} have dtype {tensor.dtype}, allowed: {names} (the order is logprobs, ids)"
            )
    tensors: dict[str, Tensor] = given  # type: ignore[assignment]
    first = tensors["ids"]
    if first.is_nested:
        tensors = {name: _rows_of(tensor, first, name) for name, tensor in tensors.items()}
        first = tensors["ids"]
    for name, tensor in tensors.items():
        check_dense(tensor, name)
        if tensor.shape != first.shape or tensor.ndim == 0:
            raise ValueError(
                f"{name} have shape {tuple(tensor.shape)} and ids {tuple(first.shape)}; expected "
                "one per entry, (..., K)"
            )
        if tensor.device != first.device:
            raise ValueError(f"{name} are on {tensor.device}, ids on {first.device}; move one")
    return tensors["logprobs"].detach(), tensors["ids"], tensors.get("valid")


def _rows_of(tensor: Any, other: Any, name: str) -> Tensor:
    """The rows (T_1 + T_2 + ..., K) of a nested tensor, of as many sequences as another."""
    if not tensor.is_nested or tensor.layout != other.layout:
        raise ValueError(f"{name} and ids must both be nested tensors, of one layout")
    if tensor.ndim != 3 or tensor.size(0) != other.size(0):
        raise ValueError(
            f"{name} is a nested tensor of {tensor.size(0)} sequences with {tensor.ndim} "
            f"dimensions, ids of {other.size(0)}; expected sequences (T, K), as many of each"
        )
    if tensor.layout != torch.jagged:
        parts, others = tensor.unbind(), other.unbind()
        if [part.shape for part in parts] != [part.shape for part in others]:
            raise ValueError(f"{name} and ids are nested tensors whose lengths differ")
        return torch.cat(parts) if parts else tensor.values().view(0, 1)
    if tensor._ragged_idx != 1 or tensor.lengths() is not None:
        raise ValueError(
            f"{name} is a nested tensor with gaps or with a ragged dimension that is not the "
            "second; expected sequences (T, K), call .contiguous()"
        )
    ours, theirs = tensor.offsets(), other.offsets()
    if ours is not theirs and ours.device.type == "cpu" and not torch.equal(ours, theirs):
        raise ValueError(f"{name} and ids are nested tensors whose lengths differ")
    return tensor.values()


def _normalised(ids: Tensor, values: Tensor) -> Tensor:
    """Log-sum-exp of log-probs: 0 where a row has entries, NaN where not."""
    return values.new_zeros(values.shape[:-1]).masked_fill(ids[..., 0] < 0, torch.nan)


def _canonical(
    id_array: np.ndarray, value_array: np.ndarray, k: int | None
) -> tuple[Tensor, Tensor]:
    """A payload's entries, ordered, each id once, k of them or as many as the longest row has."""
    if id_array.shape == (0,):  # an empty list: no positions, not one position without entries
        id_array, value_array = id_array[:, None], value_array[:, None]
    ids, values = torch.from_numpy(id_array), torch.from_numpy(value_array)
    ids, values = ordered(ids, values, None, SENTINEL, ids.shape[-1] if k is None else k)
    if k is None:
        present = (ids >= 0).sum(-1)
        k = max(1, int(present.max())) if present.numel() else 1
        ids, values = resized(ids, values, k)
    return ids, values


def _index_rows(index: Any, row_dims: int) -> tuple[Any, ...]:
    """The index with an ellipsis that leaves whatever follows the rows alone."""
    parts = index if isinstance(index, tuple) else (index,)
    parts = tuple(_as_tensor(part) for part in parts)
    free = row_dims - sum(_dims_used(part) for part in parts)
    if free < 0:
        raise IndexError(
            f"TopK has {row_dims} leading dimensions, but {row_dims - free} were indexed"
        )
    ellipsis = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    return (*parts[:ellipsis], *[slice(None)] * free, *parts[ellipsis + 1 :])


def _as_tensor(part: Any) -> Any:
    """Arrays and nested lists as tensors, so that their dimensions can be counted."""
    if isinstance(part, np.ndarray):
        return torch.from_numpy(part)
    if not isinstance(part, list):
        return part
    # An empty list holds no rows, and torch.tensor makes it floating.
    indices = torch.tensor(part)
    return indices if indices.numel() else indices.long()


def _dims_used(part: Any) -> int:
    """How many dimensions one part of an index takes up."""
    if isinstance(part, Tensor) and part.dtype == torch.bool:
        return part.ndim
    return 0 if part is None or part is Ellipsis or isinstance(part, bool) else 1


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


Context = tuple[tuple[str, ...], float]


def _flatten(topk: TopK) -> tuple[list[Tensor], Context]:
    # Only what is there is a leaf: what is mapped over the leaves sees tensors only.
    per_row = topk._per_row()
    return [topk.ids, topk.logits, *per_row.values()], (tuple(per_row), topk.temperature)


def _unflatten(leaves: Iterable[Any], context: Context) -> TopK:
    # Not through __init__: tree_map may put anything at the leaves, shapes or specs for instance.
    names, temperature = context
    topk = object.__new__(TopK)
    given = dict(zip(("ids", "logits", *names), leaves, strict=True))
    for field in fields(TopK):
        object.__setattr__(topk, field.name, given.get(field.name))
    object.__setattr__(topk, "temperature", temperature)
    return topk


def _flatten_with_keys(topk: TopK) -> tuple[list[tuple[pytree.KeyEntry, Tensor]], Context]:
    leaves, context = _flatten(topk)
    names = map(pytree.GetAttrKey, ("ids", "logits", *context[0]))
    return list(zip(names, leaves, strict=True)), context


def _collate(parts: list[TopK], *, collate_fn_map: Any = None) -> TopK:
    return TopK.stack(parts)


pytree.register_pytree_node(
    TopK,
    _flatten,
    _unflatten,
    serialized_type_name="opd_kernels.TopK",
    # JSON has no tuples.
    to_dumpable_context=list,
    from_dumpable_context=lambda context: (tuple(context[0]), context[1]),
    flatten_with_keys_fn=_flatten_with_keys,
)
default_collate_fn_map[TopK] = _collate
torch.serialization.add_safe_globals([TopK])
