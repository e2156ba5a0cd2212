"""Length buckets: the few padded lengths that batches come in, chosen to pad least over the actual rows."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

UNIT = 64  # bucket lengths are multiples of it

# Each length is a compilation of the training step, so one more has to save at least this share of the places.
_WORTH_A_COMPILATION = 0.02


Units = Int64[np.ndarray, " units"]  # how many rows fill ceil(places / 64) = 0, 1, 2, ... units


def count_units(places: Int64[np.ndarray, " rows"], longest: int) -> Units:
    """The histogram of rows by units, up to those of a row of `longest` places."""
    return np.bincount(-(-places // UNIT), minlength=-(-longest // UNIT) + 1)


def choose_buckets(units: Units, rows_per_step: int, most: int) -> tuple[int, ...]:
    """At most `most` lengths, ascending, multiples of 64, the last holding every row.

    For each number of lengths the best ones are found exactly (dynamic programming over the histogram); among those
    numbers, the smallest that comes within 2 % of the fewest places an epoch takes, with steps filled as
    `steps_by_bucket` says.
    """
    candidates = [tuple(UNIT * edge for edge in edges) for edges in _best_edges(units, most)]
    taken = [padded_positions(units, candidate, rows_per_step) for candidate in candidates]
    good = min(taken) * (1 + _WORTH_A_COMPILATION)
    return next(candidate for candidate, cost in zip(candidates, taken, strict=True) if cost <= good)


def bucket_of(places: Int64[np.ndarray, " rows"], buckets: Sequence[int]) -> Int64[np.ndarray, " rows"]:
    """Index of the smallest bucket that holds each row."""
    return np.searchsorted(np.array(buckets), places, side="left")


def steps_by_bucket(counts: Sequence[int], rows_per_step: int) -> list[int]:
    """Steps an epoch takes in each bucket; ceil(rows / rows_per_step) in all.

    Rows that fill no step go up to the next bucket; the last step of the last bucket may have gaps.
    """
    steps, carried = [], 0
    for count in counts:
        full, carried = divmod(count + carried, rows_per_step)
        steps.append(full)
    steps[-1] += carried > 0
    return steps


def padded_positions(units: Units, buckets: Sequence[int], rows_per_step: int) -> int:
    """Places that the batches of one epoch hold, padding included."""
    edges = np.array(buckets) // UNIT + 1
    counts = [int(part.sum()) for part in np.split(units, edges)[:-1]]
    return sum(
        n * length * rows_per_step for n, length in zip(steps_by_bucket(counts, rows_per_step), buckets, strict=True)
    )


def _best_edges(counts: Int64[np.ndarray, " units"], most: int) -> list[tuple[int, ...]]:
    """For 1, 2, ..., `most` edges: those that minimise sum over rows of the smallest edge >= the row's unit."""
    used = np.flatnonzero(counts)
    below = np.concatenate([[0], np.cumsum(counts[used])])  # rows in the first i used units
    # cost[i, j]: rows of used units i..j-1 padded to the last of them.
    cost = np.where(np.triu(np.ones((len(used), len(used)), bool)), used * (below[1:] - below[:-1, None]), np.inf)
    best, choices = cost[0], [np.zeros(len(used), int)]
    solutions: list[tuple[int, ...]] = [(int(used[-1]),)]
    for _ in range(min(most, len(used)) - 1):
        # Before the bucket that starts at unit i, the best split of units 0..i-1.
        options = np.concatenate([[np.inf], best[:-1]])[:, None] + cost
        choices.append(options.argmin(axis=0))
        best = options.min(axis=0)
        solutions.append(_edges(used, choices))
    return solutions


def _edges(used: Int64[np.ndarray, " used"], choices: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Walks the choices back from the last unit."""
    edges, last = [], len(used) - 1
    for choice in reversed(choices):
        edges.append(int(used[last]))
        last = choice[last] - 1
    return tuple(reversed(edges))
