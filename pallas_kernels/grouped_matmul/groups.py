"""Groups rows by expert: sorts them, pads each expert's rows to whole tiles, and puts results back in order.

A token and one of its chosen experts are a pair; pair m k + j is choice j of token m. A slot is a row of the grouped
arrays. Rows move only by gathers, in both directions and in the gradients, because scatters are slow.

Dimension key: M tokens, k choices per token, Q = M k pairs, E experts, P slots, I tiles, C rows per tile, P = I C,
K or N width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dense_matmul import FEW_ROWS
from pallas_kernels.devices import Device, target_device
from pallas_kernels.formats.qtensor import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """The slots of the pairs. Tiles of one expert are neighbours, and experts are in ascending order.

    Leaves, of int32:
      expert_of_tile_I: [I], the expert of each tile; tiles that are not in use have the last expert.
      tiles: [], number of tiles in use, which come first.
      pair_of_slot_P: [P], the pair in each slot; M k in padding.
      slot_of_pair_Mk: [M, k], the slot of each pair.
    Static:
      tile: C, the rows per tile.
    """

    expert_of_tile_I: Leaf
    tiles: Leaf
    pair_of_slot_P: Leaf
    slot_of_pair_Mk: Leaf
    tile: int = dataclasses.field(metadata={"static": True})


def group_rows(
    experts_Mk: Int[Array, "M k"], num_experts: int, tile: int | None = None, by_row: bool = False
) -> Groups:
    """Sorts pairs by expert, in stable order, and pads each expert's rows to whole tiles.

    Args:
      experts_Mk: the experts that each token chose, in [0, num_experts).
      num_experts: E.
      tile: C; None: chosen from the numbers of pairs and experts, for the target device.
      by_row: see `choose_tile`.

    Raises:
      ValueError: a size is not positive.
    """
    if min(*experts_Mk.shape, num_experts) < 1 or (tile is not None and tile < 1):
        found = f"experts {list(experts_Mk.shape)}, {num_experts=}, {tile=}"
        raise ValueError(f"group_rows: a size is not positive (found {found}). Pass tokens, choices and experts.")
    chosen = choose_tile(target_device(), experts_Mk.size, num_experts, by_row) if tile is None else tile
    return _group_rows(experts_Mk, num_experts, chosen)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _group_rows(experts_Mk: Int[Array, "M k"], num_experts: int, tile: int) -> Groups:
    pairs, count = experts_Mk.size, most_tiles(experts_Mk.size, num_experts, tile)
    expert_of_pair = experts_Mk.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(expert_of_pair, stable=True).astype(jnp.int32)
    sorted_experts = expert_of_pair[order]
    start_of_expert = _first_at_least(sorted_experts, num_experts + 1)
    tiles_of_expert = -(-jnp.diff(start_of_expert) // tile)
    end_tile = jnp.cumsum(tiles_of_expert, dtype=jnp.int32)
    first_slot = (end_tile - tiles_of_expert) * tile
    slots = first_slot[sorted_experts] + jnp.arange(pairs, dtype=jnp.int32) - start_of_expert[sorted_experts]
    expert_of_tile = _first_at_least(end_tile - 1, count)
    return Groups(
        expert_of_tile_I=jnp.minimum(expert_of_tile, num_experts - 1),
        tiles=end_tile[-1],
        pair_of_slot_P=jnp.full(count * tile, pairs, jnp.int32).at[slots].set(order, unique_indices=True),
        slot_of_pair_Mk=jnp.zeros(pairs, jnp.int32).at[order].set(slots, unique_indices=True).reshape(experts_Mk.shape),
        tile=tile,
    )


def _first_at_least(ascending: Int[Array, " n"], count: int) -> Int[Array, " count"]:
    """Returns for 0, 1, ... count - 1 the position of the first value that is not less; unrolled, so without a loop."""
    found = jnp.searchsorted(ascending, jnp.arange(count, dtype=jnp.int32), method="scan_unrolled")
    return found.astype(jnp.int32)


def most_tiles(pairs: int, num_experts: int, tile: int) -> int:
    """Returns I, the most tiles that any choice of experts needs: below pairs / tile + min(experts, pairs)."""
    in_use = min(num_experts, pairs)
    return in_use + (pairs - in_use) // tile


# Platform -> (rows per tile, the mean number of rows per expert from which it is used), ascending. On CPUs about an
# eighth of the rows is padding. On GPUs a tile costs its expert's codes once, whatever its rows: eight are the least
# that `skinny` multiplies, 64 the least of the other kernels. By reasoning; measured on no card.
TILES = {
    "cpu": ((1, 0), (2, 8), (4, 16), (8, 32), (16, 64), (32, 128), (64, 256), (128, 512)),
    "gpu": ((8, 0), (64, 9), (128, 256)),
}


def choose_tile(device: Device, pairs: int, num_experts: int, by_row: bool = False) -> int:
    """Returns the rows per tile for this many pairs.

    Args:
      by_row: a row's product may not depend on the other rows. On CPUs, only loops for few rows promise that.
    """
    tiles = TILES.get(device.platform, TILES["gpu"])
    most = FEW_ROWS if by_row and device.platform == "cpu" else tiles[-1][0]
    return max(tile for tile, least in tiles if pairs >= least * num_experts and tile <= most)


@jax.custom_vjp
def gather_rows(x_MK: Float[Array, "M K"], groups: Groups) -> Float[Array, "P K"]:
    """Returns the rows of all slots: that of the slot's token, or zeros in padding."""
    return _rows_of_slots(x_MK, groups)


