"""The build: with a compiler, without one, and what the linker could mix up."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder)]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def test_without_a_compiler_the_package_installs_works_and_says_why_it_is_slow(
    tmp_path: Path,
) -> None:
    built = build(tmp_path, CXX="no-such-compiler", OPD_KERNELS_REQUIRE_NATIVE="0")
    assert built.returncode == 0, built.stderr
    assert "not built" in built.stderr
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


def test_a_required_native_build_that_fails_is_an_error(tmp_path: Path) -> None:
    assert build(tmp_path, CXX="no-such-compiler", OPD_KERNELS_REQUIRE_NATIVE="1").returncode != 0


@pytest.mark.skipif(platform.system() != "Linux", reason="reads ELF objects with nm")
def test_objects_of_an_instruction_set_share_no_code_with_others(tmp_path: Path) -> None:
    # A function that the linker merges across objects could bring AVX-512 to a CPU without it.
    built = build(tmp_path, OPD_KERNELS_REQUIRE_NATIVE="1")
    assert built.returncode == 0, built.stderr
    objects = list((tmp_path / "temp").rglob("cpu_select_*.o"))
    assert objects
    for path in objects:
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        weak = [line for line in symbols.stdout.splitlines() if line[17:18] in "WVu"]
        assert not weak, f"{path.name}: {weak}"
