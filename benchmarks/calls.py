"""What the GPU benchmark times: inputs, calls of ours, ways to read memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peers import MEMBERS, as_output, check, check_member, check_selection, some_rows
from timing import Run, Runs
from torch import Tensor

from opd_kernels import _ops, select_topk, topk_divergence, topk_rkl
from opd_kernels._arguments import Allowed, Objective

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Of a pure read: (words of a tile, warps, programs per multiprocessor; 0 is a program per tile).
READ_CONFIGS = ((4096, 4, 0), (8192, 8, 0), (4096, 4, 8), (4096, 4, 16), (8192, 8, 4), (8192, 8, 8))


@dataclass(frozen=True)
class Point:
    """A shape to measure at."""

    rows: int
    vocab: int
    k: int
    dtype: str = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of both sides' logits."""
        return getattr(torch, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the teacher, or of the gradient."""
        return self.rows * self.vocab * self.torch_dtype.itemsize

    def __str__(self) -> str:  # noqa: D105
        return f"{self.rows} x {self.vocab} {self.dtype} K={self.k}"


if triton is not None:

    @triton.jit
    def read_kernel(words_ptr, out_ptr, size, TILE: tl.constexpr):  # noqa: N803
        """Reads 32-bit words 16 bytes at a time and keeps each program's maximum."""
        program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
        offsets = tl.arange(0, TILE)
        best = tl.full([TILE], -(1 << 31), tl.int32)
        for start in range(program * TILE, size, programs * TILE):
            inside = start + offsets < size
            words = tl.load(words_ptr + start + offsets, mask=inside, other=-(1 << 31))
            best = tl.maximum(best, words)
        tl.store(out_ptr + program, tl.max(best, 0))


def random_logits(point: Point, device: torch.device, scale: float = 3.0) -> Tensor:
    shape = (point.rows, point.vocab)
    return torch.randn(shape, dtype=point.torch_dtype, device=device).mul_(scale)


def unusual_rows(
    point: Point, device: torch.device
) -> dict[str, tuple[Callable[[], Tensor], dict[str, Tensor]]]:
    """Teachers and options that must cost no more than random rows without options."""
    shape, dtype, vocab = (point.rows, point.vocab), point.torch_dtype, point.vocab
    random = functools.partial(random_logits, point, device)
    ids = torch.arange(vocab, device=device)
    ramp = torch.linspace(-10, 10, vocab, device=device).to(dtype)
    cluster = ((ids * 40 // vocab == 3) * 8.0).to(dtype)
    ruled_out = torch.rand(vocab, device=device) < 0.5
    every_other = torch.arange(point.rows, device=device) % 2 == 0
    return {
        "all equal": (lambda: torch.zeros(shape, dtype=dtype, device=device), {}),
        "ascending": (lambda: ramp.expand(shape).contiguous(), {}),
        "descending": (lambda: ramp.flip(0).expand(shape).contiguous(), {}),
        "clustered": (lambda: random(0.1).add_(cluster), {}),
        "tie-heavy": (lambda: random().round_(), {}),
        "half -inf": (lambda: random().masked_fill_(ruled_out, -torch.inf), {}),
        "20 banned ids": (random, {"banned_ids": ids[-20:]}),
        "half of the rows masked": (random, {"mask": every_other}),
    }


def forward_backward(loss: Callable[[], Tensor], student: Tensor) -> Run:
    def prepare() -> Callable[[], None]:
        student.grad = None
        return lambda: loss().backward()

    return prepare


def ours(
    student: Tensor, teacher: Tensor, k: int, backend: str, **options: Tensor
) -> tuple[Runs, dict[str, float]]:
    """The loss, its gradient and both, and the errors that were found in them."""
    errors = check(student, teacher, k, backend, **options)
    loss = functools.partial(topk_rkl, student, teacher, k, backend=backend, **options)

    def backward() -> Callable[[], None]:
        student.grad = None
        return loss().backward

    return {
        (backend, "forward"): lambda: loss,
        (backend, "backward"): backward,
        (backend, "forward + backward"): forward_backward(loss, student),
    }, errors


def other_calls(
    student: Tensor, teacher: Tensor, k: int, backend: str
) -> tuple[Runs, dict[str, float]]:
    """Selection, the loss of a given support, the gradient in place; and errors of the last."""
    support = select_topk(teacher, k, backend=backend)
    check_selection(teacher, support)
    errors = check(student, teacher, k, backend, inplace=True)
    consumed = student.detach().clone()

    def in_place() -> Callable[[], None]:
        logits = as_output(consumed)
        return lambda: topk_rkl(logits, teacher, k, inplace_grad=True, backend=backend).backward()

    select = functools.partial(select_topk, teacher, k, backend=backend)
    given = functools.partial(topk_rkl, student, support, backend=backend)
    return {
        (backend, "select_topk"): lambda: select,
        (backend, "forward, TopK teacher"): lambda: given,
        (backend, "in place"): in_place,
    }, errors


def member_loss(member: str, **options: object) -> Callable[..., Tensor]:
    """A member of the family by its name in the benchmarks."""
    divergence, outside = MEMBERS[member]
    return functools.partial(topk_divergence, divergence=divergence, outside=outside, **options)


def member_calls(
    student: Tensor, teacher: Tensor, k: int, backend: str, member: str
) -> tuple[Runs, dict[str, float]]:
    """A member of full softmaxes, and its errors; in place it writes over a copy of the student."""
    called = member_loss(member, backend=backend)
    errors = check_member(called, (), student, teacher, k)
    loss, consumed = functools.partial(called, student, teacher, k), student.detach().clone()

    def in_place() -> Callable[[], None]:
        logits = as_output(consumed)
        return lambda: called(logits, teacher, k, inplace_grad=True).backward()

    return {
        (backend, f"{member}, forward"): lambda: loss,
        (backend, f"{member}, forward + backward"): forward_backward(loss, student),
        (backend, f"{member}, in place"): in_place,
    }, errors


def riding_calls(
    student: Tensor, teacher: Tensor, k: int, backend: str
) -> tuple[Runs, dict[str, float]]:
    """What rides on reads that are made anyway: both masses, a teacher's log-sum-exp."""
    masses = ("teacher_mass", "student_mass")
    support = select_topk(teacher, k, with_logsumexp=True, backend=backend)
    check_selection(teacher, support)
    logits, errors = student.detach(), check(student, teacher, k, backend)
    watched = functools.partial(
        topk_rkl, logits, teacher, k, return_stats=masses, reduction="none", backend=backend
    )
    rows = some_rows(student)
    found = watched()[1]
    for mass, side in ((found.teacher_mass, teacher), (found.student_mass, logits)):
        p = side[rows].double().softmax(-1).gather(-1, support.ids[rows].long()).sum(-1)
        torch.testing.assert_close(mass[rows].double(), p, rtol=0, atol=1e-5)
    select = functools.partial(select_topk, teacher, k, backend=backend)
    return {
        (backend, "topk_rkl with both masses"): lambda: watched,
        (backend, "select_topk"): lambda: select,
        (backend, "select_topk with log-sum-exp"): lambda: functools.partial(
            select, with_logsumexp=True
        ),
    }, errors


def host_calls(student: Tensor, teacher: Tensor, k: int, backend: str) -> Runs:
    """The loss and its gradient per row, nothing else, and the operators that they call."""
    loss = functools.partial(topk_rkl, student, teacher, k, reduction="none", backend=backend)
    rows, upstream = loss(), torch.ones(len(student), device=student.device)
    vocab = student.shape[-1]
    support = functools.partial(
        _ops.select_divergence, student.detach(), teacher, k, Allowed(vocab), Objective(), backend
    )
    _, ids, entries = support()
    return {
        (backend, "forward"): lambda: loss,
        (backend, "backward"): lambda: functools.partial(
            torch.autograd.grad, rows, student, upstream, retain_graph=True
        ),
        (backend, "forward operator"): lambda: support,
        (backend, "backward operator"): lambda: functools.partial(
            _ops.scatter, entries, ids, upstream, vocab, student.dtype, backend
        ),
    }


def check_peer(
    loss: Callable[..., Tensor],
    teacher: Tensor,
    k: int,
    backend: str,
    own: Callable[..., Tensor] = topk_rkl,
) -> float:
    """Relative difference between a peer's loss and ours; raises if it is too large.

    The student is a function of the teacher's value: ``torch.topk`` breaks ties as it likes.
    """
    student = (teacher * 0.5).requires_grad_()
    theirs = loss(student, teacher, k).item()
    mine = own(student, teacher, k, backend=backend).item()
    error = abs(theirs - mine) / abs(mine)
    if not error <= 1e-3:
        raise AssertionError(f"the peer's loss is {theirs}, ours {mine}")
    return error


def reads(logits: Tensor) -> Runs:
    """Ways to read every byte once, as 32-bit words; each returns maxima of parts of them."""
    flat = logits.flatten()
    words = flat[: flat.numel() // 64 * 64].view(torch.int32)
    runs: Runs = {("torch", "amax"): lambda: words.amax}
    if triton is None:
        return runs
    cuda = words.device.type == "cuda"
    processors = torch.cuda.get_device_properties(words.device).multi_processor_count if cuda else 1
    for tile, warps, programs in READ_CONFIGS:
        tiles = -(-words.numel() // tile)
        grid = min(tiles, programs * processors or tiles)

        def read(tile: int = tile, warps: int = warps, grid: int = grid) -> Tensor:
            out = torch.empty(grid, dtype=torch.int32, device=words.device)
            read_kernel[(grid,)](words, out, words.numel(), tile, num_warps=warps)
            return out

        name = f"tile {tile}, {warps} warps, {programs or 'all'} programs"
        runs["triton", name] = lambda read=read: read
    return runs
