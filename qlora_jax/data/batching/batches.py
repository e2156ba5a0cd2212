"""Batches: which rows an optimizer step sees, and the arrays it gets. A pure function of (seed, epoch, window, index).

An epoch has one window of all rows, or several (mixture.py), in an order of its own. A window shuffles its rows, deals
them to their length buckets, and cuts each bucket into steps of accumulation x micro_batch_size rows, so that all
micro-batches of a step have one shape. Rows that fill no step go up to the next bucket; the steps are shuffled. The
last step to be filled may have gaps: all-padding rows of weight 0. So every row is seen exactly once, and a window
always has ceil(rows / rows a step) steps.

Where rows are packed (packing.py), a pack takes the place of a row: all have one length, and a window shuffles which
rows of equal length are together, and the packs.

Dimension key: A micro-batches, B rows (or packs) of each, T places, R data rows in the fullest of them (1 unpacked).
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from qlora_jax.data.batching.buckets import bucket_of
from qlora_jax.data.batching.mixture import Mixture
from qlora_jax.data.batching.packing import pack
from qlora_jax.data.rows import TokenRows

START = {"epoch": 0, "window": 0, "index": 0}
NO_ROW = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Arrays of one optimizer step, right-padded.

    A row of n ids fills n - 1 places: `inputs` its ids but the last, `targets` its ids but the first, `weights` 1 where
    the target is supervised. What is padding is known by length, never by its id.

    Fields:
      segments: which row of its pack each place belongs to, ascending from 0, padding being the last; None unpacked.
      rows: number in the data file of each row (`TokenRows.where` tells the line); -1 where there is none.
      lengths: places that each row fills; 0 where there is none.
      position: where to go on once this batch has been trained on; None in evaluation.
    """

    inputs: Int32[np.ndarray, "A B T"]
    targets: Int32[np.ndarray, "A B T"]
    weights: Float32[np.ndarray, "A B T"]
    segments: Int32[np.ndarray, "A B T"] | None
    rows: Int64[np.ndarray, "A B R"]
    lengths: Int64[np.ndarray, "A B R"]
    position: dict[str, int] | None = None

    @property
    def tokens(self) -> int:
        """Places filled, padding not counted."""
        return int(self.lengths.sum())

    def arrays(self) -> dict[str, np.ndarray]:
        """What a compiled step takes."""
        named = {"inputs": self.inputs, "targets": self.targets, "weights": self.weights}
        return named if self.segments is None else named | {"segments": self.segments}


class PlannedStep(NamedTuple):
    """One optimizer step of an epoch: its length, and the indices of its rows (-1: no row)."""

    length: int
    rows: Int64[np.ndarray, "AB R"]


def plan_epoch(
    places: Int64[np.ndarray, " rows"],
    buckets: Sequence[int],
    rows_per_step: int,
    seed: int,
    epoch: int,
    window: int = 0,
) -> list[PlannedStep]:
    """The steps of one window of an epoch, each row in exactly one of them."""
    generator = _generator(seed, epoch, window)
    order = generator.permutation(len(places))
    bucket = bucket_of(places, buckets)[order]
    steps: list[PlannedStep] = []
    carried = np.zeros(0, np.int64)
    for index, length in enumerate(buckets):
        pool = np.concatenate([carried, order[bucket == index]])
        full = len(pool) // rows_per_step * rows_per_step
        steps += [PlannedStep(length, chosen) for chosen in pool[:full].reshape(-1, rows_per_step, 1)]
        carried = pool[full:]
    if len(carried):
        gaps = np.full(rows_per_step - len(carried), NO_ROW)
        steps.append(PlannedStep(buckets[-1], np.concatenate([carried, gaps])[:, None]))
    return [steps[index] for index in generator.permutation(len(steps))]


