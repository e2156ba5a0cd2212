"""The operands of a Mosaic kernel, from a weight and its rows.

The table of a code and the number of columns that share a scale are parameters, for NF4 and for the codes of files.

Dimension key: M rows, L layers, N out, K in, G = K / columns per scale, P = ceil(K / 128).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Layer
from pallas_kernels.formats.dequantize import expand_absmax
from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS, FourBitCode
from pallas_kernels.formats.ggml_tensor import GgmlTensor, header_range
from pallas_kernels.formats.layouts import RUN
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.tables import CODE_TABLES
from pallas_kernels.mosaic.registers import MosaicValue

PAIR = 2 * RUN  # columns whose codes share bytes
type Weights = QTensor | GgmlTensor

# The scales of one layer in the form that the kernels read: one per row and group of columns. A group is a run of 64
# columns, or the 16 or 32 columns that share a scale in a file.
#
# XLA expands them before the kernel, for one layer. Nested dequantization then costs one look-up and multiply-add per
# 64 weights, which a kernel would repeat in each of its tiles. The codes, 4 to 32 times larger, are never sliced
# outside of a kernel.


def code_of(weights: Weights) -> FourBitCode:
    """Returns the code of the weights; scales of a QTensor, which may be nested, are in other arrays."""
    if isinstance(weights, QTensor):
        return FourBitCode(table=CODE_TABLES[weights.quant_type], group=RUN, scales=_refuse)
    assert weights.code is not None
    return weights.code


def _refuse(header: jax.Array) -> jax.Array:
    raise AssertionError("the constants of a QTensor are not in headers")


def expanded_scales(weights: Weights, layer: Layer, dtype: DTypeLike) -> Float[Array, "*E groups N"]:
    """Returns scales[g, n], the scale of columns g group to (g + 1) group of row n, rounded once to `dtype`; 0 past K.

    `weights` has layout `split_k`: one weight (`layer` None), or a stack and the index of a layer. The number of groups
    is that of whole pairs of runs. If a layer has several experts, so have the scales: [E, groups, N].
    """
    assert weights.layout == "split_k"
    with jax.named_scope("expanded_scales"):
        scales_GN = _absmax(weights, layer) if isinstance(weights, QTensor) else _of_headers(weights, layer)
        scales, missing = scales_GN.astype(dtype), -scales_GN.shape[-2] % (PAIR // code_of(weights).group)
        return jnp.pad(scales, (*[(0, 0)] * (scales.ndim - 2), (0, missing), (0, 0)))


def _absmax(weights: QTensor, layer: Layer) -> Float[Array, "*E runs N"]:
    # Without the codes: slicing them could copy a layer.
    constants = dataclasses.replace(weights, codes=None)
    absmax_GN = expand_absmax(constants if layer is None else constants.layer(layer))
    return jnp.repeat(absmax_GN, weights.block_size // RUN, axis=-2)


def _of_headers(weights: GgmlTensor, layer: Layer) -> Float[Array, "*E groups N"]:
    code, block = code_of(weights), BLOCK_FORMATS[weights.ggml_type]
    start, end = header_range(weights.ggml_type, weights.shape[1])
    headers = jax.lax.slice_in_dim(jnp.asarray(weights.codes), start, end, axis=-1)
    headers = headers if layer is None else jax.lax.dynamic_index_in_dim(headers, layer, keepdims=False)
    lead = headers.shape[:-1]
    # In one axis, because XLA would otherwise transpose the codes of all layers instead of one layer's scales.
    headers = jax.lax.optimization_barrier(headers.reshape(-1))
    scales = code.scales(headers.reshape(*lead, -1, block.header))
    return scales.reshape(*lead, -1).swapaxes(-1, -2)


class Operands(NamedTuple):
    """One layer of a weight, or several experts of it, in the form that a kernel reads.

    Attributes:
      codes_LNJ: the whole stack; the kernel addresses its layer, because a slice would be a copy.
      layer: i32 [1]. With experts, i32 [2, row tiles]: each row tile's index in the stack, and in the scales (-1: the
        tile is not in use, and its result is zeros).
      scales: [128 / group ceil(K/128), N] in the kernel's dtype, of this layer only; with experts, [E, ..., N].
      table: f32 [16].
      shape: (N, K).
      group: columns that share a scale: 16, 32 or 64.
    """

    codes_LNJ: jax.Array
    layer: jax.Array
    scales: jax.Array
    table: np.ndarray
    shape: tuple[int, int]
    group: int = RUN


def place_of(layer_g: MosaicValue, row_tile: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Returns a row tile's index in the stack and in the scales (None: no experts), inside a kernel."""
    if len(layer_g.shape) == 1:
        return layer_g[0], None
    return layer_g[0, row_tile], layer_g[1, row_tile]


def operands(weights: Weights, layer: Layer, dtype: DTypeLike) -> Operands:
    """Makes the operands of a weight (`layer` None), or of one layer of a stack, for a product in `dtype`."""
    codes_LNJ = jnp.asarray(weights.codes) if layer is not None else jnp.asarray(weights.codes)[None]
    index = jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1)
    rows, columns = weights.shape
    scales, code = expanded_scales(weights, layer, dtype), code_of(weights)
    return Operands(codes_LNJ, index, scales, code.table, (rows, columns), code.group)


def expert_operands(
    weights: Weights, layer: Layer, expert_of_tile_I: Int[Array, " I"], tiles: Int[Array, ""], dtype: DTypeLike
) -> Operands:
    """Makes the operands of row tiles with an expert each, of which the first `tiles` are in use.

    `weights` has the leading axes [layers, experts]; `layer` is an index in the first.
    """
    experts = weights.stack_shape[1]
    codes_LNJ = weights.codes.reshape(-1, *weights.codes.shape[2:])
    in_stack = jnp.asarray(layer, jnp.int32) * experts + expert_of_tile_I
    in_use = jnp.arange(len(expert_of_tile_I)) < tiles
    place_2I = jnp.stack([in_stack, jnp.where(in_use, expert_of_tile_I, -1)])
    scales, code = expanded_scales(weights, layer, dtype), code_of(weights)
    rows, columns = weights.shape
    return Operands(codes_LNJ, place_2I, scales, code.table, (rows, columns), code.group)


def pad_rows(rows: jax.Array, multiple: int) -> jax.Array:
    """Appends rows of zeros up to a multiple; returns the same array if there is nothing to append."""
    missing = -rows.shape[0] % multiple
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows
