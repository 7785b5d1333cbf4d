"""Compiles the Triton kernels for GPUs that are not here, exactly as the backend would launch them.

The backend runs on meta tensors with a driver that names a target and launches nothing, so that
specialisation and configuration are those of a real call. Triton caches what it compiles by source.
"""

from __future__ import annotations

import functools
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sass
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

FOLDER = Path(__file__).resolve().parents[2] / "build" / "listings"


@dataclass(frozen=True)
class Kernel(sass.Code):
    """A compiled kernel, in how many warps it runs and what Triton made of its source."""

    warps: int
    ttgir: str

    def resident_programs(self) -> int:
        """Programs that fit a multiprocessor of an H100."""
        return sass.resident_blocks(90, 32 * self.warps, self.registers, self.shared)

    def entry_sums(self) -> list[tuple[int, int]]:
        """(entries, entries that lie next to each other in a thread) of each sum in float32."""
        width = r"\{sizePerThread = \[(\d+)\]"
        layouts = dict(re.findall(rf"(#\w+) = #ttg\.blocked<{width}", self.ttgir))
        found = re.findall(r"\(tensor<(\d+)xf32, (#\w+)>\) -> f32", self.ttgir)
        return [(int(entries), int(layouts[layout])) for entries, layout in found]


@dataclass(frozen=True)
class AmdKernel:
    """A kernel compiled for an AMD GPU: its resources and its assembly."""

    name: str
    registers: int  # of vectors, a lane's
    spilled: int
    scratch: int
    text: str

    def loops(self) -> list[list[str]]:
        """Opcodes of each loop: from a label to the last branch back to it."""
        lines = [line.split() for line in self.text.splitlines() if line.strip()]
        labels = {words[0][:-1]: at for at, words in enumerate(lines) if words[0].endswith(":")}
        ends: dict[str, int] = {}
        for at, words in enumerate(lines):
            if words[0].startswith(("s_cbranch", "s_branch")) and labels[words[1]] < at:
                ends[words[1]] = at
        return [[words[0] for words in lines[labels[name] : end]] for name, end in ends.items()]


class _Driver:
    """What Triton asks a driver for when it compiles; the device is the architecture."""

    def __init__(self, architecture: int | str, device: int | str) -> None:
        self.architecture, self.device = architecture, device

    def get_current_target(self) -> GPUTarget:
        if isinstance(self.architecture, str):
            return GPUTarget("hip", self.architecture, 64)
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int | str:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(architecture: int | str, device: str | None = None) -> Iterator[list[Any]]:
    """Launches compile and are collected; an architecture with a name is AMD's.

    Triton compiles once for a ``device``, by default the architecture.
    """
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    active, hip = driver._active, torch.version.hip
    if isinstance(architecture, str):
        torch.version.hip = "of no version"  # NVIDIA's options would not compile
    JITFunction.run = compile_only
    driver.set_active(_Driver(architecture, device or architecture))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active
        torch.version.hip = hip


def compile_call(call: Callable[[], object], architecture: int) -> list[Kernel]:
    """The kernels that a call of the backend on meta tensors launches."""
    with compiling(architecture) as compiled:
        call()
    return [_inspect(kernel) for kernel in compiled]


def compile_for_amd(call: Callable[[], object], architecture: str) -> list[AmdKernel]:
    """As ``compile_call``, for an AMD GPU."""
    with compiling(architecture) as compiled:
        call()
    names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    kernels = []
    for kernel in compiled:
        text = kernel.asm["amdgcn"]
        numbers = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in names)
        kernels.append(AmdKernel(kernel.metadata.name, *numbers, text))
    return kernels


def compile_to_text(call: Callable[[], object], architecture: int) -> list[tuple[str, str]]:
    """Name and TTIR, what Triton makes of the source, of each kernel that a call launches."""
    knobs = triton.knobs
    with (
        compiling(architecture, "text alone") as compiled,
        knobs.runtime.scope(),
        knobs.cache.scope(),
    ):
        knobs.runtime.add_stages_inspection_hook = _text_alone
        knobs.cache.dir = str(FOLDER / "text")  # in Triton 3.6 the hook is no part of a key
        call()
    return [(kernel.metadata.name, kernel.asm["ttir"]) for kernel in compiled]


def _text_alone(backend: Any = None, stages: Any = None, *_: object) -> tuple[str, str] | None:
    """Leaves out what follows TTIR, most of the time; without arguments it names itself."""
    if stages is None:
        return ("text alone",) * 2

    def end(module: Any, metadata: dict[str, Any]) -> bytes:
        name = re.search(r"tt\.func public @(\w+)", str(module))[1]
        metadata.update(name=name, shared=0)
        return b""

    for name in list(stages)[1:]:
        del stages[name]
    stages[backend.binary_ext] = end
    return None


def _inspect(kernel: Any) -> Kernel:
    code = _disassemble(kernel.asm["cubin"])
    shared = max(code.shared, kernel.metadata.shared)
    return Kernel(
        **(vars(code) | {"name": kernel.metadata.name, "shared": shared}),
        warps=kernel.metadata.num_warps,
        ttgir=kernel.asm["ttgir"],
    )


