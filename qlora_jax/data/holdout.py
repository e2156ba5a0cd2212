"""Which rows are held out for evaluation: by a hash of their content, so that the choice never changes."""

import hashlib
from collections.abc import Sequence

from qlora_jax.data.formats import Form
from qlora_jax.data.readers import Row


def content_hash(form: Form, row: Row) -> int:
    """64 bits of SHA-256 over what the model gets to see of the row."""
    return int.from_bytes(hashlib.sha256(form.content(row.data).encode()).digest()[:8], "big")


def hold_out(path: str, rows: Sequence[Row], form: Form, fraction: float) -> tuple[list[Row], list[Row]]:
    """(train, held out): a row is held out iff hash(content) < fraction * 2**64.

    Rows of equal content are on the same side, in this file and in any other, whatever the seed and the other rows.

    Raises:
      ValueError: one side would be empty.
    """
    limit = int(fraction * 2**64)
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[content_hash(form, row) < limit].append(row)
    if not all(sides):
        raise ValueError(
            f"{path}: data.eval_fraction {fraction} of {len(rows)} rows leaves {len(sides[0])} to train on and "
            f"{len(sides[1])} held out. Name a file of held-out rows (data.eval), or choose another fraction."
        )
    return sides


def shared_rows(form: Form, rows: Sequence[Row], other_form: Form, other: Sequence[Row]) -> int:
    """How many of `other` have the content of one of `rows`: held-out rows that are trained on."""
    seen = {content_hash(form, row) for row in rows}
    return sum(content_hash(other_form, row) in seen for row in other)
