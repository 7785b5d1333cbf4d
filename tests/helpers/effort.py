"""How much of a test runs where: Triton's interpreter takes thousands of times a kernel's time."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SANITIZED = os.environ.get("OPD_KERNELS_EMULATED") == "sanitized"


def examples(count: int) -> int:
    """Random cases to draw: a fraction of them under the interpreter."""
    return max(count // 30, 3) if INTERPRETED else count


def rows(count: int) -> int:
    """Rows of an input: two at most under the interpreter."""
    return min(count, 2) if INTERPRETED else count


def some(values: Iterable[T], turn: int = 0, of: int = 1) -> list[T]:
    """The values; under the interpreter ``of`` of them, which begin with number ``turn``."""
    found = list(values)
    return [found[(turn + i) % len(found)] for i in range(of)] if INTERPRETED else found
