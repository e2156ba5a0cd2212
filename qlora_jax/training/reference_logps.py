"""Computes the log-probabilities of a run's answers under the parameters that it starts with, before its first step.

One pass over the training rows, in the precision of the run. With an adapter that changes nothing yet, which is the
default, the reference is the base itself. Results are stored in pieces, in `data.cache` or in RUN/reference. Their key
is a hash of the rows, the base, the adapter and the precision, so that an interrupted pass resumes and other runs can
read them.

Dimension key: B rows of a batch, S sequences of a row, N row numbers (nan where no row has the number).
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32

from qlora_jax.config import Config
from qlora_jax.data.batching.batches import Batch
from qlora_jax.data.dataset import Dataset
from qlora_jax.hosts.group import Group
from qlora_jax.inference.result_cache import SUFFIX, code_digest, digest, read_result, write_result
from qlora_jax.io.run_folder.start_parameters import NO_CHANGE
from qlora_jax.models.partition import ModelParts
from qlora_jax.objectives.objective import REFERENCE
from qlora_jax.training.run_mesh import is_row, place_batch
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
    computed_by = [FORM, code_digest(), jax.__version__, jax.devices()[0].device_kind]
    return digest([*computed_by, fingerprint, compute_dtype, *adapter])


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
