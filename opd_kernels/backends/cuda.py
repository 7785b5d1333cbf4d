"""The CUDA backend: devices, streams, and what a build runs on."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor

from opd_kernels._arguments import Allowed, Objective, Tail, Tails
from opd_kernels.backends.native import NativeFull, dtype_name
from opd_kernels.divergences import reverse_kl

DEVICE = "cuda"
# The first compute capability with clusters of blocks. Code for earlier ones does not use them.
_CLUSTERS = (9, 0)

_REVERSE_KL = reverse_kl()


class Cuda(NativeFull):
    """The CUDA kernels, on the tensors' device and its current stream."""

    extension = "_cuda"
    kernels = "CUDA kernels"
    toolchain = "the CUDA toolkit (nvcc)"

    def refusal(
        self, device: torch.device, dtypes: tuple[torch.dtype, ...], k: int, vocab: int = 0
    ) -> str | None:
        """Why this backend cannot serve a call, or None."""
        reason = self.unavailable()
        if reason is not None:
            return reason
        if device.type != DEVICE:
            return f"the tensors are on {device}, and it runs on NVIDIA GPUs"
        reason = _device_refusal(device) or super().refusal(device, dtypes, k)
        if reason is not None:
            return reason
        widest = _max_width(k, dtypes[-1])  # the teacher's
        if vocab > widest:
            return (
                f"the vocabulary is {vocab}, above {widest} for k = {k}; backend='triton' and "
                "backend='reference' take it"
            )
        return None

    def select_divergence(
        self, student: Tensor, teacher: Tensor, k: int, allowed: Allowed, objective: Objective
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``Native``; one kernel selects and computes where the divergence is reverse_kl()."""
        if objective.weights is None and objective.divergence == _REVERSE_KL:
            return super().select_divergence(student, teacher, k, allowed, objective)
        ids, values = self.select(teacher, k, allowed)
        return self.entry_divergence(student, values, ids, allowed, objective)

    def full_divergence(
        self,
        student: Tensor,
        teacher: Tensor,
        ids: Tensor,
        allowed: Allowed,
        objective: Objective,
        tails: Tails,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As ``NativeFull``, whose kernel reads the student at the entries alone, not its rows."""
        if tails.student is None:
            support = ids[..., :-1] if objective.outside == "sample" else ids
            over = Tail(tails.width, objective.temperature, support)
            sums, _ = self.tail_logsumexp(student, allowed.mask, over)
            tails = tails._replace(student=sums)
        return super().full_divergence(student, teacher, ids, allowed, objective, tails)

    def _launch(self, operator: str, device: torch.device, *arguments: Any) -> None:
        function, current = getattr(self.module, operator), torch.cuda.current_device()
        if device.index in (None, current):
            function(_device(device, current), *arguments)
            return
        # Unlike CUDA's, torch's guard makes no context on a device that it returns to.
        with torch.cuda.device(device):
            function(_device(device, device.index), *arguments)


backend = Cuda()


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
    architectures = backend.module.architectures
    if not serves(architectures, capability):
        version = "".join(map(str, capability))
        return (
            f"it is built for {architectures} and the device is sm_{version}; reinstall "
            f"opd_kernels with OPD_KERNELS_CUDA_ARCHS={version}"
        )
    driver, runtime = backend.module.driver_version(), backend.module.runtime_version
    # A driver serves all runtimes of its major version, but compiles no PTX later than itself.
    machine_code = serves(architectures.replace("+PTX", ""), capability)
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
    return int(backend.module.max_width(k, dtype_name(dtype)))


def _device(device: torch.device, index: int) -> Any:
    stream = torch.cuda.current_stream(device).cuda_stream
    return backend.module.Device(index, *_properties(index), stream)


@functools.cache
def _properties(index: int) -> tuple[int, int, tuple[int, ...]]:
    """(multiprocessors, shared memory of each, how many clusters of 2, 3, ... blocks fit)."""
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major, properties.minor
    sizes = range(2, backend.module.max_cluster + 1)
    clusters = tuple(0 for _ in sizes)
    if capability >= _CLUSTERS and serves(backend.module.architectures, capability, _CLUSTERS):
        clusters = tuple(backend.module.max_clusters(index, size) for size in sizes)
    return properties.multi_processor_count, backend.module.shared_bytes(index), clusters
