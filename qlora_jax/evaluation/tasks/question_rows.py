"""Reads multiple-choice questions from rows, in the forms that data sets use."""

import itertools
import re
import string
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qlora_jax.config import QUESTION_KINDS
from qlora_jax.evaluation.task_file import values_of, wrong_value

_LETTERED = re.compile(r"([A-Z])\. ")


class Question(NamedTuple):
    """A multiple-choice question as text; `answer` is the index of the right option."""

    prompt: str
    options: list[str]
    answer: int


def read_question(columns: Mapping[str, object]) -> Question:
    """Reads the question of a row.

    `options` is a list, or one text of lines that begin with "A. ", "B. ", ... `answer` is the right option's text, its
    letter, both ("B. text"), or its index in the list, from 0.

    Raises:
      ValueError: columns are missing or malformed, there are fewer than two options, or the answer is not an option.
    """
    prompt, options, answer = values_of(columns, QUESTION_KINDS["choices"].columns)
    if not isinstance(prompt, str):
        raise wrong_value("question", prompt, "a text")
    texts = split_lettered(options) if isinstance(options, str) else options
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
        raise wrong_value("options", options, "a list of two or more texts, or lines 'A. ...', 'B. ...'")
    return Question(prompt, texts, _answer_index(answer, texts))


def split_lettered(text: str) -> list[str]:
    """Splits "A. x\\nB. y" into ["x", "y"]; an option may have several lines."""
    starts = []
    for letter in string.ascii_uppercase:
        at = f"\n{text}".find(f"\n{letter}. ", starts[-1] if starts else 0)
        if at < 0 or (at > 0 and not starts):
            break
        starts.append(at)
    bounds = itertools.pairwise([*starts, len(text)])
    return [text[start + len("A. ") : end].rstrip("\n") for start, end in bounds]


def _answer_index(answer: object, options: Sequence[str]) -> int:
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
    raise wrong_value("answer", answer, f"one of the {len(options)} options: its text, its letter or its index")
