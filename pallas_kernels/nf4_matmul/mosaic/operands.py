"""The operands of a Mosaic kernel, from a weight and its rows.

Dimension key: M rows, L layers, N out, K in, G = K / block_size, P = ceil(K / 128).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.formats.dequantize import expand_absmax
from pallas_kernels.formats.layouts import RUN
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.tables import CODE_TABLES
from pallas_kernels.mosaic.registers import MosaicValue
from pallas_kernels.nf4_matmul.dispatch import Layer

# The block constants of one layer in the form that the kernels read: one per row and run of 64 columns.
#
# XLA expands them before the kernel, for one layer. Nested dequantization then costs one look-up and multiply-add per
# 64 weights, which a kernel would repeat in each of its tiles. The codes, 32 times larger, are never sliced outside of
# a kernel.


def expanded_scales(weights: QTensor, layer: Layer, dtype: DTypeLike) -> Float[Array, "*E runs N"]:
    """Returns scales[r, n], the constant of the block of (n, 64 r), rounded once to `dtype`: [2P, N], 0 past K.

    `weights` has layout `split_k`: one weight (`layer` None), or a stack and the index of a layer. If a layer has
    several experts, so have the scales: [E, 2P, N].
    """
    assert weights.layout == "split_k"
    with jax.named_scope("expanded_scales"):
        # Without the codes: slicing them could copy a layer.
        constants = dataclasses.replace(weights, codes=None)
        absmax_GN = expand_absmax(constants if layer is None else constants.layer(layer))
        scales = jnp.repeat(absmax_GN, weights.block_size // RUN, axis=-2).astype(dtype)
        return jnp.pad(scales, (*[(0, 0)] * (scales.ndim - 2), (0, scales.shape[-2] % 2), (0, 0)))


class Operands(NamedTuple):
    """One layer of a weight, or several experts of it, in the form that a kernel reads.

    Attributes:
      codes_LNJ: the whole stack; the kernel addresses its layer, because a slice would be a copy.
      layer: i32 [1]. With experts, i32 [2, row tiles]: each row tile's index in the stack, and in the scales (-1: the
        tile is not in use, and its result is zeros).
      scales: [2 ceil(K/128), N] in the kernel's dtype, of this layer only. With experts, [E, 2 ceil(K/128), N].
      table: f32 [16].
      shape: (N, K).
    """

    codes_LNJ: jax.Array
    layer: jax.Array
    scales: jax.Array
    table: np.ndarray
    shape: tuple[int, int]


def place_of(layer_g: MosaicValue, row_tile: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Returns a row tile's index in the stack and in the scales (None: no experts), inside a kernel."""
    if len(layer_g.shape) == 1:
        return layer_g[0], None
    return layer_g[0, row_tile], layer_g[1, row_tile]


def operands(weights: QTensor, layer: Layer, dtype: DTypeLike) -> Operands:
    """Makes the operands of a weight (`layer` None), or of one layer of a stack, for a product in `dtype`."""
    codes_LNJ = jnp.asarray(weights.codes) if layer is not None else jnp.asarray(weights.codes)[None]
    index = jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1)
    rows, columns = weights.shape
    scales = expanded_scales(weights, layer, dtype)
    return Operands(codes_LNJ, index, scales, CODE_TABLES[weights.quant_type], (rows, columns))


def expert_operands(
    weights: QTensor, layer: Layer, expert_of_tile_I: Int[Array, " I"], tiles: Int[Array, ""], dtype: DTypeLike
) -> Operands:
    """Makes the operands of row tiles with an expert each, of which the first `tiles` are in use.

    `weights` has the leading axes [layers, experts]; `layer` is an index in the first.
    """
    experts = weights.stack_shape[1]
    codes_LNJ = weights.codes.reshape(-1, *weights.codes.shape[2:])
    in_stack = jnp.asarray(layer, jnp.int32) * experts + expert_of_tile_I
    in_use = jnp.arange(len(expert_of_tile_I)) < tiles
    place_2I = jnp.stack([in_stack, jnp.where(in_use, expert_of_tile_I, -1)])
    scales = expanded_scales(weights, layer, dtype)
    rows, columns = weights.shape
    return Operands(codes_LNJ, place_2I, scales, CODE_TABLES[weights.quant_type], (rows, columns))


def pad_rows(rows: jax.Array, multiple: int) -> jax.Array:
    """Appends rows of zeros up to a multiple; returns the same array if there is nothing to append."""
    missing = -rows.shape[0] % multiple
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows
