"""Operators on hidden states and a head, whose logits exist a few rows or columns at a time.

``gather_dot`` and its gradients compute a few logits of each row. The others run the framework's
matrix product, piece by piece into one workspace, and the kernels on each piece.

A pass over rows sees whole softmaxes. A gradient whose log-sum-exps are known goes over columns
instead: each row of the weight's gradient is then one product, and not a sum of rounded ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opd_kernels import backends, debugging
from opd_kernels._arguments import (
    Allowed,
    Background,
    Head,
    Question,
    Reading,
    Tails,
    Wanted,
    compute_dtype,
    per_piece,
)
from opd_kernels._checks import check_upstream_dtype
from opd_kernels._library import Operator
from opd_kernels._operands import (
    check_background,
    check_device,
    check_head,
    check_ids,
    check_sums,
    check_tail,
    check_width,
    refuse_lost_graph,
    tail_fake,
)
from opd_kernels.backends import plain


def _read_linear(
    head: Head, reading: Reading, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One pass over a head's logits, which are computed a few rows at a time.

    (ids and values of the k best, logits at the listed ids, the tail's log-sum-exp and entropy).
    An absent entry has value -inf; rows that are masked have that everywhere, and sums of 0.
    """
    found = _Found(head, reading, _module(head, reading, backend))
    for rows, logits, mask in found.pieces():
        found.read(rows, logits, found.shaped(logits), mask)
    return found.results()


