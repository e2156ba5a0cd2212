"""QTensor: a 4-bit weight and its block constants, as a pytree.

Dimension key: N out, K in, B block_size, G = K / B blocks per row, E elements of `shape`; `...` stacked layers.
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
    """A quantized weight: w[n, k] = table[code(n, k)] * absmax[block(n, k)], in blocks of `block_size` columns.

    The equation of `layout` reads `code` from `codes` (pallas_kernels.formats.layouts). The constants are either
    `absmax` itself, or double-quantized:
    `absmax = map8[absmax_codes] * nested_absmax[block // nested_block_size] + nested_offset`, with `map8` the signed
    dynamic 8-bit map and `block` counted over the flattened weight, whatever the layout.

    Leaves (leading axes, the same on all, are stacked layers):
      codes: uint8, in the shape of the layout.
      absmax: f32 [..., N, G] (`split_k`: [..., G, N], `flat`: [..., ceil(E/B)]), or None if double-quantized.
      absmax_codes: uint8, in the shape of absmax, or None.
      nested_absmax: f32 [..., ceil(blocks/nested_block_size)], or None.
      nested_offset: f32 [...], one per weight, or None.
    Static:
      quant_type: a key of pallas_kernels.formats.tables.CODE_TABLES.
      shape: the shape of one weight, (N, K) in the orientation of Hugging Face.
      dtype: name of the dtype before quantization.

    Nothing is validated here, because leaves may be tracers or ShapeDtypeStructs. Constructors validate.
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
        """True if the block constants are themselves quantized to 8 bits."""
        return self.absmax_codes is not None

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The leading axes: (layers,) of a stack, () of a single weight."""
        constants = self.absmax_codes if self.double_quant else self.absmax
        block_axes = 1 if self.layout == "flat" else 2
        return tuple(constants.shape[:-block_axes])

    @property
    def nbytes(self) -> int:
        """The bytes of all leaves."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def layer(self, index: int | jax.Array) -> "QTensor":
        """Returns the weight of one layer of a stack; `index` may be traced."""
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), self)
