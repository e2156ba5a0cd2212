"""The frozen linear layer, with an adapter or without.

Dimension key: L layers, M rows, K in, N out.
"""

import zlib
from typing import Protocol

import jax
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.nf4_matmul import nf4_matmul
from qlora_jax.nn.dots import dot_nt
from qlora_jax.nn.variables import Frozen, of_layer


class Adapter(Protocol):
    """What trains on top of a frozen linear layer; the layer knows nothing else of it."""

    def apply(self, x_MK: jax.Array, frozen, key: jax.Array | None) -> jax.Array:
        """The layer's result; `frozen` is the frozen layer as a function of x."""
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

    def __call__(self, x_MK: Float[Array, "M K"], layer: jax.Array, key: jax.Array | None) -> Float[Array, "M N"]:
        def frozen(x: jax.Array) -> jax.Array:
            y = frozen_linear(x, self.weight.get_value(), layer)
            return y if self.bias is None else y + of_layer(self.bias, layer).astype(y.dtype)[None]

        if self.adapter is None:
            return frozen(x_MK)
        return self.adapter.apply(x_MK, frozen, None if key is None else named_key(key, self.name))


def named_key(key: jax.Array, name: str) -> jax.Array:
    """A key that belongs to `name` alone, whatever else is drawn."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
