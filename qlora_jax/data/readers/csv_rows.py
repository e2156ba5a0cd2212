"""Reads rows of comma-separated files, quoted as in RFC 4180, and of tab-separated files, where quotes are text."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple


class Dialect(NamedTuple):
    """Delimiter and quoting of a file's fields.

    Fields:
      quoting: one of csv.QUOTE_*.
    """

    delimiter: str
    quoting: Literal[0, 3]


# By the suffix of a name without .gz. Tab-separated files rarely quote, and a lone quote would swallow rows.
DIALECTS = {".csv": Dialect(",", csv.QUOTE_MINIMAL), ".tsv": Dialect("\t", csv.QUOTE_NONE)}


def dialect_of(path: Path) -> Dialect | None:
    """Returns the dialect for the suffix of a file's name, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return DIALECTS.get(suffixes[-1]) if suffixes else None


def parse_columns(lines: Iterable[str], dialect: Dialect) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Yields (first line, row or problem) of each record after the header. Blank lines are skipped.

    Raises:
      ValueError: the header is missing, names no column, or names a column twice.
    """
    records = _records(lines, dialect)
    _, header = next(records, (1, []))
    # pandas writes its index without a name, and spreadsheets empty columns.
    named = [name or f"column {number} (without a name)" for number, name in enumerate(header, start=1)]
    if isinstance(header, str) or not any(header) or len(set(named)) < len(named):
        raise ValueError(
            f"the first line has to name each column once (found {header!r}). Write the names there, and rename or "
            "delete repeated columns."
        )
    for line, fields in records:
        if isinstance(fields, str):
            yield line, fields
        elif len(fields) != len(named):
            yield line, f"found {len(fields)} fields, expected the header's {len(named)}: {', '.join(named)}"
        else:
            yield line, dict(zip(named, fields, strict=True))


def _records(lines: Iterable[str], dialect: Dialect) -> Iterator[tuple[int, list[str] | str]]:
    """Yields (first line, fields or problem) of each record. A broken record ends the file."""
    csv.field_size_limit(2**31 - 1)  # the default limit is 128 KiB per field
    reader = csv.reader(lines, delimiter=dialect.delimiter, quoting=dialect.quoting, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"not {dialect.delimiter!r}-separated: {error}"
            return
        if fields:
            yield line, fields
