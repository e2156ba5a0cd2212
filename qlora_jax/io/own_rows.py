"""The rows of a tensor that each process reads, and what processes tell each other about them.

A process reads the rows whose bytes its devices hold. Processes whose devices hold the same rows each read a share of
them, and then exchange what they read. Every process computes the constants of double quantization from all rows.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from pallas_kernels.formats.parts import Rows
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

    def of_whole(self) -> "Processes":
        """Returns the processes that hold a tensor whose only part is the whole."""
        return Processes((frozenset({0}),) * len(self.parts), self.this)


@dataclasses.dataclass(frozen=True)
class OwnRows:
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
    def everywhere(self) -> bool:
        """True if every process reads all rows."""
        return all(ranges == ((0, self.total),) for ranges in self.by_process)

    def take(self, own: np.ndarray, wanted: Rows) -> np.ndarray:
        """Returns some of the rows that this process has read.

        Args:
          own: the rows of `ranges`, one behind the other.
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

    def strips(self) -> "OwnRows":
        """Returns the strips that each process reads, as rows."""
        by_process = (tuple((first // STRIP, -(-end // STRIP)) for first, end in ranges) for ranges in self.by_process)
        return OwnRows(-(-self.total // STRIP), tuple(by_process), self.process)

    def of_all(self, own: np.ndarray) -> np.ndarray:
        """Returns an array of all rows from the rows that each process has; all processes call this together."""
        if self.everywhere:
            return own
        longest = max(map(_count, self.by_process))
        padded = np.zeros((longest, *own.shape[1:]), own.dtype)
        padded[: len(own)] = own
        return self.merged(np.asarray(multihost_utils.process_allgather(padded)))

    def shared_out(self, own: np.ndarray) -> tuple[np.ndarray, "OwnRows"]:
        """Returns (rows that include all that this process's devices hold, which they are).

        All processes call this together. They exchange what they have read if some hold the same rows.
        """
        return (self.of_all(own), all_rows(self.total)) if self.shared else (own, self)

    def merged(self, by_process: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Returns an array of all rows, from the rows of each process, one behind the other and padded."""
        first = by_process[0]
        rows = np.zeros((self.total, *first.shape[1:]), first.dtype)
        for ranges, own in zip(self.by_process, by_process, strict=True):
            place = 0
            for first_row, end in ranges:
                rows[first_row:end] = own[place : place + end - first_row]
                place += end - first_row
        return rows


def all_rows(total: int) -> OwnRows:
    """Returns the rows of a tensor that every process reads whole."""
    return OwnRows(total, (((0, total),),))


def rows_of_parts(total: int, processes: Processes, rows_of: Callable[[int], Rows]) -> OwnRows:
    """Returns the rows that processes read of a tensor of which each holds some parts.

    A tensor of fewer strips than there are readers is read whole by all.

    Args:
      rows_of: a part -> the rows in it.
    """
    wanted: list[list[tuple[int, int]]] = [[] for _ in processes.parts]
    shared = False
    for part in sorted(frozenset().union(*processes.parts)):
        holders = [process for process, parts in enumerate(processes.parts) if part in parts]
        shared |= len(holders) > 1
        for share, process in enumerate(holders):
            wanted[process] += [_share(first, end, share, len(holders)) for first, end in rows_of(part)]
    by_process = tuple(_in_strips(ranges, total) for ranges in wanted)
    return OwnRows(total, by_process, processes.this, shared) if all(by_process) else all_rows(total)


def _share(first: int, end: int, share: int, shares: int) -> tuple[int, int]:
    """Returns one of so many shares of a range, which end where strips end."""
    ends = [(first + (end - first) * each // shares) // STRIP * STRIP for each in range(1, shares)]
    bounds = [first, *(max(first, each) for each in ends), end]
    return bounds[share], bounds[share + 1]


def read_own(read_rows: Callable[[int, int], np.ndarray], own: OwnRows) -> np.ndarray:
    """Returns the rows that this process reads, one behind the other; without a copy if they are one range."""
    return joined([read_rows(first, end) for first, end in own.ranges])


def joined(ranges: Sequence[np.ndarray]) -> np.ndarray:
    """Returns arrays one behind the other; a single one without a copy."""
    return ranges[0] if len(ranges) == 1 else np.concatenate(ranges)


def _count(rows: Rows) -> int:
    return sum(end - first for first, end in rows)


def _in_strips(ranges: Iterable[tuple[int, int]], total: int) -> Rows:
    """Returns the whole strips that contain the ranges, ascending, neighbours joined."""
    found: list[tuple[int, int]] = []
    for first, end in sorted(each for each in ranges if each[0] < each[1]):
        first, end = first // STRIP * STRIP, min(total, -(-end // STRIP) * STRIP)
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((first, end))
    return tuple(found)
