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
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qlora_jax.metadata import JsonObject
from qlora_jax.rewards.worker import LONGEST_MESSAGE, MEMORY_REACHED
from qlora_jax.sandbox.limits import python_environment
from qlora_jax.sandbox.programs import receive, send

IMPORT_SECONDS = 120.0  # for a file's imports, if the limit of a call is lower
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)  # exit statuses of a process that somebody killed

Arguments = Mapping[str, object]


class Failed(NamedTuple):
    """Why a call failed; `ended` if it ended its process."""

    text: str
    ended: bool = False


class WorkerProcess:
    """A process with some functions, which runs one call at a time.

    Args:
      sources: (number, "file.py:name" or "module:name", keyword arguments of every call) of each function.
      seconds: of a call.
      memory: bytes.

    Attributes:
      deadline: time.monotonic() at which the call that runs is late.
    """

    def __init__(self, sources: Sequence[tuple[int, str, Arguments]], seconds: float, memory: int):
        self.sources, self._seconds, self._memory = sources, seconds, memory
        self._process: subprocess.Popen[bytes] | None = None
        self._request, self._again = b"", False
        self._limit, self.deadline = 0.0, 0.0

    def fileno(self) -> int:
        """Returns the descriptor of the replies, for `select`."""
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.fileno()

    def load(self) -> list[JsonObject | Failed]:
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
        found: list[JsonObject | Failed] = []
        for source in self.sources:
            self._send(pickle.dumps(source), max(IMPORT_SECONDS, self._seconds))
            outcome = self.outcome(wait=True)
            assert outcome is not None, "it is not started again"
            if isinstance(outcome, Failed) and outcome.ended:
                file = source[1].rpartition(":")[0]
                return [*found, Failed(f"{file}: cannot be imported ({outcome.text}). Correct the file")]
            found.append(outcome)
        return found

    def begin(self, number: int, arguments: Arguments) -> None:
        """Starts a call; raises ValueError if the process had ended, and functions cannot be imported again."""
        self._request = pickle.dumps((number, None, dict(arguments)))
        self._send_call()
        self._again = True

    def outcome(self, *, wait: bool = False) -> JsonObject | Failed | None:
        """Returns the outcome of the call that runs; None if it runs on.

        A process that somebody killed starts again, once per call. One that is late is killed.
        """
        assert self._process is not None
        seconds = max(0.0, self.deadline - time.monotonic())
        if not select.select([self], [], [], seconds if wait else 0)[0]:
            if time.monotonic() < self.deadline:
                return None
            self.stop()
            return Failed(f"took more than {self._limit:g} s (rewards.timeout is {self._seconds:g})", ended=True)
        try:
            reply = json.loads(receive(self.fileno(), LONGEST_MESSAGE))
            return Failed(reply["problem"]) if reply.get("problem") else reply
        except EOFError:
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        status = self.stop()
        if status in _FROM_OUTSIDE and self._again:
            self._send_call()
            return None
        if status == MEMORY_REACHED:
            return Failed(f"needed more than {self._memory >> 20:,} MiB (rewards.memory)", ended=True)
        found = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return Failed(f"ended its process ({found})", ended=True)

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

    def _send_call(self) -> None:
        ended = self._process is None or self._process.poll() is not None
        if problems := [found.text for found in self.load() if isinstance(found, Failed)] if ended else []:
            raise ValueError("\n  ".join(["reward functions cannot be imported again:", *problems]))
        self._send(self._request, self._seconds)

    def _send(self, content: bytes, seconds: float) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._limit, self.deadline = seconds, time.monotonic() + seconds
        with contextlib.suppress(BrokenPipeError):  # the end of its replies says why
            send(self._process.stdin.fileno(), content)


def run_calls(workers: Sequence[WorkerProcess], calls: Mapping[int, Arguments]) -> dict[int, JsonObject | Failed]:
    """Calls functions by their number, each on the worker that has it; returns the outcomes."""
    waiting = {worker: [number for number, *_ in worker.sources if number in calls] for worker in workers}
    running: dict[WorkerProcess, int] = {}
    outcomes: dict[int, JsonObject | Failed] = {}
    try:
        while len(outcomes) < len(calls):
            for worker, numbers in waiting.items():
                if numbers and worker not in running:
                    running[worker] = numbers.pop(0)
                    worker.begin(running[worker], calls[running[worker]])
            seconds = min(worker.deadline for worker in running) - time.monotonic()
            select.select([*running], [], [], max(0.0, seconds))
            for worker, number in [*running.items()]:
                if (outcome := worker.outcome()) is not None:
                    outcomes[number] = outcome
                    del running[worker]
    except BaseException:  # an interrupt: replies that arrive are not for the next calls
        for worker in running:
            worker.stop()
        raise
    return outcomes
