"""How much of a test runs where: Triton's interpreter takes thousands of times a kernel's time."""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def examples(count: int) -> int:
    """Random cases to draw: a fraction of them under the interpreter."""
    return max(count // 60, 3) if INTERPRETED else count
