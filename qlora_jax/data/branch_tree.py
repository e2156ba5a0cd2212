"""Rows that are trees of depth 1: a trunk, and branches that continue it.

A pair with the prompt p_1..p_n is the trunk p_1..p_(n-1) and the branches (p_n, chosen...) and (p_n, rejected...). The
row's ids are those of the trunk, then those of each branch. A trunk of n ids fills n positions of a batch. A branch of
n ids fills n - 1, because its last id is only a target.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

MIN_BRANCH = 2  # ids: one input and its target


class Branch(NamedTuple):
    """One branch of a row.

    Fields:
      begin: index of its first id in the row's ids. It ends where the next branch begins.
      depth: number of the trunk's ids that it continues, which is the position of its first id.
    """

    begin: int
    depth: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branches:
    """The branches of many rows. Row i has the branches first[i] to first[i + 1] - 1, or none if it is one text.

    Fields:
      begin, depth: see Branch. The ids before a row's first branch are its trunk, which may be empty.
    """

    first: Int64[np.ndarray, " rows_and_one"]
    begin: Int64[np.ndarray, " branches"]
    depth: Int32[np.ndarray, " branches"]

    @property
    def counts(self) -> Int64[np.ndarray, " rows"]:
        """Number of branches of each row."""
        return np.diff(self.first)

    def row(self, index: int) -> tuple[Branch, ...]:
        """Returns the branches of the row at `index`."""
        span = slice(self.first[index], self.first[index + 1])
        return tuple(map(Branch, self.begin[span].tolist(), self.depth[span].tolist()))


def join_branches(rows: Sequence[Sequence[Branch]]) -> Branches:
    """Returns the branches of rows in flat arrays."""
    flat = list(itertools.chain.from_iterable(rows))
    return Branches(
        first=np.concatenate([np.zeros(1, np.int64), np.cumsum([len(row) for row in rows], dtype=np.int64)]),
        begin=np.array([branch.begin for branch in flat], np.int64),
        depth=np.array([branch.depth for branch in flat], np.int32),
    )


def no_branches(rows: int) -> Branches:
    """Returns the branches of rows that are one text each."""
    return join_branches([()] * rows)


def concatenate_branches(chunks: Sequence[Branches]) -> Branches:
    """Returns the branches of the rows of all chunks in order."""
    counts = np.concatenate([chunk.counts for chunk in chunks])
    return Branches(
        first=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        begin=np.concatenate([chunk.begin for chunk in chunks]),
        depth=np.concatenate([chunk.depth for chunk in chunks]),
    )


def branch_ends(branches: Sequence[Branch], length: int) -> list[int]:
    """Returns the index after the last id of each branch, in a row of `length` ids."""
    return [*(branch.begin for branch in branches[1:]), length][: len(branches)]


def longest_text(length: int, branches: Sequence[Branch]) -> int:
    """Returns the ids of a row's longest text: its trunk, or what a branch continues and the branch.

    Args:
      length: ids of the row.
    """
    if not branches:
        return length
    ends = branch_ends(branches, length)
    texts = [branch.depth + end - branch.begin for branch, end in zip(branches, ends, strict=True)]
    return max(branches[0].begin, *texts)


def whole_texts(
    ids: Int32[np.ndarray, " T"], supervised: Bool[np.ndarray, " T"], branches: Sequence[Branch]
) -> list[tuple[Int32[np.ndarray, " _"], Bool[np.ndarray, " _"]]]:
    """Returns the ids and the mask of each text of a row that has supervised ids. Each such id is in one mask.

    These texts are the trunk, if it has any, and each branch after the part of the trunk that it continues. A row
    without branches is one text.
    """
    trunk = slice(0, branches[0].begin if branches else len(ids))
    texts = [(ids[trunk], supervised[trunk])] if supervised[trunk][1:].any() or not branches else []
    for branch, end in zip(branches, branch_ends(branches, len(ids)), strict=True):
        own = slice(branch.begin, end)
        mask = np.concatenate([np.zeros(branch.depth, bool), supervised[own]])
        texts.append((np.concatenate([ids[: branch.depth], ids[own]]), mask))
    return texts


def branch_problem(branches: Sequence[Branch], supervised: Bool[np.ndarray, " T"]) -> str | None:
    """Returns the first contradiction between a row's branches and its ids; None for a row that is sound."""
    if not branches:
        return None
    trunk = branches[0].begin
    for branch, end in zip(branches, branch_ends(branches, len(supervised)), strict=True):
        if branch.begin < 0 or end - branch.begin < MIN_BRANCH:
            return f"the branch at {branch.begin} has {end - branch.begin} ids, expected at least {MIN_BRANCH}"
        if not 0 <= branch.depth <= trunk:
            return f"the branch at {branch.begin} has depth {branch.depth}, expected 0 to {trunk}, the trunk's ids"
        if supervised[branch.begin]:
            return f"the first id of the branch at {branch.begin} is supervised, but no position predicts it"
    return None


class Positions(NamedTuple):
    """The positions that a row fills in a batch, in order.

    Fields:
      segments: index of the part, the trunk or a branch, that each belongs to.
      parents: index of the trunk that the part continues; its own index if it continues none.
      depths: number of the trunk's positions that the part sees.
      branches: index of the branch that each belongs to; -1 for the trunk.
    """

    inputs: Int32[np.ndarray, " P"]
    targets: Int32[np.ndarray, " P"]
    weights: Bool[np.ndarray, " P"]
    segments: Int32[np.ndarray, " P"]
    parents: Int32[np.ndarray, " P"]
    depths: Int32[np.ndarray, " P"]
    branches: Int32[np.ndarray, " P"]


def lay_out(ids: Int32[np.ndarray, " T"], supervised: Bool[np.ndarray, " T"], branches: Sequence[Branch]) -> Positions:
    """Returns the positions of a row. One without branches is a single part, branch 0."""
    if not branches:
        zeros = np.zeros(len(ids) - 1, np.int32)
        return Positions(ids[:-1], ids[1:], supervised[1:], zeros, zeros, zeros, zeros)
    trunk, ends = branches[0].begin, branch_ends(branches, len(ids))
    has_input = np.ones(len(ids) - 1, bool)
    has_input[np.array(ends[:-1], np.int64) - 1] = False
    sizes = np.array([end - branch.begin - 1 for branch, end in zip(branches, ends, strict=True)])
    depths = np.array([branch.depth for branch in branches], np.int32)
    of_part = np.arange(len(branches), dtype=np.int32)
    if trunk:
        sizes = np.concatenate([[trunk], sizes])
        depths = np.concatenate([np.zeros(1, np.int32), depths])
        of_part = np.concatenate([np.full(1, -1, np.int32), of_part])
    segments = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    return Positions(
        inputs=ids[:-1][has_input],
        targets=ids[1:][has_input],
        weights=supervised[1:][has_input],
        segments=segments,
        parents=np.zeros_like(segments) if trunk else segments,
        depths=np.repeat(depths, sizes),
        branches=np.repeat(of_part, sizes),
    )
