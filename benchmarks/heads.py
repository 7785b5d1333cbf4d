"""What the benchmarks of ``linear_topk_rkl`` time: inputs, ours, yardsticks, peers, checks."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from calls import reads
from peers import careful_given
from timing import Run, Runs, cold
from torch import Tensor
from torch.nn.functional import linear

from opd_kernels import LinearLogits, TopK, backends, linear_topk_rkl, select_topk, topk_rkl

# Of an id's rank r + 1, (r + SHIFT) ** -POWER: draws without replacement share ids as the 32 best
# of SmolLM2-135M do at the tokens of its own answers (repetition.py), if their order is left out.
POWER, SHIFT = 1.4, 20
CHUNK_BYTES = 2**28
TRAINED, FROZEN = "trained", "frozen"
HEAD, CAREFUL, LOGITS = "LM head", "LM head + careful eager", "LM head + topk_rkl"
FORWARD, BOTH = "forward", "forward + backward"
TEACHER_HEAD, TOTAL, STUDENT = "teacher's LM head", "teacher in process", "student side"
LIGER = "Liger"
READ, FRESH, WARM = "read of gathered bytes", "memset of dW, fresh", "memset of dW, warm"
HUGE = "memset of dW, fresh huge pages"
HUGE_PAGE = 2 << 20


@dataclass(frozen=True)
class HeadPoint:
    """A shape to measure at."""

    rows: int
    vocab: int
    hidden: int
    k: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of hidden states and heads."""
        return getattr(torch, self.dtype)

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states, or of their gradient."""
        return self.rows * self.hidden * self.torch_dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        """Bytes of the head, or of its gradient."""
        return self.vocab * self.hidden * self.torch_dtype.itemsize

    @property
    def gathered_bytes(self) -> int:
        """Bytes of a row of the head for every entry of the support."""
        return self.k * self.hidden_bytes

    def __str__(self) -> str:  # noqa: D105
        return f"{self.rows} x {self.vocab} {self.dtype} H={self.hidden} K={self.k}"


def uniform_ids(point: HeadPoint, device: torch.device) -> Tensor:
    """Random ids: each entry has a part of the vocabulary to itself."""
    part = point.vocab // point.k
    shape = point.rows, point.k
    ids = torch.randint(part, shape, dtype=torch.int32, device=device)
    return ids + part * torch.randperm(point.k, device=device, dtype=torch.int32)


def shared_ids(point: HeadPoint, device: torch.device) -> Tensor:
    """Ids that rows share as they do in text: Zipf's law, without replacement in a row."""
    ranks = torch.arange(1, point.vocab + 1, dtype=torch.float32, device=device)
    logits = -POWER * (ranks + SHIFT).log()
    names = torch.randperm(point.vocab, device=device)
    rows = []
    for piece in chunks(point.rows, point.vocab * 4):
        noise = torch.empty(piece.stop - piece.start, point.vocab, device=device)
        rows.append((logits - noise.exponential_().log_()).topk(point.k).indices)
    return names[torch.cat(rows)].to(torch.int32)


SUPPORTS = {"uniform ids": uniform_ids, "shared ids": shared_ids}


