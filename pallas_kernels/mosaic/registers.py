"""Arrays in registers below Pallas: their layouts, and their values."""

from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import TiledLayout
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

# A Pallas ref, an MLIR value, a register or a layout: Mosaic has no public types for these.
type MosaicValue = Any


def tiled(layout: TiledLayout) -> MosaicValue:
    """Converts a layout to Pallas's type."""
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def fragmented(registers: np.ndarray, layout: MosaicValue, shape: tuple[int, ...]) -> mgpu.FragmentedArray:
    """Makes an array from registers in the order of its layout."""
    layout = layout.to_mgpu()
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None
    )


def value(register: MosaicValue, i: int) -> MosaicValue:
    """Extracts element i of a register of several values."""
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
