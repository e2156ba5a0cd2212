"""Formats of rows for which sequence heads predict: those of training, without the column `label`."""

import dataclasses
from collections.abc import Iterable, Sequence

from qlora_jax.data.formats.columns import PLACEHOLDER, columns_setting, list_columns
from qlora_jax.data.formats.registry import FORMATS, format_of
from qlora_jax.data.formats.row_format import RowFormat
from qlora_jax.data.readers.files import Row
from qlora_jax.data.row_kinds import RowUse

LABEL = "label"
# The text of an answer after its prompt, as a reward model learned it.
_ANSWERS = ("messages-label", "unpaired-preference")
_TEXTS = (
    "messages-label",
    "question-pair-label",
    "question-sentence-label",
    "premise-hypothesis-label",
    "sentence-pair-label",
    "sentence-label",
    "text-label",
)
# Names of formats by objective, the most specific first.
FORMATS_OF: dict[str, Sequence[str]] = {
    "classification": _TEXTS,
    "multi_label": _TEXTS,
    "regression": _TEXTS,
    "reward": _ANSWERS,
    "embedding": ("text-label",),
}


def find_unlabelled_format(
    path: str, rows: Sequence[Row], objectives: Sequence[str], learned: Sequence[Sequence[str]] = ()
) -> RowFormat:
    """Returns the format of the objectives whose columns the rows have; a label is not required.

    Of several formats, the first whose columns the head was trained on; otherwise the first with as many texts.

    Args:
      path: file name for errors.
      learned: the text columns that the head was trained on; empty if they are not known.

    Raises:
      ValueError: no format fits; the message has the columns and all formats. Or the head was trained on another number
        of texts per row.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row.data))
    names = dict.fromkeys(name for objective in objectives for name in FORMATS_OF[objective])
    formats = [_without_label(FORMATS[name]) for name in names]
    if fitting := [row_format for row_format in formats if set(row_format.required) <= set(columns)]:
        found = min(fitting, key=lambda row_format: _distance(row_format, learned))
        check_text_count(path, found, learned)
        return found
    known = "; ".join(" and ".join(row_format.required) for row_format in formats)
    example = columns_setting("file_columns", dict.fromkeys(formats[-1].required, PLACEHOLDER))
    raise ValueError(
        f"{path}: the columns are not those of texts to predict for (found {list_columns(columns)}, expected {known}). "
        f"Give rows with these, or name the columns of the file: {example}"
    )


def _distance(row_format: RowFormat, learned: Sequence[Sequence[str]]) -> int:
    """Returns 0 for a format that the head was trained on, 1 for one with as many texts, and 2 for others."""
    columns = text_columns(row_format)
    return 0 if columns in learned else 1 if len(columns) in map(len, learned) else 2


def check_text_count(path: str, row_format: RowFormat, learned: Sequence[Sequence[str]]) -> None:
    """Checks that rows have as many texts as those that the head was trained on, if these are known.

    Raises:
      ValueError: they have another number of texts.
    """
    columns = text_columns(row_format)
    if not learned or len(columns) in map(len, learned):
        return
    expected = " or ".join(dict.fromkeys(" and ".join(names) for names in learned))
    example = columns_setting("file_columns", dict.fromkeys(learned[0], PLACEHOLDER))
    raise ValueError(
        f"{path}: the head was trained on rows with another number of texts (found {' and '.join(columns)}, expected "
        f"{expected}). Give rows with these columns, or name the columns of the file: {example}"
    )


def text_columns(row_format: RowFormat) -> tuple[str, ...]:
    """Returns the columns of a format that a head reads."""
    return tuple(name for name in row_format.required if name != LABEL)


def learned_columns(forms: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Returns the text columns of training rows in formats with these names, each once; only of texts with labels."""
    labelled = (found for found in map(format_of, forms) if found.kind == "class")
    return tuple(dict.fromkeys(map(text_columns, labelled)))


def _without_label(row_format: RowFormat) -> RowFormat:
    name = row_format.name.removesuffix(f"-{LABEL}")
    return dataclasses.replace(row_format, name=name, required=text_columns(row_format))


def use_of(row_format: RowFormat) -> RowUse:
    """Returns the use that a head makes of rows without labels."""
    return RowUse(row_format.kind, head=True)
