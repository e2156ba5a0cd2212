"""Reads rows of Parquet files with pyarrow, which is an optional dependency."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qlora_jax.data.readers.gzip_file import MAX_RATIO, MAX_UNPACKED
from qlora_jax.data.readers.json_rows import MAX_ROW

# Reads the sizes of column chunks from the footer of a Parquet file.
#
# pyarrow knows them, too. But it ends the process when it is asked for a chunk whose size statistics contradict the
# schema (https://github.com/apache/arrow/issues/45283).

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


MAGIC = b"PAR1"  # a file's first bytes
_BATCH = 1024  # rows in memory at once, unless they may be large
_BATCH_BYTES = 128 << 20
_MAX_COLUMN = 1 << 30  # bytes of a column of lists that may be in memory at once
_INT32 = 0x15  # an integer in the next field of a structure, in Thrift's compact protocol


def parquet_rows(path: Path) -> Iterator[dict[str, object]]:
    """Yields the rows of a file, with one batch in memory at a time.

    Raises:
      ValueError: pyarrow is not installed, or the file is broken.
    """
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"{path}: Parquet files need pyarrow, which is not installed. Run pip install 'qlora-jax[parquet]', or "
            "write the file as JSON Lines."
        ) from None
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            groups = _row_groups(path)
            _check_sizes(path, groups, file.metadata.num_rows, len(file.schema))
            _check_names(path, file.schema_arrow.names)
            rows, repeating = _rows_per_batch(path, groups), _repeating_columns(path, groups, file.schema)
            read = 0
            for batch in _checked_batches(path, repeating, rows) if repeating else file.iter_batches(rows):
                read += batch.num_rows
                yield from batch.to_pylist()
            if read != file.metadata.num_rows:  # pyarrow does not notice
                raise _corrupt(path, f"it declares {file.metadata.num_rows:,} rows and has {read:,}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: a text in the Parquet file is not UTF-8 ({error}). Write it as UTF-8.") from error
    except MemoryError as error:
        raise ValueError(
            f"{path}: a row of the Parquet file needs more memory than there is. Split its lists into several rows."
        ) from error
    except (pyarrow.ArrowException, OSError) as error:
        raise _corrupt(path, error) from error


def _row_groups(path: Path) -> list[RowGroup]:
    try:
        return read_row_groups(path)
    except ValueError as error:
        raise _corrupt(path, error) from error


def _check_sizes(path: Path, groups: Sequence[RowGroup], rows: int, columns: int) -> None:
    """Raises ValueError if the file's declared sizes and its own do not go together."""
    if sum(group.rows for group in groups) != rows or any(group.rows < 0 for group in groups):
        raise _corrupt(path, f"it declares {rows:,} rows, but its parts do not add up to that")
    if any(len(group.columns) != columns for group in groups):
        raise _corrupt(path, f"it declares {columns:,} columns, but some of its parts have another number")
    size = path.stat().st_size
    for chunk in (chunk for group in groups for chunk in group.columns):
        start = min(chunk.data_page, chunk.dictionary_page or chunk.data_page)
        if start < len(MAGIC) or chunk.packed < 0 or chunk.unpacked < 0 or start + chunk.packed > size:
            raise _corrupt(path, f"the column {chunk.name} is not inside the file")
        if chunk.unpacked > max(MAX_UNPACKED, MAX_RATIO * chunk.packed):
            raise ValueError(
                f"{path}: the column {chunk.name} unpacks to more than {MAX_RATIO} times its size (found "
                f"{chunk.packed:,} and {chunk.unpacked:,} bytes). If you trust it, write the file without compression."
            )


