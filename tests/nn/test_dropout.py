"""A row's mask depends on its key alone, so it is the same in any batch and on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qlora_jax.nn.dropout import apply_dropout, dropout
from qlora_jax.nn.random_keys import fold_in_each, fold_in_rows
from qlora_jax.sharding import ROWS, make_mesh
from tests.nn.gradients import random_array

ROWS_IN_STEP, T, K, RATE = 16, 8, 32, 0.25


def dropped(x_MK: jax.Array, places_B: jax.Array) -> jax.Array:
    keys_B = fold_in_each(fold_in_rows(jax.random.key(5), places_B), 3)
    return apply_dropout(x_MK, RATE, keys_B)


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return random_array(ROWS_IN_STEP * T, K)


@pytest.fixture(scope="module")
def expected(x) -> np.ndarray:
    """The definition: a Bernoulli mask [T, K] per row, and what is kept divided by 1 - rate."""
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(5), row), 3) for row in range(ROWS_IN_STEP)]
    keep = jnp.concatenate([jax.random.bernoulli(key, 1 - RATE, (T, K)) for key in keys])
    return np.asarray(jnp.where(keep, x / (1 - RATE), 0.0))


@pytest.mark.parametrize("rows", [16, 4])
def test_masks_do_not_depend_on_the_split_into_micro_batches(rows, x, expected):
    places = jnp.arange(ROWS_IN_STEP)
    parts = [dropped(x[i * T : (i + rows) * T], places[i : i + rows]) for i in range(0, ROWS_IN_STEP, rows)]
    np.testing.assert_array_equal(jnp.concatenate(parts), expected)


@pytest.mark.parametrize("sizes", [(1, 8), (2, 4)])
def test_masks_do_not_depend_on_the_mesh(sizes, x, expected):
    run = jax.shard_map(dropped, mesh=make_mesh(*sizes), in_specs=P(ROWS), out_specs=P(ROWS), check_vma=False)
    np.testing.assert_array_equal(jax.jit(run)(x, jnp.arange(ROWS_IN_STEP)), expected)


def test_rows_names_and_steps_have_different_masks(expected):
    masks = (expected != 0).reshape(ROWS_IN_STEP, -1)
    assert len({mask.tobytes() for mask in masks}) == ROWS_IN_STEP
    keys = fold_in_rows(jax.random.key(5), jnp.arange(ROWS_IN_STEP))
    ones = jnp.ones((ROWS_IN_STEP * T, K))
    for other in (fold_in_each(keys, 4), fold_in_each(fold_in_rows(jax.random.key(6), jnp.arange(ROWS_IN_STEP)), 3)):
        agree = np.mean((np.asarray(apply_dropout(ones, RATE, other)) != 0) == (expected != 0))
        assert abs(agree - (RATE**2 + (1 - RATE) ** 2)) < 0.03  # as two independent masks


def test_the_backward_pass_draws_the_same_mask(x, expected):
    keys = fold_in_each(fold_in_rows(jax.random.key(5), jnp.arange(ROWS_IN_STEP)), 3)
    found, vjp = jax.vjp(lambda x: dropout(x, RATE, keys), x)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(vjp(x)[0], expected)
