"""Tests LoRA's products and their custom VJP against autodiff of their equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.lora import lora_deltas
from tests.nn.gradients import check_vjp, random_array


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_lora_deltas(dropout):
    keys = jax.random.split(jax.random.key(3), 5)
    rows = [jax.random.bernoulli(key, 1 - dropout, (6, 48)) for key in keys]
    keep = jnp.concatenate(rows).astype(jnp.float32) / (1 - dropout)

    def ours(x, a, b):
        return lora_deltas(x, a, (b,), (2.0,), dropout, keys)[0]

    check_vjp(
        ours, lambda x, a, b: 2.0 * (x * keep) @ a @ b, random_array(30, 48), random_array(48, 4), random_array(4, 20)
    )


def test_lora_deltas_of_one_x():
    """Ranks, widths and scalings differ; each result and gradient equals that of one adapter alone."""

    def ours(x, a1, a2, b1, b2):
        return jnp.concatenate(lora_deltas(x, jnp.concatenate([a1, a2], 1), (b1, b2), (2.0, 0.5), 0.0, None), 1)

    def plain(x, a1, a2, b1, b2):
        return jnp.concatenate([2.0 * x @ a1 @ b1, 0.5 * x @ a2 @ b2], axis=1)

    check_vjp(
        ours,
        plain,
        random_array(30, 48),
        random_array(48, 4),
        random_array(48, 3),
        random_array(4, 20),
        random_array(3, 12),
    )


def test_adapters_in_bf16_take_gradients_rounded_to_it():
    def ours(x, a, b):
        return lora_deltas(x, a, (b,), (2.0,), 0.0, None)[0]

    x, a, b = random_array(30, 48), random_array(48, 4).astype(jnp.bfloat16), random_array(4, 20).astype(jnp.bfloat16)
    value, vjp = jax.vjp(ours, x, a, b)
    expected, expected_vjp = jax.vjp(ours, x, a.astype(jnp.float32), b.astype(jnp.float32))
    (dx, *grads), (wanted_dx, *wanted) = vjp(value), expected_vjp(expected)
    jax.tree.map(np.testing.assert_array_equal, (value, dx), (expected, wanted_dx))
    for found, exact in zip(grads, wanted, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_dropout_needs_a_key_and_none_means_none():
    x, a, b = random_array(30, 48), random_array(48, 4), random_array(4, 20)
    without = lora_deltas(x, a, (b,), (2.0,), 0.0, None)[0]
    np.testing.assert_array_equal(lora_deltas(x, a, (b,), (2.0,), 0.5, None)[0], without)
