"""The least of the numbers that the processes have, on which all of them then agree."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class AgreedMinimum:
    """Returns the least of all processes' numbers, by one program on their devices.

    Every device contributes the numbers of its process, so no process waits longer than a step makes it wait anyway.
    All processes call it equally often.

    Args:
      mesh: of the run; it has devices of every process.
      count: how many numbers each process has.
    """

    def __init__(self, mesh: Mesh, count: int = 1):
        self._rows = NamedSharding(mesh, P(mesh.axis_names))
        self._local = len(mesh.local_devices)
        like = jax.ShapeDtypeStruct((mesh.size, count), jnp.int32, sharding=self._rows)
        # Compiled before the processes meet, because a collective on CPUs waits 30 s at most for the others.
        least = jax.jit(lambda numbers: jnp.min(numbers, axis=0), out_shardings=NamedSharding(mesh, P()))
        self._least = least.lower(like).compile()

    def __call__(self, *numbers: int) -> tuple[int, ...]:
        """Returns the least of each of these numbers, which fit 32 bits."""
        mine = np.tile(np.array(numbers, np.int32), (self._local, 1))
        return tuple(np.asarray(self._least(jax.make_array_from_process_local_data(self._rows, mine))).tolist())
