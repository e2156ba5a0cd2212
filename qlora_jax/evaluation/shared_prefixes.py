"""Packs rows that share a prompt, such as the options of a question, into one row: the prompt is computed once.

Dimension key: T positions of a row, K scored tokens.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64

ScoredIds = tuple[Int32[np.ndarray, "_"], Bool[np.ndarray, "_"]]  # ids of a row, and a mask of the scored ones

# The continuations in one packed row have about this many positions, or as many as the prompt if it is longer.
MIN_BRANCH_POSITIONS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedRow:
    """One row of the model's input, and the tokens to score in it; tokens that are only predicted are not inputs.

    Fields:
      ids: a prompt and its continuations, or a whole text.
      branches: 0 for the prompt, then 1, 2, ... for each continuation; None for a whole text.
      row: index of the row that each scored token belongs to, in order.
      before: position whose hidden state predicts each scored token.
      targets: id of each scored token.
    """

    ids: Int32[np.ndarray, " T"]
    branches: Int32[np.ndarray, " T"] | None
    row: Int64[np.ndarray, " K"]
    before: Int64[np.ndarray, " K"]
    targets: Int32[np.ndarray, " K"]


def pack_rows(rows: Sequence[ScoredIds], *, share: bool) -> list[PackedRow]:
    """Packs rows that are equal up to their first scored id, if all their continuations are shorter than the prompt.

    Args:
      share: False: pack each row alone.
    """
    if not share:
        return [_alone(index, *row) for index, row in enumerate(rows)]
    together: dict[bytes, list[int]] = {}
    for index, (ids, scored) in enumerate(rows):
        together.setdefault(ids[: _first_scored(scored)].tobytes(), []).append(index)
    return [packed for members in together.values() for packed in _pack_group(rows, members)]


def _first_scored(scored: np.ndarray) -> int:
    """Position of the first scored token; at least 1, because no token precedes position 0."""
    return 1 + int(np.argmax(scored[1:]))


def _pack_group(rows: Sequence[ScoredIds], members: Sequence[int]) -> Iterator[PackedRow]:
    prompt = _first_scored(rows[members[0]][1])
    inputs = [len(rows[index][0]) - 1 - prompt for index in members]  # the last token is only predicted
    if len(members) == 1 or max(inputs) >= prompt:
        yield from (_alone(index, *rows[index]) for index in members)
        return
    limit, taken = max(prompt, MIN_BRANCH_POSITIONS), np.cumsum(inputs)
    for _, group in itertools.groupby(range(len(members)), key=lambda place: int(taken[place]) // limit):
        yield _branching(rows, [members[place] for place in group], prompt)


def _alone(index: int, ids: np.ndarray, scored: np.ndarray) -> PackedRow:
    places = np.flatnonzero(scored[1:])
    row = np.full(len(places), index)
    return PackedRow(ids=ids[:-1], branches=None, row=row, before=places, targets=ids[places + 1])


def _branching(rows: Sequence[ScoredIds], members: Sequence[int], prompt: int) -> PackedRow:
    ids, branches, found = [rows[members[0]][0][:prompt]], [np.zeros(prompt, np.int32)], []
    end = prompt
    for branch, index in enumerate(members, start=1):
        continuation, scored = (part[prompt:] for part in rows[index])
        places = np.flatnonzero(scored)
        before = np.where(places == 0, prompt - 1, end + places - 1)
        found.append((np.full(len(places), index), before, continuation[places]))
        ids.append(continuation[:-1])
        branches.append(np.full(len(continuation) - 1, branch, np.int32))
        end += len(continuation) - 1
    row, before, targets = (np.concatenate(part) for part in zip(*found, strict=True))
    joined = {"ids": np.concatenate(ids), "branches": np.concatenate(branches)}
    return PackedRow(**joined, row=row, before=before, targets=targets)
