"""Dequantization: w[n, k] = table[code(n, k)] * absmax[block(n, k)], for every layout and for double quantization.

Dimension key: N out, K in, G = K / block_size blocks per row, E elements of `shape`; `...` stacked layers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.formats.layouts import LAYOUTS
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.tables import CODE_TABLES, dynamic_map, rounded


def _look_up(table: np.ndarray, codes: jax.Array) -> jax.Array:
    """Looks up table[codes] without a bounds check: uint8 codes stay within 256 entries, nibbles within 16."""
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")


def expand_absmax(qt: QTensor) -> jax.Array:
    """Returns the block constants in f32: `absmax`, or map8[absmax_codes] * nested_absmax[...] + nested_offset.

    Bit-identical to bitsandbytes, also inside jit. The shape is that of the constants in the weight's layout.
    """
    if not qt.double_quant:
        return jnp.asarray(qt.absmax)
    layout, stack = LAYOUTS[qt.layout], qt.stack_shape
    blocks_shape = layout.blocks_shape(qt.shape, qt.block_size)
    nested_blocks = qt.nested_absmax.shape[-1]
    spread = jnp.broadcast_to(qt.nested_absmax[..., None], (*stack, nested_blocks, qt.nested_block_size))
    in_order = spread.reshape(*stack, -1)[..., : math.prod(blocks_shape)].reshape(*stack, *blocks_shape)
    levels = _look_up(dynamic_map(), qt.absmax_codes)
    offset = jnp.asarray(qt.nested_offset).reshape(*stack, *[1] * len(blocks_shape))
    return rounded(levels * layout.turn(in_order)) + offset


def dequantize(qt: QTensor, dtype: DTypeLike | None = None) -> jax.Array:
    """Returns table[code] * absmax, multiplied in f32, then cast to `dtype` (default: the dtype before quantization).

    >>> weight = q.quantize_array(np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64))
    >>> q.dequantize_array(weight)[0, :3].round(3).tolist()
    [-1.0, -1.0, -1.0]

    The result has shape [..., *shape], with the leading axes of a stack. For one layer, pass `qt.layer(i)`.

    Raises:
      TypeError: `qt` is not a QTensor.
    """
    if not isinstance(qt, QTensor):
        raise TypeError(f"dequantize: found {type(qt).__name__}, expected a QTensor, as quantize returns it")
    with jax.named_scope("dequantize"):
        return _dequantize(qt, jnp.dtype(qt.dtype if dtype is None else dtype))


def _dequantize(qt: QTensor, dtype: np.dtype) -> jax.Array:
    layout = LAYOUTS[qt.layout]
    levels = _look_up(CODE_TABLES[qt.quant_type], layout.unpack(jnp.asarray(qt.codes), qt.shape))
    if qt.layout == "flat":
        return (levels * _spread_flat(expand_absmax(qt), qt)).astype(dtype)
    blocks = levels.reshape(*qt.stack_shape, qt.shape[0], -1, qt.block_size)
    return (blocks * layout.turn(expand_absmax(qt))[..., None]).astype(dtype).reshape(levels.shape)


def _spread_flat(absmax: jax.Array, qt: QTensor) -> jax.Array:
    """Repeats constants [..., ceil(E / block_size)] to [..., *shape], one per element."""
    spread = jnp.broadcast_to(absmax[..., None], (*absmax.shape, qt.block_size)).reshape(*qt.stack_shape, -1)
    return spread[..., : math.prod(qt.shape)].reshape(*qt.stack_shape, *qt.shape)


def expand_absmax_numpy(qt: QTensor) -> np.ndarray:
    """Computes `expand_absmax` in NumPy, by block index: the oracle of tests."""
    if not qt.double_quant:
        return np.asarray(qt.absmax)
    layout, stack = LAYOUTS[qt.layout], qt.stack_shape
    in_order = layout.turn(np.asarray(qt.absmax_codes))
    flat = in_order.reshape(*stack, -1)
    nested = np.asarray(qt.nested_absmax)[..., np.arange(flat.shape[-1]) // qt.nested_block_size]
    absmax = dynamic_map()[flat] * nested + np.asarray(qt.nested_offset)[..., None]
    return layout.turn(absmax.reshape(in_order.shape))


def dequantize_numpy(qt: QTensor, dtype: DTypeLike | None = None) -> np.ndarray:
    """Computes `dequantize` in NumPy, over the flattened weight: table[code(e)] * absmax[e // block_size]."""
    layout = LAYOUTS[qt.layout]
    codes = layout.unpack(np.asarray(qt.codes), qt.shape).reshape(*qt.stack_shape, -1)
    absmax = layout.turn(expand_absmax_numpy(qt)).reshape(*qt.stack_shape, -1)
    block = np.arange(codes.shape[-1]) // qt.block_size
    weights = CODE_TABLES[qt.quant_type][codes] * absmax[..., block]
    return weights.astype(jnp.dtype(qt.dtype if dtype is None else dtype)).reshape(*qt.stack_shape, *qt.shape)
