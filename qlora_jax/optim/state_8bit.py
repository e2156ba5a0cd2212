"""Optimizer state in 8 bits: blocks of 256 elements with one scale each, and codes of a dynamic map.

A leaf is a stack of tensors along axis 0, usually one per layer, as LoRA parameters are. Blocks are counted from each
tensor's start and never cross into the next, so a page of some layers has whole blocks. Codes take 1 byte per element
and scales 4 bytes per block: 1.016 bytes per element.

Dimension key: L tensors of a leaf, S = ceil(n / 256) blocks of a tensor of n elements.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.formats.tables import dynamic_map
from qlora_jax.quant.dynamic_8bit import quantize_blocks
from qlora_jax.sharding import BLOCK

MIN_SIZE = 4096  # tensors of fewer elements keep f32 state: bitsandbytes' min_8bit_size


class Quantized(NamedTuple):
    """A quantized leaf: x = map[codes] * absmax of the block."""

    codes: UInt8[Array, "L ..."]
    absmax_LS: Float[Array, "L S"]


def is_large(shape: tuple[int, ...]) -> bool:
    """True if the tensors of a leaf, shape[1:], are large enough for state in 8 bits."""
    return math.prod(shape[1:]) >= MIN_SIZE


def state_zeros(shape: tuple[int, ...]) -> Quantized | jax.Array:
    """Returns the state leaf at step 0 for parameters of this shape: scales of 0, or f32 zeros if tensors are small."""
    if not is_large(shape):
        return jnp.zeros(shape, jnp.float32)
    blocks = -(-math.prod(shape[1:]) // BLOCK)
    return Quantized(jnp.zeros(shape, jnp.uint8), jnp.zeros((shape[0], blocks), jnp.float32))


def dequantize(state: Quantized, signed: bool) -> Float[Array, "L ..."]:
    """Computes map[codes] * absmax, in f32."""
    levels = jnp.take(jnp.asarray(dynamic_map(signed)), state.codes.astype(jnp.int32), mode="clip")
    return _tensors(_blocks(levels) * state.absmax_LS[:, :, None], state.codes.shape)


def quantize(x: Float[Array, "L ..."], signed: bool) -> Quantized:
    """Quantizes to absmax = max |x| of each block, and codes (qlora_jax.quant.dynamic_8bit)."""
    codes, absmax_LS = quantize_blocks(_blocks(x), signed)
    return Quantized(_tensors(codes, x.shape), absmax_LS)


def _blocks(x: jax.Array) -> jax.Array:
    """Reshapes [L, ...] to [L, S, 256]; the last block of each tensor is padded with zeros."""
    flat = x.reshape(x.shape[0], -1)
    missing = -flat.shape[1] % BLOCK
    filled = jnp.pad(flat, ((0, 0), (0, missing))) if missing else flat
    return filled.reshape(x.shape[0], -1, BLOCK)


def _tensors(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Inverts `_blocks`."""
    return blocks.reshape(shape[0], -1)[:, : math.prod(shape[1:])].reshape(shape)
