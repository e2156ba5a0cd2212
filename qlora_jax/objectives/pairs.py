"""Objectives of preference pairs: in each pair of slots, the first has the chosen sequence, the second the rejected.

Dimension key: B rows, S slots, P = S / 2 pairs, M positions of B rows, D embed.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.config.objectives import RowKind
from qlora_jax.data.batching.packing import PRESENT
from qlora_jax.models.decoder import CausalLM
from qlora_jax.objectives.objective import Arrays, Totals
from qlora_jax.objectives.sequences import SequenceLogps, sequence_logps


class Pair(NamedTuple):
    """A quantity of both sequences of each pair."""

    chosen: Float[Array, "*B P"]
    rejected: Float[Array, "*B P"]

    @property
    def margin(self) -> Float[Array, "*B P"]:
        """Chosen minus rejected."""
        return self.chosen - self.rejected


def in_pairs(per_slot: Float[Array, "*B S"]) -> Pair:
    """Splits slots into pairs."""
    return Pair(per_slot[..., 0::2], per_slot[..., 1::2])


@dataclasses.dataclass(frozen=True)
class PairObjective(abc.ABC):
    """A loss of pairs, each of which depends on the log-probabilities of its two sequences: the mean over all pairs."""

    row_kind: RowKind = dataclasses.field(default="pair", init=False)
    sequences_per_row: int = dataclasses.field(default=2, init=False)
    kl_pairs: bool = dataclasses.field(default=False, init=False)
    is_coupled: bool = dataclasses.field(default=False, init=False)

    @property
    def values(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the arrays per slot that the loss reads; none without a reference."""
        return {}

    def outputs(self, model: CausalLM, hidden_MD: Float[Array, "M D"], micro: Arrays) -> SequenceLogps:
        """Returns the log-probabilities of all sequences."""
        return sequence_logps(model, hidden_MD, micro)

    def totals(self, batch: Arrays) -> Totals:
        """Returns sums over the batch that `pair_losses` reads."""
        return {}

    @abc.abstractmethod
    def pair_losses(self, outputs: SequenceLogps, arrays: Arrays, totals: Totals) -> Float[Array, "*B P"]:
        """Returns the loss of each pair; any finite number for an empty pair of slots."""

    def row_losses(self, outputs: SequenceLogps, arrays: Arrays, totals: Totals) -> Float[Array, "*B"]:
        """Returns the sum of each row's pairs."""
        losses_BP = self.pair_losses(outputs, arrays, totals)
        return jnp.sum(jnp.where(in_pairs(arrays[PRESENT]).chosen > 0, losses_BP, 0.0), axis=-1)

    def count(self, batch: Arrays) -> Float[Array, ""]:
        """Returns the number of pairs."""
        return jnp.sum(in_pairs(batch[PRESENT]).chosen)
