"""JoinedStack: a stack of experts whose layers have blocks of several types, in one array, which one copy reads.

Layers follow each other without padding, the largest last. A window as large as the largest layer therefore starts
at any layer without reaching beyond the array.

Dimension key: S sparse layers, E experts, N out, K in, P slots (rows grouped by expert), W rows of a window, U bytes
per row of the array.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.formats.ggml_blocks import row_bytes
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.formats.qtensor import Leaf
from pallas_kernels.frozen_product import Direction, Layer, differentiable
from pallas_kernels.grouped_matmul import Groups
from pallas_kernels.grouped_matmul.api import product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinedStack:
    """The blocks of all layers, or the window of one layer that `window` returns.

    Leaf:
      codes: uint8 [rows, U], where U divides the bytes of every layer; [W, U] in a window.
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
    def zeros(cls, types: tuple[str, ...], experts: int, shape: tuple[int, int], dtype: str) -> "JoinedStack":
        """Returns a stack of zeros."""
        unit = experts * shape[0] * math.gcd(*(row_bytes(each, shape[1]) for each in types))
        empty = cls(codes=jnp.zeros((0, unit), jnp.uint8), types=types, experts=experts, shape=shape, dtype=dtype)
        rows = sum(map(empty.rows_of, types))
        return dataclasses.replace(empty, codes=jnp.zeros((rows, unit), jnp.uint8))

    def rows_of(self, ggml_type: str) -> int:
        """Returns the rows of a layer of this type."""
        return self.experts * self.shape[0] * row_bytes(ggml_type, self.shape[1]) // self.codes.shape[-1]

    @property
    def window_rows(self) -> int:
        """Returns W, the rows of the largest layer."""
        return max(map(self.rows_of, self.types))

    @property
    def starts(self) -> tuple[int, ...]:
        """Returns the first row of each layer. Layers of a type are neighbours, in their order."""
        order = sorted(range(len(self.types)), key=lambda layer: (self.rows_of(self.types[layer]), self.types[layer]))
        ends = np.cumsum([self.rows_of(self.types[layer]) for layer in order])
        found = {layer: int(end) - self.rows_of(self.types[layer]) for layer, end in zip(order, ends, strict=True)}
        return tuple(found[layer] for layer in range(len(self.types)))

    def start(self, layer: Int[Array, ""] | int) -> Int[Array, ""]:
        """Returns the first row of a layer; outside of the stack, of the nearest layer.

        It is computed by comparing, because XLA for GPUs makes a kernel of a copy whose place is read from an array.
        """
        first, *others = self.starts
        steps = zip(self.starts, others, strict=False)
        later = [jnp.where(jnp.asarray(layer) >= at, to - here, 0) for at, (here, to) in enumerate(steps, 1)]
        return sum(later, jnp.int32(first))

    def bytes_of(self, layer: int, expert: int) -> slice:
        """Returns the place of an expert's blocks among the bytes of the whole array."""
        size = self.shape[0] * row_bytes(self.types[layer], self.shape[1])
        first = self.starts[layer] * self.codes.shape[-1] + expert * size
        return slice(first, first + size)

    def part_of(self, layer: int) -> GgmlTensor:
        """Returns the description of a layer, whose codes are a ShapeDtypeStruct."""
        return self._as_layer(self.types[layer], lambda shape: jax.ShapeDtypeStruct(shape, jnp.uint8))

    def in_window(self, ggml_type: str) -> GgmlTensor:
        """Returns the layer in a window as a stack of one layer, if it has this type."""
        return self._as_layer(ggml_type, self.codes[: self.rows_of(ggml_type)].reshape)

    def _as_layer(self, ggml_type: str, codes: Callable[[tuple[int, ...]], Leaf]) -> GgmlTensor:
        shape = 1, self.experts, self.shape[0], row_bytes(ggml_type, self.shape[1])
        return GgmlTensor(codes=codes(shape), ggml_type=ggml_type, shape=self.shape, dtype=self.dtype)


def joined_grouped(
    x_PK: Float[Array, "P K"], window: JoinedStack, groups: Groups, layer: Int[Array, ""]
) -> Float[Array, "P N"]:
    """Returns the product of grouped rows with the experts of the layer in a window; only x has a gradient."""
    return _grouped(x_PK, window, (groups, layer), None)


@differentiable
def _grouped(
    direction: Direction, rows: jax.Array, window: JoinedStack, place: tuple[Groups, Layer], _: str | None
) -> jax.Array:
    groups, layer = place
    kinds = [*dict.fromkeys(window.types)]
    kind_S = jnp.asarray([kinds.index(each) for each in window.types], jnp.int32)
    return jax.lax.switch(
        kind_S[layer], [functools.partial(_one_layer, direction, each, groups) for each in kinds], rows, window
    )


def _one_layer(direction: Direction, ggml_type: str, groups: Groups, rows: jax.Array, window: JoinedStack) -> jax.Array:
    return product(direction, rows, window.in_window(ggml_type), groups, 0)
