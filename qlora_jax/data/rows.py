"""Token rows: ids and masks of a data set in flat arrays, and the file and line of each row."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from qlora_jax.data.branch_tree import (
    Branch,
    Branches,
    branch_problem,
    concatenate_branches,
    join_branches,
    no_branches,
)
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place

Values = Float32[np.ndarray, "rows sequences ..."]
ValuesByNumber = Float32[np.ndarray, "_numbers sequences ..."]


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
      branches: the branches of rows that are trees; None if each row is one text.
      values: numbers for each sequence of a row by name, [rows, sequences] or [rows, sequences, C].
    """

    ids: Int32[np.ndarray, " total"]
    supervised: Bool[np.ndarray, " total"]
    starts: Int64[np.ndarray, " rows_and_one"]
    numbers: Int64[np.ndarray, " rows"]
    lines: Int64[np.ndarray, " rows"]
    files: tuple[File, ...]
    branches: Branches | None = None
    values: Mapping[str, Values] = dataclasses.field(default_factory=dict)

    windows = 1

    def __len__(self) -> int:
        return len(self.numbers)

    def row(self, index: int) -> tuple[Int32[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
        """Returns (ids, supervised) of the row at `index`, which is not its number."""
        span = slice(self.starts[index], self.starts[index + 1])
        return self.ids[span], self.supervised[span]

    def branches_of(self, index: int) -> tuple[Branch, ...]:
        """Returns the branches of the row at `index`; none if it is one text."""
        return () if self.branches is None else self.branches.row(index)

    @property
    def lengths(self) -> Int64[np.ndarray, " rows"]:
        """Positions that each row fills in a batch: its ids without the last of each branch, or of the row."""
        return positions_filled(np.diff(self.starts), self.branch_counts)

    @property
    def branching(self) -> bool:
        """True if a row may be a tree."""
        return self.branches is not None

    @property
    def branch_counts(self) -> Int64[np.ndarray, " rows"]:
        """Number of branches of each row; 0 if it is one text."""
        return np.zeros(len(self), np.int64) if self.branches is None else self.branches.counts

    @property
    def value_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of a row's values by name."""
        return {name: array.shape[1:] for name, array in sorted(self.values.items())}

    @property
    def number_limit(self) -> int:
        """One more than the highest number of a row."""
        return int(self.numbers.max(initial=-1)) + 1

    def window(self, epoch: int, index: int) -> Window:
        """Returns all rows."""
        return Window(self, np.arange(len(self)))

    def window_lengths(self, epoch: int, index: int) -> Int64[np.ndarray, " rows"]:
        """Returns the positions that each row fills in a batch."""
        return self.lengths

    def chunks(self) -> "Iterator[TokenRows]":
        """Yields all rows at once."""
        yield self

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
    """SHA-256 of rows, added in chunks. The chunks' sizes do not change it.

    Rows without branches and values have the digest of their ids, masks, lengths and numbers.
    """

    def __init__(self) -> None:
        self._parts = [hashlib.sha256() for _ in range(4)]
        self._branches = [hashlib.sha256() for _ in range(3)]
        self._values: dict[str, hashlib._Hash] = {}
        self._is_tree = False

    def update(self, rows: TokenRows) -> None:
        """Adds rows."""
        for part, array in zip(self._parts, (rows.ids, rows.supervised, rows.lengths, rows.numbers), strict=True):
            part.update(np.ascontiguousarray(array))
        branches = rows.branches or no_branches(len(rows))
        self._is_tree |= len(branches.begin) > 0
        for part, array in zip(self._branches, (branches.counts, branches.begin, branches.depth), strict=True):
            part.update(np.ascontiguousarray(array))
        for name, array in sorted(rows.values.items()):
            part = self._values.setdefault(name, hashlib.sha256(repr((name, array.shape[1:])).encode()))
            part.update(np.ascontiguousarray(array))

    def hexdigest(self) -> str:
        """Returns the digest of all rows added so far."""
        parts = [*self._parts, *(self._branches if self._is_tree else ())]
        parts += [part for _, part in sorted(self._values.items())]
        return hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()


def positions_filled(
    ids: Int64[np.ndarray, " rows"], branch_counts: Int64[np.ndarray, " rows"]
) -> Int64[np.ndarray, " rows"]:
    """Returns the positions that rows of these numbers of ids and branches fill in a batch."""
    return ids - np.maximum(branch_counts, 1)


def format_place(files: Sequence[File], number: int, line: int) -> str:
    """Returns `file:line` of the row with that number."""
    file = [file for file in files if file.first <= number][-1]
    return f"{file.path}:{Place(line, number - file.first)}"


def token_rows(path: str, encoded: Sequence[EncodedRow], places: Sequence[Place]) -> TokenRows:
    """Returns encoded rows as flat arrays, in the order given.

    Raises:
      ValueError: a row's branches contradict its ids, or the rows have different values.
    """
    names = _value_names(encoded)
    for row, place in zip(encoded, places, strict=True):
        if (problem := branch_problem(row.branches, row.supervised)) is not None:
            raise ValueError(f"{path}:{place}: {problem}")
        if sorted(row.values) != names:
            raise ValueError(f"{path}:{place}: found the values {sorted(row.values)}, but other rows have {names}")
    lengths = np.array([len(row.ids) for row in encoded], np.int64)
    return TokenRows(
        ids=np.concatenate([np.zeros(0, np.int32), *(row.ids for row in encoded)]),
        supervised=np.concatenate([np.zeros(0, bool), *(row.supervised for row in encoded)]),
        starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        numbers=np.array([place.number for place in places], np.int64),
        lines=np.array([place.line for place in places], np.int64),
        files=(File(path),),
        branches=join_branches([row.branches for row in encoded]) if any(row.branches for row in encoded) else None,
        values={name: np.array([row.values[name] for row in encoded], np.float32) for name in _value_names(encoded)},
    )


def with_branches(rows: TokenRows) -> TokenRows:
    """Returns rows that may be trees, so that batches of them have the same arrays as those of trees."""
    return rows if rows.branching else dataclasses.replace(rows, branches=no_branches(len(rows)))


def attach_values(rows: TokenRows, by_number: Mapping[str, ValuesByNumber]) -> TokenRows:
    """Returns the rows with more values.

    Args:
      by_number: values by name, indexed by the rows' numbers.
    """
    attached = {name: values[rows.numbers] for name, values in by_number.items()}
    return dataclasses.replace(rows, values={**rows.values, **attached}) if attached else rows


def _value_names(encoded: Sequence[EncodedRow]) -> list[str]:
    return sorted(encoded[0].values) if encoded else []


def concatenate_rows(chunks: Sequence[TokenRows], files: tuple[File, ...]) -> TokenRows:
    """Returns the rows of all chunks in order, with unchanged numbers.

    Raises:
      ValueError: the chunks have different values.
    """
    lengths = np.concatenate([np.diff(chunk.starts) for chunk in chunks])
    return TokenRows(
        ids=np.concatenate([chunk.ids for chunk in chunks]),
        supervised=np.concatenate([chunk.supervised for chunk in chunks]),
        starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        numbers=np.concatenate([chunk.numbers for chunk in chunks]),
        lines=np.concatenate([chunk.lines for chunk in chunks]),
        files=files,
        branches=_joined_branches(chunks),
        values=_joined_values([chunk for chunk in chunks if len(chunk)]),
    )


def _joined_branches(chunks: Sequence[TokenRows]) -> Branches | None:
    if all(chunk.branches is None for chunk in chunks):
        return None
    return concatenate_branches([chunk.branches or no_branches(len(chunk)) for chunk in chunks])


def _joined_values(chunks: Sequence[TokenRows]) -> dict[str, Values]:
    """Returns the values of all rows; raises ValueError if files differ in them."""
    shapes = [chunk.value_shapes for chunk in chunks]
    for chunk, found in zip(chunks, shapes, strict=True):
        if found != shapes[0]:
            raise ValueError(different_values(chunk.files[0].path, found, chunks[0].files[0].path, shapes[0]))
    return {name: np.concatenate([chunk.values[name] for chunk in chunks]) for name in (shapes[0] if shapes else ())}


def different_values(
    path: str, found: Mapping[str, tuple[int, ...]], other: str, expected: Mapping[str, tuple[int, ...]]
) -> str:
    """Returns the error message for two files whose rows have different values."""
    shown = [", ".join(f"{name} {list(shape)}" for name, shape in one.items()) or "none" for one in (found, expected)]
    return (
        f"{path}: its rows are of another kind than those of {other} (found values {shown[0]}, expected {shown[1]}). "
        "Use files of one kind for an objective."
    )
