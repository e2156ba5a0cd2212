"""Mixtures: several files with weights, read whole or in windows. A pure function of (epoch, window).

The weight of a file is the number of times that an epoch goes through it: of n rows it uses round(weight n). The next
epoch continues where the last one stopped, so two epochs of weight 1/2 use each row once. Any two rows' counts differ
by at most one.

An epoch of n rows has ceil(n / window) windows of about equal size, each with its share of every file. Rows in memory
are used in an order that the seed determines; rows in windows, in the order of their file.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int64

from qlora_jax.data.kto_pairs import PairedRows, wrapped_ranges
from qlora_jax.data.row_store import StoredRows
from qlora_jax.data.rows import (
    File,
    TokenRows,
    ValuesByNumber,
    Window,
    attach_values,
    concatenate_rows,
    different_values,
    format_place,
    with_branches,
)

CHUNK = 1 << 16  # rows whose lengths are in memory at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One file of a mixture."""

    path: str
    rows: TokenRows | StoredRows | PairedRows
    weight: float
    digest: str

    @property
    def count(self) -> int:
        """Rows of this file per epoch."""
        return int(self.weight * len(self.rows) + 0.5)

    @property
    def longest(self) -> int:
        """Positions of the longest row."""
        return max(int(lengths.max()) for lengths, _ in self._sizes())

    @property
    def sequences(self) -> tuple[int, int]:
        """Fewest and most sequences of a row."""
        counts = [np.maximum(counts, 1) for _, counts in self._sizes()]
        return min(int(one.min()) for one in counts), max(int(one.max()) for one in counts)

    def _sizes(self) -> Iterator[tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]]:
        """Yields lengths, and numbers of branches, of the rows in chunks."""
        if isinstance(self.rows, TokenRows):
            yield self.rows.lengths, self.rows.branch_counts
            return
        for start in range(0, len(self.rows), CHUNK):
            stop = min(start + CHUNK, len(self.rows))
            yield self.rows.lengths(start, stop), self.rows.branch_counts(start, stop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """The rows of several files, in the order of an epoch.

    Fields:
      size: rows per window, at most. None: one window of all rows, which are in memory.
      attached: more values of the rows by name, indexed by their numbers. They do not change the digest.
    """

    parts: tuple[Part, ...]
    size: int | None
    seed: int
    attached: Mapping[str, ValuesByNumber] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def windows(self) -> int:
        """Windows per epoch."""
        return 1 if self.size is None else -(-len(self) // self.size)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the rows, and of the settings that determine the order of windows."""
        order = (self.size, self.seed, [(part.weight, part.digest) for part in self.parts])
        return hashlib.sha256(repr(order).encode()).hexdigest()

    @functools.cached_property
    def files(self) -> tuple[File, ...]:
        """The files, with row numbers counted over all of them."""
        firsts = itertools.accumulate((part.rows.number_limit for part in self.parts[:-1]), initial=0)
        return tuple(File(part.path, first) for part, first in zip(self.parts, firsts, strict=True))

    @property
    def number_limit(self) -> int:
        """One more than the highest number of a row."""
        return self.files[-1].first + self.parts[-1].rows.number_limit

    @property
    def branching(self) -> bool:
        """True if a row may be a tree."""
        return any(part.rows.branching for part in self.parts)

    def window(self, epoch: int, index: int) -> Window:
        """Returns one window of an epoch: its rows of each file, in the files' order."""
        if self._in_memory is not None:
            return Window(self._complete([self._in_memory]), self._indices(epoch))
        rows = self._complete(
            [
                self._read(which, start, stop)
                for which, spans in enumerate(self._spans(epoch, index))
                for start, stop in spans
            ]
        )
        return Window(rows, np.arange(len(rows)))

    def chunks(self) -> Iterator[TokenRows]:
        """Yields every row of every file once, in chunks of a window's size."""
        if self._in_memory is not None:
            yield self._complete([self._in_memory])
            return
        assert self.size is not None
        for which, part in enumerate(self.parts):
            for start in range(0, len(part.rows), self.size):
                yield self._complete([self._read(which, start, min(start + self.size, len(part.rows)))])

    def window_lengths(self, epoch: int, index: int) -> Int64[np.ndarray, " n"]:
        """Returns the positions that each row of a window fills in a batch, without reading ids."""
        if self._in_memory is not None:
            return self._in_memory.lengths[self._indices(epoch)]
        lengths = [
            self._stored(which).lengths(start, stop)
            for which, spans in enumerate(self._spans(epoch, index))
            for start, stop in spans
        ]
        return np.concatenate(lengths)

    def where(self, number: int) -> str:
        """Returns `file:line` of the row with that number."""
        if self._in_memory is not None:
            return self._in_memory.where(number)
        which = max(which for which, file in enumerate(self.files) if file.first <= number)
        return format_place(self.files, number, self._stored(which).line(number - self.files[which].first))

    @functools.cached_property
    def _in_memory(self) -> TokenRows | None:
        pieces = [part.rows for part in self.parts if isinstance(part.rows, TokenRows)]
        if len(pieces) < len(self.parts):
            return None
        numbered = [_numbered(piece, file.first) for piece, file in zip(pieces, self.files, strict=True)]
        return concatenate_rows(numbered, self.files)

    def _indices(self, epoch: int) -> Int64[np.ndarray, " n"]:
        """Returns the ascending indices of the rows in memory that an epoch uses."""
        found, base = [], 0
        for which, part in enumerate(self.parts):
            n, count = len(part.rows), part.count
            order = np.random.default_rng([self.seed, which]).permutation(n)
            found.append(base + order[np.arange(epoch * count, (epoch + 1) * count) % n])
            base += n
        return np.sort(np.concatenate(found))

    def _spans(self, epoch: int, index: int) -> list[list[tuple[int, int]]]:
        """Returns the ranges [start, stop) of each file that a window contains."""
        found = []
        for part in self.parts:
            begin, end = (epoch * part.count + part.count * edge // self.windows for edge in (index, index + 1))
            found.append(wrapped_ranges(begin, end, len(part.rows)))
        return found

    def _stored(self, which: int) -> StoredRows | PairedRows:
        rows = self.parts[which].rows
        assert not isinstance(rows, TokenRows)
        return rows

    def _read(self, which: int, start: int, stop: int) -> TokenRows:
        return _numbered(self._stored(which).read(start, stop), self.files[which].first)

    def _complete(self, pieces: Sequence[TokenRows]) -> TokenRows:
        """Returns the pieces as one, with all arrays that rows of this mixture have."""
        rows = pieces[0] if len(pieces) == 1 else concatenate_rows(pieces, self.files)
        return attach_values(with_branches(rows) if self.branching else rows, self.attached)


def _numbered(rows: TokenRows, first: int) -> TokenRows:
    return dataclasses.replace(rows, numbers=rows.numbers + first)


def check_weights(parts: Sequence[Part]) -> None:
    """Raises ValueError for files whose weight is too small for a single row per epoch."""
    none = [f"{part.path}: weight {part.weight:g} of {len(part.rows)} rows" for part in parts if not part.count]
    if none:
        raise ValueError("data.train: an epoch has no rows of some files. Raise their weights:\n  " + "\n  ".join(none))


def check_kinds(parts: Sequence[Part]) -> None:
    """Raises ValueError if files have rows of different kinds, which have different values."""
    first = parts[0]
    wrong = [part for part in parts if part.rows.value_shapes != first.rows.value_shapes]
    if wrong:
        shapes = (wrong[0].rows.value_shapes, first.rows.value_shapes)
        raise ValueError(different_values(wrong[0].path, shapes[0], first.path, shapes[1]))


def count_sequences(parts: Sequence[Part]) -> int:
    """Returns the sequences of every row; raises ValueError if rows have different numbers of them."""
    found = {part.path: part.sequences for part in parts}
    fewest, most = min(few for few, _ in found.values()), max(many for _, many in found.values())
    if fewest != most:
        listed = "\n  ".join(
            f"{path}: {few}" if few == many else f"{path}: {few} to {many}" for path, (few, many) in found.items()
        )
        raise ValueError(
            f"data: rows have different numbers of texts. Use files whose rows all have the same number:\n  {listed}"
        )
    return most
