"""The pipes to and from another process, used so that neither process waits for the other forever.

A pipe holds little. A process that writes into a full one waits until the other reads, which may itself wait to write.
"""

import contextlib
import fcntl
import os
import select
import subprocess

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
