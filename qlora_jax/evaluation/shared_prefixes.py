"""Rows that begin with the same prompt, such as the options of a question, as one row: the prompt is computed once.

Dimension key: T positions of a row, K scored tokens.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64

ScoredIds = tuple[Int32[np.ndarray, "_"], Bool[np.ndarray, "_"]]  # ids of a row, and which of them are scored

# About how many positions a prompt's continuations take together, or as many as the prompt where that is longer.
LEAST_BRANCHES = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """What goes through the model as one row, and what is then scored of it. No token is there that is only predicted.

    Fields:
      ids: a prompt and its continuations, or a whole text.
      branches: 0 for the prompt, then 1, 2, ... for each continuation; None for a whole text.
      row: the row that each scored token belongs to, in order.
      before: the place whose hidden state predicts it; targets: the token.
    """

    ids: Int32[np.ndarray, " T"]
    branches: Int32[np.ndarray, " T"] | None
    row: Int64[np.ndarray, " K"]
    before: Int64[np.ndarray, " K"]
    targets: Int32[np.ndarray, " K"]


def packed_rows(rows: Sequence[ScoredIds], *, share: bool) -> list[Packed]:
    """The rows, those that begin with the same ids up to their first scored one together, if nothing is longer.

    Args:
      share: False: each goes alone.
    """
    if not share:
        return [_alone(index, *row) for index, row in enumerate(rows)]
    together: dict[bytes, list[int]] = {}
    for index, (ids, scored) in enumerate(rows):
        together.setdefault(ids[: _first(scored)].tobytes(), []).append(index)
    return [packed for members in together.values() for packed in _packed(rows, members)]


def _first(scored: np.ndarray) -> int:
    """The place of the first token that is scored; never 0, before which nothing stands."""
    return 1 + int(np.argmax(scored[1:]))


def _packed(rows: Sequence[ScoredIds], members: Sequence[int]) -> Iterator[Packed]:
    prompt = _first(rows[members[0]][1])
    inputs = [len(rows[index][0]) - 1 - prompt for index in members]  # of the last token nothing is asked
    if len(members) == 1 or max(inputs) >= prompt:
        yield from (_alone(index, *rows[index]) for index in members)
        return
    room, taken = max(prompt, LEAST_BRANCHES), np.cumsum(inputs)
    for _, group in itertools.groupby(range(len(members)), key=lambda place: int(taken[place]) // room):
        yield _branching(rows, [members[place] for place in group], prompt)


def _alone(index: int, ids: np.ndarray, scored: np.ndarray) -> Packed:
    places = np.flatnonzero(scored[1:])
    row = np.full(len(places), index)
    return Packed(ids=ids[:-1], branches=None, row=row, before=places, targets=ids[places + 1])


def _branching(rows: Sequence[ScoredIds], members: Sequence[int], prompt: int) -> Packed:
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
    return Packed(**joined, row=row, before=before, targets=targets)
