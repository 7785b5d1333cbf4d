"""What the benchmarks compare with: eager implementations for time, float64 for the outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from opd_kernels import Divergence, TopK, forward_kl, reverse_kl, topk_rkl

CHECKED_ROWS = 64
# Members of full softmaxes that trainers use, by what the benchmarks call them.
MEMBERS: dict[str, tuple[Divergence, str]] = {
    "reverse KL, bucket": (reverse_kl(), "bucket"),
    "forward KL, truncate": (forward_kl(), "truncate"),
    "reverse KL, generalize": (reverse_kl(), "generalize"),
}


def careful_eager(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """What a good trainer does: top-k first, then only K entries in float32."""
    values, ids = teacher.topk(k, dim=-1)
    log_p = student.gather(-1, ids).float().log_softmax(-1)
    log_q = values.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def careful_given(student: Tensor, teacher: TopK) -> Tensor:
    """The same with a support that is there already."""
    log_p = student.gather(-1, teacher.ids.long()).float().log_softmax(-1)
    log_q = teacher.logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def naive_eager(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """What trainers ship: float32 copies and full log-softmaxes, then renormalisation."""
    student_logp, teacher_logp = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    values, ids = teacher_logp.topk(k, dim=-1)
    log_p = student_logp.gather(-1, ids)
    log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    log_q = values - values.logsumexp(-1, keepdim=True)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def careful_full(
    student: Tensor, teacher: Tensor, k: int, divergence: Divergence, outside: str
) -> Tensor:
    """Full softmaxes as a good trainer takes them: a log-sum-exp a side, then K entries."""
    values, ids = teacher.topk(k, dim=-1)
    log_p = student.gather(-1, ids).float() - student.float().logsumexp(-1, keepdim=True)
    log_q = values.float() - teacher.float().logsumexp(-1, keepdim=True)
    return _divergence_of(log_p, log_q, divergence, outside)


def naive_full(
    student: Tensor, teacher: Tensor, k: int, divergence: Divergence, outside: str
) -> Tensor:
    """What trainers ship: float32 copies and log-softmaxes of everything, of which K are taken."""
    student_logp, teacher_logp = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    log_q, ids = teacher_logp.topk(k, dim=-1)
    return _divergence_of(student_logp.gather(-1, ids), log_q, divergence, outside)


def _divergence_of(log_p: Tensor, log_q: Tensor, divergence: Divergence, outside: str) -> Tensor:
    """Reverse and forward KL of entries; a bucket is what is left of 1."""
    if outside == "bucket":
        log_p, log_q = (
            torch.cat((x, torch.log1p(-x.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))), -1)
            for x in (log_p, log_q)
        )
    p, q = log_p.exp(), log_q.exp()
    terms = (divergence.reverse * p - divergence.forward * q) * (log_p - log_q)
    if outside == "generalize":
        terms = terms + (divergence.reverse - divergence.forward) * (q - p)
    return terms.sum(-1).mean()


class _Output(torch.autograd.Function):
    """Passes the logits on; their gradient goes nowhere."""

    @staticmethod
    def forward(ctx: object, leaf: Tensor, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[None, None]:
        return None, None


def as_output(logits: Tensor) -> Tensor:
    """A non-leaf in the memory of ``logits``, as a model's output is: for ``inplace_grad``."""
    return _Output.apply(torch.zeros((), requires_grad=True), logits.detach())


class Expected(NamedTuple):
    """Support, loss, gradient and what the gradient may differ by, of some rows in float64."""

    ids: Tensor
    loss: Tensor
    grad: Tensor
    budget: Tensor


