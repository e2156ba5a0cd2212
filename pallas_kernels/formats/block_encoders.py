"""Encoders of block formats: f32 weights of a block to the bytes that another program gives, to the bit.

For ggml's formats that program is `ggml_quantize_chunk` without importance, as llama.cpp's quantizer calls it; for INT4
it is compressed-tensors. The arithmetic is that of single f32 operations in their order.

Weights must be finite. XLA on CPUs flushes subnormal numbers to zero, so in blocks whose weights all lie below 2^-96
only the scale, which is zero, is ggml's.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.exact_steps import extreme, first_of, nearest, quotient, reciprocal, separate
from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS, NVFP4_GROUP, PART, nvfp4_type
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.formats.scale_search import iq4_nl_codes, scale_search


def _once(codes: jax.Array) -> jax.Array:
    """Returns the codes, which XLA else computes again for each byte that has bits of them."""
    return jax.lax.optimization_barrier(codes)


def _half_bytes(scales: jax.Array) -> jax.Array:
    """Returns f32 [..., 1] as the two bytes of a half, uint8 [..., 2]."""
    return jax.lax.bitcast_convert_type(scales.astype(jnp.float16), jnp.uint8).reshape(*scales.shape[:-1], 2)


def _rounded_half(scales: jax.Array) -> jax.Array:
    return scales.astype(jnp.float16).astype(jnp.float32)


def _nibbles(codes: jax.Array) -> jax.Array:
    """Packs uint8 [..., n] to [..., n / 2]: the first half of the codes in the low nibbles."""
    low, high = jnp.split(codes, 2, axis=-1)
    return (low & 15) | high << 4


def _fields(codes: jax.Array, width: int) -> jax.Array:
    """Packs uint8 [..., 8 / width, n] of fields of `width` bits to [..., n], the first in the lowest bits."""
    shifted = [codes[..., at, :] << (at * width) for at in range(8 // width)]
    return functools.reduce(operator.or_, shifted)


def _fifth_bits(codes: jax.Array) -> jax.Array:
    """Packs the fifth bits of 32 codes to four bytes."""
    return _fields((codes >> 4).reshape(*codes.shape[:-1], 4, 8).swapaxes(-1, -2), 1)


def _around_zero(blocks: jax.Array, levels: int) -> tuple[jax.Array, jax.Array]:
    """Returns (scales, codes) of Q4_0 and Q5_0: the extreme weight has code 0, half of the `levels` below zero."""
    scales = extreme(blocks) * np.float32(-2 / levels)
    shifted = separate(blocks * reciprocal(scales)) + np.float32(levels / 2 + 0.5)
    return scales, _once(jnp.minimum(shifted.astype(jnp.uint8), levels - 1))


def _above_minimum(blocks: jax.Array, levels: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (scales, minima, codes) of Q4_1 and Q5_1."""
    minima = first_of(blocks, operator.le)
    maxima = jnp.max(blocks, axis=-1, keepdims=True)
    scales = quotient(jnp.abs(maxima - minima), levels - 1)  # +0 for zeros of both signs
    shifted = separate((blocks - minima) * reciprocal(scales)) + np.float32(0.5)
    return scales, minima, _once(jnp.minimum(shifted.astype(jnp.uint8), levels - 1))


def _q4_0(blocks: jax.Array) -> jax.Array:
    scales, codes = _around_zero(blocks, 16)
    return jnp.concatenate([_half_bytes(scales), _nibbles(codes)], axis=-1)


def _q4_1(blocks: jax.Array) -> jax.Array:
    scales, minima, codes = _above_minimum(blocks, 16)
    return jnp.concatenate([_half_bytes(scales), _half_bytes(minima), _nibbles(codes)], axis=-1)


def _q5_0(blocks: jax.Array) -> jax.Array:
    scales, codes = _around_zero(blocks, 32)
    return jnp.concatenate([_half_bytes(scales), _fifth_bits(codes), _nibbles(codes)], axis=-1)


def _q5_1(blocks: jax.Array) -> jax.Array:
    scales, minima, codes = _above_minimum(blocks, 32)
    parts = [_half_bytes(scales), _half_bytes(minima), _fifth_bits(codes), _nibbles(codes)]
    return jnp.concatenate(parts, axis=-1)


