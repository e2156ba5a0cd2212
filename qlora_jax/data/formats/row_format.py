"""One format of rows: its columns, its checks, and how a row becomes a conversation, a text, or several of them."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qlora_jax.config.objectives import RowKind
from qlora_jax.data.formats.turn_fields import TEMPLATE_KWARGS, read_template_kwargs, template_kwargs_problems
from qlora_jax.data.row_kinds import objectives_of
from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.untrusted_json import JsonObject

Columns = JsonObject  # one row's values by column name
Text = str | Sequence[Message]  # plain text, or a conversation or the end of one


_LABELS = ("label", "margin")  # columns that objectives read, and the model does not


class Segment(NamedTuple):
    """A piece of text, and True if the loss sees it."""

    text: str
    supervised: bool


class Texts(NamedTuple):
    """The texts of a row that is not one text.

    Fields:
      prompt: the beginning that all texts share; empty if they share none.
      texts: the rest of each text, after the prompt.
    """

    prompt: Text
    texts: tuple[Text, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowFormat:
    """One format of rows.

    Fields:
      kind: the kind of its rows, which an objective needs.
      objective: the only objective of that kind that can use the rows. None: every objective of the kind can.
      required, optional: names of its columns.
      explicit_only: another format has the same columns, so data.format has to name this one.
      problems: returns the problems of a row that has the required columns.
      matches: returns True if a row with these columns has this format, not another with the same columns.
      examples: returns the rows of the format `example` that one row contains. None: a row is one example.
      canonical: returns a canonical row, equal for rows that the model cannot tell apart.
      messages: returns a row of the kind text as a conversation, for a tokenizer with a chat template. None: never a
        conversation.
      plain: returns a row of the kind text as text, for a tokenizer without a template; bos and eos are added later.
        None: the format needs a template.
      texts: returns the texts of a row of another kind. The second argument is True if the tokenizer has a chat
        template, so that questions and answers become conversations.
      version: of a format of another package; prepared data of another version is not used again.
    """

    name: str
    kind: RowKind = "text"
    objective: str | None = None
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    explicit_only: bool = False
    problems: Callable[[Columns], list[str]]
    matches: Callable[[Columns], bool] = lambda row: True
    examples: Callable[[Columns], list[Columns]] | None = None
    example: str = "input-output"
    canonical: Callable[[Columns], Columns] = lambda row: row
    messages: Callable[[Columns], Sequence[Message]] | None = None
    plain: Callable[[Columns], list[Segment]] | None = None
    texts: Callable[[Columns, bool], Texts] | None = None
    version: str = ""

    def __str__(self) -> str:
        columns = [*self.required, *(f"{name} (optional)" for name in self.optional)]
        return f"{self.name}: {', '.join(columns)}"

    @property
    def objectives(self) -> list[str]:
        """The objectives that can use its rows."""
        return objectives_of(self.kind) if self.objective is None else [self.objective]

    def check(self, row: Columns) -> list[str]:
        """Returns the problems of a row, missing columns included."""
        missing = [name for name in self.required if name not in row]
        if missing:
            return [f"no column {' or '.join(map(repr, missing))}; found {', '.join(map(repr, row))}"]
        return self.problems(row) + (template_kwargs_problems(row) if TEMPLATE_KWARGS in row else [])

    def content(self, row: Columns) -> str:
        """Returns the columns that the model sees as canonical text. Rows with equal content have equal ids.

        The same text with two labels, or a pair with two margins, is the same content.
        """
        row = self.canonical(row)
        columns = {name: row.get(name) or "" for name in (*self.required, *self.optional)}
        for name in _LABELS if self.kind != "text" else ():
            columns.pop(name, None)
        for name in ("tools", "functions"):  # keeps the hashes of rows from before these existed
            if not columns.get(name):
                columns.pop(name, None)
        if variables := read_template_kwargs(row):
            columns[TEMPLATE_KWARGS] = variables
        return json.dumps(columns, sort_keys=True, ensure_ascii=False, default=str)
