"""Reads rows of files with separated columns: .csv, quoted as in RFC 4180, and .tsv, where quotes are text."""

import csv
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from qlora_jax.data.readers.json_rows import MAX_ROW, TOO_LONG, BadValue, limited_lines


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


def parse_columns(file: io.TextIOBase, dialect: Dialect) -> Iterator[tuple[int, dict[str, str] | BadValue]]:
    """Yields (first line, row or problem) of each record after the header. Blank lines are skipped.

    Raises:
      ValueError: the header is missing, names no column, or names a column twice.
    """
    lines = _RecordLines(file)
    first, rest = _with_header(lines)
    records = _records(lines, rest, dialect.delimiter or separator(first), dialect.quoting)
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

    Spreadsheets write semicolons where the comma is the decimal sign, and may name the delimiter in a line before the
    header, which is then the argument.
    """
    if named := _DELIMITER_LINE.fullmatch(header):
        return named[1]
    names = re.sub(r'"[^"]*"', "", header)
    return next((delimiter for delimiter in ",;\t|" if delimiter in names), ",")


# Excel's line for the delimiter of the lines below it, such as `sep=;`, which is not a header.
_DELIMITER_LINE = re.compile(r'"?sep=([^\w"\r\n])"?[\r\n]*', re.IGNORECASE)


class _RecordLines:
    """Iterates over the lines of a file, and raises _TooLongError after MAX_ROW characters of one record.

    Attributes:
      size: characters of the record so far.
    """

    def __init__(self, file: io.TextIOBase):
        self._lines, self.size = limited_lines(file), 0

    def __iter__(self) -> "_RecordLines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.size += len(line)
        if self.size > MAX_ROW:
            raise _TooLongError
        return line


class _TooLongError(Exception):
    """A record is longer than MAX_ROW characters."""


def _with_header(lines: _RecordLines) -> tuple[str, Iterator[str]]:
    """Returns the first line that is not blank, and all lines, with a blank one in place of `sep=;`."""
    try:
        for blank, line in enumerate(lines):
            if line.strip("\r\n"):
                header = "\n" if _DELIMITER_LINE.fullmatch(line) else line
                return line, itertools.chain(itertools.repeat("\n", blank), [header], lines)
    except _TooLongError:
        raise ValueError(f"the first line is {TOO_LONG}.") from None
    return "", lines


def _records(
    lines: _RecordLines, rest: Iterator[str], delimiter: str, quoting: Literal[0, 3]
) -> Iterator[tuple[int, list[str] | BadValue]]:
    """Yields (first line, fields or problem) of each record of `rest`. A broken record ends the file."""
    csv.field_size_limit(MAX_ROW)  # the default limit is 128 KiB per field
    reader = csv.reader(rest, delimiter=delimiter, quoting=quoting, strict=True)
    while True:
        line, lines.size = reader.line_num + 1, 0
        try:
            fields = next(reader)
        except StopIteration:
            return
        except _TooLongError:
            yield line, BadValue(TOO_LONG, ends_file=True)
            return
        except csv.Error as error:
            yield line, BadValue(f"not {delimiter!r}-separated: {error}", ends_file=True)
            return
        if fields:
            yield line, fields
