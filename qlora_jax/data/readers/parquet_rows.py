"""Reads rows of Parquet files with pyarrow, which is an optional dependency."""

from collections.abc import Iterator, Sequence
from pathlib import Path

MAGIC = b"PAR1"  # a file's first bytes
_BATCH = 1024  # rows in memory at once


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
        with parquet.ParquetFile(path) as file:
            _check_names(path, file.schema_arrow.names)
            for batch in file.iter_batches(_BATCH):
                yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: a text in the Parquet file is not UTF-8 ({error}). Write it as UTF-8.") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: truncated or corrupt Parquet file ({error}). Write or copy it again.") from error


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Raises ValueError if two columns have the same name: a row would contain only the last one."""
    twice = dict.fromkeys(name for name in names if names.count(name) > 1)
    if twice:
        raise ValueError(f"{path}: several columns are named {', '.join(map(repr, twice))}. Name each column once.")
