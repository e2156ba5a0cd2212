"""The frozen linear layer, with or without an adapter.

Dimension key: L layers, B rows of the batch, M tokens, K in, N out.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import jax
from flax import nnx
from jaxtyping import Array, Float, PyTree

from qlora_jax.nn.frozen_weight import OneLayer, Weight, frozen_linear
from qlora_jax.nn.random_keys import fold_in_each, name_number
from qlora_jax.nn.variables import Frozen, TrainedLeaf, select_layer
from qlora_jax.sharding import AnyMesh


def in_host_memory(leaf: PyTree) -> bool:
    """Returns True if any of these arrays, tracers or ShapeDtypeStructs is in host memory."""
    return any(jax.typeof(each).memory_space == jax.memory.Space.Host for each in jax.tree.leaves(leaf))


@dataclasses.dataclass(frozen=True)
class FrozenLayer:
    """One layer of a frozen linear, x W^T + b, and its separate terms.

    Attributes:
      weight: a stack of layers, or a single layer.
      bias: [L, N] or [N].
      layer: index in the stack; None: `weight` and `bias` are a single layer.
      fast: allows products that round x to 8 bits.
    """

    weight: Weight | OneLayer
    bias: Float[Array, "*L N"] | None
    layer: jax.Array | int | None
    fast: bool = False

    def __call__(self, x_MK: Float[Array, "M K"]) -> Float[Array, "M N"]:
        """Returns x W^T + b."""
        return self.biased(self.product(x_MK))

    def product(self, x_MK: Float[Array, "M K"]) -> Float[Array, "M N"]:
        """Returns x W^T."""
        with jax.named_scope("frozen"):
            return frozen_linear(x_MK, self.weight, self.layer, self.fast)

    def biased(self, y_MN: Float[Array, "M N"]) -> Float[Array, "M N"]:
        """Returns y + b."""
        if self.bias is None:
            return y_MN
        bias_N = select_layer(self.bias, self.layer)
        return y_MN + bias_N.astype(y_MN.dtype)[None]


class BatchedAdapter(nnx.Module):
    """Adapters of one method and several runs on one projection, for tokens that each have one of them or none.

    Leaves are `Frozen` and have all layers. `own_M` is the number of each token's adapter. Other tokens, among them
    those of other methods' adapters, keep their bits.
    """

    def on_input(self, x_MK: jax.Array, layer: jax.Array | int | None, own_M: jax.Array) -> jax.Array:
        """Returns what the frozen layer multiplies."""
        return x_MK

    def on_product(
        self, y_MN: jax.Array, x_MK: jax.Array, layer: jax.Array | int | None, own_M: jax.Array
    ) -> jax.Array:
        """Returns the layer's product, changed before the bias is added."""
        return y_MN

    def on_result(self, y_MN: jax.Array, x_MK: jax.Array, layer: jax.Array | int | None, own_M: jax.Array) -> jax.Array:
        """Returns the layer's result, changed after the bias is added."""
        return y_MN


class LinearAdapter(nnx.Module):
    """Trained module on top of a frozen linear layer, or in place of it.

    Inside the scan over layers, leaves have the values of one layer, while frozen leaves stay stacked.

    Attributes:
      LEAVES: its trained arrays.
      SAVED: its names of `checkpoint_name`, whose values the remat policy `names` saves for the backward pass.
      for_batch: makes one module of the adapters of several runs on a projection. It gets results of `for_decoding`, or
        None for runs without one, and the number of layers of the stack. None: the method has no such form.
    """

    LEAVES: ClassVar[tuple[TrainedLeaf, ...]]
    SAVED: ClassVar[tuple[str, ...]] = ()
    for_batch: ClassVar[Callable[[Sequence, int], BatchedAdapter] | None] = None

    @staticmethod
    @abc.abstractmethod
    def apply(
        adapters: Sequence, x_MK: jax.Array, frozen: Sequence[FrozenLayer], keys: Sequence[jax.Array | None]
    ) -> list[jax.Array]:
        """Returns the results of several layers that read the same x.

        Each layer has its adapter of this kind, its frozen layer, and a dropout key per row of the batch (None: no
        dropout).
        """

    @abc.abstractmethod
    def select_layer(self, layer: int) -> "LinearAdapter":
        """Returns the adapter of one layer of the stack."""

    @abc.abstractmethod
    def merge(self, weight: jax.Array) -> jax.Array:
        """Returns the f32 weight that computes the same as `weight` with this adapter of one layer."""

    def merge_bias(self, bias: jax.Array) -> jax.Array:
        """Returns the bias that belongs to the merged weight."""
        return bias

    def straight_through(self, x_MK: jax.Array, dy_MN: jax.Array) -> Mapping[str, jax.Array] | None:
        """Returns its gradients in products with codes of the merged weight; None: those of `merge` from dW."""
        return None

    def for_decoding(self, weight: Weight, mesh: AnyMesh | None) -> "LinearAdapter":
        """Returns the adapter for many calls of few tokens, with what they share computed once."""
        return self


