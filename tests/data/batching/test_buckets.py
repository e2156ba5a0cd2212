"""Length buckets: least padding, few compilations, and about the padding of the reference's sampler."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.batching.batches import plan_epoch
from qlora_jax.data.batching.packing import choose_buckets, count_units, padded_positions, steps_by_bucket


def units(places: np.ndarray) -> np.ndarray:
    return count_units(places, 640)


@given(st.lists(st.integers(1, 640), min_size=1, max_size=40), st.integers(1, 8), st.integers(1, 4))
def test_no_choice_of_as_many_buckets_pads_rows_less(places: list[int], rows_per_step: int, most: int):
    rows = np.array(places, np.int64)
    buckets = choose_buckets(units(rows), rows_per_step, most)
    assert len(buckets) <= most and buckets == tuple(sorted(set(buckets))) and buckets[-1] >= rows.max()
    assert all(length % 64 == 0 for length in buckets)

    def padded(chosen: tuple[int, ...]) -> int:
        return sum(min(length for length in chosen if length >= n) for n in places)

    top = -(-max(places) // 64) * 64
    others = itertools.combinations(range(64, top, 64), len(buckets) - 1)
    assert padded(buckets) == min(padded((*chosen, top)) for chosen in others)


def test_more_buckets_only_where_they_pay():
    assert choose_buckets(units(np.full(100, 50)), 4, 4) == (64,)
    assert choose_buckets(units(np.array([50] * 100 + [500] * 100)), 4, 4) == (64, 512)
    # Two short rows never fill a step of 16: they would be carried to the longer bucket anyway.
    assert choose_buckets(units(np.array([50] * 2 + [500] * 62)), 16, 4) == (512,)
    # One row of 100, two fifths shorter, is not worth a compilation.
    assert choose_buckets(units(np.array([300] + [500] * 99)), 1, 4) == (512,)


def grouped_by_length(places: np.ndarray, batch: int, micro: int, generator: np.random.Generator) -> int:
    """Positions of the reference's sampler (transformers' LengthGroupedSampler), padded to multiples of 64.

    Shuffled rows are cut in mega-batches. Each is sorted, longest first, and dealt to batches in that order.
    """
    mega = batch * max(1, min(len(places) // (4 * batch), 50))
    order = generator.permutation(len(places))
    grouped = np.concatenate(
        [part[np.argsort(-places[part])] for part in np.split(order, range(mega, len(order), mega))]
    )
    longest = [places[grouped[at : at + micro]].max() for at in range(0, len(grouped), micro)]
    return int((-(-np.array(longest) // 64) * 64 * micro).sum())


def test_buckets_group_by_length_about_as_well_as_the_references_sampler():
    """Lengths like alpaca's: 8 buckets need at most a twentieth more positions, and one bucket four times as many."""
    generator = np.random.default_rng(0)
    places = np.clip(generator.lognormal(4.8, 0.75, 20_000).astype(int), 8, 1023)
    theirs = grouped_by_length(places, 16, 4, generator)
    one, eight = (
        padded_positions(count_units(places, 1024), choose_buckets(count_units(places, 1024), 16, n), 16)
        for n in (1, 8)
    )
    assert eight < 1.05 * theirs and one > 3 * theirs


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5), st.integers(1, 9))
def test_steps_an_epoch_are_known_from_counts(counts: list[int], rows_per_step: int):
    steps = steps_by_bucket(counts, rows_per_step)
    assert sum(steps) == -(-sum(counts) // rows_per_step)
    lengths = [64 * (index + 1) for index in range(len(counts))]
    places = np.repeat(lengths, counts)
    planned = plan_epoch(places, lengths, rows_per_step, 0, 0) if len(places) else []
    assert [sum(step.length == length for step in planned) for length in lengths] == steps
