"""Log-probabilities of the sequences in a batch, and their divergence: sums over the supervised tokens of each.

Dimension key: B rows, S slots, T positions, M = B T, D embed.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.data.batching.packing import PRESENT
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.lm_head.cross_entropy import token_nll
from qlora_jax.nn.lm_head.divergence import compare_tokens
from qlora_jax.objectives.objective import Arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceLogps:
    """Sums over the supervised tokens of each sequence; 0 in empty slots.

    Attributes:
      logps_BS: of log p(token), in nats.
      tokens_BS: of their number.
    """

    logps_BS: Float[Array, "*A B S"]
    tokens_BS: Float[Array, "*A B S"]


def sequence_logps(model: CausalLM, hidden_MD: Float[Array, "M D"], micro: Arrays) -> SequenceLogps:
    """Returns the log-probabilities of a micro-batch's sequences."""
    targets_BT, weights_BT = micro["targets"], micro["weights"]
    with jax.named_scope("head"):
        nll_M = token_nll(hidden_MD, model.head, targets_BT.reshape(-1), weights_BT.reshape(-1) > 0)
    slots = micro[PRESENT].shape[-1]
    logps_BS = sum_by_slot(-nll_M.reshape(weights_BT.shape) * weights_BT, micro["sequences"], slots)
    return SequenceLogps(logps_BS, sum_by_slot(weights_BT, micro["sequences"], slots))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ComparedLogps(SequenceLogps):
    """Log-probabilities of sequences under a model and its reference, and their divergence on these tokens.

    Attributes:
      kl_BS: sum over the supervised tokens of KL(model || reference) over the whole vocabulary, in nats.
      reference_BS: `logps_BS` of the reference; the same to the bit if the two have equal hidden states.
    """

    kl_BS: Float[Array, "*A B S"]
    reference_BS: Float[Array, "*A B S"]


def compared_logps(
    model: CausalLM,
    hidden_MD: Float[Array, "M D"],
    reference: CausalLM,
    reference_MD: Float[Array, "M D"],
    micro: Arrays,
) -> ComparedLogps:
    """Returns `sequence_logps` of a model with its divergence from a reference; not differentiable."""
    weights_BT, slots = micro["weights"], micro[PRESENT].shape[-1]
    targets_M, wanted_M = micro["targets"].reshape(-1), weights_BT.reshape(-1) > 0
    with jax.named_scope("head"):
        found = compare_tokens(hidden_MD, model.head, reference_MD, reference.head, targets_M, wanted_M)

    def summed(values_M: jax.Array) -> jax.Array:
        return sum_by_slot(values_M.reshape(weights_BT.shape) * weights_BT, micro["sequences"], slots)

    tokens_BS = sum_by_slot(weights_BT, micro["sequences"], slots)
    logps_BS, reference_BS = summed(-found.nll_M), summed(-found.other_nll_M)
    return ComparedLogps(logps_BS, tokens_BS, summed(found.divergence_M), reference_BS)


def sum_by_slot(
    values_BT: Float[Array, "*A B T"], sequences_BT: Int[Array, "*A B T"], slots: int
) -> Float[Array, "*A B {slots}"]:
    """Sums the positions of each slot. A reduction, not a scatter, whose order of additions is not fixed on a GPU."""
    return jnp.sum(jnp.where(_is_in(sequences_BT, slots), values_BT[..., None, :], 0.0), axis=-1)


def spread_to_tokens(values_BS: Float[Array, "*A B S"], sequences_BT: Int[Array, "*A B T"]) -> Float[Array, "*A B T"]:
    """Returns the value of each position's slot, and 0 outside of sequences; the transpose of `sum_by_slot`."""
    return jnp.sum(jnp.where(_is_in(sequences_BT, values_BS.shape[-1]), values_BS[..., None], 0.0), axis=-2)


def _is_in(sequences_BT: Int[Array, "*A B T"], slots: int) -> Bool[Array, "*A B {slots} T"]:
    *leading, length = sequences_BT.shape
    slots_BST = jax.lax.broadcasted_iota(sequences_BT.dtype, (*leading, slots, length), len(leading))
    return sequences_BT[..., None, :] == slots_BST


def per_token(sums_BS: Float[Array, "*B S"], tokens_BS: Float[Array, "*B S"]) -> Float[Array, "*B S"]:
    """Divides sums by the number of tokens; empty slots stay 0."""
    return sums_BS / jnp.maximum(tokens_BS, 1.0)
