"""Tests activations and their custom VJPs against autodiff of their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.mlp import ACTIVATIONS, apply_activation, gated_activation
from tests.nn.gradients import check_vjp, random_array

PLAIN_ACTIVATIONS = {
    "relu": lambda x: jnp.where(x > 0, x, jnp.float32(0)),
    "silu": lambda x: x / (1 + jnp.exp(-x)),
    "gelu": lambda x: x * jax.scipy.stats.norm.cdf(x),
    "gelu_tanh": lambda x: x / (1 + jnp.exp(-2 * np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3))),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    plain, gate, up = PLAIN_ACTIVATIONS[activation], 2 * random_array(6, 32), random_array(6, 32, seed=1)
    check_vjp(lambda x: apply_activation(x, activation), plain, gate)
    check_vjp(lambda gate, up: gated_activation(gate, up, activation), lambda gate, up: plain(gate) * up, gate, up)
