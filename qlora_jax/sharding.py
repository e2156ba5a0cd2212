"""The mesh of devices, and how arrays are cut over it.

Rows of a batch lie over both axes. Over `fsdp` also the frozen weights, the LoRA parameters and the optimizer state are
cut; over `data` each device, or group of devices, has all of them. How an array is cut follows from its shape and the
mesh alone, so loading, training, checkpoints and plans agree without asking each other.

A part is bytes, not a weight: nothing multiplies with a part, except with those of embedding and head.

Dimension key: L layers, V vocab, s devices along `fsdp`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

DATA, FSDP = "data", "fsdp"
ROWS = (DATA, FSDP)  # the axes over which the rows of a batch lie
BLOCK = 256  # elements of a block of 8-bit optimizer state, which a cut never separates

AnyMesh = Mesh | AbstractMesh
Leaf = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct  # tracers are jax.Arrays
Device = Any  # jax.Device, which JAX does not export as a type


def make_mesh(data: int, fsdp: int, devices: Sequence[Device] | None = None) -> Mesh:
    """Returns the mesh of the first data * fsdp of the devices; None: the local ones."""
    devices = jax.local_devices() if devices is None else devices
    grid = np.asarray(devices[: data * fsdp]).reshape(data, fsdp)
    return Mesh(grid, ROWS, axis_types=(AxisType.Auto,) * 2)


def absent_mesh(data: int, fsdp: int) -> AbstractMesh:
    """Returns a mesh of devices that need not be present."""
    return AbstractMesh((data, fsdp), ROWS, axis_types=(AxisType.Auto,) * 2)


def axis_size(mesh: AnyMesh | None, *names: str) -> int:
    """Returns the number of devices along some axes; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in names)


def stack_spec(shape: Sequence[int], mesh: AnyMesh) -> P:
    """Returns the cut of a leaf of a stack of 4-bit weights, [L, ...].

    It is cut along the first axis after the layers that divides, where a part of a layer is one run of bytes.
    """
    shards = axis_size(mesh, FSDP)
    axes = (axis for axis in (1, 2) if axis < len(shape) and shape[axis] % shards == 0)
    return _cut(next(axes, None), shards)


def lora_spec(shape: Sequence[int], mesh: AnyMesh) -> P:
    """Returns the cut of LoRA parameters, gradients or moments of a projection, [L, K, R] or [L, R, N].

    They are cut along the axis after the layers, if a part of a layer is whole blocks of 8-bit optimizer state. Those
    of routed experts, [S, E, ...], are cut by expert.
    """
    shards = axis_size(mesh, FSDP)
    divides = len(shape) in (3, 4) and shape[1] % shards == 0 and math.prod(shape[1:]) // shards % BLOCK == 0
    return _cut(1 if divides else None, shards)


def table_spec(shape: Sequence[int], mesh: AnyMesh) -> P:
    """Returns the cut of an embedding, or of a head or its bias, along the vocabulary [V, ...]."""
    shards = axis_size(mesh, FSDP)
    return _cut(0 if shape[0] % shards == 0 else None, shards)


def _cut(axis: int | None, shards: int) -> P:
    return P() if axis is None or shards == 1 else P(*[None] * axis, FSDP)


def cut_axis(spec: P) -> int | None:
    """Returns the axis that a spec cuts over `fsdp`, or None."""
    return next((axis for axis, name in enumerate(spec) if name == FSDP), None)


