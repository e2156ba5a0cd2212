"""Packing: several rows in one row of a batch, so that hardly a place is padding.

Best-fit decreasing: rows are taken longest first, each into the fullest pack that still holds it. It needs at most
11/9 of the fewest packs there could be, and four (Johnson et al. 1974). How many there are depends on the lengths
alone, not on the order that rows of one length are taken in.
"""

import bisect

import numpy as np
from jaxtyping import Int64

from qlora_jax.data.batching.buckets import UNIT


def pack_length(max_length: int) -> int:
    """Places of a pack: those of the longest row there may be, in whole units of 64."""
    return -(-(max_length - 1) // UNIT) * UNIT


def pack(places: Int64[np.ndarray, " rows"], capacity: int, order: Int64[np.ndarray, " rows"]) -> list[list[int]]:
    """The indices of the rows in each pack: every row in one, none fuller than `capacity`.

    Rows of equal length are taken in `order`.

    Raises:
      ValueError: a row that no pack holds.
    """
    if len(places) and places.max() > capacity:
        raise ValueError(f"a row of {places.max()} places does not fit a pack of {capacity}")
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # packs by the places that are left in them
    rooms: list[int] = []  # keys of by_room, ascending
    for index in order[np.argsort(-places[order], kind="stable")].tolist():
        size = int(places[index])
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
