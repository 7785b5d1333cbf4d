"""``Case``, a call described by names and a seed, and the tensors that it stands for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from opd_kernels import divergences
from opd_kernels.backends.plain import shaped
from opd_kernels.divergences import Divergence
from opd_kernels.head import LinearLogits
from opd_kernels.support import TopK

CONTENTS = (
    "normal",
    "equal",
    "ascending",
    "descending",
    "clustered",
    "quantised",
    "half_neg_inf",
    "neg_inf",
    "nan",
    "pos_inf",
    "zeros",
    "extreme",
    "offset",
)
# "close" is nearly the teacher's logits, as late in training.
STUDENT_CONTENTS = (*CONTENTS, "close")
LAYOUTS = ("contiguous", "sliced", "transposed", "expanded")
TEACHERS = ("logits", "topk_int32", "topk_int64")
# Where the student is hidden states and a head, its contents are those of the hidden states. All
# of them keep float32 sums finite, or make them infinite or NaN as float64 does. Of EXACT the
# weights are small integers, too: in every dtype and order their products have no error.
EXACT = "integers"
HIDDEN_CONTENTS = ("normal", "equal", "quantised", "zeros", "nan", "half_neg_inf", "offset", EXACT)
# What else is no number: an element of some hidden states or of the weight, or biases.
POISONS = (
    "none",
    "hidden_nan",
    "hidden_inf",
    "weight_nan",
    "weight_inf",
    "bias_nan",
    "bias_inf",
    "bias_neg_inf",
)
HIDDEN_SIZES = (1, 3, 16, 17, 64, 100)
HEADS = ("plain", "bias", "scale", "softcap", "all")
MASKS = ("none", "bool", "integer", "all", "nothing")
TEMPERATURES = ("one", "float", "scalar", "rows")
WEIGHTS = ("none", "uniform", "poisoned")
BANS = ("none", "few", "half", "outside", "all")
NORMALIZERS = ("none", "float", "tensor")
UPSTREAMS = ("one", "stride0", "random", "zero")
# Members of the divergence family. Of "gate" one weight is 0 or 1 by row, of "rows" every weight is
# a number of the row's own.
MEMBERS = (
    "reverse_kl",
    "forward_kl",
    "jsd",
    "mixed",
    "skew_reverse_kl",
    "skew_forward_kl",
    "all",
    "gate",
    "rows",
)
# Those that may be generalised, and those of which a sampled token may stand for the rest.
WITHOUT_SKEW = ("reverse_kl", "forward_kl", "mixed", "gate")
SAMPLED = ("reverse_kl", "reverse_rows")
BETAS = (0.5, 0.1, 0.9)
CLIPS = (None, 0.5, 5.0)
FLOORS = (None, -2.0, -10.0)
SUPPORTS = ("teacher", "student")
# Sampled tokens: anywhere, in the teacher's support, banned, with q = 0, or no id in some rows.
TOKENS = ("none", "any", "likely", "banned", "unlikely", "outside")
# What a served support says of the teacher's whole distribution.
CARRIED = ("tail", "logsumexp", "both")
# What a call on hidden states takes besides: a background, and the dtype of a log-sum-exp.
BACKGROUNDS = ("exact", "sampled")
SUMS = ("none", "float32", "float64")


@dataclass(frozen=True)
class Case:
    """One call of ``topk_rkl``, described by names and a seed.

    With a ``hidden`` size it is a call of ``linear_topk_rkl``. Then fields about the student's
    logits are about its hidden states, and the teacher may be "linear": hidden states and a head.
    With a ``divergence`` it is a call of ``topk_divergence``. If it is ``watched``, a second call
    returns statistics and log-probs of tokens.
    """

    rows: tuple[int, ...] = (3,)
    student_vocab: int = 64
    teacher_vocab: int = 64
    k: int = 8
    student_dtype: str = "float32"
    teacher_dtype: str = "float32"
    student_content: str = "normal"
    teacher_content: str = "normal"
    student_layout: str = "contiguous"
    teacher_layout: str = "contiguous"
    teacher: str = "logits"
    mask: str = "none"
    temperature: str = "one"
    teacher_temperature: str | None = None
    weight: str = "none"
    banned: str = "none"
    vocab_size: int | None = None
    reduction: str = "mean"
    normalizer: str = "none"
    upstream: str = "one"
    inplace: bool = False
    hidden: int = 0
    head: str = "plain"
    poison: str = "none"
    frozen: bool = False
    divergence: str = ""
    beta: float = 0.5
    stop_ratio: bool = False
    clip: float | None = None
    floor: float | None = None
    outside: str = "renormalize"
    support: str = "teacher"
    token: str = "none"
    include_token: bool = False
    carried: str = "tail"
    background: str = "exact"
    logsumexp: str = "none"
    watched: bool = False
    seed: int = 0


@dataclass
class Head:
    """A student that is hidden states (..., H) and a head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    exact: bool = False  # products have no error


