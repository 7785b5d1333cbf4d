"""What is read, written and allocated: pages that fault, threads, and peak memory."""

from __future__ import annotations

import ctypes
import mmap
import textwrap
from collections.abc import Iterator

import pytest
import torch
from effort import INTERPRETED
from memory import peak_growth

from opd_kernels import TopK, backends, select_topk, topk_rkl
from opd_kernels._arguments import Allowed
from opd_kernels.backends import _pages, cpu, cuda

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class GuardedRows:
    """Rows of logits in memory whose unreadable parts kill the process when they are touched.

    Each row takes whole pages; it ends exactly at a page's end, or begins at a page's start.
    ``allow`` opens the elements [start, stop) of a row's readable pages.
    """

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, at_end: bool) -> None:
        self.row_bytes = vocab * dtype.itemsize
        self.pages_per_row = -(-self.row_bytes // PAGE) + 1  # one more, always closed
        stride = self.pages_per_row * PAGE
        self.memory = mmap.mmap(-1, rows * stride)
        flat = torch.frombuffer(self.memory, dtype=dtype)
        self.offset = (stride - PAGE - self.row_bytes if at_end else 0) // dtype.itemsize
        self.logits = flat.as_strided((rows, vocab), (stride // dtype.itemsize, 1), self.offset)
        self.address = flat.data_ptr()

    def fill(self, values: torch.Tensor) -> None:
        self.logits.copy_(values)

    def close(self, row: int, whole: bool) -> None:
        """Takes away the page after a row, or all of its pages."""
        start = row * self.pages_per_row * PAGE
        length = self.pages_per_row * PAGE
        if not whole:
            start, length = start + length - PAGE, PAGE
        assert LIBC.mprotect(ctypes.c_void_p(self.address + start), length, 0) == 0

    def open(self) -> None:
        length = len(self.memory)
        flags = mmap.PROT_READ | mmap.PROT_WRITE
        assert LIBC.mprotect(ctypes.c_void_p(self.address), length, flags) == 0


@pytest.fixture
def guarded() -> Iterator[list[GuardedRows]]:
    made: list[GuardedRows] = []
    yield made
    for rows in made:
        rows.open()


CAREFUL = [*cpu.instruction_sets(), *(["cuda"] if cuda.DEVICE == "cpu" else [])]


@pytest.fixture(params=["triton"] if INTERPRETED else CAREFUL)
def careful(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Backends that read no more than they must: the CPU's instruction sets and GPU kernels."""
    if request.param in ("triton", "cuda"):
        return str(request.param)
    monkeypatch.setattr(cpu, "INSTRUCTION_SET", request.param)
    return "cpu"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 63, 1000, 4096, 5000])
def test_nothing_is_read_past_a_row_nor_in_masked_rows(
    careful: str, guarded: list[GuardedRows], dtype: torch.dtype, vocab: int
) -> None:
    values = [(torch.randn(4, vocab) * 3).to(dtype) for _ in range(2)]
    mask = torch.tensor([True, False, True, False])
    k = min(vocab, 20)
    for values_of in values:
        rows = GuardedRows(4, vocab, dtype, at_end=True)
        guarded.append(rows)
        rows.fill(values_of)
        for row in range(4):
            rows.close(row, whole=not mask[row])
    student, teacher = (rows.logits for rows in guarded)
    loss = topk_rkl(student, teacher, k, mask=mask, reduction="none", backend=careful)
    support = select_topk(teacher, k, mask=mask, banned_ids=[0, vocab - 1], backend=careful)
    given = topk_rkl(student, support, mask=mask, reduction="none", backend=careful)
    assert torch.equal(loss, topk_rkl(*values, k, mask=mask, reduction="none", backend=careful))
    assert torch.isfinite(given).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_vocabulary_is_not_read(
    careful: str, guarded: list[GuardedRows], dtype: torch.dtype
) -> None:
    # The row's first page ends exactly at vocab_size; what follows is padding on closed pages.
    vocab_size = PAGE // dtype.itemsize
    for seed in range(2):
        rows = GuardedRows(2, vocab_size + 70, dtype, at_end=False)
        guarded.append(rows)
        rows.fill(torch.randn(2, vocab_size + 70))
        for row in range(2):
            start = rows.address + row * rows.pages_per_row * PAGE + PAGE
            assert LIBC.mprotect(ctypes.c_void_p(start), (rows.pages_per_row - 1) * PAGE, 0) == 0
        assert seed < 2
    student, teacher = (rows.logits for rows in guarded)
    expected = topk_rkl(student[:, :vocab_size], teacher[:, :vocab_size], 30, backend=careful)
    assert torch.equal(
        topk_rkl(student, teacher, 30, vocab_size=vocab_size, backend=careful), expected
    )
    # A support's ids past the limit are not followed into the student either.
    ids = torch.tensor([[3, vocab_size + 50, 7]] * 2)
    loss = topk_rkl(student, TopK(ids, torch.rand(2, 3)), vocab_size=vocab_size, backend=careful)
    assert torch.isfinite(loss)


def test_gathering_reads_neither_masked_rows_nor_absent_ids(
    careful: str, guarded: list[GuardedRows]
) -> None:
    # A row's first page ends at `limit`; ids beyond it are on a closed page.
    limit = PAGE // 4
    rows = GuardedRows(3, limit + 70, torch.float32, at_end=False)
    guarded.append(rows)
    values = torch.randn(3, limit + 70)
    rows.fill(values)
    mask = torch.tensor([True, False, True])
    for row in range(3):
        start = rows.address + row * rows.pages_per_row * PAGE
        first = start + PAGE if mask[row] else start
        size = start + rows.pages_per_row * PAGE - first
        assert LIBC.mprotect(ctypes.c_void_p(first), size, 0) == 0
    ids = torch.tensor([[3, limit + 50, limit - 1, -1, limit, 0]] * 3)
    bitmap = torch.zeros(-(-limit // 64) * 8, dtype=torch.uint8)
    bitmap[0] = 1  # bans id 0
    module = backends.resolve(careful, torch.device("cpu"), (torch.float32,), 6)
    found, slots = module.gather(rows.logits, ids, Allowed(limit, bitmap, mask))
    present = torch.tensor([[True, False, True, False, False, False]]) & mask[:, None]
    assert torch.equal(found, torch.where(present, values.gather(1, ids.clamp(min=0)), 0))
    assert torch.equal(slots, torch.where(present, torch.arange(6), -1).int())


def results(threads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = (torch.randn(37, 30000, generator=generator) * 3).bfloat16().requires_grad_()
    teacher = (torch.randn(37, 30000, generator=generator) * 3).bfloat16()
    torch.set_num_threads(threads)
    loss = topk_rkl(student, teacher, 64, reduction="none", backend="cpu")
    loss.sum().backward()
    topk = select_topk(teacher, 64, backend="cpu")
    return [loss.detach(), student.grad, topk.ids, topk.logits]


def test_results_are_the_same_bits_on_every_run_and_thread_count(
    instruction_set: str, threads: int
) -> None:
    expected = results(1)
    for count in (1, 2, 3, 8):
        for ours, theirs in zip(results(count), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_instruction_sets_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    expected = results(2)
    for name in cpu.instruction_sets():
        monkeypatch.setattr(cpu, "INSTRUCTION_SET", name)
        for ours, theirs in zip(results(2), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_gradients_on_fresh_pages_equal_those_on_the_heap(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    student = torch.randn(9, 400_000).to(dtype).requires_grad_()
    teacher = torch.randn(9, 400_000)
    assert student.numel() * dtype.itemsize >= _pages.OWN_PAGES_BYTES
    grads = []
    for limit in (_pages.OWN_PAGES_BYTES, 1 << 60):
        monkeypatch.setattr(_pages, "OWN_PAGES_BYTES", limit)
        grads.append(torch.autograd.grad(topk_rkl(student, teacher, 16, backend="cpu"), student)[0])
    assert torch.equal(*grads)
    assert grads[0].count_nonzero() <= 9 * 16
    grads[0].add_(1)  # ordinary, writable memory
    del student, teacher
    assert bool((grads[0].float().mean() - 1).abs() < 1e-2)


N, K, V = 2048, 64, 30000
SETUP = f"""
N, K, V = {N}, {K}, {V}
student = torch.randn(N, V).bfloat16()
teacher = torch.randn(N, V).bfloat16()
"""


def test_forward_needs_memory_for_entries_not_for_logits() -> None:
    allowed = 16 * N * K + 64 * N + 2 * 65536
    call = """
    student.requires_grad_()
    call = lambda n: topk_rkl(student[:n], teacher[:n], K)
    """
    assert peak_growth(SETUP + textwrap.dedent(call)) <= allowed


def test_selection_needs_memory_for_its_result() -> None:
    call = "call = lambda n: select_topk(teacher[:n], K)\n"
    assert peak_growth(SETUP + call) <= 16 * N * K + 64 * N + 2 * 65536


def test_backward_allocates_the_gradient_once() -> None:
    # A first backward also brings 6 MB of the libraries' code into memory, more of torch for CUDA.
    call = """
    few = student[:2].clone().requires_grad_(), teacher[:2].clone()
    student.requires_grad_()
    def call(n):
        logits, teachers = (student, teacher) if n == N else few
        return torch.autograd.grad(topk_rkl(logits, teachers, K), logits)
    """
    gradient = N * V * 2
    # Ids and entry gradients are 8 N K bytes; each may be rounded up to a huge page.
    slack = 16 * N * K + 64 * N + 2 * 65536 + (4 << 20)
    assert peak_growth(SETUP + textwrap.dedent(call)) <= gradient + slack


def test_a_graph_over_a_slice_of_the_logits_copies_nothing() -> None:
    call = "call = lambda n: topk_rkl(student.requires_grad_()[:n, :-1], teacher[:n, :-1], K)\n"
    assert peak_growth(SETUP + call) <= 16 * N * K + 64 * N + 2 * 65536


def test_inplace_backward_allocates_no_gradient() -> None:
    call = """
    leaf = torch.zeros(1, requires_grad=True)
    class Head(torch.autograd.Function):  # logits that nothing else keeps
        @staticmethod
        def forward(ctx, leaf):
            return student.view_as(student)
        @staticmethod
        def backward(ctx, grad):
            return torch.zeros(1)
    call = lambda n: topk_rkl(Head.apply(leaf), teacher, K, inplace_grad=True).backward()
    """
    assert peak_growth(SETUP + textwrap.dedent(call)) <= 16 * N * K + 64 * N + (4 << 20)
