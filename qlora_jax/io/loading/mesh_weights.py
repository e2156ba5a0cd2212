"""Puts the tensors of a model on a mesh: each device gets its part, and each process reads the rows of its devices."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from pallas_kernels.formats.fsdp_parts import FsdpParts, Rows, equal_rows
from pallas_kernels.formats.layouts import LAYOUTS, convert_codes, natural_layout
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.io.tensor_map import Slot
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import is_table, partition, parts_specs
from qlora_jax.nn.frozen_weight import ops_of
from qlora_jax.nn.variables import StatePath
from qlora_jax.sharding import FSDP, axis_size, cut_axis, named

# The rows of a tensor that each process reads, and what processes tell each other about them.
#
# A process reads the rows whose bytes its devices hold. Processes whose devices hold the same rows each read a share of
# them, and then exchange what they read. Every process computes the constants of double quantization from all rows.

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


_converted = jax.jit(convert_codes, static_argnames=("shape", "given", "wanted"))


@dataclasses.dataclass(frozen=True)
class PlacedWeight:
    """The place on a mesh of a weight that is held in 4 bits.

    Attributes:
      mesh: the devices.
      stack: the stack that the weight is a layer or an expert of, with ShapeDtypeStructs.
      specs: the PartitionSpecs of the stack's leaves.
    """

    mesh: Mesh
    stack: QTensor
    specs: QTensor

    @property
    def cut(self) -> FsdpParts:
        """The cut of its codes; none if the stack is cut between its experts."""
        axis = cut_axis(self._spec("codes"))
        if axis is None:
            return FsdpParts(self.stack.layout, self.stack.shape)
        return FsdpParts(self.stack.layout, self.stack.shape, axis, axis_size(self.mesh, FSDP))

    @property
    def rows(self) -> ProcessRows:
        """The rows of the weight that processes read."""
        total, processes = self.stack.shape[0], Processes.of(self.mesh)
        if natural_layout(self.stack.shape, self.stack.block_size) == "flat":
            return all_rows(total)  # rows are not whole blocks
        return rows_of_parts(total, processes if self.cut.by_rows else processes.of_whole(), self.cut.rows)

    def put(self, codes: np.ndarray, rows: ProcessRows, constants: Mapping[str, np.ndarray]) -> QTensor:
        """Returns the weight with each leaf on the mesh.

        Args:
          codes: of the rows that this process has, in the natural layout.
          rows: which they are.
          constants: the other leaves, of the whole weight, in block order.
        """
        codes, rows = rows.shared_out(codes)
        turn = LAYOUTS[self.stack.layout].turn
        stored = {name: turn(each) if each.ndim == 2 else each for name, each in constants.items()}
        leaves = {name: self._constant(name, each) for name, each in stored.items()}
        return dataclasses.replace(self.stack, codes=self._codes(codes, rows), **leaves)

    def _spec(self, leaf: str) -> P:
        """Returns the spec of a leaf that only this weight has."""
        return P(*getattr(self.specs, leaf)[len(self.stack.stack_shape) :])

    def _constant(self, name: str, values: np.ndarray) -> jax.Array:
        sharding = NamedSharding(self.mesh, self._spec(name))
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    def _codes(self, codes: np.ndarray, rows: ProcessRows) -> jax.Array:
        cut = self.cut
        natural = natural_layout(cut.shape, self.stack.block_size)

        @functools.cache  # devices along `data` have the same part
        def part(at: int) -> np.ndarray:
            own = rows.take(codes, cut.rows(at)) if cut.by_rows else codes
            shape = (sum(end - first for first, end in cut.rows(at)), *cut.shape[1:])
            return cut.slice(np.asarray(_converted(own, shape, natural, cut.layout)), at)

        shape = self.stack.codes.shape[len(self.stack.stack_shape) :]
        return _assembled(shape, self._spec("codes"), self.mesh, part)


@dataclasses.dataclass(frozen=True)
class PlacedArray:
    """The place on a mesh of a dense tensor: whole on every device, or a table that is cut along its rows."""

    mesh: Mesh
    shape: tuple[int, ...]
    dtype: np.dtype
    spec: P

    @property
    def rows(self) -> ProcessRows:
        """The rows of the tensor that processes read; a vector is read whole."""
        if len(self.shape) == 1:
            return all_rows(self.shape[0])
        processes = Processes.of(self.mesh)
        whole = cut_axis(self.spec) is None
        return rows_of_parts(self.shape[0], processes.of_whole() if whole else processes, self._rows_of)

    def put(self, own: np.ndarray, rows: ProcessRows) -> jax.Array:
        """Returns the tensor on the mesh, in its dtype and in new memory.

        Args:
          own: the rows that this process has.
          rows: which they are.
        """

        own, rows = rows.shared_out(own)

        def part(at: int) -> np.ndarray:
            # Copied because the memory may belong to the file.
            return np.array(rows.take(own, self._rows_of(at)), self.dtype)

        return _assembled(self.shape, self.spec, self.mesh, part)

    def _rows_of(self, part: int) -> tuple[tuple[int, int], ...]:
        return equal_rows(self.shape[0], part, 1 if cut_axis(self.spec) is None else axis_size(self.mesh, FSDP))


class MeshPlaces:
    """The places of all tensors of a model on a mesh.

    Args:
      model: the model, with ShapeDtypeStructs.
      whole_tables: True if embedding and head stay whole, because rows of them train.
    """

    def __init__(self, model: CausalLM, mesh: Mesh, *, whole_tables: bool):
        specs = parts_specs(partition(model), mesh).base
        self._mesh = mesh
        self._specs: dict[StatePath, PyTree] = {
            path: P() if whole_tables and is_table(".".join(map(str, path[:-1]))) else leaf.get_value()
            for path, leaf in nnx.to_flat_state(specs)
        }

    def shardings(self, slot: Slot) -> PyTree:
        """Returns the sharding of each array of a slot's leaf."""
        return named(self._mesh, self._specs[slot.path])

    def of(self, slot: Slot, index: int) -> PlacedWeight | PlacedArray:
        """Returns the place of one tensor of a slot."""
        specs = self._specs[slot.path]
        stack = slot.quantization_of(index)
        if stack is not None and ops_of(stack).is_cut:
            return PlacedWeight(self._mesh, cast(QTensor, stack), ops_of(specs).part(specs, slot.place(index)[0])[0])
        if stack is not None:
            return PlacedArray(self._mesh, stack.codes.shape[-2:], np.dtype(np.uint8), P())
        return PlacedArray(self._mesh, slot.shape, slot.dtype, P() if slot.stacked else specs)


def _assembled(shape: tuple[int, ...], spec: P, mesh: Mesh, part: Callable[[int], np.ndarray]) -> jax.Array:
    """The global array; each device gets its part, by its place along `fsdp`."""
    axis = cut_axis(spec)

    def of_index(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return part(0 if axis is None else (index[axis].start or 0) * axis_size(mesh, FSDP) // shape[axis])

    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), of_index)