@dataclass
class Inputs:
    """The tensors of a case and the keyword arguments of the call.

    ``student`` and ``teacher`` are logits or a support. If the call gets a head instead, they are
    the head's logits in float64, and ``ranked`` what the student's support is selected by: those
    without scale and softcap. ``family`` are the keywords of ``topk_divergence`` alone.
    """

    student: Tensor
    teacher: Tensor | TopK
    k: int
    wide: bool  # computed in float64
    options: dict[str, Any] = field(default_factory=dict)
    upstream: Tensor | None = None
    head: Head | None = None
    ranked: Tensor | None = None
    teacher_head: LinearLogits | None = None
    family: dict[str, Any] = field(default_factory=dict)


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """The case's tensors, the same ones every time."""
    generator = torch.Generator().manual_seed(case.seed)
    student = _logits(case, "student", generator)
    teacher: Tensor | TopK = _logits(case, "teacher", generator)
    served = case.teacher in ("topk_int32", "topk_int64")
    if served and not case.divergence:
        teacher = _support(case, generator)
    if case.student_content == "close" and not case.hidden:
        _bring_close(student, teacher, generator)
    options: dict[str, Any] = {"reduction": case.reduction}
    options["mask"] = _mask(case, generator)
    options["temperature"] = _temperature(case, case.temperature, generator)
    if case.teacher_temperature is not None:
        options["teacher_temperature"] = _temperature(case, case.teacher_temperature, generator)
    options["weight"] = _weight(case, options["mask"], generator)
    options["banned_ids"] = _banned(case, generator)
    options["vocab_size"] = case.vocab_size
    if case.normalizer != "none":
        value = float(torch.rand((), generator=generator)) * 10 + 0.5
        options["normalizer"] = value if case.normalizer == "float" else torch.tensor(value)
    upstream = _upstream(case, options["mask"], generator)
    if isinstance(teacher, Tensor) and not (served and case.divergence):
        _poison_masked_rows(teacher, options["mask"])
    _poison_masked_rows(student, options["mask"])
    wide = case.student_dtype == "float64" or case.teacher_dtype == "float64"
    inputs = Inputs(student, teacher, case.k, wide, options, upstream)
    if case.hidden:
        _make_heads(case, inputs, generator)
    if case.divergence:
        inputs.family = _family(case, inputs, generator)
    if torch.device(device).type != "cpu":
        for name, value in vars(inputs).items():
            setattr(inputs, name, copied_to(device, value))
        if inputs.head is not None:
            inputs.head = Head(**copied_to(device, vars(inputs.head)))
    return inputs


def _make_heads(case: Case, inputs: Inputs, generator: torch.Generator) -> None:
    """Heads instead of the student's and, for a "linear" one, of the teacher's logits."""
    if case.teacher == "linear":
        inputs.teacher, inputs.teacher_head = _teacher_head(case, generator)
        _poison_masked_rows(inputs.teacher_head.hidden, inputs.options["mask"])
    head = _student_head(case, inputs, generator)
    logits = head.hidden.double() @ head.weight.double().t()
    if head.bias is not None:
        logits = logits + head.bias.double()
    inputs.ranked, inputs.head = logits, head
    inputs.student = shaped(logits, head.scale, head.softcap)


