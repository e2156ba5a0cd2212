"""Finds the processes of a run: named by settings or variables, or known to the launcher that started them."""

import os
from collections.abc import Mapping
from typing import NamedTuple, cast

# The detection that jax.distributed.initialize uses. It is called here because the address is needed before that.
from jax._src.clusters import ClusterEnv, K8sCluster, Mpi4pyCluster, OmpiCluster, SlurmCluster

AUTO, OFF = "auto", "off"
# Variables of each setting; the first is JAX's own, the others are those that cluster tools set for JAX programs.
VARIABLES = {"coordinator": "JAX_COORDINATOR_ADDRESS", "processes": "JAX_NUM_PROCESSES", "process": "JAX_PROCESS_ID"}
# Launchers that `auto` finds, with their variable for the number of processes. The others need a package.
DETECTED = {"ompi": "OMPI_COMM_WORLD_SIZE", "slurm": "SLURM_NTASKS"}
REQUIRED = {
    "ompi": "Start the processes with mpirun",
    "slurm": "Start the processes with srun",
    "mpi4py": "Start the processes with mpirun, and install mpi4py",
    "k8s": "Start the processes as an indexed Job of Kubernetes, and install the package kubernetes",
}
CLUSTERS = {"ompi": OmpiCluster, "slurm": SlurmCluster, "mpi4py": Mpi4pyCluster, "k8s": K8sCluster}
PORT_VARIABLE = "JAX_COORDINATOR_PORT"
_SECONDS = 60  # for a launcher to resolve the address of process 0


class Place(NamedTuple):
    """The place of this process in a run of several.

    Attributes:
      coordinator: host:port of process 0.
      processes: the number of processes.
      process: the number of this process, from 0.
    """

    coordinator: str
    processes: int
    process: int


def find_place(
    launcher: str,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
) -> Place | None:
    """Returns the place of this process; None if it is the run's only one.

    Each value comes from its setting, else its variable (VARIABLES), else the launcher.

    Raises:
      ValueError: some values are missing or wrong, or the launcher was not found.
    """
    settings = {"coordinator": coordinator, "processes": processes, "process": process}
    given = {name: value for name, value in settings.items() if value is not None}
    if launcher == OFF:
        if given:
            raise ValueError(f"hosts.launcher: found {OFF}, but {_listed(given)} is given. Remove one of them")
        return None
    given = _from_variables() | given
    name = _detected() if launcher == AUTO else launcher
    if name is not None and len(given) < len(settings):
        given = _from_launcher(name) | given
    if not given or given.get("processes") == 1:
        return None
    if missing := [name for name in settings if name not in given]:
        raise ValueError(
            f"hosts: {_listed(missing)} is missing (found {_listed(given)}). Give it as a setting or as "
            f"{' and '.join(VARIABLES[name] for name in missing)}, or start the processes with a launcher"
        )
    place = Place(str(given["coordinator"]), int(given["processes"]), int(given["process"]))
    _check(place)
    return place


def _listed(names: Mapping[str, object] | list[str]) -> str:
    return ", ".join(f"hosts.{name}" for name in names)


def _from_variables() -> dict[str, str | int]:
    found: dict[str, str | int] = {}
    for name, variable in VARIABLES.items():
        text = os.environ.get(variable)
        if not text:
            continue
        if name != "coordinator" and not text.isdecimal():
            raise ValueError(f"{variable}: found {text!r}, expected a number. Correct or unset it")
        found[name] = text if name == "coordinator" else int(text)
    return found


def _detected() -> str | None:
    """Returns the launcher that started several processes, or None."""
    for name, variable in DETECTED.items():
        if os.environ.get(variable, "1") != "1" and _cluster(name).is_env_present():
            return name
    return None


def _cluster(name: str) -> type[ClusterEnv]:
    return CLUSTERS[name]


def _from_launcher(name: str) -> dict[str, str | int]:
    """Returns all three values from a launcher."""
    cluster = _cluster(name)
    if not cluster.is_env_present():
        raise ValueError(f"hosts.launcher: {name} was not found. {REQUIRED[name]}, or set hosts.launcher to {AUTO}")
    try:
        processes = cluster.get_process_count()
        if processes == 1:
            return {"processes": 1}
        port = os.environ.get(PORT_VARIABLE)
        address = cluster.get_coordinator_address(timeout_secs=_SECONDS, override_coordinator_port=cast(str, port))
        return {"coordinator": address, "processes": processes, "process": cluster.get_process_id()}
    except RuntimeError as error:
        raise ValueError(
            f"hosts.launcher: {name} does not say which processes there are: {error}\nCorrect this, or give "
            f"{_listed(list(VARIABLES))}"
        ) from error


def _check(place: Place) -> None:
    host, _, port = place.coordinator.rpartition(":")
    problems = []
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        problems.append(f"hosts.coordinator: found {place.coordinator!r}, expected HOST:PORT, such as 10.0.0.1:1234")
    if not 0 <= place.process < place.processes:
        problems.append(f"hosts.process: found {place.process}, expected 0 to {place.processes - 1} (hosts.processes)")
    if problems:
        raise ValueError("\n".join([*problems, "Correct these settings"]))