def named(mesh: AnyMesh, specs: PyTree) -> PyTree:
    """Returns a tree of NamedShardings from a tree of PartitionSpecs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))


def place(tree: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
    """Places a tree on the mesh by a tree of PartitionSpecs of the same structure."""
    return jax.tree.map(put, tree, named(mesh, specs))


def put(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Returns an array with another sharding, also over several processes, each of which has the whole array."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if leaf.sharding == sharding:
        return leaf
    # device_put takes no devices of other processes; a program takes the same array from each process.
    return jax.jit(lambda array: array, out_shardings=sharding)(leaf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """This device's part of an array that is cut over `fsdp`; exists only inside shard_map.

    Attributes:
      part: the array, or the part of one layer while layers are scanned.
      axis: the axis that is cut, negative, so that it stays right without the axis of layers.
      count: the number of parts.
    """

    part: Any  # an array or a tracer
    axis: int = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})

    def whole(self) -> jax.Array:
        """Gathers the parts of all devices; its derivative sums what all devices have, and leaves each its part."""
        return lax.all_gather(self.part, FSDP, axis=self.part.ndim + self.axis, tiled=True)

    @property
    def start(self) -> jax.Array:
        """The index of the part's first element along its axis."""
        return lax.axis_index(FSDP) * self.part.shape[self.axis]


def is_shard(leaf: object) -> bool:
    """Returns True for a Shard, as `is_leaf` of jax.tree.map."""
    return isinstance(leaf, Shard)


def shards_of(tree: PyTree, specs: PyTree, mesh: AnyMesh) -> PyTree:
    """Marks each cut leaf as a Shard, by which modules know that they hold a part; called inside shard_map."""
    return jax.tree.map(functools.partial(_marked, count=axis_size(mesh, FSDP)), tree, specs)


def _marked(leaf: Leaf, spec: P, count: int) -> Leaf | Shard:
    axis = cut_axis(spec)
    return leaf if axis is None else Shard(part=leaf, axis=axis - leaf.ndim, count=count)


def gathered(tree: PyTree) -> PyTree:
    """Gathers all Shards of a tree; a tree without any is unchanged."""
    return jax.tree.map(lambda leaf: leaf.whole() if is_shard(leaf) else leaf, tree, is_leaf=is_shard)


def sum_over(x: jax.Array, mesh: AnyMesh | None, names: Sequence[str] = ROWS) -> jax.Array:
    """Sums over axes of the mesh. Axes of one device are left out, because their collective would copy."""
    several = tuple(name for name in names if axis_size(mesh, name) > 1)
    return lax.psum(x, several) if several else x


def gather_rows(x: jax.Array, mesh: AnyMesh | None, axis: int) -> jax.Array:
    """Gathers the rows of all devices along `axis`, in the order of the batch."""
    several = tuple(name for name in ROWS if axis_size(mesh, name) > 1)
    return lax.all_gather(x, several, axis=axis, tiled=True) if several else x


def own_rows(x: jax.Array, mesh: AnyMesh | None, axis: int) -> jax.Array:
    """Returns this device's rows out of those that `gather_rows` gathered."""
    several = tuple(name for name in ROWS if axis_size(mesh, name) > 1)
    if not several:
        return x
    rows = x.shape[axis] // axis_size(mesh, *several)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(several) * rows, rows, axis)


def placed_shapes(tree: PyTree, specs: PyTree, mesh: AnyMesh) -> PyTree:
    """Returns the shapes of a tree, with the places that `place` would give its leaves."""

    def shape(leaf: Leaf, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, tree, named(mesh, specs))


def part_bytes(tree: PyTree) -> int:
    """Returns the bytes that a tree of arrays or shapes has on one device."""
    return sum(math.prod(_part_shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _part_shape(leaf: Leaf) -> tuple[int, ...]:
    sharding = getattr(leaf, "sharding", None)  # NumPy's arrays have none
    return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)


def mesh_of(tree: PyTree) -> AnyMesh | None:
    """Returns the mesh on which arrays, or shapes, lie; None: they lie on one device."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    meshes = (sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding))
    return next((mesh for mesh in meshes if mesh.axis_names == ROWS), None)


def init_sharded(draw: Callable[[jax.Array], tuple[jax.Array, jax.Array]], key: jax.Array, mesh: Mesh | None):
    """Draws A and B of one module; on a mesh each device draws only its part."""
    if mesh is None:
        return draw(key)
    specs = jax.tree.map(lambda leaf: lora_spec(leaf.shape, mesh), jax.eval_shape(draw, key))
    return jax.jit(draw, out_shardings=named(mesh, specs))(key)