def _student_head(case: Case, inputs: Inputs, generator: torch.Generator) -> Head:
    """A head for the hidden states; its rows that must not be read are NaN."""
    hidden, vocab, dtype = inputs.student, case.student_vocab, inputs.student.dtype
    exact, full = case.student_content == EXACT, case.outside != "renormalize"
    normal = torch.randn(vocab, case.hidden + 3, generator=generator, dtype=torch.float64)
    values = normal.round().clamp(-1, 1) if exact else normal * case.hidden**-0.5
    weight = values.to(dtype)[:, 1:-2]
    if case.seed % 2:
        weight = weight.contiguous()
    bias = torch.randn(2 * vocab, generator=generator)
    bias = (bias.round() if exact else bias).to(dtype)[::2]
    for rows in (weight, bias):
        if full:
            rows[vocab if case.vocab_size is None else case.vocab_size :] = torch.nan
            continue
        rows[allowed_below(case) :] = torch.nan
        banned = inputs.options["banned_ids"]
        ids = torch.as_tensor([] if banned is None else banned, dtype=torch.long)
        rows[ids[(ids >= 0) & (ids < vocab)]] = torch.nan
    _poison_head(case, hidden, weight, bias, generator)
    chosen = HEADS[1:4] if case.head == "all" else (case.head,)
    return Head(
        hidden,
        weight,
        bias if "bias" in chosen else None,
        0.625 if "scale" in chosen else 1.0,
        5.0 if "softcap" in chosen else None,
        exact,
    )


def _poison_head(
    case: Case, hidden: Tensor, weight: Tensor, bias: Tensor, generator: torch.Generator
) -> None:
    """Writes what is no number where the case says."""
    kind, _, value = case.poison.partition("_")
    at = torch.randint(len(bias), (), generator=generator)
    column = torch.randint(case.hidden, (), generator=generator)
    chosen = torch.rand(case.rows, generator=generator) < 0.4
    sign = 1 if case.seed % 4 < 2 else -1
    number = {"": 0.0, "nan": torch.nan, "inf": sign * torch.inf, "neg_inf": -torch.inf}[value]
    if kind == "hidden" and 0 not in hidden.stride() and hidden.numel():
        hidden[..., column].masked_fill_(chosen, number)
    elif kind == "weight":
        weight[at, column] = number
    elif kind == "bias" and value == "neg_inf":
        bias[torch.rand(len(bias), generator=generator) < 0.5] = number
    elif kind == "bias":
        bias[at] = abs(number)


def _teacher_head(case: Case, generator: torch.Generator) -> tuple[Tensor, LinearLogits]:
    """Logits and their head. All are integers, so that every order of summation is exact."""
    dtype = getattr(torch, case.teacher_dtype)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)

    hidden, weight = integers(*case.rows, 7), integers(case.teacher_vocab, 7)
    bias = integers(case.teacher_vocab) if case.head in ("bias", "all") else None
    head = LinearLogits(hidden, weight, bias, scale=0.5)
    logits = hidden.double() @ weight.double().t()
    return (logits if bias is None else logits + bias.double()) * head.scale, head


def allowed_below(case: Case) -> int:
    """One past the largest id that can be selected."""
    limits = [case.student_vocab]
    if case.teacher in ("logits", "linear"):
        limits.append(case.teacher_vocab)
    return min(limits if case.vocab_size is None else [*limits, case.vocab_size])


def copied_to(device: torch.device | str, tree: Any) -> Any:
    """The tree with each tensor copied to a device, strides and storage offset as they are.

    ``Tensor.to`` makes sliced, transposed and expanded tensors dense. This copies the whole storage
    and views it again. Allocations begin on multiples of 16 bytes on every device, so rows stay as
    misaligned as they were. The copies have no graph and are no views.
    """
    return pytree.tree_map_only(Tensor, lambda tensor: _copied_to(device, tensor), tree)


def _copied_to(device: torch.device | str, tensor: Tensor) -> Tensor:
    memory = storage_bytes(tensor).to(device, copy=True).untyped_storage()
    copy = torch.empty(0, dtype=tensor.dtype, device=device)
    return copy.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


def storage_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's whole storage, in place."""
    bare = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return bare.set_(tensor.untyped_storage())


def _logits(case: Case, side: str, generator: torch.Generator) -> Tensor:
    """Logits of a side with the wanted content, dtype and strides."""
    vocab = (case.hidden or case.student_vocab) if side == "student" else case.teacher_vocab
    content = case.student_content if side == "student" else case.teacher_content
    layout = case.student_layout if side == "student" else case.teacher_layout
    dtype = getattr(torch, case.student_dtype if side == "student" else case.teacher_dtype)
    rows = case.rows
    if layout == "expanded" and rows and not (side == "student" and case.inplace):
        base = _fill(content, (1, *rows[1:], vocab), dtype, generator)
        return base.expand(*rows, vocab)
    values = _fill(content, (*rows, vocab), dtype, generator)
    if layout == "sliced":  # rows further apart than they are long, and misaligned
        padded = torch.full((*rows, vocab + 3), torch.nan, dtype=dtype)
        padded[..., 1:-2] = values
        return padded[..., 1:-2]
    if layout == "transposed" and len(rows) > 1:
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    return values


