"""``TopKDistillationTrainer``: TRL's on-policy distillation with the loss of this package."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import trl
from torch import Tensor, nn
from trl import DistillationTrainer
from trl.models import prepare_deepspeed
from trl.trainer.utils import get_config_model_id

from opd_kernels.api import topk_divergence
from opd_kernels.divergences import RENORMALIZE
from opd_kernels.head import LinearLogits
from opd_kernels.integrations.models import (
    Sequences,
    check_logits,
    hidden_states,
    model_head,
    own_logits,
    sampled_known,
    sequences_of,
    vocab_size_of,
)
from opd_kernels.integrations.server import TeacherServerError
from opd_kernels.integrations.trl.config import TopKDistillationConfig
from opd_kernels.integrations.trl.teachers import (
    check_apart,
    check_k,
    check_one_teacher,
    eos_ids_of,
    loaded,
    server_of,
    tokenizer_of,
    warn_if_different,
)
from opd_kernels.selection import select_topk
from opd_kernels.stats import Stats
from opd_kernels.support import TopK
from opd_kernels.tokens.masks import special_token_mask
from opd_kernels.tokens.tokenizers import token_ids

__all__ = ["TopKDistillationTrainer"]

CHECKED_WITH = "1.16.0"
# What the trainer overrides or reads the names of images from, and the arguments it relies on.
HOOKS = {
    "compute_loss": {"model", "inputs", "return_outputs", "num_items_in_batch"},
    "_generate_and_score_completions": {"inputs"},
    "_get_last_hidden_state": {"unwrapped_model", "input_ids", "attention_mask", "logits_to_keep"},
}
# A support in hand does not say the teacher's entropy.
LOGGED = ("student_mass", "teacher_mass", "overlap", "student_entropy", "valid_k")


class TopKDistillationTrainer(DistillationTrainer):
    """TRL's ``DistillationTrainer`` with the losses of ``topk_divergence``.

    Data, generation (with transformers or vLLM), accumulation, checkpoints, evaluation and logging
    are TRL's. The loss of a step is by default the reverse KL on the teacher's K best ids S with
    the rest of the vocabulary as one more entry, summed over all response tokens that count and
    divided by their number over all micro-batches and processes::

        L = 1 / n * sum over tokens of
            sum over S of p (log p - log q) + (1 - P) (log(1 - P) - log(1 - Q))

    with full softmaxes p and q, which hold P and Q on S. ``args.loss="renormalize"`` makes it the
    paper's, that of ``topk_rkl``; ``args.loss``, ``args.divergence`` and ``args.support`` choose
    any other of ``topk_divergence``. It is computed from hidden states, so that the student's
    logits (B, T, V) never exist.

    The teacher is a model in this process, whose vocabulary may have another size than the
    student's, or a server (``TeacherServer``), which is asked once per generated batch. Both must
    use the student's token ids; where a tokenizer of the teacher is at hand and differs, a warning
    tells what ``compare_tokenizers`` found. If a teacher in this process has no embedding for a
    token, what follows the token takes no part in the loss, with a warning. The token itself does,
    because its row needs only what is before it.

    Logged besides TRL's metrics: ``masked_fraction`` of the response tokens; every ``stats_steps``
    steps means over the tokens that count. ``student_mass`` and ``teacher_mass`` are what the full
    distributions hold on the support (the teacher's at temperature 1), ``overlap`` the share of the
    support among the student's own K best, ``valid_k`` entries per token. ``student_entropy``, over
    the whole vocabulary at ``temperature``, is what TRL logs as ``entropy`` at every step. Watch
    ``student_mass``.
    ``eval_loss`` over several batches is the mean of their means, as in TRL.

    ``head_of`` reads heads with bias, logit scale and softcap (Cohere, Granite, Gemma 2). Before
    the first loss both models are run on a few tokens. If their own logits are not those of the
    head that was found, or if ``head_of`` refuses a head (an adapter, quantised, sharded), an error
    says to set ``use_hidden_states=False``.

    Args:
        model: as in TRL; also with ``peft_config`` (tested with LoRA), whose adapters have to leave
            the head alone.
        teacher_model: a model, or its name or folder (or ``args.teacher_model_name_or_path``); it
            is loaded in its own dtype unless ``teacher_model_init_kwargs`` says otherwise, and
            frozen, so it cannot be the student or share what the student trains.
        args: a ``TopKDistillationConfig``; its ``teacher_server_url`` makes a ``teacher_server``.
        teacher_server: a ``TeacherServer`` in place of ``teacher_model``.
        teacher_processing_class: the teacher's tokenizer, to be compared with the student's; that
            of ``teacher_model`` where it is a name or a folder.
        options: all others of TRL's, by name: ``train_dataset``, ``eval_dataset``,
            ``processing_class``, ``callbacks``, ``optimizers``, ``quantization_config``,
            ``peft_config``, ``tools``.

    It overrides ``compute_loss`` and ``_generate_and_score_completions`` (its result gets the
    positions that count and, from a server, the teacher's entries), and uses
    ``_forward_redirection``. Unlike in TRL, models get ``position_ids`` without the padding on the
    left, as in generation. Checked with TRL 1.16.0. Run and tested in one process and under DDP.
    FSDP and DeepSpeed have not been run. The loss is computed inside the wrapped model's forward,
    where their parameters are whole. Nothing is passed through that forward, which may round its
    inputs. Under ``bf16`` or ``fp16`` the loss runs under autocast, as the forward of a ``Trainer``
    does.

    Errors: ``ImportError`` for a TRL without these methods; ``TypeError`` for another config;
    ``ValueError`` for no teacher or two, for a teacher that shares what the student trains, for
    options that would have no effect, for a head as above, for images with a server, for a
    generated batch of which the teacher can read nothing; ``TeacherServerError`` from the server,
    where it has less than ``k`` entries for a token that counts, and, whatever ``on_failure``,
    where it has none for a whole generated batch.

    Example::

        trainer = TopKDistillationTrainer(
            "Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B", TopKDistillationConfig("run"), train_dataset=prompts
        )
        trainer.train()

    Source: arXiv 2603.25562, teacher top-K local support matching, special-token masking; the tail
    as one more entry: docs/objectives.md.
    """

    _tag_names = ["trl", "distillation", "opd_kernels"]  # noqa: RUF012
    _name = "Top-K distillation"
    _paper = {"title": "Revisiting On-Policy Distillation", "id": "2603.25562"}  # noqa: RUF012

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: TopKDistillationConfig | None = None,
        *,
        teacher_server: Any = None,
        teacher_processing_class: Any = None,
        **options: Any,
    ) -> None:
        """As TRL's, with the teacher in either form."""
        _check_hooks()
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = TopKDistillationConfig(f"{name.split('/')[-1]}-TopKDistillation")
        if not isinstance(args, TopKDistillationConfig):
            raise TypeError(f"args is a {type(args).__name__}, expected a TopKDistillationConfig")
        check_one_teacher(teacher_model, teacher_server, args)
        if teacher_model is None:
            teacher_model = args.teacher_model_name_or_path
        if args.teacher_server_url is not None:
            teacher_server = server_of(args.teacher_server_url, args)
        # TRL gets no teacher: it would require the teacher's vocabulary to be the student's.
        super().__init__(model, None, args, **options)
        self.teacher_server = teacher_server
        if isinstance(teacher_model, str):
            teacher_processing_class = teacher_processing_class or tokenizer_of(teacher_model, args)
            teacher_model = loaded(teacher_model, args)
        # Ids that the student lacks must not take a place in the teacher's support.
        self._limit = min(vocab_size_of(self.model), args.vocab_size or sys.maxsize)
        limit, teacher_eos_ids = self._limit, None
        if teacher_model is not None:
            self._teacher_rows = vocab_size_of(teacher_model)
            limit = min(limit, self._teacher_rows)
            teacher_eos_ids = eos_ids_of(teacher_model)
            check_apart(self.model, teacher_model)
            self.teacher_model = self._prepared(teacher_model)
        check_k(args.k, args.banned_ids or [], limit)
        if teacher_processing_class is not None:
            # It is not known where a teacher behind a server stops: only tokenizers are compared.
            eos_ids = None if teacher_eos_ids is None else self.eos_token_ids
            warn_if_different(self._tokenizer, teacher_processing_class, eos_ids, teacher_eos_ids)
        self._masked_ids = list(args.masked_ids or [])
        self._masked_ids += token_ids(self._tokenizer, args.masked_tokens or [])
        self._banned_ids = torch.tensor(args.banned_ids or [], dtype=torch.int64)
        self._banned_ids = self._banned_ids.to(self.accelerator.device)
        self._heads_are_checked = not args.use_hidden_states

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch: its share of the step's mean, times what DDP divides by.

        The count is that of the generated batch; the argument ``num_items_in_batch`` counts labels
        of the data set, of which there are none.
        """
        training = self.model.training
        normalizer = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        period = self.args.stats_steps
        measure = period > 0 and not (training and self.state.global_step % period)
        student = self.accelerator.unwrap_model(model)
        if not self._heads_are_checked:
            self._check_heads(model, student)
        call = partial(self._topk_loss, student, inputs, normalizer, measure)
        with self.accelerator.autocast():
            loss, sums = self._inside(model, student, call)
        # Collectives stay out of the wrapped forward.
        if sums is not None:
            self._log_sums("train" if training else "eval", sums)
        return (loss, None) if return_outputs else loss

    def _topk_loss(
        self,
        student: nn.Module,
        inputs: dict[str, Any],
        normalizer: Tensor,
        measure: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """(loss, sums over rows of what is measured); runs inside the student's forward."""
        sequences, keep = sequences_of(inputs, self._multimodal_names())
        mask = inputs["loss_mask"]
        teacher = self._given(inputs, sequences, mask, measure)
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "teacher_temperature": self.args.teacher_temperature,
            "vocab_size": self._limit,
            "divergence": self.args.divergence,
            "outside": self.args.loss,
            "support": self.args.support,
            "return_stats": LOGGED if measure else False,
        }
        tokens = inputs["completion_ids"]
        logits: Tensor | LinearLogits
        if self.args.use_hidden_states:
            head = model_head(student, "student")
            logits = head(hidden_states(student, sequences, keep).to(head.weight.device))
        else:
            # One row more than there are tokens: the last predicts what follows the sequence.
            logits = own_logits(student, sequences, keep)
            mask, tokens = F.pad(mask, (0, 1)), F.pad(tokens, (0, 1))
            if isinstance(teacher, TopK):
                teacher = teacher.pad(*mask.shape)
        device = logits.device
        if self.args.loss == "sample":
            options["token_ids"] = tokens.to(device)
        result = topk_divergence(
            logits,
            teacher.to(device) if isinstance(teacher, (TopK, Tensor)) else teacher,
            None if isinstance(teacher, TopK) else self.args.k,
            mask=mask.to(device),
            banned_ids=self._banned_ids.to(device),
            normalizer=normalizer.to(device),
            **options,
        )
        if not measure:
            return result, None
        loss, stats = result
        return loss, _sums(stats)

    @torch.no_grad()
    def _given(
        self, inputs: dict[str, Any], sequences: Sequences, mask: Tensor, measure: bool
    ) -> Tensor | TopK | LinearLogits:
        """The teacher's entries (B, C) of the rows that predict the response.

        For the student's support its logits instead, as ``own_logits`` or ``head`` give them.
        """
        if self.teacher_server is not None:
            logits = inputs["teacher_logprobs"]
            return TopK(inputs["teacher_ids"], logits, logits.new_zeros(logits.shape[:-1]))
        self.teacher_model.eval()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        sequences, keep = sequences.known_to(self._teacher_rows), mask.shape[1]

        full = self.args.loss != RENORMALIZE
        own = self.args.teacher_temperature

        def select() -> Tensor | TopK | LinearLogits:
            logits: Tensor | LinearLogits
            if self.args.use_hidden_states:
                head = model_head(teacher, "teacher")
                logits = head(hidden_states(teacher, sequences, keep).to(head.weight.device))
            else:
                logits = own_logits(teacher, sequences, keep)
            if self.args.support == "student":
                return logits
            if isinstance(logits, Tensor):
                logits = logits[:, :-1]
            tokens = inputs["completion_ids"].to(logits.device)
            topk = select_topk(
                logits,
                self.args.k,
                mask=mask.to(logits.device),
                banned_ids=self._banned_ids.to(logits.device),
                vocab_size=self._limit,
                temperature=(self.temperature if own is None else own) if full else 1.0,
                token_ids=tokens if self.args.loss == "sample" else None,
                with_logsumexp=measure or full,
            )
            return sampled_known(topk, tokens, self._teacher_rows)

        return self._inside(self.teacher_model, teacher, select)

    def _inside(self, wrapped: nn.Module, unwrapped: nn.Module, call: Callable[[], Any]) -> Any:
        """Runs a call inside a model's wrapped forward, where its parameters are whole."""
        # No tensor goes through the wrapper, which may round it. DDP on a GPU needs some argument.
        return self._forward_redirection(wrapped, unwrapped, _run, call)

    @torch.no_grad()
    def _check_heads(self, model: nn.Module, student: nn.Module) -> None:
        """Raises unless each model's logits are those of its hidden states and its head."""
        device = self.accelerator.device
        pairs = [(model, student, "student")]
        if self.teacher_model is not None:
            teacher = self.accelerator.unwrap_model(self.teacher_model)
            pairs.append((self.teacher_model, teacher, "teacher"))
        for wrapped, unwrapped, role in pairs:
            self._inside(wrapped, unwrapped, partial(check_logits, unwrapped, role, device))
        self._heads_are_checked = True

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with ``loss_mask``, its count, and a server's entries for the responses."""
        batch = super()._generate_and_score_completions(inputs)
        generated = batch["completion_mask"].bool()
        if "tool_mask" in batch:
            generated &= batch["tool_mask"].bool()
        wanted = special_token_mask(batch["completion_ids"], self._masked_ids, mask=generated)
        if self.teacher_server is not None:
            topk, scored = self._ask_server(batch, wanted)
            counted = wanted & scored
            batch["teacher_ids"], batch["teacher_logprobs"] = topk.ids, topk.logits
        else:
            counted = wanted & self._readable(batch)
        if self.args.loss == "sample":
            # The loss is of softmaxes below vocab_size, from which such a token is no sample.
            counted = counted & (batch["completion_ids"] < self._limit)
        counts = torch.stack([mask.sum() for mask in (counted, wanted, generated)])
        kept, asked, total = self.accelerator.gather(counts).view(-1, 3).sum(0)
        if asked and not kept:
            raise self._nothing_counts(int(asked))
        batch["loss_mask"], batch["num_items_in_batch"] = counted, kept
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["masked_fraction"].append(1 - (kept / total.clamp(min=1)).item())
        return batch

    def _readable(self, batch: dict[str, Any]) -> Tensor:
        """Whether the teacher knows every token before a token of the response; bool (B, C)."""
        sequences, keep = sequences_of(batch, [])
        unknown = sequences.unknown_to(self._teacher_rows)
        readable = unknown.cumsum(-1) == unknown
        if unknown.any():
            warnings.warn(
                f"a sequence has token {int(sequences.tokens[unknown][0])}, and the teacher has "
                f"{self._teacher_rows} ids; what follows such a token takes no part in the loss "
                "(masked_fraction)",
                stacklevel=2,
            )
        return readable[:, readable.shape[1] - keep :]

    def _nothing_counts(self, asked: int) -> Exception:
        """The error for a generated batch in which no response token takes part in the loss."""
        if self.teacher_server is not None:
            return TeacherServerError(
                f"the teacher's server has entries for none of the batch's {asked} response "
                "tokens; what failed is in the warnings"
            )
        return ValueError(
            f"all of the batch's {asked} response tokens follow one that the teacher, which has "
            f"{self._teacher_rows} ids, does not know; use a teacher with the student's ids, or "
            "prompts (chat_template) without the others"
        )

    def _ask_server(self, batch: dict[str, Any], wanted: Tensor) -> tuple[TopK, Tensor]:
        """(entries (B, C, K) of the rows that predict the response, mask (B, C) of its tokens)."""
        if any(name in batch for name in self._multimodal_names()):
            raise ValueError(
                "the batch has images, which a teacher behind a server is not shown; use a "
                "teacher_model"
            )
        sequences, keep = sequences_of(batch, [])
        prompts = torch.zeros_like(batch["prompt_ids"], dtype=torch.bool)
        topk, scored = self.teacher_server.score(
            sequences.tokens,
            attention_mask=sequences.attention,
            mask=torch.cat([prompts, wanted], 1),
        )
        topk = topk[:, -keep - 1 : -1]
        if (topk.ids >= self._limit).any() or torch.isin(topk.ids, self._banned_ids).any():
            warnings.warn(
                "the teacher's server lists ids that are banned or outside the student's "
                "vocabulary; they are dropped and not replaced, so that tokens have fewer than k "
                "entries (valid_k)",
                stacklevel=2,
            )
        return topk, scored[:, -keep:]

    def _multimodal_names(self) -> list[str]:
        parameters = inspect.signature(self._get_last_hidden_state).parameters
        return [name for name in parameters if name not in HOOKS["_get_last_hidden_state"]]

    def _prepared(self, teacher: nn.Module) -> nn.Module:
        teacher.requires_grad_(False).eval()
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher, self.accelerator)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def _log_sums(self, mode: str, sums: Tensor) -> None:
        total = self.accelerator.gather(sums).view(-1, len(sums)).sum(0)
        *values, count = total.tolist()
        if count == 0:
            return
        for name, value in zip(LOGGED, values, strict=True):
            self._metrics[mode][name].append(value / count)


def _run(call: Callable[[], Any]) -> Any:
    return call()


def _sums(stats: Stats) -> Tensor:
    """The sum of each logged statistic over the rows that count, and their number."""
    sums = [torch.where(stats.mask, getattr(stats, name), 0).sum() for name in LOGGED]
    return torch.stack([value.double() for value in (*sums, stats.mask.sum())])


def _check_hooks() -> None:
    missing = [
        name
        for name, arguments in HOOKS.items()
        if not arguments <= _arguments_of(getattr(DistillationTrainer, name, None))
    ]
    if missing:
        raise ImportError(
            f"TRL {trl.__version__} has no DistillationTrainer with {', '.join(missing)} as "
            f"TopKDistillationTrainer needs it; install trl=={CHECKED_WITH}"
        )


def _arguments_of(function: Any) -> set[str]:
    return set() if function is None else set(inspect.signature(function).parameters)
