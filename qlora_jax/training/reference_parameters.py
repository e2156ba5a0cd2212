"""The parameters that a run starts with, kept in host memory, because the first step donates those on the device."""

import dataclasses

import jax
from jax.sharding import Mesh

from qlora_jax.models.partition import Lora
from qlora_jax.optim.page_pool import Memory, memory_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceParameters:
    """The adapter of the reference, with which held-out evaluation compares the model.

    Attributes:
      on_host: its arrays; on a mesh they are cut like those of the model.
    """

    on_host: Lora
    memory: Memory

    @classmethod
    def of(cls, lora: Lora, mesh: Mesh | None) -> "ReferenceParameters":
        """Copies parameters from the devices."""
        memory, (leaves, structure) = memory_of(mesh), jax.tree.flatten(lora)
        return cls(on_host=structure.unflatten(memory.to_host(tuple(leaves))), memory=memory)

    def on_devices(self) -> Lora:
        """Returns a copy on the devices, for one evaluation."""
        return jax.tree.map(self.memory.put, self.on_host)
