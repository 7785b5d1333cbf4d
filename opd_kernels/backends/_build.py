"""What this build left out and why, as ``setup.py`` noted it beside the compiled modules."""

from __future__ import annotations

import functools
import json
import sysconfig
from pathlib import Path
from typing import Any


@functools.cache
def record() -> dict[str, Any]:
    """``compiler``: its version; ``missing``: reasons by part. Empty where nothing was noted.

    The parts are the modules ``_C`` and ``_cuda``, and ``openmp``.
    """
    name = f"_build{sysconfig.get_config_var('EXT_SUFFIX')}"
    path = Path(__file__).parents[1] / Path(name).with_suffix(".json")
    return dict(json.loads(path.read_text())) if path.exists() else {}


def missing(part: str) -> str | None:
    """Why a part was not built and what would help, in sentences; None if it was or is unknown."""
    reason = record().get("missing", {}).get(part)
    return None if reason is None else str(reason)
