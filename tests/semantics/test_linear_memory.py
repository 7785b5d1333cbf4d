"""What ``linear_topk_rkl`` reads, keeps and allocates: pages that fault, and peak memory."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import pytest
import torch
from effort import INTERPRETED
from memory import peak_growth
from tensors import DTYPES, integers, normal
from test_linear import INF, gradients
from torch.nn.functional import linear

from opd_kernels import LinearLogits, TopK, linear_topk_rkl, select_topk
from opd_kernels._arguments import Allowed
from opd_kernels._linear_autograd import GatherDot
from opd_kernels.backends import plain, triton

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)


# What is read


class Pages:
    """Rows of floats of which each ends where a page ends, so that reading on would fault."""

    def __init__(self, values: torch.Tensor) -> None:
        rows, width = values.shape
        stride = PAGE // values.element_size()
        self.memory = mmap.mmap(-1, rows * 2 * PAGE)
        flat = torch.frombuffer(self.memory, dtype=values.dtype)
        self.rows = flat.as_strided((rows, width), (2 * stride, 1), stride - width)
        self.rows.copy_(values)
        self.address = flat.data_ptr()
        for row in range(rows):
            self._protect(2 * row + 1, 0)

    def close(self, row: int) -> None:
        self._protect(2 * row, 0)

    def open(self) -> None:
        for page in range(len(self.memory) // PAGE):
            self._protect(page, mmap.PROT_READ | mmap.PROT_WRITE)

    def _protect(self, page: int, flags: int) -> None:
        assert LIBC.mprotect(ctypes.c_void_p(self.address + page * PAGE), PAGE, flags) == 0


@pytest.fixture(params=["triton", "triton, sorted ids"] if INTERPRETED else ["cpu"])
def careful(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Backends that read no more than they must, Triton's in both orders of the ids."""
    if "," in request.param:
        monkeypatch.setattr(triton.configs, "SORTED_DOTS", True)
    return str(request.param.split(",")[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 50])
def test_only_rows_of_the_support_are_read(careful: str, width: int, dtype: torch.dtype) -> None:
    mask = torch.tensor([True, False, True, True])
    values, weights = normal(4, width, dtype=dtype), normal(9, width, seed=1, dtype=dtype)
    hidden, weight = Pages(values), Pages(weights)
    ids = torch.tensor([[1, 2, -1, 8], [3, 3, 3, 3], [2, 4, 1, 99], [5, 6, 2, 1]])
    teacher = TopK(ids, torch.tensor([[0.0, 1, 2, 3], [0, 1, 2, 3], [1, 0, 2, 3], [-INF, 0, 1, 2]]))
    hidden.close(1)
    for row in (0, 3, 6, 7):  # 6 is banned
        weight.close(row)
    options: dict[str, Any] = {"mask": mask, "banned_ids": [6], "backend": careful}
    try:
        leaves = [pages.rows.requires_grad_() for pages in (hidden, weight)]
        loss = linear_topk_rkl(*leaves, teacher, **options)
        got = gradients(loss, *leaves)
    finally:
        hidden.open()
        weight.open()
    copies = [values.requires_grad_(), weights.requires_grad_()]
    expected = linear_topk_rkl(*copies, teacher, **options)
    assert torch.equal(loss, expected)
    for ours, wanted in zip(got, gradients(expected, *copies), strict=True):
        assert torch.equal(ours, wanted)


def test_masked_rows_of_a_teacher_are_not_read() -> None:
    values = integers(6, 16)
    hidden, weight = Pages(values), integers(40, 16, seed=1)
    mask = torch.tensor([True, False, True, True, False, False])
    for row in (1, 4, 5):
        hidden.close(row)
    try:
        topk = select_topk(LinearLogits(hidden.rows, weight), 5, mask=mask, with_logsumexp=True)
    finally:
        hidden.open()
    expected = select_topk(linear(values, weight), 5, mask=mask, with_logsumexp=True)
    assert torch.equal(topk.ids, expected.ids)
    assert torch.equal(topk.logits, expected.logits)
    torch.testing.assert_close(topk.logsumexp, expected.logsumexp)


