"""Reads rows of Parquet files with pyarrow, which is an optional dependency."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from qlora_jax.data.readers.gzip_file import MAX_RATIO, MAX_UNPACKED

MAGIC = b"PAR1"  # a file's first bytes
_BATCH = 1024  # rows in memory at once, unless they may be large
_BATCH_BYTES = 128 << 20
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
            _check_sizes(path, file.metadata)
            _check_names(path, file.schema_arrow.names)
            for batch in file.iter_batches(_rows_per_batch(path, file.metadata)):
                yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: a text in the Parquet file is not UTF-8 ({error}). Write it as UTF-8.") from error
    except MemoryError as error:
        raise ValueError(
            f"{path}: a row of the Parquet file needs more memory than there is. Split its lists into several rows."
        ) from error
    except (pyarrow.ArrowException, OSError) as error:
        raise _corrupt(path, error) from error


def _check_sizes(path: Path, metadata: Any) -> None:
    """Raises ValueError if the file's declared sizes and its own do not go together.

    Args:
      metadata: pyarrow.parquet.FileMetaData, which has no types.
    """
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    if sum(group.num_rows for group in groups) != metadata.num_rows or any(group.num_rows < 0 for group in groups):
        raise _corrupt(path, f"it declares {metadata.num_rows:,} rows, and other numbers for its parts")
    size = path.stat().st_size
    for column in (group.column(index) for group in groups for index in range(group.num_columns)):
        packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
        start = min(column.data_page_offset, column.dictionary_page_offset or column.data_page_offset)
        if start < len(MAGIC) or packed < 0 or unpacked < 0 or start + packed > size:
            raise _corrupt(path, f"the column {column.path_in_schema} is not inside the file")
        if unpacked > max(MAX_UNPACKED, MAX_RATIO * packed):
            raise ValueError(
                f"{path}: the column {column.path_in_schema} unpacks to more than {MAX_RATIO} times its size (found "
                f"{packed:,} and {unpacked:,} bytes). If you trust it, write the file without compression."
            )


def _rows_per_batch(path: Path, metadata: Any) -> int:
    """Returns the number of rows to decode at once. A value that the file has once may be in each of them."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    with path.open("rb") as file:
        bytes_per_row = [
            _largest_value(file, group.column(index)) * -(-group.column(index).num_values // max(group.num_rows, 1))
            for group in groups
            for index in range(group.num_columns)
        ]
    return max(1, min([_BATCH, *(_BATCH_BYTES // max(size, 1) for size in bytes_per_row)]))


def _largest_value(file: BinaryIO, column: Any) -> int:
    """Returns a bound on the bytes of a value that the column (ColumnChunkMetaData) may repeat; 0 if there is none."""
    if column.physical_type != "BYTE_ARRAY":
        return 0
    if "DELTA_BYTE_ARRAY" in column.encodings:  # a value may begin with the one before it
        return column.total_uncompressed_size
    if not column.has_dictionary_page:
        return 0
    file.seek(column.dictionary_page_offset)
    return _unpacked_page_size(file.read(16), column.total_uncompressed_size)


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
