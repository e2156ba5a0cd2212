"""Batches: which rows an optimizer step sees, and the arrays it gets. A pure function of (seed, epoch, index).

An epoch shuffles the rows, deals them to their length buckets, and cuts each bucket into steps of accumulation x
micro_batch_size rows, so that all micro-batches of a step have one shape. Rows that fill no step go up to the next
bucket; the steps are shuffled. The last step to be filled may have gaps: all-padding rows of weight 0. So every row is
seen exactly once an epoch, and an epoch always has ceil(rows / rows a step) steps.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from qlora_jax.data.buckets import bucket_of
from qlora_jax.data.rows import TokenRows

START = {"epoch": 0, "index": 0}
NO_ROW = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Arrays of one optimizer step: A micro-batches of B rows, T places, right-padded.

    A row of n ids fills n - 1 places: `inputs` its ids but the last, `targets` its ids but the first, `weights` 1 where
    the target is supervised. What is padding is known by length, never by its id.

    Fields:
      tokens: places filled, padding not counted.
      rows: number in the data file of each row (`TokenRows.where` tells the line); -1 for an all-padding row.
      position: where to go on once this batch has been trained on; None in evaluation.
    """

    inputs: Int32[np.ndarray, "A B T"]
    targets: Int32[np.ndarray, "A B T"]
    weights: Float32[np.ndarray, "A B T"]
    rows: Int64[np.ndarray, "A B"]
    tokens: int
    position: dict[str, int] | None = None


class Step(NamedTuple):
    """One optimizer step of an epoch: its length, and the index of each of its rows (-1: no row)."""

    length: int
    rows: Int64[np.ndarray, " rows_per_step"]


def plan_epoch(
    places: Int64[np.ndarray, " rows"], buckets: Sequence[int], rows_per_step: int, seed: int, epoch: int
) -> list[Step]:
    """The steps of one epoch, each row in exactly one of them."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(places))
    bucket = bucket_of(places, buckets)[order]
    steps: list[Step] = []
    carried = np.zeros(0, np.int64)
    for index, length in enumerate(buckets):
        pool = np.concatenate([carried, order[bucket == index]])
        full = len(pool) // rows_per_step * rows_per_step
        steps += [Step(length, chosen) for chosen in pool[:full].reshape(-1, rows_per_step)]
        carried = pool[full:]
    if len(carried):
        gaps = np.full(rows_per_step - len(carried), NO_ROW)
        steps.append(Step(buckets[-1], np.concatenate([carried, gaps])))
    return [steps[index] for index in generator.permutation(len(steps))]


def train_batches(
    rows: TokenRows,
    buckets: Sequence[int],
    *,
    accumulation: int,
    micro_batch_size: int,
    seed: int,
    pad_id: int,
    position: Mapping[str, int] = START,
) -> Iterator[Batch]:
    """Batches without end, epoch after epoch, from `position` on.

    Going on from a batch's own `position` gives exactly the batches that would have followed it.

    Raises:
      ValueError: a position that this data set does not have.
    """
    shape = (accumulation, micro_batch_size)
    epoch, index = _checked(position, -(-len(rows) // (accumulation * micro_batch_size)))
    while True:
        steps = plan_epoch(rows.places, buckets, accumulation * micro_batch_size, seed, epoch)
        for step in steps[index:]:
            index += 1
            after = {"epoch": epoch, "index": index} if index < len(steps) else {"epoch": epoch + 1, "index": 0}
            yield fill(rows, step.rows.reshape(shape), step.length, pad_id, after)
        epoch, index = epoch + 1, 0


def _checked(position: Mapping[str, int], steps: int) -> tuple[int, int]:
    epoch, index = position.get("epoch", -1), position.get("index", -1)
    if set(position) != set(START) or epoch < 0 or not 0 <= index < steps:
        raise ValueError(
            f"data position {dict(position)} does not exist: this data set has steps 0 to {steps - 1} an epoch. "
            "Have the data, data.max_length or the batch size changed since it was saved?"
        )
    return epoch, index


def eval_batches(rows: TokenRows, buckets: Sequence[int], *, batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Every row once, shortest first (so that little is padding), in batches [1, batch_size, T]."""
    order = np.argsort(rows.places, kind="stable")
    for start in range(0, len(order), batch_size):
        chosen = np.full((1, batch_size), NO_ROW)
        some = order[start : start + batch_size]
        chosen[0, : len(some)] = some
        length = buckets[bucket_of(rows.places[some[-1:]], buckets)[0]]
        yield fill(rows, chosen, length, pad_id)


def fill(
    rows: TokenRows,
    chosen: Int64[np.ndarray, "A B"],
    length: int,
    pad_id: int,
    position: dict[str, int] | None = None,
) -> Batch:
    """The arrays of the rows at indices `chosen`, padded to `length`."""
    shape = (*chosen.shape, length)
    inputs, targets = np.full(shape, pad_id, np.int32), np.full(shape, pad_id, np.int32)
    weights, numbers = np.zeros(shape, np.float32), np.full(chosen.shape, NO_ROW, np.int64)
    tokens = 0
    for place, index in np.ndenumerate(chosen):
        if index != NO_ROW:
            ids, supervised = rows.row(int(index))
            tokens += len(ids) - 1
            inputs[place][: len(ids) - 1] = ids[:-1]
            targets[place][: len(ids) - 1] = ids[1:]
            weights[place][: len(ids) - 1] = supervised[1:]
            numbers[place] = rows.numbers[index]
    return Batch(inputs=inputs, targets=targets, weights=weights, rows=numbers, tokens=tokens, position=position)
