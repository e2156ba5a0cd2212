"""Rows of Parquet files, through pyarrow, which is an extra."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MAGIC = b"PAR1"  # a file's first bytes
_BATCH = 1024  # rows in memory at once


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, a batch in memory at a time.

    Raises:
      ValueError: pyarrow is not installed, or the file is broken.
    """
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"{path}: a Parquet file, which pyarrow reads, and it is not installed: pip install 'qlora-jax[parquet]'; "
            "or write it as JSON Lines"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            _check_names(path, file.schema_arrow.names)
            for batch in file.iter_batches(_BATCH):
                yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: a text in the Parquet file is not UTF-8: {error}") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: the Parquet file is truncated or corrupt: {error}") from error


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Raises ValueError where two columns have one name: a row would keep the last alone."""
    twice = dict.fromkeys(name for name in names if names.count(name) > 1)
    if twice:
        raise ValueError(f"{path}: has several columns named {', '.join(map(repr, twice))}; name each once")
