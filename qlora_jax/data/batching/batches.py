"""Batches: the rows and the arrays of each optimizer step. A pure function of (seed, epoch, window, index).

An epoch has one window of all rows, or several windows (mixture.py) in a new order each epoch. A window shuffles its
rows, deals them to length buckets, and cuts each bucket into steps of accumulation x micro_batch_size rows. So all
micro-batches of a step have the same shape. Rows that do not fill a step go to the next longer bucket. The steps are
then shuffled. The last step of the longest bucket may have gaps: all-padding rows of weight 0. So an epoch sees every
row exactly once, and a window has ceil(rows / rows per step) steps.

With packing (packing.py), a pack replaces a row, and all packs have the same length. A window shuffles the packs, and
the rows of equal length among them.

Dimension key: A micro-batches, B rows (or packs) of each, T positions, R data rows in the fullest pack (1 unpacked),
S slots (packing.py), C numbers per slot.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from qlora_jax.data.batching.mixture import Mixture
from qlora_jax.data.batching.packing import (
    NO_ROW,
    PRESENT,
    Batch,
    bucket_of,
    pack,
    packed_lengths,
    slot_count,
    slot_values,
)
from qlora_jax.data.branch_tree import Positions, lay_out
from qlora_jax.data.rows import TokenRows

START = {"epoch": 0, "window": 0, "index": 0}


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
    lengths: Int64[np.ndarray, " rows"],
    capacity: int,
    packs_per_step: int,
    seed: int,
    epoch: int,
    window: int = 0,
    sequences: int = 0,
) -> list[PlannedStep]:
    """Returns the steps of one window of an epoch of packs. Each row is in exactly one; the last step may have gaps."""
    generator = _generator(seed, epoch, window)
    packs = pack(packed_lengths(lengths, sequences), capacity, generator.permutation(len(lengths)))
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
    sequences: int = 0,
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
      sequences: sequences of each row, which have slots in the batch; 0: no slots.
      accumulation: micro-batches per optimizer step.
      micro_batch_size: rows, or packs, per micro-batch.
      pad_id: id at padding positions.
      position: epoch, window and index of the step to start with.

    Raises:
      ValueError: a position that this data set does not have.
    """
    shape, per_step = (accumulation, micro_batch_size), accumulation * micro_batch_size
    plan = functools.partial(
        plan_packed_epoch, capacity=buckets[-1], packs_per_step=per_step, seed=seed, sequences=sequences
    )
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
            yield fill_batch(loaded.rows, chosen, step.length, pad_id, packed=packed, sequences=sequences, position=at)
        (epoch, window), index = next_window, 0


def _no_position(position: Mapping[str, int], found: str) -> str:
    return (
        f"data position: not in this data set (found {dict(position)}, expected one within {found}). "
        "Restore the data, data.max_length and the batch size with which the checkpoint was saved."
    )


def eval_batches(
    rows: TokenRows, buckets: Sequence[int], *, batch_size: int, pad_id: int, sequences: int = 0
) -> Iterator[Batch]:
    """Yields batches [1, batch_size, T] with every row once, shortest first, so that padding is short."""
    order = np.argsort(rows.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        chosen = np.full((1, batch_size, 1), NO_ROW)
        some = order[start : start + batch_size]
        chosen[0, : len(some), 0] = some
        length = buckets[bucket_of(rows.lengths[some[-1:]], buckets)[0]]
        yield fill_batch(rows, chosen, length, pad_id, sequences=sequences)


def fill_batch(
    rows: TokenRows,
    chosen: Int64[np.ndarray, "A B R"],
    length: int,
    pad_id: int,
    *,
    packed: bool = False,
    sequences: int = 0,
    position: dict[str, int] | None = None,
) -> Batch:
    """Returns the arrays of the rows at indices `chosen`, with the rows of a pack in order, padded to `length`.

    Args:
      sequences: sequences of each row, which have slots in the batch; 0: no slots.
    """
    slots, is_tree = slot_count(length, packed=packed, sequences=sequences), rows.branching
    shape = (*chosen.shape[:2], length)
    ids = {name: np.full(shape, pad_id, np.int32) for name in ("inputs", "targets")}
    filled = ids | {"weights": np.zeros(shape, np.float32)}
    structure = ["segments"] * (packed or is_tree) + ["parents", "depths"] * is_tree
    filled |= {name: np.zeros_like(filled["inputs"]) for name in structure}
    if sequences:
        filled["sequences"] = np.full_like(filled["inputs"], slots)
    ends, lengths = np.zeros(chosen.shape[:2], np.int64), np.zeros(chosen.shape, np.int64)
    for (*place, nth), index in np.ndenumerate(chosen):
        if index != NO_ROW:
            at = tuple(place)
            row = lay_out(*rows.row(int(index)), rows.branches_of(int(index)))
            _put_row(filled, at, int(ends[at]), row, nth * sequences)
            lengths[*at, nth] = len(row.inputs)
            ends[at] += len(row.inputs)
    return Batch(
        inputs=filled["inputs"],
        targets=filled["targets"],
        weights=filled["weights"],
        segments=filled.get("segments"),
        rows=np.where(chosen == NO_ROW, NO_ROW, rows.numbers[chosen]),
        lengths=lengths,
        position=position,
        parents=filled.get("parents"),
        depths=filled.get("depths"),
        sequences=filled.get("sequences"),
        slots=_slots(rows, chosen, sequences, slots) if sequences else {},
    )


def _put_row(filled: dict[str, np.ndarray], at: tuple[int, ...], start: int, row: Positions, slot: int) -> None:
    """Writes a row at position `start` of the batch's row `at`. Its first sequence has the slot `slot`."""
    span, rest = slice(start, start + len(row.inputs)), slice(start + len(row.inputs), None)
    for name in ("inputs", "targets", "weights"):
        filled[name][at][span] = getattr(row, name)
    if "segments" in filled:
        first = int(filled["segments"][at][start])  # the segment of padding, which becomes the row's first
        for name in {"segments", "parents"} & filled.keys():
            filled[name][at][span] = first + getattr(row, name)
            filled[name][at][rest] = first + row.segments[-1] + 1
    if "depths" in filled:
        filled["depths"][at][span] = row.depths
    if "sequences" in filled:
        in_branch = row.branches >= 0
        filled["sequences"][at][span][in_branch] = slot + row.branches[in_branch]


def _slots(rows: TokenRows, chosen: Int64[np.ndarray, "A B R"], sequences: int, slots: int) -> dict[str, np.ndarray]:
    present = np.ones((len(rows), sequences), np.float32)
    named = {PRESENT: present, **rows.values}
    return {name: slot_values(values, chosen, slots) for name, values in named.items()}
