"""Reward models: the probability that one answer is preferred, by the difference of two rewards (Bradley-Terry).

Dimension key: B rows, S slots, P = S / 2 pairs.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.config.objectives import RowKind
from qlora_jax.data.batching.packing import PRESENT
from qlora_jax.objectives.head_objective import HeadObjective
from qlora_jax.objectives.objective import Arrays, Totals
from qlora_jax.objectives.pairs import in_pairs

MARGINS = "margins"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(HeadObjective):
    """-log s(r_chosen - r_rejected - margin) + center_rewards_coefficient (r_chosen + r_rejected)^2, mean over pairs.

    Attributes:
      center_rewards_coefficient: weight of the second term, which keeps rewards near 0 (Eisenstein et al. 2023).
    """

    row_kind: RowKind = dataclasses.field(default="pair", init=False)
    sequences_per_row: int = dataclasses.field(default=2, init=False)
    center_rewards_coefficient: float = 0.0

    @property
    def values(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the margins, 0 where the data has none."""
        return {MARGINS: ()}

    def row_losses(self, outputs: Float[Array, "*B S C"], arrays: Arrays, totals: Totals) -> Float[Array, "*B"]:
        """Returns the sum of each row's pairs."""
        rewards, margins_BP = in_pairs(outputs[..., 0]), in_pairs(arrays[MARGINS]).chosen
        losses_BP = -jax.nn.log_sigmoid(rewards.margin - margins_BP)
        losses_BP += self.center_rewards_coefficient * (rewards.chosen + rewards.rejected) ** 2
        return jnp.sum(jnp.where(in_pairs(arrays[PRESENT]).chosen > 0, losses_BP, 0.0), axis=-1)

    def count(self, batch: Arrays) -> Float[Array, ""]:
        """Returns the number of pairs."""
        return jnp.sum(in_pairs(batch[PRESENT]).chosen)
