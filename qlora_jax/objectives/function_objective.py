"""A loss that is a plain function of the model's last hidden states and the batch, on rows of one text.

Dimension key: A micro-batches, B rows per micro-batch, T positions, M = B T, D embed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.config import Config
from qlora_jax.config.objectives import OBJECTIVES, ObjectiveDeclaration, RowKind
from qlora_jax.models.decoder import CausalLM
from qlora_jax.objectives.objective import Arrays, Totals

type RowLosses = Callable[[CausalLM, jax.Array, Arrays], jax.Array]
type Count = Literal["tokens", "rows"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionObjective:
    """The sum of a function's row losses, divided by a count of the whole step.

    Attributes:
      function: returns the loss of each row [B], from the model, the normalized hidden states [M, D] and the arrays of
        a micro-batch: `inputs`, `targets`, `weights` [B, T]. Positions whose weight is 0 are not supervised.
      per: "tokens" divides by the supervised tokens, "rows" by the rows with any.
    """

    function: RowLosses
    per: Count = "tokens"
    row_kind: RowKind = dataclasses.field(default="text", init=False)
    sequences_per_row: int = dataclasses.field(default=0, init=False)
    kl_pairs: bool = dataclasses.field(default=False, init=False)
    is_coupled: bool = dataclasses.field(default=False, init=False)

    @property
    def values(self) -> Mapping[str, tuple[int, ...]]:
        """Returns an empty dict: a row has only ids and weights."""
        return {}

    def outputs(self, model: CausalLM, hidden_MD: Float[Array, "M D"], micro: Arrays) -> Float[Array, " B"]:
        """Returns the function's row losses, in f32."""
        losses_B = self.function(model, hidden_MD, micro)
        if losses_B.shape != micro["weights"].shape[:1]:
            raise ValueError(
                f"objective: the loss function returned an array of shape {losses_B.shape} (expected one loss per row, "
                f"{micro['weights'].shape[:1]})"
            )
        return losses_B.astype(jnp.float32)

    def totals(self, batch: Arrays) -> Totals:
        """Returns an empty dict: losses need no sums over the step."""
        return {}

    def row_losses(self, outputs: Float[Array, "*AB"], arrays: Arrays, totals: Totals) -> Float[Array, "*AB"]:
        """Returns the outputs."""
        return outputs

    def count(self, batch: Arrays) -> Float[Array, ""]:
        """Returns the number of supervised tokens, or of rows with any."""
        weights_ABT = batch["weights"]
        if self.per == "tokens":
            return jnp.sum(weights_ABT)
        return jnp.sum(jnp.any(weights_ABT > 0, axis=-1), dtype=jnp.float32)


def loss_declaration(function: RowLosses, per: Count = "tokens") -> ObjectiveDeclaration:
    """Returns the declaration of a loss function, for an entry point of the group qlora_jax.objectives.

    Args:
      function, per: see `FunctionObjective`.
    """

    def make(config: Config) -> FunctionObjective:
        if per == "rows" and config.data.packing:
            raise ValueError(
                f"data.packing: found true with objective={config.objective}, whose loss is a mean over rows, but "
                "packed rows have several. Set data.packing=false, or divide the loss by tokens"
            )
        return FunctionObjective(function=function, per=per)

    return ObjectiveDeclaration(implementation=make, rows="text", per=per)


def register_objective(name: str, loss: RowLosses | ObjectiveDeclaration, *, per: Count = "tokens") -> None:
    """Adds an objective to this process; commands find one by an entry point of the group qlora_jax.objectives.

    Args:
      loss: a loss function, as in `FunctionObjective`, or the declaration of an objective.
      per: for a function, what its sum is divided by.

    Raises:
      ValueError: the name is taken.
    """
    OBJECTIVES.register(name, loss if isinstance(loss, ObjectiveDeclaration) else loss_declaration(loss, per))
