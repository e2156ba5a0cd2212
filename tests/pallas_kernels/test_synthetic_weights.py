"""Synthetic arrays have the requested shapes and dtypes, fill their range, and differ."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.synthetic_weights import WIDTH, synthetic_like


def test_bytes_and_floats_spread_over_their_range_and_no_two_arrays_are_alike():
    wanted = {"a": jax.ShapeDtypeStruct((256, 100), jnp.uint8), "b": jax.ShapeDtypeStruct((256, 100), jnp.uint8)}
    floats = {"c": jax.ShapeDtypeStruct((25600,), jnp.bfloat16), "d": jax.ShapeDtypeStruct((), jnp.float32)}
    made = synthetic_like(wanted | floats)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in made.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in (wanted | floats).items()
    }
    counts = np.bincount(np.asarray(made["a"]).ravel(), minlength=256)
    assert counts.min() > 50 and counts.max() < 150  # 100 +- 5 standard deviations
    assert abs(np.mean(made["a"] == made["b"]) - 1 / 256) < 5 / 256 / 10
    values = np.asarray(made["c"], np.float32)
    assert abs(values).max() <= WIDTH * 1.01 and abs(values.mean()) < 5 * WIDTH / np.sqrt(3 * 25600)
    assert np.std(values) > 0.98 * WIDTH / np.sqrt(3)


def test_seeds_differ_and_a_seed_is_repeatable():
    wanted = jax.ShapeDtypeStruct((1000,), jnp.float32)
    np.testing.assert_array_equal(synthetic_like(wanted, 1), synthetic_like(wanted, 1))
    assert np.mean(np.asarray(synthetic_like(wanted, 1)) == np.asarray(synthetic_like(wanted, 2))) < 0.01
