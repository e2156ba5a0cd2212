"""PaddedStack: a stack of experts whose layers have blocks of several types, with as many bytes for each layer.

Layers shorter than the largest are padded. So the place of a layer follows from its index alone, and XLA for GPUs
compiles the copy of a layer in host memory to a transfer by the copy engine. If layers followed each other without
padding, that copy would be a kernel in the programs of training.

Dimension key: S sparse layers, E experts, N out, K in, P slots (rows grouped by expert).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.formats.ggml_blocks import row_bytes
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.formats.qtensor import Leaf
from pallas_kernels.frozen_product import Direction, Layer, differentiable
from pallas_kernels.grouped_matmul import Groups
from pallas_kernels.grouped_matmul.api import product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PaddedStack:
    """The blocks of all layers, or of one layer that was fetched.

    Leaf:
      codes: uint8 [S, bytes of the largest layer]; without the first axis if one layer was fetched.
    Static:
      types: the type of the blocks of each layer, keys of BLOCK_FORMATS.
      experts: E.
      shape: (N, K) of one expert.
      dtype: name of the compute dtype.
    """

    codes: Leaf
    types: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    experts: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})

    @classmethod
    def zeros(cls, types: tuple[str, ...], experts: int, shape: tuple[int, int], dtype: str) -> "PaddedStack":
        """Returns a stack of zeros."""
        largest = experts * shape[0] * max(row_bytes(each, shape[1]) for each in types)
        codes = jnp.zeros((len(types), largest), jnp.uint8)
        return cls(codes=codes, types=types, experts=experts, shape=shape, dtype=dtype)

    def place_of(self, layer: int, expert: int) -> tuple[int, slice]:
        """Returns the index of an expert's blocks in `codes`."""
        size = self.shape[0] * row_bytes(self.types[layer], self.shape[1])
        return layer, slice(expert * size, (expert + 1) * size)

    def part_of(self, layer: int) -> GgmlTensor:
        """Returns the description of a layer, whose codes are a ShapeDtypeStruct."""
        codes = jax.ShapeDtypeStruct(self._shape_of(self.types[layer]), jnp.uint8)
        return GgmlTensor(codes=codes, ggml_type=self.types[layer], shape=self.shape, dtype=self.dtype)

    def fetched_as(self, ggml_type: str) -> GgmlTensor:
        """Returns the layer that was fetched as a stack of one layer, if it has this type."""
        shape = self._shape_of(ggml_type)
        codes = self.codes[: shape[1] * shape[2] * shape[3]].reshape(shape)
        return GgmlTensor(codes=codes, ggml_type=ggml_type, shape=self.shape, dtype=self.dtype)

    def _shape_of(self, ggml_type: str) -> tuple[int, int, int, int]:
        return 1, self.experts, self.shape[0], row_bytes(ggml_type, self.shape[1])


def padded_grouped(
    x_PK: Float[Array, "P K"], fetched: PaddedStack, groups: Groups, layer: Int[Array, ""]
) -> Float[Array, "P N"]:
    """Returns the product of grouped rows with the experts of a layer that was fetched; only x has a gradient."""
    return _grouped(x_PK, fetched, (groups, layer), None)


@differentiable
def _grouped(
    direction: Direction, rows: jax.Array, fetched: PaddedStack, place: tuple[Groups, Layer], _: str | None
) -> jax.Array:
    groups, layer = place
    kinds = [*dict.fromkeys(fetched.types)]
    kind_S = jnp.asarray([kinds.index(each) for each in fetched.types], jnp.int32)
    products = [functools.partial(_product, direction, each, groups) for each in kinds]
    return jax.lax.switch(kind_S[layer], products, rows, fetched)


def _product(direction: Direction, ggml_type: str, groups: Groups, rows: jax.Array, fetched: PaddedStack) -> jax.Array:
    return product(direction, rows, fetched.fetched_as(ggml_type), groups, 0)
