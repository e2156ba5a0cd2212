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
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from qlora_jax.data.row_store import StoredRows
from qlora_jax.data.rows import File, TokenRows, Window, concatenate_rows, format_place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One file of a mixture."""

    path: str
    rows: TokenRows | StoredRows
    weight: float
    digest: str

    @property
    def count(self) -> int:
        """Rows of this file per epoch."""
        return int(self.weight * len(self.rows) + 0.5)

    @property
    def numbers(self) -> int:
        """Upper bound of the numbers of its rows."""
        last = len(self.rows) - 1
        rows = self.rows.read(last, last + 1) if isinstance(self.rows, StoredRows) else self.rows
        return int(rows.numbers[-1]) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """The rows of several files, in the order of an epoch.

    Fields:
      size: rows per window, at most. None: one window of all rows, which are in memory.
    """

    parts: tuple[Part, ...]
    size: int | None
    seed: int

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
        firsts = itertools.accumulate((part.numbers for part in self.parts[:-1]), initial=0)
        return tuple(File(part.path, first) for part, first in zip(self.parts, firsts, strict=True))

    def window(self, epoch: int, index: int) -> Window:
        """Returns one window of an epoch: its rows of each file, in the files' order."""
        if self._in_memory is not None:
            return Window(self._in_memory, self._indices(epoch))
        pieces = [piece for which in range(len(self.parts)) for piece in self._read(which, epoch, index)]
        rows = concatenate_rows(pieces, self.files)
        return Window(rows, np.arange(len(rows)))

    def window_lengths(self, epoch: int, index: int) -> Int64[np.ndarray, " n"]:
        """Returns the positions that each row of a window fills in a batch, without reading ids."""
        if self._in_memory is not None:
            return self._in_memory.lengths[self._indices(epoch)]
        lengths = [
            np.diff(stored.ends(start, stop)) - 1
            for stored, spans in self._spans(epoch, index)
            for start, stop in spans
        ]
        return np.concatenate(lengths)

    def where(self, number: int) -> str:
        """Returns `file:line` of the row with that number."""
        if self._in_memory is not None:
            return self._in_memory.where(number)
        which = max(which for which, file in enumerate(self.files) if file.first <= number)
        rows = self.parts[which].rows
        assert isinstance(rows, StoredRows)
        return format_place(self.files, number, rows.line(number - self.files[which].first))

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

    def _spans(self, epoch: int, index: int) -> list[tuple[StoredRows, list[tuple[int, int]]]]:
        """Returns the ranges [start, stop) of each file that a window contains."""
        found = []
        for part in self.parts:
            assert isinstance(part.rows, StoredRows)
            begin, end = (epoch * part.count + part.count * edge // self.windows for edge in (index, index + 1))
            found.append((part.rows, _wrapped_ranges(begin, end, len(part.rows))))
        return found

    def _read(self, which: int, epoch: int, index: int) -> list[TokenRows]:
        stored, spans = self._spans(epoch, index)[which]
        return [_numbered(stored.read(start, stop), self.files[which].first) for start, stop in spans]


def _wrapped_ranges(begin: int, end: int, n: int) -> list[tuple[int, int]]:
    """Returns [begin, end) of a file of n rows that repeats without end, as ranges of the file."""
    edges = [begin, *range((begin // n + 1) * n, end, n), end]
    return [(a % n, a % n + b - a) for a, b in itertools.pairwise(edges) if b > a]


def _numbered(rows: TokenRows, first: int) -> TokenRows:
    return dataclasses.replace(rows, numbers=rows.numbers + first)


def check_weights(parts: Sequence[Part]) -> None:
    """Raises ValueError for files whose weight is too small for a single row per epoch."""
    none = [f"{part.path}: weight {part.weight:g} of {len(part.rows)} rows" for part in parts if not part.count]
    if none:
        raise ValueError("data.train: an epoch has no rows of some files. Raise their weights:\n  " + "\n  ".join(none))
