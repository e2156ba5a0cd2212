"""The process that plays environments of the package `verifiers`, in that package's Python (worker.py).

An address is `verifiers:NAME[?size=100&SETTING=VALUE]`: NAME is an installed task set, `size` the number of its first
tasks, and the settings are those of the environment, such as `taskset.split`. A value is JSON, or else text, as `null`.
"""

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

SCHEME = "verifiers:"
ADDRESS_COLUMN, TASK_COLUMN = "verifiers", "task"  # the address, and the number of a task
PYTHON_VARIABLE = "QLORA_JAX_VERIFIERS_PYTHON"
START_SECONDS = 120.0  # for a command's imports, and for the data that an environment loads
TICK_SECONDS = 0.2
END_SECONDS = 2.0
_HERE = Path(__file__).parent

JsonObject = Mapping[str, object]
_allowed: set[str] = set()


class Address(NamedTuple):
    """A task set with its settings."""

    name: str
    size: int | None
    settings: JsonObject

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Reads an address.

        Raises:
          ValueError: a size that is not a number, or a setting below a value.
        """
        name, _, query = text.removeprefix(SCHEME).partition("?")
        settings: dict[str, object] = {"taskset": {"id": name}}
        size: int | None = None
        for key, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
            if key == "size":
                if not value.isdecimal() or not int(value):
                    raise ValueError(f"{text}: size: found {value!r}, expected a number from 1 on. Correct the address")
                size = int(value)
                continue
            *path, last = key.split(".")
            place: object = settings
            for part in path:
                place = place.setdefault(part, {}) if isinstance(place, dict) else place
            if not isinstance(place, dict):
                raise ValueError(f"{text}: found {key!r} below a value. Correct the address")
            place[last] = _value(value)
        return cls(name, size, settings)


def is_address(place: str | None) -> bool:
    """Returns True for an address, or the name of one."""
    return place is not None and place.startswith(SCHEME)


class Stopped(Exception):
    """The process gave no result."""


class VerifiersProcess:
    """A process with the package, which runs one command at a time.

    Args:
      python: the program.
    """

    def __init__(self, python: str):
        self._python = python
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def call(self, command: JsonObject) -> dict:
        """Returns the result of a command; raises Stopped without one."""
        deadline = time.monotonic() + START_SECONDS

        def tick() -> None:
            if time.monotonic() > deadline:
                raise Stopped(f"took more than {START_SECONDS:g} s")

        return next(self.results(command, tick))

    def results(self, command: JsonObject, tick: Callable[[], None]) -> Generator[dict]:
        """Yields results until the caller leaves; the process ends if it leaves by an error.

        Args:
          tick: called while results are missing; it raises to end the process.

        Raises:
          Stopped: the process has ended.
        """
        try:
            process = self._running()
            assert process.stdin is not None
            process.stdin.write(json.dumps(command).encode() + b"\n")
            process.stdin.flush()
            while True:
                line = self._line(process)
                if line is None:
                    tick()
                else:
                    yield json.loads(line)
        except GeneratorExit:
            raise
        except BrokenPipeError:
            raise Stopped(self._ended()) from None
        except BaseException:
            self.stop()
            raise

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._buffer = b""
            self._process = subprocess.Popen(
                [self._python, "-P", str(_HERE / "worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONHASHSEED": "0"},
                process_group=0,  # Ctrl-C is for this process
            )
            atexit.register(self.stop)
        return self._process

    def _line(self, process: "subprocess.Popen[bytes]") -> bytes | None:
        """Returns the next line; None if there is none yet."""
        assert process.stdout is not None
        if b"\n" not in self._buffer:
            if not select.select([process.stdout], [], [], TICK_SECONDS)[0]:
                return None
            block = os.read(process.stdout.fileno(), 1 << 20)
            if not block:
                raise Stopped(self._ended())
            self._buffer += block
        line, newline, rest = self._buffer.partition(b"\n")
        self._buffer = rest if newline else self._buffer
        return line if newline else None

    def _ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process is not None:
                self._process.wait(END_SECONDS)
        status = self.stop()
        found = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"ended its process ({found})"

    def stop(self) -> int:
        """Ends the process, with time to end the programs that it started; returns its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None and process.stdout is not None
        atexit.unregister(self.stop)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            return process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()


def allow(place: str) -> None:
    """Lets this process load a task set that the command line names; a file of settings alone runs no code.

    Raises:
      ValueError: the package is not installed.
    """
    verifiers_process()
    _allowed.add(Address.parse(place).name)


@functools.cache
def verifiers_process() -> VerifiersProcess:
    """Returns the process of this one, which is started by its first command.

    Raises:
      ValueError: no Python with the package is found.
    """
    named, beside = os.environ.get(PYTHON_VARIABLE), _HERE.parents[1] / ".verifiers/bin/python"
    for python in [named] if named else [sys.executable, str(beside)]:
        with contextlib.suppress(OSError):
            if not subprocess.run([python, "-P", "-c", "import verifiers"], capture_output=True).returncode:
                return VerifiersProcess(python)
    found = f"found no package verifiers for {named or sys.executable}. Install it in a separate virtual environment"
    raise ValueError(f"--environment: {found}, and set {PYTHON_VARIABLE} to the python in it")


def verifiers_rows(address: str) -> Iterator[dict[str, object]]:
    """Yields a row with the prompt of each task.

    Raises:
      ValueError: the command line does not name the task set, or it cannot be loaded.
    """
    for number, prompt in enumerate(_prompts(address)):
        yield {"prompt": prompt, ADDRESS_COLUMN: address, TASK_COLUMN: number}


@functools.cache
def _prompts(address: str) -> tuple[object, ...]:
    found = Address.parse(address)
    if found.name not in _allowed:
        fix = f"Add --environment {SCHEME}{found.name}"
        raise ValueError(f"{address}: found an environment that the command line does not name. {fix}")
    prompts = _call(address, {"kind": "rows", "size": found.size, "settings": found.settings})["prompts"]
    assert isinstance(prompts, list), "the process sends a list"
    return tuple(prompts)


def verifiers_digest(place: str) -> str:
    """Returns SHA-256 of the package's version and of the task set's files; raises ValueError if there is none."""
    return str(_call(place, {"kind": "digest", "name": Address.parse(place).name})["sha256"])


def _call(place: str, command: JsonObject) -> dict:
    try:
        result = verifiers_process().call(command)
    except Stopped as error:
        raise ValueError(f"{place}: the process of verifiers {error}. Correct the environment") from None
    if result.get("problem"):
        raise ValueError(f"{place}: {result['problem']}")
    return result


def _value(text: str) -> object:
    try:
        return text if text == "null" else json.loads(text)  # a harness has this name
    except ValueError:
        return text
