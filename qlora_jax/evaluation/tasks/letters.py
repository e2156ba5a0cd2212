"""Questions by letter from files: prompts that are given whole, as QLoRA's MMLU files have them, or made of columns."""

import itertools
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qlora_jax.data.readers.files import Row, raise_problems, shorten
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.columns import read_each, read_named
from qlora_jax.evaluation.letters import Lettered
from qlora_jax.evaluation.tasks.question_rows import Question, read_question
from qlora_jax.evaluation.tasks.task import LettersTask


class Asked(NamedTuple):
    """A question with its options in its prompt.

    Fields:
      prompt: up to where the letter follows.
      count: of letters.
      subject: None where the file has none.
    """

    prompt: str
    count: int
    answer: int
    subject: str | None


def letters_task(
    path: str,
    tokenizer: Tokenizer,
    *,
    shots: str | None,
    num_shots: int,
    max_rows: int | None,
    max_positions: int,
    named: Mapping[str, str] | None = None,
) -> LettersTask:
    """The questions of a file, each after the first `num_shots` exemplars of its subject from the file `shots`.

    A row is {input, output} and perhaps {subject}, a prompt and its letter as QLoRA's MMLU files have them, which takes
    no exemplars; or {question, options, answer} and perhaps {subject}, from which MMLU's prompt is made.

    Args:
      named: see `columns.read_named`; of both files.

    Raises:
      ValueError: rows that are neither, or too long, or whose subject has too few exemplars: all of them.
    """
    rows = read_named(path, "letters", named, max_rows)
    exemplars = None if shots is None else _exemplars(shots, num_shots, named)
    asked = read_each(path, rows, lambda row: _asked(row, exemplars, num_shots))
    questions = [_encoded(one, tokenizer) for one in asked]
    problems = [
        (row.place, f"{len(question.ids)} tokens, and the model reads {max_positions}")
        for row, question in zip(rows, questions, strict=True)
        if len(question.ids) > max_positions
    ]
    raise_problems(path, problems, len(rows))
    subjects = [one.subject for one in asked]
    known = [subject for subject in subjects if subject is not None]
    title = f"{path}: {len(rows)} questions by letter" + (f", {num_shots} exemplars each" if shots else "")
    return LettersTask(title=title, questions=questions, subjects=known if len(known) == len(rows) else None)


def _asked(row: Row, exemplars: Mapping[str | None, Sequence[str]] | None, num_shots: int) -> Asked:
    columns = row.data
    subject = columns.get("subject")
    if {"input", "output"} <= columns.keys():
        return _whole(columns, subject, exemplars is not None)
    question = read_question(columns)
    if len(question.options) > len(string.ascii_uppercase):
        raise ValueError(f"{len(question.options)} options: there are letters for {len(string.ascii_uppercase)}")
    shown = () if exemplars is None else exemplars.get(subject, ())
    if exemplars is not None and len(shown) < num_shots:
        of = "those without a subject" if subject is None else f"subject {subject!r}"
        raise ValueError(f"the file of shots has {len(shown)} exemplars of {of}, expected {num_shots}: see num_shots")
    prompt = header(subject) + "".join(f"{exemplar}\n\n" for exemplar in shown) + with_options(question)
    return Asked(prompt, len(question.options), question.answer, subject)


def _whole(columns: Mapping[str, Any], subject: str | None, with_exemplars: bool) -> Asked:
    prompt, letter = columns["input"], columns["output"]
    if with_exemplars:
        raise ValueError("the row has a whole prompt (input), to which no exemplars are added: leave out shots")
    if not isinstance(prompt, str) or letter not in [*"ABCD"]:
        raise ValueError(
            f"input and output: expected a prompt and one of A, B, C, D; found output {shorten(repr(letter))}"
        )
    return Asked(prompt, 4, "ABCD".index(letter), subject)


def header(subject: str | None) -> str:
    """How MMLU begins a prompt, two spaces before the subject included."""
    about = "" if subject is None else f" about  {subject.replace('_', ' ')}"
    return f"The following are multiple choice questions (with answers){about}.\n\n"


def with_options(question: Question) -> str:
    """The question with its lettered options, up to where the letter follows."""
    lettered = zip(string.ascii_uppercase, question.options, strict=False)
    return question.prompt + "".join(f"\n{letter}. {option}" for letter, option in lettered) + "\nAnswer:"


def _exemplars(path: str, num_shots: int, named: Mapping[str, str] | None) -> dict[str | None, list[str]]:
    """By subject, in the order of the file, `num_shots` at most."""
    found: dict[str | None, list[str]] = {}
    rows = read_named(path, "letters", named)
    questions = read_each(path, rows, lambda row: read_question(row.data))
    for row, question in zip(rows, questions, strict=True):
        of_subject = found.setdefault(row.data.get("subject"), [])
        if len(of_subject) < num_shots:
            of_subject.append(f"{with_options(question)} {string.ascii_uppercase[question.answer]}")
    return found


def _encoded(asked: Asked, tokenizer: Tokenizer) -> Lettered:
    """The ids that the letters share, and of each letter, with the space that stands before it, the next one."""
    letters = string.ascii_uppercase[: asked.count]
    followed = tokenizer.encode_batch([f"{asked.prompt} {letter}" for letter in letters])
    shared = followed[0][: _shared_length(followed)]
    bos = [tokenizer.bos_id] if tokenizer.add_bos_token else []
    next_ids = [ids[len(shared)] for ids in followed if len(ids) > len(shared)]
    if len(set(next_ids)) < len(letters):
        raise ValueError(f"the tokenizer does not tell the letters {letters} apart by one token")
    return Lettered(ids=np.array([*bos, *shared], np.int32), letters=next_ids, answer=asked.answer)


def _shared_length(rows: Sequence[Sequence[int]]) -> int:
    """How many ids all rows begin with."""
    return sum(1 for _ in itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False)))
