"""The suite on a device: its tests make CPU tensors, the backends get them on the device.

``OPD_KERNELS_TEST_DEVICE`` names the device. What a backend gets has the strides and the storage
offset that a test gave it, and results come back as plain CPU tensors.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from opd_kernels import backends
from opd_kernels.testing.inputs import copied_to, storage_bytes

DEVICE = os.environ.get("OPD_KERNELS_TEST_DEVICE")
# Tests with a backend that do not cross the bridge, and what stands in for them on the device.
LEFT_OUT = {
    "test_rows_reach_beyond_two_to_the_31_elements": "crossing touches 8 GB; test_gpu.py",
    "test_weights_reach_beyond_two_to_the_31_elements": "the same; test_gpu_linear.py",
    "test_any_call_is_within_its_budget": "the fuzzer draws the same cases on the device itself",
}


class Bridge:
    """A backend whose tensors are on the device, for callers whose tensors are on the CPU."""

    def __init__(self, backend: backends.Backend, device: torch.device) -> None:
        self._backend, self._device = backend, device

    def refusal(
        self, _: torch.device, dtypes: tuple[torch.dtype, ...], k: int, vocab: int = 0
    ) -> str | None:
        return self._backend.refusal(self._device, dtypes, k, vocab)

    def scatter_(self, out: Tensor, *arguments: Any) -> None:
        self._call_into(self._backend.scatter_, out, arguments)

    def scatter_add_(self, out: Tensor, *arguments: Any) -> None:
        self._call_into(self._backend.scatter_add_, out, arguments)

    def scatter_background_(self, out: Tensor, *arguments: Any) -> None:
        self._call_into(self._backend.scatter_background_, out, arguments)

    def __getattr__(self, name: str) -> Any:
        """The operators that return what they compute, where the backend has them."""
        function = getattr(self._backend, name)
        return lambda *arguments: self._call(function, arguments)

    def _call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        result = function(*copied_to(self._device, arguments))
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to("cpu", copy=True), result)

    def _call_into(
        self, function: Callable[..., None], out: Tensor, arguments: tuple[Any, ...]
    ) -> None:
        there = copied_to(self._device, out)
        function(there, *copied_to(self._device, arguments))
        # With what lies around the rows, so that a test sees it if a kernel wrote there.
        storage_bytes(out).copy_(storage_bytes(there))


def build(device: torch.device) -> None:
    """From now on every backend but the CPU's own is reached over a bridge to the device."""
    torch.empty(1, device=device)  # raises here where there is none
    load = backends.load

    @functools.cache
    def bridged(name: str) -> backends.Backend:
        return load(name) if name == "cpu" else Bridge(load(name), device)

    backends.load = bridged
