"""The CPU backend: allocates, and passes pointers to the compiled module.

Instruction sets are chosen when the module is loaded; ``OPD_KERNELS_CPU_ISA`` names another one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import mmap
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from opd_kernels.backends import _build, _native

_C: Any = None
try:
    _C = importlib.import_module("opd_kernels._C")
except ImportError as error:
    _IMPORT_ERROR = str(error)

# A gradient of this size or more gets pages of its own from the system; others come from the heap.
OWN_PAGES_BYTES = 4 << 20


def instruction_sets() -> list[str]:
    """What the compiled module has for this CPU, best first."""
    return list(_C.instruction_sets()) if _C is not None else []


INSTRUCTION_SET = os.environ.get("OPD_KERNELS_CPU_ISA") or next(iter(instruction_sets()), "")


def unavailable() -> str | None:
    """Why the compiled module cannot be used, and what would bring it; None if it can."""
    if _C is not None:
        return None
    reason = _build.missing("_C")
    if reason is not None:
        return f"the CPU kernels were not built: {reason}"
    return (
        f"the compiled module is missing ({_IMPORT_ERROR}); install a C++17 compiler (g++ or "
        "clang) and reinstall opd_kernels"
    )


def single_threaded() -> str | None:
    """Why the compiled module runs on one thread and what would help; None if it uses OpenMP."""
    return None if _C is None else _build.missing("openmp")


def refusal(
    device: torch.device, dtypes: tuple[torch.dtype, ...], k: int, vocab: int = 0
) -> str | None:
    """Why this backend cannot serve a call, or None."""
    reason = unavailable()
    if reason is not None:
        return reason
    if device.type != "cpu":
        return f"the tensors are on {device}"
    return _native.refused(dtypes, k, _C.max_k)


def select(
    logits: Tensor, k: int, limit: int, banned: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The k best ids and their values; see ``opd_kernels.reference.select``."""
    return _native.select(_C, _launch, _native.empty, logits, k, limit, banned, mask)


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
        _native.empty,
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
    shape = (*ids.shape[:-1], width)
    out = _fresh_zero_pages(shape, dtype, huge=True)
    if out is None:
        out = torch.empty(shape, dtype=dtype)
        _native.scatter(_C, _launch, out, entry_grad, ids, upstream, "clear")
    else:
        _native.scatter(_C, _launch, out, entry_grad, ids, upstream, "assign")
    return out


def scatter_(out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor) -> None:
    """As ``scatter``, written over what ``out`` holds."""
    _native.scatter(_C, _launch, out, entry_grad, ids, upstream, "clear")


def scatter_add_(out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor) -> None:
    """As ``scatter``, added to what ``out`` holds."""
    _native.scatter(_C, _launch, out, entry_grad, ids, upstream, "add")


def gather_dot(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    limit: int,
    banned: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The head's logits at the ids; see ``opd_kernels.reference.gather_dot``."""
    return _native.gather_dot(
        _C, _launch, _native.empty, hidden, weight, bias, ids, limit, banned, mask
    )


def gather_dot_hidden(upstream: Tensor, ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the hidden states; see ``opd_kernels.reference.gather_dot_hidden``."""
    out = torch.empty((*ids.shape[:-1], weight.shape[1]), dtype=dtype)
    return _native.gather_dot_gradient(_C, _launch, "hidden", out, upstream, ids, weight=weight)


def gather_dot_weight(
    upstream: Tensor, ids: Tensor, hidden: Tensor, vocab: int, dtype: torch.dtype
) -> Tensor:
    """The gradient of the weight; see ``opd_kernels.reference.gather_dot_weight``."""
    shape = (vocab, hidden.shape[-1])
    # Text touches some of the rows. With small pages, most other rows never take memory.
    out = _fresh_zero_pages(shape, dtype, huge=False)
    if out is None:
        out = torch.zeros(shape, dtype=dtype)
    return _native.gather_dot_gradient(_C, _launch, "weight", out, upstream, ids, hidden=hidden)


def _launch(name: str, _: torch.device, **arguments: Any) -> None:
    """Calls a function of the module with torch's number of threads."""
    if name != "scatter":
        arguments["isa"] = INSTRUCTION_SET
    threads = torch.get_num_threads()
    if threads > 1:
        _warn_if_single_threaded()
    getattr(_C, name)(threads=threads, **arguments)


@functools.cache
def _warn_if_single_threaded() -> None:
    """Once: why the kernels are slower than they could be."""
    reason = single_threaded()
    if reason is not None:
        warnings.warn(f"opd_kernels runs on one thread: {reason}", stacklevel=2)


def _fresh_zero_pages(shape: tuple[int, ...], dtype: torch.dtype, huge: bool) -> Tensor | None:
    """A tensor on pages straight from the system, or None where it is not worth it.

    The system hands out zeroed pages, so a memset would write the gradient's zeros a second time.
    Where all pages will be written, huge ones make the faults cheap.
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
