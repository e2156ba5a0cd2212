"""The pipes to and from another process, used so that neither process waits for the other forever.

A pipe holds little. A process that writes into a full one waits until the other reads, which may itself wait to write.
"""

import contextlib
import fcntl
import os
import select
import struct
import subprocess
from collections.abc import Mapping
from typing import Any, NamedTuple

_BLOCK = 64 << 10
_CAPACITY = 1 << 20  # bytes; the largest that Linux allows everybody


class Pipes:
    """The standard input and output of a process that was started with both as pipes."""

    def __init__(self, process: subprocess.Popen[bytes]):
        assert process.stdin is not None and process.stdout is not None
        self._files = process.stdin, process.stdout
        self._input, self._output = process.stdin.fileno(), process.stdout.fileno()
        self._received = bytearray()
        os.set_blocking(self._input, False)
        for pipe in (self._input, self._output):
            with contextlib.suppress(AttributeError, OSError):  # not Linux, or the user's pipes are large already
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _CAPACITY)

    def send(self, content: bytes) -> None:
        """Writes to the process, and stores what the process writes in the meantime.

        Raises:
          BrokenPipeError: the process ended.
        """
        left = memoryview(content)
        while left:
            with contextlib.suppress(BlockingIOError):
                left = left[os.write(self._input, left) :]
            if left:
                self._wait_for_space()

    def receive(self, size: int) -> bytes:
        """Returns the next bytes that the process writes.

        Raises:
          EOFError: the process ended before it wrote them all.
        """
        while len(self._received) < size:
            if not self._read():
                raise EOFError
        content = bytes(self._received[:size])
        del self._received[:size]
        return content

    def close(self) -> None:
        """Closes both pipes."""
        for file in self._files:
            with contextlib.suppress(BrokenPipeError):
                file.close()

    def _wait_for_space(self) -> None:
        """Waits until the process can read more, and reads what it writes until then."""
        poll = select.poll()
        poll.register(self._input, select.POLLOUT)
        poll.register(self._output, select.POLLIN)
        while self._input not in (ready := dict(poll.poll())):
            if ready and not self._read():
                return  # it ended: the next write says so

    def _read(self) -> int:
        """Reads the available bytes, or waits for some; returns 0 at the end."""
        found = os.read(self._output, _BLOCK)
        self._received += found
        return len(found)


# Limits on the rendering of chat templates, and the messages between template_process.py and template_worker.py.
#
# A request is a pickle of (template, variables, calls), where the calls are a pickle of groups: lists of lists with
# the fields of a Rendering each. A reply has a HEADER, a byte for each text (1 for an error), the texts' lengths as
# 64-bit integers, and the texts.

Message = Mapping[str, Any]  # a JSON object: `content` is text, but `tool_calls` is a list, and templates read more
Tool = Mapping[str, object]  # the JSON schema of a function that the model may call

HEADER = struct.Struct("<QQ")  # the number of texts, and their bytes
LENGTHS = "Q"  # type code of an array
ENCODING = "utf-8", "surrogatepass"  # halves of surrogate pairs are reported later, with their row
STRFTIME_NOW = "strftime_now"  # the function with which a template writes the date; a request has a date for it
MEMORY_REACHED, OUTPUT_REACHED = 3, 4  # exit statuses of the worker
OUTPUT_PER_INPUT = 4  # characters that may be written per byte of the conversations


class Limits(NamedTuple):
    """Limits on one rendering.

    Fields:
      seconds: processor time.
      memory: bytes of the worker, including Python itself.
      output: characters, in addition to the template's length and OUTPUT_PER_INPUT for each byte of the conversations.
    """

    seconds: float = 1.0
    memory: int = 768 << 20
    output: int = 64 << 10
