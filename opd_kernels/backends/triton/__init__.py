"""The Triton backend, on any GPU that Triton reaches; ``launches`` has the operators.

Under ``TRITON_INTERPRET=1``, set before the import, it takes CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import torch

from opd_kernels.backends.triton import configs
from opd_kernels.backends.triton.launches import common

try:
    import triton

    from opd_kernels.backends.triton.launches.entries import (
        entry_divergence,
        full_divergence,
        select_divergence,
    )
    from opd_kernels.backends.triton.launches.gradient import (
        scatter,
        scatter_,
        scatter_add_,
        scatter_background,
        scatter_background_,
    )
    from opd_kernels.backends.triton.launches.linear import (
        gather_dot,
        gather_dot_hidden,
        gather_dot_weight,
    )
    from opd_kernels.backends.triton.launches.selection import (
        gather,
        select,
        select_with_tail,
        tail_logsumexp,
    )

    _MISSING: str | None = None
    _INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError as error:
    _MISSING = (
        f"triton is missing ({error}); pip install 'triton>=3.6' (torch's CUDA builds bring it)"
    )
    _INTERPRETED = False

__all__ = [
    "entry_divergence",
    "full_divergence",
    "gather",
    "gather_dot",
    "gather_dot_hidden",
    "gather_dot_weight",
    "refusal",
    "scatter",
    "scatter_",
    "scatter_add_",
    "scatter_background",
    "scatter_background_",
    "select",
    "select_divergence",
    "select_with_tail",
    "tail_logsumexp",
    "unavailable",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unavailable() -> str | None:
    """Why triton cannot be used, and what would bring it; None if it can."""
    return _MISSING


def refusal(
    device: torch.device, dtypes: tuple[torch.dtype, ...], k: int, vocab: int = 0
) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if _MISSING is not None:
        return _MISSING
    if device.type not in common.DEVICES and not _INTERPRETED:
        return f"the tensors are on {device}, and it runs on GPUs"
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"{dtype} is not float16, bfloat16 or float32; backend='reference' takes it"
    if k > configs.K_MAX:
        return f"k is {k}, above {configs.K_MAX}; backend='reference' takes it"
    return None