def plan_packed_epoch(
    places: Int64[np.ndarray, " rows"], capacity: int, packs_per_step: int, seed: int, epoch: int, window: int = 0
) -> list[PlannedStep]:
    """The steps of one window of an epoch of packs, each row in exactly one of them; the last may have gaps."""
    generator = _generator(seed, epoch, window)
    packs = pack(places, capacity, generator.permutation(len(places)))
    steps = -(-len(packs) // packs_per_step)
    rows = np.full((steps * packs_per_step, max(map(len, packs))), NO_ROW)
    for place, index in enumerate(generator.permutation(len(packs))):
        rows[place, : len(packs[index])] = packs[index]
    return [PlannedStep(capacity, chosen) for chosen in rows.reshape(steps, packs_per_step, -1)]


def window_order(seed: int, epoch: int, windows: int) -> Int64[np.ndarray, " windows"]:
    """Which window comes when in an epoch."""
    return np.random.default_rng([seed, epoch, windows]).permutation(windows)


def _generator(seed: int, epoch: int, window: int) -> np.random.Generator:
    """Of the first window that which an epoch without windows has."""
    return np.random.default_rng([seed, epoch, window] if window else [seed, epoch])


def train_batches(
    rows: TokenRows | Mixture,
    buckets: Sequence[int],
    *,
    packed: bool = False,
    accumulation: int,
    micro_batch_size: int,
    seed: int,
    pad_id: int,
    position: Mapping[str, int] = START,
) -> Iterator[Batch]:
    """Batches without end, epoch after epoch, from `position` on.

    Going on from a batch's own `position` gives exactly the batches that would have followed it.

    Args:
      packed: whether rows share rows of the batch; then `buckets` is the one length of all packs.

    Raises:
      ValueError: a position that this data set does not have.
    """
    shape, per_step = (accumulation, micro_batch_size), accumulation * micro_batch_size
    plan = functools.partial(plan_packed_epoch, capacity=buckets[-1], packs_per_step=per_step, seed=seed)
    if not packed:
        plan = functools.partial(plan_epoch, buckets=buckets, rows_per_step=per_step, seed=seed)
    if set(position) != set(START) or position["epoch"] < 0 or not 0 <= position["window"] < rows.windows:
        raise ValueError(_no_position(position, f"{rows.windows} windows an epoch"))
    epoch, window, index = (position[name] for name in START)
    while True:
        held = rows.window(epoch, int(window_order(seed, epoch, rows.windows)[window]))
        steps = plan(held.rows.lengths[held.indices], epoch=epoch, window=window)
        if not 0 <= index < len(steps):
            raise ValueError(_no_position(position, f"steps 0 to {len(steps) - 1} in that window"))
        following = (epoch, window + 1) if window + 1 < rows.windows else (epoch + 1, 0)
        for step in steps[index:]:
            index += 1
            after = (epoch, window, index) if index < len(steps) else (*following, 0)
            chosen = np.where(step.rows == NO_ROW, NO_ROW, held.indices[step.rows]).reshape(*shape, -1)
            at = dict(zip(START, after, strict=True))
            yield fill(held.rows, chosen, step.length, pad_id, packed=packed, position=at)
        (epoch, window), index = following, 0


def _no_position(position: Mapping[str, int], found: str) -> str:
    return (
        f"data position {dict(position)} does not exist: this data set has {found}. "
        "Have the data, data.max_length or the batch size changed since it was saved?"
    )


def eval_batches(rows: TokenRows, buckets: Sequence[int], *, batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Every row once, shortest first (so that little is padding), in batches [1, batch_size, T]."""
    order = np.argsort(rows.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        chosen = np.full((1, batch_size, 1), NO_ROW)
        some = order[start : start + batch_size]
        chosen[0, : len(some), 0] = some
        length = buckets[bucket_of(rows.lengths[some[-1:]], buckets)[0]]
        yield fill(rows, chosen, length, pad_id)


def fill(
    rows: TokenRows,
    chosen: Int64[np.ndarray, "A B R"],
    length: int,
    pad_id: int,
    *,
    packed: bool = False,
    position: dict[str, int] | None = None,
) -> Batch:
    """The arrays of the rows at indices `chosen`, those of one pack one behind the other, padded to `length`."""
    shape = (*chosen.shape[:2], length)
    inputs, targets = np.full(shape, pad_id, np.int32), np.full(shape, pad_id, np.int32)
    weights, segments = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    filled, lengths = np.zeros(shape[:2], np.int64), np.zeros(chosen.shape, np.int64)
    for (*place, slot), index in np.ndenumerate(chosen):
        if index != NO_ROW:
            at = tuple(place)
            ids, supervised = rows.row(int(index))
            lengths[*at, slot] = len(ids) - 1
            span = slice(filled[at], filled[at] + len(ids) - 1)
            inputs[at][span], targets[at][span], weights[at][span] = ids[:-1], ids[1:], supervised[1:]
            segments[at][span.stop :] += 1
            filled[at] = span.stop
    return Batch(
        inputs=inputs,
        targets=targets,
        weights=weights,
        segments=segments if packed else None,
        rows=np.where(chosen == NO_ROW, NO_ROW, rows.numbers[chosen]),
        lengths=lengths,
        position=position,
    )
