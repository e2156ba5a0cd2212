"""Evaluates the held-out rows of a run by the objective's loss and metrics, with 95 % intervals over rows.

Dimension key: B rows of a batch, R held-out rows, S sequences of a row, C outputs or embedding width.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, PyTree

from qlora_jax.config.objectives import OBJECTIVES
from qlora_jax.data.batching.packing import PRESENT, Batch
from qlora_jax.data.readers.files import Place
from qlora_jax.evaluation.heads.rows import check_are_finite
from qlora_jax.evaluation.tasks.embeddings import retrieval_metrics
from qlora_jax.evaluation.tasks.head_labels import form_of_labels
from qlora_jax.evaluation.tasks.reward_pairs import reward_metrics
from qlora_jax.measures.metrics import Metric, RowValues
from qlora_jax.models.partition import Lora
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.objectives.objective import LABELS, REFERENCE, Objective, PreferenceObjective, Totals, read_by_outputs
from qlora_jax.objectives.router_losses import unrouted
from qlora_jax.objectives.sequences import ComparedLogps, SequenceLogps
from qlora_jax.training.device_mesh import MAX_ROWS, is_row, place_batch, rows_of_batch, rows_that_divide
from qlora_jax.training.metrics.record_summaries import DIVERGENCE, EVAL, LOSS, OBJECTIVE_ROWS
from qlora_jax.training.metrics.step_metrics import (
    distillation_values,
    eval_loss_metrics,
    flatten_metrics,
    means_with_intervals,
    objective_loss_metrics,
    preference_values,
)
from qlora_jax.training.session import Session
from qlora_jax.training.step import evaluation_loss


def held_out_head_metrics(
    head: TrainedHead, outputs_RSC: np.ndarray, arrays: Mapping[str, np.ndarray], numbers: Sequence[int]
) -> dict[str, float]:
    """Returns the entries of an evaluation's record: those of `labels`, `pairs` or `embeddings`, with intervals.

    Args:
      outputs_RSC: the head's outputs for the sequences of each row, or their pooled states.
      arrays: the rows' values by name, [R, S] or [R, S, C].
      numbers: of the rows, from 0, for messages.

    Raises:
      ValueError: outputs are not finite; the message lists the rows.
    """
    outputs_RSC = np.asarray(outputs_RSC, np.float64)
    check_are_finite("held-out rows", [Place(number + 1, number) for number in numbers], outputs_RSC)
    task = OBJECTIVES[head.objective].task
    return flatten_metrics(task, METRICS[task](head, outputs_RSC, arrays))


def _label_metrics(head: TrainedHead, outputs_RSC: np.ndarray, arrays: Mapping[str, np.ndarray]) -> list[Metric]:
    labels = np.asarray(arrays[LABELS], np.float64).reshape(len(outputs_RSC), -1)
    return form_of_labels(head).metrics(head, outputs_RSC[:, 0], labels)


# The metrics of a head's outputs for held-out rows, by the task that `evaluate` scores with them.
METRICS: dict[str, Callable[[TrainedHead, np.ndarray, Mapping[str, np.ndarray]], list[Metric]]] = {
    "labels": _label_metrics,
    "pairs": lambda head, outputs_RSC, arrays: reward_metrics(outputs_RSC[..., 0]),
    "embeddings": lambda head, outputs_RSC, arrays: retrieval_metrics(outputs_RSC),
}


def held_out_metrics(session: Session, lora: Lora, before_batch: Callable[[], None]) -> dict[str, float]:
    """Returns the record entries of the held-out rows: the loss, and the metrics of the objective."""
    if session.teacher is not None:
        batches = session.run.inputs.dataset.eval_batches(rows_of_batch(session.run.config, session.run.mesh))
        return distilled_metrics(session, lora, batches, before_batch)
    if session.run.inputs.objective.sequences_per_row == 0:
        return _token_loss(session, lora, before_batch)
    batches, outputs = _outputs(session, lora, before_batch)
    names = {PRESENT, *session.run.inputs.objective.values} - {REFERENCE}
    arrays = {name: np.concatenate([batch.arrays()[name][0, is_row(batch)] for batch in batches]) for name in names}
    if isinstance(outputs, ComparedLogps):
        arrays[REFERENCE] = np.asarray(outputs.reference_BS)
    totals = _sum_totals(session.run.inputs.objective, batches)
    rows_per_step = math.ceil(session.run.inputs.dataset.report.train.kept / session.run.inputs.dataset.steps_per_epoch)
    losses_R = losses_of_rows(session.run.inputs.objective, outputs, arrays, totals, rows_per_step)
    found = objective_loss_metrics(losses_R)
    if isinstance(outputs, SequenceLogps):
        objective = cast(PreferenceObjective, session.run.inputs.objective)
        found |= means_with_intervals(preference_values(objective, outputs, arrays))
    if session.run.inputs.head is not None:
        numbers = [number for batch in batches for number in batch.rows[0, :, 0][is_row(batch)].tolist()]
        found |= held_out_head_metrics(session.run.inputs.head, np.asarray(outputs), arrays, numbers)
    return found


def distilled_metrics(
    session: Session, lora: Lora, batches: Iterable[Batch], before_batch: Callable[[], None]
) -> dict[str, float]:
    """Returns the mean divergence from the teacher over the tokens of batches, and what `distillation_values` has."""
    assert session.teacher is not None, "the objective has a teacher"
    found: list[dict[str, RowValues]] = []
    parts, objective = session.parts.with_lora(lora), session.run.inputs.objective
    for batch in batches:
        before_batch()
        named = {name: array[0] for name, array in session.teacher.attach(batch).arrays().items()}
        arrays, there = place_batch(named, session.run.mesh), is_row(batch)
        outputs = unrouted(session.run.gradients.forward.outputs(objective, arrays)(parts, arrays))
        own = jax.tree.map(lambda leaf, there=there: jnp.asarray(np.asarray(leaf)[there]), outputs)
        found.append(distillation_values(own, batch.weights[0][there]))
    values = {
        name: RowValues(*map(np.concatenate, zip(*(each[name] for each in found), strict=True))) for name in found[0]
    }
    by_name = means_with_intervals(values)
    loss = {name.replace(EVAL + DIVERGENCE, LOSS): by_name.pop(name) for name in [*by_name] if DIVERGENCE in name}
    return loss | by_name | {OBJECTIVE_ROWS: len(values[DIVERGENCE].values)}


def _token_loss(session: Session, lora: Lora, before_batch: Callable[[], None]) -> dict[str, float]:
    """Returns the mean over tokens."""
    sums, tokens = [], []
    for batch in session.run.inputs.dataset.eval_batches(rows_that_divide(MAX_ROWS, session.run.mesh)):
        before_batch()
        arrays = place_batch({name: array[0] for name, array in batch.arrays().items()}, session.run.mesh)
        rows_B = evaluation_loss(session.parts.with_lora(lora), arrays, mesh=session.run.mesh)
        there = is_row(batch)
        sums.append(np.asarray(rows_B, np.float64)[there])
        tokens.append(batch.weights[0].sum(axis=1, dtype=np.int64)[there])
    return eval_loss_metrics(np.concatenate(sums), np.concatenate(tokens))


def _outputs(session: Session, lora: Lora, before_batch: Callable[[], None]) -> tuple[list[Batch], PyTree]:
    """Returns (the batches, the model's outputs for their rows, with leaves [R, ...])."""
    compute, batches, outputs = _forward_pass(session, lora), [], []
    for batch in session.run.inputs.dataset.eval_batches(rows_of_batch(session.run.config, session.run.mesh)):
        before_batch()
        read = read_by_outputs(batch.arrays(), session.run.inputs.objective)
        arrays = place_batch({name: array[0] for name, array in read.items()}, session.run.mesh)
        found = compute(arrays)
        batches.append(batch)
        outputs.append(jax.tree.map(lambda leaf, batch=batch: jnp.asarray(np.asarray(leaf)[is_row(batch)]), found))
    return batches, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)


def _forward_pass(session: Session, lora: Lora) -> Callable[[dict[str, jax.Array]], PyTree]:
    """Returns a function from a batch to the model's outputs, with the divergence if there is a reference."""
    parts, forward = session.parts.with_lora(lora), session.run.gradients.forward
    if session.reference is None:
        return lambda arrays: forward.outputs(session.run.inputs.objective, arrays)(parts, arrays)
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
