"""Reads the sizes of column chunks from the footer of a Parquet file.

pyarrow knows them, too. But it ends the process when it is asked for a chunk whose size statistics contradict the
schema (https://github.com/apache/arrow/issues/45283).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_TRAILER = 8  # bytes: the footer's length and the format's letters
_DEPTH = 32  # structures inside of one another
BYTE_ARRAY, DELTA_BYTE_ARRAY = 6, 7  # a physical type; an encoding, in which values begin with earlier ones

# Types in Thrift's compact protocol (https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md).
_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = range(14)
_FIXED = {_TRUE: 0, _FALSE: 0, _BYTE: 1, _DOUBLE: 8, _UUID: 16}


class ColumnChunk(NamedTuple):
    """A column of a row group. Sizes are bytes, and page offsets count from the start of the file."""

    physical_type: int
    encodings: list[int]
    name: str
    values: int
    unpacked: int
    packed: int
    data_page: int
    dictionary_page: int | None


class RowGroup(NamedTuple):
    """The column chunks of consecutive rows."""

    columns: list[ColumnChunk]
    rows: int


def read_row_groups(path: Path) -> list[RowGroup]:
    """Returns the row groups of a file.

    Raises:
      ValueError: the footer is broken.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - _TRAILER, 0))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(size - _TRAILER - length, 0))
        return _Footer(file.read(length)).row_groups()


class _Footer:
    """Reads structures of the compact protocol; skips fields that nobody asks for."""

    def __init__(self, content: bytes):
        self._content, self._at = content, 0

    def row_groups(self) -> list[RowGroup]:
        """Reads FileMetaData."""
        try:
            return self._structure({4: (_LIST, lambda: self._list(_STRUCT, self._row_group))}).get(4, [])
        except IndexError:
            raise ValueError("its footer ends within a value") from None

    def _row_group(self) -> RowGroup:
        found = self._structure({1: (_LIST, lambda: self._list(_STRUCT, self._chunk)), 3: (_I64, self._integer)})
        return RowGroup(found.get(1, []), _required(found, 3))

    def _chunk(self) -> ColumnChunk:
        """Reads ColumnChunk, and the ColumnMetaData inside."""
        fields = {
            1: (_I32, self._integer),
            2: (_LIST, lambda: self._list(_I32, self._integer)),
            3: (_LIST, lambda: self._list(_BINARY, self._text)),
            **{number: (_I64, self._integer) for number in (5, 6, 7, 9, 11)},
        }
        found = _required(self._structure({3: (_STRUCT, lambda: self._structure(fields))}), 3)
        return ColumnChunk(
            physical_type=_required(found, 1),
            encodings=_required(found, 2),
            name=".".join(_required(found, 3)),
            values=_required(found, 5),
            unpacked=_required(found, 6),
            packed=_required(found, 7),
            data_page=_required(found, 9),
            dictionary_page=found.get(11),
        )

    def _structure(self, fields: Mapping[int, tuple[int, Callable[[], object]]]) -> dict[int, Any]:
        """Reads a structure; returns the values of `fields`, which have the type and the reader of each number."""
        number, found = 0, {}
        while (head := self._byte()) != _STOP:
            kind = head & 0x0F
            number = number + (head >> 4) if head >> 4 else self._integer()
            expected, read = fields.get(number, (None, None))
            if read is not None and kind == expected:
                found[number] = read()
            else:
                self._skip(kind, 0)
        return found

    def _list[T](self, kind: int, read: Callable[[], T]) -> list[T]:
        found, count = self._list_head()
        if count and found != kind:
            raise ValueError("its footer has a list of values of an unexpected type")
        return [read() for _ in range(count)]

    def _list_head(self) -> tuple[int, int]:
        head = self._byte()
        return head & 0x0F, head >> 4 if head >> 4 < 15 else self._unsigned()

    def _skip(self, kind: int, depth: int) -> None:
        if depth > _DEPTH:
            raise ValueError(f"its footer has more than {_DEPTH} structures inside of one another")
        if kind in _FIXED:
            self._advance(_FIXED[kind])
        elif kind in (_I16, _I32, _I64):
            self._unsigned()
        elif kind == _BINARY:
            self._advance(self._unsigned())
        elif kind in (_LIST, _SET):
            inner, count = self._list_head()
            self._skip_elements((inner,), count, depth)
        elif kind == _MAP:
            count = self._unsigned()
            kinds = self._byte() if count else 0
            self._skip_elements((kinds >> 4, kinds & 0x0F), count, depth)
        elif kind == _STRUCT:
            while (head := self._byte()) != _STOP:
                if not head >> 4:
                    self._unsigned()
                self._skip(head & 0x0F, depth + 1)
        else:
            raise ValueError(f"its footer has a value of the unknown type {kind}")

    def _skip_elements(self, kinds: Sequence[int], count: int, depth: int) -> None:
        for kind in (kind for _ in range(count) for kind in kinds):
            if kind in (_TRUE, _FALSE):  # a field's type is its value; an element has a byte
                self._byte()
            else:
                self._skip(kind, depth + 1)

    def _advance(self, size: int) -> None:
        self._at += size
        if self._at > len(self._content):  # otherwise a list of 2^60 bytes would be counted to its end
            raise IndexError

    def _text(self) -> str:
        length = self._unsigned()
        self._at += length
        return self._content[self._at - length : self._at].decode("utf-8", "replace")

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

    def _unsigned(self) -> int:
        """Reads an integer of seven bits per byte, lowest first, in at most 64 bits."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self._content[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & (1 << 64) - 1
        raise ValueError("its footer has an integer of more than 64 bits")

    def _byte(self) -> int:
        self._at += 1
        return self._content[self._at - 1]


def _required(found: Mapping[int, Any], number: int) -> Any:
    if number not in found:
        raise ValueError("its footer lacks the sizes of a column")
    return found[number]
