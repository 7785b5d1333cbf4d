"""``distill_loss``: the loss of a causal language model on token ids, in one call."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol, overload, runtime_checkable

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from opd_kernels import _checks
from opd_kernels.api import spelled, topk_divergence
from opd_kernels.causal_model import (
    Sequences,
    check_own_logits_once,
    gathered_head,
    hidden_states,
    inside,
    is_wrapped,
    sampled_known,
    unwrapped,
    vocab_size_of,
)
from opd_kernels.divergences import RECOMMENDED, RENORMALIZE
from opd_kernels.head import LinearLogits
from opd_kernels.model_head import head_of
from opd_kernels.options import DivergenceOptions, check_names
from opd_kernels.selection import select_topk
from opd_kernels.stats import Stats
from opd_kernels.support import TopK

__all__ = ["distill_loss"]

INSTEAD = "take its logits instead: topk_divergence(model(input_ids).logits, ...)"


@runtime_checkable
class Scorer(Protocol):
    """A teacher that is asked for token ids, as ``TeacherServer`` is."""

    def score(
        self, input_ids: Tensor, *, attention_mask: Tensor | None, mask: Tensor
    ) -> tuple[TopK, Tensor]:
        """(entries (B, T) by position, mask (B, T) of the tokens that have them)."""


Teacher = nn.Module | TopK | Scorer


@overload
def distill_loss(
    model: nn.Module,
    input_ids: Tensor,
    teacher: Teacher,
    *,
    attention_mask: Tensor | None = None,
    k: int | None = None,
    model_inputs: Mapping[str, Any] | None = None,
    return_stats: Literal[False] = False,
    return_token_logprobs: Literal[False] = False,
    **options: Unpack[DivergenceOptions],
) -> Tensor: ...


@overload
def distill_loss(
    model: nn.Module,
    input_ids: Tensor,
    teacher: Teacher,
    *,
    attention_mask: Tensor | None = None,
    k: int | None = None,
    model_inputs: Mapping[str, Any] | None = None,
    return_stats: Literal[True] | Sequence[str],
    return_token_logprobs: Literal[False] = False,
    **options: Unpack[DivergenceOptions],
) -> tuple[Tensor, Stats]: ...


@overload
def distill_loss(
    model: nn.Module,
    input_ids: Tensor,
    teacher: Teacher,
    *,
    attention_mask: Tensor | None = None,
    k: int | None = None,
    model_inputs: Mapping[str, Any] | None = None,
    return_stats: Literal[False] = False,
    return_token_logprobs: Literal[True],
    **options: Unpack[DivergenceOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def distill_loss(
    model: nn.Module,
    input_ids: Tensor,
    teacher: Teacher,
    *,
    attention_mask: Tensor | None = None,
    k: int | None = None,
    model_inputs: Mapping[str, Any] | None = None,
    return_stats: Literal[True] | Sequence[str],
    return_token_logprobs: Literal[True],
    **options: Unpack[DivergenceOptions],
) -> tuple[Tensor, Tensor, Stats]: ...


@overload
def distill_loss(
    model: nn.Module,
    input_ids: Tensor,
    teacher: Teacher,
    *,
    attention_mask: Tensor | None = None,
    k: int | None = None,
    model_inputs: Mapping[str, Any] | None = None,
    return_stats: bool | Sequence[str],
    return_token_logprobs: Literal[False] = False,
    **options: Unpack[DivergenceOptions],
) -> Tensor | tuple[Tensor, Stats]: ...


@overload
def distill_loss(
    model: nn.Module,
    input_ids: Tensor,
    teacher: Teacher,
    *,
    attention_mask: Tensor | None = None,
    k: int | None = None,
    model_inputs: Mapping[str, Any] | None = None,
    return_stats: bool | Sequence[str],
    return_token_logprobs: Literal[True],
    **options: Unpack[DivergenceOptions],
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Stats]: ...


def distill_loss(
    model: nn.Module,
    input_ids: Tensor,
    teacher: Teacher,
    *,
    attention_mask: Tensor | None = None,
    k: int | None = None,
    model_inputs: Mapping[str, Any] | None = None,
    return_stats: bool | Sequence[str] = False,
    return_token_logprobs: bool = False,
    **options: Unpack[DivergenceOptions],
) -> Tensor | tuple[Tensor, Stats] | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Stats]:
    """``topk_divergence`` of a causal language model on token ids, from hidden states.

    Runs the model's body, reads its head (``head_of``: tied, bias, scale, softcap), and computes::

        mean over the tokens t that count of D(student(. | tokens before t), teacher(. | the same))

    D is the reverse KL on the teacher's K best and the rest of the vocabulary as one more entry::

        sum over S of p (log p - log q) + (1 - P) (log(1 - P) - log(1 - Q))

    with full softmaxes p and q that hold P and Q on S. ``outside="renormalize"`` makes it the
    paper's loss, which is that of ``topk_rkl``: it costs K logits a token in place of all, and
    does not constrain P.

    Neither side's logits (B, T, V) exist. ``mask`` says which *tokens* count, like
    ``labels != -100``: token t is predicted at position t - 1, and the shift happens in here. All
    that has one element a token is aligned with ``input_ids``: options such as ``weight`` and
    ``token_ids``, the losses of ``reduction="none"`` and ``Stats``. Padding and the first token
    never count.

    Args:
        model: the student, a causal model of transformers, or one with images or of PEFT. In DDP,
            FSDP or after ``fully_shard`` pass it as it is wrapped: the loss runs inside of its
            forward. To compile, compile its body: ``model.base_model.compile()``.
        input_ids: (B, T), prompts and responses.
        teacher: one of

            - such a model, which may have another vocabulary size. It gets no gradient. What
              follows a token for which it has no embedding does not count, with a warning.
            - a ``TopK`` (B, T), as ``select_topk(..., with_logsumexp=True)`` makes it of logits:
              row t is of the position t, which predicts token t + 1.
            - a ``TeacherServer``, which is asked for the tokens that count. What it has no entries
              for raises, or does not count where its ``on_failure`` is "mask".
        mask: bool or integer (B, T), required: the tokens that count.
        attention_mask: (B, T), 0 on padding, left or right. Positions count from each sequence's
            first token, as in generation.
        k: size of the support; 32, or the width of a ``TopK``.
        model_inputs: what the models' forwards take besides, such as ``pixel_values``; both get it.
        return_stats: as in ``topk_rkl``.
        return_token_logprobs: also return each token's log-prob (B, T), as ``topk_divergence``
            does; 0 at tokens that do not count.
        options: all others of ``topk_divergence``. ``outside`` is "bucket" and ``token_ids`` are
            ``input_ids`` unless given.

    Returns the loss, (loss, logprobs), (loss, ``Stats``) or (loss, logprobs, ``Stats``).

    Both models stay in the mode they are in, train or eval, and run under autocast where it is on.
    A model is checked once: its own logits of eight tokens have to be those of its body and head.

    Gradients: the student's parameters. Kept for backward: what its body keeps, and what
    ``topk_divergence`` keeps of a ``LinearLogits``.

    Errors: as in ``topk_divergence``; ``TypeError`` for what is no model or teacher, ``ValueError``
    for shapes, for what ``head_of`` refuses (adapters on the head, quantised or sharded heads,
    encoder-decoder models) and for a model that does more to its logits.

    Example::

        loss = distill_loss(student, input_ids, teacher, mask=labels != -100)
        loss.backward()

    Source: arXiv 2603.25562 with a tail; docs/objectives.md has the reason, docs/divergences.md the
    sources of the others.
    """
    check_names(options, "distill_loss", DivergenceOptions)
    options.setdefault("outside", RECOMMENDED)
    mask = options.pop("mask", None)
    sequences, counted = _checked(input_ids, attention_mask, mask, model_inputs)
    # A head that cannot be read is told before the teacher runs.
    _check_model(model, "model")
    asked = _Asked(vocab_size_of(unwrapped(model)), k, options, return_stats is not False)
    given, counted = _teacher(teacher, sequences, counted, asked)

    def loss() -> (
        Tensor | tuple[Tensor, Stats] | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Stats]
    ):
        student = _logits(model, sequences, "model")
        device = student.device
        chosen: DivergenceOptions = {"token_ids": input_ids.to(device), **options}
        chosen["mask"] = counted.to(device)
        there = given.to(device) if isinstance(given, TopK) else given
        return topk_divergence(
            student,
            there,
            k,
            return_stats=return_stats,
            return_token_logprobs=return_token_logprobs,
            **chosen,
        )

    return inside(model, loss)


class _Asked(NamedTuple):
    """What a teacher is asked for by a student of ``vocab`` ids; ``measured``: for statistics."""

    vocab: int
    k: int | None
    options: DivergenceOptions
    measured: bool


def _checked(
    input_ids: object,
    attention_mask: object,
    mask: object,
    model_inputs: Mapping[str, Any] | None,
) -> tuple[Sequences, Tensor]:
    """(sequences, bool (B, T) of the tokens that count)."""
    if mask is None:
        raise TypeError(
            "distill_loss() needs mask, which tokens (B, T) count: labels != -100, or "
            "response_mask(...)"
        )
    tokens = _checks.check_tokens(input_ids, "input_ids")
    if tokens.ndim != 2:
        raise ValueError(
            f"input_ids has shape {tuple(tokens.shape)}, expected (B, T); add [None] to a single "
            "sequence"
        )
    counted = _flags(mask, tokens, "mask", "compare: labels != -100")
    attention: Tensor | None = None
    if attention_mask is not None:
        real = _flags(attention_mask, tokens, "attention_mask", "compare: attention_mask != 0")
        counted = counted & real & _at_predicted(real)
        attention = real.long()
    if model_inputs is not None and not isinstance(model_inputs, Mapping):
        raise TypeError(
            f"model_inputs is a {type(model_inputs).__name__}, expected a mapping such as "
            '{"pixel_values": ...}'
        )
    for name in ("input_ids", "attention_mask"):
        if model_inputs is not None and name in model_inputs:
            raise ValueError(
                f"model_inputs has {name}, and the loss would not see it; pass it as {name}= of "
                "distill_loss, and what the models' forwards take besides as model_inputs"
            )
    # No position predicts the first token.
    counted = counted & _at_predicted(torch.ones_like(counted))
    return Sequences(tokens, attention, model_inputs or {}), counted


def _flags(flags: object, tokens: Tensor, name: str, remedy: str) -> Tensor:
    """Flags, one per token, as bool."""
    flags = _checks.check_flags(flags, name, remedy)
    _checks.check_like(flags, tokens, name, "input_ids")
    return flags != 0


def _at_predicted(by_position: Tensor) -> Tensor:
    """What each position (B, T, ...) has, at the token that it predicts; the first has zeros."""
    return torch.cat([torch.zeros_like(by_position[:, :1]), by_position[:, :-1]], 1)


def _check_model(model: Any, name: str) -> None:
    """Raises for what is no model with a head, without a look at weights that may be sharded."""
    inner = unwrapped(model)
    parts = ("get_output_embeddings", "config")
    if not is_wrapped(model) or not all(hasattr(inner, part) for part in parts):
        with _named(name):
            head_of(inner)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Says in an error whose head it is about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        # Not its own class, whose constructor may want something else.
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}") from error


def _logits(model: Any, sequences: Sequences, name: str) -> LinearLogits:
    """The model's logits (B, T), each token's those that predict it; inside of its forward."""
    inner = unwrapped(model)
    with _named(name):
        gathered_head(inner)  # a head that cannot be read is told before the body runs
        _check_prompts(inner)
        try:
            check_own_logits_once(inner, sequences.tokens.device)
        except ValueError as error:
            raise ValueError(f"{error}; {INSTEAD}") from error
        hidden = hidden_states(inner, sequences)
        head = gathered_head(inner)
    return head(_at_predicted(hidden).to(head.weight.device))


def _check_prompts(model: Any) -> None:
    """Virtual tokens of PEFT are put before the input by PEFT's model, not by the body."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "prompt and prefix tuning are not in the hidden states of the body; take "
            "model(input_ids, output_hidden_states=True).hidden_states[-1] and head_of(model)"
        )


