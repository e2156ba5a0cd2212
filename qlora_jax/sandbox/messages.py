"""Messages between the processes of the sandbox: a length of eight bytes, and as many bytes."""

import os
import struct

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
