"""Jobs that leave files, a few at a time in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Job:
    """What one process does: `work(*arguments, tick)` leaves the file `path`."""

    path: Path
    steps: int
    work: Callable[..., None]
    arguments: tuple[Any, ...]


def work_through(
    title: str,
    jobs: Sequence[Job],
    workers: int,
    finished: Callable[[Path], None] = lambda path: None,
) -> None:
    """Do the jobs whose files are missing, `workers` at a time, with one thread each.

    With 0 workers, one after the other in this process. `finished` is called here with the file of
    each, as it comes.
    """
    left = [job for job in jobs if not job.path.exists()]
    if workers == 0:
        for job in left:
            job.work(*job.arguments, lambda: None)
            finished(job.path)
        return
    total, missing = sum(job.steps for job in jobs), sum(job.steps for job in left)
    context = multiprocessing.get_context("spawn")
    ticks = context.Queue()
    with (
        ProcessPoolExecutor(workers, context, _begin, (ticks,)) as pool,
        tqdm(total=total, initial=total - missing, desc=title, unit="step") as bar,
    ):
        pending = {pool.submit(_do, job) for job in left}
        try:
            while pending:
                done, pending = wait(pending, timeout=2, return_when=FIRST_COMPLETED)
                while not ticks.empty():
                    bar.update(ticks.get())
                for future in done:
                    path = future.result()
                    finished(path)
                    bar.set_postfix_str(path.stem)
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


# In a worker: the queue to which it reports each step.
_ticks: Any = None


def _begin(ticks: Any) -> None:
    """A worker: one thread, and no life beyond that of the process that waits for it."""
    global _ticks
    _ticks = ticks
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _do(job: Job) -> Path:
    job.work(*job.arguments, partial(_ticks.put, 1))
    return job.path
