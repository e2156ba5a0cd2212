"""The block formats of ggml, in which GGUF files store weights, MXFP4, and INT4: bytes of a block to f32 weights.

Each format of ggml follows its `dequantize_row_*`. A half-precision scale times an integer scale times a code has at
most 23 significant bits, so every product is exact in f32. Only the addition of a minimum rounds, once, so a fused
multiply-add computes the same bits.

The INT4 formats are not ggml's. A block is a group of GPTQ, AWQ or compressed-tensors, w = scale (code - zero), with a
16-bit scale, the zero in a byte, and the codes. So groups of 128 take 4.19 bits per weight, where blocks of 32 that
repeat scale and zero would take 4.75.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

SUPER_BLOCK = 256  # weights per block of the K-quants
_FLOAT16 = np.dtype(np.float16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """A block format.

    Attributes:
      number: its number in ggml's enumeration; those of INT4 are beyond it.
      weights: weights per block.
      nbytes: bytes per block.
      decode: uint8 [..., nbytes] -> f32 [..., weights].
      halves: offsets of the 16-bit numbers in a block.
      half_type: the type of these numbers.
    """

    number: int
    weights: int
    nbytes: int
    decode: Callable[[jax.Array], jax.Array]
    halves: tuple[int, ...]
    half_type: np.dtype = _FLOAT16


def _half(block: jax.Array, offset: int, dtype: DTypeLike = jnp.float16) -> jax.Array:
    """Returns the 16-bit number at a byte offset, as f32 [..., 1]."""
    pair = block[..., offset : offset + 2]
    return jax.lax.bitcast_convert_type(pair, dtype).astype(jnp.float32)[..., None]


def _nibbles(packed: jax.Array) -> jax.Array:
    """Unpacks uint8 [..., n] to [..., 2n]: all low nibbles, then all high ones."""
    return jnp.concatenate([packed & 15, packed >> 4], axis=-1)


def _bits(packed: jax.Array, width: int) -> jax.Array:
    """Unpacks uint8 [..., n] to fields of `width` bits, [..., 8 / width, n], the lowest bits first."""
    return jnp.stack([(packed >> shift) & (2**width - 1) for shift in range(0, 8, width)], axis=-2)


def _fifth_bits(packed: jax.Array) -> jax.Array:
    """Unpacks four bytes to the fifth bits of 32 codes, each as 0 or 16."""
    return _bits(packed, 1).swapaxes(-1, -2).reshape(*packed.shape[:-1], 32) << 4


def _signed(codes: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.float32)


def _q4_0(block: jax.Array) -> jax.Array:
    return _half(block, 0) * (_nibbles(block[..., 2:]).astype(jnp.float32) - 8)


def _q4_1(block: jax.Array) -> jax.Array:
    return _half(block, 0) * _nibbles(block[..., 4:]).astype(jnp.float32) + _half(block, 2)


def _q5_0(block: jax.Array) -> jax.Array:
    codes = _nibbles(block[..., 6:]) | _fifth_bits(block[..., 2:6])
    return _half(block, 0) * (codes.astype(jnp.float32) - 16)


def _q5_1(block: jax.Array) -> jax.Array:
    codes = _nibbles(block[..., 8:]) | _fifth_bits(block[..., 4:8])
    return _half(block, 0) * codes.astype(jnp.float32) + _half(block, 2)


def _q8_0(block: jax.Array) -> jax.Array:
    return _half(block, 0) * _signed(block[..., 2:])


def _scales_and_minima(block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (scales, minima) of a Q4_K or Q5_K block, f32 [..., 8, 1]: eight 6-bit integers each, in 12 bytes.

    The first four integers are the low six bits of a byte. The others take four bits of the last four bytes, and the
    two high bits of the bytes before.
    """
    low_scales, low_minima, rest = (block[..., start : start + 4] for start in (4, 8, 12))
    scales = [low_scales & 63, (rest & 15) | ((low_scales >> 2) & 48)]
    minima = [low_minima & 63, (rest >> 4) | ((low_minima >> 2) & 48)]
    of_all, of_minima = _half(block, 0), _half(block, 2)

    def scaled(factor: jax.Array, integers: list[jax.Array]) -> jax.Array:
        return (factor * jnp.concatenate(integers, axis=-1).astype(jnp.float32))[..., None]

    return scaled(of_all, scales), scaled(of_minima, minima)


