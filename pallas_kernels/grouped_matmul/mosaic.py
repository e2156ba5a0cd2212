"""The grouped product by the kernels of nf4_matmul: one launch multiplies all tiles, each with its expert's codes.

A kernel reads the whole stack [S E, ...] of codes and one index per tile of rows. The block constants of a layer's
experts are expanded before it (`nf4_matmul.mosaic.operands`): 2 bytes per 64 weights. Tiles that are not in use are
written as zeros, without a product.

Dimension key: P slots, C rows per tile, A contracted (K forward, N backward), B the other.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.devices import target_device
from pallas_kernels.frozen_product import Direction
from pallas_kernels.grouped_matmul.experts import Layer
from pallas_kernels.grouped_matmul.groups import Groups
from pallas_kernels.nf4_matmul.mosaic import ampere as ampere_kernels
from pallas_kernels.nf4_matmul.mosaic import hopper as hopper_kernels
from pallas_kernels.nf4_matmul.mosaic import skinny as skinny_kernel
from pallas_kernels.nf4_matmul.mosaic.operands import Operands, Weights, expert_operands


def hopper(
    direction: Direction, rows_PA: Float[Array, "P A"], weights: Weights, groups: Groups, layer: Layer
) -> Float[Array, "P B"]:
    """Computes a direction on sm_90, with the largest of the kernel's tiles that divides the groups' tile."""
    fitting = [tile for tile in hopper_kernels.TILES[direction] if groups.tile % tile.rows == 0]
    tile = max(fitting, key=lambda tile: tile.rows)
    product = {"forward": hopper_kernels.forward_product, "backward": hopper_kernels.backward_product}[direction]
    return product(rows_PA, tile_operands(weights, groups, layer, rows_PA.dtype, tile.rows), tile)


def ampere(
    direction: Direction, rows_PA: Float[Array, "P A"], weights: Weights, groups: Groups, layer: Layer
) -> Float[Array, "P B"]:
    """Computes a direction on a card before Hopper, or of Blackwell."""
    device = target_device()
    tile = ampere_kernels.tile_for(device, len(rows_PA), weights.shape[direction == "backward"])
    tile = tile if groups.tile % tile.rows == 0 else ampere_kernels.SMALL
    weight = tile_operands(weights, groups, layer, rows_PA.dtype, tile.rows)
    machine = ampere_kernels.machine_for(device)(direction, rows_PA.dtype, weight.table)
    return ampere_kernels.product(machine, rows_PA, weight, tile)


def skinny(
    direction: Direction, rows_PA: Float[Array, "P A"], weights: Weights, groups: Groups, layer: Layer
) -> Float[Array, "P B"]:
    """Computes the forward direction of tiles of eight rows, on all these cards."""
    assert direction == "forward"
    weight = tile_operands(weights, groups, layer, rows_PA.dtype, skinny_kernel.EIGHT)
    return skinny_kernel.expert_product(skinny_kernel.Machine(rows_PA.dtype, weight.table), rows_PA, weight)


def tile_operands(weights: Weights, groups: Groups, layer: Layer, dtype: DTypeLike, rows: int) -> Operands:
    """Returns the operands of a kernel whose tiles have this many rows, a divisor of the groups' tile."""
    each = groups.tile // rows
    expert_of_tile = jnp.repeat(groups.expert_of_tile_I, each, total_repeat_length=each * len(groups.expert_of_tile_I))
    return expert_operands(weights, layer, expert_of_tile, each * groups.tiles, dtype)
