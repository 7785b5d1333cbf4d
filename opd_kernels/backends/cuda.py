"""The CUDA backend: allocates, and passes pointers and the stream to the compiled module."""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any

import torch
from torch import Tensor

from opd_kernels.backends import _build, _native

_C: Any = None
try:
    _C = importlib.import_module("opd_kernels._cuda")
except ImportError as error:
    _IMPORT_ERROR = str(error)

DEVICE = "cuda"
_empty = _native.empty
# The first compute capability with clusters of blocks. Code for earlier ones does not use them.
_CLUSTERS = (9, 0)


def unavailable() -> str | None:
    """Why the compiled module cannot be used, and what would bring it; None if it can."""
    if _C is not None:
        return None
    reason = _build.missing("_cuda")
    if reason is not None:
        return f"the CUDA kernels were not built: {reason}"
    return (
        f"the compiled CUDA module is missing ({_IMPORT_ERROR}); install the CUDA toolkit (nvcc) "
        "and reinstall opd_kernels"
    )


def refusal(
    device: torch.device, dtypes: tuple[torch.dtype, ...], k: int, vocab: int = 0
) -> str | None:
    """Why this backend cannot serve a call, or None."""
    reason = unavailable()
    if reason is not None:
        return reason
    if device.type != DEVICE:
        return f"the tensors are on {device}, and it runs on NVIDIA GPUs"
    reason = _device_refusal(device) or _native.refused(dtypes, k, _C.max_k)
    if reason is not None:
        return reason
    widest = _max_width(k, dtypes[-1])  # the teacher's
    if vocab > widest:
        return (
            f"the vocabulary is {vocab}, above {widest} for k = {k}; backend='triton' and "
            "backend='reference' take it"
        )
    return None


def serves(
    architectures: str, capability: tuple[int, int], least: tuple[int, int] = (0, 0)
) -> bool:
    """Whether code for ``architectures``, as in "80 90a 120+PTX", runs on a compute capability.

    Machine code runs on the same major version from its own minor version on; that of "90a" runs on
    9.0 alone. PTX also runs on all later ones. Code for less than ``least`` does not count.
    """
    for found in re.finditer(r"(\d+)(\d)([a-z]?)(\+PTX)?", architectures):
        built = int(found[1]), int(found[2])
        if found[3] == "a":
            runs = built == capability
        elif found[4]:
            runs = built <= capability
        else:
            runs = built[0] == capability[0] and built[1] <= capability[1]
        if runs and built >= least:
            return True
    return False


@functools.cache
def _device_refusal(device: torch.device) -> str | None:
    """What is wrong with a device or its driver, or None."""
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if not serves(_C.architectures, capability):
        version = "".join(map(str, capability))
        return (
            f"it is built for {_C.architectures} and the device is sm_{version}; reinstall "
            f"opd_kernels with OPD_KERNELS_CUDA_ARCHS={version}"
        )
    driver, runtime = _C.driver_version(), _C.runtime_version
    # A driver serves all runtimes of its major version, but compiles no PTX later than itself.
    machine_code = serves(_C.architectures.replace("+PTX", ""), capability)
    if driver < (runtime // 1000 * 1000 if machine_code else runtime):
        return (
            f"the driver is for CUDA {_version(driver)}, and it is built with {_version(runtime)}; "
            "update the driver, or reinstall opd_kernels with an older nvcc"
        )
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def _max_width(k: int, dtype: torch.dtype) -> int:
    return int(_C.max_width(k, _native.name(dtype)))


def select(
    logits: Tensor, k: int, limit: int, banned: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The k best ids and their values; see ``opd_kernels.reference.select``."""
    return _native.select(_C, _launch, _empty, logits, k, limit, banned, mask)


def divergence(
    student: Tensor,
    teacher: Tensor,
    teacher_ids: Tensor | None,
    k: int,
    limit: int,
    banned: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, ids and entry gradients; see ``opd_kernels.reference.divergence``."""
    return _native.divergence(
        _C,
        _launch,
        _empty,
        student,
        teacher,
        teacher_ids,
        k,
        limit,
        banned,
        mask,
        temperature,
        teacher_temperature,
    )


def scatter(
    entry_grad: Tensor, ids: Tensor, upstream: Tensor, width: int, dtype: torch.dtype
) -> Tensor:
    """The dense gradient; see ``opd_kernels.reference.scatter``."""
    out = _empty((*ids.shape[:-1], width), dtype, ids.device)
    _native.scatter(_C, _launch, out, entry_grad, ids, upstream, "clear")
    return out


def scatter_(out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor) -> None:
    """As ``scatter``, written over what ``out`` holds."""
    _native.scatter(_C, _launch, out, entry_grad, ids, upstream, "clear")


def scatter_add_(out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor) -> None:
    """As ``scatter``, added to what ``out`` holds."""
    _native.scatter(_C, _launch, out, entry_grad, ids, upstream, "add")


def _launch(name: str, device: torch.device, **arguments: Any) -> None:
    """Calls a launcher of the module for the device's current stream."""
    function, current = getattr(_C, name), torch.cuda.current_device()
    if device.index in (None, current):
        function(device=_device(device, current), **arguments)
        return
    # Unlike CUDA's, torch's guard makes no context on a device that it returns to.
    with torch.cuda.device(device):
        function(device=_device(device, device.index), **arguments)


def _device(device: torch.device, index: int) -> Any:
    stream = torch.cuda.current_stream(device).cuda_stream
    return _C.Device(index, *_properties(index), stream)


@functools.cache
def _properties(index: int) -> tuple[int, int, tuple[int, ...]]:
    """(multiprocessors, shared memory of each, how many clusters of 2, 3, ... blocks fit)."""
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major, properties.minor
    sizes = range(2, _C.max_cluster + 1)
    clusters = tuple(0 for _ in sizes)
    if capability >= _CLUSTERS and serves(_C.architectures, capability, _CLUSTERS):
        clusters = tuple(_C.max_clusters(index, size) for size in sizes)
    return properties.multi_processor_count, _C.shared_bytes(index), clusters
