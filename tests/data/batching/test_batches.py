"""Buckets and batches: every row once an epoch, exact resume, arrays that hold what they say."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.batching.batches import NO_ROW, START, Batch, eval_batches, plan_epoch, train_batches
from qlora_jax.data.batching.buckets import choose_buckets, count_units, padded_positions, steps_by_bucket
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place
from qlora_jax.data.rows import TokenRows, token_rows

PAD = 7

lengths = st.lists(st.integers(2, 400), min_size=1, max_size=60)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 3))


def units(places: np.ndarray) -> np.ndarray:
    return count_units(places, 640)


def make_rows(lengths: list[int], seed: int = 0) -> TokenRows:
    """Rows of those lengths, numbered 0, 3, 6, ... (others having been dropped), that use the padding id as well."""
    generator = np.random.default_rng(seed)
    encoded = [
        EncodedRow(generator.integers(0, 9, n).astype(np.int32), generator.random(n) < 0.5, 0, False, False)
        for n in lengths
    ]
    return token_rows("rows.jsonl", encoded, [Place(3 * index + 1, 3 * index) for index in range(len(lengths))])


def take_epoch(rows: TokenRows, buckets: tuple[int, ...], shape: tuple[int, int], seed: int, epoch: int) -> list[Batch]:
    steps = -(-len(rows) // (shape[0] * shape[1]))
    batches = train_batches(
        rows,
        buckets,
        accumulation=shape[0],
        micro_batch_size=shape[1],
        seed=seed,
        pad_id=PAD,
        position={**START, "epoch": epoch},
    )
    return list(itertools.islice(batches, steps))


@given(lengths, shapes, st.integers(1, 5), st.integers(0, 2))
def test_an_epoch_holds_every_row_once(lengths: list[int], shape: tuple[int, int], most: int, epoch: int):
    rows = make_rows(lengths)
    buckets = choose_buckets(units(rows.lengths), shape[0] * shape[1], most)
    batches = take_epoch(rows, buckets, shape, 0, epoch)
    numbers = np.concatenate([batch.rows.ravel() for batch in batches])
    assert sorted(numbers[numbers != NO_ROW]) == rows.numbers.tolist()
    # At most one step has gaps.
    assert sum((batch.rows == NO_ROW).any() for batch in batches) == (len(lengths) % (shape[0] * shape[1]) > 0)
    assert sum(batch.inputs.size for batch in batches) == padded_positions(
        units(rows.lengths), buckets, shape[0] * shape[1]
    )
    assert batches[-1].position == {**START, "epoch": epoch + 1}


@given(lengths, shapes)
def test_batches_hold_the_ids_of_their_rows(lengths: list[int], shape: tuple[int, int]):
    rows = make_rows(lengths)
    for batch in take_epoch(rows, (64, 192, 448), shape, 1, 0):
        assert batch.inputs.shape == batch.targets.shape == batch.weights.shape == (*shape, batch.inputs.shape[2])
        assert batch.inputs.shape[2] in (64, 192, 448)
        for (*at, _), number in np.ndenumerate(batch.rows):
            place = tuple(at)
            ids, supervised = rows.row(int(number) // 3) if number != NO_ROW else (np.zeros(1, int), np.zeros(1, bool))
            n = len(ids) - 1
            assert batch.lengths[place].tolist() == [n]
            assert batch.inputs[place][:n].tolist() == ids[:-1].tolist()
            assert batch.targets[place][:n].tolist() == ids[1:].tolist()
            assert batch.weights[place][:n].tolist() == supervised[1:].tolist()
            assert not batch.weights[place][n:].any() and (batch.inputs[place][n:] == PAD).all()


@given(lengths, shapes, st.integers(0, 40), st.integers(0, 2**31))
def test_resume_from_any_position_gives_the_batches_that_followed(
    lengths: list[int], shape: tuple[int, int], done: int, seed: int
):
    rows = make_rows(lengths)
    options = {"accumulation": shape[0], "micro_batch_size": shape[1], "seed": seed, "pad_id": PAD}
    whole = list(itertools.islice(train_batches(rows, (448,), **options), done + 3))
    position = whole[done - 1].position if done else START
    for resumed, expected in zip(train_batches(rows, (448,), **options, position=position), whole[done:], strict=False):
        for name in ("inputs", "targets", "weights", "rows"):
            np.testing.assert_array_equal(getattr(resumed, name), getattr(expected, name))
        assert resumed.position == expected.position


def test_order_follows_seed_and_epoch():
    rows = make_rows([10] * 64)
    order = {
        (seed, epoch): np.concatenate([b.rows.ravel() for b in take_epoch(rows, (64,), (2, 2), seed, epoch)]).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(numbers) for numbers in order.values()}) == 4
    again = np.concatenate([b.rows.ravel() for b in take_epoch(rows, (64,), (2, 2), 1, 1)]).tolist()
    assert order[1, 1] == again and order[0, 0] != rows.numbers.tolist()


@pytest.mark.parametrize(
    ("position", "told"),
    [
        ({**START, "index": 3}, "steps 0 to 2 in that window"),
        ({**START, "epoch": -1}, "1 windows an epoch"),
        ({**START, "window": 1}, "1 windows an epoch"),
        ({"epoch": 0}, "1 windows an epoch"),
        ({"step": 1}, "1 windows an epoch"),
    ],
)
def test_positions_that_do_not_exist_are_told(position: dict[str, int], told: str):
    batches = train_batches(
        make_rows([5] * 6), (64,), accumulation=1, micro_batch_size=2, seed=0, pad_id=0, position=position
    )
    with pytest.raises(ValueError, match=f"does not exist: this data set has {told}"):
        next(batches)


@given(lengths, st.integers(1, 7))
def test_evaluation_sees_every_row_once_shortest_first(lengths: list[int], batch_size: int):
    rows = make_rows(lengths)
    batches = list(eval_batches(rows, (64, 192, 448), batch_size=batch_size, pad_id=PAD))
    numbers = np.concatenate([batch.rows.ravel() for batch in batches])
    seen = numbers[numbers != NO_ROW]
    assert sorted(seen) == rows.numbers.tolist() and len(numbers) - len(seen) < batch_size
    places = rows.lengths[seen // 3]
    assert (np.diff(places) >= 0).all()
    assert sum(batch.weights.sum() for batch in batches) == sum(rows.row(i)[1][1:].sum() for i in range(len(rows)))
    # Each batch has the smallest length that holds its longest row.
    for batch in batches:
        longest = rows.lengths[batch.rows[batch.rows != NO_ROW] // 3].max()
        assert batch.inputs.shape == (1, batch_size, min(length for length in (64, 192, 448) if length >= longest))


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
    # 1 % of the rows a quarter shorter is not worth a compilation.
    assert choose_buckets(units(np.array([300] + [500] * 99)), 1, 4) == (512,)


def grouped_by_length(places: np.ndarray, batch: int, micro: int, generator: np.random.Generator) -> int:
    """Places that the reference's sampler takes (transformers' LengthGroupedSampler), padded to multiples of 64.

    Random rows are cut in mega-batches, each of which is sorted, longest first, and dealt to batches in that order.
    """
    mega = batch * max(1, min(len(places) // (4 * batch), 50))
    order = generator.permutation(len(places))
    grouped = np.concatenate(
        [part[np.argsort(-places[part])] for part in np.split(order, range(mega, len(order), mega))]
    )
    longest = [places[grouped[at : at + micro]].max() for at in range(0, len(grouped), micro)]
    return int((-(-np.array(longest) // 64) * 64 * micro).sum())


def test_buckets_group_by_length_about_as_well_as_the_references_sampler():
    """Lengths like alpaca's; with 8 buckets at most a twentieth more places, with one four times as many."""
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


def test_rows_are_found_again_by_number():
    rows = make_rows([5, 6, 7])
    assert rows.where(6) == "rows.jsonl:7"
    with pytest.raises(ValueError, match="row 5 is not one of the 3 rows kept"):
        rows.where(5)
