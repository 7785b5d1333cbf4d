"""The backends of compiled modules: they turn tensors into the modules' structs, and launch.

A struct holds addresses, so the tensors that it was made of have to outlive the call.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from opd_kernels._arguments import (
    Allowed,
    Background,
    Objective,
    Tail,
    Tails,
    Temperature,
)
from opd_kernels.backends import _build
from opd_kernels.divergences import Divergence

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Native:
    """A backend with a compiled module; ``opd_kernels.reference`` says what the operators mean.

    A subclass says what the kernels are called, what building them takes, and what a launch runs
    on.
    """

    extension = ""  # the module's name in opd_kernels
    kernels = ""
    toolchain = ""

    def __init__(self, module: Any = None) -> None:
        """Imports the module unless it is given."""
        self.module, self.import_error = module, ""
        if module is None:
            try:
                self.module = importlib.import_module(f"opd_kernels.{self.extension}")
            except ImportError as error:
                self.import_error = str(error)

    def unavailable(self) -> str | None:
        """Why the compiled module cannot be used, and what would bring it; None if it can."""
        if self.module is not None:
            return None
        reason = _build.missing(self.extension)
        if reason is not None:
            return f"the {self.kernels} were not built: {reason}"
        return (
            f"the compiled module is missing ({self.import_error}); install {self.toolchain} and "
            "reinstall opd_kernels"
        )

    def refusal(
        self, device: torch.device, dtypes: tuple[torch.dtype, ...], k: int, vocab: int = 0
    ) -> str | None:
        """Why this backend cannot serve a call, or None; ``vocab`` limits some subclasses."""
        for dtype in dtypes:
            if dtype not in DTYPES:
                return f"{dtype} is not float16, bfloat16 or float32; backend='reference' takes it"
        if k > self.module.max_k:
            return f"k is {k}, above {self.module.max_k}; backend='reference' takes it"
        return None

    def select(self, logits: Tensor, k: int, allowed: Allowed) -> tuple[Tensor, Tensor]:
        """The k best ids and their values; see ``opd_kernels.reference.select``."""
        rows, device = logits.shape[:-1], logits.device
        ids = self._empty((*rows, k), torch.int32, device)
        values = self._empty((*rows, k), torch.float32, device)
        allowed = _contiguous(allowed)
        self._launch(
            "select",
            device,
            self._rows(logits),
            self._allowed(allowed, rows.numel()),
            k,
            ids.data_ptr(),
            values.data_ptr(),
        )
        return ids, values

    def gather(self, student: Tensor, ids: Tensor, allowed: Allowed) -> tuple[Tensor, Tensor]:
        """The values at the ids; see ``opd_kernels.reference.gather``."""
        values, slots = self._at_ids(ids)
        allowed = _contiguous(allowed)
        self._launch(
            "gather",
            ids.device,
            self._rows(student),
            self._rows(ids),
            self._allowed(allowed, ids.shape[:-1].numel()),
            values.data_ptr(),
            slots.data_ptr(),
        )
        return values, slots

    def select_divergence(
        self, student: Tensor, teacher: Tensor, k: int, allowed: Allowed, objective: Objective
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, ids and entry gradients; see ``opd_kernels.reference.select_divergence``."""
        rows, device = student.shape[:-1], student.device
        loss, ids, entry_grad = self._results(rows, k, device)
        allowed, objective = _contiguous(allowed), _with_float32_rows(objective)
        self._launch(
            "select_divergence",
            device,
            self._rows(student),
            self._rows(teacher),
            self._allowed(allowed, rows.numel()),
            k,
            self._objective(objective),
            loss.data_ptr(),
            ids.data_ptr(),
            entry_grad.data_ptr(),
        )
        return loss, ids, entry_grad

    def entry_divergence(
        self, student: Tensor, teacher: Tensor, ids: Tensor, allowed: Allowed, objective: Objective
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, ids and entry gradients; see ``opd_kernels.reference.entry_divergence``."""
        rows, device = student.shape[:-1], student.device
        loss, out_ids, entry_grad = self._results(rows, ids.shape[-1], device)
        allowed, objective = _contiguous(allowed), _with_float32_rows(objective)
        self._launch(
            "entry_divergence",
            device,
            self._rows(student),
            self._rows(teacher),
            self._rows(ids),
            self._allowed(allowed, rows.numel()),
            self._objective(objective),
            loss.data_ptr(),
            out_ids.data_ptr(),
            entry_grad.data_ptr(),
        )
        return loss, out_ids, entry_grad

    def scatter(
        self, entry_grad: Tensor, ids: Tensor, upstream: Tensor, width: int, dtype: torch.dtype
    ) -> Tensor:
        """The dense gradient; see ``opd_kernels.reference.scatter``."""
        shape = (*ids.shape[:-1], width)
        out = self._fresh_zeros(shape, dtype, all_written=True)
        if out is None:
            out = self._empty(shape, dtype, ids.device)
            self._scatter("clear", out, entry_grad, ids, upstream)
        else:
            self._scatter("assign", out, entry_grad, ids, upstream)
        return out

    def scatter_(self, out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor) -> None:
        """As ``scatter``, written over what ``out`` holds."""
        self._scatter("clear", out, entry_grad, ids, upstream)

    def scatter_add_(self, out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor) -> None:
        """As ``scatter``, added to what ``out`` holds."""
        self._scatter("add", out, entry_grad, ids, upstream)

    def _scatter(
        self, mode: str, out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor
    ) -> None:
        """Writes entries into zeros ("assign"), after zeros ("clear"), or adds them ("add")."""
        _check_entries(out, entry_grad, ids, upstream)
        ids, entry_grad = ids.contiguous(), entry_grad.contiguous()
        upstream = _float32(upstream)
        self._launch(
            "scatter",
            out.device,
            self._rows(out),
            ids.data_ptr(),
            entry_grad.data_ptr(),
            upstream.data_ptr(),
            ids.shape[-1],
            mode,
        )

    def _launch(self, operator: str, device: torch.device, *arguments: Any) -> None:
        """Calls the module's operator with what it runs on and its arguments."""
        raise NotImplementedError

    def _fresh_zeros(
        self, shape: tuple[int, ...], dtype: torch.dtype, all_written: bool
    ) -> Tensor | None:
        """Zeros that cost less than clearing, or None; ``all_written`` says if all rows will be."""
        return None

    @staticmethod
    def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def _results(
        self, rows: torch.Size, k: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for losses, ids and entry gradients."""
        loss = self._empty(rows, torch.float32, device)
        ids = self._empty((*rows, k), torch.int32, device)
        return loss, ids, self._empty((*rows, k), torch.float32, device)

    def _at_ids(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for values at ids, and for slots."""
        values = self._empty(ids.shape, torch.float32, ids.device)
        return values, self._empty(ids.shape, torch.int32, ids.device)

    def _rows(self, tensor: Tensor) -> Any:
        return self.module.Rows(
            tensor.data_ptr(), dtype_name(tensor.dtype), tuple(tensor.shape), tensor.stride()
        )

    def _allowed(self, allowed: Allowed, count: int) -> Any:
        limit, banned, mask = allowed
        if mask is not None and (mask.dtype != torch.bool or mask.numel() != count):
            shape = tuple(mask.shape)
            raise ValueError(f"mask is {mask.dtype} {shape}, expected bool for {count} rows")
        if banned is not None and banned.nbytes * 8 < limit:
            bits = banned.nbytes * 8
            raise ValueError(f"the bitmap of banned ids has {bits} bits for {limit} ids")
        return self.module.Allowed(
            limit,
            0 if banned is None else banned.data_ptr(),
            0 if mask is None else mask.data_ptr(),
        )

    def _objective(self, objective: Objective) -> Any:
        (value, rows), (teacher_value, teacher_rows), divergence, weights, outside = objective
        return self.module.Objective(
            value,
            _address(rows),
            teacher_value,
            _address(teacher_rows),
            _divergence(self.module, divergence),
            _address(weights),
            outside,
        )


class NativeLinear(Native):
    """A backend whose module has the operators on hidden states."""

    def gather_dot(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, allowed: Allowed
    ) -> tuple[Tensor, Tensor]:
        """The head's logits at the ids; see ``opd_kernels.reference.gather_dot``."""
        logits, slots = self._at_ids(ids)
        allowed = _contiguous(allowed)
        bias = None if bias is None else bias.contiguous()
        self._launch(
            "gather_dot",
            hidden.device,
            self._rows(hidden),
            self._rows(weight),
            0 if bias is None else bias.data_ptr(),
            dtype_name(torch.float32 if bias is None else bias.dtype),
            self._rows(ids),
            self._allowed(allowed, ids.shape[:-1].numel()),
            ids.shape[-1],
            logits.data_ptr(),
            slots.data_ptr(),
        )
        return logits, slots

    def gather_dot_hidden(
        self, upstream: Tensor, ids: Tensor, weight: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The hidden states' gradient; see ``opd_kernels.reference.gather_dot_hidden``."""
        out = self._empty((*ids.shape[:-1], weight.shape[1]), dtype, ids.device)
        self._gather_dot_gradient("gather_dot_hidden", out, upstream, ids, weight)
        return out

    def gather_dot_weight(
        self, upstream: Tensor, ids: Tensor, hidden: Tensor, vocab: int, dtype: torch.dtype
    ) -> Tensor:
        """The weight's gradient; see ``opd_kernels.reference.gather_dot_weight``."""
        shape = (vocab, hidden.shape[-1])
        out = self._fresh_zeros(shape, dtype, all_written=False)  # text touches some of the rows
        if out is None:
            out = torch.zeros(shape, dtype=dtype, device=ids.device)
        self._gather_dot_gradient("gather_dot_weight", out, upstream, ids, hidden)
        return out

    def _gather_dot_gradient(
        self, operator: str, out: Tensor, upstream: Tensor, ids: Tensor, factor: Tensor
    ) -> None:
        """Writes a gradient; ``factor`` is the weight, or the hidden states for its gradient."""
        if upstream.shape != ids.shape:
            raise ValueError("ids and upstream gradients are not (rows, k)")
        upstream = upstream.contiguous()
        self._launch(
            operator,
            out.device,
            upstream.data_ptr(),
            self._rows(ids),
            self._rows(factor),
            ids.shape[-1],
            self._rows(out),
        )


class NativeFull(Native):
    """A backend whose module has the operators on the probability outside of a support."""

    def select_with_tail(
        self, logits: Tensor, k: int, allowed: Allowed, tail: Tail
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """``select`` and a tail; see ``opd_kernels.reference.select_with_tail``."""
        rows, device = logits.shape[:-1], logits.device
        ids = self._empty((*rows, k), torch.int32, device)
        values = self._empty((*rows, k), torch.float32, device)
        allowed, tail = _contiguous(allowed), _with_float32_temperatures(tail)
        sums, entropy = self._tail_results(tail, rows, device)
        self._launch(
            "select_with_tail",
            device,
            self._rows(logits),
            self._allowed(allowed, rows.numel()),
            k,
            ids.data_ptr(),
            values.data_ptr(),
            self._tail(tail, rows, sums, entropy),
        )
        return ids, values, sums, entropy

    def tail_logsumexp(
        self, logits: Tensor, mask: Tensor | None, tail: Tail
    ) -> tuple[Tensor, Tensor | None]:
        """The tail of a given support; see ``opd_kernels.reference.tail_logsumexp``."""
        rows, device = logits.shape[:-1], logits.device
        mask = None if mask is None else mask.contiguous()
        tail = _with_float32_temperatures(tail)
        sums, entropy = self._tail_results(tail, rows, device)
        self._launch(
            "tail_logsumexp",
            device,
            self._rows(logits),
            self._per_row(mask, rows),
            self._tail(tail, rows, sums, entropy),
        )
        return sums, entropy

    def _tail_results(
        self, tail: Tail, rows: torch.Size, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Memory for a tail's log-sum-exps, and for its entropies."""
        entropy = self._empty(rows, torch.float64, device) if tail.with_entropy else None
        return self._empty(rows, torch.float64, device), entropy

    def _tail(self, tail: Tail, rows: torch.Size, sums: Tensor, entropy: Tensor | None) -> Any:
        return self.module.Tail(
            tail.width,
            tail.temperature.value,
            self._per_row(tail.temperature.rows, rows),
            None if tail.ids is None else self._rows(tail.ids),
            sums.data_ptr(),
            _address(entropy),
        )

    def full_divergence(
        self,
        student: Tensor,
        teacher_values: Tensor,
        ids: Tensor,
        allowed: Allowed,
        objective: Objective,
        tails: Tails,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(loss, ids, entry gradients, factors, log-sum-exps).

        See ``opd_kernels.reference.full_divergence``.
        """
        rows, device = student.shape[:-1], student.device
        loss, out_ids, entry_grad = self._results(rows, ids.shape[-1], device)
        factors = self._empty(rows, torch.float32, device)
        logsumexp = self._empty(rows, torch.float64, device)
        allowed, objective = _contiguous(allowed), _with_float32_rows(objective)
        teacher_tail = tails.teacher.to(torch.float64).contiguous()
        student_tail = tails.student
        if student_tail is not None:
            student_tail = student_tail.to(torch.float64).contiguous()
        self._launch(
            "full_divergence",
            device,
            self._rows(student),
            self._rows(teacher_values),
            self._rows(ids),
            self._allowed(allowed, rows.numel()),
            self._objective(objective),
            self._per_row(teacher_tail, rows),
            self._per_row(student_tail, rows),
            tails.width,
            loss.data_ptr(),
            out_ids.data_ptr(),
            entry_grad.data_ptr(),
            factors.data_ptr(),
            logsumexp.data_ptr(),
        )
        return loss, out_ids, entry_grad, factors, logsumexp

    def scatter_background(
        self, entry_grad: Tensor, ids: Tensor, upstream: Tensor, background: Background
    ) -> Tensor:
        """The dense gradient over a background, in memory of its own.

        See ``opd_kernels.reference.scatter_background``.
        """
        logits = background.logits
        if logits is None:
            raise ValueError("a background in memory of its own needs its logits")
        out = self._fresh_zeros(logits.shape, logits.dtype, all_written=True)
        mode = "assign"
        if out is None:
            out, mode = self._empty(logits.shape, logits.dtype, logits.device), "clear"
        self._scatter_background(mode, out, entry_grad, ids, upstream, background)
        return out

    def scatter_background_(
        self,
        out: Tensor,
        entry_grad: Tensor,
        ids: Tensor,
        upstream: Tensor,
        background: Background,
    ) -> None:
        """As ``scatter_background``, written over what ``out`` holds."""
        self._scatter_background("clear", out, entry_grad, ids, upstream, background)

    def _scatter_background(
        self,
        mode: str,
        out: Tensor,
        entry_grad: Tensor,
        ids: Tensor,
        upstream: Tensor,
        background: Background,
    ) -> None:
        factors, logsumexp, limit, logits, temperature = background
        if factors is None or logsumexp is None:
            raise ValueError("a background has factors and log-sum-exps")
        _check_entries(out, entry_grad, ids, upstream)
        rows = out.shape[:-1]
        logits = out if logits is None else logits
        if logits.dtype != out.dtype:
            raise ValueError(f"the logits are {logits.dtype} and their gradient {out.dtype}")
        ids, entry_grad, upstream = ids.contiguous(), entry_grad.contiguous(), _float32(upstream)
        factors, logsumexp = _float32(factors), logsumexp.to(torch.float64).contiguous()
        temperature = _in_float32(temperature)
        self._launch(
            "scatter_background",
            out.device,
            self._rows(out),
            ids.data_ptr(),
            entry_grad.data_ptr(),
            upstream.data_ptr(),
            ids.shape[-1],
            mode,
            self._rows(logits),
            self._per_row(factors, rows),
            self._per_row(logsumexp, rows),
            limit,
            temperature.value,
            self._per_row(temperature.rows, rows),
        )

    @staticmethod
    def _per_row(values: Tensor | None, rows: torch.Size) -> int:
        """The address of contiguous values, one per row; 0 for None."""
        if values is None:
            return 0
        if values.numel() != rows.numel():
            raise ValueError(f"{values.numel()} values for {rows.numel()} rows")
        return values.data_ptr()


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """The modules' name of a dtype."""
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=64)
def _divergence(module: Any, divergence: Divergence) -> Any:
    return module.Divergence(*divergence)


def _contiguous(allowed: Allowed) -> Allowed:
    """With the mask as the kernels read it."""
    mask = allowed.mask
    if mask is None or mask.is_contiguous():
        return allowed
    return allowed._replace(mask=mask.contiguous())


def _with_float32_rows(objective: Objective) -> Objective:
    """With temperatures and weights as the kernels read them."""
    temperature, teacher_temperature, _, weights, _ = objective
    if temperature.rows is None and teacher_temperature.rows is None and weights is None:
        return objective
    return objective._replace(
        temperature=_in_float32(temperature),
        teacher_temperature=_in_float32(teacher_temperature),
        weights=None if weights is None else _float32(weights),
    )


def _with_float32_temperatures(tail: Tail) -> Tail:
    if tail.temperature.rows is None:
        return tail
    return tail._replace(temperature=_in_float32(tail.temperature))


def _in_float32(temperature: Temperature) -> Temperature:
    value, rows = temperature
    if rows is None:
        return temperature
    return Temperature(value, _float32(rows))


def _float32(values: Tensor) -> Tensor:
    return values.to(torch.float32).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check_entries(out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor) -> None:
    counts = {ids.shape[:-1].numel(), out.shape[:-1].numel()}
    if counts != {upstream.numel()} or entry_grad.shape != ids.shape:
        raise ValueError("ids and entry gradients are not (rows, k)")
