"""The devices of a run, and its batches and keys as arrays on all of them.

Dimension key: A accumulated micro-batches, B rows per micro-batch, T positions.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool

from qlora_jax.config import Config, MeshSize
from qlora_jax.data.batching.packing import NO_ROW, Batch
from qlora_jax.sharding import ROWS, AnyMesh, Device, axis_size, make_mesh, put

MAX_ROWS = 8  # per batch without gradients; more if they do not divide over the devices of a mesh


def run_mesh(size: MeshSize) -> Mesh | None:
    """Returns the mesh of the first devices of all processes; None for one device."""
    return None if size.devices == 1 else make_mesh(size.data, size.fsdp, jax.devices())


def mesh_size(mesh: Mesh | None) -> MeshSize:
    """Returns the sizes of a mesh; 1 and 1 for one device."""
    return MeshSize(1, 1) if mesh is None else MeshSize(mesh.shape["data"], mesh.shape["fsdp"])


def local_devices(mesh: Mesh | None) -> list[Device]:
    """Returns the devices of a run that this process drives."""
    return [jax.local_devices()[0]] if mesh is None else list(mesh.local_devices)


def rows_that_divide(rows: int, mesh: AnyMesh | None) -> int:
    """Returns the least number of rows that divides over the devices and is not smaller than `rows`."""
    devices = axis_size(mesh, *ROWS)
    return -(-rows // devices) * devices


def rows_of_batch(config: Config, mesh: Mesh | None) -> int:
    """Returns the rows of a forward pass without gradients: not more than those of a micro-batch, whose step fits."""
    return rows_that_divide(min(MAX_ROWS, config.train.micro_batch_size), mesh)


def place_batch(arrays: Mapping[str, np.ndarray], mesh: Mesh | None) -> dict[str, Any]:
    """Returns the arrays of a batch, [A, B, ...] or [B, ...], with their rows over all devices.

    A device gets its own rows only. Without a mesh the arrays stay as they are.
    """
    if mesh is None:
        return dict(arrays)
    axis = min(array.ndim for array in arrays.values()) - 2  # [B, T] and [B, S]; those with C per slot have one more
    return {name: _place_rows(array, mesh, axis) for name, array in arrays.items()}


def _place_rows(array: np.ndarray, mesh: Mesh, axis: int) -> jax.Array:
    sharding = NamedSharding(mesh, P(*[None] * axis, ROWS))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def is_row(batch: Batch) -> Bool[np.ndarray, " B"]:
    """Returns False for the gaps of a batch [1, B, T] without packing."""
    return batch.rows[0, :, 0] != NO_ROW


def replicate(leaf: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Returns an array that is whole on all devices, such as a key; without a mesh it stays as it is."""
    return leaf if mesh is None else put(leaf, NamedSharding(mesh, P()))
