"""Length buckets, and packing: several rows in one row of a batch, so that few positions are padding.

Best-fit decreasing takes rows longest first and puts each into the fullest pack with enough room. It needs at most 11/9
of the smallest possible number of packs, plus four (Johnson et al. 1974). The number of packs depends only on the
lengths, not on the order of rows with equal lengths.

Dimension key: A micro-batches, B rows (or packs) of each, R data rows in the fullest pack, S slots.
"""

import bisect
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Int32, Int64

UNIT = 64  # bucket lengths are multiples of it

# Each length needs a compilation of the training step. One more has to save at least this share of the positions.
_WORTH_A_COMPILATION = 0.02


Units = Int64[np.ndarray, " units"]  # number of rows that fill ceil(length / 64) = 0, 1, 2, ... units


def count_units(lengths: Int64[np.ndarray, " rows"], longest: int) -> Units:
    """Returns the histogram of rows by units, up to a row of `longest` positions."""
    return np.bincount(-(-lengths // UNIT), minlength=-(-longest // UNIT) + 1)


def choose_buckets(units: Units, rows_per_step: int, max_buckets: int) -> tuple[int, ...]:
    """Returns at most `max_buckets` lengths: ascending multiples of 64. The last is at least the longest row.

    Dynamic programming over the histogram finds the best lengths for each number of lengths. The smallest number within
    2 % of the fewest positions per epoch is used. Steps are counted by `steps_by_bucket`.
    """
    candidates = [tuple(UNIT * edge for edge in edges) for edges in _best_edges(units, max_buckets)]
    taken = [padded_positions(units, candidate, rows_per_step) for candidate in candidates]
    good = min(taken) * (1 + _WORTH_A_COMPILATION)
    return next(candidate for candidate, cost in zip(candidates, taken, strict=True) if cost <= good)


def bucket_of(lengths: Int64[np.ndarray, " rows"], buckets: Sequence[int]) -> Int64[np.ndarray, " rows"]:
    """Returns the index of the smallest bucket that each row fits."""
    return np.searchsorted(np.array(buckets), lengths, side="left")


def steps_by_bucket(counts: Sequence[int], rows_per_step: int) -> list[int]:
    """Returns the steps per epoch in each bucket, ceil(rows / rows_per_step) in total.

    Rows that do not fill a step go to the next bucket. The last step of the last bucket may have gaps.
    """
    steps, carried = [], 0
    for count in counts:
        full, carried = divmod(count + carried, rows_per_step)
        steps.append(full)
    steps[-1] += carried > 0
    return steps


def padded_positions(units: Units, buckets: Sequence[int], rows_per_step: int) -> int:
    """Returns the positions of all batches of an epoch, padding included."""
    edges = np.array(buckets) // UNIT + 1
    counts = [int(part.sum()) for part in np.split(units, edges)[:-1]]
    return sum(
        n * length * rows_per_step for n, length in zip(steps_by_bucket(counts, rows_per_step), buckets, strict=True)
    )


def _best_edges(counts: Int64[np.ndarray, " units"], max_buckets: int) -> list[tuple[int, ...]]:
    """Returns, for 1 to `max_buckets` edges, those that minimise the sum over rows of the smallest edge >= its unit."""
    used = np.flatnonzero(counts)
    below = np.concatenate([[0], np.cumsum(counts[used])])  # rows in the first i used units
    # cost[i, j]: rows of used units i..j-1 padded to the last of them.
    cost = np.where(np.triu(np.ones((len(used), len(used)), bool)), used * (below[1:] - below[:-1, None]), np.inf)
    best, choices = cost[0], [np.zeros(len(used), int)]
    solutions: list[tuple[int, ...]] = [(int(used[-1]),)]
    for _ in range(min(max_buckets, len(used)) - 1):
        # Before the bucket that starts at unit i comes the best split of units 0..i-1.
        options = np.concatenate([[np.inf], best[:-1]])[:, None] + cost
        choices.append(options.argmin(axis=0))
        best = options.min(axis=0)
        solutions.append(_edges(used, choices))
    return solutions


def _edges(used: Int64[np.ndarray, " used"], choices: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Returns the edges: follows the choices back from the last unit."""
    edges, last = [], len(used) - 1
    for choice in reversed(choices):
        edges.append(int(used[last]))
        last = choice[last] - 1
    return tuple(reversed(edges))


# Slots: one per sequence of a batch row, for what an objective reads or computes per sequence.
#
# A row's sequences are its branches, or the whole row if it has none. They have neighbouring slots: the chosen answer
# of the j-th pair has slot 2 j, the rejected one 2 j + 1.

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


NO_ROW = -1
PRESENT = "present"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Arrays of one optimizer step, right-padded.

    A row of n ids fills n - 1 positions. `inputs` are its ids without the last, `targets` its ids without the first.
    `weights` are 1 for supervised targets, otherwise 0. Padding is known by length, never by its id.

    Fields:
      segments: index of the segment that each position belongs to, ascending from 0; padding is the last. A row is one
        segment. A tree (branch_tree.py) has one for its trunk, if there is one, and one per branch. None if each
        row of the batch is one text.
      rows: number of each row in the data (`TokenRows.where` returns its line); -1 for a gap.
      lengths: positions that each row fills; 0 for a gap.
      position: data position to resume from after this batch; None in evaluation.
      parents: segment of the trunk that a position's segment continues; its own if it continues none.
      depths: positions of that trunk which a position's segment sees. Its text has `depths` + its index in the segment
        positions before it. `parents` and `depths` are None if no row of the data is a tree.
      sequences: slot (packing.py) of the branch, or of the whole row, that a position belongs to; S for trunks and
        padding. None if the objective needs no slots.
      slots: by name, `present` (1 for slots in use, otherwise 0) and the rows' values, [A, B, S] or [A, B, S, C].
      token_values: by name, numbers of each position's target; 0 where there are none.
    """

    inputs: Int32[np.ndarray, "A B T"]
    targets: Int32[np.ndarray, "A B T"]
    weights: Float32[np.ndarray, "A B T"]
    segments: Int32[np.ndarray, "A B T"] | None
    rows: Int64[np.ndarray, "A B R"]
    lengths: Int64[np.ndarray, "A B R"]
    position: dict[str, int] | None = None
    parents: Int32[np.ndarray, "A B T"] | None = None
    depths: Int32[np.ndarray, "A B T"] | None = None
    sequences: Int32[np.ndarray, "A B T"] | None = None
    slots: Mapping[str, Float32[np.ndarray, "A B S ..."]] = dataclasses.field(default_factory=dict)
    token_values: Mapping[str, Float32[np.ndarray, "A B T ..."] | Int32[np.ndarray, "A B T ..."]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def tokens(self) -> int:
        """Positions filled, without padding."""
        return int(self.lengths.sum())

    @property
    def filled(self) -> Int32[np.ndarray, "A B"]:
        """Positions that each row of the batch fills, the others are padding."""
        return self.lengths.sum(axis=-1).astype(np.int32)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arguments of a compiled step, by name."""
        names = ("inputs", "targets", "weights", "segments", "parents", "depths", "sequences")
        named = {name: getattr(self, name) for name in names}
        return {name: array for name, array in named.items() if array is not None} | {**self.slots, **self.token_values}
