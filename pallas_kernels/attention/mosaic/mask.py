"""Inside a kernel: the blocks that a tile visits, and the mask of keys that its queries do not see."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention.bounds import Visible
from pallas_kernels.attention.mosaic.instructions import Instructions
from pallas_kernels.mosaic.registers import MosaicValue


class Visits(NamedTuple):
    """A row of `bounds.key_visits` or `bounds.query_visits`: two ranges of blocks; without branches only the first."""

    count: jax.Array
    shift: jax.Array
    of_first: jax.Array | None
    second_shift: jax.Array | None

    @classmethod
    def load(cls, row_g: MosaicValue, visible_g: Visible) -> "Visits":
        """Loads the row."""
        of_first, second_shift = (None, None) if visible_g.trunk_BT is None else (row_g[1], row_g[3])
        return cls(row_g[0], row_g[2], of_first, second_shift)

    def block(self, n: jax.Array) -> jax.Array:
        """Returns the block of visit n."""
        if self.of_first is None or self.second_shift is None:
            return n + self.shift
        return n + lax.select(n < self.of_first, self.shift, self.second_shift)


def is_whole(visible_g: Visible, whole_g: MosaicValue, row: jax.Array, column: jax.Array, keys: int) -> jax.Array:
    """Returns True if all queries from `row` on see all keys from `column` on; `whole_g` is of `bounds.whole_from`."""
    own = (column >= whole_g[0]) & (column + keys <= row + 1)
    if visible_g.trunk_BT is None:
        return own
    return own | ((column >= whole_g[1]) & (column + keys <= whole_g[2]))


def hide(
    do: Instructions,
    visible_g: Visible,
    b: jax.Array,
    row: jax.Array,
    column: jax.Array,
    q: int,
    tile: jax.Array,
    hidden: float,
) -> jax.Array:
    """Returns a tile whose axis `q` has the queries from `row` on, and the other the keys from `column` on, masked."""
    shape = (tile.shape[0], tile.shape[1])

    origin = column if do.counts_from_block else 0

    def spread(values_g, first, axis, shift: jax.Array | int = origin):
        values = do.along(values_g.at[b, pl.ds(pl.multiple_of(first, shape[axis]), shape[axis])], axis)
        return lax.broadcast_in_dim(values - shift, shape, (axis,))

    query, key = do.indices(shape, q) + (row - origin), do.indices(shape, 1 - q) + (column - origin)
    seen = key <= query
    if visible_g.masked_start_BT is not None:
        seen &= key >= spread(visible_g.masked_start_BT, row, q)
    if visible_g.trunk_BT is not None:
        seen |= (key >= spread(visible_g.trunk_BT, row, q)) & (key < spread(visible_g.trunk_end_BT, row, q))
    if visible_g.id_BT is not None:
        seen &= spread(visible_g.id_BT, row, q, 0) == spread(visible_g.id_BT, column, 1 - q, 0)
    return jnp.where(seen, tile, hidden)


def hide_unless_whole(
    do: Instructions,
    visible_g: Visible,
    whole_g: MosaicValue,
    b: jax.Array,
    row: jax.Array,
    column: jax.Array,
    q: int,
    tile: jax.Array,
    hidden: float,
) -> jax.Array:
    """Returns the tile of `hide`, or the tile itself if `is_whole`."""

    def masked(tile):
        return hide(do, visible_g, b, row, column, q, tile, hidden)

    keys = tile.shape[1 - q]
    return lax.cond(is_whole(visible_g, whole_g, row, column, keys), lambda tile: tile, masked, tile)
