"""Direct preference optimization (Rafailov et al. 2023), and other losses of its margin.

The margin is (log p - log p_reference)(chosen) - (log p - log p_reference)(rejected); `ipo` divides each of the two
by its number of tokens, as TRL does.

Dimension key: B rows, S slots, P = S / 2 pairs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from jaxtyping import Array, Float

from qlora_jax.objectives.objective import REFERENCE, Arrays, Totals
from qlora_jax.objectives.pairs import PairObjective, in_pairs
from qlora_jax.objectives.preference_losses import MARGIN_LOSSES
from qlora_jax.objectives.sequences import SequenceLogps, per_token

DPOLoss = Literal["sigmoid", "hinge", "ipo", "robust"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO(PairObjective):
    """The loss of the margin between the rewards of chosen and rejected, relative to the reference.

    Attributes:
      beta: strength of the regularization towards the reference.
      label_smoothing: probability that a preference is flipped; for sigmoid and robust.
    """

    loss_type: DPOLoss = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0

    @property
    def values(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the log-probabilities of the reference."""
        return {REFERENCE: ()}

    def pair_losses(self, outputs: SequenceLogps, arrays: Arrays, totals: Totals) -> Float[Array, "*B P"]:
        """Returns the loss of each pair."""
        ratios_BS = outputs.logps_BS - arrays[REFERENCE]
        if self.loss_type == "ipo":
            ratios_BS = per_token(ratios_BS, outputs.tokens_BS)
        return MARGIN_LOSSES[self.loss_type](in_pairs(ratios_BS).margin, self.beta, self.label_smoothing)

    def rewards(self, outputs: SequenceLogps, arrays: Arrays) -> Float[Array, "*B S"]:
        """Returns beta (log p - log p of the reference) of each sequence."""
        return self.beta * (outputs.logps_BS - arrays[REFERENCE])
