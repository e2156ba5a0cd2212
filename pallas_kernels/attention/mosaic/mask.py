"""Which keys the queries of a tile see, inside a kernel."""

from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention.bounds import Visible
from pallas_kernels.attention.mosaic.instructions import Instructions
from pallas_kernels.mosaic.registers import MosaicValue


class Visits(NamedTuple):
    """A row of `bounds.key_visits` or `bounds.query_visits`: two ranges of blocks."""

    count: jax.Array
    of_first: jax.Array
    first_shift: jax.Array
    second_shift: jax.Array

    @classmethod
    def load(cls, row_g: MosaicValue) -> "Visits":
        """Loads the row."""
        return cls(*(row_g[at] for at in range(4)))

    def block(self, n: jax.Array) -> jax.Array:
        """Returns the block of visit n."""
        return n + lax.select(n < self.of_first, self.first_shift, self.second_shift)


def is_whole(whole_g: MosaicValue, row: jax.Array, column: jax.Array, keys: int) -> jax.Array:
    """Returns True if all queries from `row` on see all keys from `column` on; `whole_g` is of `bounds.whole_from`."""
    own = (column >= whole_g[0]) & (column + keys <= row + 1)
    return own | ((column >= whole_g[1]) & (column + keys <= whole_g[2]))


def seen(
    do: Instructions,
    visible_g: Visible,
    b: jax.Array,
    row: jax.Array,
    column: jax.Array,
    shape: tuple[int, int],
    q: int,
) -> jax.Array:
    """Returns the mask of a tile whose axis `q` has the queries from `row` on, and the other the keys from `column`."""

    def spread(values_g, first, axis):
        values = do.along(values_g.at[b, pl.ds(pl.multiple_of(first, shape[axis]), shape[axis])], axis)
        return lax.broadcast_in_dim(values, shape, (axis,))

    query, key = do.indices(shape, q) + row, do.indices(shape, 1 - q) + column
    found = (key <= query) & (key >= spread(visible_g.start_BT, row, q))
    if visible_g.id_BT is not None:
        found &= spread(visible_g.id_BT, row, q) == spread(visible_g.id_BT, column, 1 - q)
    if visible_g.trunk_BT is not None:
        of_trunk = (key >= spread(visible_g.trunk_BT, row, q)) & (key < spread(visible_g.trunk_end_BT, row, q))
        found |= of_trunk
    return found
