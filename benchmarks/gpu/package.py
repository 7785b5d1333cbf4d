"""The compiled modules of a run: brought along where they fit, else built beside the sources.

``python benchmarks/gpu --modules 90a`` builds them on a machine without a GPU, for the Python that
runs it. Where the GPU is, they are used if they load and their sources are unchanged; else they are
built there, for that GPU alone. Both write to the checkout and never to the environment, which may
be read-only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from gpu import variants

ROOT = Path(__file__).resolve().parents[2]
# What is brought along; objects lie apart, so that it stays small.
FOLDER = ROOT / "build" / "gpu-modules"
OBJECTS = ROOT / "build" / "gpu-objects"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
STAMP = FOLDER / f"modules{SUFFIX}.json"
COMMIT = FOLDER / "commit"
CACHE = FOLDER / "triton"
VARIANTS = FOLDER / f"_cuda_variants{SUFFIX}"
# Not imported in this process: a module that is replaced on disk is not loaded twice.
SERVING = """
import sys, torch
from opd_kernels import backends
for name in sys.argv[2:]:
    reason = backends.load(name).refusal(torch.device(sys.argv[1]), (torch.bfloat16,), 64)
    if reason is not None:
        sys.exit(f"{name} does not serve {sys.argv[1]}: {reason}")
"""


@functools.cache
def build_commands() -> dict[str, Any]:
    """What setup.py defines; whatever setuptools makes of the rest of the project."""
    import setuptools

    with mock.patch.object(setuptools, "setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def modules() -> dict[str, Path]:
    """Where the modules lie, by name."""
    return {
        name: ROOT / f"{name.replace('.', '/')}{SUFFIX}"
        for name in ("opd_kernels._C", "opd_kernels._cuda")
    }


def sources() -> str:
    """A digest of what the modules are built from."""
    files = [*(ROOT / "csrc").rglob("*"), ROOT / "setup.py", ROOT / "benchmarks/gpu/variants.cu"]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def stamp() -> dict[str, Any]:
    """What the modules that are there were built from; empty where there is no record."""
    return json.loads(STAMP.read_text()) if STAMP.exists() else {}


def build(architecture: str) -> None:
    """Builds all modules, side by side, for the Python that runs this and one architecture."""
    begin = time.monotonic()
    FOLDER.mkdir(parents=True, exist_ok=True)
    COMMIT.write_text(commit() + "\n")
    with (
        mock.patch.dict(os.environ, {"OPD_KERNELS_CUDA_ARCHS": architecture}),
        ThreadPoolExecutor() as pool,
    ):
        commands = build_commands()  # once, before threads ask for it
        commands["architectures"](commands["find_nvcc"]())  # raises what cannot be built
        STAMP.unlink(missing_ok=True)
        built = {path: pool.submit(built_module, name) for name, path in modules().items()}
        built[VARIANTS] = pool.submit(variants.build, OBJECTS / f"variants{SUFFIX}", architecture)
        for path, made in built.items():
            made.result()
            # A new file: a process may be running the old one.
            path.unlink(missing_ok=True)
            shutil.copy2(made.result(), path)
    content = {"sources": sources(), "architecture": architecture}
    STAMP.write_text(json.dumps(content) + "\n")
    print(f"built for sm_{architecture} in {time.monotonic() - begin:.0f} s")


def built_module(name: str) -> Path:
    """A module of setup.py, built where it is not up to date."""
    commands = build_commands()
    make, *_ = commands["MODULES"][name]
    folder = OBJECTS / f"{name}{SUFFIX}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(commands["ninja_file"](make(), "module.so"))
    subprocess.run([*commands["ninja_command"](), "--quiet"], cwd=folder, check=True)
    return folder / "module.so"


def commit() -> str:
    """The checkout's commit; without git, the commit noted when modules were last built."""
    try:
        said = [
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            for command in (
                ("git", "rev-parse", "--short", "HEAD"),
                ("git", "status", "--porcelain", "--untracked-files=no"),
            )
        ]
    except (OSError, subprocess.CalledProcessError):
        return COMMIT.read_text().strip() if COMMIT.exists() else "unknown"
    return said[0].strip() + "-dirty" * bool(said[1].strip())


def refusal(device: str) -> str:
    """Why the modules that are there cannot be used, or nothing."""
    found = stamp()
    if not found:
        return "none were brought along for this Python"
    if found["sources"] != sources():
        return "the sources have changed since they were built"
    missing = [str(path) for path in [*modules().values(), VARIANTS] if not path.exists()]
    if missing:
        return f"{missing[0]} is missing"
    return served(device)


def served(device: str) -> str:
    """Why a backend does not serve the device, or nothing."""
    command = [sys.executable, "-c", SERVING, device, "cuda", "triton"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip().splitlines()
    return (said or [f"exit status {done.returncode}"])[-1] if done.returncode else ""


def architecture() -> str:
    """The GPU's own, as the build names it."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + "a" * ((major, minor) == (9, 0))


def prune_cache() -> None:
    """Keeps of each of Triton's kernels what it loads: machine code and how to launch it."""
    for path in CACHE.glob("*/*"):
        if path.suffix not in (".cubin", ".json", ".so"):
            path.unlink()


def settle_cache() -> None:
    """Puts right the paths in a cache that was brought along: they are the other machine's."""
    for group in CACHE.glob("*/__grp__*.json"):
        names = json.loads(group.read_text())["child_paths"]
        here = {name: str(group.parent / name) for name in names}
        there = {name: path for name, path in here.items() if Path(path).exists()}
        group.write_text(json.dumps({"child_paths": there}))


def main(device: str) -> int:
    """Makes the modules ready; the step "package"."""
    settle_cache()
    if device == "cpu":
        from gpu import dry

        dry.build()
        return 0
    reason = refusal(device)
    if not reason:
        print("modules that were brought along")
        return 0
    print(f"building: {reason}")
    build(architecture())
    reason = served(device)
    if reason:
        print(reason)
    return int(bool(reason))


def build_ahead(architecture: str) -> None:
    """Builds, and says what to bring along and what it needs; Triton's kernels, too."""
    build(architecture)
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    from gpu import warm

    warm.ahead(int(re.sub(r"\D", "", architecture)))
    prune_cache()
    needed = {
        tuple(map(int, version.split(b".")))
        for path in [*modules().values(), VARIANTS]
        for version in re.findall(rb"GLIBC_(\d+\.\d+)", path.read_bytes())
    }
    print(f"they need GLIBC {'.'.join(map(str, max(needed)))}; bring along:")
    for path in [*modules().values(), FOLDER]:
        print(f"  {path.relative_to(ROOT)}")
