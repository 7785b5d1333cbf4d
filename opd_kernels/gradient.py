"""``add_topk_grad_``: the loss's gradient, added to one that another loss has made."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_kernels import _checks, _ops
from opd_kernels.backends import AUTO

__all__ = ["add_topk_grad_"]


@torch.no_grad()
def add_topk_grad_(
    grad: Tensor,
    ids: Tensor,
    entry_grad: Tensor,
    upstream: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Adds the gradient of a top-K loss to a dense gradient in place, without a second (N, V).

    With the entries that ``TopKReverseKL.apply`` returned and g the loss's factor in each row::

        grad[id_j] += g entry_grad_j    for every present entry j of a row

    It is for a trainer that makes the dense gradient of another loss itself, in an autograd
    Function of its own or from detached logits. Only K elements of each row are read and written.
    In all other cases add the losses and let autograd add the gradients.

    Shapes and dtypes: ``grad`` (..., V), float16, bfloat16, float32 or float64, any leading
    strides, last stride 1; ``ids`` int32 and ``entry_grad`` float32 or float64, both (..., K);
    ``upstream`` floating, one per row (...), or None for ones. The sum is computed in float32
    (float64 where ``grad`` or ``entry_grad`` is) and rounded once to the dtype of ``grad``.
    ``backend`` is as for ``topk_rkl``. Returns ``grad``.

    Entries whose id is -1 or outside [0, V) are ignored, even if their factor is NaN. All other ids
    of a row must be different, as those of ``TopKReverseKL.apply`` are. If a row repeats an id,
    parts of its gradient may be lost.

    Gradients: none, and no argument may require one. Autograd is told that ``grad`` has changed.
    Memory: at most copies of (..., K).

    Errors: ``ValueError`` for shapes, devices and strides that do not fit, rows that overlap,
    arguments that require grad, a backend that cannot serve the call; ``TypeError`` for dtypes.

    Example::

        logits = torch.randn(8, 1000)
        labels, teacher_logits = torch.randint(1000, (8,)), torch.randn(8, 1000)
        grad = logits.softmax(-1)
        grad[torch.arange(8), labels] -= 1  # of the cross entropy, summed over the rows
        loss, ids, entry_grad = TopKReverseKL.apply(
            logits, anchor_of(logits), teacher_logits, None, None, None, None, None,
            1.0, 1.0, 32, 1000, False, "auto",
        )
        add_topk_grad_(grad, ids, entry_grad)

    Source: arXiv 2603.25562, teacher top-K local support matching; the gradient of its loss.
    """
    grad = _checks.check_buffer(grad)
    ids = _checks.check_entries(ids, "ids", grad)
    entry_grad = _checks.check_entries(entry_grad, "entry_grad", grad)
    _checks.check_same_entries(ids, entry_grad)
    _checks.check_backend(backend)
    if upstream is None:
        upstream = entry_grad.new_ones(ids.shape[:-1])
    else:
        upstream = _checks.check_upstream(upstream, grad)
    _ops.scatter_add_(grad, entry_grad, ids, upstream, AUTO if backend is None else backend)
    return grad
