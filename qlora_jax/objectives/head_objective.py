"""The common part of objectives whose outputs are those of the model's sequence head.

Dimension key: B rows, S slots for sequences of a row, T positions, M = B T, D embed, C outputs.
"""

import abc
import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.config.objectives import OBJECTIVES, RowKind
from qlora_jax.data.batching.packing import PRESENT
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.sequence_head import HeadSpec, Pooling
from qlora_jax.objectives.objective import Arrays, Objective, Totals

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedHead:
    """A trained sequence head.

    Attributes:
      objective: the objective that trained it.
      labels: names of the outputs, for classification and multi_label; else empty.
      pooling: the hidden state that stands for a sequence.
      text_columns: the columns of the texts that it was trained on, of each format of its rows, such as sentence1 and
        sentence2; empty for objectives whose rows are not texts with labels. Another head of the same meaning may have
        others.
      described: False for an adapter of another library, which does not say what its outputs mean.
    """

    objective: str
    labels: tuple[str, ...] = ()
    pooling: Pooling = "last"
    text_columns: tuple[tuple[str, ...], ...] = dataclasses.field(default=(), compare=False)
    described: bool = True

    @property
    def outputs(self) -> int:
        """The number of outputs; 0 for embeddings, whose result is the pooled hidden state."""
        if OBJECTIVES[self.objective].labels:
            return len(self.labels)
        return 0 if OBJECTIVES[self.objective].pooled else 1

    def spec(self) -> HeadSpec:
        """Returns the head's form."""
        return HeadSpec(outputs=self.outputs, pooling=self.pooling)

    def fits(self, other: "TrainedHead | None") -> bool:
        """True if training may continue from this head with the settings of `other`."""
        if self.described or other is None:
            return self == other
        return self.outputs == other.outputs and (self.outputs == 0 or self.pooling == other.pooling)

    def __str__(self) -> str:
        """The head's settings, for messages."""
        labels = f", labels={[*self.labels]}" if self.labels else ""
        return f"objective={self.objective}, pooling={self.pooling}{labels}"


def head_of(
    objective: str, labels: tuple[str, ...], pooling: Pooling, text_columns: tuple[tuple[str, ...], ...] = ()
) -> TrainedHead | None:
    """Returns the head that an objective trains; None if it has none."""
    declared = OBJECTIVES[objective]
    if not declared.head:
        return None
    labels = labels if declared.labels else ()
    return TrainedHead(objective=objective, labels=labels, pooling=pooling, text_columns=text_columns)
