"""Arrays in registers below Pallas: their layouts, their values, and inline PTX on them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import TiledLayout
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

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


def assembly(
    ptx: str, result: MosaicValue, outputs: int, words: Sequence[MosaicValue], floats: Sequence[MosaicValue] = ()
) -> list[MosaicValue]:
    """Emits inline PTX and returns its outputs, all i32 or all f32; its operands are words, then f32s."""
    constraint = "=r" if isinstance(result, ir.IntegerType) else "=f"
    constraints = [constraint] * outputs + ["r"] * len(words) + ["f"] * len(floats)
    of_all = result if outputs == 1 else ir.Type.parse(f"!llvm.struct<({','.join([str(result)] * outputs)})>")
    found = llvm.inline_asm(of_all, [*words, *floats], ptx, ",".join(constraints))
    return [found] if outputs == 1 else [llvm.extractvalue(result, found, [at]) for at in range(outputs)]
