"""Fused kernels for top-K on-policy distillation.

``topk_rkl`` is the paper's loss, and ``topk_divergence`` the family around it: ``reverse_kl``,
``forward_kl``, ``jsd``, ``mixed``, ``skew_reverse_kl``, ``skew_forward_kl`` or any ``Divergence``,
renormalised on the support or with what lies outside of it. Each side is logits or
``LinearLogits``, hidden states and a head, which ``head_of`` reads from a model;
``linear_topk_rkl`` takes the parts of a student's head by name.
``select_topk`` is the teacher's support by itself, ``TopK`` a support that was cached or came from
a server, ``TopKReverseKL`` the ``torch.autograd.Function`` underneath and ``EntryGradient`` a way
to add its gradient to another loss's.

Around the loss: ``response_mask``, ``special_token_mask`` and ``predicting`` say which positions
take part, ``compare_tokenizers`` and ``token_ids`` which ids. ``sampled_token_loss``, with
``token_logprobs`` and ``sampled_token_advantages`` or ``returns_to_go``, is the sampled-token
baseline. ``debug`` makes calls look at values and raise with the first bad row.
"""

from importlib.metadata import PackageNotFoundError, version

from opd_kernels._autograd import TopKReverseKL
from opd_kernels.api import linear_topk_rkl, topk_divergence, topk_rkl
from opd_kernels.debugging import debug
from opd_kernels.distill import distill_loss
from opd_kernels.distributed import VocabShard
from opd_kernels.divergences import (
    Divergence,
    forward_kl,
    jsd,
    mixed,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
)
from opd_kernels.gradient import EntryGradient
from opd_kernels.head import LinearLogits
from opd_kernels.logprobs import token_logprobs
from opd_kernels.model_head import head_of
from opd_kernels.selection import score_ids, select_topk
from opd_kernels.stats import Stats
from opd_kernels.support import TopK
from opd_kernels.tokens.masks import (
    first_occurrences,
    predicting,
    response_mask,
    special_token_mask,
)
from opd_kernels.tokens.sampled_token import (
    returns_to_go,
    sampled_token_advantages,
    sampled_token_loss,
)
from opd_kernels.tokens.tokenizers import TokenizerComparison, compare_tokenizers, token_ids

try:
    __version__ = version("opd_kernels")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Divergence",
    "EntryGradient",
    "LinearLogits",
    "Stats",
    "TokenizerComparison",
    "TopK",
    "TopKReverseKL",
    "VocabShard",
    "compare_tokenizers",
    "debug",
    "distill_loss",
    "first_occurrences",
    "forward_kl",
    "head_of",
    "jsd",
    "linear_topk_rkl",
    "mixed",
    "predicting",
    "response_mask",
    "returns_to_go",
    "reverse_kl",
    "sampled_token_advantages",
    "sampled_token_loss",
    "score_ids",
    "select_topk",
    "skew_forward_kl",
    "skew_reverse_kl",
    "special_token_mask",
    "token_ids",
    "token_logprobs",
    "topk_divergence",
    "topk_rkl",
]
