"""What a tokenizer's ids mean: ids of strings, and two tokenizers compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from opd_kernels import _checks

__all__ = ["TokenizerComparison", "compare_tokenizers", "token_ids"]

ROLES = ("eos", "bos", "pad", "unk")
SHOWN = 8  # ids that a report lists of each kind
T = TypeVar("T")


def token_ids(tokenizer: Any, strings: Iterable[str]) -> list[int]:
    """The ids that strings become, each once, in the order in which they appear.

    Each string is encoded by itself: ``tokenizer.encode(string, add_special_tokens=False)``. A
    string that becomes several tokens gives all their ids. A tokenizer that marks the beginning of
    a word may give the string's id there instead of its id inside a text.

    ``tokenizer`` is one of ``transformers``, or anything with such an ``encode``.

    Errors: ``ValueError`` for a string that becomes nothing or contains an unknown token;
    ``TypeError`` for a single string in place of several.

    Example::

        ids = token_ids(tokenizer, ["<", "think", "<|im_end|>"])
        mask = special_token_mask(tokens, ids, mask=mask)
    """
    if isinstance(strings, (str, bytes)):
        raise TypeError(f"strings is {strings!r}, expected several; pass [{strings!r}]")
    unknown = getattr(tokenizer, "unk_token_id", None)
    found: dict[int, None] = {}
    for string in strings:
        ids = list(tokenizer.encode(string, add_special_tokens=False))
        if not ids:
            raise ValueError(f"{string!r} becomes no token; leave it out")
        if unknown in ids and string != getattr(tokenizer, "unk_token", None):
            raise ValueError(
                f"{string!r} becomes the tokenizer's unknown token; use strings that it knows"
            )
        found.update(dict.fromkeys(ids))
    return list(found)


@dataclass(frozen=True)
class TokenizerComparison:
    """What ``compare_tokenizers`` found, and what to do about it.

    ``masked_ids``, for ``special_token_mask``, are the student's special tokens that the teacher
    does not have or uses with another meaning: the loss leaves out their first occurrence.
    ``banned_ids`` and ``vocab_size``, for ``topk_rkl``, together keep all ids out of the support
    that do not mean the same to both. ``identical`` says that every id is the same string to both
    and the special tokens have the same roles; then only gaps are left out.

    The advice is made from the other fields: sizes (one past the largest id), how many ids are the
    same string to both, and the ids that are not. ``report()`` returns all of it as text.
    """

    masked_ids: tuple[int, ...]
    banned_ids: tuple[int, ...]
    vocab_size: int
    identical: bool
    student_size: int
    teacher_size: int
    same_ids: int
    other_ids: tuple[int, ...]
    student_only_ids: tuple[int, ...]
    teacher_only_ids: tuple[int, ...]
    findings: tuple[str, ...] = field(repr=False)

    def report(self) -> str:
        """What differs and what to do, a line each."""
        return "\n".join(self.findings)

    def __str__(self) -> str:
        """The report."""
        return self.report()


def compare_tokenizers(
    student: Any,
    teacher: Any,
    *,
    student_eos_ids: int | Iterable[int] | None = None,
    teacher_eos_ids: int | Iterable[int] | None = None,
) -> TokenizerComparison:
    """Where two tokenizers differ, and what the loss has to leave out.

    Both models' logits are compared id by id, so an id has to mean the same to both. With "control
    token" for special and added tokens (an added token may be ordinary to the tokenizer, as
    ``<think>`` often is)::

        same        ids that are the same string to both
        vocab_size  one past the largest of them
        ends        eos ids of one that are no eos ids of the other
        banned_ids  ids of either that are not in same, gaps below vocab_size, ends,
                    special tokens of the teacher that are no control tokens of the student
        masked_ids  ids of the student: control tokens that are not in same, special tokens that
                    are no control tokens of the teacher, ends

    Why ends are both masked and banned. Suppose that the position at which the student stopped were
    masked, but the id stayed in the support. Then only positions at which it went on would count,
    and it would learn never to stop. It would also learn to write the teacher's eos and go on after
    it. So the student learns to stop only from ids that end a sequence for both; without such an
    id, it learns nothing about stopping. If it may stop at the teacher's eos as well, remove that
    id from both lists.

    What this cannot see:

    - Models often have more rows than the tokenizer has tokens, and not equally many. Rows from
      ``vocab_size`` on are left out. If a model has fewer rows, its own limit holds.
    - Some tokens are one id to the teacher and text to the student, as ``<think>``, which the
      student may spell ``<``, ``think``, ``>``. The report lists those that are added and not
      special. The paper masks the first ``<`` and ``think``, see ``token_ids``.
    - Chat templates are compared as text, and a difference is reported. You decide which template
      each model's prompt has.

    An id with several strings, as ``[UNUSED_7]`` and ``<|im_start|>``, counts as its added token.
    Without an added token it is the same to both if all its strings are.

    ``student`` and ``teacher`` are tokenizers of ``transformers``, or have ``get_vocab()`` and as
    much of ``all_special_ids``, ``added_tokens_decoder``, ``eos_token_id``, ``bos_token_id``,
    ``pad_token_id``, ``unk_token_id`` and ``chat_template`` as there is. It reads both
    vocabularies, so call it once, before training.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's tokenizer.
        student_eos_ids: what ends a sequence of the student besides its tokenizer's eos: an id or
            several, as ``model.generation_config.eos_token_id`` has them. A tokenizer knows one.
        teacher_eos_ids: the same of the teacher.

    Errors: ``TypeError`` for something that has no ``get_vocab()``, as a processor, for ids that
    are not ints, and for several ids of a role other than eos; ``ValueError`` for negative ids.

    Example::

        comparison = compare_tokenizers(
            student_tokenizer,
            teacher_tokenizer,
            student_eos_ids=student.generation_config.eos_token_id,
            teacher_eos_ids=teacher.generation_config.eos_token_id,
        )
        print(comparison)
        mask = special_token_mask(tokens, comparison.masked_ids, mask=mask)
        loss = topk_rkl(student_logits, teacher_logits, mask=predicting(mask),
                        banned_ids=comparison.banned_ids, vocab_size=comparison.vocab_size)
    """
    ours = _Tokens.of(student, "student", student_eos_ids)
    theirs = _Tokens.of(teacher, "teacher", teacher_eos_ids)
    shared = ours.strings.keys() & theirs.strings.keys()
    same = {i for i in shared if ours.strings[i] == theirs.strings[i]}
    vocab_size = max(same, default=-1) + 1
    ends = ours.ends ^ theirs.ends
    unlike = (ours.strings.keys() | theirs.strings.keys() | set(range(vocab_size))) - same
    masked = (ours.control - same) | (ours.special - theirs.control) | (ends & ours.strings.keys())
    found = TokenizerComparison(
        masked_ids=tuple(sorted(masked)),
        banned_ids=tuple(sorted(unlike | (theirs.special - ours.control) | ends)),
        vocab_size=vocab_size,
        identical=ours == theirs,
        student_size=ours.size,
        teacher_size=theirs.size,
        same_ids=len(same),
        other_ids=tuple(sorted(shared - same)),
        student_only_ids=tuple(sorted(ours.strings.keys() - shared)),
        teacher_only_ids=tuple(sorted(theirs.strings.keys() - shared)),
        findings=(),
    )
    findings = [*_differences(found, ours, theirs), *_markers(ours, theirs)]
    if ours.chat_template != theirs.chat_template:
        findings.append(
            "Chat templates differ: decide in which of them each model sees the prompt."
        )
    return replace(found, findings=(*findings, *_advice(found, ours)))


@dataclass
class _Tokens:
    """What a tokenizer says about its ids. Two are equal if every id means the same."""

    strings: dict[int, tuple[str, ...]]
    special: set[int]
    control: set[int] = field(compare=False)
    roles: dict[str, tuple[int, ...]]
    chat_template: object = field(compare=False)

    @classmethod
    def of(cls, tokenizer: Any, name: str, eos_ids: Any) -> _Tokens:
        """Reads a tokenizer like those of transformers; ``eos_ids`` end a sequence as well."""
        if not hasattr(tokenizer, "get_vocab"):
            raise TypeError(
                f"{name} is a {type(tokenizer).__name__}, expected a tokenizer with get_vocab(); "
                "of a processor pass .tokenizer"
            )
        added = dict(getattr(tokenizer, "added_tokens_decoder", {}))
        strings = _strings_by_id(tokenizer.get_vocab(), added)
        special = strings.keys() & set(getattr(tokenizer, "all_special_ids", None) or ())
        special |= {i for i, token in added.items() if getattr(token, "special", False)}
        given = {role: f"{role}_token_id" for role in ROLES}
        roles = {
            role: _role_ids(getattr(tokenizer, option, None), f"{name}.{option}", role == "eos")
            for role, option in given.items()
        }
        further = _role_ids(eos_ids, f"{name}_eos_ids", several=True)
        roles["eos"] = tuple(sorted({*roles["eos"], *further}))
        return cls(
            strings=strings,
            special=special,
            control=special | added.keys(),
            roles=roles,
            chat_template=getattr(tokenizer, "chat_template", None),
        )

    @property
    def size(self) -> int:
        """One past the largest id."""
        return max(self.strings, default=-1) + 1

    @property
    def ends(self) -> set[int]:
        """The ids that end a sequence."""
        return set(self.roles["eos"])

    def show(self, i: int) -> str:
        """An id and its string."""
        return f"{i} {self.string(i)}" if i in self.strings else f"{i}"

    def string(self, i: int) -> str:
        """The string of an id, or all of its strings."""
        return " or ".join(map(repr, self.strings[i]))


def _strings_by_id(
    vocab: Mapping[str, int], added: Mapping[int, Any]
) -> dict[int, tuple[str, ...]]:
    """The strings of each id: its added token, or else all of them in order."""
    found: dict[int, list[str]] = {}
    for string, i in vocab.items():
        if type(i) is not int:
            _checks.check_int(i, f"get_vocab()[{string!r}]")
        if not 0 <= i < _checks.MAX_VOCAB:
            raise ValueError(
                f"get_vocab()[{string!r}] is {i}, allowed are ids from 0 to below 2**31 - 1"
            )
        found.setdefault(i, []).append(string)
    strings = {i: tuple(sorted(several)) for i, several in found.items()}
    # An id is decoded to its added token, whatever the base vocabulary says.
    contents = {i: getattr(token, "content", token) for i, token in added.items()}
    return strings | {i: (text,) for i, text in contents.items() if isinstance(text, str)}


def _role_ids(value: Any, name: str, several: bool) -> tuple[int, ...]:
    """The ids of a role, in order; ``value`` is None, an id or, with ``several``, many ids."""
    value = value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value
    if value is None:
        return ()
    many = several and isinstance(value, Iterable) and not isinstance(value, (str, bytes))
    ids = list(value) if many else [value]
    if not all(isinstance(i, Integral) and not isinstance(i, bool) for i in ids):
        allowed = "an id, several or None" if several else "one id or None"
        raise TypeError(f"{name} is {value!r}, expected {allowed}")
    if any(i < 0 for i in ids):
        raise ValueError(f"{name} is {value!r}, allowed are ids of 0 and more; leave it None")
    return tuple(sorted({int(i) for i in ids}))


def _differences(found: TokenizerComparison, ours: _Tokens, theirs: _Tokens) -> Iterator[str]:
    """How the ids differ, a line for each finding."""
    if found.identical:
        yield "The tokenizers are identical: the same ids, strings and special tokens."
        return
    shared = found.same_ids + len(found.other_ids)
    if 2 * found.same_ids <= shared:
        yield (
            f"THE VOCABULARIES ARE DIFFERENT: of {shared} ids that both have, only "
            f"{found.same_ids} mean the same. Comparing logits id by id makes no sense for this "
            "pair: choose a teacher with the student's vocabulary, or train on the teacher's text."
        )
    yield (
        f"Ids: the student has {len(ours.strings)} up to {found.student_size - 1}, the teacher "
        f"{len(theirs.strings)} up to {found.teacher_size - 1}; {found.same_ids} are the same "
        f"string to both, {len(found.other_ids)} another string, {len(found.student_only_ids)} "
        f"only the student's, {len(found.teacher_only_ids)} only the teacher's."
    )
    if found.other_ids:
        yield "Other strings (student, teacher): " + _listed(
            found.other_ids, lambda i: f"{ours.show(i)}, {theirs.string(i)}"
        )
    if found.student_only_ids:
        yield "Only the student's: " + _listed(found.student_only_ids, ours.show)
    if found.teacher_only_ids:
        yield "Only the teacher's: " + _listed(found.teacher_only_ids, theirs.show)
    flags = sorted(
        i for i in ours.special ^ theirs.special if i in ours.strings.keys() & theirs.strings.keys()
    )
    if flags:
        yield "Special to one of them only: " + _listed(flags, ours.show)
    for role in ROLES:
        if ours.roles[role] != theirs.roles[role]:
            yield (
                f"{role}: {_listed(ours.roles[role], ours.show)} to the student, "
                f"{_listed(theirs.roles[role], theirs.show)} to the teacher"
                f"{_about_ends(ours, theirs) if role == 'eos' else '.'}"
            )


def _about_ends(ours: _Tokens, theirs: _Tokens) -> str:
    """What happens to ids that end a sequence for one of the models only."""
    if ours.ends & theirs.ends:
        alone = _listed(sorted(ours.ends ^ theirs.ends), str)
        return f"; those of one alone ({alone}) are masked and banned."
    return "; all are masked and banned, so the student learns nothing about when to stop."


def _markers(ours: _Tokens, theirs: _Tokens) -> Iterator[str]:
    """Tokens of the teacher that the student has to spell."""
    known = {string for strings in ours.strings.values() for string in strings}
    ids = sorted((theirs.control - theirs.special) & theirs.strings.keys())
    markers = [string for i in ids for string in theirs.strings[i] if string not in known]
    if markers:
        yield (
            f"One token to the teacher, text to the student: {_listed(markers, repr)}. Where "
            "responses contain such, mask token_ids(student, [...]) of them as well."
        )


def _advice(found: TokenizerComparison, ours: _Tokens) -> Iterator[str]:
    """What to do, a line for each step."""
    if found.masked_ids:
        yield f"special_token_mask: ids {_listed(found.masked_ids, ours.show)}"
    if found.vocab_size == 0:
        yield "topk_rkl: no id can enter the support."
    elif found.banned_ids or not found.identical:
        below = [i for i in found.banned_ids if i < found.vocab_size]
        yield (
            f"topk_rkl: vocab_size={found.vocab_size} (or the rows of a model that has fewer) and "
            f"banned_ids, of which {len(below)} are below that: {_listed(below, ours.show)}"
        )


def _listed(items: Sequence[T], show: Callable[[T], str]) -> str:
    """The first few, and how many there are."""
    shown = "; ".join(show(item) for item in items[:SHOWN])
    return f"{shown}; ... ({len(items)})" if len(items) > SHOWN else shown or "none"
