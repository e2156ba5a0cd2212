"""(IA)^3 (Liu et al., 2022): a trainable vector that scales a frozen layer's results or its inputs.

Dimension key: L layers, M rows, K in, N out.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from qlora_jax.nn.column_scale import scale_columns
from qlora_jax.nn.linear import FrozenLayer


class IA3(nnx.Module):
    """y = (x W^T + b) * vector, or (x * vector) W^T + b if `on_input`; PEFT's IA3.

    `vector` is [L, N], or [L, K] if `on_input`. It is in f32, because it starts at 1, where bf16 would round updates
    away. Inside the scan over layers it has one layer.
    """

    def __init__(self, vector: Float[Array, "*L _"], on_input: bool):
        self.vector = nnx.LoRAParam(vector)
        self.on_input = on_input

    @classmethod
    def init(cls, stack: int, shape: tuple[int, int], *, on_input: bool) -> "IA3":
        """Creates vectors of ones, which change nothing, for `stack` layers of weights (N, K)."""
        return cls(jnp.ones((stack, shape[1] if on_input else shape[0]), jnp.float32), on_input)

    @staticmethod
    def apply(
        adapters: "Sequence[IA3]",
        x_MK: Float[Array, "M K"],
        frozen: Sequence[FrozenLayer],
        keys: Sequence[jax.Array | None],
    ) -> list[jax.Array]:
        """Returns each layer's result with its vector; dropout does not apply."""
        return [adapter._applied(x_MK, one) for adapter, one in zip(adapters, frozen, strict=True)]

    def _applied(self, x_MK: jax.Array, frozen: FrozenLayer) -> jax.Array:
        vector = self.vector[...]
        if self.on_input:
            return frozen(scale_columns(x_MK, vector))
        return scale_columns(checkpoint_name(frozen(x_MK), "unscaled"), vector)

    def select_layer(self, layer: int) -> "IA3":
        """Returns the adapter of one layer of the stack."""
        return IA3(self.vector[...][layer], self.on_input)

    def merge(self, weight: Float[Array, "N K"]) -> Float[Array, "N K"]:
        """Returns the weight in f32, its rows (or its columns if `on_input`) multiplied by the vector."""
        vector = self.vector[...]
        return weight.astype(jnp.float32) * (vector[None] if self.on_input else vector[:, None])

    def merge_bias(self, bias: Float[Array, " N"]) -> Float[Array, " N"]:
        """Returns bias * vector in f32, or the bias unchanged if `on_input`."""
        return bias if self.on_input else bias.astype(jnp.float32) * self.vector[...]
