"""Builds the compiled kernels with ninja; everything else is in pyproject.toml.

There are two modules: ``opd_kernels._C`` for CPUs and ``opd_kernels._cuda`` for NVIDIA GPUs. Each
source is compiled to one object with its own flags; one link makes the module. The build needs
neither torch nor a GPU. If a module cannot be built, the package installs without it and runs on
its other backends.

The build writes what it left out, and why, to standard error and to a file beside the modules,
``_build.<Python>.json``. pip hides the output of a build that succeeds, so ``python -m
opd_kernels`` and the first slow call read the file.

Environment:

- ``CXX``: the C++ compiler, also nvcc's host compiler; default ``c++``.
- ``MAX_JOBS``: the largest number of parallel compilations.
- ``CUDA_HOME``, ``CUDA_PATH``: nvcc is looked for in their ``bin`` first, then on ``PATH``, in
  /usr/local/cuda and in NVIDIA's wheels.
- ``OPD_KERNELS_CUDA_ARCHS``: the GPUs to compile for instead of the default ones, such as ``90a``
  or ``8.0;9.0+PTX``, separated by ``;``, ``,`` or spaces.
- ``NVCC_APPEND_FLAGS``: nvcc reads it itself. ``-lineinfo`` lets profilers name source lines and
  doubles the module.
- ``OPD_KERNELS_BUILD_CUDA``: 0 leaves the CUDA kernels out. 1 makes a missing nvcc or a failed
  compilation an error. Unset, the CUDA kernels are built if nvcc is found.
- ``OPD_KERNELS_REQUIRE_NATIVE``: 1 makes it an error if the CPU kernels cannot be built.
- ``OPD_KERNELS_SANITIZE``: 1 builds only the CPU kernels, with AddressSanitizer and
  UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

X86 = platform.machine().lower() in {"x86_64", "amd64"}
# Where the linker happens to put a loop of long instructions costs a tail up to 10 % on Zen 4.
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mbmi2 -mprefer-vector-width=512"
AVX512 += " -falign-functions=64 -falign-loops=64"
AVX2 = "-mavx2 -mfma -mbmi2"

# source: the flags that only this source gets
CPU_SOURCES = {
    "bindings/cpu.cpp": "",
    "cpu/instruction_sets.cpp": "-DOPD_X86_VARIANTS" if X86 else "",
    "cpu/select.cpp": "",
    "cpu/gather.cpp": "",
    "cpu/divergence.cpp": "",
    "cpu/full.cpp": "",
    "cpu/tail.cpp": "",
    "cpu/scatter.cpp": "",
    "cpu/linear.cpp": "",
    "cpu/baseline.cpp": "",
    **({"cpu/avx512.cpp": AVX512, "cpu/avx2.cpp": AVX2} if X86 else {}),
}
CUDA_SOURCES = dict.fromkeys(
    (
        "bindings/cuda.cpp",
        "cuda/select.cu",
        "cuda/gather.cu",
        "cuda/divergence.cu",
        "cuda/full.cu",
        "cuda/scatter.cu",
        "cuda/background.cu",
        "cuda/tail.cu",
        "cuda/device.cu",
    ),
    "",
)
# The default GPUs; those that nvcc does not support are left out. The last one without a letter
# gets PTX too, from which the driver compiles for later GPUs.
ARCHITECTURES = ("80", "90", "90a", "100", "120")

SANITIZED = os.environ.get("OPD_KERNELS_SANITIZE") == "1"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if SANITIZED else []

# A small library to try the compiler with: it needs C++17, and OpenMP where -fopenmp is given.
PROBE = """
#include <string_view>
int probe(std::string_view text) {
  int sum = 0;
#pragma omp parallel for reduction(+ : sum)
  for (int i = 0; i < 100; ++i) sum += text[i % text.size()];
  return sum;
}
"""


class NotBuiltError(OSError):
    """A module cannot be built; the message says why and what would help."""


@dataclass
class Module:
    """How one extension module is compiled and linked."""

    sources: dict[str, str]
    compile: list[str]
    link: list[str]
    nvcc: list[str] = field(default_factory=list)  # the command for .cu files
    without_openmp: str | None = None  # why it lacks OpenMP, and what would help


def cpu_module() -> Module:
    require_compiler()
    # Without contraction every instruction set computes the same bits. Nothing reads floating-point
    # exceptions; if they counted, the compiler could not vectorise loops with conditions.
    flags = ["-ffp-contract=off", "-fno-trapping-math", *SANITIZERS]
    link = list(SANITIZERS)
    without_openmp = None
    error = compile_error("-fopenmp")
    if error is None:
        flags, link = ["-fopenmp", *flags], ["-fopenmp", *link]
    else:
        flags += ["-Wno-unknown-pragmas", "-Wno-unused-variable"]
        without_openmp = (
            f"{compiler()} does not build with -fopenmp ({error}). Install g++ with libgomp, or "
            "libomp for clang, and reinstall."
        )
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    return Module(CPU_SOURCES, flags, link, without_openmp=without_openmp)


def cuda_module() -> Module:
    nvcc = find_nvcc()
    require_compiler()
    archs = architectures(nvcc)
    command = [nvcc, "-ccbin", host_compiler(), "-std=c++17", "-O3", "-DNDEBUG"]
    # No contraction, as on the CPU: results do not depend on what the compiler would contract.
    command += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-fmad=false", *gencode(archs)]
    # The CUDA runtime is linked statically and its symbols are hidden: torch loads its own runtime.
    link = [*library_folders(nvcc), "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    return Module(
        CUDA_SOURCES,
        [f'-DOPD_CUDA_ARCHS="{" ".join(archs)}"'],
        [*link, "-Wl,--exclude-libs,ALL"],
        command,
    )


# module: (how it is built, its name in messages, the variable that requires it, what runs instead)
MODULES = {
    "opd_kernels._C": (
        cpu_module,
        "CPU kernels",
        "OPD_KERNELS_REQUIRE_NATIVE",
        "CPUs run the reference backend, slowly.",
    ),
    "opd_kernels._cuda": (
        cuda_module,
        "CUDA kernels",
        "OPD_KERNELS_BUILD_CUDA",
        "GPUs run the Triton backend.",
    ),
}


def compiler() -> str:
    return os.environ.get("CXX") or "c++"


def host_compiler() -> str:
    """The compiler without launchers such as ccache, which nvcc would take for the compiler."""
    return [word for word in shlex.split(compiler()) if not word.startswith("-")][-1]


def compile_error(*flags: str) -> str | None:
    """The compiler's error on a small library with these flags; None if it builds."""
    words = shlex.split(compiler())
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(PROBE)
        command = [*words, "-std=c++17", "-fPIC", "-shared", *flags, str(source)]
        try:
            run = subprocess.run(
                [*command, "-o", f"{folder}/probe.so"], capture_output=True, text=True
            )
        except OSError:
            return f"{words[0]} is not found"
    return first_error(run.stderr) if run.returncode else None


