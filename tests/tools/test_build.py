"""The build: with compilers, without, with broken ones, and what the linker could mix up."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMPORT = """
import sys, warnings, torch
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in f.__module__]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import opd_kernels
    for _ in range(2):
        loss = opd_kernels.topk_rkl(torch.zeros(2, 9), torch.randn(2, 9), 3)
print(opd_kernels.__file__)
print([str(w.message) for w in caught])
"""


# setup.py where there is no nvcc, wherever it may be, and without some modules of Python.
HIDE_NVCC = """
import os, runpy, shutil, sys
which = shutil.which
shutil.which = lambda name, *rest, **named: None if name == "nvcc" else which(name, *rest, **named)
sys.modules.update(dict.fromkeys(os.environ.get("HIDDEN_MODULES", "").split()))
runpy.run_path("setup.py", run_name="__main__")
"""
# A compiler that makes empty files of all that it is given.
FAKE_COMPILER = """#!/bin/sh
case "$*" in
  *--version*) echo "fake 1.0"; exit 0;;
{refusal}
esac
while [ "$1" != -o ]; do shift; done
: > "$2"
: > "$2.d"
"""
IMPORT_CUDA = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("opd_kernels._cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.architectures, module.runtime_version >= 12000, module.driver_version() >= 0, sep="|")
"""
# An nvcc that knows what an old one knows and compiles nothing.
OLD_NVCC = """#!/bin/sh
case "$*" in
  *compute_1[0-9][0-9]*) echo "nvcc fatal   : Unsupported gpu architecture" >&2; exit 1;;
  *--dryrun*) exit 0;;
esac
echo "no licence" >&2
exit 1
"""


def build(
    folder: Path, hide_nvcc: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", HIDE_NVCC] if hide_nvcc else ["setup.py"]), "-q", "build"]
    command += ["--build-base", str(folder), "--build-lib", str(folder / "lib")]
    command += ["--build-temp", str(folder / "temp")]
    base = {name: x for name, x in os.environ.items() if not name.startswith("OPD_KERNELS_")}
    return subprocess.run(command, cwd=ROOT, env=base | environment, capture_output=True, text=True)


def modules(folder: Path) -> dict[str, Path]:
    """The compiled modules of a build."""
    return {path.name.split(".")[0]: path for path in folder.glob("lib/opd_kernels/*.so")}


def left_out(folder: Path) -> dict[str, str]:
    """What the record of a build says is missing, by part."""
    (record,) = folder.glob("lib/opd_kernels/_build.*.json")
    return dict(json.loads(record.read_text())["missing"])


def fake_compiler(folder: Path, refusal: str = "") -> str:
    path = folder / "fake-c++"
    path.write_text(FAKE_COMPILER.format(refusal=refusal))
    path.chmod(0o755)
    return str(path)


def printed(*command: object) -> str:
    run = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=True)
    return run.stdout


