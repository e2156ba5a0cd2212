"""Computes the log-probabilities of a run's answers under the parameters that it starts with, before its first step.

One pass over the training rows, in the precision of the run. With an adapter that changes nothing yet, which is the
default, the reference is the base itself; with `lora.merge_into`, it is the base rounded to that format. Results are
stored in pieces, in `data.cache` or in RUN/reference. Their key is a hash of the rows, the base, the adapter and the
precision, so that an interrupted pass resumes and other runs can read them.

Dimension key: B rows of a batch, S sequences of a row, N row numbers (nan where no row has the number).
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32

from qlora_jax.config import Config
from qlora_jax.config.sizes import format_duration
from qlora_jax.data.batching.packing import Batch
from qlora_jax.data.dataset import Dataset
from qlora_jax.hosts.group import Group
from qlora_jax.inference.result_cache import SUFFIX, code_digest, digest, read_result, write_result
from qlora_jax.io.run_folder.start_parameters import NO_CHANGE, read_start, start_digest, write_start
from qlora_jax.models.partition import AdapterArrays, Lora, ModelParts
from qlora_jax.objectives.objective import REFERENCE, needs_reference, read_by_outputs, token_values
from qlora_jax.objectives.policy_gradient import REFERENCE_LOGPS
from qlora_jax.training.compiled_programs import ForwardBatch
from qlora_jax.training.device_mesh import is_row, place_batch, rows_of_batch
from qlora_jax.training.resume import TrainState
from qlora_jax.training.session import ReferenceParameters, Session
from qlora_jax.training.several_processes import all_of

PIECE_ROWS = 128  # per file
FORM = 2  # raised by a change after which stored values no longer hold

# (the model, a batch [B, T] on its devices) -> log p of its sequences
LogpsOfBatch = Callable[[ModelParts, dict[str, jax.Array]], Float32[Array, "B S"]]


def reference_folder(config: Config) -> Path:
    """Returns the folder of the stored values: in `data.cache` if it is set, otherwise in the run's folder."""
    return Path(config.output if config.data.cache is None else config.data.cache) / REFERENCE


