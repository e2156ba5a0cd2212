"""Starts the process that renders chat templates (template_worker.py), and starts it again after it has ended."""

import array
import atexit
import collections
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping

from qlora_jax.data.tokenizer.template_pipe import (
    ENCODING,
    HEADER,
    LENGTHS,
    MEMORY_REACHED,
    OUTPUT_REACHED,
    Limits,
    Pipes,
)
from qlora_jax.sandbox.limits import python_environment

WORKER = "qlora_jax.data.tokenizer.template_worker"


class ProcessEnded(Exception):
    """The process ended while it rendered.

    Attributes:
      by_template: True if the template ended it, and would do so again.
    """

    def __init__(self, reason: str, *, by_template: bool):
        super().__init__(reason)
        self.by_template = by_template


class Request:
    """Conversations that were sent to the process, and its reply once it has arrived."""

    def __init__(self, content: bytes):
        self.content = content
        self.reply: list[str | ValueError] | ProcessEnded | None = None


class TemplateProcess:
    """Renders chat templates in one process, which starts when it is first used.

    It works on the oldest request while the caller prepares others. Threads take turns.
    """

    def __init__(self, limits: Limits):
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipes: Pipes | None = None
        self._waiting: collections.deque[Request] = collections.deque()  # the process answers in this order
        self._started_by = 0  # a process id: after a fork, the child must not use the pipes
        atexit.register(self.stop)

    def start(self) -> None:
        """Starts the process, if it does not run; it is ready some time later."""
        with self._lock:
            self._start()

    def submit(self, template: str, variables: Mapping[str, object], calls: bytes) -> Request:
        """Sends conversations, and does not wait for their texts; see template_pipe.py for the calls."""
        request = Request(pickle.dumps((template, dict(variables), calls)))
        with self._lock:
            self._start()
            self._waiting.append(request)
            self._send(request)
        return request

    def wait(self, request: Request) -> list[str | ValueError]:
        """Returns the text of each call, or its error.

        Raises:
          ProcessEnded: the process ended during one of the calls, for example because it reached a limit.
        """
        with self._lock:
            while request.reply is None:
                self._receive()
        if isinstance(request.reply, ProcessEnded):
            raise request.reply
        return request.reply

    def stop(self) -> None:
        """Ends the process, if it runs. The next one gets the requests that it has not answered."""
        process, self._process = self._process, None
        pipes, self._pipes = self._pipes, None
        if process is None or pipes is None or self._started_by != os.getpid():
            return
        process.kill()
        process.wait()
        pipes.close()

    def _start(self) -> None:
        """Starts the process if it does not run, and sends it the requests without a reply."""
        if self._started_by != os.getpid():
            self._process = self._pipes = None
        if self._process is not None and not self._waiting and self._process.poll() is not None:
            self.stop()  # somebody killed it
        if self._process is None:
            self._process, self._started_by = _start_process(self._limits), os.getpid()
            self._pipes = Pipes(self._process)
            for request in [*self._waiting]:
                self._send(request)

    def _send(self, request: Request) -> None:
        assert self._pipes is not None
        try:
            self._pipes.send(request.content)
        except BrokenPipeError:
            pass  # the end of its replies says why
        except BaseException:  # an interrupt: a part of the request was sent
            self.stop()
            raise

    def _receive(self) -> None:
        """Waits for the reply to the oldest request."""
        self._start()
        assert self._process is not None and self._pipes is not None
        try:
            reply = _read_reply(self._pipes)
        except EOFError:
            status = self._process.wait()
            self.stop()
            reply = self._ended(status)
        except BaseException:  # an interrupt: a part of the reply was read
            self.stop()
            raise
        self._waiting.popleft().reply = reply

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


def _start_process(limits: Limits) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER, *map(str, limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=python_environment(),
            process_group=0,  # Ctrl-C is for this process, which waits for the text
        )
    except OSError as error:
        raise ValueError(
            f"the process that renders chat templates can't start: {error.strerror}. Raise the limits of processes and "
            "memory (ulimit -u and -v)."
        ) from error


def _read_reply(replies: Pipes) -> list[str | ValueError]:
    count, size = HEADER.unpack(replies.receive(HEADER.size))
    failed, lengths = replies.receive(count), array.array(LENGTHS)
    lengths.frombytes(replies.receive(lengths.itemsize * count))
    content = replies.receive(size).decode(*ENCODING)
    texts: list[str | ValueError] = []
    end = 0
    for is_error, length in zip(failed, lengths, strict=True):
        start, end = end, end + length
        texts.append(ValueError(content[start:end]) if is_error else content[start:end])
    return texts
