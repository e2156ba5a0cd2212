"""The common part of objectives whose outputs are those of the model's sequence head.

Dimension key: B rows, S slots for sequences of a row, T positions, M = B T, D embed, C outputs.
"""

import abc
import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.data.batching.batches import PRESENT
from qlora_jax.data.row_kinds import RowKind
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.sequence_head import HeadSpec
from qlora_jax.training.objectives.objective import Arrays, Objective, Totals

ONE_OUTPUT = HeadSpec(outputs=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadObjective(abc.ABC):
    """A loss of the outputs of the sequence head. The language-model head is not computed.

    Attributes:
      head: the form of the model's sequence head.
    """

    head: HeadSpec = ONE_OUTPUT
    kl_pairs: bool = dataclasses.field(default=False, init=False)
    is_coupled: bool = dataclasses.field(default=False, init=False)

    @property
    @abc.abstractmethod
    def values(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the arrays per slot that the loss reads."""

    def outputs(self, model: CausalLM, hidden_MD: Float[Array, "M D"], micro: Arrays) -> Float[Array, "B S _"]:
        """Returns the outputs of each slot, or its pooled state if the head has no matrix."""
        assert model.score is not None, "the run adds a head for these objectives"
        return model.score(hidden_MD, micro["sequences"], micro[PRESENT].shape[-1])

    def totals(self, batch: Arrays) -> Totals:
        """Returns an empty dict: losses need no sums over the step."""
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledObjective(HeadObjective):
    """A loss of each sequence's outputs and its label: the mean over all sequences of the step."""

    row_kind: RowKind = dataclasses.field(default="class", init=False)
    sequences_per_row: int = dataclasses.field(default=1, init=False)

    @abc.abstractmethod
    def sequence_losses(self, outputs: Float[Array, "*B S C"], arrays: Arrays) -> Float[Array, "*B S"]:
        """Returns the loss of each slot; any finite number for an empty one."""

    def row_losses(self, outputs: Float[Array, "*B S C"], arrays: Arrays, totals: Totals) -> Float[Array, "*B"]:
        """Returns the sum of each row's sequences."""
        losses_BS = self.sequence_losses(outputs, arrays)
        return jnp.sum(jnp.where(arrays[PRESENT] > 0, losses_BS, 0.0), axis=-1)

    def count(self, batch: Arrays) -> Float[Array, ""]:
        """Returns the number of sequences."""
        return jnp.sum(batch[PRESENT])


def head_spec(objective: Objective) -> HeadSpec | None:
    """Returns the form of the sequence head that an objective trains; None if it has none."""
    return objective.head if isinstance(objective, HeadObjective) else None
