"""w[n, k] = table[code(n, k)] * absmax[block(n, k)], for every layout and for double-quantized constants.

Dimension key: N out, K in, G = K / block_size blocks a row, E elements of `shape`; `...` stacked layers.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.layouts import LAYOUTS
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.rounding import rounded
from pallas_kernels.formats.tables import CODE_TABLES, dynamic_map


def _look_up(table: np.ndarray, codes: jax.Array) -> jax.Array:
    """table[codes] without a bounds check: uint8 codes cannot leave a table of 256, nor nibbles one of 16."""
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")


def expand_absmax(qt: QTensor) -> jax.Array:
    """The block constants in f32: `absmax`, or map8[absmax_codes] * nested_absmax[block // nested] + nested_offset.

    Equal to bitsandbytes to the bit, inside jit too. The shape is that of the constants as the layout holds them.
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


def dequantize(qt: QTensor, dtype: Any = None) -> jax.Array:
    """table[code] * absmax, multiplied in f32, then cast to dtype (default: the dtype before quantization).

    Returns [..., *shape]; a stack gives all its layers, one layer is `jax.tree.map(lambda leaf: leaf[i], qt)`.
    """
    with jax.named_scope("dequantize"):
        return _dequantize(qt, jnp.dtype(qt.dtype if dtype is None else dtype))


def _dequantize(qt: QTensor, dtype: Any) -> jax.Array:
    layout = LAYOUTS[qt.layout]
    levels = _look_up(CODE_TABLES[qt.quant_type], layout.unpack(jnp.asarray(qt.codes), qt.shape))
    if qt.layout == "flat":
        return (levels * _spread_flat(expand_absmax(qt), qt)).astype(dtype)
    blocks = levels.reshape(*qt.stack_shape, qt.shape[0], -1, qt.block_size)
    return (blocks * layout.turn(expand_absmax(qt))[..., None]).astype(dtype).reshape(levels.shape)


def _spread_flat(absmax: jax.Array, qt: QTensor) -> jax.Array:
    """[..., ceil(E / block_size)] -> [..., *shape]: each element's own constant."""
    spread = jnp.broadcast_to(absmax[..., None], (*absmax.shape, qt.block_size)).reshape(*qt.stack_shape, -1)
    return spread[..., : math.prod(qt.shape)].reshape(*qt.stack_shape, *qt.shape)


def expand_absmax_numpy(qt: QTensor) -> np.ndarray:
    """The oracle of expand_absmax: the same equation, block by block index, in NumPy."""
    if not qt.double_quant:
        return np.asarray(qt.absmax)
    layout, stack = LAYOUTS[qt.layout], qt.stack_shape
    in_order = layout.turn(np.asarray(qt.absmax_codes))
    flat = in_order.reshape(*stack, -1)
    nested = np.asarray(qt.nested_absmax)[..., np.arange(flat.shape[-1]) // qt.nested_block_size]
    absmax = dynamic_map()[flat] * nested + np.asarray(qt.nested_offset)[..., None]
    return layout.turn(absmax.reshape(in_order.shape))


def dequantize_numpy(qt: QTensor, dtype: Any = None) -> np.ndarray:
    """The oracle of dequantize: table[code(e)] * absmax[e // block_size] over the flattened weight, in NumPy."""
    layout = LAYOUTS[qt.layout]
    codes = layout.unpack(np.asarray(qt.codes), qt.shape).reshape(*qt.stack_shape, -1)
    absmax = layout.turn(expand_absmax_numpy(qt)).reshape(*qt.stack_shape, -1)
    block = np.arange(codes.shape[-1]) // qt.block_size
    weights = CODE_TABLES[qt.quant_type][codes] * absmax[..., block]
    return weights.astype(jnp.dtype(qt.dtype if dtype is None else dtype)).reshape(*qt.stack_shape, *qt.shape)
