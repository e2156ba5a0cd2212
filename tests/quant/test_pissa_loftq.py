"""PiSSA and LoftQ: equal to their definitions in NumPy, with residuals whose bits do not depend on summation order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.quant import dequantize, quantize
from qlora_jax.quant.pissa_loftq import Decomposition, loftq, low_rank_factors, on_grid, pissa, residual

N, K, R = 96, 128, 8


def _weight(seed: int = 0) -> np.ndarray:
    """Makes a weight with decreasing singular values."""
    rng = np.random.default_rng(seed)
    u, s, vt = np.linalg.svd(rng.standard_normal((N, K)), full_matrices=False)
    return (u * (s * 0.9 ** np.arange(N)) @ vt).astype(np.float32)


def _how(rank: int = R, scaling: float = 2.0, niter: int = 0, dtype: str = "float32") -> Decomposition:
    return Decomposition(rank, scaling, niter, dtype, jax.random.key(0))


@pytest.mark.parametrize("niter", [0, 8])
def test_the_largest_singular_parts(niter):
    weight = _weight()
    a, b = low_rank_factors(weight, _how(niter=niter))
    u, s, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(2 * (a @ b).T, u[:, :R] * s[:R] @ vt[:R], atol=2e-5 * s[0])
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.sqrt(s[:R] / 2), rtol=1e-4)  # each has the root
    np.testing.assert_allclose(np.linalg.norm(b, axis=1), np.sqrt(s[:R] / 2), rtol=1e-4)


def test_a_rank_beyond_the_weight_is_refused():
    with pytest.raises(ValueError, match=r"lora.rank: found 97, expected at most 96 for a weight of \(96, 128\)"):
        low_rank_factors(_weight(), _how(rank=97))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pissa_leaves_the_rest(dtype):
    weight = _weight()
    split = pissa(weight, _how(dtype=dtype))
    assert split.subtracted is split.initial
    a, b = (np.asarray(jnp.asarray(x, dtype), np.float32) for x in split.initial)
    np.testing.assert_array_equal(a, split.initial.lora_a)  # as they train, so that nothing is lost at the start
    np.testing.assert_allclose(split.residual + 2 * (a @ b).T, weight, atol=1e-6)
    assert np.linalg.norm(split.residual, 2) < 1.02 * np.linalg.svd(weight, compute_uv=False)[R]


def test_the_rest_is_the_same_bits_in_whichever_order_it_is_summed():
    weight, rng = _weight(), np.random.default_rng(1)
    factors = low_rank_factors(weight, _how(rank=64))
    expected = residual(weight, factors, 1.7)
    for _ in range(5):
        order = rng.permutation(64)
        a, b = factors.lora_a[:, order].astype(np.float64), factors.lora_b[order].astype(np.float64)
        summed = np.zeros((N, K))
        for r in range(64):
            summed += np.outer(b[r], a[:, r])
        np.testing.assert_array_equal((weight - 1.7 * summed).astype(np.float32), expected)


def test_the_grid():
    x = np.float32([0.7, -1.0, 1e-7, 3e-6, 0])
    rounded = on_grid(x)
    assert np.all(np.abs(rounded - x) <= 2.0**-20)
    steps = rounded.astype(np.float64) / 2.0**-19
    np.testing.assert_array_equal(steps, np.round(steps))
    np.testing.assert_array_equal(on_grid(rounded), rounded)
    np.testing.assert_array_equal(on_grid(np.zeros(3, np.float32)), np.zeros(3))


def _held(weight: np.ndarray) -> jax.Array:
    return dequantize(quantize(weight), np.float32)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_loftq_is_its_definition(iterations):
    weight, rest = _weight(), _weight()
    for _ in range(iterations):
        quantized = np.asarray(_held(rest))
        u, s, vt = np.linalg.svd(weight - quantized, full_matrices=False)
        product = u[:, :R] * s[:R] @ vt[:R]
        before, rest = rest, weight - product
    split = loftq(weight, _how(), iterations, _held)
    assert (split.subtracted is None) == (iterations == 1)
    np.testing.assert_allclose(split.residual, before, atol=2e-5)
    found = 2 * (split.initial.lora_a @ split.initial.lora_b).T
    np.testing.assert_allclose(found, product, atol=0.02 * np.abs(product).max() if iterations > 1 else 1e-5)
    lacking = np.linalg.norm(weight - np.asarray(_held(split.residual)) - found)
    assert lacking < 0.9 * np.linalg.norm(weight - np.asarray(_held(weight)))
