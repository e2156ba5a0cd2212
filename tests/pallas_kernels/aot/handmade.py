"""Writes small files in the formats that pallas_kernels.aot reads."""

import struct

from pallas_kernels.aot.protobuf import encode_bytes, encode_varint
from pallas_kernels.aot.riegeli import BLOCK, BLOCK_HEADER, SIGNATURE


def chunk(kind: str, data: bytes, count: int) -> bytes:
    """Makes a Riegeli chunk; the reader ignores hashes."""
    return struct.pack("<QQQQQ", 0, len(data), 0, ord(kind) | count << 8, 0) + data


def simple_chunk(records: list[bytes]) -> bytes:
    """Makes a chunk of uncompressed records."""
    sizes = b"".join(encode_varint(len(record)) for record in records)
    return chunk("r", b"\0" + encode_varint(len(sizes)) + sizes + b"".join(records), len(records))


def riegeli_file(*chunks: bytes) -> bytes:
    """Makes a file of these chunks, with a block header every 64 KiB."""
    data = chunk("s", b"", 0) + b"".join(chunks)
    step = BLOCK - BLOCK_HEADER
    return b"".join(SIGNATURE.ljust(BLOCK_HEADER, b"\0") + data[at : at + step] for at in range(0, len(data), step))


def integer_field(number: int, value: int) -> bytes:
    """Makes a message of one integer."""
    return encode_varint(number << 3) + encode_varint(value)


def split_proto(*parts: tuple[int, bytes]) -> bytes:
    """Makes a split proto of parts (number of the field whose value it is, or 0 to be merged; bytes)."""
    override = [encode_bytes(3, encode_bytes(1, integer_field(1, number))) for number, _ in parts]
    merged = encode_bytes(2, b"")
    places = [override[at] if number else merged for at, (number, _) in enumerate(parts)]
    manifest = encode_bytes(1, b"some.Type") + b"".join(encode_bytes(2, place) for place in places)
    return riegeli_file(simple_chunk([manifest, *(part for _, part in parts)]))


def elf(machine: int, body: bytes = b"") -> bytes:
    """Makes the start of an ELF image for a machine (190: CUDA, 62: x86-64)."""
    return (b"\x7fELF".ljust(18, b"\0") + machine.to_bytes(2, "little")).ljust(64, b"\0") + body
