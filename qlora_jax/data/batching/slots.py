"""Slots: one per sequence of a batch row, for what an objective reads or computes per sequence.

A row's sequences are its branches, or the whole row if it has none. They have neighbouring slots: the chosen answer of
the j-th pair has slot 2 j, the rejected one 2 j + 1.

Dimension key: A micro-batches, B rows (or packs) of each, R data rows in the fullest pack, S slots.
"""

import numpy as np
from jaxtyping import Float32, Int64

POSITIONS_PER_SLOT = 4  # a pack has one slot per 4 positions, so its shape follows from its length


def slot_count(length: int, *, packed: bool, sequences: int) -> int:
    """Returns the slots of a row of a batch.

    Args:
      length: its padded length.
      packed: True if it may hold several data rows.
      sequences: sequences of each data row; 0 without slots.
    """
    if not packed or not sequences:
        return sequences
    return length // (POSITIONS_PER_SLOT * sequences) * sequences


def packed_lengths(lengths: Int64[np.ndarray, " rows"], sequences: int) -> Int64[np.ndarray, " rows"]:
    """Returns the positions that rows occupy in a pack, so that the slots of any pack suffice."""
    return np.maximum(lengths, POSITIONS_PER_SLOT * sequences)


def slot_values(
    values: Float32[np.ndarray, "rows sequences ..."], chosen: Int64[np.ndarray, "A B R"], slots: int
) -> Float32[np.ndarray, "A B S ..."]:
    """Returns the values of the rows at indices `chosen`, and 0 for gaps (-1) and unused slots."""
    sequences, inner = values.shape[1], values.shape[2:]
    taken = values[chosen]
    taken[chosen < 0] = 0
    filled = np.zeros((*chosen.shape[:2], slots, *inner), np.float32)
    filled[:, :, : chosen.shape[2] * sequences] = taken.reshape(*chosen.shape[:2], -1, *inner)
    return filled