def _rows_per_batch(path: Path, groups: Sequence[RowGroup]) -> int:
    """Returns the number of rows to decode at once. A value that the file has once may be in each of them."""
    with path.open("rb") as file:
        bytes_per_row = [_row_size(file, chunk, group.rows) for group in groups for chunk in group.columns]
    return max(1, min([_BATCH, *(_BATCH_BYTES // max(size, 1) for size in bytes_per_row)]))


def _row_size(file: BinaryIO, chunk: ColumnChunk, rows: int) -> int:
    """Returns a bound on the bytes of an average row of a column."""
    repeated = _largest_value(file, chunk) * -(-chunk.values // max(rows, 1))
    return repeated + chunk.unpacked // max(rows, 1)


def _repeating_columns(path: Path, groups: Sequence[RowGroup], schema: Any) -> list[str]:
    """Returns the text columns inside lists in which one row may exceed _MAX_COLUMN bytes by repeating a value.

    Args:
      schema: pyarrow.parquet.ParquetSchema, which has no types.
    """
    indices = [index for index in range(len(schema)) if schema.column(index).max_repetition_level]
    with path.open("rb") as file:
        chunks = ((group.columns[index], number) for index in indices for number, group in enumerate(groups))
        found = [chunk.name for chunk, number in chunks if _may_be_large(path, file, chunk, number)]
    return list(dict.fromkeys(found))


def _may_be_large(path: Path, file: BinaryIO, chunk: ColumnChunk, group: int) -> bool:
    """Returns True if a chunk of a column may have more than _MAX_COLUMN bytes."""
    if chunk.dictionary_page is None or DELTA_BYTE_ARRAY in chunk.encodings:  # pyarrow reads one of them at a time
        return False
    bound = _largest_value(file, chunk) * chunk.values  # as if one value filled the dictionary
    if bound <= _MAX_COLUMN:
        return False
    return _longest_in_dictionary(path, chunk.name, group) * chunk.values > _MAX_COLUMN


def _longest_in_dictionary(path: Path, name: str, group: int) -> int:
    """Returns the bytes of the longest value in a column's dictionary; a large number if its first row has no value."""
    from pyarrow import compute, parquet  # pyright: ignore[reportMissingImports]

    with parquet.ParquetFile(path, read_dictionary=[name], page_checksum_verification=True) as file:
        first = next(file.iter_batches(1, row_groups=[group], columns=[name]), None)
    leaves = [] if first is None else [leaf for leaf in _leaves(first.column(0)) if hasattr(leaf, "dictionary")]
    lengths = [compute.call_function("binary_length", [leaf.dictionary]).to_pylist() for leaf in leaves]
    return max((length for each in lengths for length in each), default=_MAX_COLUMN)


def _checked_batches(path: Path, columns: Sequence[str], rows: int) -> Iterator[Any]:
    """Yields rows (pyarrow.RecordBatch) in which a value is once in memory, however often the columns repeat it.

    Raises:
      ValueError: a row is longer than other files' rows may be.
    """
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    number = 0
    with parquet.ParquetFile(path, read_dictionary=list(columns), page_checksum_verification=True) as file:
        groups = range(file.metadata.num_row_groups)  # each has its own dictionaries, which pyarrow does not merge
        for batch in (batch for group in groups for batch in file.iter_batches(rows, row_groups=[group])):
            for row in (batch.slice(index, 1) for index in range(batch.num_rows)):
                number += 1
                for name, values in zip(row.schema.names, row.columns, strict=True):
                    if (size := _decoded_size(values)) > MAX_ROW:
                        raise ValueError(
                            f"{path}:{number}: {name}: too long (found {size:,} bytes, expected at most {MAX_ROW:,}). "
                            "Split the row into several."
                        )
                yield row


def _leaves(array: Any) -> Iterator[Any]:
    """Yields the arrays inside of the lists, maps and structures of a pyarrow.Array."""
    from pyarrow import types  # pyright: ignore[reportMissingImports]

    kind = array.type
    if types.is_struct(kind):
        for inner in array.flatten():
            yield from _leaves(inner)
    elif types.is_map(kind):
        start, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
        for inner in (array.keys, array.items):
            yield from _leaves(inner.slice(start, end - start))
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        yield from _leaves(array.flatten())
    else:
        yield array


def _decoded_size(array: Any) -> int:
    """Returns the bytes of an array whose values from dictionaries are written out."""
    from pyarrow import compute  # pyright: ignore[reportMissingImports]

    size = 0
    for leaf in _leaves(array):
        if hasattr(leaf, "dictionary"):
            lengths = compute.call_function("binary_length", [leaf.dictionary])
            size += compute.call_function("sum", [lengths.cast("int64").take(leaf.indices)]).as_py() or 0
        else:
            size += leaf.nbytes
    return size


def _largest_value(file: BinaryIO, chunk: ColumnChunk) -> int:
    """Returns a bound on the bytes of a value that the column may repeat; 0 if there is none."""
    if chunk.physical_type != BYTE_ARRAY:
        return 0
    if DELTA_BYTE_ARRAY in chunk.encodings:  # a value may begin with the one before it
        return chunk.unpacked
    if chunk.dictionary_page is None:
        return 0
    file.seek(chunk.dictionary_page)
    return _unpacked_page_size(file.read(16), chunk.unpacked)


def _unpacked_page_size(header: bytes, otherwise: int) -> int:
    """Returns the second field of a page's header, or `otherwise` if the header has another form."""
    values, at = [], 0
    while len(values) < 2:
        if header[at : at + 1] != bytes([_INT32]):
            return otherwise
        value, shift, at = 0, 0, at + 1
        while header[at] & 0x80:
            value, shift, at = value | (header[at] & 0x7F) << shift, shift + 7, at + 1
        values.append((value | header[at] << shift) >> 1)  # zigzag; sizes are not negative
        at += 1
    return values[1]


def _corrupt(path: Path, problem: object) -> ValueError:
    return ValueError(f"{path}: truncated or corrupt Parquet file ({problem}). Write or copy it again.")


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Raises ValueError if two columns have the same name: a row would contain only the last one."""
    twice = dict.fromkeys(name for name in names if names.count(name) > 1)
    if twice:
        raise ValueError(f"{path}: several columns are named {', '.join(map(repr, twice))}. Name each column once.")
