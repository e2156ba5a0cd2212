"""Ends this process when another of the run has ended, failed or stopped moving; with one message that names it.

Processes wait for each other in collectives, most of which have no time limit. So the end of one has to end the others:

- failed: it writes its error to the coordination service before it ends; the others see it within POLL_SECONDS.
- killed, or its machine is gone: JAX's heartbeat notices. JAX does not say which process it was, so each process counts
  in the coordination service, and the one whose count has stood still is named; as a guess if it stood still briefly.
- alive but stuck: every process counts the places that it passes. When none has been passed for too long, the processes
  compare their counts, and the one with the least is named.
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

from jax.sharding import Mesh
from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]  # a library without declarations

from qlora_jax.hosts.group import AgreedMinimum, Group, client
from qlora_jax.terminal.visible import fit_to_print

ENDED = 75  # EX_TEMPFAIL: starting the run again may help
POLL_SECONDS = 0.5
SILENT_SECONDS = 3.0  # a process that counts may be as late on a busy machine
LAST_WORDS_SECONDS = 3.0  # for processes to read what others wrote, before process 0 takes the service with it
ANSWER_SECONDS = 5.0  # for processes to say where they are
CONNECT_SECONDS = 1.0  # for process 0 to take a connection
CLOSING_SECONDS = 0.5  # for a busy system to close the port of a process that was killed, after its connections
_BEATS, _FAILED = "qlora_jax/watchdog/beats", "qlora_jax/watchdog/failed"
_LEFT, _PLACES = "qlora_jax/left", "qlora_jax/places"
RESTART = "Look at its output, then start all processes again, with --resume if the run has a checkpoint"

# Prints an error and returns the exit code; None if the traceback is to be printed, with code 1.
Report = Callable[[BaseException], int | None]


class Position(NamedTuple):
    """A place that a process has passed.

    Attributes:
      count: the number of places passed.
      text: the place.
      at: the time, by time.monotonic.
    """

    count: int
    text: str
    at: float


@dataclasses.dataclass
class Watchdog:
    """Watches the other processes in a thread.

    Attributes:
      group: the processes of the run.
      heartbeat: seconds after which JAX notices that a process has ended.
      coordinator: host:port of process 0; None for one process.
      stuck_after: the limit in seconds between two calls of `passes`; None: no limit yet.
      position: the newest place that this process has passed.
    """

    group: Group
    heartbeat: float = 0.0
    coordinator: str | None = None
    stuck_after: float | None = None
    position: Position = dataclasses.field(default_factory=lambda: Position(0, "the start", time.monotonic()))
    _beats: dict[int, tuple[str, float]] = dataclasses.field(default_factory=dict)  # (count, when it was new)
    _stopped: threading.Event = dataclasses.field(default_factory=threading.Event)
    # Never released by the thread that ends the process, so that the first message is the only one.
    _ending: Any = dataclasses.field(default_factory=threading.Lock)  # threading.Lock is a function in Python 3.12
    _code: int = ENDED  # the exit code

    def passes(self, text: str) -> None:
        """Notes that this process has come to a place, at which all processes come in the same order."""
        self.position = Position(self.position.count + 1, text, time.monotonic())

    @contextlib.contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """Ends this process if it passes no place for `seconds` within the context."""
        self.passes(self.position.text)
        self.stuck_after = seconds
        try:
            yield
        finally:
            self.stuck_after = None

    def start(self) -> None:
        """Starts the thread."""
        now = time.monotonic()
        self._beats |= {process: ("", now) for process in range(self.group.processes) if process != self.group.process}
        threading.Thread(target=self._watch, name="hosts watchdog", daemon=True).start()

    def stop(self) -> None:
        """Ends the thread; called before the process leaves the run."""
        self._stopped.set()

    def lost(self) -> None:
        """Ends this process because JAX has lost another one; called in a thread of JAX.

        The thread may hold locks of JAX's client, so nothing here uses the client. For the same reason it does not wait
        for long if another thread is ending this process: that thread may wait for the client.
        """
        if self._ending.acquire(timeout=LAST_WORDS_SECONDS):
            self._say(f"{self._lost_text()}. {RESTART}")
            if self.group.is_first:
                # For the others, which find out whether this process has ended.
                time.sleep(CLOSING_SECONDS + CONNECT_SECONDS)
        os._exit(self._code)

    def _lost_text(self) -> str:
        """Names the lost processes; if a busy machine leaves this open, guesses the one that is silent for longest."""
        end = "ended without a message, or cannot be reached"
        if lost := self._lost_processes():
            return f"{', '.join(map(self.group.name, lost))} {end}"
        if not self._beats:
            return f"another process {end}"
        longest = min(self._beats, key=lambda process: self._beats[process][1])
        return f"another process {end}. It may be {self.group.name(longest)}, which has been silent for longest"

    def _lost_processes(self) -> list[int]:
        """Returns the processes silent for as long as JAX needs to notice an end; process 0 if it has ended."""
        # JAX notices a lost process half a heartbeat after its end or later; its last count may be read late.
        limit = max(SILENT_SECONDS, self.heartbeat / 2 - 2 * POLL_SECONDS)
        now = time.monotonic()
        silent = sorted(process for process, (_, at) in self._beats.items() if now - at > limit)
        # The connection to process 0 may have broken, which all notice at once.
        ended = not silent and not self.group.is_first and stops_answering(self.coordinator)
        return [0] if ended else silent

    def fail(self, error: BaseException, report: Report) -> NoReturn:
        """Reports an error, lets the others know it, and ends this process at once."""
        with self._ending:
            code = report(error)
            self._code = 1 if code is None else code
            if code is None:
                traceback.print_exception(error)
            with contextlib.suppress(Exception):  # the service may be gone, and nothing else is left to do
                failure = {"process": self.group.process, "text": first_line(error)}
                client().key_value_set(_FAILED, json.dumps(failure))
            self._leave()

    def end(self, text: str) -> NoReturn:
        """Prints one message and ends this process at once."""
        with self._ending:
            self._say(text)
            self._leave()

    def _say(self, text: str) -> None:
        cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # the progress display hides it
        name = self.group.name(self.group.process)
        text = fit_to_print(text)
        sys.stderr.write(f"{cursor}error: {name}: ended, because {text}\n")
        sys.stderr.flush()

    def _leave(self) -> NoReturn:
        """Ends this process without JAX's exit, which would wait 300 s for processes that wait for this one."""
        with contextlib.suppress(Exception):
            client().key_value_set(f"{_LEFT}/{self.group.process}", "")
            if self.group.is_first:
                deadline = time.monotonic() + LAST_WORDS_SECONDS
                while time.monotonic() < deadline and len(client().key_value_dir_get(_LEFT)) < self.group.processes:
                    time.sleep(0.05)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(self._code)

    def _watch(self) -> None:
        beat = 0
        while not self._stopped.wait(POLL_SECONDS):
            beat += 1
            with contextlib.suppress(Exception):  # the service is gone, which JAX notices
                client().key_value_set(f"{_BEATS}/{self.group.process}", str(beat), allow_overwrite=True)
                self._read(dict(client().key_value_dir_get(_BEATS.rpartition("/")[0])))
            if self.stuck_after is not None and time.monotonic() - self.position.at > self.stuck_after:
                counts = self._counts()
                if not self._stopped.is_set():
                    self.end(stuck_text(counts, self.group, self.position.text, self.stuck_after))
                raise SystemExit  # ends only this thread

    def _read(self, texts: dict[str, str]) -> None:
        """Notes whose counts have moved, and ends this process if another has failed."""
        failure = json.loads(texts.pop(_FAILED, "null"))
        if failure is not None and failure["process"] != self.group.process:
            self.end(f"{self.group.name(failure['process'])} failed: {failure['text']}\n{RESTART}")
        for key, text in texts.items():
            process = int(key.rpartition("/")[2])
            if process != self.group.process and self._beats.get(process, ("", 0.0))[0] != text:
                self._beats[process] = text, time.monotonic()

    def _counts(self) -> list[int | None]:
        """Returns how many places each process has passed; None for those that do not answer."""
        with contextlib.suppress(Exception):
            client().key_value_set(f"{_PLACES}/{self.group.process}", str(self.position.count))
        deadline = time.monotonic() + ANSWER_SECONDS
        counts: dict[int, int] = {}
        while time.monotonic() < deadline and len(counts) < self.group.processes:
            with contextlib.suppress(Exception):
                found = client().key_value_dir_get(_PLACES)
                counts = {int(key.rpartition("/")[2]): int(text) for key, text in found}
            time.sleep(0.1)
        return [counts.get(process) for process in range(self.group.processes)]


