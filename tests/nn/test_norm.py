"""Tests norms and their custom VJPs against autodiff of their equations."""

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.nn.norm import layer_norm, rms_norm
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
