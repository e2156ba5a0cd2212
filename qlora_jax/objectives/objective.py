"""The protocol of an objective: the loss of a run, as a function of the last hidden states and the batch.

The loss of a step is sum(row_losses) / count, over all rows of the step. Both are sums over the whole step, so the
result depends neither on micro-batches, nor on packing, nor on the mesh.

Dimension key: A micro-batches, B rows per micro-batch, S slots for sequences in a row, T positions, M = B T, D embed.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, PyTree

from qlora_jax.config.objectives import RowKind
from qlora_jax.data.batching.packing import PRESENT
from qlora_jax.models.decoder import CausalLM

Arrays = Mapping[str, jax.Array]
Totals = dict[str, jax.Array]

# Arrays of a batch per slot, besides PRESENT: log p of the reference, and labels.
REFERENCE, LABELS = "reference", "labels"


class TokenValue(NamedTuple):
    """An array of numbers per token: the axes that follow [A, B, T], and its dtype."""

    inner: tuple[int, ...] = ()
    dtype: Literal["int32", "float32"] = "float32"


@runtime_checkable
class Objective(Protocol):
    """A loss and the data that it reads. Implementations are frozen dataclasses, static arguments of the compiled step.

    Attributes:
      row_kind: the kind of data rows.
      sequences_per_row: sequences, and slots, of a row; 0 if the loss does not distinguish sequences.
      values: arrays per slot that the loss reads, and the axes that follow [A, B, S] in each.
      kl_pairs: True if the second sequence of each row is the prompt with another row's answer.
      is_coupled: True if the loss of a row depends on the outputs of other rows in the step.
    """

    @property
    def row_kind(self) -> RowKind: ...

    @property
    def sequences_per_row(self) -> int: ...

    @property
    def values(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def kl_pairs(self) -> bool: ...

    @property
    def is_coupled(self) -> bool: ...

    def outputs(self, model: CausalLM, hidden_MD: Float[Array, "M D"], micro: Arrays) -> PyTree:
        """Returns the model's outputs that the loss depends on, with leaves [B, ...]; differentiable.

        Args:
          hidden_MD: the normalized last hidden states of a micro-batch.
          micro: its arrays, [B, T] and [B, S].
        """
        ...

    def totals(self, batch: Arrays) -> Totals:
        """Returns sums over the rows of a batch, [A, B, ...], that `row_losses` reads as sums over the step."""
        ...

    def row_losses(self, outputs: PyTree, arrays: Arrays, totals: Totals) -> Float[Array, "*AB"]:
        """Returns the loss of each row, not yet divided by `count`.

        Args:
          outputs: outputs of rows, [B, ...] or [A, B, ...]; of all rows of the step if the objective is coupled.
          arrays: those of `read_by_losses` for these rows, with the same leading axes.
          totals: sums over the step.
        """
        ...

    def count(self, batch: Arrays) -> Float[Array, ""]:
        """Returns the number of tokens, sequences or pairs in a batch, by which the summed loss is divided."""
        ...


@runtime_checkable
class TokenObjective(Objective, Protocol):
    """An objective that reads further arrays [A, B, T, ...] of a batch; its losses also read `weights`, `sequences`."""

    @property
    def token_values(self) -> Mapping[str, TokenValue]: ...


class PreferenceObjective(Objective, Protocol):
    """An objective whose outputs are the log-probabilities of answers (sequences.SequenceLogps)."""

    def rewards(self, outputs: PyTree, arrays: Arrays) -> Float[Array, "*ABS"]:
        """Returns the reward of each sequence, as TRL reports it; `arrays` are those of `row_losses`."""
        ...


def read_by_outputs[A](arrays: Mapping[str, A], objective: Objective) -> dict[str, A]:
    """Returns the arrays of a batch without the objective's values, per slot or token, which `outputs` does not read.

    So the reference pass, which has no reference yet, and held-out evaluation read the same arrays.
    """
    values = (*objective.values, *token_values(objective))
    return {name: array for name, array in arrays.items() if name not in values}


def read_by_losses(objective: Objective) -> tuple[str, ...]:
    """Returns the names of the arrays of a batch that `row_losses` reads."""
    if not objective.sequences_per_row:
        return ()
    of_tokens = token_values(objective)
    return (PRESENT, *objective.values, *(("weights", "sequences", *of_tokens) if of_tokens else ()))


def token_values(objective: Objective) -> Mapping[str, TokenValue]:
    """Returns the arrays per token that an objective reads, besides those of every batch."""
    return objective.token_values if isinstance(objective, TokenObjective) else {}


def needs_reference(objective: Objective) -> bool:
    """Returns True if the objective reads the log-probabilities of the reference, the run's initial model."""
    return REFERENCE in objective.values
