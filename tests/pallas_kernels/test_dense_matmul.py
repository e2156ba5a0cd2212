"""Tests products in the forms that CPUs compute fast."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dense_matmul import dot_nn, dot_nt, dot_tn
from tests.nn.gradients import random_array


@pytest.mark.parametrize("narrow", ["a", "b"])
def test_dot_that_contracts_rows(narrow):
    a, b = (
        (random_array(2, 40, 8), random_array(2, 40, 24))
        if narrow == "a"
        else (random_array(2, 40, 24), random_array(2, 40, 8))
    )
    np.testing.assert_allclose(dot_tn(a, b), jnp.swapaxes(a, 1, 2) @ b, atol=2e-5)


def test_a_product_of_one_row_is_that_of_the_row_among_others():
    """Products of one row run with two rows on CPUs in bfloat16, which must not change the result."""
    a, b = random_array(3, 64).astype(jnp.bfloat16), random_array(40, 64).astype(jnp.bfloat16)
    np.testing.assert_allclose(dot_nt(a[:1], b), dot_nt(a, b)[:1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dot_nn(a[:1], b.T), dot_nn(a, b.T)[:1], rtol=1e-5, atol=1e-5)
    assert dot_tn(a[:1], a[:1]).shape == (64, 64)
