"""``TopKDistillationConfig``: TRL's options and those of the top-K loss."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields

try:
    from trl import DistillationConfig
except ImportError as error:
    raise ImportError(
        f"{error}: TopKDistillationTrainer needs TRL's DistillationTrainer (checked with 1.16.0), "
        "and that Python 3.11 or later; pip install 'trl>=1.16' 'transformers>=5.0' requests"
    ) from error

from opd_kernels._checks import check_choice, check_outside
from opd_kernels._payload import integer
from opd_kernels.divergences import RECOMMENDED, RENORMALIZE
from opd_kernels.options import SUPPORTS, named

__all__ = ["TopKDistillationConfig"]


@dataclass
class TopKDistillationConfig(DistillationConfig):
    """TRL's ``DistillationConfig`` with the options of the top-K loss.

    Defaults are the paper's (arXiv 2603.25562), ``k`` 32, ``temperature`` 1 (TRL's default, too)
    and ``top_p`` 0.9, where TRL's is 1, but for ``loss``: "bucket" keeps the student's mass on the
    support, and "renormalize" is the paper's. ``temperature`` is that of the rollouts and the loss,
    as in TRL. ``beta`` has to stay 1: ``divergence`` takes its place. The paper's learning rate is
    2e-6; TRL's default, 1e-6, is left.

    Args:
        loss: what becomes of the probability outside of the support, as ``outside`` of
            ``topk_divergence``: "bucket", "renormalize" (the paper's), "truncate", "generalize" or
            "sample", which takes the response's tokens for it and warns unless they are sampled
            from the whole vocabulary.
        divergence: "reverse_kl", "forward_kl" or "jsd".
        support: whose k best ids: "teacher", or "student", which a server cannot serve.
        k: entries of the support per token.
        teacher_temperature: the teacher's temperature in the loss, where it differs.
        masked_tokens: strings whose ids, as the student's tokenizer has them, are left out of the
            loss at their first occurrence per response; the paper's are ``<``, ``think`` and
            ``<|im_end|>``.
        masked_ids: the same by id, for instance ``compare_tokenizers(...).masked_ids``.
        banned_ids: ids that never enter the support. A server lists them all the same: such entries
            are dropped and not replaced, as are those of ids that the student lacks.
        vocab_size: only ids below it enter the support; without one those that both models have.
        use_hidden_states: True: no logits of the student's vocabulary exist, and the teacher's for
            a few hundred tokens at a time. False: both models compute their logits themselves, in
            one piece each; for heads that are sharded and for models that do more to their logits
            than scale and cap them.
        stats_steps: every how many steps masses, overlap and the student's entropy are measured
            (evaluation: always); 0: never. They come from the reads that a loss with full softmaxes
            makes anyway. With "renormalize" they cost a read of the logits, and with
            ``use_hidden_states`` the student's logits, a few hundred tokens at a time and without a
            gradient.
        teacher_server_url: a server for the teacher in place of a model, see ``TeacherServer``;
            one that wants a key is passed to the trainer as ``teacher_server``.
        teacher_server_model: the name under which the server serves the teacher.
        teacher_server_api: "vllm" or "sglang".
        teacher_server_timeout: seconds without a byte before a request counts as failed.
        teacher_server_retries: further attempts for a sequence.
        teacher_server_parallel: requests at a time, of each process.

    Errors: ``ValueError`` for values that are not allowed.

    Example::

        args = TopKDistillationConfig("run", max_completion_length=1024, masked_tokens=["<"])
    """

    top_p: float = field(default=0.9, metadata={"help": "Nucleus of the student's rollouts."})
    loss: str = field(
        default=RECOMMENDED,
        metadata={"help": "bucket, renormalize, truncate, generalize or sample."},
    )
    divergence: str = field(
        default="reverse_kl", metadata={"help": "reverse_kl, forward_kl or jsd."}
    )
    support: str = field(default="teacher", metadata={"help": "teacher or student."})
    k: int = field(default=32, metadata={"help": "Entries of the support per token."})
    teacher_temperature: float | None = field(
        default=None, metadata={"help": "The teacher's temperature in the loss, where it differs."}
    )
    masked_tokens: list[str] | None = field(
        default=None,
        metadata={"help": "Tokens whose first occurrence per response is left out of the loss."},
    )
    masked_ids: list[int] | None = field(
        default=None, metadata={"help": "The same by id of the student's tokenizer."}
    )
    banned_ids: list[int] | None = field(
        default=None, metadata={"help": "Ids that never enter the support."}
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Only ids below it enter the support."}
    )
    use_hidden_states: bool = field(
        default=True, metadata={"help": "Compute the loss without logits (B, T, V)."}
    )
    stats_steps: int = field(
        default=10, metadata={"help": "Measure masses and entropy every so many steps; 0: never."}
    )
    teacher_server_url: str | None = field(
        default=None, metadata={"help": "A server for the teacher, http://host:port."}
    )
    teacher_server_model: str | None = field(
        default=None, metadata={"help": "The name under which the server serves the teacher."}
    )
    teacher_server_api: str = field(default="vllm", metadata={"help": "vllm or sglang."})
    teacher_server_timeout: float = field(
        default=120.0, metadata={"help": "Seconds without a byte before a request has failed."}
    )
    teacher_server_retries: int = field(
        default=4, metadata={"help": "Further attempts for a sequence."}
    )
    teacher_server_parallel: int = field(
        default=8, metadata={"help": "Requests at a time, of each process."}
    )

    def __post_init__(self) -> None:
        """Checks what would be refused in the first step, and what would be ignored."""
        super().__post_init__()
        if self.beta != 1:
            raise ValueError(
                f"beta is {self.beta}, allowed is 1; choose by divergence: reverse_kl, forward_kl "
                "or jsd"
            )
        self._check_member()
        for name in ("k", "stats_steps", "vocab_size"):
            value = getattr(self, name)
            if value is not None and integer(value) is None:
                raise ValueError(f"{name} is {value!r}, expected an int")
        if isinstance(self.masked_tokens, str):
            raise ValueError(f"masked_tokens is {self.masked_tokens!r}, expected a list of strings")
        least = 2 if self.loss == RENORMALIZE else 1
        if self.k < least:
            why = "; one entry has no gradient" if least == 2 else ""
            raise ValueError(f"k is {self.k}, allowed is {least} or more{why}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}, allowed is 1 or more")
        for name in ("masked_ids", "banned_ids"):
            for i in getattr(self, name) or []:
                if integer(i) is None:
                    raise ValueError(f"{name} has {i!r}, expected ints")
                if i < 0:
                    raise ValueError(f"{name} has {i}, allowed are 0 and more")
        if self.stats_steps < 0:
            raise ValueError(f"stats_steps is {self.stats_steps}, allowed is 0 or more")
        for name in ("temperature", "teacher_temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, allowed is more than 0")
        ignored = [
            option.name
            for option in fields(self)
            if option.name.startswith("teacher_server_")
            and getattr(self, option.name) != option.default
        ]
        if ignored and self.teacher_server_url is None:
            raise ValueError(
                f"{', '.join(ignored)} needs teacher_server_url; a TeacherServer has its own"
            )

    def _check_member(self) -> None:
        """The loss is one that ``topk_divergence`` has, and its teacher can serve it."""
        divergence = named(self.divergence)
        check_outside(divergence, self.loss, with_token=True)
        check_choice(self.support, "support", SUPPORTS)
        whole = self.top_p == 1 and not self.top_k and not self.min_p
        if self.loss == "sample" and not whole:
            warnings.warn(
                f'loss="sample" is unbiased for tokens of the whole softmax, and top_p is '
                f"{self.top_p}, top_k {self.top_k}, min_p {self.min_p}; set top_p=1.0 and top_k=0, "
                "or the gradient is biased",
                stacklevel=4,
            )
