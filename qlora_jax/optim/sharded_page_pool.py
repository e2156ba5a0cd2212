"""The devices of a mesh as memory for optimizer pages: every device moves its own parts of a page."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import ArrayLike

from qlora_jax.optim.page_pool import Memory, Page, Parts, on_device
from qlora_jax.sharding import Device


@dataclasses.dataclass(frozen=True)
class ShardedMemory(Memory):
    """Memory whose pages lie on all devices of a mesh, cut as their parameters are.

    Pages on the host are arrays in pinned memory that keep their sharding, so that each returns to its device.

    Attributes:
      device: one of the mesh, which stands for all: they are alike.
      mesh: the mesh.
    """

    mesh: Mesh

    @property
    def devices(self) -> Sequence[Device]:
        return self.mesh.local_devices

    def _sharding(self, spec: P, memory_kind: str) -> jax.sharding.Sharding:
        return NamedSharding(self.mesh, spec, memory_kind=memory_kind)

    def statistics(self) -> dict[str, int] | None:
        """Returns the least `bytes_limit` of the devices, and their largest other numbers; None if they report none."""
        reports = [report for device in self.devices if (report := device.memory_stats())]
        numbers = {name: max(report[name] for report in reports) for name in reports[0]} if reports else {}
        limits = [report["bytes_limit"] for report in reports if "bytes_limit" in report]
        return (numbers | {"bytes_limit": min(limits)} if limits else numbers) or None

    def parts(self, leaf: ArrayLike) -> Parts:
        assert isinstance(leaf, jax.Array)
        once = {_place(shard.index): shard for shard in leaf.addressable_shards}
        return {place: np.asarray(shard.data) for place, shard in once.items()}

    def joined(self, parts: Parts, shape: tuple[int, ...], spec: P) -> jax.Array | np.ndarray:
        # A copy, because JAX may alias what the callback returns, and `parts` may alias arrays that are freed.
        return jax.make_array_from_callback(
            shape, self._sharding(spec, self.kind), lambda index: np.array(parts[_place(index)])
        )

    def put(self, leaf: jax.Array | np.ndarray) -> jax.Array:
        return self._moved(leaf, self.device.default_memory().kind)

    def to_host(self, page: Page) -> Page:
        # An array that is on the host already was joined for this page.
        return tuple(self._moved(leaf, self.kind) if on_device((leaf,)) else leaf for leaf in page)

    def _moved(self, leaf: jax.Array | np.ndarray, memory_kind: str) -> jax.Array:
        assert isinstance(leaf, jax.Array)
        # Part by part, because one process of several moves only those of its devices.
        parts = [
            jax.device_put(part.data, SingleDeviceSharding(part.device, memory_kind=memory_kind), may_alias=False)
            for part in leaf.addressable_shards
        ]
        sharding = leaf.sharding.with_memory_kind(memory_kind)
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)


def _place(index: tuple[slice, ...] | None) -> tuple[slice, ...]:
    """Returns where a part lies after axis 0."""
    return tuple(index or ())[1:]


def memory_of(mesh: Mesh | None) -> Memory:
    """Returns the memory of a mesh, or of the first device, with the best host memory that works.

    Raises:
      ValueError: the devices of a mesh have no pinned host memory.
    """
    if mesh is None:
        return Memory.of(jax.local_devices()[0])
    memory = Memory.of(mesh.local_devices[0])
    if memory.kind != "pinned_host":
        raise ValueError(
            "optim.paging: this backend has no pinned host memory, which pages on several devices need (found "
            f"{memory.device.device_kind}). Set optim.paging=off."
        )
    return ShardedMemory(memory.device, memory.kind, mesh)
