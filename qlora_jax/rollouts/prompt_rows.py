"""The prompts of a run as rewards see them: the columns of each row, as its file has them."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from qlora_jax.config.fields import TemplateValue
from qlora_jax.config.schema import DataArgs
from qlora_jax.data.formats.columns import rename_columns
from qlora_jax.data.formats.prompts import asked
from qlora_jax.data.formats.turn_fields import read_template_kwargs
from qlora_jax.data.readers.files import Row, stream_rows
from qlora_jax.data.rows import File
from qlora_jax.untrusted_json import JsonObject

Prompt = str | Sequence[Mapping[str, object]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRows:
    """Rows of prompts by their numbers, counted over all files.

    Attributes:
      files: the files, in ascending order of their first numbers.
      columns: of each file, the column that has the prompt.
    """

    rows: Mapping[int, JsonObject]
    files: Sequence[File]
    columns: Mapping[str, str]

    def prompt(self, number: int) -> Prompt:
        """Returns a row's prompt: a text, or messages up to where the assistant replies."""
        found = self.rows[number][self._column(number)]
        return asked(found) if isinstance(found, list) else found

    def variables(self, number: int) -> dict[str, TemplateValue]:
        """Returns a row's variables for the chat template."""
        return read_template_kwargs(self.rows[number])

    def others(self, number: int) -> dict[str, object]:
        """Returns a row's other columns."""
        return {name: value for name, value in self.rows[number].items() if name != self._column(number)}

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The other columns of any row; rows that lack one have None in it."""
        return tuple(sorted({name for number in self.rows for name in self.others(number)}))

    def _column(self, number: int) -> str:
        return self.columns[[file for file in self.files if file.first <= number][-1].path]


def read_prompt_rows(data: DataArgs, files: Sequence[File], forms: Mapping[str, str]) -> PromptRows:
    """Reads the rows of files that `load_dataset` has checked.

    Args:
      forms: name of each file's format.
    """
    rows: dict[int, JsonObject] = {}
    for file in files:
        names = data.columns_of(file.path)
        for row in stream_rows(file.path):
            if isinstance(row, Row):
                renamed = rename_columns(row.data, names, "data.columns", (*names,)) if names else row.data
                rows[file.first + row.place.number] = renamed
    columns = {path: "messages" if form == "prompt-messages" else "prompt" for path, form in forms.items()}
    return PromptRows(rows=rows, files=files, columns=columns)
