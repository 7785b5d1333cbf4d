"""Builds the compiled kernels with ninja; everything else is in pyproject.toml.

One object per source, each with its own instruction-set flags, linked into ``opd_kernels._C``. No
torch is needed to build. Where nothing can be compiled the package is still installed and runs on
its reference backend.

Environment: ``CXX`` chooses the compiler, ``MAX_JOBS`` bounds parallel compilation,
``OPD_KERNELS_SANITIZE=1`` builds with AddressSanitizer and UndefinedBehaviorSanitizer,
``OPD_KERNELS_REQUIRE_NATIVE=1`` turns a failed compilation into a failed installation.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

X86 = platform.machine().lower() in {"x86_64", "amd64"}
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mbmi2 -mprefer-vector-width=512"
AVX2 = "-mavx2 -mbmi2"

# Each source and the flags that only it gets.
SOURCES = {
    "bindings/cpu.cpp": "",
    "cpu/instruction_sets.cpp": "-DOPD_X86_VARIANTS" if X86 else "",
    "cpu/select.cpp": "",
    "cpu/divergence.cpp": "",
    "cpu/scatter.cpp": "",
    "cpu/select_baseline.cpp": "",
    **({"cpu/select_avx512.cpp": AVX512, "cpu/select_avx2.cpp": AVX2} if X86 else {}),
}


def compiler_flags() -> list[str]:
    # No contraction: every instruction set then computes the same bits.
    flags = [
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        "-fopenmp",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
    ]
    flags += ["-Wno-psabi", "-Wno-ignored-attributes"]
    if os.environ.get("OPD_KERNELS_SANITIZE") == "1":
        return [*flags, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return [*flags, "-O3", "-DNDEBUG"]


def ninja_file(compiler: str, target: Path) -> str:
    """The build as ninja text: compile every source, link once."""
    import pybind11

    flags = compiler_flags()
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    sanitize = [flag for flag in flags if flag.startswith("-fsanitize")]
    lines = [
        f"cxx = {compiler}",
        f"cflags = {' '.join(flags)} {' '.join(f'-isystem {path}' for path in includes)}",
        f"ldflags = -shared -fopenmp {' '.join(sanitize + undefined)}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $cflags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in $ldflags -o $out",
    ]
    objects = []
    for source, extra in SOURCES.items():
        name = source.replace("/", "_").replace(".cpp", ".o")
        objects.append(name)
        lines += [f"build {name}: compile {escape(CSRC / source)}", f"  extra = {extra}"]
    lines += [f"build {escape(target)}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


class NinjaBuild(build_ext):
    """build_ext that writes a ninja file and runs it."""

    succeeded = False

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX", "c++")
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if "MAX_JOBS" in os.environ else []
        try:
            (folder / "build.ninja").write_text(ninja_file(compiler, target))
            subprocess.run([*ninja_command(), *jobs], cwd=folder, check=True)
            self.succeeded = True
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if os.environ.get("OPD_KERNELS_REQUIRE_NATIVE") == "1":
                raise
            print(
                f"opd_kernels: the native CPU kernels were not built ({error}). The package works "
                "on its reference backend, slowly. Install a C++17 compiler and reinstall.",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self) -> None:
        if self.succeeded:
            super().copy_extensions_to_source()


def ninja_command() -> list[str]:
    try:
        import ninja
    except ImportError:
        return ["ninja"]
    return [str(Path(ninja.BIN_DIR) / "ninja")]


setup(ext_modules=[Extension("opd_kernels._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
