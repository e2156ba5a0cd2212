"""Formats of rows for which sequence heads predict: those of training, without the column `label`."""

import dataclasses
from collections.abc import Sequence

from qlora_jax.data.formats.columns import PLACEHOLDER, columns_setting, list_columns
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.formats.row_format import RowFormat
from qlora_jax.data.readers.files import Row
from qlora_jax.data.row_kinds import RowUse

LABEL = "label"
# The text of an answer behind its prompt, as a reward model learned it.
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


def find_unlabelled_format(path: str, rows: Sequence[Row], objectives: Sequence[str]) -> RowFormat:
    """Returns the first format of the objectives whose columns the rows have; a label is not required.

    Args:
      path: file name for errors.

    Raises:
      ValueError: no format fits; the message has the columns and all formats.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row.data))
    names = dict.fromkeys(name for objective in objectives for name in FORMATS_OF[objective])
    formats = [_without_label(FORMATS[name]) for name in names]
    for row_format in formats:
        if set(row_format.required) <= set(columns):
            return row_format
    known = "; ".join(" and ".join(row_format.required) for row_format in formats)
    example = columns_setting("file_columns", dict.fromkeys(formats[-1].required, PLACEHOLDER))
    raise ValueError(
        f"{path}: the columns are not those of texts to predict for (found {list_columns(columns)}, expected {known}). "
        f"Give rows with these, or name the columns of the file: {example}"
    )


def _without_label(row_format: RowFormat) -> RowFormat:
    required = tuple(name for name in row_format.required if name != LABEL)
    return dataclasses.replace(row_format, name=row_format.name.removesuffix(f"-{LABEL}"), required=required)


def use_of(row_format: RowFormat) -> RowUse:
    """Returns the use that a head makes of rows without labels."""
    return RowUse(row_format.kind, head=True)
