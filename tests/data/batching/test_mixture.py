"""Mixtures and windows: how often rows occur, in which order, and that resume is bit-identical."""

import collections
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.batching.batches import START, train_batches, window_order
from qlora_jax.data.batching.mixture import Mixture, Part, check_kinds, check_weights, count_sequences
from qlora_jax.data.batching.packing import NO_ROW, Batch
from qlora_jax.data.branch_tree import join_branches
from qlora_jax.data.readers.files import Place
from qlora_jax.data.row_counts import RowCounts
from qlora_jax.data.row_store import RowChunk, StoredRows, open_stored_rows, store_rows
from qlora_jax.data.rows import TokenRows, token_rows
from tests.data.batching.test_batches import PAD, make_rows
from tests.data.trees import Shape, encode_tree, targets_of_batch, targets_of_row

weights = st.sampled_from([0.3, 0.5, 1.0, 1.5, 2.0])
counts = st.lists(st.tuples(st.integers(2, 40), weights), min_size=1, max_size=3)


def stored(rows: TokenRows, folder: Path) -> StoredRows:
    """The rows as an entry of the cache, written in chunks of three."""

    def chunks():
        for at in range(0, len(rows), 3):
            part = slice_of(rows, at, min(at + 3, len(rows)))
            yield RowChunk(part, RowCounts(kept=len(part)), np.zeros(0, np.uint64), "text")

    store_rows(chunks(), folder)
    found = open_stored_rows(folder, rows.files[0].path)
    assert found is not None and found.digest == rows.digest
    return found


def slice_of(rows: TokenRows, start: int, stop: int) -> TokenRows:
    first, last = rows.starts[start], rows.starts[stop]
    branches = [rows.branches_of(index) for index in range(start, stop)]
    return TokenRows(
        ids=rows.ids[first:last],
        supervised=rows.supervised[first:last],
        starts=rows.starts[start : stop + 1] - first,
        numbers=rows.numbers[start:stop],
        lines=rows.lines[start:stop],
        files=rows.files,
        branches=join_branches(branches) if any(branches) else None,
        values={name: array[start:stop] for name, array in rows.values.items()},
    )


def mixture(sizes: list[tuple[int, float]], size: int | None = None, folder: Path | None = None) -> Mixture:
    """A mixture of files with (rows, weight) `sizes`, in memory or in `folder`."""
    parts = []
    for which, (count, weight) in enumerate(sizes):
        rows = make_rows([5 + (7 * n + which) % 90 for n in range(count)], seed=which)
        digest = rows.digest
        held = rows if folder is None else stored(rows, folder / str(which))
        parts.append(Part(path=rows.files[0].path, rows=held, weight=weight, digest=digest))
    return Mixture(parts=tuple(parts), size=size, seed=3)


def epoch_of(rows: Mixture, epoch: int) -> list[Batch]:
    batches = train_batches(
        rows, (128,), accumulation=1, micro_batch_size=2, seed=1, pad_id=PAD, position={**START, "epoch": epoch}
    )
    found = []
    for batch in batches:
        found.append(batch)
        if batch.position["epoch"] > epoch:
            return found
    raise AssertionError


def seen(batches: list[Batch]) -> collections.Counter[int]:
    numbers = np.concatenate([batch.rows.ravel() for batch in batches])
    return collections.Counter(numbers[numbers != NO_ROW].tolist())


@given(counts)
def test_weights_say_how_often_a_row_is_seen(sizes: list[tuple[int, float]]):
    rows = mixture(sizes)
    totals: collections.Counter[int] = collections.Counter()
    for epoch in range(3):
        totals += seen(epoch_of(rows, epoch))
    for part, file, following in zip(rows.parts, rows.files, [*(f.first for f in rows.files[1:]), np.inf], strict=True):
        times = [totals[file.first + 3 * n] for n in range(len(part.rows))]
        assert sum(times) == 3 * part.count == sum(c for n, c in totals.items() if file.first <= n < following)
        assert max(times) - min(times) <= 1


@given(counts, st.booleans(), st.integers(0, 25))
def test_resume_of_a_mixture_is_bit_identical(sizes: list[tuple[int, float]], packed: bool, done: int):
    options = {"packed": packed, "accumulation": 1, "micro_batch_size": 2, "seed": 1, "pad_id": PAD}
    whole = list(itertools.islice(train_batches(mixture(sizes), (128,), **options), done + 3))
    position = whole[done - 1].position if done else START
    again = train_batches(mixture(sizes), (128,), **options, position=position)
    for resumed, expected in zip(again, whole[done:], strict=False):
        for name in ("inputs", "targets", "weights", "rows"):
            np.testing.assert_array_equal(getattr(resumed, name), getattr(expected, name))
        assert resumed.position == expected.position


