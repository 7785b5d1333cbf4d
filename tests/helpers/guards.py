"""Guard bands: what a GPU backend allocates lies between bytes that nothing may change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_BAND = 64  # bytes on either side, and a multiple of every vector's width
_PATTERN = 0xA5


class GuardedMemory:
    """Allocates as the backend does, poisoned and between guard bands; checks them afterwards."""

    def __init__(self) -> None:
        self.buffers: list[tuple[torch.Tensor, int, str]] = []

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        count = torch.Size(shape).numel()
        nbytes = count * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype, device=device)
        buffer = torch.full((nbytes + 2 * _BAND,), _PATTERN, dtype=torch.uint8, device=device)
        self.buffers.append((buffer, nbytes, f"{dtype} {tuple(shape)}"))
        # A storage of its own and not a view: what an operator returns must be no view of anything.
        inside = torch.frombuffer(buffer.numpy(), dtype=dtype, count=count, offset=_BAND)
        return torch.empty(0, dtype=dtype).set_(inside.untyped_storage()).resize_(shape)

    def check(self) -> None:
        for buffer, nbytes, what in self.buffers:
            for side, band in (("before", buffer[:_BAND]), ("after", buffer[_BAND + nbytes :])):
                assert (band == _PATTERN).all(), f"bytes {side} {what} were written"


@contextmanager
def around_allocations(owner: Any, name: str) -> Iterator[GuardedMemory]:
    """Guards what a backend allocates while the block runs, and checks it at the end.

    ``name`` is the owner's function that allocates.
    """
    memory, plain = GuardedMemory(), getattr(owner, name)
    setattr(owner, name, memory.empty)
    try:
        yield memory
    finally:
        setattr(owner, name, plain)
    memory.check()
