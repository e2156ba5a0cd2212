"""Parses the header of a GGUF file: metadata and tensor table. The file is untrusted; every length is checked.

The reader of the `gguf` package is not used: it slices past the end of a truncated file without an error, and builds an
array object for every token of the vocabulary (1.4 s and 150 MB for SmolLM2, compared with 0.1 s here).
"""

import collections
import dataclasses
import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4  # the limit of ggml
# Limits on metadata, several times those of the largest published models, so that a small file cannot fill the memory.
MAX_TENSORS = MAX_KEYS = 1 << 16
MAX_ELEMENTS = 1 << 22  # in all arrays of the metadata together; Gemma 3 has 1.3 million
MAX_HEADER_BYTES = 1 << 28
MAX_NAME_BYTES = 1 << 16  # longest key or tensor name; the format's limit
# The shortest possible row of the tensor table (a name of no letter, one axis), and the shortest metadata key.
MIN_BYTES = {"tensors": 8 + 4 + 8 + 4 + 8, "metadata keys": 8 + 4 + 1}

Metadata = Mapping[str, Any]  # str, int, float, bool or a list of these; config_reader checks the types
VALUE_TYPES = {kind.value: kind for kind in GGUFValueType}
TENSOR_TYPES = {kind.value: kind for kind in GGMLQuantizationType}
SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One row of the tensor table.

    Attributes:
      shape: slowest axis first, which is NumPy's order.
      offset: bytes from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GgufHeader:
    """Metadata as Python values (an f32 as its shortest decimal), and the tensor table."""

    metadata: Metadata
    tensors: list[TensorInfo]