def stops_answering(coordinator: str | None) -> bool:
    """Returns True if process 0 takes no connection, or none any more after CLOSING_SECONDS."""
    deadline = time.monotonic() + CLOSING_SECONDS
    while answers(coordinator):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def answers(coordinator: str | None) -> bool:
    """Returns True if process 0 takes a connection at its address, host:port."""
    if coordinator is None:
        return False
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """Returns an error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def stuck_text(counts: Sequence[int | None], group: Group, place: str, seconds: float) -> str:
    """Returns the message of a run in which nothing moves.

    Args:
      counts: how many places each process has passed; None for those that do not answer.
      place: the newest place that this process has passed.
    """
    start = f"nothing has moved for {seconds:g} s (hosts.stuck_after) since {place}"
    answered = [count for count in counts if count is not None]
    behind = [index for index, count in enumerate(counts) if count is None or count < max(answered)]
    if not behind:
        return (
            f"{start}: all processes wait in the same place, for a GPU or the network. Check both, then start all "
            "processes again with --resume"
        )
    names = ", ".join(group.name(process) for process in behind)
    return f"{start}: the others wait for {names}. {RESTART}"


# Calls a function when JAX's client has lost another process, instead of a stack trace and an abort.
#
# `jax.distributed.initialize` has no argument for the callback that its client takes. And the client of jaxlib 0.11.2
# and 0.12.0.1 cannot convert the callback's argument to Python, which ends in std::terminate. So std::terminate calls
# the function too, while the client calls back.

_SET_TERMINATE = "_ZSt13set_terminatePFvvE"  # std::set_terminate
_Handler = ctypes.CFUNCTYPE(None)
_handlers: list[object] = []  # C++ keeps only their addresses


@contextlib.contextmanager
def calls_when_lost(lost: Callable[[], None]) -> Iterator[None]:
    """Lets the client that JAX makes within the context call `lost`, which ends the process.

    Where the C++ library is another one, JAX's own message and SIGABRT stay.
    """
    if not _set_terminate(lost):
        yield
        return
    make = _jax.get_distributed_runtime_client
    _jax.get_distributed_runtime_client = functools.partial(make, missed_heartbeat_callback=lambda status: lost())
    try:
        yield
    finally:
        _jax.get_distributed_runtime_client = make


def _set_terminate(lost: Callable[[], None]) -> bool:
    try:
        set_terminate = getattr(ctypes.CDLL("libstdc++.so.6"), _SET_TERMINATE)
    except (OSError, AttributeError):
        return False
    set_terminate.argtypes = [_Handler]
    handler = _Handler(lost)
    _handlers.append(handler)
    set_terminate(handler)
    return True


@contextmanager
def stop_on_signals(report: Callable[[str], None]) -> Iterator[Callable[[], int]]:
    """Yields a function that returns the number of the first SIGINT or SIGTERM; 0: none. A second SIGINT interrupts."""
    received: list[int] = []

    def handle(number: int, _: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        report(f"{signal.Signals(number).name}: saving after this step; press Ctrl-C again to exit without saving")

    # Python sets signal handlers in the main thread only; elsewhere, signals stay with the program's own handlers.
    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignal:
    """Asks all processes which signal has asked one of them to stop; all get the same answer.

    All processes call it equally often.

    Args:
      asked: returns the number of the signal that has asked this process to stop; 0: none.
      mesh: of the run; it has devices of every process.
    """

    def __init__(self, asked: Callable[[], int], mesh: Mesh):
        self._asked, self._minimum = asked, AgreedMinimum(mesh)

    def __call__(self) -> int:
        """Returns the greatest number of the signals that have asked a process to stop; 0: none has."""
        (least,) = self._minimum(-self._asked())
        return -least
