"""Evaluates the held-out rows of a run by the objective's loss and metrics, with 95 % intervals over rows.

Dimension key: B rows of a batch, R held-out rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, PyTree

from qlora_jax.data.batching.batches import PRESENT, Batch
from qlora_jax.models.partition import Lora
from qlora_jax.objectives.objective import REFERENCE, Objective, PreferenceObjective, Totals, read_by_outputs
from qlora_jax.objectives.sequences import ComparedLogps, SequenceLogps
from qlora_jax.training.forward import evaluation_loss
from qlora_jax.training.held_out_heads import held_out_head_metrics
from qlora_jax.training.metrics.eval_metrics import eval_loss_metrics, objective_loss_metrics
from qlora_jax.training.metrics.preference_metrics import means_with_intervals, preference_values
from qlora_jax.training.run_mesh import MAX_ROWS, is_row, place_batch, rows_of_batch, rows_that_divide
from qlora_jax.training.session import Session


def held_out_metrics(session: Session, lora: Lora, before_batch: Callable[[], None]) -> dict[str, float]:
    """Returns the record entries of the held-out rows: the loss, and the metrics of the objective."""
    if session.objective.sequences_per_row == 0:
        return _token_loss(session, lora, before_batch)
    batches, outputs = _outputs(session, lora, before_batch)
    names = {PRESENT, *session.objective.values} - {REFERENCE}
    arrays = {name: np.concatenate([batch.arrays()[name][0, is_row(batch)] for batch in batches]) for name in names}
    if isinstance(outputs, ComparedLogps):
        arrays[REFERENCE] = np.asarray(outputs.reference_BS)
    totals = _sum_totals(session.objective, batches)
    rows_per_step = math.ceil(session.dataset.report.train.kept / session.dataset.steps_per_epoch)
    losses_R = losses_of_rows(session.objective, outputs, arrays, totals, rows_per_step)
    found = objective_loss_metrics(losses_R)
    if isinstance(outputs, SequenceLogps):
        objective = cast(PreferenceObjective, session.objective)
        found |= means_with_intervals(preference_values(objective, outputs, arrays))
    if session.head is not None:
        numbers = [number for batch in batches for number in batch.rows[0, :, 0][is_row(batch)].tolist()]
        found |= held_out_head_metrics(session.head, np.asarray(outputs), arrays, numbers)
    return found


def _token_loss(session: Session, lora: Lora, before_batch: Callable[[], None]) -> dict[str, float]:
    """Returns the mean over tokens."""
    sums, tokens = [], []
    for batch in session.dataset.eval_batches(rows_that_divide(MAX_ROWS, session.mesh)):
        before_batch()
        arrays = place_batch({name: array[0] for name, array in batch.arrays().items()}, session.mesh)
        rows_B = evaluation_loss(session.parts.with_lora(lora), arrays, mesh=session.mesh)
        there = is_row(batch)
        sums.append(np.asarray(rows_B, np.float64)[there])
        tokens.append(batch.weights[0].sum(axis=1, dtype=np.int64)[there])
    return eval_loss_metrics(np.concatenate(sums), np.concatenate(tokens))


def _outputs(session: Session, lora: Lora, before_batch: Callable[[], None]) -> tuple[list[Batch], PyTree]:
    """Returns (the batches, the model's outputs for their rows, with leaves [R, ...])."""
    compute, batches, outputs = _forward_pass(session, lora), [], []
    for batch in session.dataset.eval_batches(rows_of_batch(session.config, session.mesh)):
        before_batch()
        read = read_by_outputs(batch.arrays(), session.objective)
        arrays = place_batch({name: array[0] for name, array in read.items()}, session.mesh)
        found = compute(arrays)
        batches.append(batch)
        outputs.append(jax.tree.map(lambda leaf, batch=batch: jnp.asarray(np.asarray(leaf)[is_row(batch)]), found))
    return batches, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)


def _forward_pass(session: Session, lora: Lora) -> Callable[[dict[str, jax.Array]], PyTree]:
    """Returns a function from a batch to the model's outputs, with the divergence if there is a reference."""
    parts, forward = session.parts.with_lora(lora), session.gradients.forward
    if session.reference is None:
        return lambda arrays: forward.outputs(session.objective, arrays)(parts, arrays)
    both = parts, session.parts.with_lora(session.reference.on_devices())
    return lambda arrays: forward.comparison(arrays)(both, arrays)


def losses_of_rows(
    objective: Objective, outputs: PyTree, arrays: Mapping[str, np.ndarray], totals: Totals, rows_per_step: int
) -> Float64[np.ndarray, " R"]:
    """Returns the loss of each row.

    The rows of a coupled objective are in groups of about the size of a step, as in training; the groups are drawn.
    """
    rows = len(arrays[PRESENT])
    if not objective.is_coupled:
        return np.asarray(objective.row_losses(outputs, _on_device(arrays), totals), np.float64)
    losses_R = np.zeros(rows)
    for group in np.array_split(np.random.default_rng(0).permutation(rows), -(-rows // rows_per_step)):
        own, own_arrays = jax.tree.map(lambda leaf, group=group: leaf[group], (outputs, _on_device(arrays)))
        losses_R[group] = objective.row_losses(own, own_arrays, objective.totals(own_arrays))
    return losses_R


def _sum_totals(objective: Objective, batches: Sequence[Batch]) -> Totals:
    return jax.tree.map(lambda *each: sum(each), *(objective.totals(_on_device(batch.arrays())) for batch in batches))


def _on_device(arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in arrays.items()}
