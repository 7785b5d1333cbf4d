"""The process of one measurement: imports first, then waits to be told which."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


def main(device: str) -> int:
    """Runs the measurement that a line on standard input names; without one it ends."""
    if device == "cpu":
        from gpu import dry

        dry.install()
    from report import Result

    from gpu import measure

    line = sys.stdin.readline()
    if line:
        request = json.loads(line)
        result = Result(Path(request["record"]), {})
        measure.run(
            request["measure"], torch.device(device), result, request["seconds"], request["without"]
        )
    return 0
