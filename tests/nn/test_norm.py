"""Tests norms and their custom VJPs against autodiff of their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.norm import LayerNorm, TrainableNorm, layer_norm, rms_norm
from tests.nn.gradients import check_vjp, random_array


def _plain_norm(x, weight):
    rstd = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)
    return x * rstd * weight[None]


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset):
    args = random_array(6, 32), random_array(32)
    check_vjp(lambda x, w: rms_norm(x, w, 1e-5, offset), lambda x, w: _plain_norm(x, offset + w), *args)


def test_layer_norm():
    def plain(x, weight, bias):
        mean, var = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
        return (x - mean) / jnp.sqrt(var + 1e-5) * weight[None] + bias[None]

    args = 3 * random_array(6, 32) + 2, random_array(32), random_array(32, seed=1)
    check_vjp(lambda x, w, b: layer_norm(x, w, b, 1e-5), plain, *args)
    check_vjp(lambda x, w: layer_norm(x, w, None, 1e-5), lambda x, w: plain(x, w, jnp.zeros(32)), *args[:2])


def test_a_layer_norm_without_bias_trains_its_weight():
    norm, x = LayerNorm(random_array(2, 32), None, 1e-5), random_array(6, 32)
    expected = norm(x, jnp.int32(1))
    norm.make_trainable()
    assert norm.adapter is not None and norm.adapter.bias is None
    norm.adapter = norm.adapter.select_layer(1)
    np.testing.assert_array_equal(norm(x), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_bias_of_a_layer_norm_trains_alone(dtype):
    """The frozen weight is in the compute dtype, and the bias's gradient is in f32."""
    weight, bias = (random_array(2, 32, seed=seed).astype(dtype) for seed in (0, 1))
    norm = LayerNorm(weight, bias, 1e-5)
    x = random_array(600, 32).astype(dtype)
    expected = norm(x, jnp.int32(1))
    norm.make_bias_trainable()
    one = norm.adapter.select_layer(1)
    assert norm.bias[...].shape == (0, 32)
    np.testing.assert_array_equal(one.merge(weight[1]), weight[1].astype(jnp.float32))

    def ours(bias):
        again = LayerNorm(weight, random_array(2, 32).astype(dtype), 1e-5)
        again.adapter = TrainableNorm(None, bias)
        return again(x, jnp.int32(1))

    value, vjp = jax.vjp(ours, one.merge_bias(bias[1]))
    np.testing.assert_array_equal(value, expected)
    (grad,) = vjp(jnp.ones_like(value))
    assert grad.dtype == jnp.float32 and jnp.all(grad == 600)
