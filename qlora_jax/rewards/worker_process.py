"""Starts processes that run reward functions (worker.py), and starts them again after they have ended.

A request is a pickle of (number of a function, its place to load it or None, settings or arguments); the reply is JSON.
"""

import contextlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from qlora_jax.metadata import JsonObject
from qlora_jax.rewards.worker import LONGEST_REQUEST, MEMORY_REACHED
from qlora_jax.sandbox.limits import python_environment
from qlora_jax.sandbox.programs import receive, send

IMPORT_SECONDS = 120.0  # for a file's imports, if the limit of a call is lower
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)  # exit statuses of a process that somebody killed


class Source(NamedTuple):
    """A function to load: "file.py:name" or "module:name", and keyword arguments that every call gets."""

    number: int
    place: str
    settings: Mapping[str, object]


class Call(NamedTuple):
    """A call of the function of a number."""

    number: int
    arguments: Mapping[str, object]


class Ended(NamedTuple):
    """The reason why a call ended its process."""

    reason: str


class WorkerProcess:
    """A process with some functions; it starts at the first `load` or `begin`.

    Attributes:
      fileno: the file that is readable when the reply is there.
      deadline: time.monotonic() at which the call that runs is late.
    """

    def __init__(self, sources: Sequence[Source], seconds: float, memory: int):
        self._sources, self._seconds, self._memory = sources, seconds, memory
        self._process: subprocess.Popen[bytes] | None = None
        self._call, self._again = b"", False
        self.deadline = 0.0

    def fileno(self) -> int:
        """Returns the descriptor of the replies, for `select`."""
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.fileno()

    def load(self) -> list[JsonObject]:
        """Starts the process, and returns the description of each function, or its problem."""
        self.stop()
        self._again = False
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "qlora_jax.rewards.worker", str(self._memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Sets and dicts of a function have the same order in every process.
            env={**os.environ, **python_environment(), "PYTHONHASHSEED": "0"},
            process_group=0,  # Ctrl-C is for this process; a kill reaches what functions start
        )
        found: list[JsonObject] = []
        for source in self._sources:
            seconds = max(IMPORT_SECONDS, self._seconds)
            self._send(pickle.dumps((source.number, source.place, source.settings)), seconds)
            outcome = self.finish() if self.is_ready() else self.expire()
            if outcome is None or isinstance(outcome, Ended):
                file = source.place.rpartition(":")[0]
                found.append(
                    {"problem": f"{file}: cannot be imported ({outcome and outcome.reason}). Correct the file"}
                )
                return found
            found.append(outcome)
        return found

    def is_ready(self) -> bool:
        """Waits for the reply, and returns False if it is late."""
        return bool(select.select([self], [], [], max(0.0, self.deadline - time.monotonic()))[0])

    def begin(self, call: Call) -> None:
        """Starts a call.

        Raises:
          ValueError: the process had ended, and its functions cannot be imported again.
        """
        self._call = pickle.dumps((call.number, None, dict(call.arguments)))
        self._start_call()
        self._again = True

    def _start_call(self) -> None:
        if self._process is None or self._process.poll() is not None:
            problems = [str(found["problem"]) for found in self.load() if found["problem"]]
            if problems:
                raise ValueError("\n  ".join(["reward functions cannot be imported again:", *problems]))
        self._send(self._call, self._seconds)

    def finish(self) -> JsonObject | Ended | None:
        """Returns the reply that is there, or why the process ended; None: somebody killed it, so it starts again."""
        assert self._process is not None
        try:
            return json.loads(receive(self.fileno(), LONGEST_REQUEST))
        except EOFError:
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        status = self.stop()
        if status in _FROM_OUTSIDE and self._again:
            self._again = False
            self._start_call()
            return None
        if status == MEMORY_REACHED:
            return Ended(f"needed more than {self._memory >> 20:,} MiB of memory, the limit rewards.memory")
        found = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return Ended(f"ended its process ({found})")

    def expire(self) -> Ended:
        """Kills the process, whose call is late."""
        self.stop()
        return Ended(f"took more than {self._seconds:g} s, the limit rewards.timeout")

    def stop(self) -> int:
        """Ends the process and those that its functions started in its group; returns its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        return process.wait()

    def _send(self, content: bytes, seconds: float) -> None:
        assert self._process is not None and self._process.stdin is not None
        self.deadline = time.monotonic() + seconds
        with contextlib.suppress(BrokenPipeError):  # the end of its replies says why
            send(self._process.stdin.fileno(), content)


def run_calls(workers: Sequence[WorkerProcess], calls: Iterable[tuple[int, Call]]) -> dict[int, JsonObject | Ended]:
    """Runs each call on its worker, one at a time per worker; returns the outcomes by the number of the function.

    Args:
      calls: (index of the worker, call).

    Raises:
      ValueError: functions cannot be imported again after their process ended.
    """
    waiting: dict[int, list[Call]] = {}
    for index, call in calls:
        waiting.setdefault(index, []).insert(0, call)
    running: dict[int, Call] = {}
    outcomes: dict[int, JsonObject | Ended] = {}
    try:
        while waiting or running:
            for index in [index for index in waiting if index not in running]:
                running[index] = waiting[index].pop()
                if not waiting[index]:
                    del waiting[index]
                workers[index].begin(running[index])
            seconds = min(workers[index].deadline for index in running) - time.monotonic()
            ready = select.select([workers[index] for index in running], [], [], max(0.0, seconds))[0]
            for index, call in [*running.items()]:
                worker = workers[index]
                if worker in ready:
                    outcome = worker.finish()
                else:
                    outcome = worker.expire() if time.monotonic() >= worker.deadline else None
                if outcome is not None:
                    outcomes[call.number] = outcome
                    del running[index]
    except BaseException:  # an interrupt: their replies are not for the next calls
        for index in running:
            workers[index].stop()
        raise
    return outcomes
