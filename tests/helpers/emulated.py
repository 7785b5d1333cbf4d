"""The CUDA backend on the CPU: its sources compiled for emulation (emulation/), CPU tensors.

``OPD_KERNELS_EMULATED`` names another build than "plain", or "none". The pretended GPU has few
multiprocessors, and clusters, so that small tests meet every shape of a launch.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from emulation.build import build

from opd_kernels.backends import cuda

KIND = os.environ.get("OPD_KERNELS_EMULATED", "plain")
POSSIBLE = KIND != "none" and platform.machine() == "x86_64" and platform.system() == "Linux"
MULTIPROCESSORS = 4
device_refusal = cuda._device_refusal  # what is asked on real devices


def install() -> None:
    """From now on the CUDA backend serves CPU tensors."""
    # Other versions of Python leave theirs there.
    path = build(KIND) / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("emulated._cuda", path)
    assert spec is not None
    assert spec.loader is not None
    cuda.backend.module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cuda.backend.module)
    assert cuda.backend.module.architectures == "emulation"
    cuda.DEVICE = "cpu"
    cuda._device_refusal = lambda device: None
    pretend(MULTIPROCESSORS)
    cuda._max_width.cache_clear()


def pretended(multiprocessors: int, clusters: bool | tuple[int, ...] = True) -> Any:
    """A GPU of that size, which holds so many clusters of 2, 3, ... blocks at once.

    As many as it has multiprocessors for, none, or the numbers that are given.
    """
    module = cuda.backend.module
    if isinstance(clusters, bool):
        sizes = range(2, module.max_cluster + 1)
        clusters = tuple(multiprocessors // size if clusters else 0 for size in sizes)
    return module.Device(0, multiprocessors, module.shared_bytes(0), clusters, 0)


def pretend(multiprocessors: int, clusters: bool | tuple[int, ...] = True) -> None:
    """From now on the GPU is of that size."""
    device = pretended(multiprocessors, clusters)
    cuda.backend._launch = lambda name, _, *arguments: getattr(cuda.backend.module, name)(
        device, *arguments
    )


@contextmanager
def gpu(multiprocessors: int, clusters: bool | tuple[int, ...] = True) -> Iterator[None]:
    """While the block runs the GPU is of that size."""
    pretend(multiprocessors, clusters)
    try:
        yield
    finally:
        pretend(MULTIPROCESSORS)


@contextmanager
def schedule(number: int, without: str = "") -> Iterator[None]:
    """Threads run in another order (emulation.h), and the barrier of a line does nothing."""
    os.environ["OPD_EMULATION_SCHEDULE"] = str(number)
    os.environ["OPD_EMULATION_WITHOUT"] = without
    try:
        yield
    finally:
        del os.environ["OPD_EMULATION_SCHEDULE"], os.environ["OPD_EMULATION_WITHOUT"]
