"""Settings of several devices and several processes, and the meshes that they allow."""

import dataclasses
from typing import Literal, NamedTuple

from qlora_jax.config.fields import AT_LEAST_ONE, NON_NEGATIVE, NOT_EMPTY, Bound, setting

AUTO = "auto"
AT_LEAST_FIVE = Bound("5 or more", lambda value: value >= 5)
_SIZE = Bound("1 or more, or auto", lambda value: value == AUTO or value >= 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshArgs:
    """The devices of a run, data x fsdp of them (docs/distributed.md). They change no result beyond rounding."""

    data: int | Literal["auto"] = setting(
        "groups of devices that share the rows of a micro-batch; each group has the whole model. auto: as many as the "
        "devices allow",
        1,
        _SIZE,
    )
    fsdp: int | Literal["auto"] = setting(
        "devices per group, which split its rows, the weights, the adapter and the optimizer state. "
        "auto: 1 if the run fits on one device, else the fewest that it fits on",
        AUTO,
        _SIZE,
        common="devices that share the weights and the rows; auto: the fewest that the run fits on",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsArgs:
    """The processes of a run (docs/distributed.md): the same command in each, on one machine or several."""

    launcher: Literal["auto", "off", "slurm", "ompi", "mpi4py", "k8s"] = setting(
        "the program that starts the processes and knows their number. auto: by its environment variables; off: one "
        "process",
        "auto",
    )
    coordinator: str | None = setting(
        "without a launcher: address and port of process 0, such as 10.0.0.1:1234", None, NOT_EMPTY
    )
    processes: int | None = setting("without a launcher: the number of processes", None, AT_LEAST_ONE)
    process: int | None = setting("without a launcher: the number of this process, from 0", None, NON_NEGATIVE)
    devices: list[int] | Literal["auto"] = setting(
        "local devices that this process drives, such as [0, 1]; auto: its share of those that the processes of its "
        "machine see",
        AUTO,
        NOT_EMPTY,
    )
    heartbeat: int = setting("seconds after which the death of one process ends the others", 30, AT_LEAST_FIVE)
    stuck_after: int = setting("seconds without a finished step after which a process ends", 900, AT_LEAST_ONE)


class MeshSize(NamedTuple):
    """The sizes of a mesh."""

    data: int
    fsdp: int

    @property
    def devices(self) -> int:
        """The number of devices."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return f"data {self.data}, fsdp {self.fsdp}"


def mesh_sizes(args: MeshArgs, devices: int) -> list[MeshSize]:
    """Returns the candidate meshes, in the order to try them: exactly one unless `fsdp` is auto.

    Args:
      devices: the number of devices that there are.
    """
    groups = args.data if isinstance(args.data, int) else 1
    fsdp = [args.fsdp] if isinstance(args.fsdp, int) else _divisors(max(1, devices // groups))
    if isinstance(args.data, int):
        return [MeshSize(args.data, size) for size in fsdp]
    return [MeshSize(max(1, devices // size), size) for size in fsdp]


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
