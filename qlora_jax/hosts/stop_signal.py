"""Stops all processes after the same step, when one of them has been asked to stop."""

from collections.abc import Callable

from jax.sharding import Mesh

from qlora_jax.hosts.agreed_minimum import AgreedMinimum


class StopSignal:
    """Asks all processes whether one of them has been asked to stop; all get the same answer.

    All processes call it equally often.

    Args:
      asked: returns True if this process has been asked to stop.
      mesh: of the run; it has devices of every process.
    """

    def __init__(self, asked: Callable[[], bool], mesh: Mesh):
        self._asked, self._minimum = asked, AgreedMinimum(mesh)

    def __call__(self) -> bool:
        """Returns True if any process has been asked to stop."""
        (goes_on,) = self._minimum(not self._asked())
        return goes_on == 0
