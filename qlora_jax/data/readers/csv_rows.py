"""Reads rows of files with separated columns: .csv, quoted as in RFC 4180, and .tsv, where quotes are text."""

import csv
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from qlora_jax.data.readers.json_rows import BadValue


class Dialect(NamedTuple):
    """Delimiter and quoting of a file's fields.

    Fields:
      delimiter: None: the header decides (`separator`).
      quoting: one of csv.QUOTE_*.
    """

    delimiter: str | None
    quoting: Literal[0, 3]


# By the suffix of a name without .gz. Tab-separated files rarely quote, and a lone quote would swallow rows.
DIALECTS = {".csv": Dialect(None, csv.QUOTE_MINIMAL), ".tsv": Dialect("\t", csv.QUOTE_NONE)}


def dialect_of(path: Path) -> Dialect | None:
    """Returns the dialect for the suffix of a file's name, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return DIALECTS.get(suffixes[-1]) if suffixes else None


def parse_columns(lines: Iterable[str], dialect: Dialect) -> Iterator[tuple[int, dict[str, str] | BadValue]]:
    """Yields (first line, row or problem) of each record after the header. Blank lines are skipped.

    Raises:
      ValueError: the header is missing, names no column, or names a column twice.
    """
    first, lines = _with_header(lines)
    records = _records(lines, dialect.delimiter or separator(first), dialect.quoting)
    _, header = next(records, (1, []))
    # pandas writes its index without a name, and spreadsheets empty columns.
    names, found = ([], header.problem) if isinstance(header, BadValue) else (header, repr(header))
    named = [name or f"column {number} (without a name)" for number, name in enumerate(names, start=1)]
    if not any(names) or len(set(named)) < len(named):
        raise ValueError(
            f"the first line has to name each column once (found {found}). Write the names there, and rename or "
            "delete repeated columns."
        )
    for line, fields in records:
        if isinstance(fields, BadValue):
            yield line, fields
        elif len(fields) != len(named):
            problem = f"found {len(fields)} fields, expected the header's {len(named)}: {', '.join(named)}"
            yield line, BadValue(problem)
        else:
            yield line, dict(zip(named, fields, strict=True))


def separator(header: str) -> str:
    """Returns the delimiter of a header: a comma outside quotes if it has one, else a semicolon, tab or bar.

    Spreadsheets write semicolons where the comma is the decimal sign.
    """
    names = re.sub(r'"[^"]*"', "", header)
    return next((delimiter for delimiter in ",;\t|" if delimiter in names), ",")


def _with_header(lines: Iterable[str]) -> tuple[str, Iterator[str]]:
    """Returns the first line that is not blank, and all lines."""
    rest = iter(lines)
    for blank, line in enumerate(rest):
        if line.strip("\r\n"):
            return line, itertools.chain(itertools.repeat("\n", blank), [line], rest)
    return "", rest


def _records(
    lines: Iterable[str], delimiter: str, quoting: Literal[0, 3]
) -> Iterator[tuple[int, list[str] | BadValue]]:
    """Yields (first line, fields or problem) of each record. A broken record ends the file."""
    csv.field_size_limit(2**31 - 1)  # the default limit is 128 KiB per field
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, BadValue(f"not {delimiter!r}-separated: {error}", ends_file=True)
            return
        if fields:
            yield line, fields
