"""Computes the log-probabilities of a run's answers under the parameters that it starts with, before its first step.

One pass over all rows, in the precision of the run. With an adapter that changes nothing yet, which is the default, the
reference is the base itself. Results are stored in pieces, in `data.cache` or in RUN/reference. Their key is a hash of
the rows, the base, the adapter and the precision, so that an interrupted pass resumes and other runs can read them.

Dimension key: B rows of a batch, S sequences of a row, N row numbers.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float32

from qlora_jax.config import Config
from qlora_jax.data.batching.batches import NO_ROW, Batch
from qlora_jax.data.dataset import Dataset
from qlora_jax.hosts.group import Group
from qlora_jax.inference.result_cache import SUFFIX, digest, read_result, write_result
from qlora_jax.models.partition import Lora, ModelParts
from qlora_jax.training.run_mesh import place_batch, rows_that_divide
from qlora_jax.training.several_processes import all_of

REFERENCE = "reference"  # the name of the values in batches, and of the folder in the run's
REFERENCE_ROWS = 8  # of a batch; more on a mesh of devices that 8 rows do not divide over
PIECE = 16  # batches per file
FORM = 1  # raised by a change after which stored values no longer hold

# (the model, a batch [B, T] on its devices) -> log p of its sequences
LogpsOfBatch = Callable[[ModelParts, dict[str, jax.Array]], Float32[Array, "B S"]]


def reference_folder(config: Config) -> Path:
    """Returns the folder of the stored values: in `data.cache` if it is set, otherwise in the run's folder."""
    return Path(config.output if config.data.cache is None else config.data.cache) / REFERENCE


def initial_digest(lora: Lora, mesh: Mesh | None) -> str:
    """Returns the SHA-256 of the adapter that a run starts with; that of no arrays if it changes nothing.

    A low-rank adapter whose B is 0 changes nothing, whatever its A, so that all seeds share their values.
    """
    leaves: list[object] = []
    for module, named in sorted(lora.items()):
        arrays = {name: _whole(leaf, mesh) for name, leaf in sorted(named.items())}
        if "lora_b" not in arrays or arrays["lora_b"].any():
            leaves += [part for name, array in arrays.items() for part in (f"{module}.{name}", array)]
    return digest(leaves)


def _whole(leaf: jax.Array, mesh: Mesh | None) -> np.ndarray:
    """Returns an array that may be cut over the devices of several processes."""
    if mesh is None or leaf.is_fully_addressable:
        return np.asarray(leaf)
    gathered = jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, P()))(leaf)
    return np.asarray(gathered.addressable_data(0))


def reference_key(config: Config, fingerprint: str, initial: str, compute_dtype: str) -> str:
    """Returns the hash of everything but the rows that reference values depend on.

    Args:
      fingerprint: of the base.
      initial: see `initial_digest`.
      compute_dtype: of the run, such as "bfloat16".
    """
    adapter = [] if initial == digest([]) else [initial, config.lora.alpha, config.lora.rank, config.lora.method]
    return digest([FORM, jax.default_backend(), fingerprint, compute_dtype, *adapter])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferencePass:
    """The pass of one run.

    Attributes:
      parts: the model with the parameters that the run starts with.
      key: see `reference_key`.
      folder: of the stored values.
      group: the processes of the run, which compute a piece together if one of them has not stored it.
      go_on: called before each batch with the number of rows done; it raises to end the pass.
    """

    parts: ModelParts
    logps_of_batch: LogpsOfBatch
    key: str
    folder: Path
    mesh: Mesh | None = None
    group: Group = dataclasses.field(default_factory=Group)
    go_on: Callable[[int], None] = lambda done: None

    def run(self, dataset: Dataset) -> Dataset:
        """Returns the data set with the reference log p of every row, training and held out, by the name REFERENCE."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = rows_that_divide(REFERENCE_ROWS, self.mesh)
        train = self._table(dataset.each_row_once(rows), dataset.train.number_limit, dataset.sequences, 0)
        if dataset.eval is None:
            return dataset.with_values(REFERENCE, train, None)
        done = dataset.report.train.kept
        held_out = self._table(dataset.eval_batches(rows), dataset.eval.number_limit, dataset.sequences, done)
        return dataset.with_values(REFERENCE, train, held_out)

    def _table(
        self, batches: Iterable[Batch], number_limit: int, sequences: int, done: int
    ) -> Float32[np.ndarray, "N S"]:
        """Returns log p by row number; nan where no row has the number."""
        table_NS = np.full((number_limit, sequences), np.nan, np.float32)
        for piece in itertools.batched(batches, PIECE):
            numbers = np.concatenate([batch.rows[0, _is_row(batch), 0] for batch in piece])
            table_NS[numbers] = self._logps(piece, done)
            done += len(numbers)
        return table_NS

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
        return np.asarray(logps_BS, np.float32)[_is_row(batch)]


def _is_row(batch: Batch) -> Bool[np.ndarray, " B"]:
    """Returns False for the gaps of a batch [1, B, T] without packing."""
    return batch.rows[0, :, 0] != NO_ROW
