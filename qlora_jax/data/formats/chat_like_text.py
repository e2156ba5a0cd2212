"""Counts rows of plain text that look like conversations. Another format would learn only their answers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qlora_jax.data.formats.row_format import RowFormat
from qlora_jax.data.readers.files import Row


class Lookalike(NamedTuple):
    """A kind of conversation in one text.

    Fields:
      tags: texts before the turns of the two speakers.
      answers_only: the format that learns only the answers, with and without a chat template.
    """

    tags: tuple[str, str]
    answers_only: str


# By the name of the format that has such texts.
LOOKALIKES = {
    "guanaco": Lookalike(("### Human:", "### Assistant:"), "guanaco-answers"),
    "chip2": Lookalike(("<human>:", "<bot>:"), "chip2"),
}
# Formats that learn every token of a text without a chat template.
_WHOLE_TEXT = ("text", "guanaco")


def count_lookalikes(rows: Sequence[Row], row_format: RowFormat) -> Mapping[str, int]:
    """Returns the number of rows by the name of the format that they look like, if every token of them is learned."""
    if row_format.name not in _WHOLE_TEXT:
        return {}
    found = Counter()
    for name, (tags, _) in LOOKALIKES.items():
        found[name] = sum([all([tag in row.data["text"] for tag in tags]) for row in rows])
    return +found
