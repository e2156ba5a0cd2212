"""The frozen linear layer, with an adapter or without.

Dimension key: L layers, M rows, K in, N out.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.nf4_matmul import nf4_matmul
from qlora_jax.nn.matmul import dot_nt
from qlora_jax.nn.mixed_stack import MixedStack, mixed_linear
from qlora_jax.nn.variables import Frozen, select_layer

Weight = QTensor | MixedStack | jax.Array  # a stack: 4-bit, in part 4-bit, or dense [L, N, K]


def frozen_linear(x_MK: Float[Array, "M K"], weight: Weight, layer: jax.Array | int | None) -> Float[Array, "M N"]:
    """x W^T for one layer of a stack (None: `weight` is a single layer), accumulated in f32, in x's dtype."""
    if isinstance(weight, QTensor):
        return nf4_matmul(x_MK, weight, layer)
    if isinstance(weight, MixedStack):
        assert layer is not None, "a MixedStack is always a stack"
        return mixed_linear(x_MK, weight, layer)
    w_NK = select_layer(weight, layer)
    return dot_nt(x_MK, w_NK.astype(x_MK.dtype), x_MK.dtype)


@dataclasses.dataclass(frozen=True)
class FrozenLayer:
    """One layer of a frozen linear, x W^T + b, and its parts.

    Attributes:
      weight: a stack of layers, or a single layer.
      bias: [L, N] or [N].
      layer: index in the stack; None: `weight` and `bias` are a single layer.
    """

    weight: Weight
    bias: Float[Array, "*L N"] | None
    layer: jax.Array | int | None

    def __call__(self, x_MK: Float[Array, "M K"]) -> Float[Array, "M N"]:
        """x W^T + b."""
        return self.biased(self.product(x_MK))

    def product(self, x_MK: Float[Array, "M K"]) -> Float[Array, "M N"]:
        """x W^T."""
        with jax.named_scope("frozen"):
            return frozen_linear(x_MK, self.weight, self.layer)

    def biased(self, y_MN: Float[Array, "M N"]) -> Float[Array, "M N"]:
        """y + b."""
        if self.bias is None:
            return y_MN
        bias_N = select_layer(self.bias, self.layer)
        return y_MN + bias_N.astype(y_MN.dtype)[None]


@runtime_checkable
class Adapter(Protocol):
    """What trains on top of frozen linear layers; the layers know nothing else of it.

    Its leaves that train are `nnx.LoRAParam`s; inside the scan over layers they are one layer's, and others are stacks.
    """

    @staticmethod
    def apply(
        adapters: Sequence, x_MK: jax.Array, frozen: Sequence[FrozenLayer], keys: Sequence[jax.Array | None]
    ) -> list[jax.Array]:
        """The results of several layers that read the same x, each with its adapter of this kind, its frozen layer, and
        its key of dropout (None: no dropout)."""
        ...

    def select_layer(self, layer: int) -> "Adapter":
        """The adapter of one layer of the stack."""
        ...

    def merge(self, weight: jax.Array) -> jax.Array:
        """The weight, in f32, that does the same as `weight` with this adapter of one layer."""
        ...

    def merge_bias(self, bias: jax.Array) -> jax.Array:
        """The bias that belongs to the merged weight."""
        ...


class QLinear(nnx.Module):
    """y = x W^T + b, with W frozen, through an adapter where one is set.

    Args:
      name: the Hugging Face name with the layer's index left out; dropout keys are folded from it.
    """

    def __init__(self, name: str, weight: Weight, bias: Float[Array, "L N"] | None):
        self.name = name
        self.weight = Frozen(weight)
        self.bias = None if bias is None else Frozen(bias)
        self.adapter: Adapter | None = nnx.data(None)  # data: an adapter may be set later

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of one layer."""
        out_features, in_features = self.weight.get_value().shape[-2:]
        return out_features, in_features

    def select_layer(self, layer: jax.Array | int) -> FrozenLayer:
        """One layer without the adapter."""
        bias = None if self.bias is None else self.bias[...]
        return FrozenLayer(self.weight.get_value(), bias, layer)

    def __call__(self, x_MK: Float[Array, "M K"], layer: jax.Array, key: jax.Array | None) -> Float[Array, "M N"]:
        """The result with the adapter, where one is set."""
        return project([self], x_MK, layer, key)[0]


def project(
    linears: Sequence[QLinear], x_MK: Float[Array, "M K"], layer: jax.Array, key: jax.Array | None
) -> list[jax.Array]:
    """What each of `linears` makes of the same x; adapters of one kind see x together, and may share work."""
    results: dict[str, jax.Array] = {}
    for kind in dict.fromkeys(type(linear.adapter) for linear in linears):
        alike = [linear for linear in linears if type(linear.adapter) is kind]
        frozen = [linear.select_layer(layer) for linear in alike]
        if kind is type(None):
            ys = [one(x_MK) for one in frozen]
        else:
            keys = [None if key is None else named_key(key, linear.name) for linear in alike]
            ys = kind.apply([linear.adapter for linear in alike], x_MK, frozen, keys)
        results |= {linear.name: y for linear, y in zip(alike, ys, strict=True)}
    return [results[linear.name] for linear in linears]


def named_key(key: jax.Array, name: str) -> jax.Array:
    """A key that belongs to `name` alone, whatever else is drawn."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
