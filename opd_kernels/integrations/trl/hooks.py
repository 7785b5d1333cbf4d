"""``use_topk_loss``: the losses of this package in TRL's GKD, GOLD, SDFT and SDPO trainers."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from opd_kernels._checks import check_choice
from opd_kernels.api import topk_divergence
from opd_kernels.divergences import RENORMALIZE
from opd_kernels.integrations._hooks import announce, check_parameters, generalized_jsd
from opd_kernels.options import SUPPORTS

__all__ = ["topk_jsd_loss", "topk_self_distillation_loss", "use_topk_loss"]

CHECKED_WITH = "TRL 1.16.0"
JSD, SELF = "generalized_jsd_loss", "compute_topk_self_distillation_loss"
OF_JSD = ("student_logits", "teacher_logits", "labels", "beta", "temperature", "reduction")
OF_SELF = (
    *("student_logits", "teacher_logits"),
    *("distillation_topk", "distillation_alpha", "distillation_add_tail"),
)
# Each trainer's function, and the parameters that it takes.
REPLACED = {
    "GKDTrainer": (JSD, (*OF_JSD, "num_items_in_batch")),
    "GOLDTrainer": (JSD, (*OF_JSD, "logits_are_probs", "num_items_in_batch")),
    "SDFTTrainer": (SELF, OF_SELF),
    "SDPOTrainer": (SELF, OF_SELF),
}
OUTSIDE = (RENORMALIZE, "bucket", "truncate", "generalize")


def use_topk_loss(
    trainer: type, k: int | None = None, *, outside: str | None = None, support: str | None = None
) -> ExitStack:
    """Makes a trainer of TRL compute its distillation loss with this package.

    - ``GKDTrainer``, ``GOLDTrainer`` and their subclasses: ``topk_jsd_loss`` takes the place of
      the class's ``generalized_jsd_loss``. TRL's sums over the whole vocabulary: this is another
      loss. Beta, temperature and what the sum is divided by stay the trainer's. What GOLD computes
      between different tokenizers (``use_uld_loss``) stays TRL's.
    - ``SDFTTrainer``, ``SDPOTrainer`` and their subclasses: ``topk_self_distillation_loss`` takes
      the place of TRL's function in the module of the trainer, for all that use it. It is the same
      loss. The other ``distillation_mode`` and a teacher behind a server stay TRL's.

    Args:
        trainer: the class.
        k: size of the support for GKD and GOLD; 32.
        outside: what becomes of the probability outside of the support for GKD and GOLD, as in
            ``topk_divergence``: "bucket" (the default, because it is at most TRL's loss and sees
            how much probability leaves the support), "renormalize", "truncate" or "generalize".
        support: whose k best tokens for GKD and GOLD: "teacher" (the default) or "student".

    Returns an ``ExitStack``: its ``close()``, or the end of a ``with`` block, puts back what was
    there before.

    Errors: ``TypeError`` for another class. ``ValueError`` for options that are not allowed, and
    for any option of SDFT and SDPO, which have their own. ``ImportError`` if TRL's function takes
    other parameters than that of the version that was checked.

    Example::

        from trl.experimental.gkd import GKDConfig, GKDTrainer

        use_topk_loss(GKDTrainer, k=64, outside="bucket")
        trainer = GKDTrainer(student, teacher, GKDConfig("run", beta=1.0), train_dataset=data)

    Source: TRL 1.16.0, trl/experimental/{gkd,gold,sdft,sdpo}.
    """
    base = _known(trainer)
    name, parameters = REPLACED[base.__name__]
    given = {"k": k, "outside": outside, "support": support}
    given = {option: value for option, value in given.items() if value is not None}
    if name == SELF:
        if given:
            raise ValueError(
                f"{base.__name__} takes no {' and '.join(given)} here; its config has "
                "distillation_topk, distillation_add_tail and distillation_alpha"
            )
        module = sys.modules[base.__module__]
        check_parameters(getattr(module, name), parameters, CHECKED_WITH)
        return _replaced(module, name, topk_self_distillation_loss)
    if k is not None and k < 1:
        raise ValueError(f"k is {k}, allowed is 1 or more")
    if outside is not None:
        check_choice(outside, "outside", OUTSIDE)
    if support is not None:
        check_choice(support, "support", SUPPORTS)
    own = getattr(trainer, name)
    check_parameters(own, parameters, CHECKED_WITH)
    return _replaced(trainer, name, staticmethod(_jsd_hook(own, given)))


def topk_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | float | None = None,
    *,
    k: int = 32,
    outside: str = "bucket",
    support: str = "teacher",
) -> Tensor:
    """TRL's generalised Jensen-Shannon divergence of GKD and GOLD, on the K most likely tokens.

    With p of the student and q of the teacher at the entries of the support, and with
    m = beta q + (1 - beta) p, a row's loss is the sum over the support of::

        beta q (log q - log m) + (1 - beta) p (log p - log m)     q (log q - log p) at beta 0
                                                                  p (log p - log q) at beta 1

    ``k``, ``outside`` and ``support`` are those of ``topk_divergence``. With ``k`` the vocabulary's
    size and "renormalize" it is TRL's loss.

    Shapes and dtypes: logits (..., V), ``labels`` (...), as in ``topk_divergence``; the loss is
    float32 (float64). Logits may be slices of larger ones, which are not copied.

    Args:
        student_logits: what gets the gradient.
        teacher_logits: constant.
        labels: rows of -100 take no part and may hold anything.
        beta: as above.
        temperature: divides both sides' logits; there is no factor T squared.
        reduction: "batchmean", the mean over the rows that take part, or without labels the sum
            over the size of the first dimension; or "sum".
        num_items_in_batch: what the sum is divided by, in place of ``reduction``.
        k: size of the support.
        outside: what becomes of the probability outside of the support.
        support: whose k best tokens.

    Errors: ``ValueError`` for TRL's reductions "mean" and "none", which are over the vocabulary,
    and as in ``topk_divergence``.

    Example::

        loss = topk_jsd_loss(logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:], beta=1.0, k=64)
        loss.backward()

    Source: arXiv 2306.13649, equation 1, and TRL's ``generalized_jsd_loss``.
    """
    if num_items_in_batch is None:
        check_choice(reduction, "reduction", ("batchmean", "sum"))
    announce("TRL GKD, GOLD", f"JSD(beta {beta}) on the {support}'s {k} best, {outside}")
    mask = None if labels is None else labels != -100
    loss = topk_divergence(
        student_logits,
        teacher_logits,
        k,
        divergence=generalized_jsd(beta),
        outside=outside,
        support=support,
        temperature=temperature,
        mask=mask,
        reduction="sum",
    )
    if isinstance(num_items_in_batch, Tensor):
        return loss / num_items_in_batch.to(loss.device)
    if num_items_in_batch is not None:
        return loss / num_items_in_batch
    if reduction == "sum":
        return loss
    return loss / (max(student_logits.shape[0], 1) if mask is None else mask.sum().clamp(min=1))


def topk_self_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    distillation_topk: int,
    distillation_alpha: float,
    distillation_add_tail: bool,
) -> Tensor:
    """TRL's top-K loss of SDFT and SDPO: the student's K best, renormalised or with a tail.

    The formula is that of ``topk_jsd_loss`` with alpha for beta. It is TRL's loss, but for this:

    - Logits of 16 bits are computed with in float32.
    - The tail is summed. TRL takes what the support leaves of 1, and at least 1e-7.
    - A token to which the teacher gives -inf takes no part. TRL's loss is NaN or inf there.
    - Of equal logits at the support's edge the lower id enters. TRL leaves that to ``torch.topk``.

    Shapes and dtypes: logits (..., V) of the student and (..., V_t) of the teacher; the loss (...)
    of each row is float32 (float64). Logits may be slices of larger ones, which are not copied.

    Args:
        student_logits: what gets the gradient; already divided by the temperature.
        teacher_logits: constant; also divided.
        distillation_topk: size of the support.
        distillation_alpha: 0 the forward KL, 1 the reverse KL, else the JSD.
        distillation_add_tail: True: one more entry for all that is outside; False: renormalise.

    Errors: as in ``topk_divergence``.

    Example::

        rows = topk_self_distillation_loss(
            logits, teacher_logits,
            distillation_topk=100, distillation_alpha=0.5, distillation_add_tail=False,
        )
        loss = ((rows * mask).sum(-1) / mask.sum(-1)).mean()

    Source: TRL's ``compute_topk_self_distillation_loss``.
    """
    outside = "bucket" if distillation_add_tail else RENORMALIZE
    announce(
        "TRL SDFT, SDPO",
        f"JSD(alpha {distillation_alpha}) on the student's {distillation_topk} best, {outside}",
    )
    return topk_divergence(
        student_logits,
        teacher_logits,
        distillation_topk,
        divergence=generalized_jsd(distillation_alpha),
        outside=outside,
        support="student",
        reduction="none",
    )


def _known(trainer: type) -> type:
    """The class of TRL that a trainer is or extends."""
    is_class = isinstance(trainer, type)
    for base in inspect.getmro(trainer) if is_class else ():
        if base.__name__ in REPLACED and base.__module__.startswith("trl."):
            return base
    given = trainer.__name__ if is_class else f"an object of class {type(trainer).__name__}"
    raise TypeError(
        f"trainer is {given}, expected the class {', '.join(REPLACED)} of TRL or a subclass; in "
        "place of DistillationTrainer use TopKDistillationTrainer"
    )


def _jsd_hook(own: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """``topk_jsd_loss`` with the trainer's parameters; probabilities go to the trainer's own."""
    signature = inspect.signature(own)

    @functools.wraps(own)
    def loss(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given.pop("logits_are_probs", False):
            return own(*args, **kwargs)
        return topk_jsd_loss(**given, **options)

    return loss


def _replaced(owner: Any, name: str, function: Any) -> ExitStack:
    """Sets an attribute; closing the result restores it."""
    before = vars(owner).get(name)
    setattr(owner, name, function)
    stack = ExitStack()
    if before is None:
        stack.callback(delattr, owner, name)
    else:
        stack.callback(setattr, owner, name, before)
    return stack
