"""Frozen weights of linear layers in any format: stacks of several formats, and what is computed with each format.

A dense weight is an array, so formats have no common class. `ops_of` finds a format's record of functions by its type.
A format from elsewhere needs a record in OPS, and nothing in the layers that use it.

Dimension key: L layers, S sparse layers, E experts, M rows, P slots (rows grouped by expert), K in, N out.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from pallas_kernels.dense_matmul import dot_nn, dot_nt
from pallas_kernels.devices import Device
from pallas_kernels.dispatch import Call, Choice
from pallas_kernels.formats.ggml_blocks import row_bytes
from pallas_kernels.formats.ggml_tensor import GgmlTensor, dequantize_ggml
from pallas_kernels.formats.qtensor import Leaf, QTensor
from pallas_kernels.frozen_product import FAST, Direction, Layer, differentiable
from pallas_kernels.ggml_matmul import api as ggml
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_matmul.api import product as grouped_product
from pallas_kernels.grouped_matmul.groups import Groups
from pallas_kernels.nf4_matmul import api as nf4
from qlora_jax.nn.variables import select_layer
from qlora_jax.quant import dequantize
from qlora_jax.sharding import AnyMesh, gathered, is_shard, stack_spec

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PaddedStack:
    """A stack of experts whose layers have blocks of several types, with as many bytes for each layer; or one, fetched.

    Layers shorter than the largest are padded. So the place of a layer follows from its index alone, and XLA for GPUs
    compiles the copy of a layer in host memory to a transfer by the copy engine. If layers followed each other without
    padding, that copy would be a kernel in the programs of training.

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OneLayer:
    """A weight of one layer in place of a stack: gathered from several devices, or fetched from host memory."""

    weight: QTensor | GgmlTensor | PaddedStack | Leaf


# Dense: [L, N, K] or [S, E, N, K]. In modules, a weight is a stack of all their layers.
Weight = QTensor | GgmlTensor | MixedStack | PaddedStack | jax.Array


def _dense_linear(x_MK: jax.Array, weight: jax.Array, layer: Layer | None, fast: bool) -> jax.Array:
    w_NK = select_layer(weight, layer)
    return dot_nt(x_MK, w_NK.astype(x_MK.dtype), x_MK.dtype)


def _dense_product(
    direction: Direction, rows: jax.Array, weight: jax.Array, layer: Layer, implementation: str | None
) -> jax.Array:
    dot = dot_nt if direction == "forward" else dot_nn
    return dot(rows, weight[layer].astype(rows.dtype), rows.dtype)


def _refuse(*_: object) -> jax.Array:
    raise AssertionError("this format computes with its parts, or with a layer that was fetched")


def _layer_grouped(x_PK: jax.Array, weight: PyTree, groups: Groups, layer: jax.Array | int) -> jax.Array:
    return grouped_matmul(x_PK, jax.tree.map(lambda leaf: leaf[None], weight), groups, 0)


def _put(stack: PyTree, layer: PyTree, place: tuple[int, ...]) -> None:
    for all_, values in zip(jax.tree.leaves(stack), jax.tree.leaves(layer), strict=True):
        all_[place] = np.asarray(values)


def _put_padded(stack: PaddedStack, layer: GgmlTensor, place: tuple[int, ...]) -> None:
    stack.codes[stack.place_of(*place)] = np.asarray(layer.codes).reshape(-1)


class WeightOps(NamedTuple):
    """The functions that compute with weights of one format.

    Fields:
      linear: (x [M, K], weight, layer, fast) -> x W^T in x's dtype, accumulated in f32; layer None: `weight` is one
        layer. `fast` allows products of integers, to which x is rounded, where the format has them.
      grouped: (x [P, K], stack, groups, layer) -> the product of grouped rows with the experts of a layer.
      grouped_layer: the same, given the weights of one layer; the layer says which it is.
      product: (direction, rows, stack, layer, FAST or None) -> x W^T (forward) or dy W (backward) in the rows' dtype,
        unchecked.
      dequantize: (weight, dtype) -> the dense weight; dtype None: the compute dtype.
      dense_layer: (stack, layer) -> the weight of a layer, dequantized in f32; layer None: `stack` is one layer.
      choice: (device, rows, dtype, stack) -> the implementation of `linear`; None: XLA multiplies.
      layout: stack -> the layout of 4-bit codes, which its layers are repacked to; None: blocks and dense weights.
      part: (stack, layer) -> (the stack of one format that has the layer, the layer's index in it).
      put: (stack of NumPy arrays, layer, (layer, expert) or (layer,)) -> None, with the weight at this place written.
      with_part: (stack, layer, part) -> the stack with the part of a layer replaced.
      per_layer: (function, stack) -> the function's results for stacks of one format, in the order of the layers.
      constants: the fields with constants of codes, which plans count apart from codes.
      is_cut: True if a mesh cuts its arrays; others are whole on each device.
      of_file: True if its codes are those of a file, which cannot be made from dense weights here.
    """

    linear: Callable[[jax.Array, PyTree, PyTree, bool], jax.Array]
    grouped: Callable[[jax.Array, PyTree, Groups, PyTree], jax.Array] = grouped_matmul
    grouped_layer: Callable[[jax.Array, PyTree, Groups, PyTree], jax.Array] = _layer_grouped
    product: Callable[[Direction, jax.Array, PyTree, Layer, str | None], jax.Array] = _refuse
    dequantize: Callable[[PyTree, DTypeLike | None], jax.Array] = _refuse
    dense_layer: Callable[[PyTree, Layer | None], jax.Array] = _refuse
    choice: Callable[[Device, int, str, PyTree], Choice] | None = None
    layout: Callable[[PyTree], str | None] = lambda stack: None
    part: Callable[[PyTree, int], tuple[PyTree, int]] = lambda stack, layer: (stack, layer)
    put: Callable[[PyTree, PyTree, tuple[int, ...]], None] = _put
    with_part: Callable[[PyTree, int, PyTree], PyTree] = lambda stack, layer, part: part
    per_layer: Callable[[Callable[[PyTree], jax.Array], PyTree], jax.Array] = lambda function, stack: function(stack)
    constants: frozenset[str] = frozenset()
    is_cut: bool = False
    of_file: bool = False


