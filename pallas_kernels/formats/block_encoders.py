"""Encoders of block formats: f32 weights of a block to the bytes that ggml's `quantize_row_*_ref` gives, to the bit.

The arithmetic is that of single f32 operations in ggml's order. Weights must be finite. XLA on CPUs flushes subnormal
numbers to zero, so in blocks whose weights all lie below 2^-96 only the scale, which is zero, is ggml's.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS

_LARGEST = np.finfo(np.float32).max


def separate(product: jax.Array) -> jax.Array:
    """Returns finite products unchanged; compilers cannot fuse the multiplication with an addition that follows.

    One minimum per product; `tables.rounded`, which also keeps values that are not finite, costs three operations.
    """
    return jnp.where(product < _LARGEST, product, _LARGEST)


def opaque(constant: float, like: jax.Array) -> jax.Array:
    """Returns a constant that XLA does not know, in the shape of `like`, so that quotients by it stay quotients."""
    return jnp.where(like < _LARGEST, np.float32(constant), _LARGEST)


def extreme(blocks: jax.Array) -> jax.Array:
    """Returns the first weight of the largest magnitude of each block, [..., 1]; +0 of a block of zeros."""
    while blocks.shape[-1] > 1:  # XLA on CPUs vectorizes a tree of pairs, but not an argmax
        first, second = blocks[..., 0::2], blocks[..., 1::2]
        blocks = jnp.where(jnp.abs(first) >= jnp.abs(second), first, second)
    negative_zero = jax.lax.bitcast_convert_type(blocks, jnp.uint32) == np.uint32(1 << 31)
    return jnp.where(negative_zero, 0, jax.lax.optimization_barrier(blocks))


def reciprocal(scales: jax.Array) -> jax.Array:
    """Returns 1 / scale, and 0 for a scale of zero."""
    return jnp.where(scales != 0, 1 / jnp.where(scales != 0, scales, 1), 0)


def half_bytes(scales: jax.Array) -> jax.Array:
    """Returns f32 [..., 1] as the two bytes of a half, uint8 [..., 2]."""
    return jax.lax.bitcast_convert_type(scales.astype(jnp.float16), jnp.uint8).reshape(*scales.shape[:-1], 2)


def pack_nibbles(codes: jax.Array) -> jax.Array:
    """Packs uint8 [..., n] to [..., n / 2]: the first half of the codes in the low nibbles."""
    low, high = jnp.split(codes, 2, axis=-1)
    return low | high << 4


def _q4_0(blocks: jax.Array) -> jax.Array:
    scales = extreme(blocks) * np.float32(-0.125)
    codes = jnp.minimum((separate(blocks * reciprocal(scales)) + np.float32(8.5)).astype(jnp.uint8), 15)
    return jnp.concatenate([half_bytes(scales), pack_nibbles(codes)], axis=-1)


def _q8_0(blocks: jax.Array) -> jax.Array:
    largest = jnp.abs(extreme(blocks))
    scales = largest / opaque(127, largest)
    scaled = blocks * reciprocal(scales)
    nearest = jnp.sign(scaled) * jnp.floor(jnp.abs(scaled) + np.float32(0.5))  # halves away from zero
    codes = jax.lax.bitcast_convert_type(nearest.astype(jnp.int8), jnp.uint8)
    return jnp.concatenate([half_bytes(scales), codes], axis=-1)


BLOCK_ENCODERS: Mapping[str, Callable[[jax.Array], jax.Array]] = {"Q4_0": _q4_0, "Q8_0": _q8_0}


@functools.partial(jax.jit, static_argnames="ggml_type")
def encode_blocks(weights: jax.Array, ggml_type: str) -> jax.Array:
    """Returns f32 weights [..., N, K] in blocks, uint8 [..., N, bytes per row].

    Args:
      ggml_type: a key of BLOCK_ENCODERS, whose blocks divide a row.
    """
    blocks = weights.reshape(*weights.shape[:-1], -1, BLOCK_FORMATS[ggml_type].weights)
    return BLOCK_ENCODERS[ggml_type](blocks).reshape(*weights.shape[:-1], -1)
