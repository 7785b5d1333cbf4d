"""Full softmaxes from hidden states beside the products with the head that they are made of.

The bucket loss of a trained head. The teacher's support and log-sum-exps are given. Yardsticks, in
turn with ours: the framework's products in pieces of rows, into memory that is there; the head with
careful eager, which needs the student's logits, where these fit. Ours is timed once its losses
and gradients of the hidden states agreed with float64 on 64 rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from family import chunked_products, eager_bucket
from heads import HeadPoint, chunks, head_of, shared_ids
from timing import Run, Runs
from torch import Tensor
from torch.nn.functional import linear

from opd_kernels import LinearLogits, TopK, score_ids, topk_divergence
from opd_kernels.backends import plain

CHECKED_ROWS = 64
EAGER = "LM head + careful eager"
PRODUCTS = {
    "chunked product": "f",
    "three chunked products": "fhw",
    "four chunked products": "ffhw",
}
ONE = "one product"
# What each of ours is compared with, of the same run.
BESIDE = {
    "score_ids": ("chunked product", ONE),
    "exact, mean": ("three chunked products", EAGER),
    "exact, per row": ("four chunked products", EAGER),
    "sampled": ("chunked product", EAGER),
    "sampled, log-sum-exp given": (EAGER,),
}


class Given(NamedTuple):
    """A student's head, the teacher's support, sampled tokens and the student's log-sum-exps."""

    hidden: Tensor
    weight: Tensor
    support: TopK
    tokens: Tensor
    logsumexp: Tensor

    def student(self) -> LinearLogits:
        """What gets the gradient."""
        return LinearLogits(self.hidden, self.weight)


def given(point: HeadPoint, device: torch.device, backend: str) -> Given:
    """Random ones; tokens are drawn from the student's softmax."""
    hidden, weight = head_of(point, point.hidden, device)
    teacher = LinearLogits(hidden + 0.3 * torch.randn_like(hidden), weight)
    support = score_ids(teacher, shared_ids(point, device), backend=backend)
    tokens = torch.empty(point.rows, dtype=torch.int64, device=device)
    logsumexp = torch.empty(point.rows, device=device)
    for piece in chunks(point.rows, point.vocab * 4):
        logits = (hidden[piece] @ weight.t()).float()
        logsumexp[piece] = logits.logsumexp(-1)
        tokens[piece] = logits.softmax(-1).multinomial(1)[:, 0]
    return Given(hidden.requires_grad_(), weight.requires_grad_(), support, tokens, logsumexp)


def losses(some: Given, backend: str) -> dict[str, Callable[[], Tensor]]:
    """Each form of the loss."""
    bucket = functools.partial(
        topk_divergence, some.student(), some.support, outside="bucket", backend=backend
    )
    sampled = functools.partial(bucket, background="sampled", token_ids=some.tokens)
    return {
        "exact, mean": bucket,
        "exact, per row": functools.partial(bucket, reduction="none"),
        "sampled": sampled,
        "sampled, log-sum-exp given": functools.partial(sampled, student_logsumexp=some.logsumexp),
    }


def check(some: Given, backend: str) -> dict[str, Any]:
    """Errors beside float64; raises where one is more than the logits' rounding can make."""
    count = min(CHECKED_ROWS, len(some.hidden))
    first = slice(0, count)
    few = Given(
        some.hidden.detach()[first].requires_grad_(),
        some.weight.detach(),
        some.support[first],
        some.tokens[first],
        some.logsumexp[first],
    )
    exact_hidden = few.hidden.detach().double().requires_grad_()
    logits = exact_hidden @ few.weight.double().t()
    logits.retain_grad()
    wide = dataclasses.replace(few.support, logits=few.support.logits.double())
    wanted = eager_bucket(logits, wide)
    wanted.backward()
    # Each logit is rounded once, relative to its size; its product and the loss are float32's.
    unit = torch.finfo(few.hidden.dtype).eps / 2 + 2e-6
    off = float(logits.detach().abs().max()) * unit
    slopes = float(logits.grad.abs().sum())
    found: dict[str, Any] = {"rows": count, "loss_error": 0.0, "grad_error": 0.0}
    for name, loss in losses(few, backend).items():
        value = loss().mean()
        (grad,) = torch.autograd.grad(value, few.hidden)
        loss_error = abs(float(value.detach().double() - wanted))
        if not loss_error <= 2 * off * slopes + 1e-5:
            raise AssertionError(f"{name}: the loss is off by {loss_error:.3g}")
        found["loss_error"] = max(found["loss_error"], loss_error)
        if name.startswith("exact"):
            grad_error = float(
                (grad.double() - exact_hidden.grad).norm() / exact_hidden.grad.norm()
            )
            if not grad_error <= 2 * off + 4 * unit:
                raise AssertionError(f"{name}: the gradient is off by {grad_error:.3g}")
            found["grad_error"] = max(found["grad_error"], grad_error)
    return found


def ours(some: Given, backend: str) -> Runs:
    """The calls to time, forward and backward. Each call allocates its gradients."""
    frozen = LinearLogits(some.hidden.detach(), some.weight.detach())
    scored = functools.partial(score_ids, frozen, some.support.ids, backend=backend)
    runs: Runs = {(backend, "score_ids"): lambda: scored}
    for name, loss in losses(some, backend).items():
        runs[backend, name] = both(some, loss)
    return runs


def both(some: Given, loss: Callable[[], Tensor]) -> Run:
    """Forward and backward."""

    def call() -> None:
        loss().sum().backward()

    def prepare() -> Callable[[], None]:
        some.hidden.grad = some.weight.grad = None
        return call

    return prepare


def yardsticks(some: Given, eager: bool) -> Runs:
    """Products alone, the one with logits for all rows and careful eager if ``eager``."""
    hidden, weight = some.hidden.detach(), some.weight.detach()
    nbytes = plain.WORKSPACE_BYTES.get(hidden.device.type, plain.GPU_WORKSPACE_BYTES)
    runs: Runs = {}
    for name, kinds in PRODUCTS.items():
        product = functools.partial(chunked_products, hidden, weight, kinds, nbytes)
        runs["torch", name] = lambda product=product: product
    if eager:
        product = functools.partial(torch.mm, hidden, weight.t())
        runs["torch", ONE] = lambda product=product: product
        runs["peer", EAGER] = both(
            some, lambda: eager_bucket(linear(some.hidden, some.weight).float(), some.support)
        )
    return runs
