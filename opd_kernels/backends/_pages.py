"""Memory on pages of its own, straight from the system."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

# A gradient of this size or more gets pages of its own from the system; others come from the heap.
OWN_PAGES_BYTES = 4 << 20


def zero_pages(shape: tuple[int, ...], dtype: torch.dtype, huge: bool) -> Tensor | None:
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