def _fill(
    content: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Values that find bugs: each kind has broken a selection or a softmax somewhere."""
    normal = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    chance = torch.rand(shape, generator=generator)
    ramp = torch.linspace(-8, 8, shape[-1], dtype=torch.float64).expand(shape)
    if content == "equal":
        values = torch.full(shape, 1.25, dtype=torch.float64)
    elif content == "ascending":
        values = ramp.clone()
    elif content == "descending":
        values = -ramp
    elif content == "clustered":
        near = (torch.arange(shape[-1]) // 50) % 4 == 1
        values = torch.where(near, normal * 0.01 + 9, normal)
    elif content == "quantised":
        values = (normal / 2).round()
    elif content == EXACT:
        values = (normal / 3).round().clamp(-1, 1)
    elif content == "half_neg_inf":
        values = normal.masked_fill(chance < 0.5, -torch.inf)
    elif content == "neg_inf":
        values = torch.full(shape, -torch.inf, dtype=torch.float64)
    elif content == "nan":
        signed = torch.where(torch.rand(shape, generator=generator) < 0.5, torch.nan, -torch.nan)
        values = torch.where(chance < 0.02, signed.double(), normal)
    elif content == "pos_inf":
        values = normal.masked_fill(chance < 0.02, torch.inf)
    elif content == "zeros":
        values = torch.where(chance < 0.5, 0.0, -0.0).double()
    elif content == "extreme":
        largest = torch.finfo(dtype).max
        values = torch.where(chance < 0.1, largest, torch.where(chance > 0.9, -largest, normal))
    elif content == "offset":
        values = normal + 200
    else:
        values = normal
    return values.to(dtype)


def _support(case: Case, generator: torch.Generator) -> TopK:
    """A support as servers and caches hand it over: any order, duplicates, bad ids, -inf."""
    shape = (*case.rows, case.k)
    ids = torch.randint(0, case.student_vocab, shape, generator=generator)
    chance = torch.rand(shape, generator=generator)
    ids = ids.masked_fill(chance < 0.1, -1).masked_fill(chance > 0.95, case.student_vocab + 3)
    if case.teacher == "topk_int64":
        ids = torch.where((chance > 0.90) & (chance < 0.95), ids + 2**32, ids)
    else:
        ids = ids.to(torch.int32)
    content = case.teacher_content
    logits = _fill(content, shape, getattr(torch, case.teacher_dtype), generator)
    return TopK(ids, logits)


def _family(case: Case, inputs: Inputs, generator: torch.Generator) -> dict[str, Any]:
    """The keywords of ``topk_divergence``; makes a served support of the teacher's logits."""
    family: dict[str, Any] = {
        "divergence": _divergence(case, generator),
        "outside": case.outside,
        "support": case.support,
        "include_token": case.include_token,
        "token_ids": None if case.token == "none" else _tokens(case, inputs, generator),
        "background": case.background,
    }
    if case.logsumexp != "none":
        family["student_logsumexp"] = _student_logsumexp(case, inputs)
    if case.teacher in ("topk_int32", "topk_int64"):
        assert isinstance(inputs.teacher, Tensor)
        inputs.teacher = _served(case, inputs, family["token_ids"], generator)
    return family


def _student_logsumexp(case: Case, inputs: Inputs) -> Tensor:
    """What a pass for log-probs has found; masked rows are NaN."""
    temperature = inputs.options["temperature"]
    if isinstance(temperature, Tensor):
        temperature = temperature.double()[..., None]
    found = (inputs.student[..., : case.vocab_size] / temperature).logsumexp(-1)
    if inputs.options["mask"] is not None:
        found = found.masked_fill(inputs.options["mask"] == 0, torch.nan)
    return found.to(getattr(torch, case.logsumexp))


def _divergence(case: Case, generator: torch.Generator) -> Divergence:
    """The member. Its numbers are exact in every dtype, as its rows' weights are."""
    rows = torch.randint(0, 17, (4, *case.rows), generator=generator) / 8
    gate = (torch.rand(case.rows, generator=generator) < 0.5).float()
    made = {
        "reverse_kl": lambda: divergences.reverse_kl(),
        "forward_kl": lambda: divergences.forward_kl(),
        "jsd": lambda: divergences.jsd(case.beta),
        "mixed": lambda: divergences.mixed(0.25),
        "skew_reverse_kl": lambda: divergences.skew_reverse_kl(case.beta),
        "skew_forward_kl": lambda: divergences.skew_forward_kl(case.beta),
        "all": lambda: Divergence(0.5, 0.25, 1.5, 0.75, case.beta),
        "gate": lambda: Divergence(reverse=1.0, forward=gate),
        "rows": lambda: Divergence(rows[0], rows[1], rows[2], rows[3], case.beta),
        "reverse_rows": lambda: Divergence(reverse=rows[0]),
    }[case.divergence]()
    return made._replace(
        stop_ratio=case.stop_ratio, log_ratio_clip=case.clip, logp_floor=case.floor
    )


def _tokens(case: Case, inputs: Inputs, generator: torch.Generator) -> Tensor:
    """A token of each row that the student may have sampled, -100 in masked rows."""
    width = (
        case.student_vocab if case.vocab_size is None else min(case.student_vocab, case.vocab_size)
    )
    student, teacher = inputs.student[..., :width].double(), inputs.teacher
    assert isinstance(teacher, Tensor)
    wanted = torch.ones(student.shape, dtype=torch.bool)
    shared = min(width, teacher.shape[-1])
    if case.token == "likely":
        best = teacher[..., :shared].double().nan_to_num(nan=torch.inf).argmax(-1, keepdim=True)
        wanted = torch.zeros_like(wanted).scatter_(-1, best, True)
    elif case.token == "banned" and inputs.options["banned_ids"] is not None:
        banned = torch.as_tensor(inputs.options["banned_ids"], dtype=torch.long)
        wanted[:] = torch.isin(torch.arange(width), banned)
    elif case.token == "unlikely":
        wanted[..., :shared] = teacher[..., :shared] == -torch.inf
    chance = torch.rand(student.shape, generator=generator, dtype=torch.float64)
    # Nobody samples what has no probability.
    possible = chance + (student > -torch.inf) * 2 + (wanted & (student > -torch.inf)) * 2
    tokens = possible.argmax(-1)
    if case.token == "outside":
        gone = torch.rand(case.rows, generator=generator) < 0.5
        tokens = tokens.masked_fill(gone, case.student_vocab + 2 if case.seed % 3 else -100)
    if inputs.options["mask"] is not None:
        tokens = tokens.masked_fill(inputs.options["mask"] == 0, -100)
    return tokens.to(torch.int32 if case.seed % 2 else torch.int64)


def _served(case: Case, inputs: Inputs, tokens: Tensor | None, generator: torch.Generator) -> TopK:
    """The teacher's logits as a server hands them over: any order, repeats, gaps, and the rest."""
    logits, k = inputs.teacher, case.k
    assert isinstance(logits, Tensor)
    noisy = logits.double().nan_to_num(nan=torch.inf) + torch.randn(
        logits.shape, generator=generator, dtype=torch.float64
    )
    listed = min(k, logits.shape[-1])
    ids = noisy.topk(listed).indices
    ids = ids[..., torch.randperm(listed, generator=generator)]
    ids = torch.nn.functional.pad(ids, (0, k - listed), value=-1)
    chance = torch.rand(ids.shape, generator=generator)
    ids = torch.where(chance > 0.95, ids.roll(1, -1), ids)  # listed twice
    ids = ids.masked_fill(chance < 0.1, -1)
    values = logits.gather(-1, ids.clamp(min=0))
    values = values.masked_fill(ids < 0, -1e4 if case.seed % 2 else -torch.inf)

    temperature = inputs.options.get("teacher_temperature", inputs.options["temperature"])
    temperature = temperature if isinstance(temperature, float) else 1.0
    dtype = torch.float64 if case.teacher_dtype == "float64" else torch.float32
    scaled = logits.double() / temperature
    rest = torch.nn.functional.pad(scaled, (0, 1))
    rest = rest.scatter(-1, ids.masked_fill(ids < 0, logits.shape[-1]), -torch.inf)
    rest[..., -1] = -torch.inf
    whole, tail = scaled.logsumexp(-1).to(dtype), rest.logsumexp(-1).to(dtype)
    carried = "both" if (whole == -torch.inf).any() else case.carried
    at = None
    if tokens is not None:
        inside = (tokens >= 0) & (tokens < logits.shape[-1])
        at = logits.gather(-1, tokens.long().where(inside, 0)[..., None])[..., 0]
        at = at.masked_fill(~inside, -torch.inf)
    return TopK(
        ids.to(torch.int32 if case.teacher == "topk_int32" else torch.int64),
        values,
        None if carried == "tail" else whole,
        None if carried == "logsumexp" else tail,
        at,
        temperature,
    )


def _bring_close(student: Tensor, teacher: Tensor | TopK, generator: torch.Generator) -> None:
    """Makes the student the teacher with noise and an offset, unless rows share memory."""
    if 0 in student.stride() or not student.numel():
        return
    noise = torch.randn(student.shape, generator=generator, dtype=torch.float64) * 1e-3 + 5
    near = noise.clone()
    if isinstance(teacher, TopK):
        ids, values = teacher.ids.long(), teacher.logits.double()
        inside = (ids >= 0) & (ids < student.shape[-1])
        near.scatter_add_(-1, ids.where(inside, 0), values.where(inside, 0.0))
    else:
        shared = min(student.shape[-1], teacher.shape[-1])
        near[..., :shared] += teacher[..., :shared].double()
    student.copy_(near.to(student.dtype))


def _mask(case: Case, generator: torch.Generator) -> Tensor | None:
    chance = torch.rand(case.rows, generator=generator)
    masks = {
        "none": None,
        "bool": chance < 0.6,
        "integer": (chance < 0.6).long() * 3,
        "all": torch.ones(case.rows, dtype=torch.bool),
        "nothing": torch.zeros(case.rows, dtype=torch.bool),
    }
    return masks[case.mask]


def _temperature(case: Case, kind: str, generator: torch.Generator) -> float | Tensor:
    values = torch.rand(case.rows, generator=generator) * 3 + 0.2
    one = float(torch.rand((), generator=generator)) * 3 + 0.2
    kinds: dict[str, float | Tensor] = {
        "one": 1.0,
        "float": one,
        "scalar": torch.tensor(one),
        "rows": values,
    }
    return kinds[kind]


def _weight(case: Case, mask: Tensor | None, generator: torch.Generator) -> Tensor | None:
    values = torch.rand(case.rows, generator=generator) * 2
    if case.weight == "none":
        return None
    if case.weight == "poisoned" and mask is not None:
        values = values.masked_fill(mask == 0, torch.nan)
    return values


def _banned(case: Case, generator: torch.Generator) -> list[int] | Tensor | None:
    vocab = case.teacher_vocab
    permutation = torch.randperm(vocab, generator=generator)
    if case.banned == "none":
        return None
    if case.banned == "few":
        return [int(i) for i in permutation[:3]]
    if case.banned == "half":
        return permutation[: vocab // 2].to(torch.int32)
    if case.banned == "all":
        return torch.arange(vocab)
    return [-1, vocab + 5, 2**40]


def _upstream(case: Case, mask: Tensor | None, generator: torch.Generator) -> Tensor | None:
    if case.reduction != "none":
        return None
    dtype = (
        torch.float64 if "float64" in (case.student_dtype, case.teacher_dtype) else torch.float32
    )
    if case.upstream == "random":
        values = torch.randn(case.rows, generator=generator, dtype=dtype)
        return values if mask is None else values.masked_fill(mask == 0, torch.nan)
    value = {"one": 1.0, "stride0": 1.5, "zero": 0.0}[case.upstream]
    if case.upstream == "stride0":
        return torch.tensor(value, dtype=dtype).expand(case.rows)
    return torch.full(case.rows, value, dtype=dtype)


def _poison_masked_rows(logits: Tensor, mask: Tensor | None) -> None:
    """Writes NaN into rows that must not be read, unless rows share memory."""
    if mask is not None and 0 not in logits.stride() and logits.numel():
        logits[mask == 0] = torch.nan
