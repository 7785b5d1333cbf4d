"""The machine code of the CUDA kernels, for GPUs that need not be here.

    python tests/helpers/cubins.py    # prints what each kernel needs

The kernels are those of the build: its objects, which ninja brings up to date. What else is
compiled, with the build's flags, is kept under build/cubins.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import sass
import setuptools
from emulation.plan import GPUS, plan

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "cubins"
OBJECTS = ROOT / "build" / "editable" / "opd_kernels._cuda"
ARCHITECTURES = (80, 90, 100, 120)
SOURCES = ("select", "gather", "divergence", "full", "scatter", "background", "tail")
# What the listing adds from 9.0 on to a kernel's shared memory, where it uses any.
_SYSTEM_SHARED = 1024


@functools.cache
def build_commands() -> dict[str, Any]:
    """What setup.py defines."""
    with mock.patch.object(setuptools, "setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


@functools.cache
def nvcc() -> list[str]:
    """The build's command for a .cu file, but for the architectures."""
    command = build_commands()["cuda_module"]().nvcc
    return [word for word in command if not word.startswith("-gencode")]


def available() -> bool:
    """Whether there is an nvcc."""
    try:
        build_commands()["find_nvcc"]()
    except OSError:
        return False
    return True


def built() -> dict[tuple[int, str], sass.Code]:
    """Each kernel of the build for the default GPUs, by architecture and name."""
    commands = build_commands()
    with mock.patch.dict(os.environ):
        os.environ.pop("OPD_KERNELS_CUDA_ARCHS", None)
        lines = commands["ninja_file"](commands["cuda_module"](), "module.so").splitlines()
    objects = {source: OBJECTS / f"cuda_{source}.o" for source in SOURCES}
    _ninja(OBJECTS, lines, *(path.name for path in objects.values()))
    lines = _rules()
    for arch, (source, path) in itertools.product(ARCHITECTURES, objects.items()):
        lines += [f"build {source}.{arch}.sass: list {path}", f"  only = -arch sm_{arch}"]
    _ninja(FOLDER, lines)
    kernels = {}
    for arch, source in itertools.product(ARCHITECTURES, SOURCES):
        for code in sass.read((FOLDER / f"{source}.{arch}.sass").read_text()):
            kernels[arch, _plain(code.name)] = named(code, arch)
    return kernels


def named(code: sass.Code, arch: int) -> sass.Code:
    """With its plain name and its own shared memory."""
    shared = max(code.shared - (_SYSTEM_SHARED if arch >= 90 else 0), 0)
    return replace(code, name=_plain(code.name), shared=shared)


def listed(source: Path, folder: Path, arch: str, flags: list[str]) -> list[sass.Code]:
    """The kernels of one file, compiled with more flags than the build's."""
    lines = [
        *_rules(flags),
        f"build code.cubin: compile {source}",
        f"  arch = {arch}",
        "build code.sass: list code.cubin",
    ]
    _ninja(folder, lines)
    return sass.read((folder / "code.sass").read_text())


def _rules(flags: list[str] | None = None) -> list[str]:
    command = shlex.join([*nvcc(), *(flags or [])]).replace("$", "$$")
    return [
        "rule compile",
        f"  command = {command} -arch=sm_$arch -cubin -MMD -MF $out.d $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule list",
        f"  command = {shlex.join(map(str, sass.LISTING))} $only $in > $out",
    ]


def itemsize(code: sass.Code) -> int:
    """Of an element of the rows that a kernel reads, in bytes."""
    return int(re.findall(r"(\d+)>$", code.name)[0]) // 8


def streaming_loop(code: sass.Code) -> list[sass.Instruction]:
    """The loop over a row: the innermost that loads what no cache need keep and takes maxima.

    It reads no shared memory, unlike loops over what is read again.
    """
    loops = []
    for body in code.bodies():
        opcodes = [instruction.opcode for instruction in body]
        if any(op.startswith("LDS") for op in opcodes):
            continue
        if any(op.startswith("LDG.E.EF") for op in opcodes) and any(map(is_maximum, opcodes)):
            loops.append(body)
    return min(loops, key=len, default=[])


def is_maximum(opcode: str) -> bool:
    """Of floats, one, two or three at a time."""
    return "MNMX" in opcode and not opcode.startswith(("IMNMX", "VIMNMX", "VIADDMNMX", "UIMNMX"))


def _plain(mangled: str) -> str:
    """select_kernel<Float32> or tail_kernel<true, Float32> of its symbol."""
    name, flag, argument = re.findall(
        r"\d([a-z_]+_kernel)(?:I(?:Lb([01])E)?NS_\d+(\w+?)E)?", mangled
    )[0]
    flags = {"0": "false, ", "1": "true, "}
    return f"{name}<{flags.get(flag, '')}{argument}>" if argument else name


def write(file: Path, text: str) -> None:
    """Leaves a file alone that holds the text already: nothing made of it is out of date."""
    if not file.exists() or file.read_text() != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def _ninja(folder: Path, lines: list[str], *targets: str) -> None:
    write(folder / "build.ninja", "\n".join([*lines, ""]))
    command = [*build_commands()["ninja_command"](), "--quiet", *targets]
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)


def main() -> None:
    """Prints what the kernels need, for 8192 rows of 151936 logits and k = 64."""
    print(f"{'kernel':32} sm   registers threads shared blocks instructions in the streaming loop")
    for (arch, name), code in sorted(built().items(), key=lambda item: item[0][::-1]):
        threads, shared = 128, 0
        if not name.startswith(("gather", "scatter", "background", "tail")):
            cut = plan(8192, 151936, 64, itemsize(code) if "<" in name else 2, GPUS[arch])
            if name.startswith("tail"):
                cut = cut.with_entropy if "true" in name else cut.with_tail
            given = name.startswith(("support", "full"))
            threads = cut.support_threads if given else cut.threads
            shared = cut.support_shared if given else cut.shared
        blocks = sass.resident_blocks(arch, threads, code.registers, shared)
        print(
            f"{name:32} {arch:<4} {code.registers:9} {threads:7} {shared:6} {blocks:6} "
            f"{len(code.instructions):12} {len(streaming_loop(code)) or '-':>9}"
        )


if __name__ == "__main__":
    main()