def _read_linear_fake(
    head: Head, reading: Reading, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _results(head, reading)


def _linear_divergence(
    head: Head, reading: Reading, question: Question, upstream: Tensor, wanted: Wanted, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``full_divergence`` of a head's logits and the head's gradient, in the pass that reads.

    Returns the losses (...), what ``read_linear`` returns, and the gradients of
    sum(upstream * losses), empty where they are not wanted. Three products of the head's size.
    """
    ids, teacher, objective, tails = question
    hidden = head.hidden
    check_ids(ids, (*hidden.shape[:-1], ids.shape[-1]), hidden)
    check_ids(ids, teacher.shape, hidden)
    check_sums(upstream, "upstream", hidden)
    module = _module(head, reading, backend, ids.shape[-1])
    found = _Found(head, reading, module)
    losses = hidden.new_zeros(hidden.shape[:-1], dtype=compute_dtype(hidden, teacher))
    grads = _Gradients(head, wanted)
    for rows, raw, mask in found.pieces(tails.width):
        logits = found.shaped(raw)
        if reading.k or reading.tail.width or reading.listed is not None:
            found.read(rows, raw, logits, mask)
        which = Allowed(reading.allowed.limit, reading.allowed.banned, mask)
        here = per_piece(objective, rows)
        rest = Tails(tails.teacher.reshape(-1)[rows], None, tails.width)
        loss, *entries = module.full_divergence(
            logits, _flat(teacher)[rows], _flat(ids)[rows], which, here, rest
        )
        losses.view(-1)[rows] = loss
        listed, entry_grad, factors, logsumexp = entries
        slope = _slope(head, logits)
        background = Background(factors, logsumexp, tails.width, None, here.temperature)
        module.scatter_background_(
            logits, entry_grad, listed, upstream.reshape(-1)[rows], background
        )
        if slope is not None:
            raw.copy_(logits.mul_(slope))
        grads.add_rows(rows, raw, mask)
    return losses, *found.results(), *grads.results()


def _linear_divergence_fake(
    head: Head, reading: Reading, question: Question, upstream: Tensor, wanted: Wanted, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden = head.hidden
    losses = hidden.new_empty(hidden.shape[:-1], dtype=compute_dtype(hidden, question.teacher))
    return losses, *_results(head, reading), *_gradients_fake(head, wanted)


def _linear_gradient(
    head: Head,
    entry_grad: Tensor,
    ids: Tensor,
    background: Background,
    mask: Tensor | None,
    wanted: Wanted,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden states, weight and bias, empty where they are not wanted.

    The logits' gradient is entries at the ids, each once, and the background elsewhere. The logits
    are computed once more, a few columns at a time.
    """
    hidden, weight, bias, *_ = head
    check_head(hidden, weight, bias, Allowed(0, None, mask))
    check_ids(ids, (*hidden.shape[:-1], ids.shape[-1]), hidden)
    check_background(background, hidden.new_empty(1).expand(*hidden.shape[:-1], weight.shape[0]))
    refuse_lost_graph("topk_divergence")
    module = backends.resolve(backend, hidden.device, (hidden.dtype,), ids.shape[-1])
    grads = _Gradients(head, wanted, mask, by_columns=True)
    rows = grads.rows
    ids, entry_grad = _flat(ids)[rows], _flat(entry_grad)[rows]
    factors, logsumexp, limit, _, temperature = background
    assert factors is not None
    assert logsumexp is not None
    factors, logsumexp = factors.reshape(-1)[rows], logsumexp.reshape(-1)[rows]
    temperature = per_piece(temperature, rows)
    ones = entry_grad.new_ones(ids.shape[:-1])
    # The head's rows from the limit on are not read: in a padded vocabulary they may be anything.
    bias = None if bias is None else bias[:limit]
    for columns, raw in plain.head_columns(grads.hidden, weight[:limit], bias):
        logits = _shaped(head, raw)
        slope = _slope(head, logits)
        some = Background(factors, logsumexp, columns.stop - columns.start, None, temperature)
        module.scatter_background_(logits, entry_grad, ids - columns.start, ones, some)
        if slope is not None:
            raw.copy_(logits.mul_(slope))
        grads.add_columns(columns, raw)
    return grads.results()


def _linear_gradient_fake(
    head: Head,
    entry_grad: Tensor,
    ids: Tensor,
    background: Background,
    mask: Tensor | None,
    wanted: Wanted,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_fake(head, wanted)


def _module(head: Head, reading: Reading, backend: str, count: int = 1) -> Any:
    """The backend for the rows of a head's logits, once what is asked for fits."""
    k, allowed, tail, listed = reading
    hidden, weight, bias, *_ = head
    check_head(hidden, weight, bias, allowed)
    check_tail(tail, hidden, weight.shape[0])
    if listed is not None:
        check_ids(listed, (*hidden.shape[:-1], listed.shape[-1]), hidden)
        count = max(count, listed.shape[-1])
    if tail.width and tail.ids is not None:
        count = max(count, tail.ids.shape[-1])
    elif tail.width and not k:
        raise ValueError("the tail has no ids, expected those that it leaves out")
    if debugging.ON:
        debugging.check_head(head, allowed._replace(limit=max(allowed.limit, tail.width)))
    limit = allowed.limit if k else 0
    return backends.resolve(backend, hidden.device, (hidden.dtype,), max(k, count), limit)


class _Found:
    """What a pass over a head's logits has found so far."""

    def __init__(self, head: Head, reading: Reading, module: Any) -> None:
        self.head, self.reading, self.module = head, reading, module
        self._results = _results(head, reading)
        ids, values, listed, sums, entropy = self._results
        ids.fill_(-1)
        for some in (values, listed):
            some.fill_(-torch.inf)
        for some in (sums, entropy):
            some.zero_()

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if debugging.ON and self.reading.k:
            debugging.check_selected(self._results[1], self.reading.allowed.mask)
        return self._results

    def pieces(self, least: int = 0) -> Iterator[tuple[slice | Tensor, Tensor, Tensor | None]]:
        """(rows, their logits below the largest id that is asked for or ``least``, their mask)."""
        hidden, weight, bias, *_ = self.head
        _, allowed, tail, _ = self.reading
        width = max(allowed.limit, tail.width, least)
        bias = None if bias is None else bias[:width]
        return plain.head_logits(hidden, weight[:width], bias, allowed.mask)

    def shaped(self, logits: Tensor) -> Tensor:
        return _shaped(self.head, logits)

    def read(self, rows: slice | Tensor, raw: Tensor, logits: Tensor, mask: Tensor | None) -> None:
        """Reads the logits of some rows, ``raw`` and with scale and softcap."""
        k, allowed, tail, listed = self.reading
        *outputs, sums, entropy = self._results
        ids, values, at_listed = map(_flat, outputs)
        allowed = allowed._replace(mask=mask)
        tail = per_piece(tail, rows)
        found: Sequence[Tensor | None] = ()
        # Scale and softcap keep the order, so selection does without them.
        if k and tail.width and logits is raw:
            # In one call, while the logits are in the cache.
            ids[rows], picked, *found = self.module.select_with_tail(logits, k, allowed, tail)
        elif k:
            ids[rows], picked = self.module.select(raw, k, allowed)
        if k:
            picked = plain.shaped(picked, self.head.scale, self.head.softcap)
            # A softcap makes a number of an absent entry's -inf.
            values[rows] = picked.masked_fill(ids[rows] < 0, -torch.inf)
        if tail.width and not found:
            tail = tail if tail.ids is not None else tail._replace(ids=ids[rows])
            found = self.module.tail_logsumexp(logits, mask, tail)
        for out, some in zip((sums, entropy), found, strict=False):
            if some is not None:
                out.view(-1)[rows] = some
        if listed is not None:
            everything = Allowed(logits.shape[-1], None, mask)
            picked, slots = self.module.gather(logits, _flat(listed)[rows], everything)
            at_listed[rows] = picked.masked_fill(slots < 0, -torch.inf)


class _Gradients:
    """A head's gradients, added up in float32 (float64) over pieces of rows or of columns.

    ``rows`` are those that count, ``hidden`` (rows, H) their hidden states. By columns each row of
    the weight's gradient comes whole, and needs no wider dtype.
    """

    def __init__(
        self, head: Head, wanted: Wanted, mask: Tensor | None = None, *, by_columns: bool = False
    ) -> None:
        hidden, weight, *_ = head
        self.head, self.wanted = head, wanted
        self.hidden, self.rows = plain.kept_rows(hidden, mask)
        wide = compute_dtype(hidden)
        shapes = (self.hidden.shape, weight.shape, weight.shape[:1])
        dtypes = (wide, weight.dtype if by_columns else wide, wide)
        self.of_hidden, self.of_weight, self.of_bias = (
            hidden.new_zeros(shape if needed else (0,), dtype=dtype)
            for shape, dtype, needed in zip(shapes, dtypes, wanted, strict=True)
        )

    def add_rows(self, rows: slice | Tensor, grad: Tensor, mask: Tensor | None) -> None:
        """The gradient of some rows' logits, (rows, V or less)."""
        width = grad.shape[-1]
        if self.wanted.hidden:
            self.of_hidden[rows] = (grad @ self.head.weight[:width]).to(self.of_hidden.dtype)
        if self.wanted.weight:
            hidden, _ = plain.kept_rows(self.hidden[rows], mask, leave_out=False)
            plain.add_product(self.of_weight[:width], grad.t(), hidden)
        if self.wanted.bias:
            self.of_bias[:width] += grad.sum(0, dtype=self.of_bias.dtype)

    def add_columns(self, columns: slice, grad: Tensor) -> None:
        """The gradient of some columns' logits, (rows, columns)."""
        if self.wanted.hidden:
            plain.add_product(self.of_hidden, grad, self.head.weight[columns])
        if self.wanted.weight:
            torch.mm(grad.t(), self.hidden, out=self.of_weight[columns])
        if self.wanted.bias:
            self.of_bias[columns] = grad.sum(0, dtype=self.of_bias.dtype)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight, bias, *_ = self.head
        of_hidden = self.of_hidden.to(hidden.dtype)
        if self.wanted.hidden and isinstance(self.rows, Tensor):
            kept, of_hidden = of_hidden, hidden.new_zeros(hidden.shape)
            _flat(of_hidden)[self.rows] = kept
        elif self.wanted.hidden:
            of_hidden = of_hidden.view(hidden.shape)
        return (
            of_hidden,
            self.of_weight.to(weight.dtype),
            self.of_bias.to(weight.dtype if bias is None else bias.dtype),
        )


def _results(head: Head, reading: Reading) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Memory for what ``read_linear`` finds."""
    hidden, (k, _, tail, listed) = head.hidden, reading
    rows, dtype = hidden.shape[:-1], compute_dtype(hidden)
    ids = hidden.new_empty((*rows, k), dtype=torch.int32)
    count = 0 if listed is None else listed.shape[-1]
    values = hidden.new_empty((*rows, k), dtype=dtype)
    return ids, values, hidden.new_empty((*rows, count), dtype=dtype), *tail_fake(hidden, tail)


def _gradients_fake(head: Head, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias, *_ = head
    like = (hidden, weight, weight.new_empty(weight.shape[:1]) if bias is None else bias)
    hidden_grad, weight_grad, bias_grad = (
        torch.empty_like(some) if needed else some.new_empty(0)
        for some, needed in zip(like, wanted, strict=True)
    )
    return hidden_grad, weight_grad, bias_grad


def _flat(tensor: Tensor) -> Tensor:
    """All rows in one dimension."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _reshapes(head: Head) -> bool:
    return head.scale != 1 or head.softcap is not None


def _shaped(head: Head, logits: Tensor) -> Tensor:
    """Logits with scale and softcap, in float32: they would be rounded once more."""
    if not _reshapes(head):
        return logits
    return plain.shaped(logits.to(compute_dtype(logits)), head.scale, head.softcap)


def _slope(head: Head, logits: Tensor) -> Tensor | float | None:
    """The derivative of logits by the product that they are made of; None: it is 1."""
    return plain.slope(logits, head.scale, head.softcap) if _reshapes(head) else None


def _gather_dot(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    allowed: Allowed,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``gather`` on the logits of a head, of which no others are computed."""
    check_head(hidden, weight, bias, allowed)
    check_device(ids, "ids", hidden)
    check_width(ids)
    if debugging.ON:
        debugging.check_gather(hidden, weight, bias, ids, allowed)
    dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
    module = backends.resolve_linear(backend, hidden.device, dtypes, ids.shape[-1])
    return module.gather_dot(hidden, weight, bias, ids, allowed)


def _gather_dot_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    allowed: Allowed,
    backend: str,
) -> tuple[Tensor, Tensor]:
    logits = hidden.new_empty(ids.shape, dtype=compute_dtype(hidden, weight))
    return logits, torch.empty_like(logits, dtype=torch.int32)


def _gather_dot_hidden(
    upstream: Tensor, ids: Tensor, weight: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    module = _gradient_backend(backend, upstream, ids, weight, dtype)
    return module.gather_dot_hidden(upstream, ids, weight, dtype)


def _gather_dot_hidden_fake(
    upstream: Tensor, ids: Tensor, weight: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    return weight.new_empty((*ids.shape[:-1], weight.shape[1]), dtype=dtype)


def _gather_dot_weight(
    upstream: Tensor, ids: Tensor, hidden: Tensor, vocab: int, dtype: torch.dtype, backend: str
) -> Tensor:
    module = _gradient_backend(backend, upstream, ids, hidden, dtype)
    return module.gather_dot_weight(upstream, ids, hidden, vocab, dtype)


def _gather_dot_weight_fake(
    upstream: Tensor, ids: Tensor, hidden: Tensor, vocab: int, dtype: torch.dtype, backend: str
) -> Tensor:
    return hidden.new_empty((vocab, hidden.shape[-1]), dtype=dtype)


def _gradient_backend(
    backend: str, upstream: Tensor, ids: Tensor, factor: Tensor, dtype: torch.dtype
) -> backends.LinearBackend:
    """The backend, once dtypes and devices are known to fit. ``factor``: hidden or weight."""
    check_upstream_dtype(upstream)
    check_device(upstream, "upstream", ids)
    check_device(factor, "hidden states or weight", ids)
    refuse_lost_graph("linear_topk_rkl")
    dtypes = (upstream.dtype, factor.dtype, dtype)
    return backends.resolve_linear(backend, ids.device, dtypes, ids.shape[-1])


_READ = "Tensor ids, Tensor values, Tensor listed, Tensor tail, Tensor entropy"
_GRADIENTS = "Tensor hidden_grad, Tensor weight_grad, Tensor bias_grad"

OPERATORS = {
    "read_linear": Operator(_read_linear, _read_linear_fake, _READ, by_rows=True),
    "linear_divergence": Operator(
        _linear_divergence, _linear_divergence_fake, f"Tensor loss, {_READ}, {_GRADIENTS}"
    ),
    "linear_gradient": Operator(_linear_gradient, _linear_gradient_fake, _GRADIENTS),
    "gather_dot": Operator(
        _gather_dot, _gather_dot_fake, "Tensor values, Tensor slots", by_rows=True
    ),
    "gather_dot_hidden": Operator(_gather_dot_hidden, _gather_dot_hidden_fake, "Tensor grad"),
    "gather_dot_weight": Operator(_gather_dot_weight, _gather_dot_weight_fake, "Tensor grad"),
}
