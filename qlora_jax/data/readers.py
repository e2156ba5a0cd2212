"""Rows of JSON Lines, JSON, CSV or TSV files, gzipped or not, each with its line number for error messages."""

import difflib
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.data.delimited import Dialect, dialect_of, parse_columns

_SHOWN = 8
_SPACE = " \t\r\n"
_PARQUET = b"PAR1"  # its first bytes


class Place(NamedTuple):
    """Where a row stands: its line in the file (from 1), and its number among the rows (from 0)."""

    line: int
    number: int

    def __str__(self) -> str:
        # An array may hold many rows on one line.
        return f"{self.line}" if self.number + 1 == self.line else f"{self.line} (row {self.number + 1})"


class Row(NamedTuple):
    """One row of a file: where it stands, and its columns."""

    place: Place
    data: dict[str, Any]


Problem = tuple[Place, str]


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a .csv or .tsv file; else of a JSON Lines file or of one JSON array, whatever the name says.

    UTF-8, with or without a byte order mark; gzipped files are known by their first bytes. Blank lines are no rows.

    Raises:
      ValueError: no such file, a broken gzip file, bytes that are not UTF-8, lines that are not JSON objects (all of
        them, by line number), or no row at all.
    """
    path = Path(path)
    text, dialect = read_text(path), dialect_of(path)
    parse = _array if text.lstrip(_SPACE).startswith("[") else _lines
    parsed = parse(text) if dialect is None else _columns(path, text, dialect)
    found = [(Place(line, number), value) for number, (line, value) in enumerate(parsed)]
    if not found:
        expected = (
            "a line of column names and then rows" if dialect else "one JSON object a line, or one array of objects"
        )
        raise ValueError(f"{path}: holds no rows; expected {expected}")
    problems = [(place, _not_a_row(value)) for place, value in found if not isinstance(value, dict)]
    raise_problems(path, problems, len(found))
    return [Row(place, value) for place, value in found]


def _columns(path: Path, text: str, dialect: Dialect) -> Iterator[tuple[int, Any]]:
    try:
        for line, row in parse_columns(text, dialect):
            yield line, _Broken(row) if isinstance(row, str) else row
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, gzipped or not, without its byte order mark; ValueError where it can't be had."""
    path = Path(path)
    return _decode(path, _bytes(path))


def raise_problems(path: str | Path, problems: Sequence[Problem], total: int) -> None:
    """Raises one ValueError that tells how many rows are wrong and shows the first few by line; none: returns."""
    if not problems:
        return
    shown = "".join(f"\n  {path}:{place}: {problem}" for place, problem in problems[:_SHOWN])
    more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise ValueError(f"{path}: {len(problems)} of {total} rows can't be used:{shown}{more}")


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ValueError(f"{path}: no such file{hint}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: the gzip file is truncated or corrupt: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror}") from error


def _decode(path: Path, raw: bytes) -> str:
    if raw.startswith(_PARQUET):
        raise ValueError(
            f"{path}: a Parquet file, which is not read; write it as JSON Lines, for instance with "
            "pandas.read_parquet(...).to_json(..., orient='records', lines=True)"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: byte {error.start} is not UTF-8 ({raw[error.start : error.start + 4]!r}); "
            "convert the file, for instance with iconv -t UTF-8"
        ) from error


class _Broken(NamedTuple):
    """Stands for a row that is not JSON."""

    problem: str


def _not_a_row(value: Any) -> str:
    if isinstance(value, _Broken):
        return value.problem
    return f'expected an object such as {{"prompt": "..."}}, found {_shorten(json.dumps(value, ensure_ascii=False))}'


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of each line that is not blank."""
    # Only "\n" ends a line: splitlines() would also cut at characters that JSON allows inside strings.
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip(_SPACE):
            try:
                yield line, json.loads(content)
            except json.JSONDecodeError as error:
                yield line, _Broken(f"not JSON: {error.msg} at column {error.colno}: {_shorten(content)}")


def _array(text: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of each element; one by one, since json.loads would not tell their lines."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = _skip(text, text.index("[") + 1)
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
            yield line, value
            at = _next_element(text, _skip(text, at))
        except json.JSONDecodeError as error:
            yield error.lineno, _Broken(f"not JSON: {error.msg} at column {error.colno}; the array ends there")
            return
    rest = _skip(text, at + 1)
    if rest < len(text):
        found = _shorten(text[rest:])
        yield line + text.count("\n", counted, rest), _Broken(f"more text after the end of the array: {found}")


def _next_element(text: str, at: int) -> int:
    """Position of the next element after the comma at `at`, or of the closing bracket."""
    if text.startswith("]", at):
        return at
    if not text.startswith(",", at):
        raise json.JSONDecodeError("expected ',' or ']' after an element of the array", text, at)
    at = _skip(text, at + 1)
    if text.startswith("]", at):
        raise json.JSONDecodeError("expected a row after the comma", text, at)
    return at


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
