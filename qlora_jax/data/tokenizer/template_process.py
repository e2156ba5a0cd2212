"""Starts the process that renders chat templates (template_worker.py), and starts it again after it has ended."""

import array
import atexit
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import IO

from qlora_jax.data.tokenizer.template_protocol import (
    ENCODING,
    HEADER,
    LENGTHS,
    MEMORY_REACHED,
    OUTPUT_REACHED,
    Limits,
)

WORKER = "qlora_jax.data.tokenizer.template_worker"


class ProcessEnded(Exception):
    """The process ended while it rendered.

    Attributes:
      by_template: True if the template ended it, and would do so again.
    """

    def __init__(self, reason: str, *, by_template: bool):
        super().__init__(reason)
        self.by_template = by_template


class TemplateProcess:
    """Renders chat templates in one process, which starts when it is first used. Threads take turns."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._started_by = 0  # a process id: after a fork, the child must not use the pipes
        atexit.register(self.stop)

    def render(self, template: str, special_tokens: Mapping[str, str], calls: bytes) -> list[str | ValueError]:
        """Returns the text of each call, or its error; see template_protocol.py for the calls.

        Raises:
          ProcessEnded: the process ended during one of the calls, for example because it reached a limit.
        """
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            try:
                pickle.dump((template, dict(special_tokens), calls), process.stdin)
                process.stdin.flush()
                return _read_reply(process.stdout)
            except (EOFError, BrokenPipeError):
                status = process.wait()
                self.stop()
                raise self._ended(status) from None
            except BaseException:  # an interrupt: the reply would be taken for that to the next request
                self.stop()
                raise

    def stop(self) -> None:
        """Ends the process, if it runs."""
        process, self._process = self._process, None
        if process is None or self._started_by != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._started_by == os.getpid() and self._process.poll() is None:
            return self._process
        self.stop()
        self._process, self._started_by = _start(self._limits), os.getpid()
        return self._process

    def _ended(self, status: int) -> ProcessEnded:
        """Returns the error for the exit status of the process; negative ones are numbers of signals."""
        limits = self._limits
        reasons = {
            -signal.SIGPROF: f"took more than {limits.seconds:g} s of processor time",
            MEMORY_REACHED: f"needed more than {limits.memory >> 20:,} MiB of memory",
            OUTPUT_REACHED: f"wrote more than {limits.output:,} characters beyond its own and the conversation's",
            -signal.SIGSEGV: "crashed the process that renders",
            -signal.SIGABRT: "crashed the process that renders",
        }
        if status in reasons:
            return ProcessEnded(reasons[status], by_template=True)
        found = f"signal {-status}" if status < 0 else f"exit status {status}"
        return ProcessEnded(f"failed, because the process that renders was ended ({found})", by_template=False)


def _start(limits: Limits) -> subprocess.Popen[bytes]:
    # The modules of this process, in any folder (-P), however its path was made.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER, *map(str, limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            process_group=0,  # Ctrl-C is for this process, which waits for the text
        )
    except OSError as error:
        raise ValueError(
            f"the process that renders chat templates can't start: {error.strerror}. Raise the limits of processes and "
            "memory (ulimit -u and -v)."
        ) from error


def _read_reply(replies: IO[bytes]) -> list[str | ValueError]:
    count, size = HEADER.unpack(_read(replies, HEADER.size))
    failed, lengths = _read(replies, count), array.array(LENGTHS)
    lengths.frombytes(_read(replies, lengths.itemsize * count))
    content = _read(replies, size).decode(*ENCODING)
    texts: list[str | ValueError] = []
    end = 0
    for is_error, length in zip(failed, lengths, strict=True):
        start, end = end, end + length
        texts.append(ValueError(content[start:end]) if is_error else content[start:end])
    return texts


def _read(replies: IO[bytes], size: int) -> bytes:
    found = replies.read(size)
    if len(found) < size:
        raise EOFError
    return found
