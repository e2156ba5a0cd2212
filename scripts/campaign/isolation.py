"""Runs cases in a forked process with limits on time and memory; a case that ends the process gets a verdict, too."""

import dataclasses
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from scripts.campaign.ledger import Case, Verdict

CaseRunner = Callable[[Case], Verdict]
FORK = multiprocessing.get_context("fork")  # the child inherits imported modules; no jax backend may run before

READY = Verdict("ready")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one case.

    Attributes:
      cpu_seconds: processor time; None for no limit. A busy machine does not change it.
      wall_seconds: time by the clock, for cases that wait.
      start_seconds: time that a new process may take to prepare, such as to compile.
      memory: bytes that the process may use beyond those before the case; None for no limit.
      cases: cases that one process runs before a new one starts.
    """

    cpu_seconds: float | None = None
    wall_seconds: float = 60.0
    start_seconds: float = 180.0
    memory: int | None = None
    cases: int = 200


def run_isolated(
    cases: Sequence[Case], start: Callable[[], CaseRunner], limits: Limits
) -> Iterator[tuple[Case, Verdict]]:
    """Yields each case with its verdict, in order.

    Args:
      start: called in each new process; returns the function that runs a case.
    """
    position = 0
    while position < len(cases):
        batch = cases[position : position + limits.cases]
        for case, verdict in _run_batch(batch, start, limits):
            position += 1
            yield case, verdict


def _run_batch(
    batch: Sequence[Case], start: Callable[[], CaseRunner], limits: Limits
) -> Iterator[tuple[Case, Verdict]]:
    """Yields verdicts until the batch or its process ends; at least one."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_serve, args=(batch, start, limits, sender))
    process.start()
    sender.close()
    try:
        if _receive(receiver, limits.start_seconds) != READY:
            raise RuntimeError("the cases cannot be prepared; the error is above")
        for case in batch:
            verdict = _receive(receiver, limits.wall_seconds)
            if verdict is None:
                yield case, _end_of(process, limits)
                return
            yield case, verdict
    finally:
        receiver.close()
        if process.is_alive():
            process.kill()
        process.join()


def _receive(receiver: Connection, seconds: float) -> Verdict | None:
    try:
        return receiver.recv() if receiver.poll(seconds) else None
    except EOFError:
        return None


def _end_of(process: BaseProcess, limits: Limits) -> Verdict:
    """Returns the verdict on the case that ended its process, or that is still running in it."""
    process.join(timeout=1)
    if process.exitcode is None:
        return Verdict("hang", f"runs for more than {limits.wall_seconds:.0f} s by the clock")
    if process.exitcode == -signal.SIGPROF:
        return Verdict("hang", f"uses more than {limits.cpu_seconds:.0f} s of processor time")
    name = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit status {process.exitcode}"
    return Verdict("crash", name)


def _serve(batch: Sequence[Case], start: Callable[[], CaseRunner], limits: Limits, sender: Connection) -> None:
    os.setpgrp()
    run = start()
    sender.send(READY)
    for number in (1, 2):  # warnings of thousands of cases; messages are judged before they get here
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    if limits.memory is not None:  # address space is reserved far beyond what is used, by threads for one
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 4 * limits.memory, resource.RLIM_INFINITY))
    for case in batch:
        sender.send(_measured(case, run, limits))


def _measured(case: Case, run: CaseRunner, limits: Limits) -> Verdict:
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    # The default action of SIGPROF ends the process, also inside compiled code.
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds or 0.0)
    try:
        verdict = run(case)
    except MemoryError:
        return Verdict("memory", "MemoryError")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    used = _status("VmHWM") - before
    if limits.memory is not None and used > limits.memory:
        return Verdict("memory", f"more than {limits.memory >> 20} MiB | {used >> 20} MiB; {' '.join(verdict)}")
    return verdict


def _status(field: str) -> int:
    """Returns a size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
