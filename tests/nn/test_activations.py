"""Tests activations and their custom VJPs against autodiff of their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.activations import ACTIVATIONS, ClampedSwiglu, apply_activation, gated_activation
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


def _clamped_swiglu(gate, up, alpha, limit):
    gate = jnp.where(gate > limit, limit, gate)
    up = jnp.where(up > limit, limit, jnp.where(up < -limit, -limit, up))
    return (up + 1) * gate / (1 + jnp.exp(-alpha * gate))


def test_clamped_swiglu():
    gate, up = 2 * random_array(6, 32), 2 * random_array(6, 32, seed=1)
    gate, up = gate.at[0, 0].set(1.5), up.at[0, 1].set(1.5).at[0, 2].set(-1.5)  # at the limit, gradients pass
    assert int(jnp.sum(gate > 1.5)) > 20 and int(jnp.sum(up > 1.5)) > 20 and int(jnp.sum(up < -1.5)) > 20
    ours, plain = ClampedSwiglu(alpha=1.3, limit=1.5), lambda gate, up: _clamped_swiglu(gate, up, 1.3, 1.5)
    check_vjp(jax.jit(lambda gate, up: gated_activation(gate, up, ours)), jax.jit(plain), gate, up)