@pytest.fixture
def windowed(tmp_path: Path) -> Mixture:
    return mixture([(40, 1.0), (11, 0.5), (9, 2.0)], size=20, folder=tmp_path)


def test_windows_hold_each_row_once_in_the_files_order(windowed: Mixture):
    assert windowed.windows == 4 and len(windowed) == 40 + 6 + 18
    first, later = (seen(epoch_of(windowed, epoch)) for epoch in (0, 1))
    for epoch in (first, later):
        assert [epoch[3 * n] for n in range(40)] == [1] * 40
        assert [epoch[windowed.files[2].first + 3 * n] for n in range(9)] == [2] * 9
    halves = [[epoch[windowed.files[1].first + 3 * n] for n in range(11)] for epoch in (first, later)]
    assert halves == [[1] * 6 + [0] * 5, [1] + [0] * 5 + [1] * 5]
    window = windowed.window(0, 1)
    assert window.rows.numbers[:10].tolist() == [3 * n for n in range(10, 20)]
    np.testing.assert_array_equal(window.rows.lengths, windowed.window_lengths(0, 1))


@pytest.mark.parametrize("packed", [False, True])
def test_resume_of_windows_is_bit_identical(windowed: Mixture, packed: bool):
    options = {"packed": packed, "accumulation": 1, "micro_batch_size": 2, "seed": 1, "pad_id": PAD}
    whole = list(itertools.islice(train_batches(windowed, (128,), **options), 80))
    assert len({(batch.position["epoch"], batch.position["window"]) for batch in whole}) > 4
    for done in range(0, 78, 7):
        position = whole[done - 1].position if done else START
        resumed = next(train_batches(windowed, (128,), **options, position=position))
        for name in ("inputs", "targets", "weights", "rows"):
            np.testing.assert_array_equal(getattr(resumed, name), getattr(whole[done], name))


def test_windows_are_shuffled_each_in_its_own_way(windowed: Mixture):
    options = {"accumulation": 1, "micro_batch_size": 2, "seed": 1, "pad_id": PAD}
    batches = list(itertools.islice(train_batches(windowed, (128,), **options), 16))
    order = np.concatenate([batch.rows.ravel() for batch in batches])
    assert order.tolist() != sorted(order.tolist())
    assert next(train_batches(windowed, (128,), **{**options, "seed": 2})).rows.tolist() != batches[0].rows.tolist()


