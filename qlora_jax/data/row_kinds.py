"""The kind of rows that each objective trains on, and how their texts and labels are read."""

from typing import Literal, NamedTuple

# text: one text whose answers are learned. pair: a prompt with a chosen and a rejected answer. labelled: a
# prompt, an answer, and whether it is desirable. class: a text and its label. embedding: texts of equal meaning.
RowKind = Literal["text", "pair", "labelled", "class", "embedding"]
# Values that a row's sequences have besides their ids; see labels.py.
ValueKind = Literal["none", "desirable", "margin", "class", "classes", "number"]


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


ROW_USES: dict[str, RowUse] = {
    "sft": RowUse("text"),
    "dpo": RowUse("pair"),
    "kto": RowUse("labelled", values="desirable"),
    "orpo": RowUse("pair"),
    "cpo": RowUse("pair"),
    "simpo": RowUse("pair"),
    "reward": RowUse("pair", head=True, values="margin"),
    "classification": RowUse("class", head=True, values="class"),
    "multi_label": RowUse("class", head=True, values="classes"),
    "regression": RowUse("class", head=True, values="number"),
    "embedding": RowUse("embedding", head=True),
}
DESCRIPTIONS: dict[RowKind, str] = {
    "text": "texts or conversations with answers",
    "pair": "pairs of a chosen and a rejected answer",
    "labelled": "answers with a label, true or false",
    "class": "texts with a label",
    "embedding": "texts that mean the same",
}
# Names of the texts of a row, in the order of its sequences.
TEXT_NAMES: dict[RowKind, tuple[str, ...]] = {
    "text": (),
    "pair": ("chosen", "rejected"),
    "labelled": ("answer", "answer of another row"),
    "class": ("text",),
    "embedding": ("anchor", "positive", "negative"),
}


def objectives_of(kind: RowKind) -> list[str]:
    """Returns the objectives that train on rows of this kind."""
    return [name for name, use in ROW_USES.items() if use.kind == kind]
