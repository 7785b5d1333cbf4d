"""Triton's interpreter at a bearable speed; for processes that run under ``TRITON_INTERPRET=1``.

Four things take most of its time and change no result: every call of a jitted function patches the
language anew, every operation builds a table of dtypes, reductions with functions it does not know
run element by element, and whole storages are copied back onto themselves (which would also touch
pages that a test has closed).
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patched: set[ModuleType] = set()
_known: set[int] = set()  # modules whose functions need no patch any more, by their globals' id


class _Kept:
    """A patch that stays."""

    def restore(self) -> None:
        pass


def _patch_once(fn: Any, patch: Any = interpreter._patch_lang) -> _Kept:
    if id(fn.__globals__) not in _known:
        modules = {value for value in fn.__globals__.values() if inspect.ismodule(value)}
        if modules & {tl, tl.core} - _patched:
            patch(fn)
            _patched.update(modules & {tl, tl.core})
        _known.add(id(fn.__globals__))
    return _Kept()


_dtypes: dict[str, Any] = {}


def _np_dtype(dtype: Any, compute: Any = interpreter._get_np_dtype) -> Any:
    scalar = dtype.scalar
    if isinstance(scalar, tl.pointer_type):
        return compute(scalar)
    if scalar.name not in _dtypes:
        _dtypes[scalar.name] = compute(scalar)
    return _dtypes[scalar.name]


def _reduce(self: Any, arguments: Any, reduce: Any = interpreter.ReduceOps.generic_reduce) -> Any:
    if self.combine_fn is not tl.standard._xor_combine:
        return reduce(self, arguments)
    values = arguments[0].handle.data
    result = np.bitwise_xor.reduce(values, axis=self.axis, keepdims=self.keep_dims)
    return self.to_tensor(result, arguments[0].dtype)


def speed_up() -> None:
    """Replaces them for the rest of the process."""
    interpreter._patch_lang = _patch_once
    interpreter._get_np_dtype = _np_dtype
    interpreter.ReduceOps.generic_reduce = _reduce
    interpreter.GridExecutor._restore_args_dev = lambda *arguments: None
