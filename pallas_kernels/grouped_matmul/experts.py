"""Stacks of experts' weights [S, E, ...]: their kinds, and one expert's weight as a matrix.

Dimension key: S layers, E experts, N out, K in, P slots, I tiles, C rows per tile.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.dense_matmul import FEW_ROWS, dot
from pallas_kernels.devices import target_device
from pallas_kernels.dispatch import Call
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.formats.qtensor import Leaf, QTensor
from pallas_kernels.frozen_product import Direction
from pallas_kernels.ggml_matmul import api as ggml
from pallas_kernels.grouped_matmul.groups import Groups
from pallas_kernels.nf4_matmul import api as nf4

ExpertWeights = QTensor | GgmlTensor | jax.Array  # 4-bit, ggml's blocks, or dense [S, E, N, K]
Layer = Int[Array, ""] | int
Index = Int[Array, ""]


class Kind(NamedTuple):
    """A kind of weights; its functions take stacks of this kind.

    Attributes:
      shape: returns (N, K) of one expert.
      stack_shape: returns the leading axes.
      expert: (flat stack [S E, ...], index, dtype) -> the weight [N, K].
      product: (rows [C, K], flat stack, index) -> [C, N]; None if it would dequantize the weight.
      reads_codes: (flat stack, C, dtype) -> True if `product` of C rows multiplies without dequantizing the weight.
      problems: yields why a stack is malformed.
      call: (direction, rows, dtype, stack) -> the call that fused kernels may take; None if none takes this kind.
    """

    shape: Callable[[Leaf], tuple[int, ...]]
    stack_shape: Callable[[Leaf], tuple[int, ...]]
    expert: Callable[[Leaf, Index, DTypeLike], Float[Array, "N K"]]
    product: Callable[[Float[Array, "C K"], Leaf, Index], Float[Array, "C N"]] | None
    reads_codes: Callable[[Leaf, int, DTypeLike], bool]
    problems: Callable[[Leaf], Iterator[str]]
    call: Callable[[Direction, int, jnp.dtype, Leaf], Call] | None = None


def _quantized_product(x_CK: Float[Array, "C K"], flat: QTensor, index: Index) -> Float[Array, "C N"]:
    return nf4.product("forward", x_CK, flat, index)


def _reads_codes(flat: QTensor, rows: int, dtype: DTypeLike) -> bool:
    call = Call.of("forward", rows, jnp.dtype(dtype), flat)
    return nf4.choose_implementation(target_device(), call).name == "cpu" and rows <= FEW_ROWS


def _reads_blocks(flat: GgmlTensor, rows: int, dtype: DTypeLike) -> bool:
    call = ggml.call_of("forward", rows, dtype, flat)
    return ggml.choose_implementation(target_device(), call).name == "cpu" and rows <= FEW_ROWS


def _ggml_product(x_CK: Float[Array, "C K"], flat: GgmlTensor, index: Index) -> Float[Array, "C N"]:
    return ggml.product("forward", x_CK, flat, index)


def _dense_expert(flat: jax.Array, index: Index, dtype: DTypeLike) -> Float[Array, "N K"]:
    return jax.lax.dynamic_index_in_dim(flat, index, keepdims=False).astype(dtype)


KINDS: dict[type, Kind] = {
    QTensor: Kind(
        shape=lambda weights: weights.shape,
        stack_shape=lambda weights: weights.stack_shape,
        expert=nf4.dequantize_layer,
        product=_quantized_product,
        reads_codes=_reads_codes,
        problems=nf4.weights_problems,
        call=Call.of,
    ),
    GgmlTensor: Kind(
        shape=lambda weights: weights.shape,
        stack_shape=lambda weights: weights.stack_shape,
        expert=ggml.dequantize_layer,
        product=_ggml_product,
        reads_codes=_reads_blocks,
        problems=ggml.weights_problems,
        call=ggml.call_of,
    ),
}
DENSE = Kind(
    shape=lambda weights: weights.shape[2:],
    stack_shape=lambda weights: weights.shape[:2],
    expert=_dense_expert,
    product=None,
    reads_codes=lambda flat, rows, dtype: False,
    problems=lambda weights: iter(()),
)


def kind_of(weights: ExpertWeights) -> Kind:
    """Returns the kind of the weights; arrays, NumPy's and tracers included, are dense."""
    return KINDS.get(type(weights), DENSE)


def expert_shape(weights: ExpertWeights) -> tuple[int, int]:
    """Returns (N, K) of one expert."""
    rows, columns = kind_of(weights).shape(weights)
    return rows, columns


def flatten(weights: ExpertWeights) -> ExpertWeights:
    """Returns the same weights as one stack [S E, ...]; a view."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), weights)


# The grouped product as a loop over the experts in use, each dequantized once; runs on every device.
#
# An outer loop visits the experts that have rows, an inner one the tiles of that expert. So at most one expert's weight
# exists at a time, and unused experts and tiles cost nothing. Few rows are multiplied directly from the codes, tile by
# tile, where the kind of weight allows it.


def loop_forward(
    x_PK: Float[Array, "P K"], weights: ExpertWeights, groups: Groups, layer: Layer
) -> Float[Array, "P N"]:
    """Computes y[slot] = w[layer, expert of the slot] x[slot], accumulated in f32, in x's dtype."""
    if kind_of(weights).reads_codes(flatten(weights), groups.tile, x_PK.dtype):
        return _tile_by_tile(x_PK, weights, groups, layer)
    return _expert_by_expert(x_PK, weights, groups, layer, contract=1)


def loop_backward(
    dy_PN: Float[Array, "P N"], weights: ExpertWeights, groups: Groups, layer: Layer
) -> Float[Array, "P K"]:
    """Computes dx[slot] = dy[slot] w[layer, expert of the slot], accumulated in f32, in dy's dtype."""
    return _expert_by_expert(dy_PN, weights, groups, layer, contract=0)


def _expert_by_expert(
    rows_PA: Float[Array, "P A"], weights: ExpertWeights, groups: Groups, layer: Layer, contract: int
) -> Float[Array, "P B"]:
    """Contracts the rows with axis `contract` of their expert's weight."""
    kind, flat, experts = kind_of(weights), flatten(weights), _expert_count(weights)
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
    product, flat, experts = kind_of(weights).product, flatten(weights), _expert_count(weights)
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


def _expert_count(weights: ExpertWeights) -> int:
    return kind_of(weights).stack_shape(weights)[1]


def _flat_index(layer: Layer, experts: int, expert: Int[Array, ""]) -> Int[Array, ""]:
    return jnp.asarray(layer, jnp.int32) * experts + expert.astype(jnp.int32)


def _tile(rows: Float[Array, "P A"], groups: Groups, tile: Int[Array, ""]) -> Float[Array, "C A"]:
    return jax.lax.dynamic_slice_in_dim(rows, tile * groups.tile, groups.tile)


def _put(all_rows: Float[Array, "P B"], rows: Float[Array, "C B"], groups: Groups, tile: Int[Array, ""]) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(all_rows, rows, tile * groups.tile, axis=0)
