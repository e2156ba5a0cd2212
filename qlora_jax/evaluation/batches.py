"""Which rows go through a model together: shapes are few, since each is compiled, and hold little padding.

Dimension key: B rows of a batch, T positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

BATCH_TOKENS = 4096  # positions that go through a model at once, padding included; a longer row goes alone
SHAPE_COST = 4096  # positions whose computation takes about as long as the compilation of a shape
LEAST_STEP = 16


class Batch(NamedTuple):
    """Indices of rows, and the shape [B, T] that they are padded to."""

    rows: list[int]
    size: int
    length: int

    @property
    def positions(self) -> int:
        """B T."""
        return self.size * self.length

    @property
    def shape(self) -> str:
        """In words."""
        return f"{self.size} x {self.length} tokens"


def padded_length(length: int) -> int:
    """The smallest multiple of 16 that is at least `length`; above 256 one of 32, above 512 one of 64, ..."""
    step = max(LEAST_STEP, 1 << (length - 1).bit_length() >> 4)
    return -(-length // step) * step


def batches_by_length(lengths: Sequence[int]) -> list[Batch]:
    """Batches of rows of these lengths, longest first, with one shape for each T.

    The T are those of `padded_length` that make (positions computed) + SHAPE_COST (number of shapes) least.
    """
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    made: list[Batch] = []
    for length, count in reversed(_groups([padded_length(n) for n in lengths])):
        group, longest_first = longest_first[:count], longest_first[count:]
        size, _ = _split(count, length)
        made += [Batch(group[start : start + size], size, length) for start in range(0, count, size)]
    return made


def _groups(padded: Sequence[int]) -> list[tuple[int, int]]:
    """(T, how many rows are padded to it), ascending: the best of all ways to merge neighbours."""
    rungs, counts = np.unique(np.array(padded, np.int64), return_counts=True)
    below = [0, *np.cumsum(counts).tolist()]  # rows that are shorter than each rung
    costs, begins = [0], [0]
    for end, length in enumerate(rungs.tolist(), start=1):
        options = [costs[begin] + _cost(below[end] - below[begin], length) for begin in range(end)]
        costs.append(min(options))
        begins.append(int(np.argmin(options)))
    groups, end = [], len(rungs)
    while end:
        groups.append((int(rungs[end - 1]), below[end] - below[begins[end]]))
        end = begins[end]
    return groups[::-1]


def _cost(count: int, length: int) -> int:
    size, batches = _split(count, length)
    return SHAPE_COST + size * batches * length


def _split(count: int, length: int) -> tuple[int, int]:
    """(B, number of batches), all alike and within BATCH_TOKENS: those that leave the fewest rows empty.

    Up to twice as many batches as have to be: 15 rows of which 8 fit are 3 batches of 5, not 2 of 8.
    """
    least = -(-count // max(1, BATCH_TOKENS // length))
    splits = [(-(-count // batches), batches) for batches in range(least, 2 * least + 1)]
    return min(splits, key=lambda split: split[0] * split[1])  # of those alike the one of fewest batches


def stacked(batch: Batch, members: Sequence[Int32[np.ndarray, "_"]], fill: int = 0) -> Int32[np.ndarray, "B T"]:
    """The rows of a batch, in its order, padded with `fill`."""
    padded_BT = np.full((batch.size, batch.length), fill, np.int32)
    for place, row in enumerate(members):
        padded_BT[place, : len(row)] = row
    return padded_BT
