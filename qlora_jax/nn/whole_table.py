"""An embedding or a head that trains whole, a copy of the frozen one: PEFT's modules_to_save.

Dimension key: M tokens, D embed, V rows of the table.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int


class WholeTable(nnx.Module):
    """`weight` [V, D] in f32 or bf16, in place of the frozen table; it is cast to the dtype that is computed in."""

    def __init__(self, weight_VD: Float[Array, "V D"]):
        self.weight = nnx.LoRAParam(weight_VD)

    def embedded(self, tokens_M: Int[Array, " M"], table_VD: Float[Array, "_ D"]) -> Float[Array, "M D"]:
        """The row of each token, in the frozen table's dtype."""
        return self.weight[...].at[tokens_M].get(mode="clip").astype(table_VD.dtype)

    def put_into(self, table_VD: jax.Array) -> jax.Array:
        """This table, in the frozen one's dtype."""
        return self.weight[...].astype(table_VD.dtype)
