"""Drops or truncates rows that are too long, and counts them."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int64

from qlora_jax.config.schema import DataArgs
from qlora_jax.data.branch_tree import Branch, branch_ends, longest_text
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place, Problem

Overlong = Literal["error", "drop", "truncate-left", "truncate-right"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthLimits:
    """Limits on the length of rows, in ids.

    Fields:
      max_length: at most this many ids per text, special tokens included. A row is one text, or a tree of several.
      overlong: raise an error for longer rows, drop them, or truncate them.
      source, target: limits on the ids before the first answer, and from there on. Each part is truncated on its right,
        as in artidoro/qlora. None: no limit.
      bos_id: id that a row keeps in front when it is truncated on its left. None: no id.
    """

    max_length: int
    overlong: Overlong
    source: int | None = None
    target: int | None = None
    bos_id: int | None = None


@dataclasses.dataclass(frozen=True)
class FittedRows:
    """Rows that fit, their places in the file, and the number of rows truncated or dropped.

    Fields:
      truncated: rows that were truncated and kept.
      lost_branches: branches that truncated rows lost.
      overlong: rows dropped because they were too long.
      unsupervised: rows dropped because they have no target, after truncation or from the start.
      problems: rows that are too long, if that is an error.
    """

    rows: list[EncodedRow]
    places: list[Place]
    truncated: int
    overlong: int
    unsupervised: int
    problems: list[Problem]
    lost_branches: int = 0


def fit_lengths(rows: Sequence[EncodedRow], places: Sequence[Place], limits: LengthLimits) -> FittedRows:
    """Returns rows of at most `max_length` ids and at least one target, in order.

    The other rows are truncated, dropped or reported as problems.
    """
    limited = [_limit_parts(row, limits) for row in rows]
    is_long = [_longest(row) > limits.max_length for row in limited]
    keep = [not long or limits.overlong.startswith("truncate") for long in is_long]
    fits = [_truncate(row, limits) for row in limited]
    has_target = [bool(row.supervised[1:].any()) for row in fits]
    kept = [index for index in range(len(rows)) if keep[index] and has_target[index]]
    return FittedRows(
        rows=[fits[index] for index in kept],
        places=[places[index] for index in kept],
        truncated=sum(is_long[index] or len(fits[index].ids) < len(rows[index].ids) for index in kept),
        overlong=len(rows) - sum(keep),
        unsupervised=sum(keep) - len(kept),
        problems=_too_long(limited, places, limits.max_length) if limits.overlong == "error" else [],
        lost_branches=sum(len(rows[index].branches) - len(fits[index].branches) for index in kept),
    )


def truncated_side(data: DataArgs) -> str:
    """Returns the side on which the settings truncate rows, for the report."""
    if data.overlong != "truncate-left":
        return "on the right"
    parts = data.source_max_length is not None or data.target_max_length is not None
    return "on the left" + ", and prompts or answers on the right" * parts


def _too_long(rows: Sequence[EncodedRow], places: Sequence[Place], max_length: int) -> list[Problem]:
    expected = (
        f"expected at most {max_length} (data.max_length). Raise it, or set data.overlong to drop or truncate-right."
    )
    return [
        (place, f"found {_longest(row)} tokens, {expected}")
        for row, place in zip(rows, places, strict=True)
        if _longest(row) > max_length
    ]


def _longest(row: EncodedRow) -> int:
    return longest_text(len(row.ids), row.branches)


def _take(row: EncodedRow, kept: Int64[np.ndarray, " kept"]) -> EncodedRow:
    """Returns the row's ids at these ascending indices."""
    return row._replace(
        ids=row.ids[kept],
        supervised=row.supervised[kept],
        source=int(np.searchsorted(kept, row.source)),
        lost_ends=max(row.lost_ends, _lost_ends(row, [kept])),
    )


def _lost_ends(row: EncodedRow, spans: Sequence[Int64[np.ndarray, " _"]]) -> int:
    """Returns the number of spans of indices that end within an answer."""
    return sum(int(row.supervised[span[-1] : span[-1] + 2].sum()) == 2 for span in spans if len(span))


def _limit_parts(row: EncodedRow, limits: LengthLimits) -> EncodedRow:
    """Returns the row with its source and its target truncated on the right."""
    if limits.source is None and limits.target is None:
        return row
    assert not row.branches  # the encoder refuses rows with several answers
    source, target = np.arange(row.source)[: limits.source], np.arange(row.source, len(row.ids))[: limits.target]
    return _take(row, np.concatenate([source, target]))


