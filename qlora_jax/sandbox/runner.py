"""Tests programs of unknown origin in processes that are limited and sealed (worker.py, landlock_seccomp.py)."""

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from qlora_jax.sandbox.programs import Limits, Program, ProgramOutcome, receive, send

_ROOT = str(Path(__file__).resolve().parents[2])
# The worker has only Python's standard library, and forgets where it found this package.
_START = (
    "import sys; root = sys.argv[1]; sys.path.insert(0, root); from qlora_jax.sandbox import worker; "
    "sys.path.remove(root); worker.main(*sys.argv[2:])"
)


def run_programs(programs: Sequence[Program], limits: Limits, *, sealed: bool = True) -> list[ProgramOutcome]:
    """Tests each program, several at a time; returns the outcomes in order.

    Args:
      sealed: False: only limits on time, memory and file sizes; programs can use the network and read your files.

    Raises:
      OSError: this system cannot seal a process.
    """
    count = min(os.cpu_count() or 1, len(programs))
    if not count:
        return []
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(count) as pool:
        workers = [stack.enter_context(_worker(limits, sealed)) for _ in range(count)]
        try:
            shares = [*pool.map(_run, workers, [programs[first::count] for first in range(count)])]
        except BaseException:  # an interrupt: the threads of the pool are waiting
            for worker in workers:
                worker.kill()
            raise
    return [shares[index % count][index // count] for index in range(len(programs))]


def seal_problem() -> str | None:
    """Returns why this system cannot seal a process; None if it can."""
    try:
        with _worker(Limits(), sealed=True):
            return None
    except OSError as error:
        return str(error)


@contextlib.contextmanager
def _worker(limits: Limits, sealed: bool) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a worker; it ends when its input is closed, and its programs end with it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                "-X",
                "utf8",
                "-c",
                _START,
                _ROOT,
                folder,
                str(int(sealed)),
                *map(str, limits),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={},
            cwd=folder,
            process_group=0,  # Ctrl-C is for this process
        )
        try:
            if problem := _receive(process).decode():
                raise OSError(problem)
            yield process
        finally:
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.communicate()


def _run(process: subprocess.Popen[bytes], programs: Sequence[Program]) -> list[ProgramOutcome]:
    return [_try(process, program) for program in programs]


def _try(process: subprocess.Popen[bytes], program: Program) -> ProgramOutcome:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # the end of its replies says it
        send(process.stdin.fileno(), json.dumps(program).encode())
    return ProgramOutcome(*json.loads(_receive(process)))


def _receive(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    try:
        return receive(process.stdout.fileno())
    except EOFError:
        status = process.wait()
        found = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        raise RuntimeError(
            f"the process that tests programs ended ({found}). Raise the limits of processes and memory (ulimit -u, -v)"
        ) from None
