"""Compiles the Triton kernels for GPUs that are not here, exactly as the backend would launch them.

The backend runs on meta tensors with a driver that names a target and launches nothing, so that
specialisation and configuration are those of a real call. Triton caches what it compiles by source.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: its resources and its SASS instructions, (address, opcode, operands)."""

    name: str
    warps: int
    registers: int
    stack: int
    local: int
    shared: int
    sass: tuple[tuple[int, str, str], ...]

    def opcodes(self, *prefixes: str) -> list[str]:
        """Opcodes that begin with one of the prefixes, in order of address."""
        return [opcode for _, opcode, _ in self.sass if opcode.startswith(prefixes)]

    def loops(self) -> list[list[str]]:
        """Opcodes of each loop: from a backward branch's target to the branch."""
        found = []
        for address, opcode, operands in self.sass:
            target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
            if target and int(target[1], 16) < address:
                body = [o for a, o, _ in self.sass if int(target[1], 16) <= a <= address]
                found.append(body)
        return found

    def resident_programs(self) -> int:
        """Programs that fit a multiprocessor of 64 K registers, 2048 threads and 227 kB."""
        by_registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.warps)
        by_threads = 2048 // (32 * self.warps)
        by_shared = 227 * 1024 // (self.shared + 1024)
        return min(by_registers, by_threads, by_shared, 32)


class _Driver:
    """What Triton asks a driver for when it compiles; the device number is the architecture."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling(architecture: int) -> Iterator[list[Any]]:
    """Launches compile and are collected."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    active = driver._active
    JITFunction.run = compile_only
    driver.set_active(_Driver(architecture))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active


def compile_call(call: Callable[[], object], architecture: int) -> list[Kernel]:
    """The kernels that a call of the backend on meta tensors launches."""
    with _compiling(architecture) as compiled:
        call()
    return [_inspect(kernel) for kernel in compiled]


def _inspect(kernel: Any) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        listing = _run("cuobjdump", "-sass", file.name)
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    sass = re.findall(
        r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", listing
    )
    return Kernel(
        kernel.metadata.name,
        kernel.metadata.num_warps,
        found["REG"],
        found["STACK"],
        found["LOCAL"],
        max(found["SHARED"], kernel.metadata.shared),
        tuple((int(address, 16), opcode, operands) for address, opcode, operands in sass),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / tool, *arguments], check=True, capture_output=True, text=True
    ).stdout
