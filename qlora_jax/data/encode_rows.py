"""Rows of a known form to ids and masks, all problems of all rows in one error."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from qlora_jax.data.encode import Encoded, encode_segments
from qlora_jax.data.formats import Columns, Form
from qlora_jax.data.readers import Problem, Row, raise_problems
from qlora_jax.data.spans import Segment, conversation_segments, turn_marks
from qlora_jax.data.tokenizer import Tokenizer

_CHUNK = 1024  # encodings of a whole data set at once would take some 100 bytes a token


def check_rows(path: str, rows: Sequence[Row], form: Form) -> None:
    """Raises one ValueError that names every row that does not fit the form or holds no assistant text."""
    problems = [(row.place, "; ".join(form.check(row.data))) for row in rows]
    raise_problems(path, [(place, problem) for place, problem in problems if problem], len(rows))


def encode_rows(path: str, rows: Sequence[Row], form: Form, tokenizer: Tokenizer) -> list[Encoded]:
    """Ids and mask of each (checked) row: a conversation where the tokenizer has a chat template, else plain text.

    A conversation is the rendered template, which writes its own bos if it wants one. Plain text starts with bos where
    the tokenizer asks for it and ends with eos, which is supervised.

    Raises:
      ValueError: rows whose spans can't be exact, or a tokenizer that lacks what the form needs.
    """
    chat = form.messages is not None and tokenizer.chat_template is not None
    segment = _conversations(form, tokenizer) if chat else _plain(form, tokenizer)
    problems: list[Problem] = []
    encoded = [
        row if chat else _framed(row, tokenizer)
        for chunk in itertools.batched(rows, _CHUNK)
        for row in _encode(chunk, segment, tokenizer, problems)
    ]
    raise_problems(path, problems, len(rows))
    return encoded


def _conversations(form: Form, tokenizer: Tokenizer) -> Callable[[Columns], list[Segment]]:
    marks, messages = turn_marks(tokenizer), form.messages
    assert messages is not None
    return lambda row: conversation_segments(tokenizer, marks, messages(row))


def _plain(form: Form, tokenizer: Tokenizer) -> Callable[[Columns], list[Segment]]:
    if form.plain is None:
        raise ValueError(
            f"rows of the form {form.name!r} need a chat template, and this model has none; name a jinja file: "
            "data.chat_template"
        )
    if tokenizer.eos_id is None:
        raise ValueError(f"rows of the form {form.name!r} end with eos, and this tokenizer names no eos_token")
    return form.plain


def _encode(
    rows: Sequence[Row],
    segment: Callable[[Columns], list[Segment]],
    tokenizer: Tokenizer,
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
            yield encode_segments(tokenizer, pieces, encoding)
        except ValueError as error:
            problems.append((row.place, str(error)))


def _framed(row: Encoded, tokenizer: Tokenizer) -> Encoded:
    """The row with bos before it where the tokenizer asks for one, and a supervised eos after it."""
    before = [tokenizer.bos_id] if tokenizer.add_bos_token else []
    ids = np.array([*before, *row.ids, tokenizer.eos_id], np.int32)
    supervised = np.array([*(False for _ in before), *row.supervised, True])
    return row._replace(ids=ids, supervised=supervised)
