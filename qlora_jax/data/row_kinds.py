"""The kind of rows that each objective trains on, and how their texts and labels are read."""

from typing import NamedTuple

from qlora_jax.config.objectives import OBJECTIVES, RowKind, ValueKind


class RowUse(NamedTuple):
    """The use that an objective makes of its rows.

    Fields:
      kind: the kind of its rows.
      head: True if a head reads the position of each text's last token; False if answers are learned token by token.
        With a head, each text ends with a filler, an id that is never an input and the only one that is supervised.
      values: the values that it reads from the rows.
    """

    kind: RowKind
    head: bool = False
    values: ValueKind = "none"


def row_use(objective: str) -> RowUse:
    """Returns the use that an objective makes of its rows."""
    declared = OBJECTIVES[objective]
    return RowUse(declared.rows, declared.head, declared.values)


DESCRIPTIONS: dict[RowKind, str] = {
    "text": "texts or conversations with answers",
    "pair": "pairs of a chosen and a rejected answer",
    "labelled": "answers with a label, true or false",
    "class": "texts with a label",
    "embedding": "texts that mean the same",
    "prompt": "prompts to reply to",
}
# Names of the texts of a row, in the order of its sequences.
TEXT_NAMES: dict[RowKind, tuple[str, ...]] = {
    "text": (),
    "pair": ("chosen", "rejected"),
    "labelled": ("answer", "answer of another row"),
    "class": ("text",),
    "embedding": ("anchor", "positive", "negative"),
    "prompt": (),
}


def objectives_of(kind: RowKind) -> list[str]:
    """Returns the objectives that train on rows of this kind."""
    return [name for name, declared in OBJECTIVES.items() if declared.rows == kind]