def first_error(output: str) -> str:
    """The first line with an error in a tool's output; without one, the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search("error:|fatal|cannot find", line)]
    return (errors or lines[-1:] or ["no message"])[0][:300]


def require_compiler() -> None:
    """Raises if there is no C++17 compiler or no Python headers."""
    error = compile_error()
    if error is not None:
        raise NotBuiltError(
            f"no C++17 compiler ({error}). Install g++ or clang, or name one in CXX, and reinstall."
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        raise NotBuiltError(
            f"no Python headers ({header} is not found). Install them (Debian and Ubuntu: "
            "apt install python3-dev) and reinstall."
        )


def compiler_version() -> str:
    """The first line of the compiler's ``--version``."""
    command = [*shlex.split(compiler()), "--version"]
    try:
        output = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        output = ""
    return next(iter(output.splitlines()), compiler())


def find_nvcc() -> str:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [f"{home}/bin" for home in homes if home]
    folders += [folder for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    folders += ["/usr/local/cuda/bin"]
    # In pip's isolated build sys.path has the build's packages, platlib those of the installation.
    packages = [sysconfig.get_paths()["platlib"], *sys.path]
    folders += [f"{package}/nvidia/cu13/bin" for package in packages]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        raise NotBuiltError(
            "no nvcc. Install CUDA 12 or later with nvcc, or set CUDA_HOME to the folder that has "
            "bin/nvcc, and reinstall."
        )
    return nvcc


def dry_run(nvcc: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Runs ``nvcc --dryrun``, which prints nvcc's commands and compiles nothing."""
    command = [nvcc, "-ccbin", host_compiler(), "--dryrun", "-x", "cu", "-c", os.devnull]
    return subprocess.run([*command, "-o", "none.o", *flags], capture_output=True, text=True)


def library_folders(nvcc: str) -> list[str]:
    """Linker flags for CUDA's libraries.

    NVIDIA's wheels have the libraries in ``lib``, where their nvcc does not look.
    """
    output = dry_run(nvcc).stderr
    flags = [flag for line in re.findall("LIBRARIES=(.*)", output) for flag in shlex.split(line)]
    return [*flags, *(f"-L{top.strip()}/lib" for top in re.findall("#\\$ TOP=(.*)", output))]


def gencode(archs: list[str]) -> list[str]:
    """nvcc's flags for architectures such as 90a and 120+PTX."""
    flags = []
    for arch in archs:
        number, _, ptx = arch.partition("+")
        codes = [f"sm_{number}"] + [f"compute_{number}"] * bool(ptx)
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


def architectures(nvcc: str) -> list[str]:
    """The GPUs to compile for: the user's, or the default ones that nvcc supports."""

    def supported(arch: str) -> bool:
        return dry_run(nvcc, *gencode([arch])).returncode == 0

    words = re.findall(r"[^;,\s]+", os.environ.get("OPD_KERNELS_CUDA_ARCHS", ""))
    archs = []
    for word in words:
        match = re.fullmatch(r"(\d\d?)\.?(\d[af]?)(\+PTX)?", word)
        archs.append("".join(match.groups("")) if match else "")
        if not match or not supported(archs[-1]):
            raise SetupError(
                f"OPD_KERNELS_CUDA_ARCHS names {word!r}; allowed are GPUs that {nvcc} compiles "
                "for, such as '90a' or '8.0 9.0+PTX'"
            )
    if not archs:
        archs = [arch for arch in ARCHITECTURES if supported(arch)]
        unsupported = [arch for arch in ARCHITECTURES if arch not in archs]
        last = max((i for i, arch in enumerate(archs) if arch.isdigit()), default=None)
        if last is None:
            error = first_error(dry_run(nvcc, *gencode(["90"])).stderr)
            raise NotBuiltError(
                f"{nvcc} compiles for none of {', '.join(ARCHITECTURES)} ({error}). Install CUDA "
                "12 or later and reinstall."
            )
        archs[last] += "+PTX"
        if unsupported:
            say(
                f"{nvcc} does not support {', '.join(unsupported)}; "
                f"compiling for {', '.join(archs)}"
            )
    return list(dict.fromkeys(archs))


def ninja_file(module: Module, output: str) -> str:
    """The text of ``build.ninja``: compile every source, link once."""
    try:
        import pybind11
    except ImportError as error:
        raise NotBuiltError(f"{error}. pip install pybind11 and reinstall.") from error

    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
    flags += ["-Wno-ignored-attributes", *(["-O1", "-g1"] if SANITIZED else ["-O3", "-DNDEBUG"])]
    for path in (pybind11.get_include(), sysconfig.get_paths()["include"]):
        flags += ["-isystem", path]
    lines = []
    commands = {
        "cpp": f"{compiler()} {quoted([*flags, *module.compile])}",
        "cu": quoted(module.nvcc),
    }
    for suffix, command in commands.items():
        lines += [
            f"rule {suffix}",
            f"  command = {command} -MMD -MF $out.d $extra -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    lines += ["rule link", f"  command = {compiler()} -shared $in {quoted(module.link)} -o $out"]
    objects = []
    for source, extra in module.sources.items():
        name, suffix = source.replace("/", "_").split(".")
        objects.append(f"{name}.o")
        path = str(CSRC / source).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")
        lines += [f"build {name}.o: {suffix} {path}", f"  extra = {extra}"]
    lines += [f"build {output}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def quoted(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def say(message: str) -> None:
    print(f"opd_kernels: {message}", file=sys.stderr)


class NinjaBuild(build_ext):
    """build_ext that writes a ninja file for each module and runs it."""

    def build_extensions(self) -> None:
        cuda = os.environ.get("OPD_KERNELS_BUILD_CUDA") or "auto"
        if cuda not in {"auto", "0", "1"}:
            raise SetupError(f"OPD_KERNELS_BUILD_CUDA is {cuda!r}, allowed are 0 and 1")
        self.left_out = []
        self.missing: dict[str, str] = {}
        for ext in list(self.extensions):
            # If this build fails, no module of an earlier one must stay. If it succeeds, the module
            # must be a new file: a process may be running the old one.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            name = ext.name.rpartition(".")[2]
            _, kernels, required, fallback = MODULES[ext.name]
            try:
                if name == "_cuda" and (cuda == "0" or SANITIZED):
                    variable = "OPD_KERNELS_SANITIZE" if SANITIZED else "OPD_KERNELS_BUILD_CUDA"
                    self.missing[name] = f"{variable} left them out. Reinstall without it."
                else:
                    self.build_extension(ext)
                    continue
            except OSError as error:
                if os.environ.get(required) == "1":
                    raise
                self.missing[name] = str(error)
                say(f"the {kernels} were not built: {error} {fallback}")
            # setuptools expects a file for every extension in its list.
            self.extensions.remove(ext)
            self.left_out.append(ext)
        self.record().parent.mkdir(parents=True, exist_ok=True)
        content = {"compiler": compiler_version(), "missing": self.missing}
        self.record().write_text(json.dumps(content, indent=2) + "\n")

    def build_extension(self, ext: Extension) -> None:
        make, *_ = MODULES[ext.name]
        module = make()
        if module.without_openmp is not None:
            self.missing["openmp"] = module.without_openmp
            say(f"the CPU kernels run on one thread: {module.without_openmp}")
        # pip deletes its build folder after an editable installation. With a folder of its own, the
        # next installation compiles only what has changed.
        base = ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp)
        folder = base.resolve() / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(module, "module.so"))
        run_ninja(folder)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / "module.so", target)

    def record(self) -> Path:
        """The file that says what was left out; ``opd_kernels/backends/_build.py`` reads it."""
        name = self.get_ext_filename("opd_kernels._build")
        return Path(self.build_lib, name).with_suffix(".json")

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(self.record())]

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        shutil.copy2(self.record(), ROOT / "opd_kernels")
        for ext in self.left_out:
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)


def run_ninja(folder: Path) -> None:
    """Runs ninja and prints its output as it comes."""
    jobs = [f"-j{os.environ['MAX_JOBS']}"] if "MAX_JOBS" in os.environ else []
    try:
        ninja = subprocess.Popen(
            [*ninja_command(), *jobs],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except FileNotFoundError as error:
        raise NotBuiltError("no ninja. pip install ninja and reinstall.") from error
    output = []
    with ninja:
        for line in ninja.stdout:
            sys.stdout.write(line)
            output.append(line)
    if ninja.returncode:
        # Ninja's own lines could be taken for the compiler's error.
        own = ("[", "FAILED", "ninja:")
        error = first_error("".join(line for line in output if not line.startswith(own)))
        raise NotBuiltError(
            f"their compilation failed ({error}). `pip install -v .` shows the whole output."
        )


def ninja_command() -> list[str]:
    try:
        import ninja
    except ImportError:
        return ["ninja"]
    return [str(Path(ninja.BIN_DIR) / "ninja")]


setup(
    ext_modules=[Extension(name, sources=[]) for name in MODULES],
    cmdclass={"build_ext": NinjaBuild},
)
