"""Tests rotations against complex multiplication."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.rope import Rope, rotate, rotations
from tests.nn.gradients import check_vjp, random_array


@pytest.mark.parametrize("heads", [1, 3])
def test_rotate_turns_pairs_of_a_head_as_complex_numbers(heads):
    positions = jnp.asarray([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]], jnp.int32)
    cos, sin = rotations(Rope(theta=100.0, dim=16, max_positions=32), positions, 32)

    def plain(x):
        angles = (
            positions[..., None, None].astype(jnp.float32)
            * np.float32(100.0) ** -(np.arange(8, dtype=np.float32) / 8)[None, None, None]
        )
        turned = jax.lax.complex(x[..., :8], x[..., 8:]) * jnp.exp(jax.lax.complex(jnp.zeros_like(angles), angles))
        return jnp.concatenate([turned.real, turned.imag], axis=-1)

    check_vjp(lambda x: rotate(x, cos, sin), plain, random_array(2, 5, heads, 16))
