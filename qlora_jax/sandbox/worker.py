"""Tests programs, each in two new processes without a network, files to write, or processes to start.

runner.py starts this with an empty environment, sends programs on the standard input, and reads an outcome for each.
The process that runs a program starts before its tests are read, so its memory has never held them.
"""

import contextlib
import itertools
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable

from qlora_jax.sandbox.landlock_seccomp import end_with_parent, library_folders, platform_problem, seal
from qlora_jax.sandbox.limits import limit_resources
from qlora_jax.sandbox.program_tests import run_program, run_tests
from qlora_jax.sandbox.programs import Limits, Program, ProgramOutcome, receive, send

_MOST_DESCRIPTORS = 1 << 16
_LONGEST_REQUEST = 1 << 30  # bytes
_UNSEALED_FILE_SIZE = 1 << 20  # bytes; a sealed process writes none
_ENDING_SECONDS = 1.0  # from the end of a process' pipes to the end of the process


class _Sandbox:
    """Starts and ends processes with limits; each has an empty folder below `folder`."""

    def __init__(self, limits: Limits, sealed: bool, folder: str):
        self.limits = limits
        self._sealed, self._folder, self._readable = sealed, folder, library_folders()

    def start(self, run: Callable[..., object], *descriptors: int) -> int:
        """Starts a process that calls `run(*descriptors)` and has no other open files; returns its id.

        Raises:
          OSError: limiting or sealing it failed.
        """
        empty = tempfile.mkdtemp(dir=self._folder)
        confined, confirm = os.pipe()
        if process := os.fork():
            os.close(confirm)
            message = os.read(confined, 1)
            os.close(confined)
            if not message:
                raise OSError("limiting a process of the sandbox failed")
            return process
        try:
            self._confine(empty, (*descriptors, confirm))
            os.write(confirm, b"+")
            os.close(confirm)
            run(*descriptors)
        finally:
            os._exit(0)

    def _confine(self, empty: str, descriptors: tuple[int, ...]) -> None:
        os.setsid()  # processes that it starts, where it can, are killed with it
        end_with_parent()
        _close_all_but(descriptors)
        os.chdir(empty)
        limits = {
            resource.RLIMIT_CPU: self.limits.seconds,
            resource.RLIMIT_AS: self.limits.memory,
            resource.RLIMIT_FSIZE: 0 if self._sealed else _UNSEALED_FILE_SIZE,
            resource.RLIMIT_NOFILE: 64,
            resource.RLIMIT_CORE: 0,
        }
        limit_resources(limits)
        if self._sealed:
            seal(self._readable)

    def end(self, *processes: int) -> list[int]:
        """Kills processes and removes their folders; returns their exit statuses."""
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        for name in os.listdir(self._folder):
            shutil.rmtree(os.path.join(self._folder, name), ignore_errors=True)
        return statuses


def try_next(sandbox: _Sandbox, requests: int) -> ProgramOutcome | None:
    """Tests the next program of `requests`; returns None after the last."""
    (asked, ask), (answered, answer) = os.pipe(), os.pipe()
    program_process = sandbox.start(run_program, asked, answer)
    os.close(asked)
    os.close(answer)
    try:
        program = Program(*json.loads(receive(requests, _LONGEST_REQUEST)))
    except EOFError:
        sandbox.end(program_process)
        return None
    outcome = _try(sandbox, program, program_process, ask, answered)
    os.close(ask)
    os.close(answered)
    return outcome


def _try(sandbox: _Sandbox, program: Program, program_process: int, ask: int, answered: int) -> ProgramOutcome:
    found, report = os.pipe()

    def run(ask: int, answered: int, report: int) -> None:
        send(report, json.dumps(run_tests(program, ask, answered)).encode())

    test_process = sandbox.start(run, ask, answered, report)
    os.close(report)
    late, outcome = _wait_for_outcome(found, sandbox.limits.waiting_seconds)
    os.close(found)
    ended = test_process if outcome is None else program_process
    if not late and (outcome is None or outcome.reason == "ended"):
        _wait_for_end(ended)
    statuses = dict(zip((test_process, program_process), sandbox.end(test_process, program_process), strict=True))
    if late:
        return ProgramOutcome("time", f"took more than {sandbox.limits.waiting_seconds} s")
    if outcome is not None and outcome.reason != "ended":
        return outcome
    if statuses[ended] == -signal.SIGKILL:
        return ProgramOutcome("time", f"took more than {sandbox.limits.seconds} s of processor time")
    return outcome or ProgramOutcome("ended", "the process of the tests ended")


def _wait_for_outcome(found: int, seconds: float) -> tuple[bool, ProgramOutcome | None]:
    """Returns (False, the outcome that the tests send, or None if they end without one), or (True, None) if late."""
    if not select.select([found], [], [], seconds)[0]:
        return True, None
    try:
        return False, ProgramOutcome(*json.loads(receive(found)))
    except EOFError:
        return False, None


def _wait_for_end(process: int) -> None:
    """Waits until a process has ended, or a second has passed; its exit status stays to be read."""
    ends = time.monotonic() + _ENDING_SECONDS
    while time.monotonic() < ends and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)


def _close_all_but(descriptors: tuple[int, ...]) -> None:
    """Closes all open files but these, and opens /dev/null as standard input, output and error."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    for before, after in itertools.pairwise([2, *sorted(descriptors), _MOST_DESCRIPTORS]):
        os.closerange(before + 1, after)


def find_problem(folder: str) -> str | None:
    """Returns why a process cannot be sealed here, or what a sealed process can still do; None if all is well."""
    if problem := platform_problem():
        return problem
    sandbox, (found, report) = _Sandbox(Limits(), False, folder), os.pipe()
    process = sandbox.start(lambda report: send(report, (_seal_problem() or "").encode()), report)
    os.close(report)
    problem = receive(found).decode() or None
    os.close(found)
    sandbox.end(process)
    return problem


def _seal_problem() -> str | None:
    """Seals this process, and tries what it must not be able to do."""
    attempts: dict[str, Callable[[], object]] = {
        "open a socket": socket.socket,
        "start a process": lambda: os.fork() or os._exit(0),
        "write a file": lambda: os.open("file", os.O_WRONLY | os.O_CREAT),
        "read the environment of a process": lambda: os.open("/proc/self/environ", os.O_RDONLY),
    }
    try:
        seal(library_folders())
    except OSError as error:
        return str(error)
    return next((f"a sealed process can {name}" for name, attempt in attempts.items() if not _refused(attempt)), None)


def _refused(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except PermissionError:
        return True
    return False


def main(folder: str, sealed: str, *limits: str) -> None:
    """Reports a problem of the seal, or an empty text; then tests programs until the end of the standard input.

    Args:
      folder: an empty folder.
      sealed: "1", or "0" for only limits.
      limits: the fields of Limits.
    """
    requests, outcomes, is_sealed = sys.stdin.fileno(), sys.stdout.fileno(), sealed == "1"
    problem = find_problem(folder) if is_sealed else None
    send(outcomes, (problem or "").encode())
    sandbox = _Sandbox(Limits(*map(int, limits)), is_sealed, folder)
    while problem is None and (outcome := try_next(sandbox, requests)):
        send(outcomes, json.dumps(outcome).encode())
