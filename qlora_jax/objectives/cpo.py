"""Contrastive preference optimization (Xu et al. 2024), and SimPO (Meng et al. 2024): no reference.

The margin is log p(chosen) - log p(rejected); of means per token for `ipo` and `simpo`. SimPO's loss is
-log s(b h - gamma), with the margin's target gamma. The mean cross-entropy of the chosen tokens is added with weight
alpha; SimPO's paper has none.

Dimension key: B rows, S slots, P = S / 2 pairs.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.data.batching.packing import PRESENT
from qlora_jax.objectives.objective import Arrays, Totals
from qlora_jax.objectives.pairs import PairObjective, in_pairs
from qlora_jax.objectives.preference_losses import MARGIN_LOSSES
from qlora_jax.objectives.sequences import SequenceLogps, per_token

CPOLoss = Literal["sigmoid", "hinge", "ipo", "simpo"]
PER_TOKEN = ("ipo", "simpo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CPO(PairObjective):
    """A loss of the margin of log-probabilities, and alpha times the mean cross-entropy of the chosen tokens.

    Attributes:
      beta: scale of the margin.
      label_smoothing: probability that a preference is flipped; for sigmoid and simpo.
      alpha: weight of the cross-entropy.
      gamma: target of the scaled margin; for simpo.
    """

    loss_type: CPOLoss = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    alpha: float = 1.0
    gamma: float = 0.0

    def totals(self, batch: Arrays) -> Totals:
        """Returns the numbers of pairs and of chosen tokens."""
        in_slots = batch["sequences"] < batch[PRESENT].shape[-1]
        is_chosen = in_slots & (batch["sequences"] % 2 == 0)
        return {"pairs": self.count(batch), "chosen_tokens": jnp.sum(jnp.where(is_chosen, batch["weights"], 0.0))}

    def pair_losses(self, outputs: SequenceLogps, arrays: Arrays, totals: Totals) -> Float[Array, "*B P"]:
        """Returns the loss of each pair; the cross-entropy is scaled so that their mean is that over tokens."""
        margin_BP = in_pairs(self._scores(outputs)).margin
        loss = MARGIN_LOSSES["sigmoid" if self.loss_type == "simpo" else self.loss_type]
        losses_BP = loss(margin_BP - self.gamma / self.beta, self.beta, self.label_smoothing)
        pairs_per_token = totals["pairs"] / totals["chosen_tokens"]
        return losses_BP - self.alpha * pairs_per_token * in_pairs(outputs.logps_BS).chosen

    def rewards(self, outputs: SequenceLogps, arrays: Arrays) -> Float[Array, "*B S"]:
        """Returns beta log p of each sequence; per token for `ipo` and `simpo`."""
        return self.beta * self._scores(outputs)

    def _scores(self, outputs: SequenceLogps) -> Float[Array, "*B S"]:
        is_mean = self.loss_type in PER_TOKEN
        return per_token(outputs.logps_BS, outputs.tokens_BS) if is_mean else outputs.logps_BS
