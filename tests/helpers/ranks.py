"""The processes of a test on several ranks: how they start, tell what they found, and end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pages import ROOT

TIMEOUT = 120  # seconds: ten are usual


def run_ranks(
    script: str, folder: Path, world: int, timeout: float = TIMEOUT
) -> list[dict[str, Any]]:
    """Runs a script that ends in ``as_rank`` once per rank; what each found."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    logs = [folder / f"{rank}.log" for rank in range(world)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as file:
                command = [sys.executable, script, str(rank), str(folder)]
                processes.append(
                    subprocess.Popen(command, env=environment, stdout=file, stderr=file)
                )
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * world, "\n".join(log.read_text() for log in logs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def as_rank(measured: Callable[[int], dict[str, Any]], world: int) -> None:
    """The rank that the command line names, and its end: it writes down what it measured."""
    try:
        rank, folder = int(sys.argv[1]), Path(sys.argv[2])
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
        )
        found = measured(rank)
        (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        leave()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the other ranks wait for this one


def outcomes(checks: Mapping[str, Callable[[int], None]], rank: int) -> dict[str, str]:
    """The traceback of each check that fails, and "" of the others."""
    found = dict.fromkeys(checks, "")
    for name, check in checks.items():
        try:
            check(rank)
        except Exception:
            found[name] = traceback.format_exc()
    return found


def leave() -> None:
    """Ends this process once all ranks are done, without taking the process group apart.

    Gloo's destructor waits for a worker thread with Python's lock held. That thread may want the
    lock, to let go of the last collective's tensors, and then the process hangs or aborts.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
