"""Random cases, whatever draws the numbers, and the program that repeats one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

from opd_kernels.divergences import OUTSIDE
from opd_kernels.testing import inputs
from opd_kernels.testing.inputs import Case

T = TypeVar("T")

DTYPES = ("float32", "bfloat16", "float16")
WIDE_DTYPES = (*DTYPES, "float64")
# Sizes around those of registers, groups and blocks of groups, where loops take other branches.
_EDGES = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257, 1024, 2047, 2048, 2049, 4096)

# Most heads hold numbers.
_POISONS = (*("none",) * len(inputs.POISONS), *inputs.POISONS[1:])

# Vocabularies of real models, with contents that are hard for a selection or a softmax.
REAL_WIDTHS = (
    Case(
        student_vocab=151936,
        teacher_vocab=151936,
        k=32,
        student_dtype="bfloat16",
        teacher_dtype="bfloat16",
    ),
    Case(
        student_vocab=128256,
        teacher_vocab=128256,
        k=64,
        teacher_content="ascending",
        mask="bool",
        temperature="rows",
        banned="few",
        inplace=True,
    ),
    Case(
        student_vocab=151936,
        teacher_vocab=152064,
        k=100,
        student_dtype="bfloat16",
        teacher_dtype="float16",
        teacher_content="quantised",
        teacher_layout="sliced",
        vocab_size=151669,
        reduction="none",
        upstream="random",
    ),
    Case(
        student_vocab=256000,
        teacher_vocab=256000,
        k=16,
        student_content="extreme",
        teacher_content="nan",
        student_layout="sliced",
        temperature="float",
        weight="uniform",
    ),
    Case(
        student_vocab=32000,
        teacher_vocab=32000,
        k=1000,
        student_dtype="float16",
        teacher_dtype="float16",
        teacher_content="clustered",
        banned="half",
    ),
    Case(
        student_vocab=151936,
        teacher_vocab=151936,
        k=32,
        student_dtype="bfloat16",
        teacher_dtype="bfloat16",
        student_content="half_neg_inf",
        teacher_content="equal",
        inplace=True,
    ),
)


class Source(Protocol):
    """Where random numbers come from; ``random.Random`` is one."""

    def choice(self, seq: Sequence[T], /) -> T:
        """One of them."""

    def randint(self, a: int, b: int, /) -> int:
        """An integer from a to b."""


def draw_case(
    source: Source,
    float64: bool = True,
    max_vocab: int = 5000,
    only: Mapping[str, tuple[Any, ...]] | None = None,
) -> Case:
    """Draws a case. A source that can shrink shrinks towards the default case.

    ``only`` restricts choices by name; for "vocab" and "k" it gives a range. A case is ``watched``
    if it says so.
    """
    only = only or {}
    draw = source.choice

    def one_of(name: str, *choices: Any) -> Any:
        return draw(only.get(name, choices))

    def size(least: int, usual: int, most: int, special: Sequence[int]) -> int:
        kind = draw(("small", "special", "any"))
        if kind == "special":
            return draw(special)
        return source.randint(least, min(usual, most) if kind == "small" else most)

    linear = one_of("form", "logits", "logits", "linear") == "linear"
    dtypes = WIDE_DTYPES if float64 else DTYPES
    least, most = only.get("vocab", (1, max_vocab))
    edges = [edge for edge in _EDGES if least <= edge <= most] or [least]
    vocab = size(least, least + 199, most, edges)
    teacher_vocab = max(1, vocab + draw((0, 0, 0, 1, -1, 40)))
    k_least, k_most = only.get("k", (1, 1024))
    k = size(k_least, k_least + 39, k_most, [teacher_vocab])
    teacher = one_of("teacher", *inputs.TEACHERS)
    if linear and teacher == "logits":
        teacher = draw(("logits", "linear"))
    member = _draw_member(source, only, linear, teacher) if one_of("family", False, True) else {}
    k = min(k, k_most, k_most if teacher.startswith("topk") else teacher_vocab)
    if member.get("support") == "student":
        k = min(k, vocab)
    watched = "watched" in only and draw(only["watched"])
    joins = member.get("include_token") or member.get("outside") == "sample"
    stands = member.get("background") == "sampled"
    # Room for the token, and for that of a head's log-probs.
    k = max(1, min(k, k_most - bool(joins or stands) - (linear and watched)))
    full = member.get("outside", "renormalize") != "renormalize"
    student_dtypes = only.get("student_dtype", dtypes)
    teacher_dtypes = only.get("teacher_dtype", dtypes)
    student_contents: tuple[str, ...]
    student_contents = inputs.HIDDEN_CONTENTS if linear else inputs.STUDENT_CONTENTS
    if linear and full:
        teacher_dtypes = tuple(x for x in teacher_dtypes if x in DTYPES)
    if linear and member.get("support") == "student":
        student_contents = (inputs.EXACT,)  # other products have no exact order
    temperature = one_of("temperature", *inputs.TEMPERATURES)
    teacher_temperature = one_of("teacher_temperature", None, *inputs.TEMPERATURES)
    if teacher.startswith("topk") and member.get("outside", "renormalize") != "renormalize":
        # Its log-sum-exp is of one number.
        teacher_temperature = "float" if teacher_temperature == "float" else "one"
    reduction = draw(("mean", "sum", "none"))
    normalizer = draw(inputs.NORMALIZERS) if reduction == "mean" else "none"
    return Case(
        rows=draw(((3,), (1,), (), (0,), (5,), (2, 3), (3, 1), (2, 2, 2))),
        student_vocab=vocab,
        teacher_vocab=teacher_vocab,
        k=k,
        student_dtype=draw(student_dtypes),
        teacher_dtype=draw(teacher_dtypes),
        student_content=(
            draw(student_contents) if linear else one_of("student_content", *student_contents)
        ),
        teacher_content=one_of("teacher_content", *inputs.CONTENTS),
        student_layout=one_of("student_layout", *inputs.LAYOUTS),
        teacher_layout=one_of("teacher_layout", *inputs.LAYOUTS),
        teacher=teacher,
        mask=one_of("mask", *inputs.MASKS),
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        weight=one_of("weight", *inputs.WEIGHTS),
        banned=one_of("banned", *inputs.BANS),
        vocab_size=source.randint(least, vocab + 10) if draw((False, True)) else None,
        reduction=reduction,
        normalizer=normalizer,
        upstream=draw(inputs.UPSTREAMS) if reduction == "none" else "one",
        inplace=not linear and draw((False, True)),
        hidden=one_of("hidden", *inputs.HIDDEN_SIZES) if linear else 0,
        head=draw(inputs.HEADS) if linear else "plain",
        poison=draw(_POISONS) if linear else "none",
        frozen=linear and draw((False, True)),
        **member,
        watched=watched,
        seed=source.randint(0, 2**31),
    )


def _draw_member(
    source: Source, only: Mapping[str, tuple[Any, ...]], linear: bool, teacher: str
) -> dict[str, Any]:
    """The fields of a case that say which divergence it is of."""
    draw = source.choice

    def one_of(name: str, *choices: Any) -> Any:
        return draw(only.get(name, choices))

    outside = one_of("outside", *OUTSIDE)
    members = {"generalize": inputs.WITHOUT_SKEW, "sample": inputs.SAMPLED}
    tokens = inputs.TOKENS[outside == "sample" :]
    token = one_of("token", *tokens)
    include_token = token != "none" and outside != "sample" and draw((False, True))
    full = linear and outside != "renormalize"
    sampled = full and outside != "sample" and token != "none" and not include_token
    return {
        "divergence": one_of("divergence", *members.get(outside, inputs.MEMBERS)),
        "beta": one_of("beta", *inputs.BETAS),
        "stop_ratio": draw((False, True)),
        "clip": one_of("clip", *inputs.CLIPS),
        "floor": one_of("floor", *inputs.FLOORS),
        "outside": outside,
        # A TopK is a support of its own, and without its logits says nothing of other tokens.
        "support": "teacher" if teacher.startswith("topk") else one_of("support", *inputs.SUPPORTS),
        "token": token,
        "include_token": include_token,
        "carried": one_of("carried", *inputs.CARRIED),
        "background": one_of("background", *inputs.BACKGROUNDS) if sampled else "exact",
        "logsumexp": one_of("logsumexp", *inputs.SUMS) if full else "none",
    }


def snippet(case: Case, backend: str, device: str, error: BaseException) -> str:
    """A program that repeats a failing case."""
    reason = "\n".join(f"# {line}" for line in str(error).splitlines()[:6])
    return (
        f"# torch {torch.__version__}, opd_kernels backend {backend!r} on {device!r}\n{reason}\n"
        "from opd_kernels.testing import Case, check\n\n"
        f"check(\n    {case!r},\n    backend={backend!r},\n    device={device!r},\n)\n"
    )