def keep_objects(folder: Path, cuda: str) -> None:
    """Makes a build's folders of objects, one for each module, outlive the build's folder.

    Those of the CPU module are the installation's: the same commands made them.
    """
    (folder / "temp").mkdir()
    own = ROOT / "build" / "tests" / str(sys.implementation.cache_tag) / cuda
    for name, objects in (("_C", ROOT / "build" / "editable" / "opd_kernels._C"), ("_cuda", own)):
        objects.mkdir(parents=True, exist_ok=True)
        (folder / "temp" / f"opd_kernels.{name}").symlink_to(objects)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the CPU module and what was said where no nvcc was found.

    Its objects stay under build/, so that ninja compiles only what has changed since the last run.
    """
    folder = tmp_path_factory.mktemp("build")
    keep_objects(folder, "_cuda")
    run = build(folder, hide_nvcc=True, OPD_KERNELS_REQUIRE_NATIVE="1")
    assert run.returncode == 0, run.stderr
    return folder, run.stderr


@pytest.fixture
def old_nvcc(tmp_path: Path) -> str:
    """CUDA_HOME of an nvcc that fails."""
    path = tmp_path / "cuda" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(OLD_NVCC)
    path.chmod(0o755)
    return str(tmp_path / "cuda")


def test_without_a_compiler_the_package_installs_works_and_says_why_it_is_slow(
    tmp_path: Path,
) -> None:
    run = build(tmp_path, CXX="no-such-compiler")
    assert run.returncode == 0, run.stderr
    assert "CPU kernels were not built" in run.stderr
    assert not modules(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "lib")}
    environment.pop("OPD_KERNELS_CPU_ISA", None)
    run = subprocess.run(
        [sys.executable, "-c", IMPORT],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    where, warned = run.stdout.splitlines()
    assert where.startswith(str(tmp_path))
    assert warned.count("slowly") == 1
    assert "compiler" in warned


@pytest.mark.parametrize(
    ("lacking", "reason", "remedy"),
    [
        ({"CXX": "no-such-compiler"}, "no-such-compiler is not found", "Install g++ or clang"),
        ({"CXX": "{old}"}, "error: unrecognized option -std=c++17", "Install g++ or clang"),
        ({"CXX": "{broken}"}, "select.cpp:7:1: error: no", "pip install -v ."),
        ({"CXX": "{fake}", "HIDDEN_MODULES": "ninja", "PATH": ""}, "no ninja", "install ninja"),
        ({"CXX": "{fake}", "HIDDEN_MODULES": "pybind11"}, "pybind11", "install pybind11"),
    ],
    ids=["compiler", "C++17", "compilation", "ninja", "pybind11"],
)
def test_what_a_build_lacks_has_a_line_of_its_own_with_its_remedy(
    tmp_path: Path, lacking: dict[str, str], reason: str, remedy: str
) -> None:
    refusals = {
        "{fake}": "",
        "{old}": '*-std=c++17*) echo "error: unrecognized option -std=c++17" >&2; exit 1;;',
        "{broken}": '*/select.cpp*) echo "select.cpp:7:1: error: no" >&2; exit 1;;',
    }
    cxx = lacking["CXX"]
    if cxx in refusals:
        cxx = fake_compiler(tmp_path, refusals[cxx])
    run = build(tmp_path, hide_nvcc=True, **lacking | {"CXX": cxx})
    assert run.returncode == 0, run.stderr
    cpu, cuda = [line for line in run.stderr.splitlines() if line.startswith("opd_kernels: ")]
    assert "CPU kernels were not built" in cpu
    assert reason in cpu
    assert remedy in cpu
    assert "CUDA kernels were not built: no nvcc. Install CUDA 12" in cuda
    noted = left_out(tmp_path)
    assert sorted(noted) == ["_C", "_cuda"]
    assert noted["_C"] in cpu
    assert noted["_cuda"] in cuda


def test_a_compiler_without_openmp_builds_for_one_thread_and_says_what_to_install(
    tmp_path: Path,
) -> None:
    refusal = "*-fopenmp*) echo \"clang: error: unsupported option '-fopenmp'\" >&2; exit 1;;"
    run = build(tmp_path, hide_nvcc=True, CXX=fake_compiler(tmp_path, refusal))
    assert run.returncode == 0, run.stderr
    assert set(modules(tmp_path)) == {"_C"}
    line, _ = [line for line in run.stderr.splitlines() if line.startswith("opd_kernels: ")]
    assert "one thread" in line
    assert "unsupported option '-fopenmp'" in line
    assert "libgomp" in line
    assert left_out(tmp_path)["openmp"] in line
    assert "fopenmp" not in (tmp_path / "temp/opd_kernels._C/build.ninja").read_text()


def test_a_build_in_place_puts_the_record_beside_the_modules(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "opd_kernels").mkdir()
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    command = [sys.executable, "-c", HIDE_NVCC, "-q", "build_ext", "--inplace"]
    environment = os.environ | {"CXX": fake_compiler(tmp_path)}
    for expected in ({"_C", "_build"}, {"_build"}):
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        held = {path.name.split(".")[0] for path in (tmp_path / "opd_kernels").iterdir()}
        assert held == expected
        environment["CXX"] = "no-such-compiler"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout")
def test_the_source_distribution_has_every_file(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path]
    subprocess.run([*command, "sdist", "-d", tmp_path], cwd=ROOT, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    tracked = set(printed("git", "-C", ROOT, "ls-files").splitlines())
    assert {name for name in tracked if (ROOT / name).exists()} - held == set()
    assert not [name for name in held - tracked if name.endswith((".so", ".pyc", ".json"))]


def test_make_alone_lists_the_targets() -> None:
    listed = printed("make", "-s", "-C", ROOT)
    for target in ("demo", "lint", "test"):
        assert re.search(rf"make {target} +\w", listed)


def test_a_required_native_build_that_fails_is_an_error(tmp_path: Path) -> None:
    assert build(tmp_path, CXX="no-such-compiler", OPD_KERNELS_REQUIRE_NATIVE="1").returncode != 0


@pytest.mark.skipif(platform.system() != "Linux", reason="reads ELF objects with nm")
def test_objects_of_an_instruction_set_share_no_code_with_others(built: tuple[Path, str]) -> None:
    # A function that the linker merges across objects could bring AVX-512 to a CPU without it.
    names = ("baseline", *(("avx2", "avx512") if platform.machine() == "x86_64" else ()))
    (temp,) = built[0].glob("temp/*_C")
    objects = [path for name in names for path in temp.rglob(f"cpu_{name}.o")]
    assert len(objects) == len(names)
    for path in objects:
        weak = [line for line in printed("nm", "-C", path).splitlines() if line[17:18] in "WVu"]
        assert not weak, f"{path.name}: {weak}"


def test_without_nvcc_the_cpu_module_is_built_alone_and_one_line_says_so(
    built: tuple[Path, str],
) -> None:
    folder, said = built
    (line,) = [line for line in said.splitlines() if line.startswith("opd_kernels: ")]
    assert "CUDA kernels were not built: no nvcc" in line
    assert left_out(folder).keys() == {"_cuda"}
    run = build(folder, hide_nvcc=True)
    assert run.returncode == 0
    assert set(modules(folder)) == {"_C"}


def test_a_required_cuda_build_without_nvcc_is_an_error(tmp_path: Path) -> None:
    # Without a C++ compiler the CPU module takes no time.
    run = build(tmp_path, hide_nvcc=True, CXX="no-such-compiler", OPD_KERNELS_BUILD_CUDA="1")
    assert run.returncode != 0
    assert "no nvcc" in run.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OPD_KERNELS_CUDA_ARCHS", "80 9"),
        ("OPD_KERNELS_CUDA_ARCHS", "hopper"),
        ("OPD_KERNELS_CUDA_ARCHS", "9.0-PTX"),
        ("OPD_KERNELS_CUDA_ARCHS", "120"),  # more than this nvcc knows
        ("OPD_KERNELS_BUILD_CUDA", "yes"),
    ],
)
def test_a_setting_that_is_wrong_is_an_error_that_names_it(
    tmp_path: Path, old_nvcc: str, name: str, value: str
) -> None:
    run = build(tmp_path, CXX=fake_compiler(tmp_path), CUDA_HOME=old_nvcc, **{name: value})
    assert run.returncode != 0
    last = run.stderr.splitlines()[-1]
    assert name in last
    assert repr(value.split()[-1]) in last
    assert "allowed" in last


def test_an_nvcc_that_fails_leaves_the_cpu_module_and_no_older_cuda_module(
    built: tuple[Path, str], old_nvcc: str
) -> None:
    folder, _ = built
    stale = Path(str(modules(folder)["_C"]).replace("_C.", "_cuda."))
    for settings in ({}, {"OPD_KERNELS_BUILD_CUDA": "0"}):
        stale.write_bytes(b"of an earlier build")
        run = build(folder, CUDA_HOME=old_nvcc, **settings)
        assert run.returncode == 0, run.stderr
        assert set(modules(folder)) == {"_C"}
        assert ("CUDA kernels were not built" in run.stderr) == (not settings)
        reason = "OPD_KERNELS_BUILD_CUDA" if settings else "compilation failed (no licence)"
        assert reason in left_out(folder)["_cuda"]
    required = build(folder, CUDA_HOME=old_nvcc, OPD_KERNELS_BUILD_CUDA="1")
    assert required.returncode != 0


def test_an_old_nvcc_compiles_for_what_it_knows_and_says_so(
    built: tuple[Path, str], old_nvcc: str
) -> None:
    folder, _ = built
    run = build(folder, CUDA_HOME=old_nvcc)
    assert "does not support 100, 120; compiling for 80, 90+PTX, 90a" in run.stderr
    (ninja,) = folder.glob("temp/*_cuda/build.ninja")
    assert re.findall("compute_[0-9a]+,code=[a-z0-9_]+", ninja.read_text()) == [
        "compute_80,code=sm_80",
        "compute_90,code=sm_90",
        "compute_90,code=compute_90",
        "compute_90a,code=sm_90a",
    ]


@pytest.fixture(scope="module")
def built_for_one_gpu(
    built: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The folder of a build for compute capability 9.0 alone and a copy of its module."""
    folder = tmp_path_factory.mktemp("one_gpu")
    keep_objects(folder, "_cuda.90a")
    run = build(folder, OPD_KERNELS_CUDA_ARCHS="9.0a+PTX")
    if ": no nvcc" in run.stderr:
        pytest.skip("needs nvcc")
    assert run.returncode == 0, run.stderr
    assert "_cuda" in modules(folder), run.stderr
    return folder, Path(shutil.copy(modules(folder)["_cuda"], folder))


