"""Tests rotations against complex multiplication."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.rope import QueryPositionScale, Rope, rotate, rotations
from tests.nn.gradients import check_vjp, random_array


@pytest.mark.parametrize(("heads", "interleaved"), [(1, False), (3, False), (2, True)])
def test_rotate_turns_pairs_of_a_head_as_complex_numbers(heads, interleaved):
    positions = jnp.asarray([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]], jnp.int32)
    cos, sin = rotations(Rope(theta=100.0, dim=16, max_positions=32), positions, 32)

    def plain(x):
        angles = (
            positions[..., None, None].astype(jnp.float32)
            * np.float32(100.0) ** -(np.arange(8, dtype=np.float32) / 8)[None, None, None]
        )
        turn = jnp.exp(jax.lax.complex(jnp.zeros_like(angles), angles))
        if interleaved:
            turned = jax.lax.complex(x[..., :16:2], x[..., 1:16:2]) * turn
            return jnp.concatenate(
                [jnp.stack([turned.real, turned.imag], -1).reshape(2, 5, heads, 16), x[..., 16:]], -1
            )
        turned = jax.lax.complex(x[..., :8], x[..., 8:16]) * turn
        return jnp.concatenate([turned.real, turned.imag, x[..., 16:]], axis=-1)

    x = random_array(2, 5, heads, 20)  # the last 4 of a head are not rotated
    check_vjp(lambda x: rotate(x, cos, sin, interleaved=interleaved), plain, x)


def test_the_factor_of_queries_grows_with_each_period():
    factors = QueryPositionScale(beta=0.5, period=4).factors(jnp.asarray([0, 3, 4, 7, 8, 11, 12], jnp.int32))
    np.testing.assert_allclose(factors, 1 + 0.5 * np.log([1, 1, 2, 2, 3, 3, 4]), rtol=1e-6)
