"""The prompts of a run as rewards see them: the columns of each row, as its file has them."""

import dataclasses
from collections.abc import Mapping, Sequence

from qlora_jax.config.schema import DataArgs
from qlora_jax.data.formats.columns import rename_columns
from qlora_jax.data.formats.prompts import FORMS, asked
from qlora_jax.data.readers.files import Row, stream_rows
from qlora_jax.data.rows import File
from qlora_jax.metadata import JsonObject

Prompt = str | Sequence[Mapping[str, object]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRows:
    """Rows of prompts by their numbers, counted over all files.

    Attributes:
      column: the column that has the prompt.
    """

    column: str
    rows: Mapping[int, JsonObject]

    def prompt(self, number: int) -> Prompt:
        """Returns a row's prompt: a text, or messages up to where the assistant replies."""
        found = self.rows[number][self.column]
        return asked(found) if isinstance(found, list) else found

    def columns(self, number: int) -> dict[str, object]:
        """Returns a row's other columns."""
        return {name: value for name, value in self.rows[number].items() if name not in ("prompt", self.column)}


def read_prompt_rows(data: DataArgs, files: Sequence[File], form: str) -> PromptRows:
    """Reads the rows of files that `load_dataset` has checked.

    Args:
      form: name of their format.
    """
    (column,) = next(row_format.required for row_format in FORMS if row_format.name == form)
    rows: dict[int, JsonObject] = {}
    for file in files:
        names = data.columns_of(file.path)
        for row in stream_rows(file.path):
            if isinstance(row, Row):
                renamed = rename_columns(row.data, names, "data.columns", (*names,)) if names else row.data
                rows[file.first + row.place.number] = renamed
    return PromptRows(column=column, rows=rows)