def ops_of(weight: PyTree) -> WeightOps:
    """Returns the functions of a weight's format; arrays, NumPy's, tracers and ShapeDtypeStructs are dense."""
    return OPS.get(type(weight), DENSE_OPS)


def is_packed(leaf: object) -> bool:
    """Returns True for a weight of several arrays or in codes, as `is_leaf` of jax.tree.map."""
    return type(leaf) in OPS


def frozen_linear(
    x_MK: Float[Array, "M K"], weight: Weight | OneLayer, layer: Layer | None, fast: bool = False
) -> Float[Array, "M N"]:
    """Returns x W^T in x's dtype, accumulated in f32, for one layer of a stack (None: `weight` is a single layer)."""
    return ops_of(weight).linear(x_MK, weight, layer, fast)


def frozen_grouped(
    x_PK: Float[Array, "P K"], weight: Weight | OneLayer, groups: Groups, layer: jax.Array | int
) -> Float[Array, "P N"]:
    """Returns the product of grouped rows with the experts of one layer; only x has a gradient."""
    return ops_of(weight).grouped(x_PK, weight, groups, layer)


def dense_weight(weight: Part, dtype: DTypeLike | None = None) -> jax.Array:
    """Returns packed weights dequantized to `dtype` (default: their compute dtype), and dense ones unchanged."""
    return ops_of(weight).dequantize(weight, dtype)


def weight_specs(weight: Weight, mesh: AnyMesh) -> PyTree:
    """Returns the PartitionSpec of every leaf of a weight: 4-bit stacks are cut, others are whole on each device."""
    is_cut = ops_of(weight).is_cut
    return jax.tree.map(lambda leaf: stack_spec(leaf.shape, mesh) if is_cut else P(), weight)


def gather_layer(base: PyTree, layer: jax.Array) -> PyTree:
    """Gathers one layer of each stack that is cut over devices; other stacks stay stacks."""

    def one(leaf: PyTree) -> PyTree:
        if not (ops_of(leaf).is_cut and any(map(is_shard, jax.tree.leaves(leaf, is_leaf=is_shard)))):
            return leaf
        return OneLayer(gathered(leaf.layer(layer)))

    return jax.tree.map(one, base, is_leaf=is_packed)


def _switch(weight: MixedStack, layer: Layer, product: Callable[[Part, jax.Array], jax.Array]) -> jax.Array:
    """Returns product(part, index in it) for the part that holds a layer."""
    part, index = weight.locate_traced(layer)
    return jax.lax.switch(part, [functools.partial(product, each, index) for each in weight.parts])


def mixed_linear(
    x_MK: Float[Array, "M K"], weight: MixedStack, layer: jax.Array | int, fast: bool
) -> Float[Array, "M N"]:
    """Returns x W^T of one layer, in x's dtype; only x has a gradient.

    A `switch` chooses the part. The residuals are the whole stack and the index, so that a scan saves no copy of single
    layers.
    """
    assert layer is not None, "a MixedStack is always a stack"
    return _mixed_linear(x_MK, weight, layer, FAST if fast else None)


@differentiable
def _mixed_linear(
    direction: Direction, rows: jax.Array, weight: MixedStack, layer: Layer, implementation: str | None
) -> jax.Array:
    return _switch(weight, layer, lambda part, at: ops_of(part).product(direction, rows, part, at, implementation))


