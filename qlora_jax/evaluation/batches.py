"""Groups rows into batches with few shapes, since each shape compiles, and little padding.

On a mesh each device has the same number of rows of a batch.

Dimension key: B rows of a batch, T positions.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

BATCH_TOKENS = 4096  # maximum positions of a device, padding included; a longer row is alone there
SHAPE_COST = 4096  # compiling a shape takes about as long as a device's computing this many positions
MIN_STEP = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchShape:
    """The shape of a batch: `size` is B, and `length` is T."""

    size: int
    length: int

    @property
    def positions(self) -> int:
        """The number of positions, B T."""
        return self.size * self.length

    @property
    def shape(self) -> str:
        """The shape as text."""
        return f"{self.size} x {self.length} tokens"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch(BatchShape):
    """Indices of rows, at most B, which are padded to T."""

    rows: list[int]


def padded_length(length: int) -> int:
    """Rounds up to a multiple of 16; above 256 to a multiple of 32, above 512 of 64, and so on."""
    step = max(MIN_STEP, 1 << (length - 1).bit_length() >> 4)
    return -(-length // step) * step


def batches_by_length(lengths: Sequence[int], devices: int = 1) -> list[Batch]:
    """Groups rows of these lengths into batches, longest first, with one shape for each T.

    The T are values of `padded_length` that minimize (positions that a device computes) + SHAPE_COST (number of
    shapes).

    Args:
      devices: devices that share the rows of a batch; B is a multiple of it.
    """
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    made: list[Batch] = []
    for length, count in reversed(_groups([padded_length(n) for n in lengths], devices)):
        group, longest_first = longest_first[:count], longest_first[count:]
        size, _ = equal_batches(count, length, devices)
        starts = range(0, count, size)
        made += [Batch(rows=group[start : start + size], size=size, length=length) for start in starts]
    return made


def _groups(padded: Sequence[int], devices: int) -> list[tuple[int, int]]:
    """(T, number of rows padded to it), ascending: the cheapest way to merge neighbouring lengths."""
    rungs, counts = np.unique(np.array(padded, np.int64), return_counts=True)
    below = [0, *np.cumsum(counts).tolist()]  # number of rows shorter than each rung
    costs, begins = [0], [0]
    for end, length in enumerate(rungs.tolist(), start=1):
        options = [costs[begin] + _cost(below[end] - below[begin], length, devices) for begin in range(end)]
        costs.append(min(options))
        begins.append(int(np.argmin(options)))
    groups, end = [], len(rungs)
    while end:
        groups.append((int(rungs[end - 1]), below[end] - below[begins[end]]))
        end = begins[end]
    return groups[::-1]


def _cost(count: int, length: int, devices: int) -> int:
    size, batches = equal_batches(count, length, devices)
    return SHAPE_COST + size // devices * batches * length


def equal_batches(count: int, length: int, devices: int) -> tuple[int, int]:
    """Returns (B, number of batches) of equal batches within BATCH_TOKENS per device that leave the fewest rows empty.

    Allows up to twice the minimum number of batches: 15 rows, of which 8 fit, make 3 batches of 5, not 2 of 8.
    """
    least = -(-count // (devices * max(1, BATCH_TOKENS // length)))
    splits = [(devices * -(-count // (devices * batches)), batches) for batches in range(least, 2 * least + 1)]
    return min(splits, key=lambda split: split[0] * split[1])  # among equals, the fewest batches


def pad_rows(batch: Batch, members: Sequence[Int32[np.ndarray, "_"]], fill: int = 0) -> Int32[np.ndarray, "B T"]:
    """Stacks the rows of a batch, in its order, padded with `fill` on the right and below."""
    padded_BT = np.full((batch.size, batch.length), fill, np.int32)
    for index, row in enumerate(members):
        padded_BT[index, : len(row)] = row
    return padded_BT
