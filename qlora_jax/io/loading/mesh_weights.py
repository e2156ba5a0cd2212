"""Puts the tensors of a model on a mesh: each device gets its part, and each process reads the rows of its devices."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from pallas_kernels.formats.fsdp_parts import FsdpParts, equal_rows
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.formats.layouts import LAYOUTS, convert_codes, natural_layout
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.io.loading.process_rows import Processes, ProcessRows, all_rows, rows_of_parts
from qlora_jax.io.tensor_map import Slot
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.model_sharding import parts_specs
from qlora_jax.models.partition import is_table, partition
from qlora_jax.nn.variables import StatePath
from qlora_jax.sharding import FSDP, axis_size, cut_axis, named

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
        if isinstance(stack, QTensor):
            own = specs if isinstance(specs, QTensor) else specs.part_of(slot.place(index)[0])
            return PlacedWeight(self._mesh, stack, own)
        if isinstance(stack, GgmlTensor):
            return PlacedArray(self._mesh, stack.codes.shape[-2:], np.dtype(np.uint8), P())
        return PlacedArray(self._mesh, slot.shape, slot.dtype, P() if slot.stacked else specs)


def _assembled(shape: tuple[int, ...], spec: P, mesh: Mesh, part: Callable[[int], np.ndarray]) -> jax.Array:
    """The global array; each device gets its part, by its place along `fsdp`."""
    axis = cut_axis(spec)

    def of_index(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return part(0 if axis is None else (index[axis].start or 0) * axis_size(mesh, FSDP) // shape[axis])

    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), of_index)
