"""Batches contain each row once, in few shapes with little padding."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.evaluation.batches import BATCH_TOKENS, SHAPE_COST, batches_by_length, padded_length


def test_padded_lengths():
    assert [padded_length(n) for n in (1, 16, 17, 255, 257, 511, 513)] == [16, 16, 32, 256, 288, 512, 576]


@pytest.mark.parametrize(("rows", "size", "batches"), [(15, 5, 3), (8, 8, 1), (17, 6, 3), (9, 3, 3)])
def test_few_rows_of_a_batch_are_empty(rows, size, batches):
    made = batches_by_length([512] * rows)
    assert {(batch.size, batch.length) for batch in made} == {(size, 512)} and len(made) == batches


@pytest.mark.parametrize(("rows", "size", "batches"), [(15, 16, 1), (64, 64, 1), (65, 24, 3), (3, 8, 1)])
def test_eight_devices_have_equally_many_rows(rows, size, batches):
    made = batches_by_length([512] * rows, devices=8)
    assert {(batch.size, batch.length) for batch in made} == {(size, 512)} and len(made) == batches


@given(lengths=st.lists(st.integers(1, 600), min_size=1, max_size=40), devices=st.sampled_from([1, 2, 8]))
def test_batches_hold_each_row_once_and_are_no_longer_than_one_shape_would_be(lengths, devices):
    batches = batches_by_length(lengths, devices)
    assert sorted(index for batch in batches for index in batch.rows) == [*range(len(lengths))]
    for batch in batches:
        of_device = batch.size // devices
        assert len(batch.rows) <= batch.size == of_device * devices
        assert of_device * batch.length <= max(BATCH_TOKENS, batch.length)
        assert max(lengths[index] for index in batch.rows) <= batch.length
    assert len({batch.length for batch in batches}) == len({(batch.size, batch.length) for batch in batches})
    longest, at_once = padded_length(max(lengths)), BATCH_TOKENS // padded_length(max(lengths)) * devices
    spent = sum(batch.positions // devices for batch in batches) + SHAPE_COST * len({b.length for b in batches})
    assert spent <= SHAPE_COST + longest * (-(-len(lengths) // devices) + -(-len(lengths) // at_once))
