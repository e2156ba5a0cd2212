"""The rows of a tensor that each process reads, and what processes tell each other about them.

A process reads the rows whose bytes its devices hold. Processes whose devices hold the same rows each read a share of
them, and then exchange what they read. Every process computes the constants of double quantization from all rows.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from pallas_kernels.formats.fsdp_parts import Rows
from qlora_jax.sharding import FSDP

STRIP = 64  # rows that a fingerprint hashes together; a process reads whole strips


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that drive a mesh.

    Attributes:
      parts: the places along `fsdp` of each process's devices.
      this: the place of this process in `parts`.
    """

    parts: tuple[frozenset[int], ...]
    this: int = 0

    @classmethod
    def of(cls, mesh: Mesh) -> "Processes":
        """Returns the processes of a mesh, in the order of their numbers."""
        axis = mesh.axis_names.index(FSDP)
        parts: dict[int, set[int]] = {}
        for place, device in np.ndenumerate(mesh.devices):
            parts.setdefault(device.process_index, set()).add(place[axis])
        numbers = sorted(parts)
        return cls(tuple(frozenset(parts[number]) for number in numbers), numbers.index(jax.process_index()))

    def groups(self) -> dict[frozenset[int], list[int]]:
        """Returns {parts: the processes that hold them}; all in one group if parts overlap otherwise."""
        found: dict[frozenset[int], list[int]] = {}
        for process, parts in enumerate(self.parts):
            found.setdefault(parts, []).append(process)
        union = frozenset().union(*found)
        return found if sum(map(len, found)) == len(union) else {union: [*range(len(self.parts))]}

    def of_whole(self) -> "Processes":
        """Returns the processes that hold a tensor whose only part is the whole."""
        return Processes((frozenset({0}),) * len(self.parts), self.this)


@dataclasses.dataclass(frozen=True)
class ProcessRows:
    """Rows of one tensor by the process that reads them.

    Attributes:
      total: number of rows of the tensor.
      by_process: the ranges that each process reads, ascending and apart.
      process: the place of this process in `by_process`.
      shared: True if devices of a process hold rows that another process reads.
    """

    total: int
    by_process: tuple[Rows, ...]
    process: int = 0
    shared: bool = False

    @property
    def ranges(self) -> Rows:
        """The rows that this process reads."""
        return self.by_process[self.process]

    @property
    def read_by_all(self) -> bool:
        """True if every process reads all rows."""
        return all(ranges == ((0, self.total),) for ranges in self.by_process)

    def take(self, own: np.ndarray, wanted: Rows) -> np.ndarray:
        """Returns some of the rows that this process has read.

        Args:
          own: the rows of `ranges`, concatenated.
          wanted: ranges within them.
        """
        return joined([own[(start := self._place(first)) : start + end - first] for first, end in wanted])

    def _place(self, row: int) -> int:
        """Returns the place of a row among those that this process reads."""
        before = 0
        for first, end in self.ranges:
            if first <= row < end:
                return before + row - first
            before += end - first
        raise AssertionError(f"row {row} is not among {self.ranges}")

    def strips(self) -> "ProcessRows":
        """Returns the strips that each process reads, as rows."""
        spans = (tuple(_strips(*each) for each in ranges) for ranges in self.by_process)
        by_process = tuple(tuple((span.start, span.stop) for span in each) for each in spans)
        return ProcessRows(-(-self.total // STRIP), by_process, self.process)

    def of_all(self, own: np.ndarray) -> np.ndarray:
        """Returns an array of all rows from the rows that each process has; all processes call this together."""
        if self.read_by_all:
            return own
        longest = max(map(_count, self.by_process))
        padded = np.zeros((longest, *own.shape[1:]), own.dtype)
        padded[: len(own)] = own
        return self.merged(np.asarray(multihost_utils.process_allgather(padded)))

    def shared_out(self, own: np.ndarray) -> tuple[np.ndarray, "ProcessRows"]:
        """Returns (rows that include all that this process's devices hold, which they are).

        All processes call this together. They exchange what they have read if some hold the same rows.
        """
        return (self.of_all(own), all_rows(self.total)) if self.shared else (own, self)

    def merged(self, by_process: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Returns an array of all rows, from the rows of each process, concatenated and padded."""
        first = by_process[0]
        rows = np.zeros((self.total, *first.shape[1:]), first.dtype)
        for ranges, own in zip(self.by_process, by_process, strict=True):
            place = 0
            for first_row, end in ranges:
                rows[first_row:end] = own[place : place + end - first_row]
                place += end - first_row
        return rows


def all_rows(total: int) -> ProcessRows:
    """Returns the rows of a tensor that every process reads whole."""
    return ProcessRows(total, (((0, total),),))


def rows_of_parts(total: int, processes: Processes, rows_of: Callable[[int], Rows]) -> ProcessRows:
    """Returns the rows that each process reads of a tensor, from the parts that it holds.

    Processes that hold the same parts read equal shares. A tensor of fewer strips than readers is read whole by all.

    Args:
      rows_of: a part -> the rows in it.
    """
    by_process: list[Rows] = [()] * len(processes.parts)
    groups = processes.groups()
    for parts, members in groups.items():
        strips = sorted({strip for part in parts for each in rows_of(part) for strip in _strips(*each)})
        for place, process in enumerate(members):
            share = slice(place * len(strips) // len(members), (place + 1) * len(strips) // len(members))
            by_process[process] = _ranges(strips[share], total)
    if not all(by_process):
        return all_rows(total)
    return ProcessRows(total, tuple(by_process), processes.this, any(len(members) > 1 for members in groups.values()))


def _strips(first: int, end: int) -> range:
    """Returns the strips that contain some rows."""
    return range(first // STRIP, -(-end // STRIP))


def _ranges(strips: Sequence[int], total: int) -> Rows:
    """Returns the rows of strips, neighbours joined."""
    firsts = [strip for strip in strips if strip - 1 not in strips]
    lasts = [strip for strip in strips if strip + 1 not in strips]
    return tuple((first * STRIP, min(total, (last + 1) * STRIP)) for first, last in zip(firsts, lasts, strict=True))


def read_own(read_rows: Callable[[int, int], np.ndarray], own: ProcessRows) -> np.ndarray:
    """Returns the rows that this process reads, concatenated; without a copy if they are one range."""
    return joined([read_rows(first, end) for first, end in own.ranges])


def joined(ranges: Sequence[np.ndarray]) -> np.ndarray:
    """Returns arrays concatenated; a single one without a copy."""
    return ranges[0] if len(ranges) == 1 else np.concatenate(ranges)


def _count(rows: Rows) -> int:
    return sum(end - first for first, end in rows)