@functools.cache
def _disassemble(cubin: bytes) -> sass.Code:
    """The one kernel of a cubin. A listing takes half a second: it is kept by the cubin's bytes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(triton.__version__.encode() + cubin).hexdigest()
    listing = FOLDER / f"{name}.sass"
    if not listing.exists():
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            file, text = Path(folder, "code.cubin"), Path(folder, "code.sass")
            file.write_bytes(cubin)
            with text.open("w") as output:
                subprocess.run([*sass.LISTING, file], check=True, stdout=output)
            text.replace(listing)  # whole or not there: others may run beside this process
    (code,) = sass.read(listing.read_text())
    return code


def unordered_accesses(ttir: str) -> list[str]:
    """Accesses of a program to the same memory that no barrier orders, of which one is a store.

    Threads of a program run apart between barriers, and which thread holds which element is the
    compiler's choice: a load after a store, a store after a load, or a store after another one of
    something else needs a barrier between. Memory is told apart by the kernel's pointer argument.
    """
    head, _, body = ttir.partition("attributes {noinline = false} {\n")
    walker = _Walker(re.findall(r"(%\w+): !tt\.ptr", head))
    walker.walk([re.sub(r" loc\(.*", "", line).strip() for line in body.splitlines()])
    return walker.found


class _Walker:
    """Follows a kernel's text; ``roots`` says from which pointer arguments a value comes."""

    def __init__(self, arguments: list[str]) -> None:
        self.roots = {argument: {argument} for argument in arguments}
        self.constants: dict[str, str] = {}  # stores of one constant may come in any order
        self.loaded: set[str] = set()
        self.stored: dict[str, tuple[str, str]] = {}  # by which line, and what
        self.found: list[str] = []
        self.branch: tuple[set[str], dict[str, tuple[str, str]]] = (set(), {})

    def walk(self, lines: list[str]) -> None:
        at = 0
        while at < len(lines):
            self._step(lines[at])
            if re.search(r"= scf\.(for|while)|^scf\.(for|while)", lines[at]):
                end = _end_of_block(lines, at)
                self.walk(lines[at + 1 : end])  # once more, for what an iteration leaves the next
            at += 1

    def _step(self, line: str) -> None:
        if "barrier" in line:
            self.loaded.clear()
            self.stored.clear()
            return
        if line.startswith("cf.cond_br"):
            self.branch = (set(self.loaded), dict(self.stored))
        if line.startswith("tt.return"):  # what follows in the text follows the branch
            self.loaded, self.stored = set(self.branch[0]), dict(self.branch[1])
        if operation := re.search(r"tt\.load (%\w+)", line):
            for root in self.roots.get(operation[1], ()):
                if root in self.stored:
                    self.found.append(f"load after store of {root}: {line}")
                self.loaded.add(root)
            return
        if operation := re.search(r"tt\.store (%\w+), (%\w+)", line):
            value = self.constants.get(operation[2], operation[2])
            for root in self.roots.get(operation[1], ()):
                before = self.stored.get(root, (line, value))
                if root in self.loaded:
                    self.found.append(f"store after load of {root}: {line}")
                if before[0] != line and before[1] != value:
                    self.found.append(f"store after another of {root}: {line}")
                self.stored[root] = (line, value)
            return
        if constant := re.match(r"(%\w+) = arith.constant ([^:]+)", line):
            self.constants[constant[1]] = constant[2]
        if assignment := re.match(r"(%\w+)(?::\d+)? = ([\w.]+)(.*)", line):
            operands = re.findall(r"%\w+", assignment[3])
            if assignment[2] == "tt.addptr":
                operands = operands[:1]
            self.roots[assignment[1]] = {r for o in operands for r in self.roots.get(o, ())}


def _end_of_block(lines: list[str], start: int) -> int:
    """The line on which the block that opens on ``start`` ends, its ``do`` part included."""
    depth = 0
    for at in range(start, len(lines)):
        depth += lines[at].count("{") - lines[at].count("}")
        if depth == 0:
            return at
    return len(lines)


def main() -> None:
    """Prints what the kernels of one call need, of 8192 rows of 151936 bfloat16 logits."""
    from opd_kernels._arguments import Allowed, Objective
    from opd_kernels.backends import triton as backend

    backend.common.multiprocessors = lambda device: 132
    logits = torch.empty(8192, 151936, dtype=torch.bfloat16, device="meta")
    print("sm   k     registers  shared  programs  warps  instructions  in the streaming loop")
    for architecture in (80, 90, 100, 120):
        for k in (32, 64, 128, 1024):
            (kernel,) = compile_call(
                lambda k=k: backend.select_divergence(
                    logits, logits, k, Allowed(151936), Objective()
                ),
                architecture,
            )
            loops = [body for body in kernel.loops() if any("LDGSTS" in op for op in body)]
            print(
                f"{architecture:<4} {k:<5} {kernel.registers:<10} {kernel.shared:<7} "
                f"{kernel.resident_programs():<9} {kernel.warps:<6} {len(kernel.instructions):<13} "
                f"{len(loops[0])}"
            )


if __name__ == "__main__":
    main()
