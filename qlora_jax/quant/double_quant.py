"""Double quantization (QLoRA paper, section 3): a weight's block constants, themselves quantized to 8 bits.

absmax -> (absmax_codes, nested_absmax, nested_offset), read back as map8[absmax_codes] * nested_absmax + nested_offset.
The arithmetic is that of bitsandbytes' CPU build. Every function takes NumPy or JAX arrays, returns the same kind, and
gives the same bits for both.
"""

import math

import jax
import numpy as np

from pallas_kernels.formats.layouts import LAYOUTS, natural_layout
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.rounding import rounded
from qlora_jax.quant.dynamic_8bit import quantize_blocks
from qlora_jax.quant.settings import QuantSettings

type Array = np.ndarray | jax.Array


def _tree_sum(values: Array) -> Array:
    """Returns the sum, [1], added in the same order by every library and device: eight parts at a time, by pairs."""
    xp = values.__array_namespace__()
    while (n := values.shape[0]) > 1:
        columns = -(-n // 8)
        padded = xp.concat([values, xp.zeros(8 * columns - n, values.dtype)]).reshape(8, columns)
        parts = list(padded)
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        values = parts[0]
    return values


def mean(absmax: Array) -> Array:
    """Returns mean(absmax) in f32, with the same bits in NumPy and under jit.

    The second step adds the mean of the first estimate's residuals. torch's mean depends on its number of threads and
    lies within 2 ulp of this one. XLA would turn a quotient by a constant into a product, hence 1 / n.
    """
    inverse = np.float32(1.0 / absmax.shape[0])
    estimate = rounded(_tree_sum(absmax) * inverse)
    return (estimate + rounded(_tree_sum(absmax - estimate) * inverse)).reshape(())


def quantize_constants(absmax: Array, offset: Array | np.floating, nested_block_size: int) -> tuple[Array, Array]:
    """Returns (absmax_codes, nested_absmax) of absmax - offset, in blocks of `nested_block_size`, the last one partial.

    A block of zeros has code 0, where map8[0] * nested_absmax is zero. See qlora_jax.quant.dynamic_8bit.
    """
    xp = absmax.__array_namespace__()
    blocks = -(-absmax.shape[0] // nested_block_size)
    padding = xp.zeros(blocks * nested_block_size - absmax.shape[0], absmax.dtype)
    codes, nested_absmax = quantize_blocks(xp.concat([absmax - offset, padding]).reshape(blocks, nested_block_size))
    return codes.reshape(-1)[: absmax.shape[0]], nested_absmax


def assemble(codes: Array, absmax: Array, settings: QuantSettings, shape: tuple[int, ...], dtype: str) -> QTensor:
    """Builds the QTensor of one weight from its codes [blocks, block_size/2], two per byte, and its constants [blocks].

    The layout is `bnb` for a matrix whose rows are whole blocks, else `flat`. A partial last block is padded with the
    code of zero, as in bitsandbytes.
    """
    layout = natural_layout(shape, settings.block_size)
    stored = -(-math.prod(shape) // 2)
    constants_shape = LAYOUTS[layout].constants_shape(shape, settings.block_size)
    return QTensor(
        codes=codes.reshape(-1)[:stored].reshape(LAYOUTS[layout].codes_shape(shape)),
        **constants(absmax, constants_shape, settings),
        quant_type=settings.quant_type,
        block_size=settings.block_size,
        nested_block_size=settings.nested_block_size,
        shape=tuple(shape),
        dtype=dtype,
        layout=layout,
    )


def constants(absmax: Array, shape: tuple[int, ...], settings: QuantSettings) -> dict[str, Array]:
    """Returns the leaves of a QTensor other than its codes, from its constants [blocks].

    Args:
      shape: in which they are stored.
    """
    if not settings.double_quant:
        return {"absmax": absmax.reshape(shape)}
    offset = mean(absmax)
    absmax_codes, nested_absmax = quantize_constants(absmax, offset, settings.nested_block_size)
    return {"absmax_codes": absmax_codes.reshape(shape), "nested_absmax": nested_absmax, "nested_offset": offset}


def check_offset(offset: Array, absmax: np.ndarray) -> None:
    """Raises ValueError if the sum of the constants overflowed float32."""
    if not np.isfinite(offset):
        raise ValueError(
            "cannot double-quantize the weight: the sum of its block constants overflows float32 (the largest is "
            f"{absmax.max():.3g}). Scale the weight, or set double_quant=False."
        )
