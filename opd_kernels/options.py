"""The options of a loss: what they are, checked and in the operators' form, and how rows reduce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, cast

import torch
from torch import Tensor

from opd_kernels import _checks, debugging
from opd_kernels._arguments import Allowed, Objective, Temperature, pack_bitmap, wide_dtype
from opd_kernels.backends import AUTO
from opd_kernels.divergences import NAMED, RENORMALIZE, Divergence, reverse_kl

if TYPE_CHECKING:
    from opd_kernels.distributed import VocabShard

SUPPORTS = ("teacher", "student")
BACKGROUNDS = ("exact", "sampled")


class RowOptions(TypedDict, total=False):
    """The keywords that decide the loss of each row; ``topk_rkl`` says what they mean."""

    temperature: float | Tensor
    teacher_temperature: float | Tensor | None
    mask: Tensor | None
    banned_ids: Sequence[int] | Tensor | None
    vocab_size: int | None
    backend: str | None


class Options(RowOptions, total=False):
    """The keywords that every reduced loss takes."""

    weight: Tensor | None
    reduction: str
    normalizer: float | Tensor | None
    inplace_grad: bool
    vocab_shard: VocabShard | None
    teacher_vocab_shard: VocabShard | Literal["whole"] | None


class DivergenceOptions(Options, total=False):
    """The keywords of ``topk_divergence`` that ``topk_rkl`` does without."""

    divergence: str | Divergence
    outside: str
    support: str
    token_ids: Tensor | None
    include_token: bool
    background: str
    student_logsumexp: Tensor | None


MEMBER_DEFAULTS: DivergenceOptions = {
    "divergence": "reverse_kl",
    "outside": RENORMALIZE,
    "support": "teacher",
    "token_ids": None,
    "include_token": False,
    "background": "exact",
    "student_logsumexp": None,
}


def check_names(
    options: Mapping[str, object], function: str, taken: type[RowOptions] = Options
) -> None:
    """Raises as Python does for keywords that a function does not take."""
    unknown = options.keys() - taken.__annotations__.keys()
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {min(unknown)!r}")


class Call(NamedTuple):
    """The options of one call, checked against its rows."""

    mask: Tensor | None
    objective: Objective
    weight: Tensor | None
    banned_ids: Sequence[int] | Tensor | None
    vocab_size: int | None
    reduction: str
    normalizer: float | Tensor | None
    inplace: bool
    backend: str
    support: str = "teacher"
    token_ids: Tensor | None = None
    include_token: bool = False
    teacher_temperature: float | Tensor = 1.0
    divergence: Divergence = reverse_kl()  # as it was given
    stats: tuple[str, ...] | None = None  # names; None: no statistics
    with_logprobs: bool = False
    background: str = "exact"
    student_logsumexp: Tensor | None = None

    @property
    def full(self) -> bool:
        """Whether probabilities are those of full softmaxes."""
        return self.objective.outside != RENORMALIZE

    @property
    def with_token(self) -> bool:
        """Whether the sampled token is an entry more."""
        return self.include_token or self.objective.outside == "sample"

    @property
    def lists_token(self) -> bool:
        """Whether the loss of a head wants the sampled token's logit beside its entries."""
        return self.with_logprobs or (self.full and self.background == "sampled")

    @property
    def needs_tails(self) -> bool:
        """Whether loss or gradient depend on full softmaxes, which not every backend has."""
        return self.full or self.with_logprobs

    def wants(self, name: str) -> bool:
        """Whether a statistic is asked for."""
        return self.stats is not None and name in self.stats

    def watches(self, side: str) -> bool:
        """Whether a side's full softmax is wanted, for more than the divergence."""
        named = self.wants(f"{side}_mass") or self.wants(f"{side}_entropy")
        return named or (self.with_logprobs and side == "student")

    def range(self, vocab: int) -> int:
        """How many ids of a vocabulary a full softmax runs over."""
        return vocab if self.vocab_size is None else min(vocab, self.vocab_size)

    def allowed(self, limit: int, device: torch.device) -> Allowed:
        """What may enter the support, of ids in [0, limit)."""
        return allowed(limit, self.vocab_size, self.banned_ids, self.mask, device)

    def factors(self, rows: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The derivative of the reduced loss by that of each row, constant."""
        ones = torch.ones(rows, dtype=dtype, device=device, requires_grad=True)
        with torch.enable_grad():
            total = self.reduce(ones)
        (factors,) = torch.autograd.grad(total, ones)
        return factors if self.mask is None else factors.masked_fill(~self.mask, 0)

    def reduce(self, loss: Tensor) -> Tensor:
        """Weights and reduces per-row losses."""
        return reduce_rows(loss, self.weight, self.mask, self.reduction, self.normalizer)


def resolve(options: Options, rows: torch.Size, device: torch.device) -> Call:
    """Checks the options of a loss on ``rows``."""
    mask, weight = options.get("mask"), options.get("weight")
    normalizer, reduction = options.get("normalizer"), options.get("reduction", "mean")
    inplace, backend = options.get("inplace_grad", False), options.get("backend")
    temperature = options.get("temperature", 1.0)
    teacher_temperature = options.get("teacher_temperature")
    if teacher_temperature is None:
        teacher_temperature = temperature
    vocab_size = options.get("vocab_size")
    _checks.check_vocab_size(vocab_size)
    _checks.check_flag(inplace, "inplace_grad")
    _checks.check_reduction(reduction, normalizer, device)
    mask = bool_mask(mask, rows, device)
    if weight is not None:
        _checks.check_weight(weight, rows, device)
    objective = Objective(
        _temperature(temperature, rows, device, "temperature"),
        _temperature(teacher_temperature, rows, device, "teacher_temperature"),
        reverse_kl(),
        None,
        RENORMALIZE,
    )
    divergence, support, token_ids, include_token = reverse_kl(), "teacher", None, False
    background, student_logsumexp = "exact", None
    if "divergence" in options:
        member = cast(DivergenceOptions, options)
        divergence, outside = named(member["divergence"]), member["outside"]
        support, token_ids = member["support"], member["token_ids"]
        include_token = member["include_token"]
        background, student_logsumexp = member["background"], member["student_logsumexp"]
        _checks.check_choice(background, "background", BACKGROUNDS)
        _check_member(divergence, outside, support, token_ids, include_token)
        if token_ids is not None:
            _checks.check_token_ids(token_ids, rows, device)
        if student_logsumexp is not None:
            _checks.check_student_logsumexp(student_logsumexp, rows, device)
        numbers, weights = _weights(divergence, rows, device)
        objective = objective._replace(divergence=numbers, weights=weights, outside=outside)
    if debugging.on_outside_of_operators():
        debugging.check_call(
            temperature, teacher_temperature, weight, normalizer, mask, objective.weights
        )
    return Call(
        mask,
        objective,
        weight,
        options.get("banned_ids"),
        vocab_size,
        reduction,
        normalizer,
        inplace and not torch.compiler.is_compiling(),
        backend_name(backend),
        support,
        token_ids,
        include_token,
        teacher_temperature,
        divergence,
        background=background,
        student_logsumexp=student_logsumexp,
    )


def backend_name(backend: str | None) -> str:
    """The backend as operators take it."""
    _checks.check_backend(backend)
    return AUTO if backend is None else backend


def allowed(
    limit: int,
    vocab_size: int | None,
    banned_ids: Sequence[int] | Tensor | None,
    mask: Tensor | None,
    device: torch.device,
) -> Allowed:
    """What may enter a support, of ids in [0, limit)."""
    limit = limit if vocab_size is None else min(limit, vocab_size)
    if banned_ids is None:
        return Allowed(limit, None, mask)
    return Allowed(limit, pack_bitmap(_checks.as_banned_ids(banned_ids, device), limit), mask)


def bool_mask(mask: Tensor | None, rows: torch.Size, device: torch.device) -> Tensor | None:
    """The mask as bool, checked against the rows."""
    if mask is None:
        return None
    _checks.check_mask(mask, rows, device)
    return recordable(mask if mask.dtype == torch.bool else mask != 0)


def recordable(tensor: Tensor) -> Tensor:
    """The per-row tensor, or a copy if autograd cannot save it: it was made in inference mode."""
    if (
        torch.compiler.is_compiling()
        or not tensor.is_inference()
        or torch.is_inference_mode_enabled()
    ):
        return tensor
    return tensor.clone()


def named(divergence: object) -> Divergence:
    """The divergence that a name stands for, or the given one."""
    if isinstance(divergence, str):
        _checks.check_choice(divergence, "divergence", tuple(NAMED))
        return NAMED[divergence]()
    if not isinstance(divergence, Divergence):
        raise TypeError(
            f"divergence is a {type(divergence).__name__}, expected a name or a Divergence"
        )
    return divergence


def _check_member(
    divergence: Divergence,
    outside: object,
    support: object,
    token_ids: Tensor | None,
    include_token: object,
) -> None:
    """Raises for combinations that no loss has."""
    _checks.check_divergence(divergence)
    _checks.check_outside(divergence, outside, token_ids is not None)
    _checks.check_choice(support, "support", SUPPORTS)
    _checks.check_flag(include_token, "include_token")
    if include_token and token_ids is None:
        raise ValueError("include_token=True needs token_ids, the sampled token of each row")
    if include_token and outside == "sample":
        raise ValueError(
            'include_token=True joins the sampled token to the support, and outside="sample" takes '
            "it for what lies outside; choose one"
        )


def _weights(
    divergence: Divergence, rows: torch.Size, device: torch.device
) -> tuple[Divergence, Tensor | None]:
    """The divergence with numbers only, and its weights (..., 4) if rows differ in them."""
    given = divergence[:4]
    tensors = [weight for weight in given if isinstance(weight, Tensor)]
    if not tensors:
        return divergence, None
    for name, weight in zip(divergence._fields, given, strict=False):
        if isinstance(weight, Tensor):
            _checks.check_row_weight(weight, rows, device, f"the divergence's {name}")
    dtype = wide_dtype(device)
    columns = [torch.as_tensor(w, dtype=dtype, device=device).expand(rows) for w in given]
    numbers = Divergence(0.0, 0.0, 0.0, 0.0, *divergence[4:])
    return numbers, torch.stack(columns, -1)


def _temperature(
    temperature: float | Tensor, rows: torch.Size, device: torch.device, name: str
) -> Temperature:
    """One side's temperature as the operators take it."""
    if isinstance(temperature, Tensor):
        _checks.check_temperature_tensor(temperature, rows, device, name)
        return Temperature(1.0, _allowed_or_nan(temperature).expand(rows))
    _checks.check_number(temperature, name)
    if torch.compiler.is_compiling():
        # torch.compile guards on the value of an operator's float argument, so a schedule would
        # recompile at every step. A float in plain arithmetic becomes an input of the graph.
        tensor = torch.ones((), dtype=torch.float64, device=device) * temperature
        return Temperature(1.0, _allowed_or_nan(tensor).expand(rows))
    _checks.check_temperature_value(temperature, name)
    return Temperature(float(temperature))


def _allowed_or_nan(temperature: Tensor) -> Tensor:
    """NaN, and so a NaN loss, where the temperature is not allowed: no check has seen its value."""
    if temperature.dtype != torch.float64:  # the bounds are float32's
        temperature = temperature.float()
    inside = (temperature >= _checks.LEAST_TEMPERATURE) & (
        temperature <= _checks.LARGEST_TEMPERATURE
    )
    return torch.where(inside, temperature, torch.nan)


def reduce_rows(
    loss: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
) -> Tensor:
    """Weights and reduces per-row losses. Masked rows stay exactly 0, whatever their weight."""
    if weight is not None:
        loss = loss * recordable(weight).to(loss.dtype)
        if mask is not None:
            loss = torch.where(mask, loss, 0)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    if isinstance(normalizer, Tensor):
        return total / recordable(normalizer).to(total.dtype)
    if normalizer is not None:
        return total / float(normalizer)  # an int may be beyond int64
    return total / (max(loss.numel(), 1) if mask is None else mask.sum().clamp(min=1))
