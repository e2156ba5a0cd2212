"""Tests of products of rows that each have a matrix of their own, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import own_matrix as module
from pallas_kernels.own_matrix import own_matrix

OWN_M = [0, 3, 1, 3, 0, 2]  # 0: none


@pytest.mark.parametrize("form", ["C++ loops", "XLA"])
@pytest.mark.parametrize("columns", [16, 70])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_row_has_the_product_with_its_matrix_and_no_matrix_gives_zeros(
    dtype: jnp.dtype, columns: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "XLA":
        monkeypatch.setattr(module, "problem", lambda: "not built")
    numbers = np.random.default_rng(0)
    x_MK = jnp.asarray(numbers.standard_normal((len(OWN_M), 24)), dtype)
    matrices_LAKN = jnp.asarray(numbers.standard_normal((2, 3, 24, columns)), dtype)
    y_MN = jax.jit(own_matrix)(x_MK, matrices_LAKN, jnp.int32(1), jnp.asarray(OWN_M, jnp.int32))
    x, w = np.asarray(x_MK, np.float64), np.asarray(matrices_LAKN, np.float64)
    expected = [np.zeros(columns) if own == 0 else x[row] @ w[1, own - 1] for row, own in enumerate(OWN_M)]
    np.testing.assert_allclose(y_MN, expected, atol=1e-5)
