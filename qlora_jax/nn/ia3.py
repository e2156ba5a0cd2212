"""(IA)^3 (Liu et al., 2022): a vector on a frozen layer's results, or on its inputs.

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
    """y = (x W^T + b) * vector, or (x * vector) W^T + b where `on_input`; PEFT's IA3.

    `vector` [L, N], or [L, K], in f32: it starts at 1, where bf16 would round updates away. Inside the scan over
    layers, one layer of it.
    """

    def __init__(self, vector: Float[Array, "*L _"], on_input: bool):
        self.vector = nnx.LoRAParam(vector)
        self.on_input = on_input

    @classmethod
    def init(cls, stack: int, shape: tuple[int, int], *, on_input: bool) -> "IA3":
        """Ones, for `stack` layers over weights of `shape` (N, K): the layers then do what they do without it."""
        return cls(jnp.ones((stack, shape[1] if on_input else shape[0]), jnp.float32), on_input)

    @staticmethod
    def apply(
        adapters: "Sequence[IA3]",
        x_MK: Float[Array, "M K"],
        frozen: Sequence[FrozenLayer],
        keys: Sequence[jax.Array | None],
    ) -> list[jax.Array]:
        """Each layer's result with its own vector; there is no dropout."""
        return [adapter._applied(x_MK, one) for adapter, one in zip(adapters, frozen, strict=True)]

    def _applied(self, x_MK: jax.Array, frozen: FrozenLayer) -> jax.Array:
        vector = self.vector[...]
        if self.on_input:
            return frozen(scale_columns(x_MK, vector))
        return scale_columns(checkpoint_name(frozen(x_MK), "unscaled"), vector)

    def select_layer(self, layer: int) -> "IA3":
        """The adapter of one layer of the stack."""
        return IA3(self.vector[...][layer], self.on_input)

    def merge(self, weight: Float[Array, "N K"]) -> Float[Array, "N K"]:
        """Rows times the vector, or columns, in f32."""
        vector = self.vector[...]
        return weight.astype(jnp.float32) * (vector[None] if self.on_input else vector[:, None])

    def merge_bias(self, bias: Float[Array, " N"]) -> Float[Array, " N"]:
        """bias * vector, in f32; the bias itself where the vector is on the inputs."""
        return bias if self.on_input else bias.astype(jnp.float32) * self.vector[...]
