"""The CPU backend: threads, instruction sets, and pages for gradients.

Instruction sets are chosen when the module is loaded; ``OPD_KERNELS_CPU_ISA`` names another one.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from opd_kernels.backends import _build
from opd_kernels.backends._pages import zero_pages
from opd_kernels.backends.native import NativeFull, NativeLinear


class Cpu(NativeFull, NativeLinear):
    """The CPU kernels, on torch's number of threads."""

    extension = "_C"
    kernels = "CPU kernels"
    toolchain = "a C++17 compiler (g++ or clang)"

    def refusal(
        self, device: torch.device, dtypes: tuple[torch.dtype, ...], k: int, vocab: int = 0
    ) -> str | None:
        """Why this backend cannot serve a call, or None."""
        reason = self.unavailable()
        if reason is not None:
            return reason
        if device.type != "cpu":
            return f"the tensors are on {device}"
        return super().refusal(device, dtypes, k, vocab)

    def _launch(self, operator: str, device: torch.device, *arguments: Any) -> None:
        threads = torch.get_num_threads()
        if threads > 1:
            _warn_if_single_threaded()
        processor = _processor(self.module, INSTRUCTION_SET, threads)
        getattr(self.module, operator)(processor, *arguments)

    def _fresh_zeros(
        self, shape: tuple[int, ...], dtype: torch.dtype, all_written: bool
    ) -> Tensor | None:
        return zero_pages(shape, dtype, huge=all_written)


backend = Cpu()


def instruction_sets() -> list[str]:
    """What the compiled module has for this CPU, best first."""
    return list(backend.module.instruction_sets()) if backend.module is not None else []


INSTRUCTION_SET = os.environ.get("OPD_KERNELS_CPU_ISA") or next(iter(instruction_sets()), "")


def single_threaded() -> str | None:
    """Why the compiled module runs on one thread and what would help; None if it uses OpenMP."""
    return None if backend.module is None else _build.missing("openmp")


@functools.cache
def _processor(module: Any, instruction_set: str, threads: int) -> Any:
    return module.Processor(instruction_set, threads)


@functools.cache
def _warn_if_single_threaded() -> None:
    """Once: why the kernels are slower than they could be."""
    reason = single_threaded()
    if reason is not None:
        warnings.warn(f"opd_kernels runs on one thread: {reason}", stacklevel=2)
