"""Multiple-choice questions in words, in the shapes that files have them in."""

import itertools
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qlora_jax.config.question_settings import FILE_COLUMNS
from qlora_jax.data.readers.files import shorten
from qlora_jax.evaluation.columns import found, values_of

_LETTERED = re.compile(r"([A-Z])\. ")


class Question(NamedTuple):
    """A question in words."""

    prompt: str
    options: list[str]
    answer: int


def read_question(columns: Mapping[str, Any]) -> Question:
    """The question of a row.

    `options` is a list, or one text of lines that begin with "A. ", "B. ", ...; `answer` is the right option's text,
    its letter, both ("B. text"), or its place in the list, from 0.

    Raises:
      ValueError: columns missing or of another kind, fewer than two options, or an answer that is none of them.
    """
    prompt, options, answer = values_of(columns, FILE_COLUMNS["choices"])
    if not isinstance(prompt, str):
        raise found("question", prompt, "a text")
    texts = split_lettered(options) if isinstance(options, str) else options
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
        raise found("options", options, "a list of two or more texts, or lines 'A. ...', 'B. ...'")
    return Question(prompt, texts, _answer(answer, texts))


def split_lettered(text: str) -> list[str]:
    """["x", "y"] of "A. x\\nB. y"; an option may have several lines."""
    starts = []
    for letter in string.ascii_uppercase:
        at = f"\n{text}".find(f"\n{letter}. ", starts[-1] if starts else 0)
        if at < 0 or (at > 0 and not starts):
            break
        starts.append(at)
    bounds = itertools.pairwise([*starts, len(text)])
    return [text[start + len("A. ") : end].rstrip("\n") for start, end in bounds]


def _answer(answer: Any, options: Sequence[str]) -> int:
    letters = string.ascii_uppercase[: len(options)]
    if type(answer) is int and 0 <= answer < len(options):
        return answer
    if isinstance(answer, str):
        lettered = _LETTERED.match(answer)
        if lettered and lettered[1] in letters and options[letters.index(lettered[1])] == answer[lettered.end() :]:
            return letters.index(lettered[1])
        if answer in options:
            return options.index(answer)
        if len(answer) == 1 and answer.upper() in letters:
            return letters.index(answer.upper())
    raise ValueError(
        f"answer {shorten(repr(answer))} is none of the {len(options)} options: give its text, its letter or its place"
    )
