"""Token rows: ids and masks of a data set in flat arrays, and the file and line of each row."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place


class File(NamedTuple):
    """A file of rows.

    Fields:
      first: number of its first row, counted over all files.
    """

    path: str
    first: int = 0


class Window(NamedTuple):
    """Rows in memory.

    Fields:
      indices: indices of the rows that an epoch uses. A row may occur several times.
    """

    rows: "TokenRows"
    indices: Int64[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Rows in flat arrays: row i has the ids `ids[starts[i]:starts[i + 1]]`.

    They are an epoch of one window; mixture.py has epochs of several.

    Fields:
      supervised: True for each id that the loss sees as a target.
      numbers: number of each row, counted from 0 over all files. Batches and errors refer to rows by it.
      lines: line of each row in its file, from 1.
      files: files in ascending order of their first numbers.
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
        """Returns (ids, supervised) of the row at `index`, which is not its number."""
        span = slice(self.starts[index], self.starts[index + 1])
        return self.ids[span], self.supervised[span]

    @property
    def lengths(self) -> Int64[np.ndarray, " rows"]:
        """Positions that each row fills in a batch: one fewer than its ids."""
        return np.diff(self.starts) - 1

    def window(self, epoch: int, index: int) -> Window:
        """Returns all rows."""
        return Window(self, np.arange(len(self)))

    def window_lengths(self, epoch: int, index: int) -> Int64[np.ndarray, " rows"]:
        """Returns the positions that each row fills in a batch."""
        return self.lengths

    @property
    def digest(self) -> str:
        """SHA-256 of the rows."""
        digests = RowDigest()
        digests.update(self)
        return digests.hexdigest()

    def where(self, number: int) -> str:
        """Returns `file:line` of the row with that number; raises ValueError if no row has it."""
        index = int(np.searchsorted(self.numbers, number))
        if index == len(self) or self.numbers[index] != number:
            paths = ", ".join(file.path for file in self.files)
            raise ValueError(f"{paths}: row {number} is not one of the {len(self)} rows kept")
        return format_place(self.files, number, int(self.lines[index]))


def check_ids(rows: TokenRows, limit: int | None) -> TokenRows:
    """Returns the rows if all their ids are below `limit`, the rows of the model's embedding.

    Raises:
      ValueError: a row has another id; the message names the first such row.
    """
    unsigned = rows.ids.view(np.uint32)  # a negative id becomes a large one
    if limit is None or int(unsigned.max(initial=0)) < limit:
        return rows
    position = int(np.argmax(unsigned >= limit))
    row = int(np.searchsorted(rows.starts, position, "right")) - 1
    raise ValueError(
        f"{rows.where(int(rows.numbers[row]))}: an id has no row in the model's embedding (found "
        f"{rows.ids[position]}, expected 0 to {limit - 1}). Use the tokenizer that was loaded with the model, and "
        "delete this data's entry in data.cache if there is one."
    )


class RowDigest:
    """SHA-256 of rows, added in chunks. The chunks' sizes do not change it."""

    def __init__(self) -> None:
        self._parts = [hashlib.sha256() for _ in range(4)]

    def update(self, rows: TokenRows) -> None:
        """Adds rows."""
        for part, array in zip(self._parts, (rows.ids, rows.supervised, rows.lengths, rows.numbers), strict=True):
            part.update(np.ascontiguousarray(array))

    def hexdigest(self) -> str:
        """Returns the digest of all rows added so far."""
        return hashlib.sha256(b"".join(part.digest() for part in self._parts)).hexdigest()


def format_place(files: Sequence[File], number: int, line: int) -> str:
    """Returns `file:line` of the row with that number."""
    file = [file for file in files if file.first <= number][-1]
    return f"{file.path}:{Place(line, number - file.first)}"


def token_rows(path: str, encoded: Sequence[EncodedRow], places: Sequence[Place]) -> TokenRows:
    """Returns encoded rows as flat arrays, in the order given."""
    lengths = np.array([len(row.ids) for row in encoded], np.int64)
    return TokenRows(
        ids=np.concatenate([np.zeros(0, np.int32), *(row.ids for row in encoded)]),
        supervised=np.concatenate([np.zeros(0, bool), *(row.supervised for row in encoded)]),
        starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        numbers=np.array([place.number for place in places], np.int64),
        lines=np.array([place.line for place in places], np.int64),
        files=(File(path),),
    )


def concatenate_rows(chunks: Sequence[TokenRows], files: tuple[File, ...]) -> TokenRows:
    """Returns the rows of all chunks in order, with unchanged numbers."""
    lengths = np.concatenate([np.diff(chunk.starts) for chunk in chunks])
    return TokenRows(
        ids=np.concatenate([chunk.ids for chunk in chunks]),
        supervised=np.concatenate([chunk.supervised for chunk in chunks]),
        starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        numbers=np.concatenate([chunk.numbers for chunk in chunks]),
        lines=np.concatenate([chunk.lines for chunk in chunks]),
        files=files,
    )
