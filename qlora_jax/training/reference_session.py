"""Gives a session the reference log-probabilities that its objective reads, before the first step."""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from qlora_jax.hosts.group import Group
from qlora_jax.io.run_folder.start_parameters import NO_CHANGE, read_start, start_digest, write_start
from qlora_jax.models.partition import AdapterArrays, Lora, ModelParts
from qlora_jax.objectives.objective import needs_reference, read_by_outputs
from qlora_jax.training.compiled_forward import ForwardBatch
from qlora_jax.training.display.run_display import format_duration
from qlora_jax.training.reference_logps import ReferencePass, reference_folder, reference_key
from qlora_jax.training.reference_parameters import ReferenceParameters
from qlora_jax.training.resume import TrainState
from qlora_jax.training.run_mesh import rows_of_batch
from qlora_jax.training.session import Session


class ReferenceStopped(Exception):
    """Raised within the pass when `stop()` returns True."""


def with_initial(session: Session, resumed: Path | None) -> Session:
    """Returns the session with its initial parameters and their digest, if its objective has a reference.

    They stay in host memory if there are held-out rows, which are compared with them.

    A resumed run has them again: from RUN/start.safetensors, otherwise from the seed, RUN/initial.safetensors or
    `lora.start`.

    Args:
      resumed: the folder of the run to resume; None for a new run.

    Raises:
      ValueError: RUN/start.safetensors is damaged.
    """
    if not needs_reference(session.objective):
        return session
    start = None if resumed is None else read_start(resumed)
    if start is not None:
        session = dataclasses.replace(session, parts=session.parts.with_lora(_placed(start, session.parts.lora)))
    lora, has_held_out = session.parts.lora, session.dataset.eval is not None
    reference = ReferenceParameters.of(lora, session.mesh) if has_held_out else None
    return dataclasses.replace(session, initial_digest=start_digest(lora), reference=reference)


def _placed(start: AdapterArrays, like: Lora) -> Lora:
    """Returns the parameters on the devices of `like`; `like` if they do not fit, which `check_resumable` reports."""
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), {**tree}) for tree in (start, like)]
    if shapes[0] != shapes[1]:
        return like

    def placed(values: np.ndarray, leaf: jax.Array) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: values[index])

    return jax.tree.map(placed, {**start}, like)


def record_start(session: Session, run: Path) -> None:
    """Writes the parameters of a model in memory that a new run starts with, unless they change nothing.

    Only a model in memory needs this: other runs compute them again from their settings.
    """
    if start_digest(session.parts.lora) != NO_CHANGE:
        write_start(run, session.parts.lora)


def with_reference(
    session: Session,
    state: TrainState,
    group: Group,
    stop: Callable[[], bool],
    *,
    progress: Callable[[str], None],
    message: Callable[[str], None],
) -> Session:
    """Returns the session with reference log-probabilities in its batches, if its objective reads them.

    Args:
      stop: called before each batch of the pass.
      progress: receives the progress, for a line that changes.
      message: receives a line before the pass and one after it.

    Raises:
      ReferenceStopped: `stop()` returned True. Complete pieces are stored, and a resumed run reads them.
      OSError: the values cannot be stored.
    """
    is_over = state.step >= session.total_steps and not state.evaluation_due
    if session.initial_digest is None or is_over:
        return session
    rows, began = session.dataset.report.train.kept, time.monotonic()
    message(f"reference: log p of {rows:,} rows, under the parameters that the run starts with")

    def go_on(done: int) -> None:
        if stop():
            raise ReferenceStopped
        progress(f"reference: {done:,} of {rows:,} rows")

    compute_dtype = session.weights.dtype
    reference = ReferencePass(
        parts=session.parts,
        logps_of_batch=functools.partial(_logps, session),
        key=reference_key(session.config, session.fingerprint, session.initial_digest, compute_dtype),
        folder=reference_folder(session.config),
        rows=rows_of_batch(session.config, session.mesh),
        mesh=session.mesh,
        group=group,
        go_on=go_on,
    )
    dataset = reference.run(session.dataset)
    message(f"reference: done in {format_duration(time.monotonic() - began)}")
    return dataclasses.replace(session, dataset=dataset)


def _logps(session: Session, parts: ModelParts, arrays: ForwardBatch) -> jax.Array:
    """Returns log p of a batch's sequences, [B, S]."""
    read = read_by_outputs(arrays, session.objective)
    return session.gradients.forward.outputs(session.objective, read)(parts, read).logps_BS
