"""What happens to rows that are too long, counted."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int64

from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place, Problem

Overlong = Literal["error", "drop", "truncate-left", "truncate-right"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How long rows may be.

    Fields:
      source, target: ids before the first answer, and from there on: each is cut on its right, as artidoro/qlora does.
      bos_id: the id that stays in front of a row cut on its left; None: nothing stays.
    """

    max_length: int
    overlong: Overlong
    source: int | None = None
    target: int | None = None
    bos_id: int | None = None


@dataclasses.dataclass(frozen=True)
class FittedRows:
    """Rows that fit, where they stand, and how many others were cut or left out.

    Fields:
      truncated: rows kept, cut.
      overlong: rows dropped since they were longer.
      unsupervised: rows dropped since no target was left, by truncation or from the start.
      problems: rows that are longer where that is an error.
    """

    rows: list[EncodedRow]
    places: list[Place]
    truncated: int
    overlong: int
    unsupervised: int
    problems: list[Problem]


def fit_lengths(rows: Sequence[EncodedRow], places: Sequence[Place], limits: Limits) -> FittedRows:
    """Rows of at most `max_length` ids and at least one target, in order; the rest is cut, dropped or a problem."""
    apart = [_cut_apart(row, limits) for row in rows]
    long = [len(row.ids) > limits.max_length for row in apart]
    keep = [not is_long or limits.overlong.startswith("truncate") for is_long in long]
    fits = [_cut(row, limits) for row in apart]
    learns = [bool(row.supervised[1:].any()) for row in fits]
    kept = [index for index in range(len(rows)) if keep[index] and learns[index]]
    return FittedRows(
        rows=[fits[index] for index in kept],
        places=[places[index] for index in kept],
        truncated=sum(len(fits[index].ids) < len(rows[index].ids) for index in kept),
        overlong=len(rows) - sum(keep),
        unsupervised=sum(keep) - len(kept),
        problems=_too_long(apart, places, limits.max_length) if limits.overlong == "error" else [],
    )


def _too_long(rows: Sequence[EncodedRow], places: Sequence[Place], max_length: int) -> list[Problem]:
    fix = f"longer than data.max_length {max_length}; raise it, or set data.overlong to drop or truncate-right"
    return [
        (place, f"{len(row.ids)} tokens, {fix}")
        for row, place in zip(rows, places, strict=True)
        if len(row.ids) > max_length
    ]


def _take(row: EncodedRow, kept: Int64[np.ndarray, " kept"]) -> EncodedRow:
    """The row's ids at these indices, which ascend."""
    return row._replace(
        ids=row.ids[kept], supervised=row.supervised[kept], source=int(np.searchsorted(kept, row.source))
    )


def _cut_apart(row: EncodedRow, limits: Limits) -> EncodedRow:
    """The row with its source and its target each cut on the right."""
    if limits.source is None and limits.target is None:
        return row
    source, target = np.arange(row.source)[: limits.source], np.arange(row.source, len(row.ids))[: limits.target]
    return _take(row, np.concatenate([source, target]))


def _cut(row: EncodedRow, limits: Limits) -> EncodedRow:
    """The row's first `max_length` ids, or its last ones behind bos."""
    if len(row.ids) <= limits.max_length:
        return row
    places = np.arange(len(row.ids))
    if limits.overlong != "truncate-left":
        return _take(row, places[: limits.max_length])
    first = places[: int(row.ids[0] == limits.bos_id)]
    return _take(row, np.concatenate([first, places[len(places) - limits.max_length + len(first) :]]))


def nothing_left_message(path: str, total: int, overlong: int, max_length: int) -> str:
    """What to say of a file without a row that can be learned from."""
    return (
        f"{path}: no row is left to learn from: of {total}, {overlong} were longer than data.max_length {max_length} "
        f"and dropped, and in {total - overlong} no supervised token is left (answers that start behind max_length). "
        "Raise data.max_length."
    )
