"""Joins this process to the others of its run, names those that are late, and leaves: well, or at once on an error."""

import contextlib
import errno
import ipaddress
import itertools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qlora_jax.hosts.gpus import Seen, divide, visible_gpus
from qlora_jax.hosts.group import Disagreement, Group, MissingProcess
from qlora_jax.hosts.launchers import Place
from qlora_jax.hosts.rank_text import numbered
from qlora_jax.hosts.watchdog import Report, Watchdog, calls_when_lost

# Notes which processes of a run have started, so that those that never connect can be named.
#
# JAX waits until all have connected, and does not say for whom. Its coordination service takes nothing from a process
# before that. So each process counts in a file next to the run folder, which all share. Files whose count stands still
# are from an earlier start.

POLL_SECONDS = 0.5


class RollCall:
    """The processes that have started, as far as this one sees.

    Args:
      run: the run folder, which need not exist.
      process: the number of this process.
      processes: the number of processes.
    """

    def __init__(self, run: Path, process: int, processes: int):
        self.folder = run.parent / f".{run.name}.starting"
        self._process, self._processes = process, processes
        self._first: dict[int, bytes] = {}  # the count of each process when it was first seen
        self._here = {process}

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Counts, and reads the counts of others, in a thread, within the context."""
        stopped = threading.Event()
        thread = threading.Thread(target=self._take, args=(stopped,), name="hosts roll call", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()
            with contextlib.suppress(OSError):
                (self.folder / str(self._process)).unlink(missing_ok=True)
                self.folder.rmdir()  # by the last process

    def _take(self, stopped: threading.Event) -> None:
        count = 0
        while not stopped.wait(POLL_SECONDS):
            count += 1
            with contextlib.suppress(OSError):  # the filesystem is not ready
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / str(self._process)).write_text(str(count), encoding="utf-8")
                self._read()

    def _read(self) -> None:
        for file in self.folder.iterdir():
            if file.name.isdecimal():  # NFS renames files that are removed while they are open
                with contextlib.suppress(OSError):  # another process removes it just now
                    self._compare(int(file.name), file.read_bytes())

    def _compare(self, process: int, count: bytes) -> None:
        if self._first.setdefault(process, count) != count:
            self._here.add(process)

    def missing(self) -> str | None:
        """Returns the processes that have not been seen, as text such as `process 1`; None if all have."""
        absent = [process for process in range(self._processes) if process not in self._here]
        return numbered(absent) if absent else None


# Connects all groups of devices of a mesh before the first step.
#
# On CPUs the first collective of a group gives up after 30 s. Within a run, one process may compile or read for longer
# than that before it comes to the group's first one; here all come at the same time.


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
    group.barrier("the groups of devices", seconds)
    jax.block_until_ready(compiled())


JOIN_SECONDS = 300  # for all processes to connect
DEVICES_VARIABLE = "JAX_LOCAL_DEVICE_IDS"
REFUSED = 2
NOTICED_SECONDS = 5.0  # after the heartbeat, until the watchdog has ended this process
_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")


@contextlib.contextmanager
def joined(
    place: Place | None,
    *,
    run: Path,
    devices: Sequence[int] | None,
    heartbeat: int,
    report: Report,
    join_seconds: int = JOIN_SECONDS,
) -> Iterator[Watchdog]:
    """Joins the processes of a run before JAX has started its devices, and yields the watchdog of their group.

    After an error in the context, this process reports it and ends at once, and so do the others. At the end of the
    context all wait for each other.

    Args:
      place: of this process; None if it is the only one, which joins nothing.
      run: the folder of the run, next to which processes note that they have started.
      devices: indices of the local GPUs to drive; None for this process's share.
      heartbeat: seconds after which the death of one process ends the others.
      join_seconds: for all processes to connect.

    Raises:
      Disagreement: the processes found that they cannot train together.
    """
    if place is None:
        yield Watchdog(Group())
        return
    watchdog = Watchdog(Group(place.process, place.processes), heartbeat, place.coordinator)
    try:
        _connect(place, run, watchdog, heartbeat, join_seconds)
        watchdog.group.names[:] = _introduce(watchdog.group, _wanted(devices))
        watchdog.start()
        yield watchdog
        watchdog.group.barrier("the end", join_seconds)
    except Disagreement:
        _leave(watchdog)
        if watchdog.group.is_first:
            raise
        raise SystemExit(REFUSED) from None  # process 0 prints it
    except BaseException as error:
        if _may_follow(error):
            time.sleep(heartbeat + NOTICED_SECONDS)  # the watchdog ends this process if it was another's end
        watchdog.stop()
        watchdog.fail(error, report)
    _leave(watchdog)


def _leave(watchdog: Watchdog) -> None:
    """Leaves when all have come here, because the others need process 0's service until then."""
    watchdog.stop()
    jax.distributed.shutdown()


