"""QTensor: a 4-bit weight and its block constants, as a pytree.

Dimension key: N out, K in, B block_size, G = K / B blocks a row, E elements of `shape`; `...` stacked layers.
"""

import dataclasses
import math
from typing import Any

import jax

Leaf = Any  # jax.Array, numpy.ndarray, jax.ShapeDtypeStruct or a tracer


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QTensor:
    """w[n, k] = table[code(n, k)] * absmax[block(n, k)], with blocks of `block_size` neighbours along K.

    `code` is read from `codes` by the equation of `layout` (pallas_kernels.formats.layouts). The constants are either
    `absmax` itself, or double-quantized:
    `absmax = map8[absmax_codes] * nested_absmax[block // nested_block_size] + nested_offset`, with `map8` the signed
    dynamic 8-bit map and `block` counted over the flattened weight, whatever the layout.

    Leaves (leading axes, the same on all, are stacked layers):
      codes: uint8, the shape that the layout says.
      absmax: f32 [..., N, G] (`split_k`: [..., G, N], `flat`: [..., ceil(E/B)]), or None where double-quantized.
      absmax_codes: uint8, the shape that absmax would have, or None.
      nested_absmax: f32 [..., ceil(blocks/nested_block_size)], or None.
      nested_offset: f32 [...], one a weight, or None.
    Static:
      quant_type: a key of pallas_kernels.formats.tables.CODE_TABLES.
      shape: the shape of one weight, (N, K) in the orientation of Hugging Face.
      dtype: name of the dtype that the weight had before it was quantized.

    Leaves may be tracers or ShapeDtypeStructs, so nothing is validated here: constructors do that.
    """

    codes: Leaf
    absmax: Leaf = None
    absmax_codes: Leaf = None
    nested_absmax: Leaf = None
    nested_offset: Leaf = None
    quant_type: str = _static()
    block_size: int = _static()
    nested_block_size: int = _static()
    shape: tuple[int, ...] = _static()
    dtype: str = _static()
    layout: str = _static()

    @property
    def double_quant(self) -> bool:
        """True where the block constants are themselves quantized to 8 bits."""
        return self.absmax_codes is not None

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The leading axes: (layers,) of a stack, () of a single weight."""
        constants = self.absmax_codes if self.double_quant else self.absmax
        block_axes = 1 if self.layout == "flat" else 2
        return tuple(constants.shape[:-block_axes])

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def layer(self, index: Any) -> "QTensor":
        """The weight of one layer of a stack; `index` may be traced."""
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), self)
