"""Starts several processes of tests/hosts/worker.py on this machine, and says how each ended."""

import multiprocessing
import re
import socket
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

STEPS, ACTS_AT = 6, 3  # the number of steps of a worker, and the one at which it comes to its end
STOPPED = 143
SECONDS = 400.0  # for all processes of some runs to end, also on a busy machine

# Processes are forked from one that has imported JAX, whose import costs two seconds of a processor.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.hosts.worker"])


class Ended(NamedTuple):
    """The end of one process: exit code (negative: a signal), time.time(), standard output and error."""

    code: int
    at: float
    out: str
    err: str


class Started(NamedTuple):
    """The running processes of one run, whose output goes to files in a folder."""

    processes: list[ForkServerProcess]
    folder: Path


def free_port() -> int:
    """Returns a port at which nothing listens now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(folder: Path, processes: int, **options: Any) -> Started:
    """Starts all processes of a run; `options` are those of the worker (tests/hosts/worker.py)."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {"port": free_port(), "processes": processes, "folder": str(folder / "run")} | options
    started = [CONTEXT.Process(target=_work, args=(folder, options | {"process": i})) for i in range(processes)]
    for process in started:
        process.start()
    return Started(started, folder)


def _work(folder: Path, options: dict[str, Any]) -> None:
    """Runs a worker, in its process."""
    from tests.hosts import worker  # not in the process of the tests, whose JAX has other devices

    worker.run(folder, options)


def wait(runs: Mapping[str, Started]) -> dict[str, list[Ended]]:
    """Waits for all processes of some runs; those still running after SECONDS are killed and get -9."""
    deadline = time.monotonic() + SECONDS
    at: dict[ForkServerProcess, float] = {}
    everyone = [process for run in runs.values() for process in run.processes]
    while len(at) < len(everyone):
        for process in everyone:
            if time.monotonic() > deadline:
                process.kill()
                process.join()
            if process not in at and process.exitcode is not None:
                at[process] = time.time()
        time.sleep(0.02)
    return {name: [_ended(run, index, at) for index in range(len(run.processes))] for name, run in runs.items()}


def _ended(run: Started, index: int, at: Mapping[ForkServerProcess, float]) -> Ended:
    process = run.processes[index]
    out, err = ((run.folder / f"{kind}.{index}").read_text() for kind in ("out", "err"))
    return Ended(process.exitcode or 0, at[process], out, err)


def acted_at(run: Sequence[Ended]) -> float:
    """Returns the time at which the acting process of a run acted."""
    return next(float(found[1]) for each in run if (found := re.search(r"acts at ([\d.]+)", each.out)))
