"""The jitted quantizer, and the host function that chooses between it and the NumPy quantizer."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

from pallas_kernels.formats.layouts import pack_nibbles
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.tables import CODE_BY_RANK, MIDPOINTS
from qlora_jax.quant.double_quant import assemble, check_offset, constants
from qlora_jax.quant.reference import quantize_numpy
from qlora_jax.quant.settings import QuantSettings, check_finite, check_weight

# XLA flushes subnormal numbers to zero on CPUs. For an absmax within these bounds none occur: the reciprocal and all
# differences of constants are normal numbers.
EXACT_ABSMAX = (np.float32(1e-30), np.float32(2.0**126))
SAFELY_NORMAL = np.float32(2.0**-120)
MAGNITUDE_BITS = np.int32(0x7FFFFFFF)


def quantize(
    weight: np.ndarray | jax.Array,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    nested_block_size: int = 256,
) -> QTensor:
    """Quantizes a weight bit for bit as bitsandbytes does on CPUs.

    >>> weight = q.quantize_array(np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64), double_quant=False)
    >>> weight.nbytes  # 128 codes of 4 bits, 2 constants in f32
    72

    code(e) = nearest table index of w[e] * (1 / absmax[block]). Jitted. If a block is so small or large that XLA would
    flush subnormal numbers, the weight goes through `quantize_numpy` instead.

    Args:
      weight: a concrete array of any shape, float32, float16 or bfloat16. Matrices [N, K] with K % block_size == 0 give
        layout `bnb`, all other shapes `flat`.
      quant_type: `nf4` or `fp4` as in bitsandbytes, or `int4`, `e2m1`, `e3m0`.
      block_size: elements that share a constant, 32 to 4096.
      double_quant: True quantizes the constants to 8 bits. Beyond 32,767 blocks, torch's mean of them depends on its
        number of threads; `nested_offset` is that of one.
      nested_block_size: block constants that share a nested constant.

    Raises:
      ValueError: the setting, dtype or shape cannot be quantized, an element is not finite, or the weight is traced.
    """
    settings = QuantSettings(
        quant_type=quant_type, block_size=block_size, double_quant=double_quant, nested_block_size=nested_block_size
    )
    check_weight(weight.shape, weight.dtype)
    if isinstance(weight, jax.core.Tracer):
        raise ValueError(
            "cannot quantize the weight: it is traced, as in jax.jit, jax.vmap or jax.grad, so its elements cannot be "
            "checked (found a tracer, expected an array). Quantize it before, and pass the QTensor to the function."
        )
    qt, finite, exact = _quantize_and_inspect(weight, settings)
    if not finite:
        check_finite(np.asarray(weight))
    if exact:
        return qt
    in_numpy = quantize_numpy(
        np.asarray(weight),
        quant_type=quant_type,
        block_size=block_size,
        double_quant=double_quant,
        nested_block_size=nested_block_size,
    )
    return jax.tree.map(jnp.asarray, in_numpy)


def double_quantize(absmax: np.ndarray, settings: QuantSettings) -> dict[str, np.ndarray]:
    """Returns the leaves other than the codes of a weight that is quantized to `settings`, in the shape of `absmax`.

    With `quantize(rows, double_quant=False)` of all its rows this is `quantize(weight)` to the bit, wherever the rows
    are divided: blocks lie within rows, while nested blocks and the offset are those of the whole weight.

    Args:
      absmax: the block constants of the whole weight, in block order.

    Raises:
      ValueError: the sum of the constants overflows float32.
    """
    if not settings.double_quant:
        return {"absmax": absmax}
    flat = np.ascontiguousarray(absmax).reshape(-1)
    leaves, exact = _double_quantize_and_inspect(flat, settings)
    if not exact:
        with np.errstate(over="ignore", invalid="ignore"):
            leaves = constants(flat, flat.shape, settings)
        check_offset(leaves["nested_offset"], flat)
    found = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    return found | {"absmax_codes": found["absmax_codes"].reshape(absmax.shape)}


@functools.partial(jax.jit, static_argnames="settings")
def _double_quantize_and_inspect(
    absmax: Float32[Array, " blocks"], settings: QuantSettings
) -> tuple[Mapping[str, np.ndarray | jax.Array], Bool[Array, ""]]:
    """(the leaves, True if they equal those computed in NumPy)."""
    leaves = constants(absmax, absmax.shape, settings)
    return leaves, _within_exact(absmax) & jnp.isfinite(leaves["nested_offset"])


def quantize_traceable(weight: Float[Array, "..."], settings: QuantSettings) -> QTensor:
    """Quantizes under jit or eval_shape, without checks and without the choice of `quantize_numpy`.

    Bit-identical to bitsandbytes for blocks whose absmax is zero or within EXACT_ABSMAX. A partial block of zeros has
    absmax 0.
    """
    blocks = _blocks(weight, settings.block_size)
    return _quantize_blocks(blocks, _block_absmax(blocks), weight, settings)


@functools.partial(jax.jit, static_argnames="settings")
def _quantize_and_inspect(
    weight: Float[Array, "..."], settings: QuantSettings
) -> tuple[QTensor, Bool[Array, ""], Bool[Array, ""]]:
    """(the quantized weight, True if all elements are finite, True if it equals quantize_numpy's result)."""
    blocks = _blocks(weight, settings.block_size)
    absmax = _block_absmax(blocks)
    exact = _no_subnormals(blocks, absmax, settings.quant_type)
    if blocks.size != weight.size:  # bitsandbytes gives a partial block of zeros the subnormal constant 1e-38
        exact &= absmax[-1] > 0
    qt = _quantize_blocks(blocks, absmax, weight, settings)
    if settings.double_quant:  # quantize_numpy raises the error if the sum of the constants overflows float32
        exact &= jnp.isfinite(qt.nested_offset)
    return qt, jnp.all(jnp.isfinite(absmax)), exact


def _quantize_blocks(blocks: Array, absmax: Array, weight: Array, settings: QuantSettings) -> QTensor:
    normalized = blocks * _inverse(absmax)[:, None]
    if blocks.size != weight.size:  # bitsandbytes divides in a partial block
        # XLA turns a quotient by one number into products with its reciprocal, but not one by an array.
        divisor = lax.optimization_barrier(jnp.full(blocks.shape[1:], jnp.where(absmax[-1] > 0, absmax[-1], 1.0)))
        normalized = normalized.at[-1].set(blocks[-1] / divisor)
    # XLA on CPUs vectorizes this if neighbours are separated before they are quantized and the loop runs over whole
    # blocks. The barrier keeps the final shape, whose rows may cut blocks, out of the loop.
    first, second = (_nearest_codes(normalized[:, start::2], settings.quant_type) for start in (0, 1))
    codes = lax.optimization_barrier(pack_nibbles(first, second))
    return assemble(codes, absmax, settings, weight.shape, weight.dtype.name)


def _blocks(weight: Float[Array, "..."], block_size: int) -> Float32[Array, "blocks block_size"]:
    """Flattens the weight in f32 and pads it with zeros to whole blocks."""
    flat = weight.astype(jnp.float32).reshape(-1)
    return jnp.pad(flat, (0, -flat.size % block_size)).reshape(-1, block_size)


def _magnitude_bits(values: Float32[Array, "..."]) -> Array:
    """Returns the bits of |values| as int32, in the order of the magnitudes, NaN largest; flushes no subnormal."""
    return lax.bitcast_convert_type(values, jnp.int32) & MAGNITUDE_BITS


def _reduce_blocks(
    bits: Int32[Array, "blocks block_size"], pair: Callable, reduce: Callable
) -> Float32[Array, " blocks"]:
    """Returns the largest (or smallest) of each block, as float32.

    XLA on CPUs compiles a reduction of integers along the last axis to a slow pass and a copy of the weight, but it
    vectorizes a tree of pairs of at most 64 leaves. The barrier keeps it from repeating the tree for each code.

    Args:
      pair: jnp.maximum or jnp.minimum.
      reduce: jnp.max or jnp.min.
    """
    leaves = bits.reshape(-1, min(bits.shape[-1], 64))
    while leaves.shape[-1] > 1:
        leaves = pair(leaves[:, 0::2], leaves[:, 1::2])
    parts = lax.optimization_barrier(leaves).reshape(bits.shape[0], -1)
    return lax.bitcast_convert_type(reduce(parts, axis=-1), jnp.float32)


def _block_absmax(blocks: Float32[Array, "blocks block_size"]) -> Float32[Array, " blocks"]:
    return _reduce_blocks(_magnitude_bits(blocks), jnp.maximum, jnp.max)


def _inverse(absmax: Float32[Array, " blocks"]) -> Float32[Array, " blocks"]:
    """Returns 1 / absmax, and 0 for blocks of zeros."""
    return jnp.where(absmax > 0, 1 / jnp.where(absmax > 0, absmax, 1.0), 0.0)


def _nearest_codes(normalized: Float32[Array, "*shape"], quant_type: str) -> UInt8[Array, "*shape"]:
    """Computes code_by_rank[sum_j (x > midpoint_j)], adding the change of code at each midpoint."""
    code_by_rank = CODE_BY_RANK[quant_type]
    gains = np.diff(code_by_rank)  # modulo 256
    codes = jnp.full(normalized.shape, code_by_rank[0])
    for midpoint, gain in zip(MIDPOINTS[quant_type], gains, strict=True):
        codes += jnp.where(normalized > midpoint, gain, np.uint8(0))
    return codes


def _no_subnormals(blocks: Array, absmax: Array, quant_type: str) -> Bool[Array, ""]:
    """True if flushing subnormal numbers to zero cannot change a code."""
    exact = _within_exact(absmax)
    if 0 in MIDPOINTS[quant_type]:
        exact &= _no_product_underflows(blocks, absmax)
    return exact


def _within_exact(absmax: Float32[Array, " blocks"]) -> Bool[Array, ""]:
    """True if all constants are zero or within EXACT_ABSMAX."""
    bits = _magnitude_bits(absmax)
    lowest, highest = (bound.view(np.int32) for bound in EXACT_ABSMAX)
    return jnp.all((bits == 0) | ((bits >= lowest) & (bits <= highest)))


def _no_product_underflows(blocks: Array, absmax: Array) -> Bool[Array, ""]:
    """True if w / absmax is zero or normal for all w: at a midpoint of zero, the sign of the smallest number counts."""
    bits = _magnitude_bits(blocks)
    smallest = _reduce_blocks(jnp.where(bits == 0, MAGNITUDE_BITS, bits), jnp.minimum, jnp.min)
    normal = (smallest >= SAFELY_NORMAL) & (smallest * _inverse(absmax) >= SAFELY_NORMAL)
    return jnp.all(normal | (absmax == 0))
