"""Token rows: the ids and masks of a data set in flat arrays, and where each row came from."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place


class File(NamedTuple):
    """A file of rows, and the number of its first row among those of all files."""

    path: str
    first: int = 0


class Window(NamedTuple):
    """Rows in memory, and the indices of those among them that are gone through; one may be there several times."""

    rows: "TokenRows"
    indices: Int64[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Row i has the ids `ids[starts[i]:starts[i + 1]]`. They are one window of an epoch (mixture.py has several).

    Fields:
      supervised: for each id, whether the loss sees it as a target.
      numbers: the row's number among those of all files, from 0; `batches` and errors name rows by it.
      lines: the row's line in its file, from 1.
      files: in ascending order of their first numbers.
    """

    ids: Int32[np.ndarray, " total"]
    supervised: Bool[np.ndarray, " total"]
    starts: Int64[np.ndarray, " rows_and_one"]
    numbers: Int64[np.ndarray, " rows"]
    lines: Int64[np.ndarray, " rows"]
    files: tuple[File, ...]

    windows = 1

    def __len__(self) -> int:
        return len(self.numbers)

    def row(self, index: int) -> tuple[Int32[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
        """(ids, supervised) of the row at `index` (not its number)."""
        span = slice(self.starts[index], self.starts[index + 1])
        return self.ids[span], self.supervised[span]

    @property
    def lengths(self) -> Int64[np.ndarray, " rows"]:
        """Places that each row fills in a batch: one fewer than its ids."""
        return np.diff(self.starts) - 1

    def window(self, epoch: int, index: int) -> Window:
        """All rows."""
        return Window(self, np.arange(len(self)))

    def window_lengths(self, epoch: int, index: int) -> Int64[np.ndarray, " rows"]:
        """Places that each row fills in a batch."""
        return self.lengths

    @property
    def digest(self) -> str:
        """SHA-256 of the rows."""
        digests = RowDigest()
        digests.update(self)
        return digests.hexdigest()

    def where(self, number: int) -> str:
        """`file:line` of the row of that number."""
        index = int(np.searchsorted(self.numbers, number))
        if index == len(self) or self.numbers[index] != number:
            paths = ", ".join(file.path for file in self.files)
            raise ValueError(f"{paths}: row {number} is not among the {len(self)} rows kept")
        return format_place(self.files, number, int(self.lines[index]))


class RowDigest:
    """SHA-256 of rows that come in pieces; how they are cut makes no difference."""

    def __init__(self) -> None:
        self._parts = [hashlib.sha256() for _ in range(4)]

    def update(self, rows: TokenRows) -> None:
        """Adds rows."""
        for part, array in zip(self._parts, (rows.ids, rows.supervised, rows.lengths, rows.numbers), strict=True):
            part.update(np.ascontiguousarray(array))

    def hexdigest(self) -> str:
        """The digest of all rows so far."""
        return hashlib.sha256(b"".join(part.digest() for part in self._parts)).hexdigest()


def format_place(files: Sequence[File], number: int, line: int) -> str:
    """`file:line` of the row of that number."""
    file = [file for file in files if file.first <= number][-1]
    return f"{file.path}:{Place(line, number - file.first)}"


def token_rows(path: str, encoded: Sequence[EncodedRow], places: Sequence[Place]) -> TokenRows:
    """The rows in one object, in the order given (that of the file)."""
    lengths = np.array([len(row.ids) for row in encoded], np.int64)
    return TokenRows(
        ids=np.concatenate([np.zeros(0, np.int32), *(row.ids for row in encoded)]),
        supervised=np.concatenate([np.zeros(0, bool), *(row.supervised for row in encoded)]),
        starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        numbers=np.array([place.number for place in places], np.int64),
        lines=np.array([place.line for place in places], np.int64),
        files=(File(path),),
    )


def concatenate_rows(pieces: Sequence[TokenRows], files: tuple[File, ...]) -> TokenRows:
    """All rows of all pieces, one behind the other, their numbers as they are."""
    lengths = np.concatenate([np.diff(piece.starts) for piece in pieces])
    return TokenRows(
        ids=np.concatenate([piece.ids for piece in pieces]),
        supervised=np.concatenate([piece.supervised for piece in pieces]),
        starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        numbers=np.concatenate([piece.numbers for piece in pieces]),
        lines=np.concatenate([piece.lines for piece in pieces]),
        files=files,
    )