def _teacher(
    teacher: object,
    sequences: Sequences,
    counted: Tensor,
    asked: _Asked,
) -> tuple[LinearLogits | TopK, Tensor]:
    """(the teacher's rows at the tokens that they predict, the tokens that count)."""
    if isinstance(teacher, TopK):
        _checks.check_same_rows(sequences.tokens.shape, teacher.shape)
        return _shifted(teacher), counted
    if isinstance(teacher, nn.Module):
        _check_model(teacher, "teacher")
        rows = vocab_size_of(unwrapped(teacher))
        sampled = asked.options.get("token_ids")
        sampled = sequences.tokens if sampled is None else sampled
        sequences, counted = _readable(sequences, counted, rows)
        with torch.no_grad():
            if is_wrapped(teacher):
                topk = _selected(teacher, sequences, counted, sampled, asked)
                return sampled_known(topk, sampled, rows), counted
            return _logits(teacher, sequences, "teacher"), counted
    if isinstance(teacher, Scorer) and not isinstance(teacher, Tensor):
        if sequences.besides:
            raise ValueError(
                f"model_inputs has {', '.join(sequences.besides)}, which a server is not shown; "
                "use a model as the teacher"
            )
        given = teacher.score(sequences.tokens, attention_mask=sequences.attention, mask=counted)
        topk, scored = given
        return _shifted(topk), counted & scored
    what = f"teacher is a {type(teacher).__name__}, expected a model, a TopK or a TeacherServer"
    if isinstance(teacher, (Tensor, LinearLogits)):
        what += "; make a TopK of logits (B, T, V): "
        what += "select_topk(logits, 32, with_logsumexp=True)"
    raise TypeError(what)


