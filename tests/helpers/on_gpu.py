"""What tests on GPU tensors share: dtypes, tensors, comparisons, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch import Tensor

from opd_kernels import backends
from opd_kernels.testing.inputs import copied_to

CUDA = torch.device("cuda", 0)
KERNELS = [
    name
    for name in backends.MODULES
    if torch.cuda.is_available()
    and name not in ("cpu", "reference")
    and backends.load(name).refusal(CUDA, (torch.float32,), 1) is None
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAN = float("nan")


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device=CUDA).normal_(0, 3, generator=generator)


def pair(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    """(student, teacher)."""
    student = logits(*shape, seed=seed, dtype=dtype)
    return student.requires_grad_(), logits(*shape, seed=seed + 1000, dtype=dtype)


def assert_equal(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def within(actual: Tensor, expected: np.ndarray, budget: np.ndarray) -> None:
    assert (abs(actual.double().cpu().numpy() - expected) <= budget).all()


def needs_kernels(*names: str) -> None:
    missing = [name for name in names if name not in KERNELS]
    if missing:
        pytest.skip(f"{', '.join(missing)} does not serve this GPU")


def needs_memory(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, {free / 1e9:.0f} are free")


def peak_growth(call: Callable[[], object]) -> tuple[int, object]:
    """Bytes by which allocated memory peaks during a call, and its result."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


def padded(tensor: Tensor) -> Tensor:
    """The tensor on the GPU inside a larger buffer of NaN.

    Kernels read whole chunks of 16 bytes at a row's ends. What they read beyond it stays inside the
    256 bytes in which CUDA allocates, but memcheck knows the exact size of an allocation.
    """
    buffer = torch.full((tensor.numel() + 64,), NAN, dtype=tensor.dtype)
    inside = buffer[32 : 32 + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return copied_to(CUDA, inside)