def test_windows_come_in_another_order_each_epoch(windowed: Mixture):
    def order(epoch: int, seed: int) -> list[int]:
        """Windows in the order of batches. The rows of the first file identify a window."""
        position = {**START, "epoch": epoch}
        batches = train_batches(
            windowed, (128,), accumulation=1, micro_batch_size=2, seed=seed, pad_id=PAD, position=position
        )
        epoch_batches = itertools.takewhile(lambda batch: batch.position["epoch"] == epoch, batches)
        numbers = np.concatenate([batch.rows.ravel() for batch in epoch_batches])
        first = numbers[(numbers != NO_ROW) & (numbers < windowed.files[1].first)]
        return [window for window, _ in itertools.groupby((first // 30).tolist())]

    orders = [order(epoch, seed) for epoch in range(4) for seed in (1, 2)]
    assert all(sorted(one) == [0, 1, 2, 3] for one in orders)
    assert len(set(map(tuple, orders))) > 3
    assert orders == [window_order(seed, epoch, 4).tolist() for epoch in range(4) for seed in (1, 2)]


def test_rows_are_found_again_in_their_own_file(tmp_path: Path):
    in_memory, in_folders = mixture([(4, 1.0), (3, 1.0)]), mixture([(4, 1.0), (3, 1.0)], 5, tmp_path)
    for rows in (in_memory, in_folders):
        # The last number of the first file is 9.
        assert (rows.where(3), rows.where(10), rows.where(13)) == (
            "rows.jsonl:4",
            "rows.jsonl:1",
            "rows.jsonl:4",
        )
        with pytest.raises(ValueError, match="row 4 is not one of"):
            rows.where(4)


def test_rows_in_folders_are_those_in_memory(tmp_path: Path):
    sizes = [(13, 1.0), (7, 1.0)]
    whole, parts = mixture(sizes), mixture(sizes, 100, tmp_path)
    assert parts.windows == 1
    for ours, theirs in zip(epoch_of(parts, 0), epoch_of(whole, 0), strict=True):
        np.testing.assert_array_equal(ours.inputs, theirs.inputs)
        np.testing.assert_array_equal(ours.rows, theirs.rows)


def test_weights_of_no_row_are_told():
    with pytest.raises(ValueError, match=r"Raise their weights:\n  rows\.jsonl: weight 0\.1 of 4 rows$"):
        check_weights(mixture([(10, 0.1), (4, 0.1)]).parts)


def test_what_changes_the_order_changes_the_digest(tmp_path: Path):
    mixtures = [
        mixture([(4, 1.0), (3, 1.0)]),
        mixture([(4, 1.0), (3, 2.0)]),
        mixture([(3, 1.0), (4, 1.0)]),
        mixture([(4, 1.0), (3, 1.0)], 5, tmp_path),
    ]
    assert len({rows.digest for rows in mixtures}) == 4


def tree_mixture(folder: Path | None) -> Mixture:
    """A file of pairs, one of single texts, and one that an epoch uses half of, in memory or in windows."""
    shapes = [
        [Shape(n % 7, ((2 + n % 5, n % 7), (3, n % 7))) for n in range(11)],
        [Shape(5 + n, ()) for n in range(8)],
        [Shape(3, ((4, 3),)) for _ in range(5)],
    ]
    parts = []
    for which, drawn in enumerate(shapes):
        encoded = [encode_tree(shape, 100 * which + n) for n, shape in enumerate(drawn)]
        rows = token_rows(f"{which}.jsonl", encoded, [Place(n + 1, n) for n in range(len(drawn))])
        held = rows if folder is None else stored(rows, folder / str(which))
        parts.append(Part(path=rows.files[0].path, rows=held, weight=(1.0, 1.0, 0.4)[which], digest=rows.digest))
    return Mixture(parts=tuple(parts), size=None if folder is None else 7, seed=3)


@pytest.mark.parametrize("windows", [False, True])
def test_trees_keep_their_targets_in_mixtures_and_windows(tmp_path: Path, windows: bool):
    rows = tree_mixture(tmp_path if windows else None)
    assert rows.branching and rows.windows == (3 if windows else 1)
    whole = tree_mixture(None).window(0, 0).rows
    expected = sorted(target for index in range(11 + 8) for target in targets_of_row(whole, index))
    found = [target for batch in epoch_of(rows, 0) for target in targets_of_batch(batch)]  # all have parents and depths
    assert sorted(target for target in found if target.id < 200_000) == expected
    for window in range(rows.windows):
        loaded = rows.window(0, window)
        np.testing.assert_array_equal(loaded.rows.lengths[loaded.indices], rows.window_lengths(0, window))


@pytest.mark.parametrize("windows", [False, True])
def test_chunks_have_every_row_once_with_attached_values(tmp_path: Path, windows: bool):
    rows = tree_mixture(tmp_path if windows else None)
    assert rows.number_limit == 24
    values = np.stack([np.arange(24), -np.arange(24)], axis=1).astype(np.float32)
    attached = dataclasses.replace(rows, attached={"reference": values})
    assert attached.digest == rows.digest
    numbers = np.concatenate([chunk.numbers for chunk in attached.chunks()])
    assert numbers.tolist() == list(range(24))
    for chunk in (*attached.chunks(), attached.window(0, 0).rows):
        np.testing.assert_array_equal(chunk.values["reference"], values[chunk.numbers])


def test_files_of_other_kinds_are_refused_by_name(tmp_path: Path):
    def part(name: str, branches: int, folder: Path | None = None, **values: list[float]) -> Part:
        encoded = [encode_tree(Shape(3, ((3, 3),) * branches), n, **values) for n in range(4)]
        rows = token_rows(name, encoded, [Place(n + 1, n) for n in range(4)])
        held = rows if folder is None else stored(rows, folder / name)
        return Part(path=name, rows=held, weight=1.0, digest=rows.digest)

    pairs, labelled = part("pairs.jsonl", 2), part("kto.jsonl", 2, tmp_path, labels=[1.0, 1.0])
    with pytest.raises(ValueError, match=r"kto\.jsonl: its rows are of another kind than those of pairs\.jsonl .*"):
        check_kinds([pairs, labelled])
    check_kinds([pairs, part("more.jsonl", 2)])
    assert count_sequences([pairs, labelled]) == 2
    with pytest.raises(ValueError, match=r"the same number:\n  pairs\.jsonl: 2\n  triplets\.jsonl: 3"):
        count_sequences([pairs, part("triplets.jsonl", 3, tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_resume_in_windows_of_trees_is_bit_identical(tmp_path: Path, packed: bool):
    rows = dataclasses.replace(tree_mixture(tmp_path), attached={"margins": np.ones((24, 2), np.float32)})
    options = {"packed": packed, "accumulation": 1, "micro_batch_size": 2, "seed": 1, "pad_id": PAD}
    whole = list(itertools.islice(train_batches(rows, (64,), **options), 30))
    assert len({(batch.position["epoch"], batch.position["window"]) for batch in whole}) > 3
    for done in range(0, 28, 5):
        position = whole[done - 1].position if done else START
        resumed = next(train_batches(rows, (64,), **options, position=position)).arrays()
        for name, array in whole[done].arrays().items():
            np.testing.assert_array_equal(resumed[name], array)
