"""Kahneman-Tversky optimization (Ethayarajh et al. 2024): answers that are labelled good or bad, not compared.

With r = log p - log p_reference of an answer, b = beta and s the logistic function, the loss of an answer is

  desirable    w_d (1 - s(b (r - z)))        undesirable  w_u (1 - s(b (z - r)))

z estimates the divergence of the model from the reference: the mean of r over the step's prompts with the answers of
other rows, at least 0, without gradient. `apo_zero_unpaired` (D'Oosterlinck et al. 2024) is the same with z = 0.

Dimension key: B rows, S slots, N answers of a row.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.config.objectives import RowKind
from qlora_jax.data.batching.packing import PRESENT
from qlora_jax.models.decoder import CausalLM
from qlora_jax.objectives.objective import LABELS, REFERENCE, Arrays, Totals
from qlora_jax.objectives.sequences import SequenceLogps, sequence_logps

KTOLoss = Literal["kto", "apo_zero_unpaired"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTO:
    """The mean over labelled answers.

    Attributes:
      beta: strength of the regularization towards the reference.
      desirable_weight, undesirable_weight: weights of the losses of either label.
    """

    loss_type: KTOLoss = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def row_kind(self) -> RowKind:
        """Returns the kind of rows with one labelled answer."""
        return "labelled"

    @property
    def kl_pairs(self) -> bool:
        """Returns True if each row has a second sequence, its prompt with the answer of another row, to estimate z."""
        return self.loss_type == "kto"

    @property
    def is_coupled(self) -> bool:
        """Returns True if z is a mean over the step."""
        return self.kl_pairs

    @property
    def sequences_per_row(self) -> int:
        """Returns 2 with the sequences that estimate z."""
        return 2 if self.kl_pairs else 1

    @property
    def values(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the log-probabilities of the reference, and the labels: 1 for desirable, 0 for undesirable."""
        return {REFERENCE: (), LABELS: ()}

    def outputs(self, model: CausalLM, hidden_MD: Float[Array, "M D"], micro: Arrays) -> SequenceLogps:
        """Returns the log-probabilities of all sequences."""
        return sequence_logps(model, hidden_MD, micro)

    def totals(self, batch: Arrays) -> Totals:
        """Returns an empty dict: losses need no sums over the step."""
        return {}

    def row_losses(self, outputs: SequenceLogps, arrays: Arrays, totals: Totals) -> Float[Array, "*B"]:
        """Returns the sum of each row's answers; with z, of all rows of the step."""
        ratios_BS, answers = outputs.logps_BS - arrays[REFERENCE], slice(0, None, self.sequences_per_row)
        z = divergence(ratios_BS[..., 1::2], arrays[PRESENT][..., 1::2]) if self.kl_pairs else 0.0
        losses_BN = kto_losses(ratios_BS[..., answers] - z, arrays[LABELS][..., answers], self)
        return jnp.sum(jnp.where(arrays[PRESENT][..., answers] > 0, losses_BN, 0.0), axis=-1)

    def rewards(self, outputs: SequenceLogps, arrays: Arrays) -> Float[Array, "*B S"]:
        """Returns beta (log p - log p of the reference) of each sequence."""
        return self.beta * (outputs.logps_BS - arrays[REFERENCE])

    def count(self, batch: Arrays) -> Float[Array, ""]:
        """Returns the number of answers."""
        return jnp.sum(batch[PRESENT][..., :: self.sequences_per_row])


def divergence(ratios_BN: Float[Array, "*B N"], present_BN: Float[Array, "*B N"]) -> Float[Array, ""]:
    """Returns the mean log-ratio of the sequences present, at least 0, without gradient."""
    mean = jnp.sum(ratios_BN * present_BN) / jnp.maximum(jnp.sum(present_BN), 1.0)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def kto_losses(rewards_BN: Float[Array, "*B N"], labels_BN: Float[Array, "*B N"], kto: KTO) -> Float[Array, "*B N"]:
    """Returns the loss of each answer from its log-ratio minus z."""
    desirable_BN = kto.desirable_weight * jax.nn.sigmoid(-kto.beta * rewards_BN)
    undesirable_BN = kto.undesirable_weight * jax.nn.sigmoid(kto.beta * rewards_BN)
    return jnp.where(labels_BN > 0, desirable_BN, undesirable_BN)
