"""The block formats of ggml, in which GGUF files store weights, and of other files' codes: bytes to f32 weights.

Each format of ggml follows its `dequantize_row_*`. A half-precision scale times an integer scale times a code has at
most 23 significant bits, so every product is exact in f32. Only the addition of a minimum rounds, once, so a fused
multiply-add computes the same bits.

The INT4 and INT8 formats are not ggml's. A block is a group of GPTQ, AWQ or compressed-tensors, w = scale (code -
zero), with a 16-bit scale, the zero in a byte, and the codes. So groups of 128 take 4.19 bits per weight, where blocks
of 32 that repeat scale and zero would take 4.75.

NVFP4 has an f32 scale per tensor, and an e4m3 scale for 16 codes of E2M1. A block of up to 256 weights repeats the
scale of its tensor, so that layers and parts of fused projections may have different ones: 4.63 bits per weight.
Writers disagree whether it multiplies the scale of 16 codes or divides it (`_INV`), which rounds otherwise. A block of
FP8 is an f32 scale and as many codes of e4m3 as share it.
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
_FLOAT16, _FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
_E4M3, _E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourBitCode:
    """A code of 4 bits whose weights are table[code] * scale; its fields are parameters of the GPU kernels.

    Attributes:
      table: f32 [16].
      group: number of consecutive weights that share a scale.
      scales: uint8 [..., bytes before a block's codes] -> f32 [..., groups per block].
    """

    table: np.ndarray
    group: int
    scales: Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """A block format.

    Attributes:
      number: its number in ggml's enumeration; those of other formats are beyond it.
      weights: weights per block.
      nbytes: bytes per block.
      decode: uint8 [..., nbytes] -> f32 [..., weights].
      halves: offsets of the 16-bit numbers in a block.
      half_type: the type of these numbers.
      floats: (offset, type, count) of runs of other floating-point numbers in a block.
      code: the code, if a block is some bytes of scales, then codes of 4 bits in parts of 32.
    """

    number: int
    weights: int
    nbytes: int
    decode: Callable[[jax.Array], jax.Array]
    halves: tuple[int, ...]
    half_type: np.dtype = _FLOAT16
    floats: tuple[tuple[int, np.dtype, int], ...] = ()
    code: FourBitCode | None = None

    @property
    def header(self) -> int:
        """The bytes before a block's codes, if it has codes of 4 bits."""
        return self.nbytes - self.weights // 2


def _half(block: jax.Array, offset: int, dtype: DTypeLike = jnp.float16) -> jax.Array:
    """Returns the 16-bit number at a byte offset, as f32 [..., 1]."""
    pair = block[..., offset : offset + 2]
    return jax.lax.bitcast_convert_type(pair, dtype).astype(jnp.float32)[..., None]


def _float(block: jax.Array) -> jax.Array:
    """Returns the f32 number in the first four bytes, [..., 1]."""
    return jax.lax.bitcast_convert_type(block[..., :4], jnp.float32)[..., None]


def _e4m3(codes: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)


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


# The values of ggml's non-linear codes.
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _looked_up(codes: jax.Array, values: np.ndarray) -> jax.Array:
    return jnp.asarray(values).at[codes].get(mode="promise_in_bounds")


def _iq4_nl(block: jax.Array) -> jax.Array:
    return _half(block, 0) * _looked_up(_nibbles(block[..., 2:]), IQ4_VALUES)


def _iq4_xs(block: jax.Array) -> jax.Array:
    """Decodes eight groups of 32 codes, each with a scale of 6 bits, whose two high bits are in bytes 2 and 3."""
    lead = block.shape[:-1]
    low = jnp.stack([block[..., 4:8] & 15, block[..., 4:8] >> 4], axis=-1).reshape(*lead, 8)
    high = _bits(block[..., 2:4], 2).swapaxes(-1, -2).reshape(*lead, 8)
    scales = _half(block, 0) * ((low | (high << 4)).astype(jnp.float32) - 32)
    values = _looked_up(_nibbles(block[..., 8:].reshape(*lead, 8, 16)), IQ4_VALUES)
    return (scales[..., None] * values).reshape(*lead, SUPER_BLOCK)


# E2M1 times 2, so that all values are integers; the scale is halved in return.
MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _mxfp4_scale(block: jax.Array) -> jax.Array:
    exponent = block[..., :1].astype(jnp.uint32)
    bits = jnp.where(exponent < 2, jnp.uint32(0x00200000) << exponent, (exponent - 1) << 23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _mxfp4(block: jax.Array) -> jax.Array:
    """Decodes a power of two and 32 values of E2M1; XLA may flush weights below 2^-126 to zero."""
    return _mxfp4_scale(block) * _looked_up(_nibbles(block[..., 1:]), MXFP4_VALUES)


PART = 32  # weights: every block is a multiple of them, and 4-bit codes are 16 bytes for each, low nibbles first
NVFP4_GROUP = 16  # weights that share a scale of e4m3
NVFP4_SIZES = (256, 64, PART)  # weights per block
MXFP4_HEADER = 1  # byte of the power of two at the start of a block of MXFP4
FLOAT_HEADER = 4  # bytes of the f32 scale at the start of a block of NVFP4 or FP8


def _parts_of_nibbles(packed: jax.Array) -> jax.Array:
    return _nibbles(packed.reshape(*packed.shape[:-1], -1, PART // 2)).reshape(*packed.shape[:-1], -1)


def _nvfp4_scales(block: jax.Array, weights: int, inverse: bool) -> jax.Array:
    codes_at = FLOAT_HEADER + weights // NVFP4_GROUP
    of_tensor, of_groups = _float(block), _e4m3(block[..., FLOAT_HEADER:codes_at])
    if inverse:  # XLA would turn a quotient by one number into a product with its reciprocal, which rounds otherwise
        return of_groups / jax.lax.optimization_barrier(jnp.broadcast_to(of_tensor, of_groups.shape))
    return of_groups * of_tensor


def _nvfp4(block: jax.Array, weights: int, inverse: bool) -> jax.Array:
    codes_at, scales = FLOAT_HEADER + weights // NVFP4_GROUP, _nvfp4_scales(block, weights, inverse)
    values = _looked_up(_parts_of_nibbles(block[..., codes_at:]), MXFP4_VALUES / 2)
    return (scales[..., None] * values.reshape(*scales.shape, NVFP4_GROUP)).reshape(*block.shape[:-1], weights)


def _nvfp4_format(weights: int, inverse: bool) -> BlockFormat:
    groups = weights // NVFP4_GROUP
    return BlockFormat(
        number=(6000 if inverse else 5000) + weights,
        weights=weights,
        nbytes=FLOAT_HEADER + groups + weights // 2,
        decode=functools.partial(_nvfp4, weights=weights, inverse=inverse),
        halves=(),
        floats=((0, _FLOAT32, 1), (FLOAT_HEADER, _E4M3, groups)),
        code=FourBitCode(
            table=MXFP4_VALUES / 2,
            group=NVFP4_GROUP,
            scales=functools.partial(_nvfp4_scales, weights=weights, inverse=inverse),
        ),
    )


def nvfp4_type(columns: int, inverse: bool) -> str:
    """Returns the format of NVFP4 with the largest blocks of which rows of some columns, whole parts, are multiples."""
    return f"NVFP4_{_largest(NVFP4_SIZES, columns)}{'_INV' if inverse else ''}"


def packed_parts[Codes: (np.ndarray, jax.Array)](codes: Codes) -> Codes:
    """Packs uint8 codes of 4 bits [..., K] as blocks have them, PART in 16 bytes, the first 16 in the low bits."""
    halves = codes.reshape(*codes.shape[:-1], -1, 2, PART // 2)
    return (halves[..., 0, :] | halves[..., 1, :] << 4).reshape(*codes.shape[:-1], -1)


def unpacked_parts(packed_NB: np.ndarray) -> np.ndarray:
    """Returns the uint8 codes [N, K] that `packed_parts` packed."""
    parts = packed_NB.reshape(len(packed_NB), -1, 1, PART // 2)
    return np.concatenate([parts & 15, parts >> 4], axis=-2).reshape(len(packed_NB), -1)


def nvfp4_blocks(codes: np.ndarray, scales: np.ndarray, of_tensor: np.float32, ggml_type: str) -> np.ndarray:
    """Returns codes of E2M1 [N, K], their scales in e4m3 [N, K / 16], and the scale of the tensor as blocks."""
    rows, blocks = len(codes), codes.shape[1] // BLOCK_FORMATS[ggml_type].weights
    header = np.broadcast_to(np.frombuffer(of_tensor.tobytes(), np.uint8), (rows, blocks, FLOAT_HEADER))
    of_groups = np.ascontiguousarray(scales).view(np.uint8).reshape(rows, blocks, -1)
    return np.concatenate([header, of_groups, packed_parts(codes).reshape(rows, blocks, -1)], -1).reshape(rows, -1)


def nvfp4_parts(blocks: np.ndarray, ggml_type: str) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Returns (codes, scales, scale of the tensor), of which `nvfp4_blocks` makes these blocks."""
    rows, block = len(blocks), BLOCK_FORMATS[ggml_type]
    by_block = blocks.reshape(rows, -1, block.nbytes)
    codes_at = FLOAT_HEADER + block.weights // NVFP4_GROUP
    codes = unpacked_parts(by_block[..., codes_at:].reshape(rows, -1))
    scales = np.ascontiguousarray(by_block[..., FLOAT_HEADER:codes_at]).reshape(rows, -1).view(ml_dtypes.float8_e4m3fn)
    return codes, scales, by_block[0, 0, :FLOAT_HEADER].view(np.float32)[0]


def _fp8(block: jax.Array) -> jax.Array:
    return _float(block) * _e4m3(block[..., FLOAT_HEADER:])


def _fp8_format(weights: int) -> BlockFormat:
    floats = ((0, _FLOAT32, 1), (FLOAT_HEADER, _E4M3, weights))
    nbytes = FLOAT_HEADER + weights
    return BlockFormat(number=7000 + weights, weights=weights, nbytes=nbytes, decode=_fp8, halves=(), floats=floats)


def fp8_type(columns: int) -> str:
    """Returns the format of FP8 with the largest blocks that divide some columns, whole parts, with one scale."""
    return f"FP8_{_largest(INT_SIZES, columns)}"


def _largest(sizes: tuple[int, ...], columns: int) -> int:
    return next(size for size in sizes if columns % size == 0)


INT_HEADER = 3  # bytes of scale and zero before the codes of a block
INT_SIZES = (128, 64, PART)  # weights per block
INT_SCALES = {"": _FLOAT16, "_BF16": np.dtype(ml_dtypes.bfloat16)}  # by the end of the format's name


def _int4(block: jax.Array, scale_type: np.dtype) -> jax.Array:
    """Decodes a group of integers of 4 bits."""
    return _of_integers(block, _parts_of_nibbles(block[..., INT_HEADER:]), scale_type)


def _int8(block: jax.Array, scale_type: np.dtype) -> jax.Array:
    return _of_integers(block, block[..., INT_HEADER:], scale_type)


def _of_integers(block: jax.Array, codes: jax.Array, scale_type: np.dtype) -> jax.Array:
    zero = block[..., INT_HEADER - 1 : INT_HEADER].astype(jnp.float32)
    return _half(block, 0, scale_type) * (codes.astype(jnp.float32) - zero)


def _int_format(bits: int, weights: int, scale_type: np.dtype) -> BlockFormat:
    number = (1000 if scale_type == _FLOAT16 else 2000) + (2000 if bits == 8 else 0)
    return BlockFormat(
        number=number + weights,
        weights=weights,
        nbytes=INT_HEADER + weights * bits // 8,
        decode=functools.partial(_int4 if bits == 4 else _int8, scale_type=scale_type),
        halves=(0,),
        half_type=scale_type,
    )


def int_type(bits: int, group_size: int, scale_type: np.dtype) -> str:
    """Returns the format whose blocks are groups, or the largest parts of them.

    Args:
      bits: 4 or 8.
      group_size: weights per group, a multiple of PART.
      scale_type: float16 or bfloat16.
    """
    end = next(end for end, dtype in INT_SCALES.items() if dtype == scale_type)
    return f"INT{bits}_{_largest(INT_SIZES, group_size)}{end}"


def _by_half(table: np.ndarray) -> FourBitCode:
    return FourBitCode(table=table, group=PART, scales=functools.partial(_half, offset=0))


Q4_0_CODE, IQ4_NL_CODE = _by_half(np.arange(-8, 8, dtype=np.float32)), _by_half(IQ4_VALUES)
MXFP4_CODE = FourBitCode(table=MXFP4_VALUES, group=PART, scales=_mxfp4_scale)
BLOCK_FORMATS: dict[str, BlockFormat] = {
    "Q4_0": BlockFormat(number=2, weights=32, nbytes=18, decode=_q4_0, halves=(0,), code=Q4_0_CODE),
    "Q4_1": BlockFormat(number=3, weights=32, nbytes=20, decode=_q4_1, halves=(0, 2)),
    "Q5_0": BlockFormat(number=6, weights=32, nbytes=22, decode=_q5_0, halves=(0,)),
    "Q5_1": BlockFormat(number=7, weights=32, nbytes=24, decode=_q5_1, halves=(0, 2)),
    "Q8_0": BlockFormat(number=8, weights=32, nbytes=34, decode=_q8_0, halves=(0,)),
    "Q2_K": BlockFormat(number=10, weights=SUPER_BLOCK, nbytes=84, decode=_q2_k, halves=(80, 82)),
    "Q3_K": BlockFormat(number=11, weights=SUPER_BLOCK, nbytes=110, decode=_q3_k, halves=(108,)),
    "Q4_K": BlockFormat(number=12, weights=SUPER_BLOCK, nbytes=144, decode=_q4_k, halves=(0, 2)),
    "Q5_K": BlockFormat(number=13, weights=SUPER_BLOCK, nbytes=176, decode=_q5_k, halves=(0, 2)),
    "Q6_K": BlockFormat(number=14, weights=SUPER_BLOCK, nbytes=210, decode=_q6_k, halves=(208,)),
    "IQ4_NL": BlockFormat(number=20, weights=32, nbytes=18, decode=_iq4_nl, halves=(0,), code=IQ4_NL_CODE),
    "IQ4_XS": BlockFormat(number=23, weights=SUPER_BLOCK, nbytes=136, decode=_iq4_xs, halves=(0,)),
    "MXFP4": BlockFormat(
        number=39, weights=32, nbytes=17, decode=_mxfp4, halves=(), floats=((0, _E8M0, 1),), code=MXFP4_CODE
    ),
}
BLOCK_FORMATS |= {
    f"INT{bits}_{weights}{end}": _int_format(bits, weights, scale_type)
    for bits in (4, 8)
    for weights in INT_SIZES
    for end, scale_type in INT_SCALES.items()
}
BLOCK_FORMATS |= {nvfp4_type(size, inv): _nvfp4_format(size, inv) for inv in (False, True) for size in NVFP4_SIZES}
BLOCK_FORMATS |= {fp8_type(size): _fp8_format(size) for size in INT_SIZES}


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