def _q8_0(blocks: jax.Array) -> jax.Array:
    largest = jnp.abs(extreme(blocks))
    scales = quotient(largest, 127)
    scaled = blocks * reciprocal(scales)
    # Halves go away from zero, as in C's roundf.
    nearest_away = jnp.sign(scaled) * jnp.floor(jnp.abs(scaled) + np.float32(0.5))
    codes = jax.lax.bitcast_convert_type(nearest_away.astype(jnp.int8), jnp.uint8)
    return jnp.concatenate([_half_bytes(scales), codes], axis=-1)


def _groups(blocks: jax.Array, width: int) -> jax.Array:
    return blocks.reshape(*blocks.shape[:-1], -1, width)


def _six_bits(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (the half of the block, integers 0 to 63) of its eight scales or minima, f32 [..., 8, 1]."""
    largest = jnp.maximum(jnp.max(values, axis=-2), 0)
    scaled = separate(jnp.where(largest > 0, 63 / jnp.where(largest > 0, largest, 1), 0)[..., None, :] * values)
    integers = jnp.round(scaled).astype(jnp.int32).astype(jnp.uint8)
    return quotient(largest, 63), jnp.minimum(integers, 63)


def _k_codes(blocks: jax.Array, ggml_type: str, largest: int) -> tuple[jax.Array, jax.Array]:
    """Returns (the 16 bytes of scales and minima, codes [..., 8, 32]) of Q4_K and Q5_K."""
    x = _groups(blocks, 32)
    found = scale_search(x, ggml_type, BLOCK_FORMATS[ggml_type].number)
    (of_scales, scales), (of_minima, minima) = _six_bits(found.scale), _six_bits(found.minimum)
    step = _rounded_half(of_scales)[..., None] * scales.astype(jnp.float32)
    shift = _rounded_half(of_minima)[..., None] * minima.astype(jnp.float32)
    quotients = quotient(x + shift, jnp.where(step != 0, step, 1))
    codes = jnp.where(step != 0, quotients, found.inverse * (x - found.offset))
    s, m = scales[..., 0], minima[..., 0]
    low_scales, low_minima = (first[..., :4] | (first[..., 4:] >> 4) << 6 for first in (s, m))
    packed = [low_scales, low_minima, (s[..., 4:] & 15) | m[..., 4:] << 4]
    header = jnp.concatenate([_half_bytes(of_scales), _half_bytes(of_minima), *packed], axis=-1)
    return header, _once(nearest(codes, 0, largest).astype(jnp.uint8))


def _k_nibbles(codes: jax.Array) -> jax.Array:
    """Packs the low nibbles of [..., 8, 32] codes to [..., 128]."""
    return _nibbles(codes.reshape(*codes.shape[:-2], 4, 64)).reshape(*codes.shape[:-2], -1)


def _q4_k(blocks: jax.Array) -> jax.Array:
    header, codes = _k_codes(blocks, "Q4_K", 15)
    return jnp.concatenate([header, _k_nibbles(codes)], axis=-1)


def _q5_k(blocks: jax.Array) -> jax.Array:
    header, codes = _k_codes(blocks, "Q5_K", 31)
    return jnp.concatenate([header, _fields(codes >> 4, 1), _k_nibbles(codes)], axis=-1)


def _q6_k(blocks: jax.Array) -> jax.Array:
    lead, x = blocks.shape[:-1], _groups(blocks, 16)
    found = scale_search(x, "Q6_K", BLOCK_FORMATS["Q6_K"].number)
    largest = extreme(found.scale[..., 0])
    empty = jnp.abs(largest) < np.float32(1e-15)
    inverse = -128 / jnp.where(empty, 1, largest)
    of_all = jnp.where(empty, 0, reciprocal(inverse))
    scales = jnp.where(empty, 0, jnp.minimum(jnp.round(inverse * found.scale[..., 0]), 127))
    step = (_rounded_half(of_all) * scales)[..., None]
    quotients = quotient(x, jnp.where(step != 0, step, 1))
    signed = nearest(jnp.where(step != 0, quotients, found.inverse * x), -32, 31) + 32
    zero = empty[..., None] | ((step == 0) & (found.inverse == 0))
    codes = _once(jnp.where(zero, 0, signed).astype(jnp.uint8)).reshape(*lead, 2, 128)
    low, high = _nibbles(codes).reshape(*lead, 128), _fields(_groups(codes >> 4, 32), 2).reshape(*lead, 64)
    integers = jax.lax.bitcast_convert_type(scales.astype(jnp.int8), jnp.uint8)
    return jnp.concatenate([low, high, integers, _half_bytes(of_all)], axis=-1)


def _iq4_nl(blocks: jax.Array) -> jax.Array:
    scales = scale_search(blocks, "IQ4_NL", BLOCK_FORMATS["IQ4_NL"].number).scale
    return jnp.concatenate([_half_bytes(scales), _nibbles(iq4_nl_codes(blocks * reciprocal(scales)))], axis=-1)


def _rounded_up() -> np.ndarray:
    """Returns how many f32 numbers below each power of two have its log2 in f32, by the exponent of their bits."""
    powers, ulps = np.arange(256)[:, None] - 126, np.arange(1, 65)
    logarithms = (powers + np.log2(1 - ulps * 2.0**-24)).astype(np.float32)
    return (logarithms == powers).sum(axis=-1).astype(np.uint32)


_E2M1_MIDDLES = (0.5, 1.5, 2.5, 3.5, 5, 7, 10)  # between magnitudes times 2


def _mxfp4(blocks: jax.Array) -> jax.Array:
    """Encodes with the power of two floor(log2 |largest|) - 2, where the logarithm is rounded to f32."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(extreme(blocks)), jnp.uint32)
    exponents, below = bits >> 23, (1 << 23) - (bits & ((1 << 23) - 1))
    rounds_up = below <= jnp.asarray(_rounded_up()).at[exponents].get(mode="promise_in_bounds")
    stored = jnp.where(bits == 0, 0, jnp.maximum(jnp.where(rounds_up, exponents + 1, exponents), 2) - 2)
    scaled = blocks * jax.lax.bitcast_convert_type((255 - stored) << 23, jnp.float32)  # halves of stored powers
    magnitudes = sum(((jnp.abs(scaled) > middle).astype(jnp.uint8) for middle in _E2M1_MIDDLES), start=jnp.uint8(0))
    codes = jnp.where((scaled < 0) & (magnitudes > 0), magnitudes | 8, magnitudes)
    return jnp.concatenate([stored.astype(jnp.uint8), _nibbles(codes)], axis=-1)


def _int4(blocks: jax.Array, scale_type: np.dtype, symmetric: bool) -> jax.Array:
    """Encodes a group of integers -8 to 7, stored plus 8, as compressed-tensors does with scale_dtype=scale_type."""
    least = jnp.minimum(jnp.min(blocks, axis=-1, keepdims=True), 0)
    most = jnp.maximum(jnp.max(blocks, axis=-1, keepdims=True), 0)
    if symmetric:
        scales, zeros = quotient(jnp.maximum(-least, most), 7.5), jnp.zeros_like(least)
    else:
        scales = quotient(most - least, 15)
        zeros = nearest(-8 - quotient(least, jnp.where(scales > 0, scales, 1)), -8, 7)
        zeros = jnp.where(scales > 0, zeros, 0)
    limits = jnp.finfo(scale_type)
    rounded = jnp.minimum(scales, np.float32(limits.max)).astype(scale_type)
    rounded = jnp.where(rounded == 0, jnp.asarray(limits.eps, scale_type), rounded)
    quotients = quotient(blocks, rounded.astype(jnp.float32))
    codes = (nearest(quotients + zeros, -8, 7) + 8).astype(jnp.uint8)
    halves = jax.lax.bitcast_convert_type(rounded, jnp.uint8).reshape(*rounded.shape[:-1], 2)
    packed = _nibbles(_groups(codes, 32)).reshape(*codes.shape[:-1], -1)
    return jnp.concatenate([halves, (zeros + 8).astype(jnp.uint8), packed], axis=-1)


class BlockEncoder(NamedTuple):
    """An encoder.

    Attributes:
      ggml_type: the format of the blocks, a key of BLOCK_FORMATS.
      encode: f32 [..., weights] -> uint8 [..., nbytes].
    """

    ggml_type: str
    encode: Callable[[jax.Array], jax.Array]


def _int4_encoders() -> dict[str, BlockEncoder]:
    """Returns the encoders of INT4, named after the format; those with a zero of each group end in ASYMMETRIC."""
    return {
        f"{name}{'' if symmetric else '_ASYMMETRIC'}": BlockEncoder(
            name, functools.partial(_int4, scale_type=block.half_type, symmetric=symmetric)
        )
        for name, block in BLOCK_FORMATS.items()
        if name.startswith("INT4")
        for symmetric in (True, False)
    }


BLOCK_ENCODERS: Mapping[str, BlockEncoder] = {
    name: BlockEncoder(name, encode)
    for name, encode in {
        "Q4_0": _q4_0,
        "Q4_1": _q4_1,
        "Q5_0": _q5_0,
        "Q5_1": _q5_1,
        "Q8_0": _q8_0,
        "Q4_K": _q4_k,
        "Q5_K": _q5_k,
        "Q6_K": _q6_k,
        "IQ4_NL": _iq4_nl,
        "MXFP4": _mxfp4,
    }.items()
} | _int4_encoders()


@functools.partial(jax.jit, static_argnames="name")
def encode_blocks(weights: jax.Array, name: str) -> jax.Array:
    """Returns f32 weights [..., N, K] in blocks, uint8 [..., N, bytes per row].

    Args:
      name: a key of BLOCK_ENCODERS, whose blocks divide a row.
    """
    encoder = BLOCK_ENCODERS[name]
    blocks = _groups(jax.lax.optimization_barrier(weights), BLOCK_FORMATS[encoder.ggml_type].weights)
    return encoder.encode(blocks).reshape(*weights.shape[:-1], -1)


def encode_mxfp4(weights: jax.Array) -> GgmlTensor:
    """Returns f32 weights [..., N, K] in MXFP4, as compressed-tensors quantizes each; ggml has other scales.

    The scale of a group is a quarter of a power of two: that below its largest magnitude, or if this is at least 1.75
    times as large, the next power.
    """
    groups = _groups(jax.lax.optimization_barrier(weights), PART)
    bits = jax.lax.bitcast_convert_type(jnp.max(jnp.abs(groups), axis=-1, keepdims=True), jnp.uint32)
    stored = jnp.maximum((bits + (1 << 21)) >> 23, 2) - 2
    scaled = groups * jax.lax.bitcast_convert_type((254 - stored) << 23, jnp.float32)
    blocks = jnp.concatenate([stored.astype(jnp.uint8), _nibbles(_even_e2m1(scaled))], axis=-1)
    codes = blocks.reshape(*weights.shape[:-1], -1)
    return GgmlTensor(codes=codes, ggml_type="MXFP4", shape=weights.shape[-2:], dtype="float32")


_EVEN_AT = ((operator.gt, (0.25, 1.25, 2.5, 5)), (operator.ge, (0.75, 1.75, 3.5)))  # E2M1's middles, ties to even


def _even_e2m1(scaled: jax.Array) -> jax.Array:
    """Returns the codes of the nearest values of E2M1, ties to even codes."""
    counted = [
        compare(jnp.abs(scaled), np.float32(middle)).astype(jnp.uint8) for compare, all_ in _EVEN_AT for middle in all_
    ]
    return _once(functools.reduce(operator.add, counted) | (scaled < 0).astype(jnp.uint8) << 3)


def encode_nvfp4(weights: jax.Array) -> GgmlTensor:
    """Returns f32 weights [..., N, K] in NVFP4, as `qlora_jax.quant.nvfp4` and compressed-tensors quantize each."""
    weights = jax.lax.optimization_barrier(weights)
    ggml_type = nvfp4_type(weights.shape[-1], inverse=True)
    largest = jnp.max(jnp.abs(weights), axis=(-2, -1), keepdims=True)
    of_tensor = 1 / jnp.maximum(largest, np.finfo(np.float32).tiny) * np.float32(448 * 6)
    of_tensor = jnp.where(jnp.isfinite(of_tensor), of_tensor, 1)[..., None]
    groups = _groups(weights, NVFP4_GROUP)
    exact = quotient(jnp.max(jnp.abs(groups), axis=-1, keepdims=True), 6) * of_tensor
    scales = jnp.minimum(exact, 448).astype(jnp.float8_e4m3fn)
    scales = jnp.where(scales == 0, jnp.asarray(0.125, scales.dtype), scales)
    scaled = quotient(groups, quotient(scales.astype(jnp.float32), of_tensor))
    codes = _even_e2m1(scaled)
    blocks = (*weights.shape[:-1], weights.shape[-1] // BLOCK_FORMATS[ggml_type].weights, -1)
    first = jax.lax.bitcast_convert_type(jnp.broadcast_to(of_tensor, (*blocks[:-1], 1)), jnp.uint8)
    parts = [
        first,
        jax.lax.bitcast_convert_type(scales, jnp.uint8),
        _nibbles(_groups(codes.reshape(weights.shape), 32)),
    ]
    stored = jnp.concatenate([part.reshape(blocks) for part in parts], axis=-1).reshape(*weights.shape[:-1], -1)
    return GgmlTensor(codes=stored, ggml_type=ggml_type, shape=weights.shape[-2:], dtype="float32")
