"""Double quantization (QLoRA paper, section 3): a weight's block constants, themselves quantized to 8 bits.

absmax -> (absmax_codes, nested_absmax, nested_offset), read back as map8[absmax_codes] * nested_absmax + nested_offset.
The arithmetic is that of bitsandbytes' CPU build. Every function takes NumPy or JAX arrays, returns the same kind, and
gives the same bits for both.
"""

import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.formats.layouts import LAYOUTS, natural_layout
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.quant.dynamic_8bit import quantize_blocks
from qlora_jax.quant.settings import QuantSettings

type Array = np.ndarray | jax.Array


def mean(absmax: Array) -> Array:
    """Returns mean(absmax) in f32 as torch's CPU build does on one thread; NumPy and jit give the same bits.

    On several threads, torch adds more than 32,767 constants in an order that depends on their number.
    """
    xp = absmax.__array_namespace__()
    # XLA turns a quotient by a constant into a product with its reciprocal, but not one by an array.
    count = xp.full(1, absmax.shape[0], absmax.dtype)
    return (_sum(absmax) / (lax.optimization_barrier(count) if xp is jnp else count)).reshape(())


def _sum(values_n: Array) -> Array:
    """Returns the sum, [1], in the order of torch's vectorized_inner_sum (aten/src/ATen/native/cpu/SumKernel.cpp).

    Vectors of 8 lanes, with AVX-512 too, or of one lane for fewer values, are added in four columns; then come the
    vectors that are left over, the columns, the values that are left over, and the lanes.
    """
    xp, lanes = values_n.__array_namespace__(), 8 if values_n.shape[0] >= 8 else 1
    whole = values_n.shape[0] // lanes * lanes
    vectors = values_n[:whole].reshape(-1, lanes)
    rows = vectors.shape[0] // 4
    first, *others = _cascade(vectors[: 4 * rows].reshape(rows, 4 * lanes)).reshape(4, lanes)
    sums = _added([_added([first, *vectors[4 * rows :]]), *others])
    return _added([xp.zeros(1, values_n.dtype), *values_n[whole:].reshape(-1, 1), *sums.reshape(-1, 1)])


def _cascade(rows: Array) -> Array:
    """Returns the sum of rows [rows, columns] over groups, groups of groups and their groups (torch's multi_row_sum).

    Zeros fill the last group of each level.
    """
    xp = rows.__array_namespace__()
    group = 2 ** max(4, max(0, rows.shape[0] - 1).bit_length() // 4)
    for _ in range(3):
        groups = max(1, -(-rows.shape[0] // group))
        padding = xp.zeros((groups * group - rows.shape[0], rows.shape[1]), rows.dtype)
        grouped = xp.concat([rows, padding]).reshape(groups, group, -1)
        rows = _added([grouped[:, row] for row in range(group)])
    return _added(list(rows))


def _added(parts: Sequence[Array]) -> Array:
    """Returns the sum of the parts, added in order."""
    return functools.reduce(operator.add, parts)


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
