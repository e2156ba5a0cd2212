"""Batches: the rows and the arrays of each optimizer step. A pure function of (seed, epoch, window, index).

An epoch has one window of all rows, or several windows (mixture.py) in a new order each epoch. A window shuffles its
rows, deals them to length buckets, and cuts each bucket into steps of accumulation x micro_batch_size rows. So all
micro-batches of a step have the same shape. Rows that do not fill a step go to the next longer bucket. The steps are
then shuffled. The last step of the longest bucket may have gaps: all-padding rows of weight 0. So an epoch sees every
row exactly once, and a window has ceil(rows / rows per step) steps.

With packing (packing.py), a pack replaces a row, and all packs have the same length. A window shuffles the packs, and
the rows of equal length among them.

Dimension key: A micro-batches, B rows (or packs) of each, T positions, R data rows in the fullest pack (1 unpacked).
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

    A row of n ids fills n - 1 positions. `inputs` are its ids without the last, `targets` its ids without the first.
    `weights` are 1 for supervised targets, otherwise 0. Padding is known by length, never by its id.

    Fields:
      segments: index of the row in its pack that each position belongs to, ascending from 0; padding is the last.
        None without packing.
      rows: number of each row in the data (`TokenRows.where` returns its line); -1 for a gap.
      lengths: positions that each row fills; 0 for a gap.
      position: data position to resume from after this batch; None in evaluation.
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
        """Positions filled, without padding."""
        return int(self.lengths.sum())

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arguments of a compiled step, by name."""
        named = {"inputs": self.inputs, "targets": self.targets, "weights": self.weights}
        return named if self.segments is None else named | {"segments": self.segments}


class PlannedStep(NamedTuple):
    """One optimizer step of an epoch: its padded length, and the indices of its rows (-1: gap)."""

    length: int
    rows: Int64[np.ndarray, "AB R"]


def plan_epoch(
    lengths: Int64[np.ndarray, " rows"],
    buckets: Sequence[int],
    rows_per_step: int,
    seed: int,
    epoch: int,
    window: int = 0,
) -> list[PlannedStep]:
    """Returns the steps of one window of an epoch. Each row is in exactly one of them."""
    generator = _generator(seed, epoch, window)
    order = generator.permutation(len(lengths))
    bucket = bucket_of(lengths, buckets)[order]
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
    lengths: Int64[np.ndarray, " rows"], capacity: int, packs_per_step: int, seed: int, epoch: int, window: int = 0
) -> list[PlannedStep]:
    """Returns the steps of one window of an epoch of packs. Each row is in exactly one; the last step may have gaps."""
    generator = _generator(seed, epoch, window)
    packs = pack(lengths, capacity, generator.permutation(len(lengths)))
    steps = -(-len(packs) // packs_per_step)
    rows = np.full((steps * packs_per_step, max(map(len, packs))), NO_ROW)
    for place, index in enumerate(generator.permutation(len(packs))):
        rows[place, : len(packs[index])] = packs[index]
    return [PlannedStep(capacity, chosen) for chosen in rows.reshape(steps, packs_per_step, -1)]


def window_order(seed: int, epoch: int, windows: int) -> Int64[np.ndarray, " windows"]:
    """Returns the windows in the order of an epoch."""
    return np.random.default_rng([seed, epoch, windows]).permutation(windows)


def _generator(seed: int, epoch: int, window: int) -> np.random.Generator:
    """Returns a window's generator. That of the first window is the same as without windows."""
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
    """Yields batches without end, epoch after epoch, from `position` on.

    Resuming from a batch's `position` gives exactly the batches that followed it.

    Args:
      rows: training rows, or a mixture of files.
      buckets: padded lengths, ascending.
      packed: True if several rows share a row of a batch. `buckets` is then the length of all packs.
      accumulation: micro-batches per optimizer step.
      micro_batch_size: rows, or packs, per micro-batch.
      pad_id: id at padding positions.
      position: epoch, window and index of the step to start with.

    Raises:
      ValueError: a position that this data set does not have.
    """
    shape, per_step = (accumulation, micro_batch_size), accumulation * micro_batch_size
    plan = functools.partial(plan_packed_epoch, capacity=buckets[-1], packs_per_step=per_step, seed=seed)
    if not packed:
        plan = functools.partial(plan_epoch, buckets=buckets, rows_per_step=per_step, seed=seed)
    if set(position) != set(START) or position["epoch"] < 0 or not 0 <= position["window"] < rows.windows:
        raise ValueError(_no_position(position, f"{rows.windows} windows per epoch"))
    epoch, window, index = (position[name] for name in START)
    while True:
        loaded = rows.window(epoch, int(window_order(seed, epoch, rows.windows)[window]))
        steps = plan(loaded.rows.lengths[loaded.indices], epoch=epoch, window=window)
        if not 0 <= index < len(steps):
            raise ValueError(_no_position(position, f"steps 0 to {len(steps) - 1} of that window"))
        next_window = (epoch, window + 1) if window + 1 < rows.windows else (epoch + 1, 0)
        for step in steps[index:]:
            index += 1
            after = (epoch, window, index) if index < len(steps) else (*next_window, 0)
            chosen = np.where(step.rows == NO_ROW, NO_ROW, loaded.indices[step.rows]).reshape(*shape, -1)
            at = dict(zip(START, after, strict=True))
            yield fill_batch(loaded.rows, chosen, step.length, pad_id, packed=packed, position=at)
        (epoch, window), index = next_window, 0


def _no_position(position: Mapping[str, int], found: str) -> str:
    return (
        f"data position: not in this data set (found {dict(position)}, expected one within {found}). "
        "Restore the data, data.max_length and the batch size with which the checkpoint was saved."
    )


def eval_batches(rows: TokenRows, buckets: Sequence[int], *, batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Yields batches [1, batch_size, T] with every row once, shortest first, so that padding is short."""
    order = np.argsort(rows.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        chosen = np.full((1, batch_size, 1), NO_ROW)
        some = order[start : start + batch_size]
        chosen[0, : len(some), 0] = some
        length = buckets[bucket_of(rows.lengths[some[-1:]], buckets)[0]]
        yield fill_batch(rows, chosen, length, pad_id)


def fill_batch(
    rows: TokenRows,
    chosen: Int64[np.ndarray, "A B R"],
    length: int,
    pad_id: int,
    *,
    packed: bool = False,
    position: dict[str, int] | None = None,
) -> Batch:
    """Returns the arrays of the rows at indices `chosen`, with the rows of a pack in order, padded to `length`."""
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
