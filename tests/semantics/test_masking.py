"""Masks of positions against plain loops; tokenizers compared on small ones built here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedTokenizerFast

from opd_kernels import (
    compare_tokenizers,
    first_occurrences,
    predicting,
    response_mask,
    special_token_mask,
    token_ids,
    topk_rkl,
)

# Ids 0 to 7 of every tokenizer below.
WORDS = ["<unk>", "<", "think", ">", "</", "a", "b", "c"]


def tokenizer(
    added: Sequence[tuple[str, bool]] = (),
    words: Sequence[str] = WORDS,
    chat_template: str | None = None,
    **roles: str,
) -> PreTrainedTokenizerFast:
    """Words, then added tokens (string, special), ids in this order."""
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    raw = Tokenizer(model)
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split("</", "isolated")]
    )
    raw.add_tokens([AddedToken(string, special=special) for string, special in added])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, **roles)
    made.chat_template = chat_template
    return made


# Qwen2.5-Instruct and a reasoning model made of its base, in small.
QWEN = [("<|endoftext|>", True), ("<|im_start|>", True), ("<|im_end|>", True)]
ENDOFTEXT, IM_START, IM_END, THINK, END_THINK = range(8, 13)
STUDENT = tokenizer(QWEN, eos_token="<|im_end|>", pad_token="<|endoftext|>")
REASONER = tokenizer(
    [*QWEN, ("<think>", False), ("</think>", False)],
    eos_token="<|endoftext|>",
    pad_token="<|endoftext|>",
)
# Another set of control tokens at the ids that the student has for its own.
RENAMED = tokenizer(
    [("<end>", True), ("<user>", False), ("<begin>", True), ("<think>", False)],
    eos_token="<end>",
    bos_token="<begin>",
)

tokens_and_mask = st.integers(0, 2**31).flatmap(
    lambda seed: st.builds(
        lambda rows, length, dtype: _draw(seed, rows, length, dtype),
        st.integers(0, 3),
        st.integers(0, 12),
        st.sampled_from([torch.int32, torch.int64]),
    )
)


def _draw(
    seed: int, rows: int, length: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-1, 5, (rows, length), generator=generator).to(dtype)
    return tokens, torch.rand(rows, length, generator=generator) < 0.7


# Positions


@given(
    drawn=tokens_and_mask,
    lengths=st.lists(st.integers(0, 14), min_size=3, max_size=3),
    eos=st.sampled_from([None, [], [2], [2, 3]]),
    attention=st.booleans(),
    one_length=st.booleans(),
)
def test_response_mask_is_that_of_a_loop(
    drawn: tuple[torch.Tensor, torch.Tensor],
    lengths: list[int],
    eos: list[int] | None,
    attention: bool,
    one_length: bool,
) -> None:
    tokens, present = drawn
    lengths = [lengths[0]] * 3 if one_length else lengths
    mask = response_mask(
        tokens,
        lengths[0] if one_length else torch.tensor(lengths[: len(tokens)], dtype=torch.int64),
        eos_ids=eos,
        attention_mask=present if attention else None,
    )
    expected = []
    for row, here, length in zip(tokens.tolist(), present.tolist(), lengths, strict=False):
        flags, ended = [], False
        for t, token in enumerate(row):
            flags.append(t >= length and not ended and (here[t] or not attention))
            ended |= flags[-1] and token in (eos or [])
        expected.append(flags)
    assert mask.dtype == torch.bool
    assert mask.shape == tokens.shape
    assert mask.tolist() == expected


def test_response_mask_includes_the_first_end_and_nothing_behind_it() -> None:
    tokens = torch.tensor([[9, 2, 5, 2, 2, 6]])
    assert response_mask(tokens, 2, eos_ids=2).int().tolist() == [[0, 0, 1, 1, 0, 0]]


def test_an_end_in_the_prompt_ends_nothing() -> None:
    tokens = torch.tensor([[2, 2, 5, 6]])
    assert response_mask(tokens, 2, eos_ids=[2]).int().tolist() == [[0, 0, 1, 1]]


def test_attention_mask_tells_padding_from_an_end_of_the_same_id() -> None:
    tokens, attention = torch.tensor([[9, 5, 2, 2]]), torch.tensor([[1, 1, 0, 0]])
    kept = response_mask(tokens, 1, eos_ids=[2], attention_mask=attention)
    assert kept.int().tolist() == [[0, 1, 0, 0]]


def test_response_mask_of_one_sequence_and_of_batches_of_batches() -> None:
    tokens = torch.arange(24).view(2, 3, 4)
    assert response_mask(tokens[0, 0], 1, eos_ids=torch.tensor([2])).tolist() == [0, 1, 1, 0]
    lengths = torch.arange(6).view(2, 3)
    assert response_mask(tokens, lengths).sum(-1).tolist() == [[4, 3, 2], [1, 0, 0]]


def test_response_mask_may_be_written_to() -> None:
    mask = response_mask(torch.zeros(2, 3, dtype=torch.int64), 1)
    mask[0, 1] = False
    assert mask.int().tolist() == [[0, 0, 1], [0, 1, 1]]


@given(drawn=tokens_and_mask, integer=st.booleans())
def test_predicting_marks_the_position_before(
    drawn: tuple[torch.Tensor, torch.Tensor], integer: bool
) -> None:
    _, mask = drawn
    shifted = predicting(mask.int() if integer else mask)
    assert shifted.dtype == torch.bool
    assert shifted.tolist() == [row[1:] + [False] * bool(row) for row in mask.tolist()]


@given(
    drawn=tokens_and_mask,
    ids=st.lists(st.integers(-1, 6), max_size=4),
    masked=st.booleans(),
    as_tensor=st.booleans(),
)
def test_first_occurrences_are_those_of_a_loop(
    drawn: tuple[torch.Tensor, torch.Tensor], ids: list[int], masked: bool, as_tensor: bool
) -> None:
    tokens, mask = drawn
    found = first_occurrences(
        tokens,
        torch.tensor(ids, dtype=torch.int64) if as_tensor else ids,
        mask=mask if masked else None,
    )
    expected = torch.zeros_like(mask)
    for b in range(len(tokens)):
        for i in set(ids):
            hits = (tokens[b] == i) & (mask[b] | (not masked))
            expected[b, hits.nonzero()[:1]] = True
    assert found.dtype == torch.bool
    assert torch.equal(found, expected)
    if masked:
        assert torch.equal(special_token_mask(tokens, ids, mask=mask), mask & ~expected)


def test_first_occurrence_in_the_prompt_does_not_count_for_the_response() -> None:
    tokens, mask = torch.tensor([[7, 5, 7, 7]]), torch.tensor([[0, 1, 1, 1]])
    assert special_token_mask(tokens, [7], mask=mask).int().tolist() == [[0, 1, 0, 1]]


def test_the_largest_and_smallest_ids_are_found_once() -> None:
    for dtype in (torch.int32, torch.int64):
        info = torch.iinfo(dtype)
        tokens = torch.tensor([info.max, 0, info.max, info.min + 1, 0, info.min + 1], dtype=dtype)
        found = first_occurrences(tokens, [info.min + 1, info.max])
        assert found.int().tolist() == [1, 0, 0, 1, 0, 0]


def test_one_sequence_is_a_batch_of_one() -> None:
    assert first_occurrences(torch.tensor([3, 3, 4]), [3, 4]).int().tolist() == [1, 0, 1]


def test_masks_read_no_value_on_the_host() -> None:
    with FakeTensorMode():
        tokens, ids = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
        mask = response_mask(tokens, tokens[:, 0], eos_ids=ids, attention_mask=tokens)
        mask = predicting(special_token_mask(tokens, ids, mask=mask))
        assert mask.shape == (2, 5)


# Tokenizers


def test_ids_of_strings_come_once_and_in_order() -> None:
    assert token_ids(STUDENT, ["think", "<", "think", "<|im_end|>"]) == [2, 1, IM_END]


def test_a_string_of_several_tokens_gives_all_their_ids() -> None:
    assert token_ids(STUDENT, ["<think>"]) == [1, 2, 3]
    assert token_ids(REASONER, ["<think>"]) == [THINK]


def test_no_special_tokens_are_added_to_strings() -> None:
    class Adds:
        unk_token_id = None

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [0, 5] if add_special_tokens else [5]

    assert token_ids(Adds(), ["x"]) == [5]


def test_a_string_that_the_tokenizer_does_not_know_raises() -> None:
    with_unknown = tokenizer(QWEN, unk_token="<unk>")
    with pytest.raises(ValueError, match="'zebra' becomes the tokenizer's unknown token"):
        token_ids(with_unknown, ["a", "zebra"])
    assert token_ids(with_unknown, ["a", "<unk>"]) == [5, 0]


def test_a_tokenizer_is_identical_to_itself_and_nothing_is_left_out() -> None:
    found = compare_tokenizers(STUDENT, tokenizer(QWEN, eos_token="<|im_end|>",
                                                  pad_token="<|endoftext|>"))  # fmt: skip
    assert found.identical
    assert found.masked_ids == found.banned_ids == ()
    assert found.vocab_size == found.same_ids == found.student_size == found.teacher_size == 11
    assert "identical" in found.report()
    assert found.report() == str(found)


def test_an_added_token_of_the_teacher_is_banned_and_above_the_vocabulary() -> None:
    teacher = tokenizer([*QWEN, ("<think>", False)], eos_token="<|im_end|>")
    found = compare_tokenizers(STUDENT, teacher)
    assert not found.identical
    assert found.banned_ids == found.teacher_only_ids == (THINK,)
    assert found.masked_ids == ()
    assert found.vocab_size == 11


def test_an_added_token_of_the_student_is_masked_and_banned() -> None:
    student = tokenizer([*QWEN, ("<think>", False)], eos_token="<|im_end|>")
    found = compare_tokenizers(student, STUDENT)
    assert found.masked_ids == found.banned_ids == found.student_only_ids == (THINK,)
    assert found.vocab_size == 11


def test_ends_that_differ_are_masked_and_banned() -> None:
    found = compare_tokenizers(STUDENT, REASONER)
    assert found.masked_ids == (ENDOFTEXT, IM_END)
    assert found.banned_ids == (ENDOFTEXT, IM_END, THINK, END_THINK)
    assert found.vocab_size == 11
    for fragment in ("eos: 10 '<|im_end|>'", "8 '<|endoftext|>'", "when to stop"):
        assert fragment in found.report()


def test_an_end_that_the_student_does_not_have_is_banned_and_cannot_be_masked() -> None:
    teacher = tokenizer([*QWEN, ("<end>", True)], eos_token="<end>")
    found = compare_tokenizers(STUDENT, teacher)
    assert found.masked_ids == (IM_END,)
    assert found.banned_ids == (IM_END, 11)


def test_the_report_lists_what_is_one_token_to_the_teacher_alone() -> None:
    report = compare_tokenizers(STUDENT, REASONER).report()
    assert "One token to the teacher, text to the student: '<think>'; '</think>'." in report
    assert "One token" not in compare_tokenizers(REASONER, STUDENT).report()
    knows_one = tokenizer([*QWEN, ("</think>", False)], eos_token="<|im_end|>")
    assert "student: '<think>'." in compare_tokenizers(knows_one, REASONER).report()
    special = tokenizer([*QWEN, ("<think>", True)], eos_token="<|im_end|>")
    assert "One token" not in compare_tokenizers(STUDENT, special).report()


def test_ids_with_other_strings_are_masked_and_banned_and_later_ids_kept() -> None:
    shared = [("<fim>", True)]
    student = tokenizer([*QWEN, ("<box>", True), *shared], eos_token="<|im_end|>")
    teacher = tokenizer(
        [("<end>", True), ("<user>", False), ("<begin>", True), ("<think>", False), *shared],
        eos_token="<end>",
        bos_token="<begin>",
    )
    found = compare_tokenizers(student, teacher)
    assert found.other_ids == found.masked_ids == found.banned_ids == (8, 9, 10, 11)
    assert found.vocab_size == 13
    assert "9 '<|im_start|>', '<user>'" in found.report()


def test_the_same_string_at_another_id_is_another_token() -> None:
    moved = tokenizer([QWEN[0], QWEN[2], QWEN[1]], eos_token="<|im_end|>")
    found = compare_tokenizers(STUDENT, moved)
    assert found.other_ids == (IM_START, IM_END)
    assert found.masked_ids == found.banned_ids == (IM_START, IM_END)
    assert found.vocab_size == 9


def test_a_token_special_to_the_teacher_and_a_word_to_the_student_is_banned() -> None:
    teacher = tokenizer([*QWEN, ("c", True)], eos_token="<|im_end|>")
    found = compare_tokenizers(STUDENT, teacher)
    assert found.banned_ids == (7,)
    assert found.masked_ids == ()
    assert compare_tokenizers(teacher, STUDENT).masked_ids == (7,)


def test_an_added_token_that_is_special_to_one_only_is_no_reason_to_leave_it_out() -> None:
    student = tokenizer([*QWEN, ("<tool>", False)], eos_token="<|im_end|>")
    teacher = tokenizer([*QWEN, ("<tool>", True)], eos_token="<|im_end|>")
    found = compare_tokenizers(student, teacher)
    assert not found.identical
    assert found.masked_ids == found.banned_ids == ()
    assert "Special to one of them only: 11 '<tool>'" in found.report()
    assert compare_tokenizers(teacher, student).masked_ids == ()


def test_a_word_that_one_of_them_has_added_is_the_same_token() -> None:
    added = tokenizer([*QWEN, ("c", False)], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    found = compare_tokenizers(STUDENT, added)
    assert found.identical
    assert found.masked_ids == found.banned_ids == ()


@pytest.mark.parametrize("role", ["pad_token", "bos_token"])
def test_other_padding_or_beginning_is_reported_and_leaves_nothing_out(role: str) -> None:
    student = tokenizer(QWEN, eos_token="<|im_end|>")
    teacher = tokenizer(QWEN, eos_token="<|im_end|>", **{role: "<|im_start|>"})
    found = compare_tokenizers(student, teacher)
    assert not found.identical
    assert found.masked_ids == found.banned_ids == ()
    assert f"{role[:3]}: none to the student, 9 '<|im_start|>' to the teacher" in found.report()


def test_one_end_that_has_other_strings_is_left_out_too() -> None:
    student = tokenizer([("<|im_end|>", True)], eos_token="<|im_end|>")
    teacher = tokenizer([("<end>", True)], eos_token="<end>")
    found = compare_tokenizers(student, teacher)
    assert found.masked_ids == found.banned_ids == (8,)


def test_gaps_between_ids_are_banned() -> None:
    class Gap:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1, "z": 4}

    found = compare_tokenizers(Gap(), Gap())
    assert found.identical
    assert found.vocab_size == 5
    assert found.banned_ids == (2, 3)
    assert "banned_ids, of which 2 are below that: 2; 3" in found.report()


def test_different_vocabularies_are_called_that() -> None:
    other = tokenizer(QWEN, words=["<unk>", *"tuvwxyz"], eos_token="<|im_end|>")
    found = compare_tokenizers(STUDENT, other)
    assert found.other_ids == tuple(range(1, 8))
    assert "THE VOCABULARIES ARE DIFFERENT: of 11 ids that both have, only 4" in found.report()
    assert "DIFFERENT" not in compare_tokenizers(STUDENT, RENAMED).report()


def test_nothing_in_common_leaves_no_vocabulary() -> None:
    class Only:
        def __init__(self, string: str) -> None:
            self.string = string

        def get_vocab(self) -> dict[str, int]:
            return {self.string: 0}

    found = compare_tokenizers(Only("a"), Only("b"))
    assert found.vocab_size == 0
    assert found.banned_ids == (0,)
    assert "no id can enter the support" in found.report()


def test_other_chat_templates_are_reported() -> None:
    with_template = tokenizer(QWEN, eos_token="<|im_end|>", chat_template="{{ messages }}")
    without = tokenizer(QWEN, eos_token="<|im_end|>")
    found = compare_tokenizers(without, with_template)
    assert found.identical
    assert "Chat templates differ" in found.report()
    assert "Chat templates" not in compare_tokenizers(without, without).report()


def test_what_is_left_out_is_what_the_loss_takes() -> None:
    found = compare_tokenizers(STUDENT, REASONER)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 5, 16, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 5, 24, generator=generator)
    topk_rkl(student, teacher, banned_ids=found.banned_ids, vocab_size=found.vocab_size).backward()
    touched = set(student.grad.flatten(0, 1).any(0).nonzero().flatten().tolist())
    assert touched == set(range(11)) - {ENDOFTEXT, IM_END}


X = torch.zeros(2, 3, dtype=torch.int64)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "tokens floating": (lambda: response_mask(X.float(), 1), TypeError, ["float32", "int64"]),
    "tokens a list": (lambda: response_mask([1], 1), TypeError, ["tokens", "list"]),
    "tokens scalar": (lambda: response_mask(X[0, 0], 0), ValueError, ["scalar", "(..., T)"]),
    "length negative": (lambda: response_mask(X, -1), ValueError, ["prompt_length", "-1", "0"]),
    "length beyond int64": (
        lambda: response_mask(X, 2**70),
        ValueError,
        ["prompt_length", str(2**70), "to 9223372036854775807"],
    ),
    "eos a bool": (lambda: response_mask(X, 1, eos_ids=True), TypeError, ["eos_ids is a bool"]),
    "length floating": (lambda: response_mask(X, 1.0), TypeError, ["prompt_length", "float"]),
    "length of floats": (
        lambda: response_mask(X, torch.ones(2)),
        TypeError,
        ["prompt_length", "float32"],
    ),
    "length's shape": (
        lambda: response_mask(X, X[0]),
        ValueError,
        ["prompt_length", "(3,)", "(2,)"],
    ),
    "attention's shape": (
        lambda: response_mask(X, 1, attention_mask=X[0]),
        ValueError,
        ["attention_mask", "(3,)", "(2, 3)"],
    ),
    "attention floating": (
        lambda: response_mask(X, 1, attention_mask=X.float()),
        TypeError,
        ["attention_mask", "float32", "!= 0"],
    ),
    "ids floating": (lambda: first_occurrences(X, [1.5]), TypeError, ["ids", "float32", "int64"]),
    "ids of strings": (lambda: first_occurrences(X, ["<"]), TypeError, ["ids", "ints"]),
    "ids' shape": (lambda: first_occurrences(X, X), ValueError, ["(2, 3)", "one dimension"]),
    "ids' device": (
        lambda: first_occurrences(X, X[0].to("meta")),
        ValueError,
        ["ids", "meta", "cpu"],
    ),
    "mask missing": (lambda: special_token_mask(X, [1], mask=None), TypeError, ["mask", "None"]),
    "mask's shape": (
        lambda: special_token_mask(X, [1], mask=X[:1]),
        ValueError,
        ["mask", "(1, 3)", "(2, 3)"],
    ),
    "predicting floats": (lambda: predicting(torch.ones(3)), TypeError, ["float32", "!= 0"]),
    "predicting a scalar": (lambda: predicting(X[0, 0]), ValueError, ["scalar", "(..., T)"]),
    "strings a string": (lambda: token_ids(STUDENT, "<think>"), TypeError, ["['<think>']"]),
    "string empty": (lambda: token_ids(STUDENT, ["a", ""]), ValueError, ["''", "no token"]),
    "no tokenizer": (
        lambda: compare_tokenizers(STUDENT, "name"),
        TypeError,
        ["teacher", "str", "get_vocab()"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_was_given_and_what_to_do(case: str) -> None:
    call, error, fragments = BAD[case]
    with pytest.raises(error) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_a_slice_of_a_batch_is_no_reason_to_warn() -> None:
    tokens = torch.arange(24).view(4, 6)[:, 1:4]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    assert special_token_mask(tokens, [1, 8], mask=mask).sum() == 10
    assert response_mask(tokens, 0, eos_ids=[2]).sum() == 11


@pytest.mark.parametrize("end", [2, np.int64(2), torch.tensor(2), [2]])
def test_one_end_may_be_any_kind_of_integer(end: Any) -> None:
    mask = response_mask(torch.tensor([[1, 2, 3]]), 0, eos_ids=end)
    assert mask.tolist() == [[True, True, False]]


def of_vocab(*vocab: tuple[str, int], **attributes: Any) -> SimpleNamespace:
    return SimpleNamespace(get_vocab=lambda: dict(vocab), **attributes)


UNUSED = [("a", 0), ("[UNUSED_7]", 1), ("<|im_start|>", 1), ("b", 2)]


@pytest.mark.parametrize("order", [1, -1])
def test_an_id_with_two_strings_does_not_depend_on_their_order(order: int) -> None:
    one, other = of_vocab(*UNUSED), of_vocab(*UNUSED[::order])
    assert compare_tokenizers(one, other).identical
    for string in ("[UNUSED_7]", "<|im_start|>"):
        teacher = of_vocab(("a", 0), (string, 1), ("b", 2))
        for pair in ((other, teacher), (teacher, other)):
            found = compare_tokenizers(*pair)
            assert found.other_ids == found.banned_ids == (1,)
            assert "'<|im_start|>' or '[UNUSED_7]'" in found.report()


@pytest.mark.parametrize("order", [1, -1])
def test_an_id_with_two_strings_is_its_added_token(order: int) -> None:
    added = {1: AddedToken("<|im_start|>", special=True)}
    student = of_vocab(*UNUSED[::order], added_tokens_decoder=added)
    for vocab in (UNUSED, UNUSED[::-1], [("a", 0), ("<|im_start|>", 1), ("b", 2)]):
        assert compare_tokenizers(student, of_vocab(*vocab, added_tokens_decoder=added)).identical
    other = of_vocab(("a", 0), ("[UNUSED_7]", 1), ("b", 2))
    found = compare_tokenizers(student, other)
    assert found.masked_ids == found.banned_ids == found.other_ids == (1,)
    assert "1 '<|im_start|>', '[UNUSED_7]'" in found.report()


def test_an_added_token_that_the_vocabulary_lacks_is_one_of_its_ids() -> None:
    added = {3: AddedToken("<tool>")}
    student, teacher = of_vocab(("a", 0)), of_vocab(("a", 0), added_tokens_decoder=added)
    found = compare_tokenizers(student, teacher)
    assert found.banned_ids == found.teacher_only_ids == (3,)
    assert "text to the student: '<tool>'." in found.report()


ENDS = [IM_END, ENDOFTEXT]


@pytest.mark.parametrize("ends", [ENDS, tuple(ENDS), set(ENDS), torch.tensor(ENDS), ENDOFTEXT,
                                  np.array(ENDS), torch.tensor(ENDOFTEXT)], ids=str)  # fmt: skip
def test_all_ids_that_end_a_sequence_are_compared(ends: Any) -> None:
    found = compare_tokenizers(STUDENT, STUDENT, student_eos_ids=ends)
    assert not found.identical
    assert found.masked_ids == found.banned_ids == (ENDOFTEXT,)
    report = found.report()
    assert "eos: 8 '<|endoftext|>'; 10 '<|im_end|>' to the student, 10 '<|im_end|>'" in report
    assert "those of one alone (8) are masked and banned" in report
    assert "when to stop" not in report
    found = compare_tokenizers(STUDENT, STUDENT, teacher_eos_ids=ends)
    assert found.masked_ids == found.banned_ids == (ENDOFTEXT,)
    assert compare_tokenizers(
        STUDENT, STUDENT, student_eos_ids=ends, teacher_eos_ids=ENDS
    ).identical


def test_a_shared_end_is_left_alone_beside_others() -> None:
    found = compare_tokenizers(STUDENT, REASONER, student_eos_ids=[IM_END, ENDOFTEXT])
    assert IM_END in found.masked_ids
    assert IM_END in found.banned_ids
    assert ENDOFTEXT not in {*found.masked_ids, *found.banned_ids}


def test_a_tokenizer_may_have_several_ends() -> None:
    vocab = [("a", 0), ("b", 1), ("c", 2)]
    student, teacher = of_vocab(*vocab, eos_token_id=[2, 1]), of_vocab(*vocab, eos_token_id=1)
    assert compare_tokenizers(student, teacher).banned_ids == (2,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"student_eos_ids": "2"}, TypeError, "student_eos_ids is '2', expected an id, several or"),
        ({"teacher_eos_ids": [1, 2.5]}, TypeError, r"teacher_eos_ids is \[1, 2.5\], expected"),
        ({"teacher_eos_ids": True}, TypeError, "teacher_eos_ids is True"),
        ({"teacher_eos_ids": ["</s>"]}, TypeError, "teacher_eos_ids is .*</s>"),
        ({"student_eos_ids": [1, -1]}, ValueError, r"student_eos_ids is \[1, -1\], allowed are"),
    ],
)
def test_ends_that_are_no_ids_are_refused(
    options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compare_tokenizers(STUDENT, STUDENT, **options)


def test_a_role_with_several_ids_is_an_error_that_says_so() -> None:
    several = of_vocab(("a", 0), ("b", 1), pad_token_id=[0, 1])
    with pytest.raises(TypeError, match=r"student\.pad_token_id is \[0, 1\], expected one id"):
        compare_tokenizers(several, several)
    plain = of_vocab(("a", 0), ("b", 1), all_special_ids=None)
    assert compare_tokenizers(plain, plain).identical


@pytest.mark.parametrize(("i", "error"), [(2**70, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_a_vocabulary_of_what_are_no_ids_is_refused(i: Any, error: type[Exception]) -> None:
    class Broken:
        def get_vocab(self) -> dict[str, Any]:
            return {"a": 0, "b": i}

    with pytest.raises(error, match=r"get_vocab\(\)\['b'\] is"):
        compare_tokenizers(Broken(), STUDENT)
