"""Machine code for NVIDIA GPUs as cuobjdump lists it: instructions, loops, what a kernel needs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LISTING = (CUOBJDUMP, "-res-usage", "-sass")  # of a cubin

# Of a multiprocessor, by architecture: threads, kB of shared memory, blocks.
LIMITS = {80: (2048, 164, 32), 90: (2048, 228, 32), 100: (2048, 228, 32), 120: (1536, 100, 24)}
_RESERVED = 1024  # bytes of shared memory that each block takes besides its own
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][A-Z0-9_.]*)([^;]*);")


class Instruction(NamedTuple):
    """One of SASS; the guard is the predicate under which it runs, or empty."""

    address: int
    guard: str
    opcode: str
    operands: str


@dataclass(frozen=True)
class Code:
    """A compiled kernel: its resources and its instructions."""

    name: str
    registers: int
    stack: int
    local: int
    shared: int
    instructions: tuple[Instruction, ...]

    def opcodes(self, *prefixes: str) -> list[str]:
        """Opcodes that begin with one of the prefixes, in order of address."""
        return [i.opcode for i in self.instructions if i.opcode.startswith(prefixes)]

    def bodies(self) -> list[list[Instruction]]:
        """Instructions of each loop: from a backward branch's target to the branch."""
        found = []
        for branch in self.instructions:
            target = _target(branch.operands) if branch.opcode.startswith("BRA") else None
            if target is not None and target < branch.address:
                found.append(
                    [i for i in self.instructions if target <= i.address <= branch.address]
                )
        return found

    def loops(self) -> list[list[str]]:
        """Opcodes of each loop."""
        return [[instruction.opcode for instruction in body] for body in self.bodies()]

    def calls(self) -> list[str]:
        """Calls that leave the kernel; a division of 64-bit integers is a call within it."""
        end = self.instructions[-1].address
        return [
            i.opcode + i.operands
            for i in self.instructions
            if i.opcode.startswith("CALL")
            and not (i.opcode.startswith("CALL.REL") and 0 < (_target(i.operands) or 0) <= end)
        ]


def _target(operands: str) -> int | None:
    address = re.search(r"0x([0-9a-f]+)", operands)
    return int(address[1], 16) if address else None


def read(listing: str) -> list[Code]:
    """The kernels of what ``LISTING`` prints of a cubin."""
    usage, _, code = listing.partition("code for sm_")
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", code, re.DOTALL))
    kernels = []
    for name, numbers in re.findall(r"Function (\S+):\n(.*)", usage):
        found = {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", numbers)}
        resources = (found[key] for key in ("REG", "STACK", "LOCAL", "SHARED"))
        instructions = (
            Instruction(int(address, 16), *rest)
            for address, *rest in _INSTRUCTION.findall(bodies[name])
        )
        kernels.append(Code(name, *resources, tuple(instructions)))
    return kernels


def resident_blocks(architecture: int, threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at once."""
    most_threads, kilobytes, most_blocks = LIMITS[architecture]
    warps = threads // 32
    # Each quarter has 16 K registers and gives them to a warp by 256.
    by_registers = 4 * (16384 // (-(-registers * 32 // 256) * 256)) // warps
    by_shared = kilobytes * 1024 // (shared + _RESERVED)
    return min(by_registers, most_threads // threads, by_shared, most_blocks)
