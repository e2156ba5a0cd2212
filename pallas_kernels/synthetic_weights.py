"""Arrays of scattered values in place of abstract ones: weights of any size, made on the device without a copy."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

WIDTH = 0.03  # floats lie within it, on both sides of zero
_STRIDE = 0x9E3779B9  # between the seeds of two arrays


def scattered_like(tree: Any, seed: int = 0) -> Any:
    """Each leaf, which has a shape and a dtype, as an array: bytes of all values, and floats uniform in +-WIDTH.

    Not for statistics: an element is a hash of its place, so that nothing but the array itself is ever in memory.
    """
    leaves, structure = jax.tree.flatten(tree)
    made = [_scattered(tuple(leaf.shape), jnp.dtype(leaf.dtype), jnp.uint32(seed + i)) for i, leaf in enumerate(leaves)]
    return structure.unflatten(made)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scattered(shape: tuple[int, ...], dtype: Any, seed: jax.Array) -> jax.Array:
    places = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    hashed = _mixed(_mixed(seed * jnp.uint32(_STRIDE)) + places)
    if dtype == jnp.uint8:
        return (hashed >> jnp.uint32(24)).astype(dtype)
    uniform = hashed.astype(jnp.float32) * jnp.float32(2.0**-31) - jnp.float32(1)
    return (jnp.float32(WIDTH) * uniform).astype(dtype)


def _mixed(words: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer: each bit of the result depends on every bit of a word."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ (words >> jnp.uint32(shift))) * jnp.uint32(factor)
    return words ^ (words >> jnp.uint32(16))
