"""Single f32 operations whose bits compilers do not change, for encoders that must give those of another program."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_LARGEST = np.finfo(np.float32).max


def separate(product: jax.Array) -> jax.Array:
    """Returns finite products unchanged; compilers cannot fuse the multiplication with an addition that follows.

    One minimum per product; `tables.rounded`, which also keeps values that are not finite, costs three operations.
    """
    return jnp.where(product < _LARGEST, product, _LARGEST)


def quotient(numbers: jax.Array, divisors: jax.Array | float) -> jax.Array:
    """Returns numbers / divisors.

    XLA turns a quotient by a constant, or by numbers that are broadcast, into a product with the reciprocal.
    """
    return numbers / jnp.where(numbers < _LARGEST, divisors, 1)


def first_of(blocks: jax.Array, precedes: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Returns the first number of each block, [..., 1], that `precedes` all others, as a tree of pairs.

    XLA on CPUs vectorizes the tree, but not jnp.argmax.
    """
    while blocks.shape[-1] > 1:
        ours, theirs = blocks[..., 0::2], blocks[..., 1::2]
        blocks = jnp.where(precedes(ours, theirs), ours, theirs)
    return jax.lax.optimization_barrier(blocks)


def extreme(blocks: jax.Array) -> jax.Array:
    """Returns the first number of the largest magnitude of each block, [..., 1]; +0 of a block of zeros."""
    found = first_of(blocks, lambda ours, theirs: jnp.abs(ours) >= jnp.abs(theirs))
    return jnp.where(jax.lax.bitcast_convert_type(found, jnp.uint32) == np.uint32(1 << 31), 0, found)


def reciprocal(scales: jax.Array) -> jax.Array:
    """Returns 1 / scale, and 0 for a scale of zero."""
    return jnp.where(scales != 0, 1 / jnp.where(scales != 0, scales, 1), 0)


def nearest(values: jax.Array, lowest: int, highest: int) -> jax.Array:
    """Returns the nearest integers within bounds, halves to even, as f32; `lowest` for values that are not numbers."""
    return jnp.round(jnp.minimum(jnp.where(values > lowest, values, np.float32(lowest)), np.float32(highest)))
