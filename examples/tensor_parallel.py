"""Distillation under tensor parallelism: no rank holds a row of all logits, on either side.

    torchrun --standalone --nproc-per-node 2 examples/tensor_parallel.py [STEPS]    # on the CPU

The loss takes the logits of torch's ``parallelize_module``, DTensors with Shard(-1), as they are.
"""

from __future__ import annotations

import copy
import os
import sys
from collections import OrderedDict

import torch
import torch.distributed as dist
from torch import nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from opd_kernels import topk_rkl

VOCAB, HIDDEN = 1001, 64
PLAN = {
    "embed": RowwiseParallel(input_layouts=Replicate()),
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
}


def model() -> nn.Sequential:
    """An embedding, a layer, a head: in place of your model."""
    return nn.Sequential(
        OrderedDict(
            embed=nn.Embedding(VOCAB, HIDDEN),
            up=nn.Linear(HIDDEN, 4 * HIDDEN),
            relu=nn.ReLU(),
            down=nn.Linear(4 * HIDDEN, HIDDEN),
            head=nn.Linear(HIDDEN, VOCAB, bias=False),
        )
    )


def distill(student: nn.Module, teacher: nn.Module, steps: int) -> list[float]:
    """The losses of some steps: the same code for one process and for several."""
    torch.manual_seed(1)  # ranks that share the vocabulary need the same tokens
    optimizer, losses = optim.SGD(student.parameters(), lr=10.0, momentum=0.9), []
    for _ in range(steps):
        tokens = torch.randint(VOCAB, (4, 32))
        with torch.no_grad():
            teacher_logits = teacher(tokens)
        loss = topk_rkl(student(tokens), teacher_logits, k=32)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(steps: int = 5) -> None:
    """Train on this rank with the others, and without them; compare."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    pair = model(), model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    split = [parallelize_module(copy.deepcopy(whole), mesh, PLAN) for whole in pair]
    for losses in zip(distill(*split, steps), distill(*pair, steps), strict=True):
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
        if dist.get_rank() == 0:
            print("loss {:.6f}, in one process {:.6f}".format(*losses), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may hang an interpreter that ends


if __name__ == "__main__":
    if "RANK" not in os.environ or not all(word.isdecimal() for word in sys.argv[1:]):
        raise SystemExit(__doc__)
    main(*map(int, sys.argv[1:2]))