def _may_follow(error: BaseException | None) -> bool:
    """Returns True if the error may follow from the end of another process, which breaks connections to this one."""
    if error is None or isinstance(error, MissingProcess):
        return False
    # Compiled functions that run in the calling thread raise ValueError, with the status in front.
    by_jax = isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(f"{error}") is not None
    return by_jax or _may_follow(error.__cause__ or error.__context__)


def _connect(place: Place, run: Path, watchdog: Watchdog, heartbeat: int, seconds: int) -> None:
    """Connects to process 0, or waits as process 0 for the others.

    Args:
      run: the run folder.

    Raises:
      ValueError: process 0 cannot listen at the coordinator's address.
      MissingProcess: not all have connected in time.
    """
    bind = _bind_address(place.coordinator)
    if place.process == 0:
        _check_free(bind, place.coordinator)
    # SIGTERM stays with us: JAX's own handler would save nothing.
    jax.config.update("jax_enable_preemption_service", False)
    roll_call = RollCall(run, place.process, place.processes)
    try:
        with calls_when_lost(watchdog.lost), roll_call.taken():
            jax.distributed.initialize(
                place.coordinator,
                place.processes,
                place.process,
                local_device_ids=[],  # chosen later, when all have said which they see
                cluster_detection_method="deactivate",
                initialization_timeout=seconds,
                heartbeat_timeout_seconds=heartbeat,
                coordinator_bind_address=bind,
            )
    except Exception as error:  # it has no text, see watchdog.py
        raise MissingProcess(
            f"hosts: not all {place.processes} processes have connected to {place.coordinator} within {seconds} s. "
            f"{_unseen(roll_call)}"
        ) from error


def _unseen(roll_call: RollCall) -> str:
    """Returns the end of the message of processes that have not all connected."""
    advice = "Check that all machines reach this address"
    if (missing := roll_call.missing()) is None:
        return f"All of them have started. {advice}"
    return (
        f"No sign of {missing} was found in {roll_call.folder.parent}. Look at the output of {missing}. {advice} and "
        "see this folder"
    )


def _bind_address(coordinator: str) -> str:
    """Returns the address at which process 0 listens: the one named, not all that the machine has.

    Some systems give a machine's own name a loopback address, at which others cannot reach it; then it is all.
    """
    host, _, port = coordinator.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ValueError(f"hosts.coordinator: {host!r} is not a known machine ({error.strerror}). Correct it") from None
    address = str(found[0][4][0])
    if ipaddress.ip_address(address).is_loopback and not _names_loopback(host):
        return f"[::]:{port}"
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _names_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith(("127.", "[::1]"))


def _check_free(bind: str, coordinator: str) -> None:
    """Raises ValueError if this process cannot listen at an address; gRPC itself would share a port in silence."""
    host, _, port = bind.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as attempt:
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            attempt.bind((host.strip("[]"), int(port)))
    except OSError as error:
        fixes = {
            errno.EADDRINUSE: "Give another port, and start all processes again",
            errno.EADDRNOTAVAIL: "Give an address of the machine of process 0",
        }
        fix = fixes.get(error.errno or 0, "Give another address or port")
        problem = f"process 0 cannot listen at {coordinator} ({error.strerror})"
        raise ValueError(f"hosts.coordinator: {problem}. {fix}") from None


def _wanted(devices: Sequence[int] | None) -> tuple[int, ...] | None:
    text = os.environ.get(DEVICES_VARIABLE)
    if devices is None and text:
        return tuple(int(index) for index in text.split(","))
    return None if devices is None else tuple(devices)


def _introduce(group: Group, wanted: tuple[int, ...] | None) -> list[str]:
    """Exchanges names, chooses this process's GPUs, and returns the names of all processes.

    Raises:
      Disagreement: the GPUs cannot be shared.
    """
    name = f"process {group.process} ({socket.gethostname()}, pid {os.getpid()})"
    gpus = visible_gpus() if _uses_gpus() else ()
    introductions = [json.loads(text) for text in group.gather("names", json.dumps([name, gpus, wanted]))]
    seen = [Seen(name, tuple(gpus), None if wanted is None else tuple(wanted)) for name, gpus, wanted in introductions]
    try:
        chosen = divide(seen)[group.process]
    except ValueError as error:
        group.refuse("gpus", str(error))
    else:
        if chosen:
            jax.config.update("jax_cuda_visible_devices", ",".join(map(str, chosen)))
    return [each.name for each in seen]


def _uses_gpus() -> bool:
    platforms = jax.config.jax_platforms
    return not platforms or "cuda" in platforms or "gpu" in platforms
