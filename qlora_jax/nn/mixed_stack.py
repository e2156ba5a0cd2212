"""A stack of 4-bit and dense layers, for checkpoints that leave some layers in 16 bits.

Dimension key: L layers, M rows, K in, N out.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.formats.qtensor import Leaf, QTensor
from pallas_kernels.nf4_matmul import nf4_matmul
from pallas_kernels.nf4_matmul.api import product
from qlora_jax.nn.matmul import dot_nn, dot_nt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedStack:
    """4-bit layers and dense layers, each part in the order of the layers.

    Leaves:
      quantized: a stack of the 4-bit layers.
      dense: [number of dense layers, N, K].
    Static:
      dense_layers: indices of the dense layers, ascending.
    """

    quantized: QTensor
    dense: Leaf
    dense_layers: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K) of one layer."""
        return self.quantized.shape

    @property
    def dtype(self) -> str:
        """Name of the compute dtype."""
        return self.quantized.dtype

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return self.quantized.stack_shape[0] + len(self.dense_layers)

    def locate(self, layer: int) -> tuple[str, int]:
        """Returns (field that holds a layer, index in that field)."""
        before = sum(dense < layer for dense in self.dense_layers)
        return ("dense", before) if layer in self.dense_layers else ("quantized", layer - before)

    def locate_traced(self, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Returns (True if a layer is dense, index in its part) for a layer index that may be traced."""
        places = [self.locate(each) for each in range(self.num_layers)]
        is_dense_L, index_L = zip(*((part == "dense", index) for part, index in places), strict=True)
        return jnp.asarray(is_dense_L)[layer], jnp.asarray(index_L, jnp.int32)[layer]

    def in_layer_order(self, quantized: jax.Array, dense: jax.Array) -> jax.Array:
        """Joins results of the two parts to [L, ...], in the order of the layers."""
        parts = {"quantized": 0, "dense": quantized.shape[0]}
        order = [parts[part] + index for part, index in map(self.locate, range(self.num_layers))]
        return jnp.concatenate([quantized, dense])[np.array(order)]


@jax.custom_vjp
def mixed_linear(x_MK: Float[Array, "M K"], weight: MixedStack, layer: jax.Array | int) -> Float[Array, "M N"]:
    """Returns x W^T of one layer, in x's dtype; only x has a gradient.

    A `cond` chooses between 4-bit and dense. The custom VJP saves the whole stack and the index, so that a scan saves
    no copy of single layers.
    """
    is_dense, index = weight.locate_traced(layer)
    return jax.lax.cond(
        is_dense,
        lambda: dot_nt(x_MK, weight.dense[index].astype(x_MK.dtype), x_MK.dtype),
        lambda: nf4_matmul(x_MK, weight.quantized, index),
    )


def _forward(x_MK, weight, layer):
    return mixed_linear(x_MK, weight, layer), (weight, layer)


def _backward(residuals, dy_MN):
    weight, layer = residuals
    is_dense, index = weight.locate_traced(layer)
    dx_MK = jax.lax.cond(
        is_dense,
        lambda: dot_nn(dy_MN, weight.dense[index].astype(dy_MN.dtype), dy_MN.dtype),
        lambda: product("backward", dy_MN, weight.quantized, index),
    )
    return dx_MK, None, None


mixed_linear.defvjp(_forward, _backward)