def mixed_grouped(
    x_PK: Float[Array, "P K"], weight: MixedStack, groups: Groups, layer: jax.Array | int
) -> Float[Array, "P N"]:
    """Returns the product of grouped rows with the experts of one layer, whose parts have the leading axes [S, E]."""
    return _mixed_grouped(x_PK, weight, (groups, layer), None)


@differentiable
def _mixed_grouped(
    direction: Direction, rows: jax.Array, weight: MixedStack, place: tuple[Groups, jax.Array | int], _: str | None
) -> jax.Array:
    groups, layer = place
    return _switch(weight, layer, lambda part, index: grouped_product(direction, rows, part, groups, index))


def padded_grouped(
    x_PK: Float[Array, "P K"], fetched: PaddedStack, groups: Groups, layer: Int[Array, ""]
) -> Float[Array, "P N"]:
    """Returns the product of grouped rows with the experts of a layer that was fetched; only x has a gradient."""
    return _padded_grouped(x_PK, fetched, (groups, layer), None)


@differentiable
def _padded_grouped(
    direction: Direction, rows: jax.Array, fetched: PaddedStack, place: tuple[Groups, jax.Array | int], _: str | None
) -> jax.Array:
    groups, layer = place
    kinds = [*dict.fromkeys(fetched.types)]
    kind_S = jnp.asarray([kinds.index(each) for each in fetched.types], jnp.int32)
    products = [functools.partial(_padded_product, direction, each, groups) for each in kinds]
    return jax.lax.switch(kind_S[layer], products, rows, fetched)


def _padded_product(
    direction: Direction, ggml_type: str, groups: Groups, rows: jax.Array, fetched: PaddedStack
) -> jax.Array:
    return grouped_product(direction, rows, fetched.fetched_as(ggml_type), groups, 0)


def _of_one(x_MK: jax.Array, one: OneLayer, layer: Layer | None, fast: bool) -> jax.Array:
    return frozen_linear(x_MK, one.weight, None, fast)


def _experts_of_one(x_PK: jax.Array, one: OneLayer, groups: Groups, layer: jax.Array | int) -> jax.Array:
    return ops_of(one.weight).grouped_layer(x_PK, one.weight, groups, layer)


_dequantize_ggml = jax.jit(dequantize_ggml, static_argnames="dtype")

DENSE_OPS = WeightOps(
    linear=_dense_linear,
    product=_dense_product,
    dequantize=lambda weight, dtype: weight,
    dense_layer=lambda stack, layer: select_layer(stack, layer).astype(jnp.float32),
)
OPS: dict[type, WeightOps] = {
    QTensor: WeightOps(
        linear=lambda x, weight, layer, fast: nf4.nf4_matmul(x, weight, layer, FAST if fast else None),
        product=nf4.product,
        dequantize=lambda weight, dtype: dequantize(weight, dtype=dtype or weight.dtype),
        dense_layer=lambda stack, layer: nf4.dequantize_layer(stack, layer, jnp.float32),
        choice=lambda device, rows, dtype, stack: nf4.choose_implementation(
            device, Call.of("forward", rows, dtype, stack)
        ),
        layout=lambda stack: stack.layout,
        constants=frozenset({"absmax", "absmax_codes", "nested_absmax", "nested_offset"}),
        is_cut=True,
    ),
    GgmlTensor: WeightOps(
        linear=lambda x, weight, layer, fast: ggml.ggml_matmul(x, weight, layer),
        product=lambda direction, rows, stack, layer, fast: ggml.product(direction, rows, stack, layer),
        dequantize=lambda weight, dtype: _dequantize_ggml(weight, dtype=dtype),
        dense_layer=lambda stack, layer: ggml.dequantize_layer(stack, layer, jnp.float32),
        choice=lambda device, rows, dtype, stack: ggml.choose_implementation(
            device, ggml.call_of("forward", rows, dtype, stack)
        ),
        of_file=True,
    ),
    MixedStack: WeightOps(
        linear=mixed_linear,
        grouped=mixed_grouped,
        dense_layer=lambda stack, layer: _switch(stack, layer, lambda part, at: ops_of(part).dense_layer(part, at)),
        part=lambda stack, layer: (stack.part_of(layer), stack.locate(layer)[1]),
        with_part=lambda stack, layer, part: stack.with_part(stack.locate(layer)[0], part),
        per_layer=lambda function, stack: stack.in_layer_order([*map(function, stack.parts)]),
    ),
    PaddedStack: WeightOps(
        linear=_refuse,
        grouped=_refuse,
        grouped_layer=padded_grouped,
        part=lambda stack, layer: (stack.part_of(layer), layer),
        put=_put_padded,
    ),
    OneLayer: WeightOps(
        linear=_of_one,
        grouped=_experts_of_one,
        dense_layer=lambda one, layer: ops_of(one.weight).dense_layer(one.weight, None),
    ),
}