def reference_key(config: Config, fingerprint: str, initial: str, compute_dtype: str) -> str:
    """Returns the hash of everything but the rows that reference values depend on.

    Args:
      fingerprint: of the base.
      initial: digest of the initial parameters (start_parameters.py).
      compute_dtype: of the run, such as "bfloat16".
    """
    adapter = [] if initial == NO_CHANGE else [initial, dataclasses.replace(config.lora, start=None, dropout=0.0)]
    rounded = [each for each in (config.lora.merge_into, config.lora.merge_types) if each]
    computed_by = [FORM, code_digest(), jax.__version__, jax.devices()[0].device_kind]
    return digest([*computed_by, fingerprint, compute_dtype, *adapter, *rounded])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferencePass:
    """The pass of one run.

    Attributes:
      parts: the model with the parameters that the run starts with.
      key: see `reference_key`.
      folder: of the stored values.
      rows: rows of a batch.
      group: the processes of the run, which compute a piece together if one of them has not stored it.
      go_on: called before each batch with the number of rows done; it raises to end the pass.
    """

    parts: ModelParts
    logps_of_batch: LogpsOfBatch
    key: str
    folder: Path
    rows: int
    mesh: Mesh | None = None
    group: Group = dataclasses.field(default_factory=Group)
    go_on: Callable[[int], None] = lambda done: None

    def run(self, dataset: Dataset) -> Dataset:
        """Returns the data set with the reference log p of every training row, by the name REFERENCE."""
        self.folder.mkdir(parents=True, exist_ok=True)
        table_NS, done = np.full((dataset.train.number_limit, dataset.sequences), np.nan, np.float32), 0
        for piece in itertools.batched(dataset.each_row_once(self.rows), max(1, PIECE_ROWS // self.rows)):
            numbers = np.concatenate([batch.rows[0, is_row(batch), 0] for batch in piece])
            table_NS[numbers] = self._logps(piece, done)
            done += len(numbers)
        return dataset.with_values(REFERENCE, table_NS)

    def _logps(self, piece: Sequence[Batch], done: int) -> Float32[np.ndarray, "rows S"]:
        arrays = [part for batch in piece for named in sorted(batch.arrays().items()) for part in named]
        path = self.folder / f"{digest([self.key, *arrays])}{SUFFIX}"
        stored = read_result(path)
        if all_of(self.group, "stored reference values", stored is not None) and stored is not None:
            self.go_on(done)
            return stored[0]
        found = []
        for batch in piece:
            self.go_on(done + sum(map(len, found)))
            found.append(self._compute(batch))
        write_result(path, (np.concatenate(found),))
        return np.concatenate(found)

    def _compute(self, batch: Batch) -> Float32[np.ndarray, "rows S"]:
        arrays = place_batch({name: array[0] for name, array in batch.arrays().items()}, self.mesh)
        logps_BS = self.logps_of_batch(self.parts, arrays)
        return np.asarray(logps_BS, np.float32)[is_row(batch)]


class ReferenceStopped(Exception):
    """Raised within the pass when `stop()` returns True."""


def with_initial(session: Session, resumed: Path | None) -> Session:
    """Returns the session with its initial parameters and their digest, if its objective has a reference.

    They stay in host memory if there are held-out rows, which are compared with them, or if each step reads them.

    A resumed run has them again: from RUN/start.safetensors, otherwise from the seed, RUN/initial.safetensors or
    `lora.start`.

    Args:
      resumed: the folder of the run to resume; None for a new run.

    Raises:
      ValueError: RUN/start.safetensors is damaged.
    """
    objective = session.run.inputs.objective
    if not needs_reference(objective) and REFERENCE_LOGPS not in token_values(objective):
        return session
    start = None if resumed is None else read_start(resumed)
    if start is not None:
        session = dataclasses.replace(session, parts=session.parts.with_lora(_placed(start, session.parts.lora)))
    lora = session.parts.lora
    is_read = session.run.inputs.dataset.eval is not None or not needs_reference(objective)
    reference = ReferenceParameters.of(lora, session.run.mesh) if is_read else None
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
    is_over = state.step >= session.run.total_steps and not state.evaluation_due
    if session.initial_digest is None or not needs_reference(session.run.inputs.objective) or is_over:
        return session
    rows, began = session.run.inputs.dataset.report.train.kept, time.monotonic()
    message(f"reference: log p of {rows:,} rows, under the parameters that the run starts with")

    def go_on(done: int) -> None:
        if stop():
            raise ReferenceStopped
        progress(f"reference: {done:,} of {rows:,} rows")

    compute_dtype = session.run.step.weights.dtype
    reference = ReferencePass(
        parts=session.parts,
        logps_of_batch=functools.partial(_logps, session),
        key=reference_key(session.run.config, session.fingerprint, session.initial_digest, compute_dtype),
        folder=reference_folder(session.run.config),
        rows=rows_of_batch(session.run.config, session.run.mesh),
        mesh=session.run.mesh,
        group=group,
        go_on=go_on,
    )
    dataset = reference.run(session.run.inputs.dataset)
    message(f"reference: done in {format_duration(time.monotonic() - began)}")
    run = session.run
    return dataclasses.replace(
        session, run=dataclasses.replace(run, inputs=dataclasses.replace(run.inputs, dataset=dataset))
    )


def _logps(session: Session, parts: ModelParts, arrays: ForwardBatch) -> jax.Array:
    """Returns log p of a batch's sequences, [B, S]."""
    read = read_by_outputs(arrays, session.run.inputs.objective)
    return session.run.gradients.forward.outputs(session.run.inputs.objective, read)(parts, read).logps_BS
