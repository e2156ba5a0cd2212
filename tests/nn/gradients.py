"""Helpers that compare a custom VJP with autodiff of its equation."""

import jax
import jax.numpy as jnp
import numpy as np


def random_array(*shape: int, seed: int = 0) -> jax.Array:
    """Draws normal f32 numbers, which depend on seed and shape."""
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32))


def check_vjp(ours, plain, *args, tolerance=2e-5):
    """Compares values, and gradients of a random linear function of them."""
    value, vjp = jax.vjp(ours, *args)
    expected, expected_vjp = jax.vjp(plain, *args)
    cotangent = random_array(*value.shape, seed=9)
    for actual, wanted in zip([value, *vjp(cotangent)], [expected, *expected_vjp(cotangent)], strict=True):
        scale = float(jnp.max(jnp.abs(wanted))) + 1e-6
        np.testing.assert_allclose(actual / scale, wanted / scale, atol=tolerance)
