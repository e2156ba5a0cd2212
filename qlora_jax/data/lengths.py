"""What happens to rows longer than `max_length`, counted."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from qlora_jax.data.encode import Encoded
from qlora_jax.data.readers import Place, raise_problems

Overlong = Literal["truncate", "drop", "error"]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Rows that fit, where they stand, and how many others were cut or left out.

    Fields:
      truncated: rows kept, cut to max_length.
      overlong: rows dropped since they were longer.
      unsupervised: rows dropped since no target was left, by truncation or from the start.
    """

    rows: list[Encoded]
    places: list[Place]
    truncated: int
    overlong: int
    unsupervised: int


def fit_lengths(
    path: str, rows: Sequence[Encoded], places: Sequence[Place], max_length: int, overlong: Overlong
) -> Fitted:
    """Rows of at most `max_length` ids and at least one target, in order; the rest is cut, dropped or an error.

    Raises:
      ValueError: `overlong` is "error" and a row is longer (all of them are named), or no row is left.
    """
    long = [len(row.ids) > max_length for row in rows]
    pairs = list(zip(rows, places, long, strict=True))
    if overlong == "error":
        fix = f"longer than data.max_length {max_length}; raise it, or set data.overlong to truncate or drop"
        raise_problems(
            path, [(place, f"{len(row.ids)} tokens, {fix}") for row, place, is_long in pairs if is_long], len(rows)
        )
    if overlong == "drop":
        pairs = [pair for pair in pairs if not pair[2]]
    kept = [(_cut(row, max_length), place, is_long) for row, place, is_long in pairs]
    kept = [pair for pair in kept if pair[0].supervised[1:].any()]
    if not kept:
        raise ValueError(_nothing_left(path, len(rows), len(rows) - len(pairs), max_length))
    return Fitted(
        rows=[row for row, _, _ in kept],
        places=[place for _, place, _ in kept],
        truncated=sum(is_long for _, _, is_long in kept),
        overlong=len(rows) - len(pairs),
        unsupervised=len(pairs) - len(kept),
    )


def _cut(row: Encoded, max_length: int) -> Encoded:
    return row._replace(ids=row.ids[:max_length], supervised=row.supervised[:max_length])


def _nothing_left(path: str, total: int, overlong: int, max_length: int) -> str:
    return (
        f"{path}: no row is left to learn from: of {total}, {overlong} were longer than data.max_length {max_length} "
        f"and dropped, and in {total - overlong} no supervised token is left (answers that start behind max_length). "
        "Raise data.max_length."
    )
