"""The frozen linear layer, with an adapter or without.

Dimension key: L layers, M rows, K in, N out.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.nf4_matmul import nf4_matmul
from qlora_jax.nn.dots import dot_nt
from qlora_jax.nn.variables import Frozen, of_layer

Product = Callable[[jax.Array], jax.Array]  # [M, K] -> [M, N]


@runtime_checkable
class Adapter(Protocol):
    """What trains on top of frozen linear layers; the layers know nothing else of it."""

    @staticmethod
    def apply(
        adapters: Sequence, x_MK: jax.Array, frozen: Sequence[Product], keys: Sequence[jax.Array | None]
    ) -> list[jax.Array]:
        """The results of several layers that read the same x, each with its adapter of this kind, its frozen product
        as a function of x, and its key of dropout (None: no dropout)."""
        ...

    def of_layer(self, layer: int) -> "Adapter":
        """The adapter of one layer of the stack."""
        ...

    def merge(self, weight: jax.Array) -> jax.Array:
        """The weight that does the same as `weight` with this adapter."""
        ...


def frozen_linear(x_MK: Float[Array, "M K"], weight: QTensor | jax.Array, layer: jax.Array) -> Float[Array, "M N"]:
    """x W^T for one layer of a stack, 4-bit or dense, accumulated in f32, in x's dtype."""
    if isinstance(weight, QTensor):
        return nf4_matmul(x_MK, weight, layer)
    w_NK = jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False)
    return dot_nt(x_MK, w_NK.astype(x_MK.dtype), x_MK.dtype)


class QLinear(nnx.Module):
    """y = x W^T + b, with W frozen (a QTensor stack, or dense [L, N, K]), through an adapter where one is set.

    Args:
      name: the Hugging Face name with the layer's index left out; dropout keys are folded from it.
    """

    def __init__(self, name: str, weight: QTensor | jax.Array, bias: Float[Array, "L N"] | None):
        self.name = name
        self.weight = Frozen(weight)
        self.bias = None if bias is None else Frozen(bias)
        self.adapter: Adapter | None = nnx.data(None)  # data: an adapter may be set later

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of one layer."""
        out_features, in_features = self.weight.get_value().shape[-2:]
        return out_features, in_features

    def frozen(self, x_MK: Float[Array, "M K"], layer: jax.Array) -> Float[Array, "M N"]:
        """x W^T + b of one layer, without the adapter."""
        with jax.named_scope("frozen"):
            y_MN = frozen_linear(x_MK, self.weight.get_value(), layer)
        return y_MN if self.bias is None else y_MN + of_layer(self.bias, layer).astype(y_MN.dtype)[None]

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
        frozen: list[Product] = [functools.partial(linear.frozen, layer=layer) for linear in alike]
        if kind is type(None):
            ys = [product(x_MK) for product in frozen]
        else:
            keys = [None if key is None else named_key(key, linear.name) for linear in alike]
            ys = kind.apply([linear.adapter for linear in alike], x_MK, frozen, keys)
        results |= {linear.name: y for linear, y in zip(alike, ys, strict=True)}
    return [results[linear.name] for linear in linears]


def named_key(key: jax.Array, name: str) -> jax.Array:
    """A key that belongs to `name` alone, whatever else is drawn."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
