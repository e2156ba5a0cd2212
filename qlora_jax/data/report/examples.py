"""A few dozen rows, decoded, with what the loss sees in them told apart: what a person looks at before a run starts."""

import re
from typing import Literal, NamedTuple

import numpy as np

from qlora_jax.data.batching.mixture import Mixture
from qlora_jax.data.report.stats import decode_row
from qlora_jax.data.rows import TokenRows
from qlora_jax.data.tokenizer.tokenizer import Tokenizer


class TextRun(NamedTuple):
    """A stretch of text: one special token, the end of a line, or what lies between them."""

    text: str
    kind: Literal["text", "special", "newline"]


class ExampleSegment(NamedTuple):
    """Neighbouring tokens of a row that the loss sees, or of which it sees none, as text."""

    runs: tuple[TextRun, ...]
    supervised: bool


class ExampleRow(NamedTuple):
    """A row as text.

    Fields:
      place: its `file:line`.
      tokens, supervised: its targets, and those among them that the loss sees.
    """

    place: str
    tokens: int
    supervised: int
    segments: tuple[ExampleSegment, ...]


def example_rows(train: TokenRows | Mixture, tokenizer: Tokenizer, count: int) -> tuple[ExampleRow, ...]:
    """At most `count` rows of the first epoch's first window, shortest first, spread evenly over its lengths.

    The joined text of a segment is what its ids decode to.
    """
    rows, indices = train.window(0, 0)
    by_length = indices[np.argsort(rows.lengths[indices], kind="stable")]
    chosen = np.unique(np.linspace(0, len(by_length) - 1, min(count, len(by_length))).round().astype(int))
    return tuple(_marked(train, rows, int(index), tokenizer) for index in by_length[chosen])


def _marked(train: TokenRows | Mixture, rows: TokenRows, index: int, tokenizer: Tokenizer) -> ExampleRow:
    _, supervised = rows.row(index)
    segments = decode_row(rows, index, tokenizer)
    return ExampleRow(
        place=train.where(int(rows.numbers[index])),
        tokens=int(rows.lengths[index]),
        supervised=int(supervised[1:].sum()),  # the first id is no target
        segments=tuple(ExampleSegment(split_runs(text, tokenizer.special_text), seen) for text, seen in segments),
    )


def split_runs(text: str, special: re.Pattern[str]) -> tuple[TextRun, ...]:
    """`text` cut at special tokens and line ends, nothing left out."""
    runs, at = [], 0
    for match in re.finditer(f"(?P<special>{special.pattern})|\n", text):
        runs += [
            TextRun(text[at : match.start()], "text"),
            TextRun(match.group(), "newline" if match["special"] is None else "special"),
        ]
        at = match.end()
    return tuple(run for run in (*runs, TextRun(text[at:], "text")) if run.text)