def _shifted(topk: TopK) -> TopK:
    """Each position's entries at the token that it predicts; the first token never counts."""
    columns = torch.arange(topk.shape[1], device=topk.device) - 1
    return topk[:, columns.clamp(min=0)]


def _readable(sequences: Sequences, counted: Tensor, rows: int) -> tuple[Sequences, Tensor]:
    """The sequences as a teacher of ``rows`` ids reads them, and the tokens that still count."""
    if torch.compiler.is_compiling():
        return sequences, counted
    unknown = sequences.unknown_to(rows)
    if not unknown.any():
        return sequences.known_to(rows), counted  # padding may be an id that it lacks, too
    warnings.warn(
        f"input_ids has token {int(sequences.tokens[unknown][0])}, and the teacher has {rows} ids; "
        "what follows such a token does not count",
        stacklevel=4,
    )
    # The token itself needs only what is before it.
    before = unknown.cumsum(-1) == unknown
    return sequences.known_to(rows), counted & before


def _selected(
    teacher: nn.Module,
    sequences: Sequences,
    counted: Tensor,
    sampled: Tensor,
    asked: _Asked,
) -> TopK:
    """The support of a teacher whose head is whole only inside of its forward."""
    options = asked.options
    if options.get("support", "teacher") != "teacher":
        raise ValueError(
            "support=\"student\" needs the teacher's head at the student's ids, and this teacher "
            "is wrapped or sharded; pass a model that is whole"
        )
    temperature = options.get("teacher_temperature")
    if temperature is None:
        temperature = options.get("temperature", 1.0)
    full = options["outside"] != RENORMALIZE
    if full and isinstance(temperature, Tensor):
        raise ValueError(
            f"the teacher's temperature is a tensor, and outside={options['outside']!r} needs the "
            "log-sum-exp of a wrapped or sharded teacher at one; pass teacher_temperature as a "
            "float, a model that is whole, or outside='renormalize'"
        )

    def select() -> TopK:
        logits = _logits(teacher, sequences, "teacher")
        return select_topk(
            logits,
            min(_checks.DEFAULT_K, logits.vocab) if asked.k is None else asked.k,
            mask=counted.to(logits.device),
            banned_ids=_unselected(options.get("banned_ids"), asked.vocab, logits),
            vocab_size=options.get("vocab_size"),
            temperature=1.0 if isinstance(temperature, Tensor) else temperature,
            token_ids=sampled.to(logits.device),
            with_logsumexp=full or asked.measured,
            backend=options.get("backend"),
        )

    return inside(teacher, select)


def _unselected(
    banned_ids: Sequence[int] | Tensor | None, vocab: int, logits: LinearLogits
) -> Sequence[int] | Tensor | None:
    """Banned ids and those that the student lacks.

    Not by ``vocab_size``, which would leave these out of the teacher's softmax as well.
    """
    if vocab >= logits.vocab:
        return banned_ids
    unknown = torch.arange(vocab, logits.vocab, device=logits.device)
    if banned_ids is None:
        return unknown
    return torch.cat([_checks.as_banned_ids(banned_ids, logits.device), unknown])


def _with_mask(signature: inspect.Signature) -> inspect.Signature:
    """The signature whose mask has no default."""
    parameters = [
        each.replace(default=each.empty, annotation="Tensor") if each.name == "mask" else each
        for each in signature.parameters.values()
    ]
    return signature.replace(parameters=parameters)


distill_loss.__signature__ = _with_mask(spelled(distill_loss, DivergenceOptions))  # type: ignore[attr-defined]
