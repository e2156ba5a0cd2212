"""BitFit (Ben Zaken et al., 2021): the bias of a frozen linear layer trains.

Dimension key: L layers, M rows, K in, N out.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.nn.linear import FrozenLayer, QLinear
from qlora_jax.nn.variables import Frozen


@jax.custom_vjp
def add_bias(y_MN: Float[Array, "M N"], bias_N: Float[Array, " N"]) -> Float[Array, "M N"]:
    """Returns y + bias, with the bias cast to y's dtype; its gradient is summed over rows in f32."""
    return y_MN + bias_N.astype(y_MN.dtype)[None]


def _backward(like_N, dy_MN):
    return dy_MN, jnp.sum(dy_MN, axis=0, dtype=jnp.float32)


add_bias.defvjp(lambda y_MN, bias_N: (add_bias(y_MN, bias_N), None), _backward)


class TrainableBias(nnx.Module):
    """y = x W^T + bias in place of the frozen bias: `bias` is [L, N] in f32; inside the scan, one layer."""

    def __init__(self, bias: Float[Array, "*L N"]):
        self.bias = nnx.LoRAParam(bias)

    @staticmethod
    def apply(
        adapters: "Sequence[TrainableBias]",
        x_MK: Float[Array, "M K"],
        frozen: Sequence[FrozenLayer],
        keys: Sequence[jax.Array | None],
    ) -> list[jax.Array]:
        """Returns x W^T + bias of each; dropout does not apply."""
        return [add_bias(one.product(x_MK), each.bias[...]) for each, one in zip(adapters, frozen, strict=True)]

    def select_layer(self, layer: int) -> "TrainableBias":
        """Returns one layer of the stack."""
        return TrainableBias(self.bias[...][layer])

    def merge(self, weight: Float[Array, "N K"]) -> Float[Array, "N K"]:
        """Returns the weight unchanged, in f32."""
        return weight.astype(jnp.float32)

    def merge_bias(self, bias: Float[Array, " N"]) -> Float[Array, " N"]:
        """Returns the trained bias."""
        return self.bias[...]


def make_bias_trainable(linear: QLinear) -> None:
    """Replaces the layer's frozen bias by a trainable copy in f32."""
    assert linear.bias is not None, "only layers with a bias are selected"
    linear.adapter = TrainableBias(linear.bias[...].astype(jnp.float32))
    linear.bias = Frozen(linear.bias[...][:0])  # zero layers: frees the memory