def test_statistics_do_not_read_masked_rows() -> None:
    hidden, weight = Pages(integers(4, 16)), integers(40, 16, seed=1)
    mask = torch.tensor([True, False, True, False])
    for row in (1, 3):
        hidden.close(row)
    try:
        teacher = LinearLogits(hidden.rows, weight)
        _, stats = linear_topk_rkl(
            hidden.rows, weight, teacher, 5, mask=mask, return_stats=True, backend="cpu"
        )
    finally:
        hidden.open()
    assert stats.valid_k[mask].tolist() == [5, 5]
    for values in stats[:-1]:
        assert values.isnan().tolist() == (~mask).tolist()


def test_weights_reach_beyond_two_to_the_31_elements(linear_backend: str) -> None:
    stride, width = 2**31 + 16, 40
    pages = mmap.mmap(-1, 2 * stride * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    far = torch.frombuffer(pages, dtype=torch.bfloat16).as_strided((2, width), (stride, 1))
    far.copy_(normal(2, width))
    teacher = TopK(torch.tensor([[0, 1], [1, 0]]), normal(2, 2, seed=1))
    near = far.clone()
    for hidden, weight in ((near, far), (far, near)):
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        loss = linear_topk_rkl(hidden, weight, teacher, backend=linear_backend)
        copies = [near.detach().clone().requires_grad_() for _ in range(2)]
        expected = linear_topk_rkl(*copies, teacher, backend=linear_backend)
        assert torch.equal(loss, expected)
        grads = [torch.autograd.grad(loss, hidden, retain_graph=True)[0]]
        assert torch.equal(grads[0], gradients(expected, copies[0])[0])
        hidden.requires_grad_(False)
        weight.requires_grad_(False)


# Memory


def setup(rows: int, k: int, width: int, vocab: int) -> str:
    return f"""
N, K, H, V = {rows}, {k}, {width}, {vocab}
hidden = torch.randn(N, H)
weight = torch.randn(V, H)
teacher = TopK(torch.randint(V, (N, K), dtype=torch.int32), torch.randn(N, K))
def call(n, frozen=False):
    leaves = [hidden[:n].detach().requires_grad_()]
    leaves += [] if frozen else [weight.requires_grad_()]
    head = weight.detach() if frozen else weight
    return torch.autograd.grad(linear_topk_rkl(leaves[0], head, teacher[:n]), leaves)
"""


SLACK = 8 << 20  # huge pages round up, backward's own thread


def test_backward_needs_memory_for_gradients_and_entries() -> None:
    rows, k, width, vocab = 2048, 64, 256, 40000
    entries, results = 24 * rows * k + 8 * vocab, 4 * width * (rows + vocab)
    assert peak_growth(setup(rows, k, width, vocab)) <= results + entries + SLACK


def test_a_frozen_head_allocates_no_gradient() -> None:
    rows, k, width, vocab = 2048, 64, 256, 40000
    body = setup(rows, k, width, vocab) + "\ntrained = call\ncall = lambda n: trained(n, True)\n"
    assert peak_growth(body) <= 4 * rows * width + 24 * rows * k + SLACK


def test_backward_of_many_rows_needs_memory_for_no_more() -> None:
    rows, k, width, vocab = 65536, 32, 128, 20000  # logits would be 5.2 GB
    entries, results = 24 * rows * k + 8 * vocab, 4 * width * (rows + vocab)
    assert peak_growth(setup(rows, k, width, vocab)) <= results + entries + SLACK


def test_selection_from_a_head_needs_memory_for_its_workspace() -> None:
    body = """
    N, K, H, V = 2048, 32, 64, 50000  # logits would be 410 MB
    teacher = LinearLogits(torch.randn(N, H), torch.randn(V, H))
    def call(n):
        return select_topk(LinearLogits(teacher.hidden[:n], teacher.weight), K)
    """
    workspace = plain.WORKSPACE_BYTES["cpu"]
    assert peak_growth(body) <= workspace + 16 * 2048 * 32 + SLACK


def test_what_is_kept_for_backward_are_references() -> None:
    hidden, weight = normal(5, 16).requires_grad_(), normal(30, 16, seed=1).requires_grad_()
    ids = torch.randint(30, (5, 8))
    logits, _ = GatherDot.apply(hidden, weight, None, ids, Allowed(30), "auto")
    kept = [x for x in logits.grad_fn.saved_tensors if x is not None]
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in (hidden, weight, ids)}
