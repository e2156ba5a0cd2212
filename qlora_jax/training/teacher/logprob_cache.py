"""A teacher's predictions in batches: computed for each batch, or once for each row and then read from files.

A file has the predictions of one row. Its name is a hash of the row's tokens and of all that the teacher's numbers
depend on, so an interrupted pass resumes, and other runs on the same rows read them, in any order and packing.

Dimension key: A micro-batches, B rows, T positions, N supervised positions of a row, K tokens, L = K + 1.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int32

from qlora_jax.data.batching.packing import Batch
from qlora_jax.inference.result_cache import SUFFIX, digest, read_result, write_result
from qlora_jax.objectives.distillation import TEACHER_IDS, TEACHER_LOGPS

Arrays = Mapping[str, np.ndarray]


class TeacherError(ValueError):
    """A teacher that gives no predictions, now; the run can go on later."""


class Predictions(NamedTuple):
    """The teacher's likeliest tokens at positions; numbers of positions that are not supervised mean nothing.

    Fields:
      ids: the tokens, [..., K].
      logps: log p of each, and last that of all others together, [..., L].
    """

    ids: Int32[np.ndarray, "..."]
    logps: Float32[np.ndarray, "..."]


def check_are_known(ids: Int32[np.ndarray, "..."], tokens: int) -> None:
    """Raises ValueError if a teacher predicts a token beyond the `tokens` that the student has."""
    if (beyond := int(ids.max())) >= tokens:
        raise ValueError(
            f"distillation.teacher: predicts the token {beyond}, expected ids below {tokens}, the rows of the model's "
            "embedding. Lower distillation.loss_top_k, or choose another teacher"
        )


@runtime_checkable
class Teacher(Protocol):
    """A loaded model."""

    def predict(self, arrays: Arrays) -> Predictions:
        """Returns its predictions, [B, T, ...], for the arrays of a micro-batch (`Batch.arrays` without the axis A)."""
        ...


@runtime_checkable
class TeacherSource(Protocol):
    """A teacher that is not loaded.

    Attributes:
      count: K.
      key: a hash of all that its predictions depend on, besides the rows.
      nbytes: bytes of its weights in this process's memory.
      rows: rows of the data that it predicts together; None: those of the run's batches.
    """

    @property
    def count(self) -> int: ...

    @property
    def key(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def rows(self) -> int | None: ...

    def load(self, mesh: Mesh | None, progress: Callable[..., None]) -> Teacher:
        """Loads the weights."""
        ...


@dataclasses.dataclass(frozen=True)
class LiveTeacher:
    """A teacher that predicts each batch when it is needed."""

    teacher: Teacher

    def attach(self, batch: Batch) -> Batch:
        """Returns the batch with the teacher's predictions."""
        arrays = batch.arrays()
        micros = [{name: array[a] for name, array in arrays.items()} for a in range(len(batch.inputs))]
        found = [self.teacher.predict(micro) for micro in micros]
        return _with_predictions(batch, Predictions(*(np.stack(each) for each in zip(*found, strict=True))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTeacher:
    """Predictions in files.

    Attributes:
      key: a hash of all that they depend on, besides the rows.
      count: K.
    """

    folder: Path
    key: str
    count: int

    def fill(self, batches: Iterable[Batch], open_teacher: Callable[[], Teacher], go_on: Callable[[int], None]) -> None:
        """Computes what is missing or damaged.

        Args:
          batches: of one micro-batch each.
          open_teacher: called once, if something is missing.
          go_on: called after each batch with the number of rows done.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        teacher, done = None, 0
        for batch in batches:
            rows = [*_rows(batch)]
            missing = [row for row in rows if read_result(self._path(batch, row)) is None]
            if missing:
                teacher = open_teacher() if teacher is None else teacher
                found = teacher.predict({name: array[0] for name, array in batch.arrays().items()})
                for row in missing:
                    at = row.place[1], row.supervised(batch)
                    write_result(self._path(batch, row), (found.ids[at], found.logps[at]))
            done += len(rows)
            go_on(done)

    def attach(self, batch: Batch) -> Batch:
        """Returns the batch with the predictions of its rows.

        Raises:
          ValueError: a file is missing or damaged.
        """
        shape = batch.inputs.shape
        ids, logps = np.zeros((*shape, self.count), np.int32), np.zeros((*shape, self.count + 1), np.float32)
        for row in _rows(batch):
            path = self._path(batch, row)
            stored = read_result(path)
            if stored is None:
                raise ValueError(
                    f"{path}: the teacher's predictions are missing or damaged. Resume the run, which computes them "
                    "again"
                )
            at = *row.place, row.supervised(batch)
            ids[at], logps[at] = stored
        return _with_predictions(batch, Predictions(ids, logps))

    def _path(self, batch: Batch, row: "_Row") -> Path:
        return self.folder / f"{digest([self.key, *row.content(batch)])}{SUFFIX}"


DistilledBatches = LiveTeacher | StoredTeacher  # give batches the teacher's predictions


class _Row(NamedTuple):
    """A data row in a batch: the batch's row [A, B], and its first and last position there."""

    place: tuple[int, int]
    start: int
    end: int

    def supervised(self, batch: Batch) -> np.ndarray:
        """Returns its supervised positions, [N]."""
        return self.start + np.flatnonzero(batch.weights[self.place][self.start : self.end])

    def content(self, batch: Batch) -> list[np.ndarray]:
        """Returns its arrays, which do not depend on what it is packed with."""
        span = slice(self.start, self.end)
        arrays = [each[self.place][span] for each in (batch.inputs, batch.targets, batch.weights)]
        if batch.segments is None or batch.parents is None or batch.depths is None:
            return arrays
        first = batch.segments[self.place][self.start]
        arrays += [each[self.place][span] - first for each in (batch.segments, batch.parents)]
        return [*arrays, batch.depths[self.place][span]]


def _rows(batch: Batch) -> Iterator[_Row]:
    ends = batch.lengths.cumsum(axis=2)
    for (a, b, nth), length in np.ndenumerate(batch.lengths):
        if length:
            yield _Row((a, b), int(ends[a, b, nth] - length), int(ends[a, b, nth]))


def _with_predictions(batch: Batch, found: Predictions) -> Batch:
    predicted = {TEACHER_IDS: found.ids, TEACHER_LOGPS: found.logps}
    return dataclasses.replace(batch, token_values={**batch.token_values, **predicted})
