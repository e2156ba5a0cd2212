"""Packing: every row in one pack, few packs, exact resume, and rows that do not see each other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.config import LoraArgs
from qlora_jax.data.batching.batches import START, train_batches
from qlora_jax.data.batching.packing import NO_ROW, pack, pack_length
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, partition
from qlora_jax.training.step import gradients
from tests.data.batching.test_batches import PAD, make_rows
from tests.io.tiny_models import tiny_config
from tests.marks import SLOW

lengths = st.lists(st.integers(2, 120), min_size=1, max_size=60)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3))
CAPACITY = 128


@given(st.lists(st.integers(1, 100), min_size=1, max_size=80), st.randoms(use_true_random=False))
def test_every_row_is_in_one_pack_and_few_are_needed(places, random):
    sizes = np.array(places, np.int64)
    order = random.sample(range(len(places)), len(places))
    packs = pack(sizes, 100, np.array(order))
    assert sorted(itertools.chain(*packs)) == list(range(len(places)))
    assert all(sizes[rows].sum() <= 100 for rows in packs)
    filled = sorted(int(sizes[rows].sum()) for rows in packs)
    assert len(filled) == 1 or filled[0] + filled[1] > 100  # no two packs would fit into one
    assert len(packs) == len(pack(sizes, 100, np.arange(len(places))))


def test_each_row_goes_where_least_is_left():
    # 60 and 50 leave 40 and 50; 40 fits both and fills the first; 30 and 20 fill the second.
    assert pack(np.array([20, 40, 60, 30, 50]), 100, np.arange(5)) == [[2, 1], [4, 3, 0]]
    with pytest.raises(ValueError, match=r"a row does not fit a pack .found 101 positions, expected at most 100"):
        pack(np.array([101]), 100, np.arange(1))


@pytest.mark.parametrize(("max_length", "places"), [(2, 64), (65, 64), (66, 128), (1024, 1024)])
def test_a_pack_holds_the_longest_row(max_length, places):
    assert pack_length(max_length) == places


def epoch_of(rows, shape, seed=0, position=START):
    options = {"accumulation": shape[0], "micro_batch_size": shape[1], "seed": seed, "pad_id": PAD}
    return train_batches(rows, (CAPACITY,), packed=True, position=position, **options)


@given(lengths, shapes)
def test_batches_hold_rows_one_behind_the_other(row_lengths, shape):
    rows, seen = make_rows(row_lengths), []
    for batch in epoch_of(rows, shape):
        assert batch.inputs.shape == batch.segments.shape == (*shape, CAPACITY)
        for at in np.ndindex(*shape):
            start = 0
            numbers = [int(n) for n in batch.rows[at] if n != NO_ROW]
            for which, number in enumerate(numbers):
                ids, supervised = rows.row(number // 3)
                span = slice(start, start := start + len(ids) - 1)
                assert batch.inputs[at][span].tolist() == ids[:-1].tolist()
                assert batch.targets[at][span].tolist() == ids[1:].tolist()
                assert batch.weights[at][span].tolist() == supervised[1:].tolist()
                assert (batch.segments[at][span] == which).all()
            assert not batch.weights[at][start:].any() and (batch.segments[at][start:] == len(numbers)).all()
            assert batch.lengths[at][: len(numbers)].sum() == batch.lengths[at].sum() == start
            seen += numbers
        if batch.position["epoch"] == 1:
            break
    assert sorted(seen) == rows.numbers.tolist()


@given(lengths, shapes, st.integers(0, 12))
def test_resume_from_any_position_gives_the_batches_that_followed(row_lengths, shape, done):
    rows = make_rows(row_lengths)
    whole = list(itertools.islice(epoch_of(rows, shape), done + 3))
    position = whole[done - 1].position if done else START
    for resumed, expected in zip(epoch_of(rows, shape, position=position), whole[done:], strict=False):
        for name in ("inputs", "targets", "weights", "segments", "rows"):
            np.testing.assert_array_equal(getattr(resumed, name), getattr(expected, name))
        assert resumed.position == expected.position


def test_order_follows_seed_and_epoch():
    rows = make_rows([10, 20, 30, 40] * 8)
    batches = itertools.islice(epoch_of(rows, (1, 2)), 8)
    by_epoch = [batch.rows.tolist() for batch in batches]
    assert by_epoch[0] != by_epoch[len(by_epoch) // 2]
    other = next(epoch_of(rows, (1, 2), seed=1)).rows.tolist()
    assert other != by_epoch[0]


@pytest.fixture(scope="module", params=[None, pytest.param("q4_0", marks=SLOW)])
def parts(request):
    """The parts of a tiny NF4 model, computed in f32, whose LoRA updates are not zero."""
    model = CausalLM(model_config(tiny_config()), WeightFormat(dtype="float32"))
    attach_method(model, LoraArgs(rank=4, merge_into=request.param), jax.random.key(0))
    parts = partition(model)
    lora = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.1, parts.lora)
    return ModelParts(parts.graphdef, lora, jax.tree.map(_filled, parts.base))


def _filled(leaf):
    """Random codes and constants in place of a placeholder."""
    generator = np.random.default_rng(leaf.size)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.asarray(generator.standard_normal(leaf.shape) * 0.1, leaf.dtype)
    return jnp.asarray(generator.integers(0, 256, leaf.shape), leaf.dtype)


def test_losses_and_gradients_are_those_of_the_rows_alone(parts):
    rows = make_rows([20, 33, 7, 50, 16])
    packed = next(epoch_of(rows, (1, 1)))
    assert (packed.rows >= 0).sum() == 5
    options = {"accumulation": 1, "micro_batch_size": 5, "seed": 0, "pad_id": PAD}
    alone = next(train_batches(rows, (64,), **options))
    ours, loss = gradients(parts, packed.arrays(), None, remat="names")
    expected, by_row = gradients(parts, alone.arrays(), None, remat="names")
    np.testing.assert_allclose(loss.total, by_row.total, rtol=1e-6)
    assert loss.count == by_row.count
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert float(jnp.max(jnp.abs(b))) > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * float(jnp.max(jnp.abs(b))))


def test_a_row_does_not_change_with_its_neighbours(parts):
    """The gradients of one segment are bit-identical for any content of the others."""
    batch = next(epoch_of(make_rows([20, 33, 7, 50, 16]), (1, 1))).arrays()
    only_last = batch | {"weights": batch["weights"] * (batch["segments"] == 3)}
    assert only_last["weights"].sum() > 0
    others = batch["segments"] < 3
    changed = only_last | {"inputs": np.where(others, (batch["inputs"] + 1) % 9, batch["inputs"])}
    first, again = (gradients(parts, each, None, remat="names") for each in (only_last, changed))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