def parse_header(path: Path) -> GgufHeader:
    """Parses the header of a little-endian GGUF file of version 2 or 3.

    Raises:
      ValueError: it is not a GGUF file, or it is truncated or corrupt; names the file and the byte offset.
    """
    if path.stat().st_size < len(MAGIC):
        raise ValueError(f"{path}: not a GGUF file ({path.stat().st_size} bytes). Download it again.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(path, data)
        magic = cursor.take(4, "the magic number")
        if magic != MAGIC:
            raise ValueError(f"{cursor.path}: not a GGUF file (starts with {magic!r}, expected {MAGIC!r})")
        version = cursor.number("<I", "the version")
        if version not in VERSIONS:
            kind = "big-endian" if version & 0xFFFF == 0 and version else f"version {version}"
            raise ValueError(
                f"{cursor.path}: not a supported GGUF file (found {kind}, expected little-endian, versions {VERSIONS})"
            )
        tensor_count, key_count = cursor.count("tensors", MAX_TENSORS), cursor.count("metadata keys", MAX_KEYS)
        metadata = _unique(path, [_read_key(cursor) for _ in range(key_count)])
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"{path}: corrupt: general.alignment is {alignment!r}, expected a power of two")
        rows = [_read_tensor_row(cursor) for _ in range(tensor_count)]
        start = -(-cursor.position // alignment) * alignment
        tensors = [_tensor_info(cursor, row, start, alignment) for row in rows]
        _check_order(path, tensors, start, alignment)
    return GgufHeader(metadata=metadata, tensors=list(_unique(path, [(info.name, info) for info in tensors]).values()))


def _check_order(path: Path, tensors: Sequence[TensorInfo], start: int, alignment: int) -> None:
    """Checks that each tensor begins where the one before it ends, as ggml does; none overlap then."""
    expected = start
    for info in tensors:
        if info.offset != expected:
            raise ValueError(
                f"{path}: corrupt: tensor {info.name!r} is stored at byte {info.offset}, expected {expected}, where "
                "the tensor before it ends. Download it again."
            )
        expected = -(-(expected + info.nbytes) // alignment) * alignment


def _unique[Value](path: Path, items: list[tuple[str, Value]]) -> dict[str, Value]:
    """A dict of the items, whose names must differ."""
    repeated = sorted(name for name, count in collections.Counter(name for name, _ in items).items() if count > 1)
    if repeated:
        raise ValueError(f"{path}: corrupt: names occur more than once: {', '.join(repeated)}. Download it again.")
    return dict(items)


class _Cursor:
    """Reads the mapped file from its position on, and raises ValueError past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position, self.elements = path, data, 0, 0
        self.end = min(len(data), MAX_HEADER_BYTES)

    def take(self, count: int, what: str) -> bytes:
        begin, end = self.position, self.position + count
        if end > self.end:
            limit = "the file" if self.end == len(self.data) else "the largest header that is read"
            raise ValueError(
                f"{self.path}: truncated or corrupt: {what} at byte {begin} requires {count} bytes, but {limit} ends "
                f"at byte {self.end}. Download it again."
            )
        self.position = end
        return self.data[begin:end]

    def count(self, what: str, limit: int) -> int:
        """Reads a number of rows, which must fit into the rest of the file."""
        begin, count = self.position, self.number("<Q", f"the number of {what}")
        possible = (len(self.data) - self.position) // MIN_BYTES[what]
        if count > min(limit, possible):
            size = f" in a file of {len(self.data):,} bytes" if possible < limit else ""
            raise self.corrupt(begin, f"the number of {what} is {count}, expected at most {min(limit, possible)}{size}")
        return count

    def add_elements(self, count: int, key: str) -> None:
        """Counts the elements of an array before they are read."""
        self.elements += count
        if self.elements > MAX_ELEMENTS:
            raise self.corrupt(
                self.position, f"{key} has {count} elements, and metadata may have {MAX_ELEMENTS} in all arrays"
            )

    def number(self, form: Literal["<I", "<Q"], what: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def name(self, what: str) -> str:
        begin, name = self.position, self.text(what)
        if len(name) > MAX_NAME_BYTES:
            raise self.corrupt(begin, f"{what} has {len(name)} characters, expected at most {MAX_NAME_BYTES}")
        return name

    def text(self, what: str) -> str:
        begin, raw = self.position, self.take(self.number("<Q", f"the length of {what}"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.corrupt(begin, f"{what} is not UTF-8 text ({error.reason})") from None

    def corrupt(self, position: int, problem: str) -> ValueError:
        return ValueError(f"{self.path}: corrupt: byte {position}: {problem}. Download it again.")


def _read_key(cursor: _Cursor) -> tuple[str, object]:
    key = cursor.name("a metadata key")
    return key, _read_value(cursor, _value_type(cursor, key), key)


def _value_type(cursor: _Cursor, key: str) -> GGUFValueType:
    position, number = cursor.position, cursor.number("<I", f"the type of {key}")
    if number not in VALUE_TYPES:
        raise cursor.corrupt(position, f"unknown type {number} of metadata key {key!r}")
    return VALUE_TYPES[number]


def _read_value(cursor: _Cursor, kind: GGUFValueType, key: str) -> object:
    if kind == GGUFValueType.STRING:
        return cursor.text(key)
    if kind != GGUFValueType.ARRAY:
        return _numbers(cursor, kind, 1, key)[0]
    item_kind = _value_type(cursor, key)
    count = cursor.number("<Q", f"the length of {key}")
    if item_kind == GGUFValueType.ARRAY:
        raise cursor.corrupt(cursor.position, f"metadata key {key!r} is an array of arrays, which is not supported")
    cursor.add_elements(count, key)
    if item_kind == GGUFValueType.STRING:
        return [cursor.text(key) for _ in range(count)]
    return _numbers(cursor, item_kind, count, key)


def _numbers(cursor: _Cursor, kind: GGUFValueType, count: int, key: str) -> list[int | float | bool]:
    dtype = np.dtype(SCALARS[kind])
    values = np.frombuffer(cursor.take(count * dtype.itemsize, key), dtype)
    if kind == GGUFValueType.FLOAT32:
        return [float(str(value)) for value in values]  # 1e-05, where float(value) is 9.999999747378752e-06
    return values.tolist()


Row = tuple[str, tuple[int, ...], GGMLQuantizationType, int]  # name, shape, type, offset from the start of the data


def _read_tensor_row(cursor: _Cursor) -> Row:
    name = cursor.name("a tensor's name")
    position, dims = cursor.position, cursor.number("<I", f"the number of axes of {name}")
    if not 1 <= dims <= MAX_DIMS:
        raise cursor.corrupt(position, f"tensor {name!r} has {dims} axes, expected 1 to {MAX_DIMS}")
    shape = tuple(reversed([cursor.number("<Q", f"the shape of {name}") for _ in range(dims)]))
    position, number = cursor.position, cursor.number("<I", f"the type of {name}")
    if number not in TENSOR_TYPES:
        raise cursor.corrupt(position, f"tensor {name!r} has the unknown type {number}")
    return name, shape, TENSOR_TYPES[number], cursor.number("<Q", f"the offset of {name}")


def _tensor_info(cursor: _Cursor, row: Row, start: int, alignment: int) -> TensorInfo:
    """The checked row with its offset from the start of the file, where the data begins at `start`."""
    name, shape, kind, offset = row
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if offset % alignment or shape[-1] % block or 0 in shape:
        raise ValueError(
            f"{cursor.path}: corrupt: tensor {name!r}, {kind.name} {list(shape)}, at offset {offset}: expected axes "
            f"above 0, rows of whole blocks of {block} and an offset that is a multiple of {alignment}"
        )
    nbytes = math.prod(shape) // block * block_bytes
    if start + offset + nbytes > len(cursor.data):
        begin, end = start + offset, start + offset + nbytes
        raise ValueError(
            f"{cursor.path}: truncated: tensor {name!r} is stored in bytes {begin} to {end}, but the file ends at byte "
            f"{len(cursor.data)}. Download it again."
        )
    return TensorInfo(name=name, shape=shape, type=kind, offset=start + offset, nbytes=nbytes)
