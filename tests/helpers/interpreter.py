"""Triton's interpreter at a bearable speed; for processes that run under ``TRITON_INTERPRET=1``.

Three things take most of its time and change no result: every call of a jitted function patches the
language anew, reductions with functions it does not know run element by element, and whole storages
are copied back onto themselves (which would also touch pages that a test has closed).
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patched: set[ModuleType] = set()


class _Kept:
    """A patch that stays."""

    def restore(self) -> None:
        pass


def _patch_once(fn: Any, patch: Any = interpreter._patch_lang) -> _Kept:
    modules = {value for value in fn.__globals__.values() if inspect.ismodule(value)}
    if modules & {tl, tl.core} - _patched:
        patch(fn)
        _patched.update(modules & {tl, tl.core})
    return _Kept()


def _reduce(self: Any, arguments: Any, reduce: Any = interpreter.ReduceOps.generic_reduce) -> Any:
    if self.combine_fn is not tl.standard._xor_combine:
        return reduce(self, arguments)
    values = arguments[0].handle.data
    result = np.bitwise_xor.reduce(values, axis=self.axis, keepdims=self.keep_dims)
    return self.to_tensor(result, arguments[0].dtype)


def speed_up() -> None:
    """Replaces them for the rest of the process."""
    interpreter._patch_lang = _patch_once
    interpreter.ReduceOps.generic_reduce = _reduce
    interpreter.GridExecutor._restore_args_dev = lambda *arguments: None
