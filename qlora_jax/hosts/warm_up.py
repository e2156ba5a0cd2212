"""Connects all groups of devices of a mesh before the first step.

On CPUs the first collective of a group gives up after 30 s. Within a run, one process may compile or read for longer
than that before it comes to the group's first one; here all come at the same time.
"""

import itertools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qlora_jax.hosts.group import Group


def connect_groups(group: Group, mesh: Mesh, seconds: float) -> None:
    """Runs one collective over each axis of the mesh and over all of them; all processes call this together.

    Args:
      seconds: for the slowest process to arrive.
    """
    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    groups = [axes for count in range(1, len(names) + 1) for axes in itertools.combinations(names, count)]

    def sums() -> list[jax.Array]:
        return [jax.lax.psum(jnp.ones(()), axes) for axes in groups]

    mapped = jax.shard_map(sums, mesh=mesh, in_specs=(), out_specs=P(), check_vma=False)
    compiled = jax.jit(mapped).lower().compile()
    group.meet("the groups of devices", seconds)
    jax.block_until_ready(compiled())
