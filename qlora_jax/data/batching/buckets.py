"""Length buckets: the few padded lengths of batches, chosen for the least padding over the actual rows."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

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