@runtime_checkable
class Merging(Protocol):
    """Computes with codes of merged weights in place of weight and adapter (nn/merged_linear.py)."""

    def product(
        self,
        x_MK: jax.Array,
        adapter: LinearAdapter,
        weight: Weight | OneLayer,
        layer: jax.Array | int,
        rounds: jax.Array | None,
    ) -> jax.Array:
        """Returns the product of x with the codes of one layer's merged weight."""
        ...

    def stack(self, weight: Weight, adapter: LinearAdapter | None) -> Weight:
        """Returns the codes of all layers."""
        ...


class ModuleAdapter(Protocol):
    """Adapter behind a whole module, such as attention."""

    def __call__(self, x_MD: jax.Array) -> jax.Array:
        """Returns the module's result with the adapter's change."""
        ...


class QLinear(nnx.Module):
    """y = x W^T + b with W frozen, through an adapter if one is set.

    Args:
      name: the Hugging Face name without the layer's index; dropout keys are folded from it.
      weight: a stack of layers.
      bias: [L, N], or None.
    """

    def __init__(self, name: str, weight: Weight, bias: Float[Array, "L N"] | None):
        self.name = name
        self.weight = Frozen(weight)
        self.bias = None if bias is None else Frozen(bias)
        self.adapter: LinearAdapter | None = nnx.data(None)  # data: an adapter may be set later
        self.fast = False  # decoding may set it (inference.fast_decoding)
        self.merging: Merging | None = None  # with lora.merge_into (methods/merge_into.py)
        self.rounds: Frozen | None = nnx.data(None)  # with lora.merge_from: a boolean, False before its first step

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of one layer."""
        out_features, in_features = self.weight.get_value().shape[-2:]
        return out_features, in_features

    def select_layer(self, layer: jax.Array | int) -> FrozenLayer:
        """Returns one layer without the adapter."""
        bias = None if self.bias is None else self.bias[...]
        return FrozenLayer(self.weight.get_value(), bias, layer, self.fast)

    def __call__(self, x_MK: Float[Array, "M K"], layer: jax.Array, keys_B: jax.Array | None) -> Float[Array, "M N"]:
        """Returns the layer's result, with the adapter if one is set."""
        return project([self], x_MK, layer, keys_B)[0]

    def merged(self, x_MK: Float[Array, "M K"], layer: jax.Array) -> Float[Array, "M N"]:
        """Returns the layer's result, computed with the codes of the merged weight."""
        assert self.merging is not None and self.adapter is not None
        rounds = None if self.rounds is None else self.rounds[...]
        y_MN = self.merging.product(x_MK, self.adapter, self.weight.get_value(), layer, rounds)
        if self.bias is None:
            return y_MN
        bias_N = self.adapter.merge_bias(select_layer(self.bias[...], layer))
        return y_MN + bias_N.astype(y_MN.dtype)[None]

    def replace_by_codes(self) -> None:
        """Replaces weight and adapter by the codes of the merged weight."""
        assert self.merging is not None
        self.weight = Frozen(self.merging.stack(self.weight.get_value(), self.adapter))
        if self.adapter is not None and self.bias is not None:
            graphdef, trained, fixed = nnx.split(self.adapter, nnx.LoRAParam, ...)
            of_layer = jax.vmap(lambda own, bias_N: nnx.merge(graphdef, own, fixed).merge_bias(bias_N))
            self.bias = Frozen(of_layer(trained, self.bias[...]))
        self.adapter = self.merging = self.rounds = None


def project(
    linears: Sequence[QLinear], x_MK: Float[Array, "M K"], layer: jax.Array, keys_B: jax.Array | None
) -> list[jax.Array]:
    """Returns the result of each linear for one x; adapters of one kind are applied together and may share work."""
    results: dict[str, jax.Array] = {}
    for kind in dict.fromkeys(type(linear.adapter) for linear in linears):
        alike = [linear for linear in linears if type(linear.adapter) is kind]
        frozen = [linear.select_layer(layer) for linear in alike]
        if kind is type(None):
            ys = [one(x_MK) for one in frozen]
        elif alike[0].merging:
            ys = [linear.merged(x_MK, layer) for linear in alike]
        else:
            keys = [None if keys_B is None else fold_in_each(keys_B, name_number(linear.name)) for linear in alike]
            ys = kind.apply([linear.adapter for linear in alike], x_MK, frozen, keys)
        results |= {linear.name: y for linear, y in zip(alike, ys, strict=True)}
    return [results[linear.name] for linear in linears]
