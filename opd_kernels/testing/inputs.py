"""``Case``, a call described by names and a seed, and the tensors that it stands for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from opd_kernels.backends.plain import shaped
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
# of them keep float32 sums finite, or make them infinite or NaN as float64 does.
HIDDEN_CONTENTS = ("normal", "equal", "quantised", "zeros", "nan", "half_neg_inf", "offset")
HIDDEN_SIZES = (1, 3, 16, 17, 64, 100)
HEADS = ("plain", "bias", "scale", "softcap", "all")
MASKS = ("none", "bool", "integer", "all", "nothing")
TEMPERATURES = ("one", "float", "scalar", "rows")
WEIGHTS = ("none", "uniform", "poisoned")
BANS = ("none", "few", "half", "outside", "all")
NORMALIZERS = ("none", "float", "tensor")
UPSTREAMS = ("one", "stride0", "random", "zero")


@dataclass(frozen=True)
class Case:
    """One call of ``topk_rkl``, described by names and a seed.

    With a ``hidden`` size it is a call of ``linear_topk_rkl``. Then fields about the student's
    logits are about its hidden states, and the teacher may be "linear": hidden states and a head.
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
    frozen: bool = False
    seed: int = 0


@dataclass
class Head:
    """A student that is hidden states (..., H) and a head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None


@dataclass
class Inputs:
    """The tensors of a case and the keyword arguments of the call.

    ``student`` and ``teacher`` are logits or a support. If the call gets a head instead, they are
    the head's logits in float64.
    """

    student: Tensor
    teacher: Tensor | TopK
    k: int
    wide: bool  # computed in float64
    options: dict[str, Any] = field(default_factory=dict)
    upstream: Tensor | None = None
    head: Head | None = None
    teacher_head: LinearLogits | None = None


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """The case's tensors, the same ones every time."""
    generator = torch.Generator().manual_seed(case.seed)
    student = _logits(case, "student", generator)
    teacher: Tensor | TopK = _logits(case, "teacher", generator)
    if case.teacher in ("topk_int32", "topk_int64"):
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
    if not isinstance(teacher, TopK):
        _poison_masked_rows(teacher, options["mask"])
    _poison_masked_rows(student, options["mask"])
    wide = case.student_dtype == "float64" or case.teacher_dtype == "float64"
    inputs = Inputs(student, teacher, case.k, wide, options, upstream)
    if case.hidden:
        _make_heads(case, inputs, generator)
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
    inputs.student, inputs.head = shaped(logits, head.scale, head.softcap), head


def _student_head(case: Case, inputs: Inputs, generator: torch.Generator) -> Head:
    """A head for the hidden states; its rows that must not be read are NaN."""
    hidden, vocab, dtype = inputs.student, case.student_vocab, inputs.student.dtype
    normal = torch.randn(vocab, case.hidden + 3, generator=generator, dtype=torch.float64)
    weight = (normal * case.hidden**-0.5).to(dtype)[:, 1:-2]
    if case.seed % 2:
        weight = weight.contiguous()
    bias = torch.randn(2 * vocab, generator=generator).to(dtype)[::2]
    for rows in (weight, bias):
        rows[allowed_below(case) :] = torch.nan
        banned = inputs.options["banned_ids"]
        ids = torch.as_tensor([] if banned is None else banned, dtype=torch.long)
        rows[ids[(ids >= 0) & (ids < vocab)]] = torch.nan
    chosen = HEADS[1:4] if case.head == "all" else (case.head,)
    return Head(
        hidden,
        weight,
        bias if "bias" in chosen else None,
        0.625 if "scale" in chosen else 1.0,
        5.0 if "softcap" in chosen else None,
    )


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
