"""Example rows as text, with the parts that the loss sees, for a person to check before a run."""

import re
from typing import Literal, NamedTuple

import numpy as np

from qlora_jax.data.batching.mixture import Mixture
from qlora_jax.data.report.stats import ONE_TEXT, RowParts, decode_row, row_label
from qlora_jax.data.rows import TokenRows
from qlora_jax.data.tokenizer.tokenizer import Tokenizer


class TextRun(NamedTuple):
    """A piece of text: one special token, one line end, or the text between them."""

    text: str
    kind: Literal["text", "special", "newline"]


class ExampleSegment(NamedTuple):
    """Text of neighbouring tokens that the loss sees, or of neighbouring tokens that it does not see.

    Fields:
      name: the text that begins with it, such as `rejected`, if the row has several.
    """

    runs: tuple[TextRun, ...]
    supervised: bool
    name: str = ""


class ExampleRow(NamedTuple):
    """A row as text.

    Fields:
      place: its `file:line`.
      label: its label; empty if it has none.
      tokens, supervised: number of its targets, and of those that the loss sees.
    """

    place: str
    label: str
    tokens: int
    supervised: int
    segments: tuple[ExampleSegment, ...]


def example_rows(
    train: TokenRows | Mixture, tokenizer: Tokenizer, count: int, parts: RowParts = ONE_TEXT
) -> tuple[ExampleRow, ...]:
    """Returns at most `count` rows of the first window, shortest first, spread evenly over its lengths.

    The joined text of a segment equals its decoded ids.
    """
    rows, indices = train.window(0, 0)
    by_length = indices[np.argsort(rows.lengths[indices], kind="stable")]
    chosen = np.unique(np.linspace(0, len(by_length) - 1, min(count, len(by_length))).round().astype(int))
    return tuple(_example_row(train, rows, int(index), tokenizer, parts) for index in by_length[chosen])


def _example_row(
    train: TokenRows | Mixture, rows: TokenRows, index: int, tokenizer: Tokenizer, parts: RowParts
) -> ExampleRow:
    _, supervised = rows.row(index)
    return ExampleRow(
        place=train.where(int(rows.numbers[index])),
        label=row_label(rows, index, parts),
        tokens=int(rows.lengths[index]),
        supervised=int(supervised[1:].sum()),  # no position predicts the first id
        segments=tuple(
            ExampleSegment(split_runs(text, tokenizer.special_text), seen, name)
            for text, seen, name in decode_row(rows, index, tokenizer, parts)
        ),
    )


def split_runs(text: str, special: re.Pattern[str]) -> tuple[TextRun, ...]:
    """Returns all of `text`, split at special tokens and line ends."""
    runs, at = [], 0
    for match in re.finditer(f"(?P<special>{special.pattern})|\n", text):
        runs += [
            TextRun(text[at : match.start()], "text"),
            TextRun(match.group(), "newline" if match["special"] is None else "special"),
        ]
        at = match.end()
    return tuple(run for run in (*runs, TextRun(text[at:], "text")) if run.text)
