"""The small tasks' words, and the two tokenizers that do not quite agree about the special ones.

Both tokenizers split at spaces and share all ordinary words. They differ as those of real pairs do:
the student ends a turn with ``<|im_end|>``, the teacher nearly always with ``<|endoftext|>``; the
teacher opens turns with ``<think>``, an id that is reserved and meaningless to the student.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, USER, ASSISTANT = "<pad>", "<user>", "<assistant>"
STUDENT_END, TEACHER_END = "<|im_end|>", "<|endoftext|>"
THINK, RESERVED = "<think>", "<|reserved_0|>"

STEPS = "a b c d e".split()
ROOMS = "kitchen hall garden cellar study attic library garage bedroom pantry".split()
ITEMS = "lamp key book rope coin ring map apple".split()
CONTAINERS = "box chest drawer bag".split()
# What a writer may say or leave out: the entropy of the tasks' language.
OPENERS = "so then next now well first thus ok still hence".split()
COMMON = [
    *"0 1 2 3 4 5 6 7 8 9 + - = . , ; answer goal put in east west wall held".split(),
    *"need go open take drop it here closed".split(),
]
WORDS = [PAD, USER, ASSISTANT, STUDENT_END, TEACHER_END, THINK]
WORDS += [*COMMON, *OPENERS, *STEPS, *ROOMS, *ITEMS, *CONTAINERS]

IDS = {word: i for i, word in enumerate(WORDS)}
STOP_IDS = [IDS[STUDENT_END], IDS[TEACHER_END]]
# Rows of the models' embeddings, padded as embeddings usually are: more than there are words, and
# more in the teacher than in the student.
STUDENT_VOCAB, TEACHER_VOCAB = 96, 128
# Words beyond all of these rows: what a language of a thousand words fills its sentences with.
FILLERS = [f"filler{i}" for i in range(896)]
FILLED_VOCAB = TEACHER_VOCAB + len(FILLERS)
_ALL_IDS = {**IDS, **{word: TEACHER_VOCAB + i for i, word in enumerate(FILLERS)}}
_ALL_WORDS = {i: word for word, i in _ALL_IDS.items()}


def encode(words: Iterable[str]) -> list[int]:
    """Ids of words."""
    return [_ALL_IDS[word] for word in words]


def decode(ids: Iterable[int]) -> list[str]:
    """Words of ids; padding rows of the embedding, which a model may sample, are ``?``."""
    return [_ALL_WORDS.get(i, "?") for i in ids]


def _tokenizer(ids: dict[str, int], special: list[str], end: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=end,
        additional_special_tokens=[USER, ASSISTANT, *special],
    )


def student_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer as the student was trained with it."""
    ids = {RESERVED if word == THINK else word: i for word, i in IDS.items()}
    return _tokenizer(ids, [TEACHER_END, RESERVED], STUDENT_END)


def teacher_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer as the teacher was trained with it."""
    return _tokenizer(IDS, [STUDENT_END, THINK], TEACHER_END)