def test_a_build_for_one_gpu_holds_code_for_no_other(
    built_for_one_gpu: tuple[Path, Path], tmp_path: Path
) -> None:
    _, module = built_for_one_gpu
    tools = pytest.importorskip("triton", reason="has cuobjdump").__path__[0]
    cuobjdump = f"{tools}/backends/nvidia/bin/cuobjdump"
    listed = printed(cuobjdump, "--list-elf", "--list-ptx", module).splitlines()
    kinds = [".".join(line.split()[-1].rsplit(".", 2)[1:]) for line in listed]
    held = [kind for kind in kinds if kind.endswith(".ptx")]
    # To cuobjdump of CUDA 12 what CUDA 13 compiles for 90a is for 90; that compiler leaves a note.
    subprocess.run([cuobjdump, "--extract-elf", "all", module], cwd=tmp_path, check=True)
    for path in tmp_path.iterdir():
        target = path.name.split(".")[-2]
        noted = re.search(rb"-arch (sm_\w+)", path.read_bytes())
        held.append(f"{noted[1].decode() if noted else target}.cubin")
    sources = len([*(ROOT / "csrc" / "cuda").glob("*.cu")])
    assert sorted(held) == ["sm_90a.cubin"] * sources + ["sm_90a.ptx"] * sources