def chunks(rows: int, row_bytes: int) -> Iterator[slice]:
    """Slices of the rows that take no more than CHUNK_BYTES."""
    step = max(CHUNK_BYTES // row_bytes, 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass(frozen=True)
class Inputs:
    """A student's hidden states and head, and the teacher's support."""

    hidden: Tensor
    weight: Tensor
    support: TopK

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        """What gets gradients if the head is trained."""
        return self.hidden, self.weight

    def head(self, trained: bool) -> Tensor:
        """The weight as a loss is given it."""
        return self.weight if trained else self.weight.detach()

    def first(self, rows: int) -> Inputs:
        """The first of the rows, and the same head."""
        hidden = self.hidden.detach()[:rows].requires_grad_()
        return Inputs(hidden, self.weight, self.support[slice(0, rows)])

    def __len__(self) -> int:
        """Rows."""
        return len(self.hidden)


def head_of(point: HeadPoint, hidden: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(hidden states, head), whose logits have a standard deviation of 2.5."""
    dtype = point.torch_dtype
    states = torch.randn(point.rows, hidden, dtype=dtype, device=device)
    weight = torch.randn(point.vocab, hidden, dtype=dtype, device=device)
    return states, weight.mul_(2.5 / math.sqrt(hidden))


def inputs(point: HeadPoint, ids: str, device: torch.device) -> Inputs:
    """Random ones."""
    hidden, weight = head_of(point, point.hidden, device)
    values = torch.randn(point.rows, point.k, device=device).mul_(2.5)
    support = TopK(SUPPORTS[ids](point, device), values.sort(-1, descending=True).values)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), support)


def serving(names: list[str], device: torch.device, point: HeadPoint) -> list[str]:
    """Of the backends those that have kernels for hidden states on the device."""
    what = device, (point.torch_dtype,), point.k
    loaded = {name: backends.load(name) for name in names}
    having = {name: module for name, module in loaded.items() if hasattr(module, "gather_dot")}
    return [name for name, module in having.items() if module.refusal(*what) is None]


def backward_of(loss: Callable[[], Tensor], *leaves: Tensor) -> Run:
    """Forward and backward; gradients are allocated anew."""

    def prepare() -> Callable[[], None]:
        for leaf in leaves:
            leaf.grad = None
        cold(leaves[0].device)
        return lambda: loss().backward()

    return prepare


def forward_of(call: Callable[[], object], device: torch.device) -> Run:
    """A call that keeps no graph."""

    def prepare() -> Callable[[], object]:
        cold(device)
        return torch.no_grad()(call)

    return prepare


def losses(given: Inputs, backend: str, trained: bool) -> dict[str, Callable[[], Tensor]]:
    """Ours, and the two ways to a loss by way of the logits."""
    head, support = given.head(trained), given.support
    return {
        BOTH: lambda: linear_topk_rkl(given.hidden, head, support, backend=backend),
        CAREFUL: lambda: careful_given(linear(given.hidden, head), support),
        LOGITS: lambda: topk_rkl(linear(given.hidden, head), support),
    }


def ours_and_logits(given: Inputs, backend: str) -> Runs:
    """Ours and the form that needs logits, with a trained and with a frozen head."""
    runs: Runs = {}
    for how in (TRAINED, FROZEN):
        made = losses(given, backend, how == TRAINED)
        runs["logits", f"{LOGITS}, {how}"] = backward_of(made[LOGITS], *given.leaves)
        runs[backend, f"{BOTH}, {how}"] = backward_of(made[BOTH], *given.leaves)
    return runs


def everything(given: Inputs, backend: str) -> Runs:
    """Ours, yardsticks and peers."""
    device = given.hidden.device
    upstream = torch.randn(len(given), len(given.weight), device=device).to(given.hidden.dtype)
    ours = losses(given, backend, trained=True)[BOTH]
    runs: Runs = {(backend, FORWARD): forward_of(ours, device)} | ours_and_logits(given, backend)
    for how in (TRAINED, FROZEN):
        trained = how == TRAINED
        careful = losses(given, backend, trained)[CAREFUL]
        runs["eager", f"{CAREFUL}, {how}"] = backward_of(careful, *given.leaves)
        runs["torch", f"{HEAD}, {how}"] = head_alone(given, upstream, trained)
    return runs | memory_runs(given)


def head_alone(given: Inputs, upstream: Tensor, trained: bool) -> Run:
    """The head forward and backward, with a gradient of the logits that is there already."""
    head = given.head(trained)

    def prepare() -> Callable[[], None]:
        given.hidden.grad = given.weight.grad = None
        cold(upstream.device)
        return lambda: linear(given.hidden, head).backward(upstream)

    return prepare


def memory_runs(given: Inputs) -> Runs:
    """What moving the bytes costs: those of the gathered rows, and a gradient of the head."""
    weight = given.weight.detach()
    copies = given.support.ids.numel() * weight.shape[1]
    flat = torch.ones(copies, dtype=weight.dtype, device=weight.device)
    if weight.device.type == "cuda":
        candidates = reads(flat)
        read = candidates.get(("triton", "tile 8192, 8 warps, all programs"))
        read = candidates["torch", "amax"] if read is None else read
    else:
        words = flat[: flat.numel() // 8 * 8].view(torch.int64)
        read = forward_of(words.sum, weight.device)
    warm = torch.zeros_like(weight)
    runs: Runs = {("torch", READ): read, ("torch", WARM): lambda: warm.zero_}
    if weight.device.type == "cpu":  # elsewhere memory is kept, and none is fresh
        runs["torch", FRESH] = forward_of(lambda: torch.empty_like(weight).zero_(), weight.device)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            size = weight.numel() * weight.itemsize
            runs["torch", HUGE] = forward_of(lambda: huge_zeros(size), weight.device)
    return runs


def huge_zeros(size: int) -> Tensor:
    """Bytes in new pages of 2 MB, which virtual machines may have to ask their host for."""
    memory = mmap.mmap(-1, size + HUGE_PAGE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size).zero_()


def check_ours(given: Inputs, backend: str) -> dict[str, float]:
    """Errors of a whole call, both gradients of all rows; raises if they are too large.

    The head's gradient is looked at for ids of the first and last rows, the commonest one, and
    ids that are in no row.
    """
    expected = Expected(given)
    given.hidden.grad = given.weight.grad = None
    loss = losses(given, backend, trained=True)[BOTH]()
    loss.backward()
    loss_error = abs(loss.item() - expected.loss) / (abs(expected.loss) + 1e-3)
    if not loss_error <= 1e-4:
        raise AssertionError(f"the loss is off by {loss_error:.3g} of its value")
    errors = {"rows": len(given), "loss_error": loss_error}
    for name, grad, (exact, budget) in (
        ("hidden", given.hidden.grad, expected.hidden_grad()),
        ("weight", given.weight.grad[expected.watched], expected.weight_grad()),
    ):
        difference = (grad.double() - exact).abs()
        if not bool((difference <= budget).all()):
            raise AssertionError(f"the gradient of {name} is outside its budget")
        errors[f"{name}_grad_error"] = float(difference.norm() / exact.norm())
    frozen = torch.autograd.grad(losses(given, backend, trained=False)[BOTH](), given.hidden)[0]
    if not torch.equal(frozen, given.hidden.grad):
        raise AssertionError("with a frozen head the gradient of hidden is another")
    given.hidden.grad = given.weight.grad = None
    return errors


class Expected:
    """Loss, gradients and what these may differ by, in float64."""

    def __init__(self, given: Inputs) -> None:  # noqa: D107
        self.hidden, self.weight = given.hidden.detach(), given.weight.detach()
        self.ids = given.support.ids.long()
        self.eps = torch.finfo(self.hidden.dtype).eps
        log_p = torch.cat([self.logits(piece) for piece in self.pieces()]).log_softmax(-1)
        log_q = given.support.logits.double().log_softmax(-1)
        ratio = log_p - log_q
        each = (log_p.exp() * ratio).sum(-1, keepdim=True)
        self.loss = each.mean().item()
        centred, share = ratio - each, log_p.exp() / len(given)
        self.entries = share * centred
        # Sums and products in float32 of logits that are off by some of its roundings.
        self.entry_budget = 2e-5 * share * (1 + centred.abs())
        counts = torch.bincount(self.ids.flatten(), minlength=len(self.weight))
        some = torch.cat([self.ids[0], self.ids[-1], counts.argmax()[None], counts.argmin()[None]])
        self.watched = some.unique()

    def pieces(self) -> Iterator[slice]:
        """Rows whose part of the head is no larger than a chunk."""
        return chunks(len(self.hidden), 8 * self.ids.shape[1] * self.hidden.shape[1])

    def logits(self, piece: slice) -> Tensor:
        """The student's, of some rows."""
        rows = self.weight[self.ids[piece]].double()
        return torch.einsum("nkh,nh->nk", rows, self.hidden[piece].double())

    def hidden_grad(self) -> tuple[Tensor, Tensor]:
        """(gradient, budget)."""
        grads, budgets = [], []
        for piece in self.pieces():
            rows = self.weight[self.ids[piece]].double()
            grads.append(torch.einsum("nk,nkh->nh", self.entries[piece], rows))
            budgets.append(torch.einsum("nk,nkh->nh", self.entry_budget[piece], rows.abs_()))
        grad = torch.cat(grads)
        return grad, torch.cat(budgets) + self.eps * grad.abs() + 1e-30

    def weight_grad(self) -> tuple[Tensor, Tensor]:
        """The same of the watched ids' rows of the head."""
        hidden = self.hidden.double()
        slot = torch.searchsorted(self.watched, self.ids).clamp(max=len(self.watched) - 1)
        known = self.watched[slot] == self.ids
        sums = []
        for entries in (self.entries, self.entry_budget):
            total = hidden.new_zeros(len(hidden), len(self.watched))
            sums.append(total.scatter_add_(1, slot, torch.where(known, entries, 0)))
        grad = sums[0].t() @ hidden
        return grad, sums[1].t() @ hidden.abs() + self.eps * grad.abs() + 1e-30


def check_logits_forms(given: Inputs, backend: str) -> dict[str, float]:
    """How far the forms that need logits are from ours; raises if that is too far.

    They round the logits, and their gradient, to the inputs' dtype.
    """
    most = max(1e-4, 4 * torch.finfo(given.hidden.dtype).eps)
    made = losses(given, backend, trained=False)
    mine = made.pop(BOTH)()
    grad = torch.autograd.grad(mine, given.hidden)[0].double()
    errors = {}
    for name, loss in made.items():
        theirs = loss()
        their_grad = torch.autograd.grad(theirs, given.hidden)[0].double()
        error = abs(theirs.item() - mine.item()) / (abs(mine.item()) + 1e-3)
        error = max(error, float((their_grad - grad).norm() / grad.norm()))
        if not error <= most:
            raise AssertionError(f"{name} differs from ours by {error:.3g}")
        errors[name] = error
    return errors


@dataclass(frozen=True)
class Teacher:
    """A teacher in the same process: hidden states and a head of its own."""

    logits: LinearLogits
    k: int

    @classmethod
    def of(cls, point: HeadPoint, hidden: int, device: torch.device) -> Teacher:
        """A random one."""
        return cls(LinearLogits(*head_of(point, hidden, device)), point.k)

    def first(self, rows: int) -> Teacher:
        """Of the first rows."""
        return Teacher(replace(self.logits, hidden=self.logits.hidden[:rows]), self.k)

    def loss(self, given: Inputs, backend: str) -> Tensor:
        """Ours, with a trained head."""
        return linear_topk_rkl(*given.leaves, self.logits, self.k, backend=backend)

    def runs(self, given: Inputs, backend: str) -> Runs:
        """All of it; and its parts, the teacher's logits in memory that is there already."""
        head, device = self.logits, given.hidden.device
        memory = head.hidden.new_empty(len(given), head.vocab)
        product = functools.partial(torch.mm, head.hidden, head.weight.t(), out=memory)
        known = Inputs(*given.leaves, self.support(given))
        student = losses(known, backend, trained=True)[BOTH]
        return {
            ("torch", TEACHER_HEAD): forward_of(product, device),
            (backend, STUDENT): backward_of(student, *given.leaves),
            (backend, TOTAL): backward_of(lambda: self.loss(given, backend), *given.leaves),
        }

    def support(self, given: Inputs) -> TopK:
        """The k best of whole logits."""
        head = self.logits
        return TopK.cat(
            select_topk(linear(head.hidden[piece], head.weight), self.k)
            for piece in chunks(len(given), 4 * head.vocab)
        )

    def check(self, given: Inputs, backend: str) -> dict[str, float]:
        """Ours beside ours with the support of whole logits, which is checked against float64.

        A matrix product of fewer rows may round otherwise and so swap ids that nearly tie.
        """
        known = Inputs(*given.leaves, self.support(given))
        errors = check_ours(known, backend)
        loss, beside = self.loss(given, backend).item(), losses(known, backend, False)[BOTH]()
        error = abs(loss - beside.item()) / (abs(loss) + 1e-3)
        if not error <= max(1e-4, torch.finfo(given.hidden.dtype).eps):
            raise AssertionError(f"the loss of LinearLogits differs by {error:.3g}")
        return errors | {"linear_logits_error": error}


class Liger:
    """Liger's chunked reverse KL from hidden states: over all the vocabulary, so another loss.

    It is what there is for a teacher in process where logits are too large. Its gradients of
    hidden states and head are computed in forward, the head's even if it is frozen.
    """

    def __init__(self, compiled: bool) -> None:  # noqa: D107
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        # A beta of 1 is the reverse KL; no cross-entropy with labels.
        self.module = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled
        )
        version = importlib.metadata.version("liger_kernel")
        self.name = f"{LIGER} {version}, full vocabulary" + (", compiled" if compiled else "")

    def loss(self, given: Inputs, teacher: Teacher) -> Tensor:
        """The mean of all rows."""
        labels = torch.zeros(len(given), dtype=torch.long, device=given.hidden.device)
        return self.module(*given.leaves, teacher.logits.hidden, teacher.logits.weight, labels)

    def check(self, given: Inputs, teacher: Teacher) -> float:
        """Relative error of its loss against float32; raises if it is too large."""
        total = 0.0
        for piece in chunks(len(given), 16 * len(given.weight)):
            theirs = linear(teacher.logits.hidden[piece], teacher.logits.weight).float()
            mine = linear(given.hidden.detach()[piece], given.weight.detach()).float()
            log_p, log_q = mine.log_softmax(-1), theirs.log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
        expected = total / len(given)
        error = abs(self.loss(given, teacher).item() - expected) / expected
        if not error <= max(1e-3, 4 * torch.finfo(given.hidden.dtype).eps):
            raise AssertionError(f"Liger's loss is off by {error:.3g}")
        return error


def crossover(widths: list[int], ratios: list[float]) -> float | None:
    """Where a ratio that falls with the width passes 1; None if it does not.

    Between measured widths the logarithms are taken as straight lines; below the first one is
    that width itself.
    """
    if ratios[0] < 1:
        return float(widths[0])
    for i in range(1, len(widths)):
        if ratios[i] < 1:
            above, below = math.log(ratios[i - 1]), math.log(ratios[i])
            part = above / (above - below)
            return float(widths[i - 1] * (widths[i] / widths[i - 1]) ** part)
    return None