def expect(
    student: Tensor,
    teacher: Tensor,
    k: int,
    mask: Tensor | None = None,
    banned_ids: Tensor | None = None,
) -> Expected:
    """Eager float64 on the same inputs: a stable sort, then K entries."""
    z, t = student.double(), teacher.double()
    if banned_ids is not None:
        t[:, banned_ids] = -torch.inf
    ids = t.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    log_p, log_q = z.gather(-1, ids).log_softmax(-1), t.gather(-1, ids).log_softmax(-1)
    p = log_p.exp() if mask is None else log_p.exp() * mask[:, None]
    loss = (p * (log_p - log_q)).sum(-1)
    entries = p * (log_p - log_q - loss[:, None])
    grad = torch.zeros_like(z).scatter(-1, ids, entries)
    info = torch.finfo(student.dtype)
    # A rounding to the gradient's dtype, and of float32 terms before they cancel.
    budget = (info.eps * grad.abs()).scatter_add(-1, ids, 1e-5 * p + info.tiny * info.eps)
    return Expected(ids, loss, grad, budget)


def some_rows(tensor: Tensor) -> Tensor:
    """Indices of a few rows from the first to the last."""
    count = min(CHECKED_ROWS, len(tensor))
    return torch.linspace(0, len(tensor) - 1, count, dtype=torch.float64).long().to(tensor.device)


def check(
    student: Tensor,
    teacher: Tensor,
    k: int,
    backend: str,
    inplace: bool = False,
    **options: Tensor,
) -> dict[str, float]:
    """Errors on some rows of a whole call; raises if they are too large."""
    rows = some_rows(student)
    some = {name: tensor[rows] if name == "mask" else tensor for name, tensor in options.items()}
    expected = expect(student.detach()[rows], teacher[rows], k, **some)
    student.grad = None
    torch.full_like(student, torch.nan)  # what the gradient's memory is likely to hold before
    target = student.detach().clone() if inplace else student
    logits = as_output(target) if inplace else student
    loss = topk_rkl(
        logits, teacher, k, reduction="none", inplace_grad=inplace, backend=backend, **options
    )
    loss.sum().backward()
    grad = (target if inplace else student.grad)[rows].double()
    student.grad = None
    loss_error = (loss.detach()[rows] - expected.loss).abs() / (expected.loss.abs() + 1e-3)
    if not bool((loss_error <= 1e-4).all()):
        raise AssertionError(f"the loss is off by {float(loss_error.max()):.3g} of its value")
    if not bool(((grad - expected.grad).abs() <= expected.budget).all()):
        raise AssertionError("the gradient is outside its budget")
    grad_error = (grad - expected.grad).norm() / expected.grad.norm()
    return {
        "rows": len(rows),
        "loss_error": float(loss_error.max()),
        "grad_error": float(grad_error),
    }


def check_selection(teacher: Tensor, support: TopK) -> None:
    """Raises unless the ids on some rows equal those of a stable sort."""
    rows = some_rows(teacher)
    order = teacher[rows].double().sort(dim=-1, descending=True, stable=True).indices
    if not torch.equal(support.ids[rows].long(), order[:, : support.k]):
        raise AssertionError("select_topk chose other ids than a stable sort")


def check_member(
    loss: Callable[..., Tensor],
    peers: tuple[Callable[..., Tensor], ...],
    student: Tensor,
    teacher: Tensor,
    k: int,
) -> dict[str, float]:
    """Errors of a member, and of its peers, on some rows; raises if they are too large."""
    rows = some_rows(student)
    a, b = student.detach()[rows].requires_grad_(), teacher[rows]
    found = loss(a, b, k)
    found.backward()
    z = a.detach().double().requires_grad_()
    expected = loss(z, b.double(), k, backend="reference")
    expected.backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    largest = z.grad.abs().amax(-1, keepdim=True)
    error = (a.grad.double() - z.grad).abs()
    if not bool((error <= torch.finfo(a.dtype).eps * z.grad.abs() + 1e-6 * largest).all()):
        raise AssertionError("the gradient is outside its budget")
    a, b = torch.randn(2, len(rows), a.shape[-1], device=a.device)  # without ties
    for peer in peers:
        torch.testing.assert_close(peer(a, b, k), loss(a, b, k), rtol=1e-3, atol=1e-5)
    return {
        "rows": len(rows),
        "loss_error": float((found - expected).abs() / expected.abs()),
        "grad_error": float(error.norm() / z.grad.norm()),
    }
