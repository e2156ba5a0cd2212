"""Batches: every row once per epoch, exact resume, and arrays of their rows."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data.batching.batches import START, eval_batches, train_batches
from qlora_jax.data.batching.packing import NO_ROW, Batch, choose_buckets, count_units, padded_positions, slot_count
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place
from qlora_jax.data.rows import TokenRows, token_rows
from tests.data.trees import encode_tree, make_trees, targets_of_batch, targets_of_row
from tests.data.trees import shapes as tree_shapes

PAD = 7

lengths = st.lists(st.integers(2, 400), min_size=1, max_size=60)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 3))


def units(places: np.ndarray) -> np.ndarray:
    return count_units(places, 640)


def make_rows(lengths: list[int], seed: int = 0) -> TokenRows:
    """Rows of those lengths, numbered 0, 3, 6, ... as if others were dropped. They contain the padding id too."""
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
        ({**START, "index": 3}, "steps 0 to 2 of that window"),
        ({**START, "epoch": -1}, "1 windows per epoch"),
        ({**START, "window": 1}, "1 windows per epoch"),
        ({"epoch": 0}, "1 windows per epoch"),
        ({"step": 1}, "1 windows per epoch"),
    ],
)
def test_positions_that_do_not_exist_are_told(position: dict[str, int], told: str):
    batches = train_batches(
        make_rows([5] * 6), (64,), accumulation=1, micro_batch_size=2, seed=0, pad_id=0, position=position
    )
    with pytest.raises(ValueError, match=f"not in this data set .*expected one within {told}"):
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


def test_rows_are_found_again_by_number():
    rows = make_rows([5, 6, 7])
    assert rows.where(6) == "rows.jsonl:7"
    with pytest.raises(ValueError, match="row 5 is not one of the 3 rows kept"):
        rows.where(5)


tree_rows = st.lists(tree_shapes(st.integers(0, 4)), min_size=1, max_size=12)
pair_rows = st.lists(tree_shapes(st.just(2)), min_size=1, max_size=12)


def one_epoch(rows: TokenRows, shape: tuple[int, int], *, packed: bool, sequences: int = 0) -> Iterator[Batch]:
    batches = train_batches(
        rows,
        (64, 192) if not packed else (64,),
        packed=packed,
        sequences=sequences,
        accumulation=shape[0],
        micro_batch_size=shape[1],
        seed=0,
        pad_id=PAD,
    )
    for batch in batches:
        yield batch
        if batch.position["epoch"]:
            return


@settings(max_examples=50)
@given(tree_rows.filter(lambda drawn: any(shape.branches for shape in drawn)), shapes, st.booleans())
def test_every_target_of_a_tree_occurs_once_behind_its_own_text(drawn, shape: tuple[int, int], packed: bool):
    rows = make_trees(drawn)
    found = [target for batch in one_epoch(rows, shape, packed=packed) for target in targets_of_batch(batch)]
    assert sorted(found) == sorted(target for index in range(len(rows)) for target in targets_of_row(rows, index))


@settings(max_examples=40)
@given(pair_rows, shapes, st.booleans())
def test_slots_are_those_of_a_rows_sequences(drawn, shape: tuple[int, int], packed: bool):
    values = [[2.0 * n, 2.0 * n + 1] for n in range(len(drawn))]
    encoded = [encode_tree(one, seed, reference=values[seed]) for seed, one in enumerate(drawn)]
    rows = token_rows("pairs.jsonl", encoded, [Place(n + 1, n) for n in range(len(drawn))])
    seen = []
    for batch in one_epoch(rows, shape, packed=packed, sequences=2):
        slots, length = slot_count(batch.inputs.shape[2], packed=packed, sequences=2), batch.inputs.shape[2]
        assert {name: batch.arrays()[name].shape for name in ("present", "reference", "sequences")} == {
            "present": (*shape, slots),
            "reference": (*shape, slots),
            "sequences": (*shape, length),
        }
        assert slots == (length // 4 if packed else 2)
        for at in np.ndindex(*shape):
            used = np.flatnonzero(batch.slots["present"][at])
            numbers = [int(number) for number in batch.rows[at] if number != NO_ROW]
            assert used.tolist() == list(range(2 * len(numbers)))
            assert batch.slots["reference"][at][used].tolist() == [one for n in numbers for one in values[n]]
            for slot in used:
                ids, _ = rows.row(numbers[slot // 2])
                first, second = rows.branches_of(numbers[slot // 2])
                own = ids[first.begin : second.begin] if slot % 2 == 0 else ids[second.begin :]
                assert batch.inputs[at][batch.sequences[at] == slot].tolist() == own[:-1].tolist()
            outside = batch.sequences[at] == slots
            trunks = [rows.row(n)[0][: rows.branches_of(n)[0].begin] for n in numbers]
            padding = length - batch.lengths[at].sum()
            assert outside.sum() == sum(map(len, trunks)) + padding
            seen += numbers
    assert sorted(seen) == list(range(len(drawn)))


@settings(max_examples=30)
@given(lengths, shapes)
def test_a_row_without_branches_is_one_sequence(row_lengths: list[int], shape: tuple[int, int]):
    rows = dataclasses.replace(
        make_rows(row_lengths), values={"labels": np.arange(2.0 * len(row_lengths), dtype=np.float32).reshape(-1, 1, 2)}
    )
    batches = train_batches(
        rows, (448,), sequences=1, accumulation=shape[0], micro_batch_size=shape[1], seed=0, pad_id=PAD
    )
    batch = next(batches)
    assert sorted(batch.arrays()) == ["inputs", "labels", "present", "sequences", "targets", "weights"]
    for at in np.ndindex(*shape):
        (length,), (number,) = batch.lengths[at], batch.rows[at]
        assert batch.sequences[at].tolist() == [0] * length + [1] * (448 - length)
        assert batch.slots["present"][at].tolist() == [number != NO_ROW]
        expected = [0, 0] if number == NO_ROW else [2 * number // 3, 2 * number // 3 + 1]
        assert batch.slots["labels"][at].tolist() == [expected]


@pytest.mark.slow
@settings(max_examples=30)
@given(pair_rows, shapes, st.booleans(), st.integers(0, 12))
def test_resume_in_the_middle_of_trees_gives_the_batches_that_followed(
    drawn, shape: tuple[int, int], packed: bool, done: int
):
    options = {"accumulation": shape[0], "micro_batch_size": shape[1], "seed": 0, "pad_id": PAD}
    options |= {"packed": packed, "sequences": 2}
    rows = make_trees(drawn)
    whole = list(itertools.islice(train_batches(rows, (192,), **options), done + 2))
    position = whole[done - 1].position if done else START
    for resumed, expected in zip(train_batches(rows, (192,), **options, position=position), whole[done:], strict=False):
        assert resumed.position == expected.position
        for name, array in expected.arrays().items():
            np.testing.assert_array_equal(resumed.arrays()[name], array)


@settings(max_examples=30)
@given(pair_rows, st.integers(1, 5))
def test_evaluation_sees_every_tree_once(drawn, batch_size: int):
    rows = make_trees(drawn)
    batches = list(eval_batches(rows, (64, 192), batch_size=batch_size, pad_id=PAD, sequences=2))
    found = [target for batch in batches for target in targets_of_batch(batch)]
    assert sorted(found) == sorted(target for index in range(len(rows)) for target in targets_of_row(rows, index))
    assert sum(batch.slots["present"].sum() for batch in batches) == 2 * len(rows)


def test_rows_without_branches_keep_their_digest_and_batches_to_the_bit():
    """The digests are those of version 0.1, before rows could be trees. Checkpoints and caches have them."""
    rows, found = make_rows([5 + (37 * n) % 200 for n in range(50)]), hashlib.sha256()
    assert rows.digest == "66800e36eabc079f018201fbf2076be55648a0b201e9b6b08baac1965c225b96"
    for packed in (False, True):
        options = {"packed": packed, "accumulation": 2, "micro_batch_size": 3, "seed": 5, "pad_id": PAD}
        trained = train_batches(rows, (256,) if packed else (64, 256), **options)
        held_out = eval_batches(rows, (64, 256), batch_size=8, pad_id=PAD)
        for batch in (*itertools.islice(trained, 20), *held_out):
            for name, array in batch.arrays().items():
                found.update(name.encode() + repr((array.dtype.str, array.shape)).encode() + array.tobytes())
            found.update(repr(batch.position).encode() + batch.rows.tobytes() + batch.lengths.tobytes())
    assert found.hexdigest() == "9064169f97c1a5cb047d6c190e391ac61269972bdf9d5ef3bdd6f25e17381dfe"
