"""The processes of a run, and small texts that they exchange through the coordination service."""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # the client of the coordination service has no public name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qlora_jax.hosts.rank_text import grouped


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


_PREFIX = "qlora_jax"
SECONDS = 300  # for all processes to arrive


class Disagreement(ValueError):
    """Raised in all processes at once, with the same message."""


class MissingProcess(ValueError):
    """Raised if a process does not arrive in time; names it."""


@dataclasses.dataclass
class Group:
    """The processes of a run; a run of one process exchanges nothing.

    All processes call the methods in the same order.

    Attributes:
      process: the number of this process, from 0.
      processes: the number of processes.
      names: each process, for messages: its number, machine and process id.
    """

    process: int = 0
    processes: int = 1
    names: list[str] = dataclasses.field(default_factory=lambda: ["process 0"])
    _calls: Counter[str] = dataclasses.field(default_factory=Counter, repr=False)

    @property
    def is_first(self) -> bool:
        """True in process 0, the only one that writes files of the whole run."""
        return self.process == 0

    def barrier(self, name: str, seconds: float = SECONDS) -> None:
        """Waits until all processes have called this with the same name.

        It waits by the coordination service. A collective would give up after 30 s on CPUs, and one process may compile
        for longer than another.

        Raises:
          MissingProcess: some did not within `seconds`.
        """
        self.gather(name, "", seconds)

    def gather(self, name: str, text: str, seconds: float = SECONDS) -> list[str]:
        """Returns the texts of all processes, in their order.

        Raises:
          MissingProcess: some gave none within `seconds`.
        """
        if self.processes == 1:
            return [text]
        self._calls[name] += 1
        folder = f"{_PREFIX}/{name}/{self._calls[name]}"
        client().key_value_set(f"{folder}/{self.process}", text)
        deadline = time.monotonic() + seconds
        found: list[str] = []
        for process in range(self.processes):
            left = max(1, int(1000 * (deadline - time.monotonic())))
            try:
                found.append(client().blocking_key_value_get(f"{folder}/{process}", left))
            except Exception as error:
                there = {int(key.rpartition("/")[2]) for key, _ in client().key_value_dir_get(folder)}
                missing = [self.name(process) for process in range(self.processes) if process not in there]
                if not missing:
                    raise
                raise MissingProcess(
                    f"{', '.join(missing)}: did not reach '{name}' within {seconds:g} s. Look at its output, end all "
                    "processes, and start them again"
                ) from error
        return found

    def least(self, name: str, number: int, seconds: float = SECONDS) -> int:
        """Returns the least of all processes' numbers.

        Raises:
          MissingProcess: some gave none within `seconds`.
        """
        return min(map(int, self.gather(name, str(number), seconds)))

    def name(self, process: int) -> str:
        """Returns a process's name for messages."""
        return self.names[process] if process < len(self.names) else f"process {process}"

    def agree(self, name: str, values: Mapping[str, object], fix: str) -> None:
        """Checks that all processes have the same values.

        Args:
          values: by the names under which differences are reported; all must convert to JSON.
          fix: the last sentence of the error, which says what to do.

        Raises:
          Disagreement: some differ; the message has every difference, with the processes.
        """
        texts = self.gather(name, json.dumps(values, sort_keys=True, default=str))
        found: list[dict[str, object]] = [json.loads(text) for text in texts]
        keys = sorted({key for each in found for key in each})
        lines = [f"{key}: {grouped(each)}" for key in keys if len(set(each := _values(found, key))) > 1]
        if lines:
            self.refuse(name, "\n  ".join(["the processes of this run disagree:", *lines]) + f"\n{fix}")

    def refuse(self, name: str, message: str) -> None:
        """Raises Disagreement; all processes call this, and none leaves before the others have read what they need."""
        self.barrier(f"{name} refused")
        raise Disagreement(message)


def _values(found: Sequence[Mapping[str, object]], key: str) -> list[str]:
    return [json.dumps(each[key]) if key in each else "nothing" for each in found]


def client() -> Any:
    """Returns the client of the coordination service; jaxlib declares no type for it."""
    return distributed.global_state.client
