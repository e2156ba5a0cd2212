"""Synthetic arrays in place of abstract ones: weights of any size, made on the device without a copy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

WIDTH = 0.03  # floats are uniform in [-WIDTH, WIDTH]
_STRIDE = 0x9E3779B9  # distance between the seeds of two arrays


def synthetic_like(tree: PyTree, seed: int = 0) -> PyTree:
    """Makes an array for each leaf (anything with a shape and a dtype): bytes of all values, floats in [-WIDTH, WIDTH].

    Not for statistics. An element is a hash of its position, so memory holds only the array itself.
    """
    leaves, structure = jax.tree.flatten(tree)
    made = [_synthetic(tuple(leaf.shape), jnp.dtype(leaf.dtype), jnp.uint32(seed + i)) for i, leaf in enumerate(leaves)]
    return structure.unflatten(made)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _synthetic(shape: tuple[int, ...], dtype: np.dtype, seed: jax.Array) -> jax.Array:
    positions = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    hashed = _mixed(_mixed(seed * jnp.uint32(_STRIDE)) + positions)
    if dtype == jnp.uint8:
        return (hashed >> jnp.uint32(24)).astype(dtype)
    uniform = hashed.astype(jnp.float32) * jnp.float32(2.0**-31) - jnp.float32(1)
    return (jnp.float32(WIDTH) * uniform).astype(dtype)


def _mixed(words: jax.Array) -> jax.Array:
    """Applies MurmurHash3's finalizer: each bit of the result depends on every bit of a word."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ (words >> jnp.uint32(shift))) * jnp.uint32(factor)
    return words ^ (words >> jnp.uint32(16))
