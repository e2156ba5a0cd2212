"""Maps arrays to registers by a Mosaic layout, as arrays over 128 threads."""

import numpy as np
from jax.experimental.mosaic.gpu.fragmented_array import Replicated

WARPS, LANES = 4, 32


def threads(array, layout):
    """Returns the registers of an array in a layout: an object array of [128, vector]."""
    tiled = array
    for tile in layout.tiling.tiles:
        kept, split = tiled.ndim - len(tile), []
        for size, part in zip(tiled.shape[kept:], tile, strict=True):
            split += [size // part, part]
        tiled = tiled.reshape(*tiled.shape[:kept], *split)
        order = [*range(kept), *range(kept, tiled.ndim, 2), *range(kept + 1, tiled.ndim, 2)]
        tiled = tiled.transpose(order)
    places = [*layout.warp_dims, *layout.lane_dims]
    spread = [dim for dim in places if not isinstance(dim, Replicated)]
    rest = [dim for dim in range(-tiled.ndim, 0) if dim not in spread and dim != layout.vector_dim]
    by_register = tiled.transpose([d + tiled.ndim for d in (*rest, *spread, layout.vector_dim)])
    shape = tuple(tiled.shape[dim] for dim in rest)
    by_register = by_register.reshape(shape + tuple(tiled.shape[dim] for dim in spread) + (-1,))
    for at, dim in enumerate(places):
        if isinstance(dim, Replicated):
            by_register = np.repeat(np.expand_dims(by_register, len(shape) + at), dim.times, axis=len(shape) + at)
    values = by_register.reshape(*shape, WARPS * LANES, -1)
    registers = np.empty(shape, object)
    for at in np.ndindex(shape):
        registers[at] = values[at]
    return registers
