"""The CPU backend: threads, instruction sets, and pages for gradients.

Instruction sets are chosen when the module is loaded; ``OPD_KERNELS_CPU_ISA`` names another one.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from opd_kernels.backends import _build
from opd_kernels.backends.native import NativeFull, NativeLinear

# A gradient of this size or more gets pages of its own from the system; others come from the heap.
OWN_PAGES_BYTES = 4 << 20


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
        return _fresh_zero_pages(shape, dtype, huge=all_written)


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


def _fresh_zero_pages(shape: tuple[int, ...], dtype: torch.dtype, huge: bool) -> Tensor | None:
    """A tensor on pages straight from the system, or None where it is not worth it.

    The system hands out zeroed pages, so a memset would write the gradient's zeros a second time.
    Where all pages will be written, huge ones make the faults cheap. With small pages, those that
    nothing writes never take memory.
    """
    count = 1
    for size in shape:
        count *= size
    nbytes = count * dtype.itemsize
    if nbytes < OWN_PAGES_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # out of memory: torch's allocator has the better message
        return None
    with contextlib.suppress(OSError):  # a system without huge pages still hands out zero pages
        pages.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    # set_ and not view: the gradient must not be a view, which autograd would not let users change.
    flat = torch.frombuffer(pages, dtype=dtype, count=count)
    return torch.empty(0, dtype=dtype).set_(flat.untyped_storage()).resize_(shape)