def test_the_cuda_module_imports_without_a_gpu_and_brings_its_own_runtime(
    built_for_one_gpu: tuple[Path, Path],
) -> None:
    _, module = built_for_one_gpu
    assert printed(sys.executable, "-c", IMPORT_CUDA, module).strip() == "90a+PTX|True|True"
    needed = re.findall(r"NEEDED.*\[(.*)\]", printed("readelf", "-d", module))
    assert needed
    assert not [name for name in needed if re.match("lib(cuda|torch|c10|nv)", name)]
    # Else the process's other CUDA runtime, torch's, could be called in its place.
    symbols = printed("readelf", "--dyn-syms", "--wide", module)
    assert "PyInit__cuda" in symbols
    assert not re.findall(r" _{0,2}cuda\w+", symbols)


def test_a_changed_device_header_is_compiled_again(built_for_one_gpu: tuple[Path, Path]) -> None:
    folder, _ = built_for_one_gpu
    ninja = pytest.importorskip("ninja")
    (temp,) = folder.glob("temp/*_cuda")
    known = printed(f"{ninja.BIN_DIR}/ninja", "-C", temp, "-t", "deps")
    for header in ROOT.glob("csrc/cuda/*.cuh"):
        assert str(header) in known


def test_an_nvcc_without_a_host_compiler_is_not_blamed(tmp_path: Path, old_nvcc: str) -> None:
    run = build(tmp_path, CXX="no-such-compiler", CUDA_HOME=old_nvcc)
    assert run.returncode == 0, run.stderr
    assert left_out(tmp_path)["_cuda"].startswith("no C++17 compiler (no-such-compiler is not")
