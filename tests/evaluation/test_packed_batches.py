"""Packed batches contain each text once, with little padding."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.evaluation.batches import (
    BATCH_TOKENS,
    SHAPE_COST,
    Batch,
    PackedBatch,
    batches_by_length,
    packed_batches,
    padded_length,
)


@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=60), devices=st.sampled_from([1, 2, 8]))
def test_each_text_is_in_one_slot_of_batches_no_dearer_than_unpacked_ones(lengths, devices):
    batches = packed_batches(lengths, devices)
    assert sorted(index for batch in batches for pack in batch.packs for index in pack) == [*range(len(lengths))]
    for batch in batches:
        of_device = batch.size // devices
        assert 0 < len(batch.packs) <= batch.size == of_device * devices
        assert of_device * batch.length <= max(BATCH_TOKENS, batch.length)
        assert all(sum(lengths[index] for index in pack) <= batch.length for pack in batch.packs)
        assert all(len(pack) <= batch.slots for pack in batch.packs)
    assert spent(batches, devices) <= spent(batches_by_length(lengths, devices), devices)


def spent(batches: Sequence[PackedBatch] | Sequence[Batch], devices: int) -> int:
    return SHAPE_COST * len({each.shape for each in batches}) + sum(each.positions for each in batches) // devices


@pytest.mark.parametrize(("least", "most"), [(5, 60), (33, 64), (200, 1000), (2100, 4000)])
def test_many_texts_leave_few_positions_empty(least, most):
    lengths = np.random.default_rng(0).integers(least, most, 600)
    assert sum(batch.positions for batch in packed_batches(lengths.tolist())) < 1.06 * lengths.sum()


def test_few_texts_are_not_packed():
    (batch,) = packed_batches([9, 100, 30], devices=2)
    assert batch == PackedBatch(packs=[[1], [2], [0]], size=4, length=padded_length(100), slots=1)


def test_without_sharing_each_text_has_a_row_of_about_its_length():
    lengths = [3000, *[20] * 300]
    padded, batches = batches_by_length(lengths), packed_batches(lengths, share=False)
    assert [(pack, batch.size, batch.length) for batch in batches for pack in batch.packs] == [
        ([row], batch.size, batch.length) for batch in padded for row in batch.rows
    ]
    assert {batch.slots for batch in batches} == {1}


def test_positions_have_the_slot_of_their_text():
    texts = [np.full(n, n, np.int32) for n in (4000, 3, 3960, 30)]
    first, second = packed_batches([len(ids) for ids in texts])
    assert (first.packs, second.packs, first.slots) == ([[0, 3, 1]], [[2]], 4)
    tokens, slots = first.arrays(texts)
    sizes = 4000, 30, 3, first.length - 4033
    np.testing.assert_array_equal(tokens, [np.repeat([4000, 30, 3, 0], sizes)])
    np.testing.assert_array_equal(slots, [np.repeat([0, 1, 2, 4], sizes)])
