"""Rows of a known form to ids and masks, all problems of all rows in one error."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from qlora_jax.data.encode import Encoded, Learn, encode_segments
from qlora_jax.data.formats import FORMS, Columns, Form
from qlora_jax.data.readers import Place, Problem, Row, raise_problems
from qlora_jax.data.skeletons import segmenter
from qlora_jax.data.spans import Segment
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.data.tools import read_tools

_CHUNK = 1024  # encodings of a whole data set at once would take some 100 bytes a token


def check_rows(path: str, rows: Sequence[Row], form: Form) -> None:
    """Raises one ValueError that names every row that does not fit the form or holds no assistant text."""
    problems = [(row.place, "; ".join(form.check(row.data))) for row in rows]
    raise_problems(path, [(place, problem) for place, problem in problems if problem], len(rows))


def examples_of(rows: Sequence[Row], form: Form) -> tuple[Sequence[Row], Form]:
    """The (checked) rows' examples, numbered through, and their form: a row of some forms holds several."""
    if form.examples is None:
        return rows, form
    lines = [(row.place.line, columns) for row in rows for columns in form.examples(row.data)]
    examples = [Row(Place(line, number), columns) for number, (line, columns) in enumerate(lines)]
    return examples, dataclasses.replace(FORMS["input-output"], name=form.name)


def encode_rows(
    path: str,
    rows: Sequence[Row],
    form: Form,
    tokenizer: Tokenizer,
    learn: Learn = "assistant",
    *,
    one_answer: bool = False,
) -> list[Encoded]:
    """Ids and mask of each (checked) row: a conversation where the tokenizer has a chat template, else plain text.

    A conversation is the rendered template, which writes its own bos if it wants one. Plain text starts with bos where
    the tokenizer asks for it (never with two) and ends with eos, which is supervised.

    Args:
      learn: what the loss sees: every answer, the last of a row alone, or all of it.
      one_answer: rows with more than one answer are problems, since source and target can't be told apart.

    Raises:
      ValueError: rows whose spans can't be exact, or a tokenizer that lacks what the form needs.
    """
    chat = form.messages is not None and tokenizer.chat_template is not None
    segment = _checked(_conversations(form, tokenizer) if chat else _plain(form, tokenizer), learn, one_answer)
    problems: list[Problem] = []
    encoded = [
        row if chat else _framed(row, tokenizer)
        for chunk in itertools.batched(rows, _CHUNK)
        for row in _encode(chunk, segment, tokenizer, learn, problems)
    ]
    raise_problems(path, problems, len(rows))
    return encoded


def _conversations(form: Form, tokenizer: Tokenizer) -> Callable[[Columns], list[Segment]]:
    segments, messages = segmenter(tokenizer), form.messages
    assert messages is not None
    has_tools = "tools" in form.optional
    return lambda row: segments(messages(row), read_tools(row) if has_tools else None)


def _plain(form: Form, tokenizer: Tokenizer) -> Callable[[Columns], list[Segment]]:
    if form.plain is None:
        raise ValueError(
            f"rows of the form {form.name!r} need a chat template, and this model has none; name a jinja file: "
            "data.chat_template"
        )
    if tokenizer.eos_id is None:
        raise ValueError(f"rows of the form {form.name!r} end with eos, and this tokenizer names no eos_token")
    return form.plain


def _checked(
    segment: Callable[[Columns], list[Segment]], learn: Learn, one_answer: bool
) -> Callable[[Columns], list[Segment]]:
    """`segment`, with ValueError for a row that the settings don't fit."""

    def check(row: Columns) -> list[Segment]:
        segments = segment(row)
        answers = sum(piece.supervised for piece in segments)
        if learn == "last" and len(segments) == answers:
            raise ValueError("it is one text with no turns, so data.learn last has nothing to choose; set all")
        if one_answer and answers > 1:
            raise ValueError(
                f"{answers} answers: data.source_max_length and data.target_max_length are for rows of one prompt and "
                "one answer; set data.max_length alone"
            )
        return segments

    return check


def _encode(
    rows: Sequence[Row],
    segment: Callable[[Columns], list[Segment]],
    tokenizer: Tokenizer,
    learn: Learn,
    problems: list[Problem],
) -> Iterator[Encoded]:
    """Encoded rows; those that fail are left out and told in `problems`."""
    found: list[tuple[Row, list[Segment]]] = []
    for row in rows:
        try:
            found.append((row, segment(row.data)))
        except ValueError as error:
            problems.append((row.place, str(error)))
    texts = ["".join(piece.text for piece in pieces) for _, pieces in found]
    for (row, pieces), encoding in zip(found, tokenizer.encode_spans(texts), strict=True):
        try:
            yield encode_segments(tokenizer, pieces, encoding, learn)
        except ValueError as error:
            problems.append((row.place, str(error)))


def _framed(row: Encoded, tokenizer: Tokenizer) -> Encoded:
    """The row with bos before it where the tokenizer asks for one, and a supervised eos after it."""
    has_bos = row.ids[:1].tolist() == [tokenizer.bos_id]
    before = [tokenizer.bos_id] if tokenizer.add_bos_token and not has_bos else []
    ids = np.concatenate([np.array(before, np.int32), row.ids, np.array([tokenizer.eos_id], np.int32)])
    supervised = np.concatenate([np.zeros(len(before), bool), row.supervised, np.ones(1, bool)])
    return row._replace(ids=ids, supervised=supervised, source=len(before) + row.source)
