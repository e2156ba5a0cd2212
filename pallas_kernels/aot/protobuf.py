"""The wire format of protocol buffers, read without schemas: a message is its numbered fields.

Format: protobuf.dev/programming-guides/encoding. Only what is asked for is parsed, so that a message of megabytes
costs no more than its top level.
"""

from collections.abc import Iterator

Field = int | bytes
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIDTH = {_FIXED64: 8, _FIXED32: 4}


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, position behind it) of the variable-length integer at `at`.

    Raises:
      ValueError: the data ends inside of it.
    """
    value = shift = 0
    for position in range(at, len(data)):
        byte = data[position]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position + 1
        shift += 7
    raise ValueError(f"the data ends inside of a varint at byte {at} of {len(data)}")


def encode_varint(value: int) -> bytes:
    """The inverse of `varint`, for value >= 0."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def encode_bytes(number: int, value: bytes) -> bytes:
    """A message that holds one field of bytes."""
    return encode_varint(number << 3 | _BYTES) + encode_varint(len(value)) + value


def fields(message: bytes) -> Iterator[tuple[int, Field]]:
    """(number, value) of each field, in order: an integer, or the bytes of a string, message or fixed-width number.

    Raises:
      ValueError: these bytes are no message.
    """
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise ValueError(f"no protobuf message: field 0 before byte {at}")
        if kind == _VARINT:
            value, at = varint(message, at)
        else:
            size, at = varint(message, at) if kind == _BYTES else (_WIDTH.get(kind), at)
            if size is None or at + size > len(message):
                raise ValueError(f"no protobuf message: field {number} of wire type {kind} before byte {at}")
            value, at = message[at : at + size], at + size
        yield number, value


def integer(message: bytes, number: int) -> int:
    """The last integer of this number, or 0, which is how an absent field reads."""
    return [0, *(value for found, value in fields(message) if found == number and isinstance(value, int))][-1]


def submessages(message: bytes, number: int) -> list[bytes]:
    """All fields of bytes of this number."""
    return [value for found, value in fields(message) if found == number and isinstance(value, bytes)]


def submessage(message: bytes, number: int) -> bytes:
    """The fields of bytes of this number put together, as protobuf merges a message that comes in parts."""
    return b"".join(submessages(message, number))