def _k_codes(packed: jax.Array) -> jax.Array:
    """Unpacks the low nibbles of Q4_K and Q5_K, uint8 [..., 128], to [..., 8, 32]."""
    groups = packed.reshape(*packed.shape[:-1], 4, 32)
    return _nibbles(groups).reshape(*packed.shape[:-1], 8, 32)


def _with_minima(block: jax.Array, codes: jax.Array) -> jax.Array:
    scales, minima = _scales_and_minima(block)
    return (scales * codes.astype(jnp.float32) - minima).reshape(*block.shape[:-1], SUPER_BLOCK)


def _q4_k(block: jax.Array) -> jax.Array:
    return _with_minima(block, _k_codes(block[..., 16:]))


def _q5_k(block: jax.Array) -> jax.Array:
    return _with_minima(block, _k_codes(block[..., 48:]) | (_bits(block[..., 16:48], 1) << 4))


def _q2_k(block: jax.Array) -> jax.Array:
    lead, packed = block.shape[:-1], block[..., :16]
    codes = _bits(block[..., 16:80].reshape(*lead, 2, 32), 2).reshape(*lead, 16, 16)
    scales, minima = (
        _half(block, at) * integers.astype(jnp.float32) for at, integers in ((80, packed & 15), (82, packed >> 4))
    )
    return (scales[..., None] * codes.astype(jnp.float32) - minima[..., None]).reshape(*lead, SUPER_BLOCK)


def _q3_k(block: jax.Array) -> jax.Array:
    """Decodes codes whose third bit is in another place, and sixteen 6-bit scales, whose two high bits are too."""
    lead, packed = block.shape[:-1], block[..., 96:108]
    low = _bits(block[..., 32:96].reshape(*lead, 2, 32), 2).reshape(*lead, 16, 16)
    codes = low | (_bits(block[..., :32], 1).reshape(*lead, 16, 16) << 2)
    integers = _nibbles(packed[..., :8]) | (_bits(packed[..., 8:], 2).reshape(*lead, 16) << 4)
    scales = (_half(block, 108) * (integers.astype(jnp.float32) - 32))[..., None]
    return (scales * (codes.astype(jnp.float32) - 4)).reshape(*lead, SUPER_BLOCK)


def _q6_k(block: jax.Array) -> jax.Array:
    lead = block.shape[:-1]
    low = _nibbles(block[..., :128].reshape(*lead, 2, 64)).reshape(*lead, 16, 16)
    high = _bits(block[..., 128:192].reshape(*lead, 2, 32), 2).reshape(*lead, 16, 16)
    scales = (_half(block, 208) * _signed(block[..., 192:208]))[..., None]
    return (scales * ((low | (high << 4)).astype(jnp.float32) - 32)).reshape(*lead, SUPER_BLOCK)


# E2M1 times 2, so that all values are integers; the scale is halved in return.
MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _mxfp4(block: jax.Array) -> jax.Array:
    """Decodes a power of two and 32 values of E2M1; XLA may flush weights below 2^-126 to zero."""
    exponent = block[..., :1].astype(jnp.uint32)
    bits = jnp.where(exponent < 2, jnp.uint32(0x00200000) << exponent, (exponent - 1) << 23)
    scale = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return scale * jnp.asarray(MXFP4_VALUES).at[_nibbles(block[..., 1:])].get(mode="promise_in_bounds")


