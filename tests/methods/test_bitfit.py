"""Tests a trainable bias against its equation: values, gradients, and merged leaves."""

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.methods.bitfit import TrainableBias, add_bias, make_bias_trainable
from tests.nn.frozen_linears import LAYER, K, M, N, dequantized_layer, random_linear
from tests.nn.gradients import check_vjp, random_array


def test_trainable_bias():
    linear = random_linear(quantized=True)
    weight, frozen = dequantized_layer(linear), linear.bias[...][1]

    def ours(x, bias):
        return TrainableBias.apply([TrainableBias(bias)], x, [linear.select_layer(LAYER)], [None])[0]

    check_vjp(ours, lambda x, bias: x @ weight.T + bias[None], random_array(M, K), random_array(N))
    bias = random_array(N)
    one = TrainableBias(jnp.stack([bias, 2 * bias])).select_layer(1)
    np.testing.assert_array_equal(one.merge(weight), weight)
    np.testing.assert_array_equal(one.merge_bias(frozen), 2 * bias)


def test_the_gradient_is_summed_in_f32():
    """In bf16, a sum of ones stops at 256."""
    y, bias = jnp.zeros((1000, N), jnp.bfloat16), jnp.zeros((N,), jnp.float32)
    value, vjp = jax.vjp(add_bias, y, bias)
    dy, d_bias = vjp(jnp.ones_like(value))
    assert dy.dtype == jnp.bfloat16 and jnp.all(d_bias == 1000)


def test_the_bias_starts_as_the_frozen_one_which_is_freed():
    linear = random_linear(quantized=True)
    before = linear.bias[...]
    make_bias_trainable(linear)
    np.testing.assert_array_equal(linear.adapter.bias[...], before)
    assert linear.bias[...].shape == (0, N)
