"""Rows of comma-separated files, quoted as RFC 4180 has it, and of tab-separated ones, where a quote is a character."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Dialect(NamedTuple):
    """How a file's fields are told apart."""

    delimiter: str
    quoting: Any


# By the end of a name, .gz left out. Tab-separated files seldom quote: taking a lone quote for one would swallow rows.
DIALECTS = {".csv": Dialect(",", csv.QUOTE_MINIMAL), ".tsv": Dialect("\t", csv.QUOTE_NONE)}


def dialect_of(path: Path) -> Dialect | None:
    """The dialect that a file's name tells, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return DIALECTS.get(suffixes[-1]) if suffixes else None


def parse_columns(lines: Iterable[str], dialect: Dialect) -> Iterator[tuple[int, dict[str, str] | str]]:
    """(line that it begins on, row, or what is wrong with it) of each record behind the header. Blank lines are none.

    Raises:
      ValueError: no header, or one that names no column, or one twice.
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses a field of more than 128 KiB
    reader = csv.reader(lines, delimiter=dialect.delimiter, quoting=dialect.quoting, strict=True)
    records = _records(reader)
    _, header = next(records, (1, []))
    # pandas writes its index, and spreadsheets empty columns, without a name.
    named = [name or f"column {number} (without a name)" for number, name in enumerate(header, start=1)]
    if isinstance(header, str) or not any(header) or len(set(named)) < len(named):
        raise ValueError(
            f"the first line has to name the columns, each once; found {header!r}. Write the names there, and rename "
            "or delete what is there twice"
        )
    for line, fields in records:
        if isinstance(fields, str):
            yield line, fields
        elif len(fields) != len(named):
            yield line, f"{len(fields)} fields, where the header names {len(named)}: {', '.join(named)}"
        else:
            yield line, dict(zip(named, fields, strict=True))


def _records(reader: Any) -> Iterator[tuple[int, list[str] | str]]:
    """(first line, fields) of each record; a record that is broken ends the file."""
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"not {reader.dialect.delimiter!r}-separated: {error}"
            return
        if fields:
            yield line, fields
