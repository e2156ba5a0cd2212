"""Groups rows into batches with few shapes, since each shape compiles, and little padding.

On a mesh each device has the same number of rows of a batch.

Dimension key: B rows or packs of a batch, T positions, S slots for the texts of a pack.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from qlora_jax.data.batching.packing import pack

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


FACTORS = (1, 2, 4)  # lengths of a row, in multiples of the longest text


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedBatch(BatchShape):
    """Indices of the texts of each pack, and the batch's shape.

    Fields:
      packs: at most B; the text of slot s is the pack's item s.
      slots: S.
    """

    packs: list[list[int]]
    slots: int

    def arrays(self, texts: Sequence[Int32[np.ndarray, "_"]]) -> tuple[Int32[np.ndarray, "B T"], ...]:
        """Returns the ids of all texts of the batch, and the slot of each position, which is S for padding."""
        tokens_BT = np.zeros((self.size, self.length), np.int32)
        slots_BT = np.full((self.size, self.length), self.slots, np.int32)
        for row, members in enumerate(self.packs):
            filled = sum(len(texts[index]) for index in members)
            tokens_BT[row, :filled] = np.concatenate([texts[index] for index in members])
            slots_BT[row, :filled] = np.repeat(np.arange(len(members)), [len(texts[index]) for index in members])
        return tokens_BT, slots_BT


def packed_batches(lengths: Sequence[int], devices: int = 1, *, share: bool = True) -> list[PackedBatch]:
    """Groups texts of these lengths into batches, packed if that costs less than one text per row.

    Costs are those of `batches_by_length`. All batches of packs have one shape; of a few T, from that of the longest
    text on, the cheapest is taken. Texts that fit one batch without packing stay alone in their rows, so that a caller
    with few texts at a time has few shapes.

    Args:
      devices: devices that share the rows of a batch; B is a multiple of it.
      share: False: leave each text alone in a row of about its length.
    """
    unpacked = batches_by_length(lengths, devices)
    made = [[_one_per_row(batch) for batch in unpacked]]
    if share and len(unpacked) > 1:
        longest = padded_length(max(lengths))
        rows = [factor * longest for factor in FACTORS if factor == 1 or factor * longest <= BATCH_TOKENS]
        made += [_packed(lengths, length, devices) for length in rows]
    return min(made, key=lambda batches: _pack_cost(batches, devices))


def _one_per_row(batch: Batch) -> PackedBatch:
    return PackedBatch(packs=[[row] for row in batch.rows], size=batch.size, length=batch.length, slots=1)


def _packed(lengths: Sequence[int], length: int, devices: int) -> list[PackedBatch]:
    packs = pack(np.array(lengths, np.int64), length, np.arange(len(lengths)))
    slots = 1 << (max(map(len, packs)) - 1).bit_length()  # few values, because each compiles
    size, batches = equal_batches(len(packs), length, devices)
    pieces = [packs[at * size : (at + 1) * size] for at in range(batches)]
    return [PackedBatch(packs=piece, size=size, length=length, slots=slots) for piece in pieces]


def _pack_cost(batches: Sequence[PackedBatch], devices: int) -> int:
    shapes = {batch.shape for batch in batches}
    return SHAPE_COST * len(shapes) + sum(batch.positions for batch in batches) // devices