def _truncate(row: EncodedRow, limits: LengthLimits) -> EncodedRow:
    """Returns the first `max_length` ids of the row's texts, or bos and their last ones."""
    if _longest(row) <= limits.max_length:
        return row
    if row.branches:
        return (_truncate_tree_left if limits.overlong == "truncate-left" else _truncate_tree_right)(row, limits)
    positions = np.arange(len(row.ids))
    if limits.overlong != "truncate-left":
        return _take(row, positions[: limits.max_length])
    return _take(row, _last(row, positions, limits))


def _last(row: EncodedRow, text: Int64[np.ndarray, " ids"], limits: LengthLimits) -> Int64[np.ndarray, " kept"]:
    """Returns the last `max_length` indices of a text's ids; the first one is that of its bos."""
    if len(text) <= limits.max_length:
        return text
    first = text[: int(row.ids[text[0]] == limits.bos_id)]
    return np.concatenate([first, text[len(text) - limits.max_length + len(first) :]])


def _truncate_tree_right(row: EncodedRow, limits: LengthLimits) -> EncodedRow:
    """Returns the row with the first `max_length` ids of its trunk and of each branch's text."""
    trunk = np.arange(min(row.branches[0].begin, limits.max_length))
    spans = [
        (branch, np.arange(branch.begin, min(end, branch.begin + limits.max_length - branch.depth)))
        for branch, end in zip(row.branches, branch_ends(row.branches, len(row.ids)), strict=True)
    ]
    return _take_tree(row, trunk, [(span, branch.depth) for branch, span in spans])


def _truncate_tree_left(row: EncodedRow, limits: LengthLimits) -> EncodedRow:
    """Returns the row with the last `max_length` ids of its trunk and of each branch's text.

    Branches that leave the removed beginning of the trunk are dropped. A branch whose text is too long after the rest
    of the trunk has a copy of the ids that it continues instead, and loses the first ones.
    """
    trunk = np.arange(row.branches[0].begin)
    removed = max(len(trunk) - limits.max_length, 0)
    least = int(row.ids[0] == limits.bos_id) if removed else 0
    spans: list[tuple[Int64[np.ndarray, " _"], int]] = []
    for branch, end in zip(row.branches, branch_ends(row.branches, len(row.ids)), strict=True):
        span, depth = np.arange(branch.begin, end), branch.depth - removed
        if depth + len(span) > limits.max_length:
            spans.append((_last(row, np.concatenate([trunk[: branch.depth], span]), limits), 0))
        elif depth >= least:
            spans.append((span, depth))
    trunk = _last(row, trunk, limits)
    is_needed = row.supervised[trunk].any() or any(depth for _, depth in spans)
    return _take_tree(row, trunk if is_needed else trunk[:0], spans)


def _take_tree(
    row: EncodedRow, trunk: Int64[np.ndarray, " kept"], spans: Sequence[tuple[Int64[np.ndarray, " _"], int]]
) -> EncodedRow:
    """Returns the row with the trunk and the branches at these indices. Branches without a target are dropped.

    Args:
      spans: indices and depth of each branch. The loss does not see the trunk's ids in them.
    """
    learned = row.supervised & (np.arange(len(row.ids)) >= row.branches[0].begin)
    spans = [(span, depth) for span, depth in spans if learned[span[1:]].any()]
    begins = len(trunk) + np.cumsum([0, *(len(span) for span, _ in spans)])[:-1]
    supervised = np.concatenate([row.supervised[trunk], *(learned[span] for span, _ in spans)])
    supervised[begins] = False  # no position predicts them
    return row._replace(
        ids=row.ids[np.concatenate([trunk, *(span for span, _ in spans)])],
        supervised=supervised,
        source=int(supervised.argmax()) if len(supervised) else 0,
        branches=tuple(map(Branch, begins.tolist(), [depth for _, depth in spans])),
        lost_ends=_lost_ends(row, [trunk, *(span for span, _ in spans)]),
    )


def nothing_left_message(path: str, total: int, overlong: int, max_length: int) -> str:
    """Returns the error message for a file without a row to learn from."""
    return (
        f"{path}: no row has a supervised token left. Of {total} rows, {overlong} were dropped because they are longer "
        f"than data.max_length {max_length}, and {total - overlong} because their answers start after it. "
        "Raise data.max_length."
    )
