"""Ranks of a gloo group as processes that stay, so that a test on ranks costs milliseconds.

A task is a function of a module and its arguments: every rank calls it with its group in front and
sends back what it returns or raises. A rank that dies or does not answer fails the task within its
limit; the next task finds new processes.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

# Processes are forked from one that has imported these, and has no threads.
PRELOADED = ("torch", "opd_kernels.testing", "sharded_calls")
COLLECTIVE = 20.0  # seconds that a rank waits for the others in a collective
# Seconds for the other ranks once one has raised: they may be in a collective.
GRACE = 2.0
STARTING = 60.0


class Failure(NamedTuple):
    """What a rank has raised."""

    kind: str
    message: str
    trace: str


class LostRanksError(RuntimeError):
    """A rank has died or does not answer; all of them have been ended."""


class Pool:
    """``ranks`` processes, started with the first task."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(
        self, function: Callable[..., Any], *args: Any, ranks: int | None = None, limit: float = 30
    ) -> list[Any]:
        """What each of the first ``ranks`` returns; raises if one of them does."""
        found = self._outcomes(function, args, ranks or self.ranks, None, limit, GRACE)
        failed = [each for each in found if isinstance(each, Failure)]
        assert not failed, "\n".join(f"{each.message}\n{each.trace}" for each in failed)
        return found

    def outcomes(
        self,
        function: Callable[..., Any],
        *args: Any,
        ranks: int | None = None,
        timeout: float | None = None,
        limit: float = 30,
    ) -> list[Any]:
        """What each rank returns, a ``Failure`` where it raises.

        With a ``timeout`` the ranks have a group of their own, whose collectives wait so long.
        """
        return self._outcomes(function, args, ranks or self.ranks, timeout, limit, limit)

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        store = Path(tempfile.mkdtemp(prefix="ranks")) / "store"
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.ranks, str(store), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._collect(dict(enumerate(self._connections)), STARTING, STARTING)

    def _outcomes(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        ranks: int,
        timeout: float | None,
        limit: float,
        grace: float,
    ) -> list[Any]:
        if not self._processes:
            self._start()
        message = pickle.dumps((function, args, ranks, timeout))
        # All ranks of the pool take part in making a group.
        asked = self._connections if timeout else self._connections[:ranks]
        for connection in asked:
            connection.send_bytes(message)
        found = self._collect(dict(enumerate(asked)), limit, grace)
        return [found.get(rank) for rank in range(ranks)]

    def _collect(
        self, waiting: dict[int, Connection], limit: float, grace: float
    ) -> dict[int, Any]:
        """What the ranks send, by rank; without those that do not answer once one has raised."""
        found: dict[int, Any] = {}
        end = time.monotonic() + limit
        while waiting:
            ready = wait(list(waiting.values()), max(end - time.monotonic(), 0))
            failed = any(isinstance(each, Failure) for each in found.values())
            if not ready:
                self.close()
                if failed:
                    return found
                raise LostRanksError(f"no answer within {limit} s from ranks {sorted(waiting)}")
            for rank, connection in list(waiting.items()):
                if connection not in ready:
                    continue
                try:
                    found[rank] = connection.recv()
                except (EOFError, ConnectionResetError):
                    process = self._processes[rank]
                    process.join(1)
                    self.close()
                    if failed:
                        return found
                    raise LostRanksError(
                        f"rank {rank} has died, status {process.exitcode}"
                    ) from None
                del waiting[rank]
                if isinstance(found[rank], Failure) and not failed:
                    end = min(end, time.monotonic() + grace)
        return found


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    """A rank: calls what it is sent, until nobody is there any more."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=_time(COLLECTIVE)
    )
    groups = {count: dist.new_group(range(count)) for count in range(1, size + 1)}
    connection.send("ready")
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            os._exit(0)
        connection.send(_answer(message, rank, groups))


def _answer(message: bytes, rank: int, groups: dict[int, Any]) -> Any:
    try:
        function, args, ranks, timeout = pickle.loads(message)
        group = groups[ranks]
        if timeout is not None:
            group = dist.new_group(range(ranks), timeout=_time(timeout))
        return function(group, *args) if rank < ranks else None
    except Exception as error:
        return Failure(type(error).__name__, str(error), traceback.format_exc())


def _time(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=seconds)