def _rows_of_slots(x_MK: Float[Array, "M K"], groups: Groups) -> Float[Array, "P K"]:
    tokens, choices = groups.slot_of_pair_Mk.shape
    token_P = groups.pair_of_slot_P // choices
    return jnp.where((token_P < tokens)[:, None], x_MK.at[token_P].get(mode="clip"), 0)


def _gather_forward(x_MK, groups):
    return _rows_of_slots(x_MK, groups), groups


def _gather_backward(groups, dy_PK):
    return _combined(dy_PK, groups), None


gather_rows.defvjp(_gather_forward, _gather_backward)


def rows_of_pairs(y_PN: Float[Array, "P N"], groups: Groups) -> Float[Array, "Q N"]:
    """Returns the rows of all pairs, in the order of the tokens and their choices: Q = M k rows, without padding."""
    return y_PN.at[groups.slot_of_pair_Mk.reshape(-1)].get(mode="promise_in_bounds")


def weights_of_slots(weights_Mk: Float[Array, "M k"], groups: Groups) -> Float[Array, " P"]:
    """Returns the weight of each slot's pair, in f32; 0 in padding."""
    return _weights_of_slots(weights_Mk.astype(jnp.float32), groups)


@jax.custom_vjp
def _weights_of_slots(weights_Mk: Float[Array, "M k"], groups: Groups) -> Float[Array, " P"]:
    return weights_Mk.reshape(-1).at[groups.pair_of_slot_P].get(mode="fill", fill_value=0)


def _weights_forward(weights_Mk, groups):
    return _weights_of_slots(weights_Mk, groups), groups


def _weights_backward(groups, d_weight_P):
    return d_weight_P.at[groups.slot_of_pair_Mk].get(mode="promise_in_bounds"), None


_weights_of_slots.defvjp(_weights_forward, _weights_backward)


@jax.custom_vjp
def combine_rows(y_PN: Float[Array, "P N"], groups: Groups) -> Float[Array, "M N"]:
    """Returns each token's sum over its choices of y[slot], added in f32 and cast to y's dtype."""
    return _combined(y_PN, groups)


def _combined(y_PN: jax.Array, groups: Groups) -> jax.Array:
    y_MkN = rows_of_pairs(y_PN, groups).reshape(*groups.slot_of_pair_Mk.shape, -1)
    # The order of jnp.sum depends on the number of tokens.
    choices = [y_MkN[:, choice].astype(jnp.float32) for choice in range(y_MkN.shape[1])]
    return functools.reduce(jnp.add, choices).astype(y_PN.dtype)


def _combine_forward(y_PN, groups):
    return _combined(y_PN, groups), groups


def _combine_backward(groups, dy_MN):
    return _rows_of_slots(dy_MN, groups), None


combine_rows.defvjp(_combine_forward, _combine_backward)
