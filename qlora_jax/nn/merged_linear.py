"""Products with the codes of merged weights: training computes with the weights that an export will store.

The weight of a layer is Q(merge(W)): W is the dequantized frozen weight, `merge` that of the adapter, and Q the
quantizer of an export. Gradients pass Q as if it changed nothing. The backward pass makes the codes again.

The codes of a step, of decoding and of an export must be equal. Compilers may fuse a product with the addition after
it, which then rounds once instead of twice. Barriers separate the parts, so that they compute the same everywhere.

Dimension key: L layers, M tokens, K in, N out.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from pallas_kernels.dense_matmul import dot_tn
from pallas_kernels.devices import target_device
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.formats.layouts import repack
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.frozen_product import Direction
from pallas_kernels.nf4_matmul.preferred_layout import preferred_layout
from qlora_jax.nn.frozen_weight import MixedStack, OneLayer, Part, Weight, dense_weight, ops_of
from qlora_jax.nn.linear import FrozenLayer
from qlora_jax.quant.encoders import ENCODERS

Kinds = tuple[str, ...]  # the format of each layer, keys of ENCODERS
Position = Int[Array, ""] | int


@runtime_checkable
class Merges(Protocol):
    """An adapter of one layer, or what stands for one."""

    def merge(self, weight: jax.Array) -> jax.Array:
        """Returns the f32 weight that computes the same as `weight` with the adapter."""
        ...


@runtime_checkable
class MergesInTraining(Merges, Protocol):
    """An adapter whose gradients pass the quantizer."""

    @staticmethod
    def apply(
        adapters: Sequence, x_MK: jax.Array, frozen: Sequence[FrozenLayer], keys: Sequence[jax.Array | None]
    ) -> list[jax.Array]:
        """Returns the results of layers with the adapters apart; see `LinearAdapter`."""
        ...

    def straight_through(self, x_MK: jax.Array, dy_MN: jax.Array) -> Mapping[str, jax.Array] | None:
        """Returns the gradients of its trained arrays without one of the weight; None: it needs that of the weight."""
        ...


class _Unchanged(nnx.Module):
    """In place of an adapter: the frozen weight alone is quantized."""

    def merge(self, weight: jax.Array) -> jax.Array:
        """Returns the weight."""
        return weight


@dataclasses.dataclass(frozen=True)
class MergedCodes:
    """The products of a projection with the codes of its merged weights.

    Attributes:
      kinds: the format of each layer of the stack.
    """

    kinds: Kinds

    def product(
        self,
        x_MK: Float[Array, "M K"],
        adapter: MergesInTraining,
        weight: Weight | OneLayer,
        layer: Position,
        rounds: Bool[Array, ""] | None = None,
    ) -> Float[Array, "M N"]:
        """Returns x Q(merge(W))^T in x's dtype, differentiable in x and in the adapter's trained arrays.

        Args:
          adapter: of this layer; its frozen arrays may be stacked.
          rounds: False: the product with weight and adapter apart, as without Q; None: True.
        """
        graphdef, trained, fixed = nnx.split(adapter, nnx.LoRAParam, ...)
        return _product(x_MK, trained, (fixed, weight, layer, rounds), graphdef, self.kinds)

    def stack(self, weight: Weight, adapter: nnx.Module | None) -> Weight:
        """Returns the codes of a whole stack, with an adapter of all layers merged if there is one.

        Args:
          weight: with one leading axis of layers, or with axes of layers and experts.
        """
        graphdef, trained, fixed = nnx.split(_Unchanged() if adapter is None else adapter, nnx.LoRAParam, ...)
        of = {kind: tuple(at for at, each in enumerate(self.kinds) if each == kind) for kind in self.kinds}
        parts = tuple(
            _coded_layers(trained, fixed, weight, np.asarray(layers, np.int32), graphdef=graphdef, kind=kind)
            for kind, layers in of.items()
        )
        return parts[0] if len(parts) == 1 else MixedStack(parts=parts, layers=tuple(of.values()))


# (the adapter's frozen arrays, the stack or one layer of it, the layer, `rounds`)
Frozen = tuple[nnx.State, PyTree, Position, jax.Array | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x_MK: jax.Array, trained: nnx.State, frozen: Frozen, graphdef: nnx.GraphDef, kinds: Kinds) -> jax.Array:
    return _forward(x_MK, trained, frozen, graphdef, kinds)[0]


def _forward(x_MK, trained, frozen, graphdef, kinds):
    rounded = functools.partial(_one_way, "forward", x_MK, trained, frozen, graphdef, kinds)
    y_MN = _either(frozen, rounded, lambda: _apart(x_MK, trained, frozen, graphdef))
    return y_MN, (x_MK, trained, frozen)


def _backward(graphdef, kinds, residuals, dy_MN):
    x_MK, trained, frozen = residuals

    def rounded():
        dx_MK = _one_way("backward", dy_MN, trained, frozen, graphdef, kinds)
        fixed, weight, layer, _ = frozen
        with jax.named_scope("lora"):
            given = nnx.merge(graphdef, trained, fixed).straight_through(x_MK, dy_MN)
            if given is not None:
                pairs = [(path, leaf.replace(given[path[-1]])) for path, leaf in nnx.to_flat_state(trained)]
                return dx_MK, nnx.from_flat_state(pairs)
            weight_NK = ops_of(weight).dense_layer(weight, layer)
            _, gradient = jax.vjp(lambda leaves: nnx.merge(graphdef, leaves, fixed).merge(weight_NK), trained)
            return dx_MK, *gradient(dot_tn(dy_MN, x_MK))

    def apart():
        return jax.vjp(lambda x_MK, leaves: _apart(x_MK, leaves, frozen, graphdef), x_MK, trained)[1](dy_MN)

    return *_either(frozen, rounded, apart), None


def _either[T](frozen: Frozen, rounded: Callable[[], T], apart: Callable[[], T]) -> T:
    rounds = frozen[3]
    return rounded() if rounds is None else jax.lax.cond(rounds, rounded, apart)


def _apart(x_MK: jax.Array, trained: nnx.State, frozen: Frozen, graphdef: nnx.GraphDef) -> jax.Array:
    """Returns the product of a layer without a bias as it is without `lora.merge_into`."""
    fixed, weight, layer, _ = frozen
    adapter = nnx.merge(graphdef, trained, fixed)
    return type(adapter).apply([adapter], x_MK, [FrozenLayer(weight, None, layer)], [None])[0]


_product.defvjp(_forward, _backward)


def _one_way(
    direction: Direction, rows: jax.Array, trained: nnx.State, frozen: Frozen, graphdef: nnx.GraphDef, kinds: Kinds
) -> jax.Array:
    """Returns x Q^T forward, dy Q backward."""
    fixed, weight, layer, _ = frozen

    def product(kind: str) -> jax.Array:
        with jax.named_scope("merge"):
            weight_NK = ops_of(weight).dense_layer(weight, layer)
            codes = _codes(kind, nnx.merge(graphdef, trained, fixed), weight_NK, str(rows.dtype))
        with jax.named_scope("frozen"):
            return ops_of(codes).product(direction, rows, codes, None, None)

    used = [*dict.fromkeys(kinds)]
    if len(used) == 1:
        return product(used[0])
    place_L = jnp.asarray([used.index(kind) for kind in kinds], jnp.int32)
    return jax.lax.switch(place_L[layer], [functools.partial(product, kind) for kind in used])


def _codes(kind: str, adapter: Merges, weight_NK: jax.Array, dtype: str) -> QTensor | GgmlTensor:
    adapter, weight_NK = jax.lax.optimization_barrier((adapter, weight_NK))
    merged_NK = jax.lax.optimization_barrier(adapter.merge(weight_NK))
    # Without the last barrier, XLA would encode a block again for each weight that it decodes.
    return jax.lax.optimization_barrier(dataclasses.replace(ENCODERS[kind](merged_NK), dtype=dtype))


@functools.partial(jax.jit, static_argnames=("graphdef", "kind"))
def _coded_layers(
    trained: nnx.State,
    fixed: nnx.State,
    weight: Weight,
    layers: jax.Array | np.ndarray,
    *,
    graphdef: nnx.GraphDef,
    kind: str,
) -> Part:
    dtype = str(weight.dtype)

    def one(given: tuple[jax.Array, nnx.State]) -> Part:
        layer, own = given
        return _codes(kind, nnx.merge(graphdef, own, fixed), ops_of(weight).dense_layer(weight, layer), dtype)

    own = jax.tree.map(lambda leaf: leaf[layers], trained)
    return _in_preferred_layout(jax.lax.map(one, (layers, own)))


def _in_preferred_layout(codes: Part) -> Part:
    if not isinstance(codes, QTensor):
        return codes
    return repack(codes, preferred_layout(target_device().platform, codes.shape, codes.block_size))


def rounded_table(table: Float[Array, "V D"], kind: str) -> Float[Array, "V D"]:
    """Returns the table that the codes of a table stand for, in its dtype."""
    return _rounded_table(table, kind)


_rounded_table: Callable[[jax.Array, str], jax.Array] = jax.jit(
    lambda table, kind: dense_weight(ENCODERS[kind](table.astype(jnp.float32)), table.dtype), static_argnums=1
)
