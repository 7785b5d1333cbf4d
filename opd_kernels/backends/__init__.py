"""Which backend serves a call.

To add one: write a module, or an object, with what ``Backend`` lists and name it in ``MODULES``.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from opd_kernels._arguments import Allowed, Background, Objective, Tail, Tails

AUTO = "auto"
# In order of preference: a module, or a module and its attribute.
MODULES = {
    "cpu": "opd_kernels.backends.cpu:backend",
    "cuda": "opd_kernels.backends.cuda:backend",
    "triton": "opd_kernels.backends.triton",
    "reference": "opd_kernels.reference",
}
# The backends written for a device. Where the reference serves instead, they say what is missing.
NATIVE = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}


class Backend(Protocol):
    """The functions of a backend; ``opd_kernels.reference`` says what each one means."""

    def refusal(
        self, device: torch.device, dtypes: tuple[torch.dtype, ...], k: int, vocab: int = 0
    ) -> str | None:
        """Why it cannot serve a call and what would, or None.

        ``vocab`` is how many ids are selected from; 0 where none are.
        """

    def select(self, logits: Tensor, k: int, allowed: Allowed) -> tuple[Tensor, Tensor]:
        """(ids, values) of the k best of each row."""

    def gather(self, student: Tensor, ids: Tensor, allowed: Allowed) -> tuple[Tensor, Tensor]:
        """(values at the ids, slots)."""

    def select_divergence(
        self, student: Tensor, teacher: Tensor, k: int, allowed: Allowed, objective: Objective
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, ids, entry gradients), on the teacher's k best."""

    def entry_divergence(
        self, student: Tensor, teacher: Tensor, ids: Tensor, allowed: Allowed, objective: Objective
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, ids, entry gradients) on given ids; ``teacher`` holds its values there."""

    def scatter(
        self, entry_grad: Tensor, ids: Tensor, upstream: Tensor, width: int, dtype: torch.dtype
    ) -> Tensor:
        """The dense gradient."""

    def scatter_(self, out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor) -> None:
        """The dense gradient, written over what ``out`` holds."""

    def scatter_add_(self, out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor) -> None:
        """The dense gradient, added to what ``out`` holds."""

    def select_with_tail(
        self, logits: Tensor, k: int, allowed: Allowed, tail: Tail
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(ids, values, the tail's log-sum-exp, its entropy if that is asked for)."""

    def tail_logsumexp(
        self, logits: Tensor, mask: Tensor | None, tail: Tail
    ) -> tuple[Tensor, Tensor | None]:
        """(log-sum-exp, entropy if that is asked for) without the tail's ids."""

    def full_divergence(
        self,
        student: Tensor,
        teacher: Tensor,
        ids: Tensor,
        allowed: Allowed,
        objective: Objective,
        tails: Tails,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(loss, ids, entry gradients, factors, log-sum-exps) of full softmaxes."""

    def scatter_background(
        self, entry_grad: Tensor, ids: Tensor, upstream: Tensor, background: Background
    ) -> Tensor:
        """The dense gradient over a background."""

    def scatter_background_(
        self,
        out: Tensor,
        entry_grad: Tensor,
        ids: Tensor,
        upstream: Tensor,
        background: Background,
    ) -> None:
        """The dense gradient over a background, written over what ``out`` holds."""


class LinearBackend(Backend, Protocol):
    """The further functions of a backend that serves ``linear_topk_rkl``."""

    def gather_dot(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, allowed: Allowed
    ) -> tuple[Tensor, Tensor]:
        """(logits at the ids, slots)."""

    def gather_dot_hidden(
        self, upstream: Tensor, ids: Tensor, weight: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The gradient of the hidden states."""

    def gather_dot_weight(
        self, upstream: Tensor, ids: Tensor, hidden: Tensor, vocab: int, dtype: torch.dtype
    ) -> Tensor:
        """The gradient of the weight."""


def resolve(
    name: str,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    k: int,
    vocab: int = 0,
    *,
    hidden: bool = False,
) -> Any:
    """What serves a call, on ``hidden`` states where it is one of their operators.

    A backend asked for by name is used or raises.
    """
    if name != AUTO:
        if name not in MODULES:
            raise ValueError(
                f"backend {name!r} is not in this version of opd_kernels; it has "
                f"{', '.join(map(repr, MODULES))}, and backend=None picks the best for the device"
            )
        reason = _refusal(name, device, dtypes, k, vocab, hidden)
        if reason is not None:
            raise ValueError(f"backend {name!r} cannot serve this call: {reason}")
        return load(name)
    for candidate in MODULES:
        reason = _refusal(candidate, device, dtypes, k, vocab, hidden)
        if reason is None:
            break
    else:
        raise ValueError(f"no backend can serve this call: {reason}")
    if candidate == "reference":
        _warn_if_slow(device, hidden)
    return load(candidate)


def resolve_linear(
    name: str, device: torch.device, dtypes: tuple[torch.dtype, ...], k: int
) -> LinearBackend:
    """``resolve`` for the operators on hidden states."""
    return cast(LinearBackend, resolve(name, device, dtypes, k, hidden=True))


def takes_hidden_states(name: str) -> bool:
    """Whether a backend has the operators on hidden states."""
    return hasattr(load(name), "gather_dot")


def _refusal(
    name: str,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    k: int,
    vocab: int,
    hidden: bool,
) -> str | None:
    """Why a backend cannot serve a call, or None."""
    reason = load(name).refusal(device, dtypes, k, vocab)
    if reason is not None or not hidden or takes_hidden_states(name):
        return reason
    having = ", ".join(repr(other) for other in MODULES if takes_hidden_states(other))
    return (
        "it has no kernels for hidden states; backend=None takes the best for the device of "
        f"{having}"
    )


@functools.cache
def load(name: str) -> Backend:
    """The backend."""
    module, _, attribute = MODULES[name].partition(":")
    found = importlib.import_module(module)
    return cast(Backend, getattr(found, attribute) if attribute else found)


@functools.cache
def _warn_if_slow(device: torch.device, hidden: bool = False) -> None:
    """Once per device: why the reference runs where kernels would be faster."""
    reasons: list[str | None] = [f"this version has no kernels for {device.type} tensors"]
    if device.type in NATIVE:
        natives = NATIVE[device.type]
        reasons = [_refusal(name, device, (torch.float32,), 1, 0, hidden) for name in natives]
    if None not in reasons:
        warnings.warn(
            "opd_kernels runs on its plain PyTorch reference, slowly: "
            + "; ".join(reason for reason in reasons if reason),
            stacklevel=2,
        )
