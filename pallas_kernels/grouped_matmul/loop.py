"""The grouped product as a loop over the experts in use, each dequantized once; runs on every device.

An outer loop visits the experts that have rows, an inner one the tiles of that expert. So at most one expert's weight
exists at a time, and unused experts and tiles cost nothing. Few rows are multiplied directly from the codes, tile by
tile, where the kind of weight allows it.

Dimension key: P slots, I tiles, C rows per tile, E experts, N out, K in.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dense_matmul import dot
from pallas_kernels.grouped_matmul.experts import ExpertWeights, Layer, expert_shape, flatten, kind_of
from pallas_kernels.grouped_matmul.groups import Groups


def forward(x_PK: Float[Array, "P K"], weights: ExpertWeights, groups: Groups, layer: Layer) -> Float[Array, "P N"]:
    """Computes y[slot] = w[layer, expert of the slot] x[slot], accumulated in f32, in x's dtype."""
    if kind_of(weights).reads_codes(flatten(weights), groups.tile, x_PK.dtype):
        return _tile_by_tile(x_PK, weights, groups, layer)
    return _expert_by_expert(x_PK, weights, groups, layer, contract=1)


def backward(dy_PN: Float[Array, "P N"], weights: ExpertWeights, groups: Groups, layer: Layer) -> Float[Array, "P K"]:
    """Computes dx[slot] = dy[slot] w[layer, expert of the slot], accumulated in f32, in dy's dtype."""
    return _expert_by_expert(dy_PN, weights, groups, layer, contract=0)


def _expert_by_expert(
    rows_PA: Float[Array, "P A"], weights: ExpertWeights, groups: Groups, layer: Layer, contract: int
) -> Float[Array, "P B"]:
    """Contracts the rows with axis `contract` of their expert's weight."""
    kind, flat, experts = kind_of(weights), flatten(weights), _experts(weights)
    bounds = tile_bounds(groups, experts)
    in_use = jnp.nonzero(jnp.diff(bounds), size=min(experts, len(groups.expert_of_tile_I)), fill_value=0)[0]

    def one_expert(at, y_PB):
        expert = in_use[at]
        w_NK = kind.expert(flat, _flat_index(layer, experts, expert), rows_PA.dtype)

        def one_tile(tile, y_PB):
            y_CB = dot(_tile(rows_PA, groups, tile), w_NK, (1, contract), rows_PA.dtype)
            return _put(y_PB, y_CB, groups, tile)

        return jax.lax.fori_loop(bounds[expert], bounds[expert + 1], one_tile, y_PB)

    y_PB = _zeros(rows_PA, expert_shape(weights)[1 - contract])
    return jax.lax.fori_loop(0, jnp.count_nonzero(jnp.diff(bounds)), one_expert, y_PB)


def _tile_by_tile(
    x_PK: Float[Array, "P K"], weights: ExpertWeights, groups: Groups, layer: Layer
) -> Float[Array, "P N"]:
    product, flat, experts = kind_of(weights).product, flatten(weights), _experts(weights)
    assert product is not None, "kinds that read codes have a product"

    def one_tile(tile, y_PN):
        index = _flat_index(layer, experts, groups.expert_of_tile_I[tile])
        return _put(y_PN, product(_tile(x_PK, groups, tile), flat, index), groups, tile)

    y_PN = _zeros(x_PK, expert_shape(weights)[0])
    return jax.lax.fori_loop(0, groups.tiles, one_tile, y_PN)


def _zeros(rows_PA: Float[Array, "P A"], width: int) -> Float[Array, "P B"]:
    """Returns zeros for the results of rows.

    They depend on the rows, so that XLA makes them where they are needed. It would hoist constants out of a scan over
    layers, where they stay in memory during the whole step.
    """
    zero, _ = jax.lax.optimization_barrier((jnp.zeros((), rows_PA.dtype), rows_PA))
    return jnp.full((len(rows_PA), width), zero)


def tile_bounds(groups: Groups, experts: int) -> Int[Array, " bounds"]:
    """Returns the first tile of each expert, and the number of tiles in use."""
    tile_I = jnp.arange(len(groups.expert_of_tile_I))
    expert_of_tile = jnp.where(tile_I < groups.tiles, groups.expert_of_tile_I, experts)
    return jnp.searchsorted(expert_of_tile, jnp.arange(experts + 1)).astype(jnp.int32)


def _experts(weights: ExpertWeights) -> int:
    return kind_of(weights).stack_shape(weights)[1]


def _flat_index(layer: Layer, experts: int, expert: Int[Array, ""]) -> Int[Array, ""]:
    return jnp.asarray(layer, jnp.int32) * experts + expert.astype(jnp.int32)


def _tile(rows: Float[Array, "P A"], groups: Groups, tile: Int[Array, ""]) -> Float[Array, "C A"]:
    return jax.lax.dynamic_slice_in_dim(rows, tile * groups.tile, groups.tile)


def _put(all_rows: Float[Array, "P B"], rows: Float[Array, "C B"], groups: Groups, tile: Int[Array, ""]) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(all_rows, rows, tile * groups.tile, axis=0)
