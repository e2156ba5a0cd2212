"""A program with its tests, the limits on running it, the outcome, and how processes send these to each other."""

import os
import re
import struct
from typing import Literal, NamedTuple

Reason = Literal["passed", "wrong", "error", "time", "memory", "ended"]


class Program(NamedTuple):
    """A program to test.

    Fields:
      source: the program, which defines `entry_point`. It is run where it cannot see the tests.
      entry_point: name of the function that is tested.
      setup: trusted code that the tests may use.
      test: trusted code that defines `check(candidate)`, which raises if the function is wrong.
    """

    source: str
    entry_point: str
    setup: str
    test: str


class Limits(NamedTuple):
    """Limits on a program, and on its tests.

    Fields:
      seconds: processor time.
      memory: bytes of the process, including Python itself.
      waiting_seconds: time that may pass; several times the processor time, because other processes run too.
    """

    seconds: int = 3
    memory: int = 512 << 20
    waiting_seconds: int = 20


class ProgramOutcome(NamedTuple):
    """The result of testing a program.

    Fields:
      reason: "passed"; "wrong" (a test failed); "error" (an exception, or a value that is not plain); "time" or
        "memory" (a limit was reached); or "ended" (the process of the program ended before the tests did).
      detail: one line for people.
    """

    reason: Reason
    detail: str = ""

    @property
    def passed(self) -> bool:
        """True if every test passed."""
        return self.reason == "passed"


_LENGTH = struct.Struct("<Q")
LONGEST = 32 << 20  # bytes of a message from a program


def send(descriptor: int, content: bytes) -> None:
    """Writes a message."""
    left = memoryview(_LENGTH.pack(len(content)) + content)
    while left:
        left = left[os.write(descriptor, left) :]


def receive(descriptor: int, longest: int = LONGEST) -> bytes:
    """Reads a message, and nothing after it.

    Raises:
      EOFError: the other process ended.
      ValueError: the message is longer than `longest`.
    """
    (length,) = _LENGTH.unpack(_read(descriptor, _LENGTH.size))
    if length > longest:
        raise ValueError(f"a message of {length:,} bytes (expected at most {longest:,})")
    return _read(descriptor, length)


def _read(descriptor: int, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        piece = os.read(descriptor, min(size - len(found), 1 << 20))
        if not piece:
            raise EOFError
        found += piece
    return bytes(found)


# A function that continues a plain prompt ends before a line that begins so (Chen et al. 2021, and later harnesses).
NEXT_LINES = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```")
_CODE_BLOCK = re.compile(r"```[a-zA-Z0-9]*\n(.*?)(?:```|\Z)", re.DOTALL)


def source_of_continuation(prompt: str, reply: str) -> str:
    """Returns the program of a reply that continues the prompt, up to the first of NEXT_LINES."""
    ends = [at for line in NEXT_LINES if (at := reply.find(line)) >= 0]
    return prompt + reply[: min(ends, default=len(reply))]


def source_of_chat(prompt: str, reply: str, entry_point: str) -> str:
    """Returns the program of a reply in a chat: its first block of code that defines the function, after the prompt.

    A block without a definition continues the prompt, like a reply without a block.
    """
    defines = re.compile(rf"^\s*def\s+{re.escape(entry_point)}\b", re.MULTILINE)
    blocks = _CODE_BLOCK.findall(reply) or [reply]
    block = next((block for block in blocks if defines.search(block)), blocks[0])
    return f"{prompt}\n{block}" if defines.search(block) else source_of_continuation(prompt, block)
