"""Reads the subset of the Riegeli record format in which XLA writes executables.

Format: google/riegeli, doc/riegeli_records_file_format.md. A file is a sequence of chunks, interrupted by a block
header every 64 KiB. A chunk of kind `r` has the sizes of its records, then the records, compressed separately.
"""

import importlib
import struct
from collections.abc import Iterator

from pallas_kernels.aot.protobuf import varint

SIGNATURE = bytes.fromhex("83af70d10d884a3f")  # the hash in the block header that opens every file
BLOCK, BLOCK_HEADER = 1 << 16, 24
CHUNK_HEADER = struct.Struct("<QQQQQ")  # hash, bytes of data, hash of data, kind and number of records, decoded bytes
CODECS = {  # Riegeli's letter -> (module of cramjam, its function)
    ord("s"): ("snappy", "decompress_raw"),
    ord("z"): ("zstd", "decompress"),
    ord("b"): ("brotli", "decompress"),
}
SIMPLE, NO_RECORDS = ord("r"), frozenset(b"smp")  # signature, metadata, padding


def records(file: bytes) -> Iterator[bytes]:
    """Yields the records of a file, in order.

    Raises:
      ValueError: not a Riegeli file, a truncated one, or an unsupported kind of chunk or compression.
    """
    if not file.startswith(SIGNATURE):
        raise ValueError(f"not a Riegeli file: it starts with {file[:8].hex()}, not {SIGNATURE.hex()}")
    chunks = b"".join(file[at + BLOCK_HEADER : at + BLOCK] for at in range(0, len(file), BLOCK))
    at = 0
    while at < len(chunks):
        if at + CHUNK_HEADER.size > len(chunks):
            raise ValueError(f"the Riegeli file ends inside a chunk header, at byte {at} of {len(chunks)}")
        _, size, _, kind_and_count, _ = CHUNK_HEADER.unpack_from(chunks, at)
        kind, count = kind_and_count & 255, kind_and_count >> 8
        start = at + CHUNK_HEADER.size
        # A chunk is at least as long as its number of records; padding that would lengthen it is not supported.
        if start + size > len(chunks) or count > CHUNK_HEADER.size + size:
            raise ValueError(f"the Riegeli file ends inside a chunk of {size} bytes and {count} records")
        if kind == SIMPLE:
            yield from _simple_chunk(chunks[start : start + size], count)
        elif kind not in NO_RECORDS:
            raise ValueError(f"a Riegeli chunk of kind {chr(kind)!r} is not supported")
        at = start + size


def _simple_chunk(data: bytes, count: int) -> Iterator[bytes]:
    compression, (length, at) = data[0], varint(data, 1)
    sizes = _decompress(compression, data[at : at + length])
    values = _decompress(compression, data[at + length :])
    at = start = 0
    for _ in range(count):
        size, at = varint(sizes, at)
        yield values[start : start + size]
        start += size


def _decompress(compression: int, data: bytes) -> bytes:
    if compression == 0:
        return data
    if compression not in CODECS:
        raise ValueError(f"Riegeli's compression {chr(compression)!r} is not supported")
    module, function = CODECS[compression]
    codec = getattr(
        importlib.import_module("cramjam"), module
    )  # from the extra gpu-compile, which may not be installed
    _, at = varint(data, 0)  # the decompressed size comes first
    return bytes(getattr(codec, function)(data[at:]))
