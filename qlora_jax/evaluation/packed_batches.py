"""Packs texts into batches, so that few positions are padding and few programs compute them.

Dimension key: B packs of a batch, T positions, S slots for the texts of a pack.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from qlora_jax.data.batching.packing import pack
from qlora_jax.evaluation.batches import (
    BATCH_TOKENS,
    SHAPE_COST,
    Batch,
    BatchShape,
    batches_by_length,
    equal_batches,
    padded_length,
)

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
    return min(made, key=lambda batches: _cost(batches, devices))


def _one_per_row(batch: Batch) -> PackedBatch:
    return PackedBatch(packs=[[row] for row in batch.rows], size=batch.size, length=batch.length, slots=1)


def _packed(lengths: Sequence[int], length: int, devices: int) -> list[PackedBatch]:
    packs = pack(np.array(lengths, np.int64), length, np.arange(len(lengths)))
    slots = 1 << (max(map(len, packs)) - 1).bit_length()  # few values, because each compiles
    size, batches = equal_batches(len(packs), length, devices)
    pieces = [packs[at * size : (at + 1) * size] for at in range(batches)]
    return [PackedBatch(packs=piece, size=size, length=length, slots=slots) for piece in pieces]


def _cost(batches: Sequence[PackedBatch], devices: int) -> int:
    shapes = {batch.shape for batch in batches}
    return SHAPE_COST * len(shapes) + sum(batch.positions for batch in batches) // devices
