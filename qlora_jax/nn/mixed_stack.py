"""A stack whose layers have several formats, because the file leaves some in 16 bits or mixes formats.

Dimension key: L layers, S sparse layers, E experts, M rows, P slots (rows grouped by expert), K in, N out.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.formats.ggml_tensor import GgmlTensor, dequantize_ggml
from pallas_kernels.formats.qtensor import Leaf, QTensor
from pallas_kernels.frozen_product import Direction, Layer, differentiable
from pallas_kernels.ggml_matmul.api import product as ggml_product
from pallas_kernels.grouped_matmul import Groups
from pallas_kernels.grouped_matmul.api import product as grouped_product
from pallas_kernels.nf4_matmul.api import product as nf4_product
from qlora_jax.nn.matmul import dot_nn, dot_nt
from qlora_jax.quant import dequantize

Part = QTensor | GgmlTensor | Leaf  # a stack of layers of one format; dense: [layers, N, K] or [layers, E, N, K]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedStack:
    """Layers of several formats, each part in the order of its layers.

    Leaves:
      parts: a stack of the layers of each format.
    Static:
      layers: indices of the layers of each part, ascending.
    """

    parts: tuple[Part, ...]
    layers: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K) of one layer."""
        return tuple(self.parts[0].shape[-2:])

    @property
    def dtype(self) -> str:
        """Name of the compute dtype."""
        return str(self.parts[0].dtype)

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return sum(map(len, self.layers))

    def locate(self, layer: int) -> tuple[int, int]:
        """Returns (index of the part that holds a layer, index in that part)."""
        part = next(part for part, layers in enumerate(self.layers) if layer in layers)
        return part, self.layers[part].index(layer)

    def part_of(self, layer: int) -> Part:
        """Returns the part that holds a layer."""
        return self.parts[self.locate(layer)[0]]

    def with_part(self, index: int, part: Part) -> "MixedStack":
        """Returns the stack with one part replaced."""
        return dataclasses.replace(self, parts=(*self.parts[:index], part, *self.parts[index + 1 :]))

    def locate_traced(self, layer: Layer) -> tuple[jax.Array, jax.Array]:
        """Returns `locate` of a layer index that may be traced."""
        part_L, index_L = zip(*map(self.locate, range(self.num_layers)), strict=True)
        return jnp.asarray(part_L, jnp.int32)[layer], jnp.asarray(index_L, jnp.int32)[layer]

    def in_layer_order(self, results: Sequence[jax.Array]) -> jax.Array:
        """Joins results of the parts to [L, ...], in the order of the layers."""
        order = np.argsort(np.concatenate(self.layers))
        return jnp.concatenate(results)[order]


_dequantize_ggml = jax.jit(dequantize_ggml, static_argnames="dtype")


def dense_weight(weight: Part, dtype: DTypeLike | None = None) -> jax.Array:
    """Returns packed weights dequantized to `dtype` (default: their compute dtype), and dense ones unchanged."""
    if isinstance(weight, QTensor):
        return dequantize(weight, dtype=dtype or weight.dtype)
    return _dequantize_ggml(weight, dtype=dtype) if isinstance(weight, GgmlTensor) else weight


def layer_product(direction: Direction, rows: jax.Array, part: Part, layer: Layer) -> jax.Array:
    """Computes x W^T (forward) or dy W (backward) of one layer of a part, in the rows' dtype; unchecked."""
    if isinstance(part, QTensor):
        return nf4_product(direction, rows, part, layer)
    if isinstance(part, GgmlTensor):
        return ggml_product(direction, rows, part, layer)
    dot = dot_nt if direction == "forward" else dot_nn
    return dot(rows, part[layer].astype(rows.dtype), rows.dtype)


def _switch(weight: MixedStack, layer: Layer, product: Callable[[Part, jax.Array], jax.Array]) -> jax.Array:
    """Returns product(part, index in it) for the part that holds a layer."""
    part, index = weight.locate_traced(layer)
    return jax.lax.switch(part, [functools.partial(product, each, index) for each in weight.parts])


def mixed_linear(x_MK: Float[Array, "M K"], weight: MixedStack, layer: jax.Array | int) -> Float[Array, "M N"]:
    """Returns x W^T of one layer, in x's dtype; only x has a gradient.

    A `switch` chooses the part. The residuals are the whole stack and the index, so that a scan saves no copy of single
    layers.
    """
    return _linear(x_MK, weight, layer, None)


@differentiable
def _linear(direction: Direction, rows: jax.Array, weight: MixedStack, layer: Layer, _: str | None) -> jax.Array:
    return _switch(weight, layer, functools.partial(layer_product, direction, rows))


def mixed_grouped(
    x_PK: Float[Array, "P K"], weight: MixedStack, groups: Groups, layer: jax.Array | int
) -> Float[Array, "P N"]:
    """Returns the product of grouped rows with the experts of one layer, whose parts have the leading axes [S, E]."""
    return _grouped(x_PK, weight, (groups, layer), None)


@differentiable
def _grouped(
    direction: Direction, rows: jax.Array, weight: MixedStack, place: tuple[Groups, Layer], _: str | None
) -> jax.Array:
    groups, layer = place
    return _switch(weight, layer, lambda part, index: grouped_product(direction, rows, part, groups, index))
