"""Reads rows of Parquet files with pyarrow, which is an optional dependency."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from qlora_jax.data.readers.gzip_file import MAX_RATIO, MAX_UNPACKED
from qlora_jax.data.readers.json_rows import MAX_ROW
from qlora_jax.data.readers.parquet_footer import BYTE_ARRAY, DELTA_BYTE_ARRAY, ColumnChunk, RowGroup, read_row_groups

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
