"""Tests bottleneck adapters against their equation: values, every gradient, and the initial adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.methods.bottleneck import Bottleneck, bottleneck
from tests.nn.gradients import check_vjp, random_array

M, D, R = 7, 24, 5
PLAIN = {"relu": jax.nn.relu, "gelu": lambda x: jax.nn.gelu(x, approximate=False), "silu": jax.nn.silu}
LEAVES = random_array(D, R), random_array(R), random_array(R, D), random_array(D)


@pytest.mark.parametrize("activation", PLAIN)
def test_bottleneck(activation):
    def plain(x, down, down_bias, up, up_bias):
        return x + PLAIN[activation](x @ down + down_bias[None]) @ up + up_bias[None]

    check_vjp(lambda *args: bottleneck(*args, activation), plain, random_array(M, D), *LEAVES)


def test_matrices_of_another_dtype_are_cast_and_their_gradients_keep_it():
    down, down_bias, up, up_bias = LEAVES
    args = random_array(M, D), down.astype(jnp.bfloat16), down_bias, up.astype(jnp.bfloat16), up_bias
    value, vjp = jax.vjp(lambda *args: bottleneck(*args, "gelu"), *args)
    assert [grad.dtype for grad in vjp(value)] == [arg.dtype for arg in args]


def test_a_new_adapter_changes_nothing_and_can_learn():
    adapter = Bottleneck.init(jax.random.key(0), 3, D, rank=R, activation="gelu")
    assert adapter.down[...].shape == (3, D, R) and jnp.all(jnp.std(adapter.down[...], axis=(1, 2)) > 0)
    leaves = [leaf[...][1] for leaf in (adapter.down, adapter.down_bias, adapter.up, adapter.up_bias)]
    x = random_array(M, D)
    value, vjp = jax.vjp(lambda *leaves: bottleneck(x, *leaves, "gelu"), *leaves)
    np.testing.assert_array_equal(value, x)
    assert [bool(jnp.any(grad)) for grad in vjp(x)] == [False, False, True, True]  # up is zero at first
