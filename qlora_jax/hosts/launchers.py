"""Finds the processes of a run: named by settings or variables, or known to the launcher; and checks their folder."""

import os
import secrets
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

from jax._src.clusters import ClusterEnv, K8sCluster, Mpi4pyCluster, OmpiCluster, SlurmCluster

from qlora_jax.atomic_files import write_text
from qlora_jax.hosts.group import Group

AUTO, OFF = "auto", "off"
# Variables of each setting; the first is JAX's own, the others are those that cluster tools set for JAX programs.
VARIABLES = {"coordinator": "JAX_COORDINATOR_ADDRESS", "processes": "JAX_NUM_PROCESSES", "process": "JAX_PROCESS_ID"}
# Launchers that `auto` finds, with their variable for the number of processes. The others need a package.
DETECTED = {"ompi": "OMPI_COMM_WORLD_SIZE", "slurm": "SLURM_NTASKS"}
# Variables that suffice for a value for which JAX's detection would also need a package.
OWN_VARIABLES = {
    "ompi": {"processes": "OMPI_COMM_WORLD_SIZE", "process": "OMPI_COMM_WORLD_RANK"},
    "k8s": {"process": "JOB_COMPLETION_INDEX"},
}
REQUIRED = {
    "ompi": "Start the processes with mpirun",
    "slurm": "Start the processes with srun",
    "mpi4py": "Start the processes with mpirun, and install mpi4py",
    "k8s": (
        "Start the processes as an indexed Job of Kubernetes, and install the package kubernetes or give "
        "hosts.coordinator and hosts.processes"
    ),
}
CLUSTERS = {"ompi": OmpiCluster, "slurm": SlurmCluster, "mpi4py": Mpi4pyCluster, "k8s": K8sCluster}
PORT_VARIABLE = "JAX_COORDINATOR_PORT"
_EPHEMERAL = 61440  # the first of the 4096 ports that JAX's detection takes, too
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
    if missing := [name for name in settings if name not in given]:
        name = _detected() if launcher == AUTO else launcher
        given |= {} if name is None else _from_launcher(name, missing)
    if not given or given.get("processes") == 1:
        return None
    if missing := [name for name in settings if name not in given]:
        raise ValueError(
            f"hosts: {_listed(missing)} is missing (found {_listed(given)}). Give it as a setting or as "
            f"{_joined(missing)}, or start the processes with a launcher"
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
        if text:
            found[name] = text if name == "coordinator" else _number(variable)
    return found


def _number(variable: str) -> int:
    text = os.environ[variable]
    if not text.isdecimal():
        raise ValueError(f"{variable}: found {text!r}, expected a number. Correct or unset it")
    return int(text)


def _detected() -> str | None:
    """Returns the launcher that started several processes, or None.

    Raises:
      ValueError: a launcher that only mpi4py can ask has started them.
    """
    by_pmi, by_slurm = os.environ.get("PMI_SIZE", "1"), os.environ.get(DETECTED["slurm"])
    if by_pmi not in ("1", by_slurm):  # srun may set both
        raise ValueError(
            f"hosts.launcher: {by_pmi} processes were started by MPICH, Intel MPI or another launcher with PMI (found "
            f"{AUTO}, expected mpi4py or {OFF}). Install mpi4py and set hosts.launcher to mpi4py, or set it to {OFF} "
            "for separate runs"
        )
    for name, variable in DETECTED.items():
        if os.environ.get(variable, "1") != "1" and CLUSTERS[name].is_env_present():
            return name
    return None


def _from_launcher(name: str, missing: list[str]) -> dict[str, str | int]:
    """Returns the missing values from a launcher: from its variables, and what they lack from JAX's detection."""
    own = {each: variable for each, variable in OWN_VARIABLES.get(name, {}).items() if variable in os.environ}
    found: dict[str, str | int] = {each: _number(variable) for each, variable in own.items() if each in missing}
    if name == "ompi" and "coordinator" in missing and (address := _address_on_one_machine()):
        found["coordinator"] = address
    left = [each for each in missing if each not in found]
    if not left or found.get("processes") == 1:
        return found
    return found | _detect(CLUSTERS[name], name, left)


def _address_on_one_machine() -> str | None:
    """Returns a loopback address if Open MPI has started all processes on this machine."""
    local, everywhere, job = map(os.environ.get, ("OMPI_COMM_WORLD_LOCAL_SIZE", DETECTED["ompi"], "PMIX_NAMESPACE"))
    if job is None or local is None or local != everywhere:
        return None
    port = os.environ.get(PORT_VARIABLE) or _EPHEMERAL + zlib.crc32(job.encode()) % 4096
    return f"127.0.0.1:{port}"


def _detect(cluster: type[ClusterEnv], name: str, missing: list[str]) -> dict[str, str | int]:
    """Returns the missing values from JAX's detection.

    Raises:
      ValueError: the launcher was not found, or does not give them.
    """
    try:
        found = _ask(cluster, missing) if cluster.is_env_present() else None
    except Exception as error:  # raised by JAX's detection, or by the package that it asks
        why = " ".join(str(each) or type(each).__name__ for each in (error, error.__cause__) if each is not None)
        raise ValueError(
            f"hosts.launcher: {name} does not give {_listed(missing)}: {why}\nCorrect this, or give {_listed(missing)} "
            f"as a setting or as {_joined(missing)}"
        ) from error
    if found is None:
        raise ValueError(f"hosts.launcher: {name} was not found. {REQUIRED[name]}, or set hosts.launcher to {AUTO}")
    return found


def _ask(cluster: type[ClusterEnv], missing: list[str]) -> dict[str, str | int]:
    """Returns the missing values; only the number of processes if it is one, because its place is known."""
    processes = cluster.get_process_count() if "processes" in missing else None
    if processes == 1:
        return {"processes": 1}
    port = cast(str, os.environ.get(PORT_VARIABLE))
    ask = {
        "coordinator": lambda: cluster.get_coordinator_address(timeout_secs=_SECONDS, override_coordinator_port=port),
        "processes": lambda: processes,
        "process": cluster.get_process_id,
    }
    return {name: ask[name]() for name in missing}


def _joined(names: list[str]) -> str:
    return " and ".join(VARIABLES[name] for name in names)


def _check(place: Place) -> None:
    host, _, port = place.coordinator.rpartition(":")
    problems = []
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        problems.append(f"hosts.coordinator: found {place.coordinator!r}, expected HOST:PORT, such as 10.0.0.1:1234")
    if not 0 <= place.process < place.processes:
        problems.append(f"hosts.process: found {place.process}, expected 0 to {place.processes - 1} (hosts.processes)")
    if problems:
        raise ValueError("\n".join([*problems, "Correct these settings"]))


_PREFIX = ".shared-"
SECONDS = 20.0  # network filesystems show a new file to other machines after a few seconds


def sees_first(group: Group, folder: Path, seconds: float = SECONDS) -> bool:
    """Returns True if this process can read a file that process 0 writes into its folder; all processes call this."""
    if group.processes == 1:
        return True
    name = group.gather("shared folder: name", f"{_PREFIX}{secrets.token_hex(8)}")[0]
    file = folder / name
    if group.is_first:
        write_text(file, name)
    try:
        group.barrier("shared folder: written")
        seen = _appears(file, name, seconds)
        group.barrier("shared folder: read")
        return seen
    finally:
        if group.is_first:
            file.unlink(missing_ok=True)


def _appears(file: Path, text: str, seconds: float) -> bool:
    """Returns True when the file has the text; False if it has not within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            # Listing the folder makes a network filesystem look again.
            if file.name in {entry.name for entry in file.parent.iterdir()} and file.read_text("utf-8") == text:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
