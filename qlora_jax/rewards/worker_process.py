"""Starts processes that run reward functions (worker.py), and starts them again after they have ended.

A request is a pickle of (number of a reward function or kind of a tool, its place to load it or None, settings or
arguments); the reply is JSON.
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

from qlora_jax.rewards.worker import LONGEST_MESSAGE, MEMORY_REACHED
from qlora_jax.sandbox.limits import python_environment
from qlora_jax.sandbox.programs import receive, send
from qlora_jax.untrusted_json import JsonObject

IMPORT_SECONDS = 120.0  # for a file's imports, if the limit of a call is lower
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)  # exit statuses of a process that somebody killed

Arguments = Mapping[str, object]
Name = int | str  # the number of a reward function, or a kind of tool_calls.py


class Failed(NamedTuple):
    """Why a call failed; `ended` if it ended its process."""

    text: str
    ended: bool = False


class Limit(NamedTuple):
    """Seconds of a call, and the setting that they are from, with its value."""

    seconds: float
    setting: str


class Call(NamedTuple):
    """A call of a function; `limit` None: that of its process."""

    name: Name
    arguments: Arguments
    limit: Limit | None = None


class WorkerProcess:
    """A process with some functions, which runs one call at a time.

    Args:
      sources: (name, "file.py:name" or "module:name", keyword arguments of every call) of each function.
      seconds: of a call.
      memory: bytes.
      repeats: calls of tools change objects of the process. If it starts again, it repeats those since `forget`.

    Attributes:
      deadline: time.monotonic() at which the call that runs is late.
    """

    def __init__(
        self, sources: Sequence[tuple[Name, str, Arguments]], seconds: float, memory: int, *, repeats: bool = False
    ):
        self.sources, self._default, self._memory = sources, Limit(seconds, f"rewards.timeout is {seconds:g}"), memory
        self._process: subprocess.Popen[bytes] | None = None
        self._request, self._again = b"", False
        self._limit, self.deadline = self._default, 0.0
        self._repeats, self._kept, self._journal = repeats, False, list[bytes]()

    def fileno(self) -> int:
        """Returns the descriptor of the replies, for `select`."""
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.fileno()

    def forget(self) -> None:
        """Forgets the calls to repeat."""
        self._journal.clear()

    def load(self) -> list[JsonObject | Failed]:
        """Starts the process, and returns the description of each function, or its problem."""
        self.stop()
        self._again = self._kept = False
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
            self._send(pickle.dumps(source), self._default._replace(seconds=self._import_seconds))
            outcome = self.outcome(wait=True)
            assert outcome is not None, "it is not started again"
            if isinstance(outcome, Failed) and outcome.ended:
                file = source[1].rpartition(":")[0]
                return [*found, Failed(f"{file}: cannot be imported ({outcome.text}). Correct the file")]
            found.append(outcome)
        return found

    @property
    def _import_seconds(self) -> float:
        return max(IMPORT_SECONDS, self._default.seconds)

    def begin(self, call: Call) -> None:
        """Starts a call; raises ValueError if the process had ended, and functions cannot be imported again."""
        self._request = pickle.dumps((call.name, None, dict(call.arguments)))
        self._send_call(call.limit or self._default)
        self._again, self._kept = True, self._repeats and isinstance(call.name, str)

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
            return Failed(f"took more than {self._limit.seconds:g} s ({self._limit.setting})", ended=True)
        try:
            reply = json.loads(receive(self.fileno(), LONGEST_MESSAGE))
            if self._kept:
                self._journal.append(self._request)
            return Failed(reply["problem"]) if reply.get("problem") else reply
        except EOFError:
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        status = self.stop()
        if status in _FROM_OUTSIDE and self._again:
            kept = self._kept
            self._send_call(self._limit)
            self._kept = kept
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

    def _send_call(self, limit: Limit) -> None:
        ended = self._process is None or self._process.poll() is not None
        if problems := [found.text for found in self.load() if isinstance(found, Failed)] if ended else []:
            raise ValueError("\n  ".join(["reward functions cannot be imported again:", *problems]))
        for request in self._journal if ended else ():
            self._send(request, self._default._replace(seconds=self._import_seconds))
            if isinstance(found := self.outcome(wait=True), Failed) and found.ended:
                raise ValueError(f"a tool that had answered does not answer again: {found.text}. Correct it")
        self._send(self._request, limit)

    def _send(self, content: bytes, limit: Limit) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._limit, self.deadline = limit, time.monotonic() + limit.seconds
        with contextlib.suppress(BrokenPipeError):  # the end of its replies says why
            send(self._process.stdin.fileno(), content)


def run_calls[K](queues: Mapping[WorkerProcess, Sequence[tuple[K, Call]]]) -> dict[K, JsonObject | Failed]:
    """Calls functions, those of a worker in order; returns the outcomes by the calls' keys."""
    waiting = {worker: [*calls] for worker, calls in queues.items()}
    running: dict[WorkerProcess, K] = {}
    outcomes: dict[K, JsonObject | Failed] = {}
    try:
        while running or any(waiting.values()):
            for worker, calls in waiting.items():
                if calls and worker not in running:
                    running[worker], call = calls.pop(0)
                    worker.begin(call)
            seconds = min(worker.deadline for worker in running) - time.monotonic()
            select.select([*running], [], [], max(0.0, seconds))
            for worker, key in [*running.items()]:
                if (outcome := worker.outcome()) is not None:
                    outcomes[key] = outcome
                    del running[worker]
    except BaseException:  # an interrupt: replies that arrive are not for the next calls
        for worker in running:
            worker.stop()
        raise
    return outcomes
