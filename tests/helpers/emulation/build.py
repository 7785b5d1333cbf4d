"""Builds the CUDA kernels for the CPU: modules of the very sources, with emulation.h for CUDA.

python tests/helpers/emulation/build.py [plain|sanitized|coverage|races]
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
FLAGS = {
    "plain": "-O2",
    "sanitized": "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all",
    "coverage": "-O0 --coverage",
    "races": "-O1 -g1 -fsanitize=thread",
}
# What ThreadSanitizer does not see: the scheduler, which tells it what a thread is, and the
# bindings, which run on one thread.
UNSEEN = {"emulation.cpp": "-O2 -DOPD_EMULATION_RACES", "cuda.cpp": "-O0"}
COMMON = "-std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas"


PRODUCT = (*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "bindings" / "cuda.cpp")


def build(kind: str = "plain", name: str = "_cuda", own: tuple[Path, ...] = PRODUCT) -> Path:
    """The folder with a module of these sources, built where it is not up to date."""
    import ninja
    import pybind11

    what = kind if name == "_cuda" else f"{kind}{name}"
    # Objects are those of one Python, whose headers they include.
    folder = ROOT / "build" / "emulated" / str(sys.implementation.cache_tag) / what
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*own, HERE / "emulation.cpp"]
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = f"{COMMON} $optimise -DOPD_EMULATION -DOPD_CUDA_ARCHS='\"emulation\"' -I{HERE} "
    flags += " ".join(f"-isystem {path}" for path in includes)
    target = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    lines = [
        f"optimise = {FLAGS[kind]}",
        "rule compile",
        f"  command = {os.environ.get('CXX', 'c++')} -MMD -MF $out.d {flags} -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {os.environ.get('CXX', 'c++')} -shared {FLAGS[kind]} $in -o $out",
        *(line for source in sources for line in compilation(kind, source)),
        f"build {target}: link {' '.join(f'{source.name}.o' for source in sources)}",
        "",
    ]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of one run share the build
        (folder / "build.ninja").write_text("\n".join(lines))
        for path in folder.glob("*.gcno"):  # gcov must not look for a source that is gone
            if path.stem not in {source.name for source in sources}:
                path.unlink()
        command = [Path(ninja.BIN_DIR) / "ninja", "--quiet"]
        subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
    return folder


def compilation(kind: str, source: Path) -> list[str]:
    """Ninja's lines for one source."""
    own = UNSEEN.get(source.name) if kind == "races" else None
    return [f"build {source.name}.o: compile {source}", *([f"  optimise = {own}"] if own else [])]


if __name__ == "__main__":
    print(build(*sys.argv[1:2]))
