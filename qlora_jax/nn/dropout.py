"""Dropout that draws its mask again from the keys in the backward pass, so that no mask is saved.

Each row of a batch has its own key, so its mask does not depend on the rows next to it, or on the device.

Dimension key: B rows of the batch, T positions, M = B T, K in.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def apply_dropout(x_MK: Float[Array, "M K"], rate: float, keys_B: Key[Array, " B"] | None) -> Float[Array, "M K"]:
    """Returns x / (1 - rate) where the masks of `keys_B` are set, and 0 elsewhere.

    Returns x itself if the rate is 0 or `keys_B` is None. The function is linear and diagonal, so it is its own
    transpose.

    Args:
      keys_B: the key of each row of the batch; M is a multiple of B.
    """
    if rate == 0.0 or keys_B is None:
        return x_MK
    shape_TK = (x_MK.shape[0] // keys_B.shape[0], x_MK.shape[1])
    keep_BTK = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, shape_TK))(keys_B)
    scaled_MK = x_MK / jnp.asarray(1.0 - rate, x_MK.dtype)
    return jnp.where(keep_BTK.reshape(x_MK.shape), scaled_MK, jnp.zeros((), x_MK.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def dropout(x_MK: Float[Array, "M K"], rate: float, keys_B: Key[Array, " B"] | None) -> Float[Array, "M K"]:
    """`apply_dropout`, for which autodiff saves only the keys."""
    return apply_dropout(x_MK, rate, keys_B)


def _forward(x_MK, rate, keys_B):
    return apply_dropout(x_MK, rate, keys_B), keys_B


def _backward(rate, keys_B, dy_MK):
    return apply_dropout(dy_MK, rate, keys_B), None


dropout.defvjp(_forward, _backward)
