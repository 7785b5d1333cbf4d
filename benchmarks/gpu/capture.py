"""The very first launch of a process captured into a CUDA graph, forward and backward, replayed.

A kernel may be loaded when it is launched first, which a capture may forbid. The results of the
replay are those of plain calls. Triton loads modules in a way that a capture forbids unless it is
told to be relaxed: that is what its case tells it.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from opd_kernels import topk_rkl

K = 64


def main(backend: str) -> int:
    """Captures, replays, compares."""
    student, teacher = (torch.randn(300, 20000, dtype=torch.bfloat16, device="cuda") for _ in "ab")
    student.requires_grad_()
    upstream = torch.ones(300, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        loss = topk_rkl(student, teacher, K, reduction="none", backend=backend)
        return loss.detach(), torch.autograd.grad(loss, student, upstream)[0]

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    mode = "relaxed" if backend == "triton" else "global"
    with torch.cuda.graph(graph, capture_error_mode=mode):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)
    assert bool((captured[0] > 0).all())
    print("1 passed in 0.0s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
