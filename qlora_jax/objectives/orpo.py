"""Odds ratio preference optimization (Hong et al. 2024): no reference.

With p the geometric mean of a sequence's token probabilities, odds(p) = p / (1 - p) and s the logistic function, the
loss is the mean cross-entropy of all tokens of prompt and chosen answer, as in TRL, and the mean over pairs of

  -beta log s(log odds(p_chosen) - log odds(p_rejected))

Dimension key: A micro-batches, B rows, T positions, S slots, P = S / 2 pairs, M positions of B rows, D embed.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qlora_jax.data.batching.packing import PRESENT
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.lm_head.cross_entropy import token_nll
from qlora_jax.objectives.objective import Arrays, Totals
from qlora_jax.objectives.pairs import PairObjective, in_pairs
from qlora_jax.objectives.sequences import SequenceLogps, per_token, sum_by_slot

LARGEST_MEAN = -1e-7  # largest mean log p, because the odds of probability 1 are infinite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ORPOOutputs(SequenceLogps):
    """Log-probabilities of sequences, and the cross-entropy of the chosen texts.

    Attributes:
      text_nll_B: sum of each row over the tokens of its prompts and chosen answers, in nats.
    """

    text_nll_B: Float[Array, "*A B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ORPO(PairObjective):
    """The cross-entropy of prompt and chosen answer, and beta times the loss of the odds ratio."""

    beta: float = 0.1

    def outputs(self, model: CausalLM, hidden_MD: Float[Array, "M D"], micro: Arrays) -> ORPOOutputs:
        """Returns the outputs of a micro-batch; one pass through the head gives all of them."""
        weights_BT, slots = micro["weights"], micro[PRESENT].shape[-1]
        is_read_BT = in_chosen_text(micro)
        with jax.named_scope("head"):
            needed_M = (is_read_BT | (weights_BT > 0)).reshape(-1)
            nll_M = token_nll(hidden_MD, model.head, micro["targets"].reshape(-1), needed_M)
        nll_BT = nll_M.reshape(weights_BT.shape)
        return ORPOOutputs(
            sum_by_slot(-nll_BT * weights_BT, micro["sequences"], slots),
            sum_by_slot(weights_BT, micro["sequences"], slots),
            jnp.sum(jnp.where(is_read_BT, nll_BT, 0.0), axis=1),
        )

    def totals(self, batch: Arrays) -> Totals:
        """Returns the numbers of pairs, and of tokens of prompts and chosen answers."""
        return {"pairs": self.count(batch), "tokens": jnp.sum(in_chosen_text(batch), dtype=jnp.float32)}

    def pair_losses(self, outputs: SequenceLogps, arrays: Arrays, totals: Totals) -> Float[Array, "*B P"]:
        """Returns the loss of the odds ratio of each pair."""
        log_odds_BP = in_pairs(log_odds(per_token(outputs.logps_BS, outputs.tokens_BS))).margin
        return -self.beta * jax.nn.log_sigmoid(log_odds_BP)

    def rewards(self, outputs: SequenceLogps, arrays: Arrays) -> Float[Array, "*B S"]:
        """Returns beta times the mean log p of each sequence's tokens."""
        return self.beta * per_token(outputs.logps_BS, outputs.tokens_BS)

    def row_losses(self, outputs: ORPOOutputs, arrays: Arrays, totals: Totals) -> Float[Array, "*B"]:
        """Adds the cross-entropy of the chosen texts, scaled so that the mean over pairs is that over tokens."""
        pairs_per_token = totals["pairs"] / totals["tokens"]
        return super().row_losses(outputs, arrays, totals) + pairs_per_token * outputs.text_nll_B


def log_odds(log_p: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns log(p / (1 - p)); log(1 - p) is computed in the form that is exact for small, or for large p."""
    log_p = jnp.minimum(log_p, LARGEST_MEAN)
    is_small = log_p < -jnp.log(2.0)
    of_small = jnp.log1p(-jnp.exp(jnp.where(is_small, log_p, -1.0)))
    of_large = jnp.log(-jnp.expm1(jnp.where(is_small, -0.5, log_p)))
    return log_p - jnp.where(is_small, of_small, of_large)


def in_trunk(batch: Arrays) -> Bool[Array, "*B T"]:
    """Returns True for positions of trunks: those of no sequence that precede one; padding follows all sequences.

    The target of a trunk's last position is the id with which its first branch begins, the last of the prompt.
    """
    in_sequence = batch["sequences"] < batch[PRESENT].shape[-1]
    sequences_from_here = jax.lax.cumsum(in_sequence.astype(jnp.int32), axis=in_sequence.ndim - 1, reverse=True)
    return ~in_sequence & (sequences_from_here > 0)


def in_chosen_text(batch: Arrays) -> Bool[Array, "*B T"]:
    """Returns True for positions of prompts and of chosen answers."""
    sequences, slots = batch["sequences"], batch[PRESENT].shape[-1]
    return in_trunk(batch) | ((sequences < slots) & (sequences % 2 == 0))
