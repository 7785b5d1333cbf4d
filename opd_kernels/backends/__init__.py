"""Which backend serves a call.

A backend is a module with the primitives ``select``, ``divergence``, ``scatter``, ``scatter_`` and
``refusal(device, dtypes, k)``, which says why it cannot serve a call, or None. To add one: write
the module and name it here, in order of preference.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch

AUTO = "auto"
MODULES = {
    "cpu": "opd_kernels.backends.cpu",
    "reference": "opd_kernels.reference",
}
# Devices that a backend other than the reference is written for.
NATIVE_DEVICES = ("cpu",)


def resolve(name: str, device: torch.device, dtypes: tuple[torch.dtype, ...], k: int) -> ModuleType:
    """The module for a request; one asked for by name is used or raises, it never falls back."""
    if name != AUTO:
        if name not in MODULES:
            raise ValueError(
                f"backend {name!r} is not in this version of opd_kernels; it has "
                f"{', '.join(map(repr, MODULES))}, and backend=None picks the best for the device"
            )
        module = load(name)
        reason = module.refusal(device, dtypes, k)
        if reason is not None:
            raise ValueError(f"backend {name!r} cannot serve this call: {reason}")
        return module
    for candidate in MODULES:
        module = load(candidate)
        if module.refusal(device, dtypes, k) is None:
            if candidate == "reference":
                _warn_if_slow(device)
            return module
    raise AssertionError("the reference serves everything")


@functools.cache
def load(name: str) -> ModuleType:
    """The backend's module."""
    return importlib.import_module(MODULES[name])


@functools.cache
def _warn_if_slow(device: torch.device) -> None:
    """Once per device: why the reference runs where kernels would be faster."""
    if device.type not in NATIVE_DEVICES:
        reason = f"this version has no kernels for {device.type} tensors"
    else:
        reason = load(device.type).unavailable()
    if reason is not None:
        warnings.warn(
            f"opd_kernels runs on its plain PyTorch reference, slowly: {reason}", stacklevel=2
        )
