"""Writes checkpoints only into the folder that the run has locked."""

from collections.abc import Mapping

from jaxtyping import PyTree

from qlora_jax.io.run_folder.checkpoint import Checkpoints
from qlora_jax.io.run_folder.run_lock import RunLock


class LockedCheckpoints(Checkpoints):
    """The checkpoints of a run that has locked its folder; each save checks that the folder is still the same.

    Without the check, orbax makes a deleted or moved folder anew, and the run continues in an empty one.
    """

    def __init__(self, lock: RunLock, keep: int):
        lock.check()
        super().__init__(lock.folder, keep)
        self._lock = lock

    def save(self, step: int, lora: PyTree, optimizer_state: PyTree, state: Mapping[str, object]) -> None:
        """Writes one checkpoint; see `Checkpoints.save`.

        Raises:
          FolderLostError: the folder went away before or while the checkpoint was written.
          CheckpointError: it cannot be written.
        """
        self._lock.check()
        try:
            super().save(step, lora, optimizer_state, state)
        finally:
            self._lock.check()
