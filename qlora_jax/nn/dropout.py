"""Dropout that draws its mask again from the key in the backward pass, so that no mask is saved."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def apply_dropout(x: Float[Array, "*S"], rate: float, key: jax.Array | None) -> Float[Array, "*S"]:
    """Returns x / (1 - rate) where the mask of `key` is set, and 0 elsewhere.

    Returns x itself if the rate is 0 or `key` is None. The function is linear and diagonal, so it is its own transpose.
    """
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def dropout(x: Float[Array, "*S"], rate: float, key: jax.Array | None) -> Float[Array, "*S"]:
    """`apply_dropout`, for which autodiff saves the key alone."""
    return apply_dropout(x, rate, key)


dropout.defvjp(
    lambda x, rate, key: (apply_dropout(x, rate, key), key), lambda rate, key, dy: (apply_dropout(dy, rate, key), None)
)