INT4_HEADER = 3  # bytes of scale and zero before the codes of a block
INT4_SIZES = (128, 64, 32)  # weights per block
INT4_SCALES = {"": _FLOAT16, "_BF16": np.dtype(ml_dtypes.bfloat16)}  # by the end of the format's name


def _int4(block: jax.Array, scale_type: np.dtype) -> jax.Array:
    """Decodes a group of integers; every 16 bytes of codes are 32 weights, the low nibbles first."""
    packed = block[..., INT4_HEADER:]
    codes = _nibbles(packed.reshape(*packed.shape[:-1], -1, 16)).reshape(*packed.shape[:-1], -1)
    return _half(block, 0, scale_type) * (codes.astype(jnp.float32) - block[..., 2:INT4_HEADER].astype(jnp.float32))


def _int4_format(weights: int, scale_type: np.dtype) -> BlockFormat:
    return BlockFormat(
        number=(1000 if scale_type == _FLOAT16 else 2000) + weights,
        weights=weights,
        nbytes=INT4_HEADER + weights // 2,
        decode=functools.partial(_int4, scale_type=scale_type),
        halves=(0,),
        half_type=scale_type,
    )


def int4_type(group_size: int, scale_type: np.dtype) -> str:
    """Returns the format whose blocks are groups, or the largest parts of them.

    Args:
      group_size: weights per group, a multiple of 32.
      scale_type: float16 or bfloat16.
    """
    weights = next(size for size in INT4_SIZES if group_size % size == 0)
    return f"INT4_{weights}{next(end for end, dtype in INT4_SCALES.items() if dtype == scale_type)}"


BLOCK_FORMATS: dict[str, BlockFormat] = {
    "Q4_0": BlockFormat(number=2, weights=32, nbytes=18, decode=_q4_0, halves=(0,)),
    "Q4_1": BlockFormat(number=3, weights=32, nbytes=20, decode=_q4_1, halves=(0, 2)),
    "Q5_0": BlockFormat(number=6, weights=32, nbytes=22, decode=_q5_0, halves=(0,)),
    "Q5_1": BlockFormat(number=7, weights=32, nbytes=24, decode=_q5_1, halves=(0, 2)),
    "Q8_0": BlockFormat(number=8, weights=32, nbytes=34, decode=_q8_0, halves=(0,)),
    "Q2_K": BlockFormat(number=10, weights=SUPER_BLOCK, nbytes=84, decode=_q2_k, halves=(80, 82)),
    "Q3_K": BlockFormat(number=11, weights=SUPER_BLOCK, nbytes=110, decode=_q3_k, halves=(108,)),
    "Q4_K": BlockFormat(number=12, weights=SUPER_BLOCK, nbytes=144, decode=_q4_k, halves=(0, 2)),
    "Q5_K": BlockFormat(number=13, weights=SUPER_BLOCK, nbytes=176, decode=_q5_k, halves=(0, 2)),
    "Q6_K": BlockFormat(number=14, weights=SUPER_BLOCK, nbytes=210, decode=_q6_k, halves=(208,)),
    "MXFP4": BlockFormat(number=39, weights=32, nbytes=17, decode=_mxfp4, halves=()),
} | {
    f"INT4_{weights}{end}": _int4_format(weights, scale_type)
    for weights in INT4_SIZES
    for end, scale_type in INT4_SCALES.items()
}

WITHOUT_KERNELS = ("IQ4_NL",)  # types of GGUF files that are dequantized, but with whose codes no kernel computes


def row_bytes(ggml_type: str, columns: int) -> int:
    """Returns the bytes of one row of weights.

    Raises:
      ValueError: the row is not a whole number of blocks.
    """
    block = BLOCK_FORMATS[ggml_type]
    if columns % block.weights:
        raise ValueError(
            f"{ggml_type}: a row must be whole blocks (found {columns} columns, expected a multiple of "
            f"{block.weights}). Use a type with smaller blocks"
        )
    return columns // block.weights * block.nbytes
