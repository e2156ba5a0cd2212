"""Tests trainable rows of an embedding against autodiff of their equation."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.lm_head.new_token_rows import NewTokenRows
from tests.nn.gradients import check_vjp, random_array


@pytest.mark.parametrize("ids", [(50, 51), (49, 50), (3, 20)], ids=["beyond", "across", "within"])
def test_rows_of_an_embedding(ids):
    table, rows = random_array(50, 24), random_array(2, 24)
    tokens = jnp.asarray([0, ids[1], 4, ids[0], ids[1], 48, ids[1]], jnp.int32)

    def plain(rows):
        return jnp.pad(table, ((0, 2), (0, 0))).at[np.asarray(ids)].set(rows)[tokens]

    check_vjp(lambda rows: NewTokenRows(rows, None, ids).lookup(tokens, table), plain, rows)
