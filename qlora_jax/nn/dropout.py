"""Dropout whose mask is made again from its key in the backward pass, and not kept."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def apply_dropout(x: Float[Array, "*S"], rate: float, key: jax.Array | None) -> Float[Array, "*S"]:
    """x / (1 - rate) where `key` keeps an element, else 0; x where the rate is 0 or there is no key.

    Linear and diagonal, so it is its own transpose.
    """
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def dropout(x: Float[Array, "*S"], rate: float, key: jax.Array | None) -> Float[Array, "*S"]:
    """`apply_dropout`, of which autodiff keeps the key alone."""
    return apply_dropout(x, rate, key)


dropout.defvjp(
    lambda x, rate, key: (apply_dropout(x, rate, key), key), lambda rate, key, dy: (apply_dropout(dy, rate, key), None)
)
