"""The count of BOFT's cost: its product is right, and each factor adds operations and passes over the inputs."""

import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import block_diag

from scripts.bench.butterfly_rotation import butterfly, costs


def test_the_product_is_that_of_dense_matrices():
    rng = np.random.default_rng(0)
    x, blocks = rng.normal(size=(3, 8)), rng.normal(size=(2, 2, 4, 4))
    before = np.stack([rng.permutation(8) for _ in range(2)])
    after = np.argsort(before, axis=1)
    expected = x
    for factor, order in zip(blocks, before, strict=True):
        permutation = np.eye(8)[:, order]
        expected = expected @ permutation @ np.asarray(block_diag(*factor)) @ permutation.T
    found = butterfly(jnp.asarray(x), jnp.asarray(blocks), jnp.asarray(before), jnp.asarray(after))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_every_factor_costs_operations_and_bytes():
    found = costs(tokens=64, width=256, block=32, rank=16)
    flops, moved = zip(*(found[name] for name in ("OFT", "BOFT of 2", "BOFT of 4")), strict=True)
    assert flops[1] > 1.9 * flops[0] and flops[2] > 3.8 * flops[0] and moved[2] > moved[1] > moved[0]
