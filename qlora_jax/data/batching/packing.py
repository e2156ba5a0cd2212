"""Packing: several rows in one row of a batch, so that few positions are padding.

Best-fit decreasing takes rows longest first and puts each into the fullest pack with enough room. It needs at most 11/9
of the smallest possible number of packs, plus four (Johnson et al. 1974). The number of packs depends only on the
lengths, not on the order of rows with equal lengths.
"""

import bisect

import numpy as np
from jaxtyping import Int64

from qlora_jax.data.batching.buckets import UNIT


def pack_length(max_length: int) -> int:
    """Returns the positions of a pack: those of the longest possible row, rounded up to a multiple of 64."""
    return -(-(max_length - 1) // UNIT) * UNIT


def pack(lengths: Int64[np.ndarray, " rows"], capacity: int, order: Int64[np.ndarray, " rows"]) -> list[list[int]]:
    """Returns the indices of the rows in each pack. Each row is in one pack, of at most `capacity` positions.

    Args:
      lengths: positions that each row fills.
      capacity: positions of a pack.
      order: permutation of the rows. Rows of equal length are packed in this order.

    Raises:
      ValueError: a row is longer than a pack.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(
            f"packing: a row does not fit a pack (found {lengths.max()} positions, expected at most {capacity})"
        )
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # packs by the positions left in them
    rooms: list[int] = []  # keys of by_room, ascending
    for index in order[np.argsort(-lengths[order], kind="stable")].tolist():
        size = int(lengths[index])
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            room, chosen = capacity, len(packs)
            packs.append([])
        else:
            room = rooms[at]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        packs[chosen].append(index)
        _put(by_room, rooms, room - size, chosen)
    return packs


def _put(by_room: dict[int, list[int]], rooms: list[int], room: int, chosen: int) -> None:
    if room not in by_room:
        by_room[room] = []
        bisect.insort(rooms, room)
    by_room[room].append(chosen)
