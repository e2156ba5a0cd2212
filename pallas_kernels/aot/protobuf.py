"""Reads the wire format of protocol buffers without schemas: a message is its numbered fields.

Format: protobuf.dev/programming-guides/encoding. Only requested levels are parsed, so a message of megabytes costs no
more than its top level.
"""

from collections.abc import Iterator

Field = int | bytes
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIDTH = {_FIXED64: 8, _FIXED32: 4}


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Reads the variable-length integer at `at`; returns (value, the position after it).

    Raises:
      ValueError: the data ends inside the integer.
    """
    value = shift = 0
    for position in range(at, len(data)):
        byte = data[position]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position + 1
        shift += 7
    raise ValueError(f"the data ends inside a varint at byte {at} of {len(data)}")


def encode_varint(value: int) -> bytes:
    """Encodes value >= 0: the inverse of `varint`."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def encode_bytes(number: int, value: bytes) -> bytes:
    """Encodes a message with one field of bytes."""
    return encode_varint(number << 3 | _BYTES) + encode_varint(len(value)) + value


def fields(message: bytes) -> Iterator[tuple[int, Field]]:
    """Yields (number, value) of each field: an integer, or the bytes of a string, message or fixed-width number.

    Raises:
      ValueError: the bytes are not a message.
    """
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise ValueError(f"not a protobuf message: field 0 before byte {at}")
        if kind == _VARINT:
            value, at = varint(message, at)
        else:
            size, at = varint(message, at) if kind == _BYTES else (_WIDTH.get(kind), at)
            if size is None or at + size > len(message):
                raise ValueError(f"not a protobuf message: field {number} of wire type {kind} before byte {at}")
            value, at = message[at : at + size], at + size
        yield number, value


def integer(message: bytes, number: int) -> int:
    """Returns the last integer of this number, or 0, the value of an absent field."""
    return [0, *(value for found, value in fields(message) if found == number and isinstance(value, int))][-1]


def submessages(message: bytes, number: int) -> list[bytes]:
    """Returns all fields of bytes of this number."""
    return [value for found, value in fields(message) if found == number and isinstance(value, bytes)]


def submessage(message: bytes, number: int) -> bytes:
    """Joins the fields of bytes of this number, as protobuf merges the parts of a message."""
    return b"".join(submessages(message, number))
