"""Stops all processes after the same step, when one of them has been asked to stop."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class StopSignal:
    """Asks all processes whether one of them has been asked to stop.

    Every device contributes a flag to a sum that all of them see, so all processes decide alike without waiting longer
    than a step makes them wait anyway. All processes call it equally often.

    Args:
      asked: returns True if this process has been asked to stop.
      mesh: of the run; it has devices of every process.
    """

    def __init__(self, asked: Callable[[], bool], mesh: Mesh):
        self._asked = asked
        self._flags = NamedSharding(mesh, P(mesh.axis_names))
        self._local = len(mesh.local_devices)
        like = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=self._flags)
        # Compiled before the processes meet, because a collective on CPUs waits 30 s at most for the others.
        self._sum = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P())).lower(like).compile()

    def __call__(self) -> bool:
        """Returns True if any process has been asked to stop."""
        mine = np.full(self._local, self._asked(), np.int32)
        return bool(self._sum(jax.make_array_from_process_local_data(self._flags, mine)))
