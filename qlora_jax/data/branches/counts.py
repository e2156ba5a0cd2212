"""Counts rows whose turns are branches, and rows with reasoning that the model does not see."""

from collections.abc import Sequence

from qlora_jax.data.bad_rows import first_rows
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place
from qlora_jax.data.row_counts import RowCounts

UNSEEN = "the chat template does not write its reasoning"


def count_branched(rows: Sequence[EncodedRow], places: Sequence[Place]) -> RowCounts:
    """Returns the counts of kept rows of conversations."""
    unseen = [place for row, place in zip(rows, places, strict=True) if row.unseen_reasoning]
    return RowCounts(
        branched=sum([bool(row.branches) for row in rows]),
        unseen_reasoning=len(unseen),
        unseen_rows=first_rows([(place, UNSEEN) for place in unseen]),
    )
