"""Reads the rows of files in order, each with its line number for error messages.

The formats are JSON Lines, JSON, CSV and TSV, gzipped or not, Parquet, and data sets on a Hub.
"""

import codecs
import contextlib
import difflib
import gzip
import hashlib
import io
import itertools
import json
import re
import typing
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from qlora_jax.data.readers.csv_rows import dialect_of, parse_columns
from qlora_jax.data.readers.gzip_file import LimitedGzip
from qlora_jax.data.readers.hub_rows import HubRows, hub_rows
from qlora_jax.data.readers.json_rows import (
    MAX_ROW,
    SPACE,
    TOO_LONG,
    BadValue,
    json_array,
    json_lines,
    limited_lines,
    shorten,
)
from qlora_jax.data.readers.parquet_rows import MAGIC, parquet_rows
from qlora_jax.data.readers.reasoning_gym_rows import SCHEME as TASKS
from qlora_jax.data.readers.reasoning_gym_rows import reasoning_gym_rows
from qlora_jax.untrusted_json import JsonObject
from qlora_jax.verifiers.process import is_address, verifiers_rows

_SHOWN = 8
_TOKENS = re.compile(r"(?<=found )\d+(?= tokens)")
_GZIP = b"\x1f\x8b"
_PEEKED = 4096
_BLOCK = 1 << 20
_GZIP_BLOCK = 64 << 10  # the class for gzip is in Python, so few large reads are faster


class Place(NamedTuple):
    """Place of a row in a file: its line, from 1, and its number among the rows, from 0."""

    line: int
    number: int

    def __str__(self) -> str:
        # An array may have many rows on one line.
        return f"{self.line}" if self.number + 1 == self.line else f"{self.line} (row {self.number + 1})"


class Row(NamedTuple):
    """A row of a file: its place, and its columns by name."""

    place: Place
    data: JsonObject


class BrokenRow(NamedTuple):
    """A row that can't be read: its place, and the problem.

    Fields:
      ends_file: True if the rows after it can't be read either.
    """

    place: Place
    problem: str
    ends_file: bool = False


Problem = tuple[Place, str]


def read_rows(path: str | Path) -> list[Row]:
    """Returns all rows of a file or data set.

    Raises:
      ValueError: the errors of `stream_rows`, broken rows (all of them, by line number), or no row at all.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    for found in stream_rows(path):
        if isinstance(found, Row):
            rows.append(found)
        else:
            problems.append((found.place, found.problem))
    raise_problems(path, problems, len(rows) + len(problems))
    if not rows:
        raise ValueError(no_rows_message(path))
    return rows


def stream_rows(path: str | Path) -> Iterator[Row | BrokenRow]:
    """Yields the rows of a file, one by one. The whole file is never in memory.

    .csv and .tsv are detected by name, and Parquet, JSON Lines, a JSON array and gzip by content. Text is UTF-8, with
    or without a byte order mark. Blank lines are skipped. `hf://datasets/...` names a data set on a Hub (hub_rows.py),
    `reasoning_gym:...` a task of that package (reasoning_gym_rows.py), and `verifiers:...` an environment
    (verifiers/process.py).

    Raises:
      ValueError: the file does not exist, a broken gzip or Parquet file, or bytes that are not UTF-8.
    """
    for number, (line, value) in enumerate(_values(str(path))):
        place = Place(line, number)
        yield Row(place, value) if isinstance(value, dict) else _broken_row(place, value)


def no_rows_message(path: str | Path) -> str:
    """Returns the error message for a file without rows."""
    return f"{path}: found no rows, expected {_expected(Path(path))}"


def content_digest(path: str | Path) -> str:
    """Returns SHA-256 of the file's bytes, or of the rows that are not from a file.

    Raises:
      ValueError: it can't be read.
    """
    if (rows := _addressed(str(path))) is not None:
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()
    with _opened(Path(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: str | Path) -> str:
    """Returns the text of a UTF-8 file, gzipped or not, without its byte order mark.

    Raises:
      ValueError: the file can't be read or is not UTF-8.
    """
    with _text(Path(path)) as file:
        return file.read()


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yields (line, text) of each line of a UTF-8 file, gzipped or not.

    Raises:
      ValueError: the file can't be read or is not UTF-8, or a line is too long.
    """
    with _text(Path(path)) as file:
        for number, line in enumerate(limited_lines(file), start=1):
            if len(line) > MAX_ROW:
                raise ValueError(f"{path}:{number}: {TOO_LONG}.")
            yield number, line.removesuffix("\n")


def _addressed(name: str) -> Iterator[JsonObject] | None:
    """Returns the rows of a name that is an address; None for a file."""
    if name.startswith(TASKS):
        return reasoning_gym_rows(name)
    if is_address(name):
        return verifiers_rows(name)
    hub = HubRows.parse(name)
    return None if hub is None else hub_rows(hub)


def _expected(path: Path) -> str:
    if dialect_of(path):
        return "a line of column names and then rows"
    return "one JSON object per line, or one array of objects"


def _values(name: str) -> Iterator[tuple[int, object]]:
    """Yields (line, value) of each row."""
    if (rows := _addressed(name)) is not None:
        yield from enumerate(rows, start=1)
        return
    path = Path(name)
    if _begins(path) == MAGIC:
        yield from enumerate(parquet_rows(path), start=1)
        return
    with _text(path) as file:
        if dialect := dialect_of(path):
            yield from _columns(path, parse_columns(file, dialect))
        elif (first := _first(file)) != "[":
            _check_lines(path, first)
            _check_one_line(path, file)
            yield from json_lines(file)
        else:
            yield from json_array(file)


def _check_lines(path: Path, first: str) -> None:
    """Raises ValueError for prose. Otherwise, each of its lines would be reported as broken JSON."""
    if first not in ("", "{") and path.name.endswith((".txt", ".txt.gz")):
        raise ValueError(
            f"{path}: not a file of rows (found text that begins with {first!r}, expected one JSON object per line). "
            'Write rows such as {"text": "..."}; if the file has tab-separated columns, end its name in .tsv.'
        )


def _check_one_line(path: Path, file: io.TextIOWrapper) -> None:
    """Raises ValueError for an object over several lines, each of which would be reported as broken JSON."""
    first_line = file.read(_PEEKED).lstrip(SPACE).partition("\n")[0]
    file.seek(0)
    if first_line.strip(SPACE) == "{":
        raise ValueError(
            f"{path}: a JSON object over several lines (expected one JSON object per line, or one array of objects). "
            "Write each object on one line, for example with jq -c . FILE, or jq -c '.NAME[]' FILE if the rows are "
            "its list NAME."
        )


def _columns(path: Path, records: Iterator[tuple[int, object]]) -> Iterator[tuple[int, object]]:
    try:
        yield from records
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def raise_problems(path: str | Path, problems: Sequence[Problem], total: int, fix: str = "") -> None:
    """Raises one ValueError with the number of rows with problems, and the first few problems by line.

    Rows whose problems are equal, or differ in a number of tokens, share a line of the message. `fix` ends it. Without
    problems it returns.
    """
    if not problems:
        return
    alike: dict[str, list[Problem]] = {}
    for place, problem in problems:
        alike.setdefault(_TOKENS.sub("", problem), []).append((place, problem))
    first = [*alike.values()][:_SHOWN]
    shown = "".join(
        f"\n  {path}:{_first_places([place for place, _ in rows])}: {_with_range([problem for _, problem in rows])}"
        for rows in first
    )
    left = len(problems) - sum(map(len, first))
    more = f"\n  ... and {left} more" if left else ""
    raise ValueError(f"{path}: {len(problems)} of {total} rows can't be used:{shown}{more}{fix and f'\n{fix}'}")


def _with_range(problems: Sequence[str]) -> str:
    """Returns problems that only differ in a number of tokens as one, with the range of these numbers."""
    numbers = sorted({int(found) for problem in problems for found in _TOKENS.findall(problem)})
    return _TOKENS.sub(f"{numbers[0]} to {numbers[-1]}", problems[0]) if len(numbers) > 1 else problems[0]


def _first_places(places: Sequence[Place]) -> str:
    by_line = itertools.groupby(places[:_SHOWN], lambda place: place.line)
    shown = ", ".join(_of_line(line, [*found]) for line, found in by_line)
    return f"{shown} and {len(places) - _SHOWN} more rows" if len(places) > _SHOWN else shown


def _of_line(line: int, places: Sequence[Place]) -> str:
    """Returns the places on one line. An array may have many rows there."""
    numbers = ", ".join(str(place.number + 1) for place in places)
    return f"{line} (rows {numbers})" if len(places) > 1 else str(places[0])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """Opens the file. Raises ValueError if it can't be read, now or inside the `with` block."""
    try:
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file{suggest_source(path)}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: truncated or corrupt gzip file ({error}). Write or copy it again.") from error
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder, expected a file of rows. {_rows_of_folder(path)}") from None
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror}") from error


def _rows_of_folder(path: Path) -> str:
    """Returns how to get a file of rows from a folder."""
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():  # written by save_to_disk
        return "Write it as a file with datasets.load_from_disk(FOLDER).to_parquet(FILE)."
    return "Name a file in it; several take weights: {a.jsonl: 1, b.jsonl: 1}."


def _begins(path: Path) -> bytes:
    with _opened(path) as file:
        return file.read(len(MAGIC))


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[io.BufferedIOBase]:
    """Opens the file's bytes, decompressed if it is a gzip file."""
    with _opened(path) as file:
        zipped = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        if not zipped:
            yield file
            return
        with LimitedGzip(path, file) as inside:
            yield io.BufferedReader(typing.cast(io.RawIOBase, inside), _GZIP_BLOCK)


@contextlib.contextmanager
def _text(path: Path) -> Iterator[io.TextIOWrapper]:
    """Opens the file's text. Only "\\n" ends a line: strings of JSON and fields of CSV may contain other line ends."""
    try:
        with _unpacked(path) as file:
            yield io.TextIOWrapper(typing.cast(BinaryIO, file), encoding="utf-8-sig", newline="\n")
    except UnicodeDecodeError:
        raise ValueError(_not_utf8(path)) from None


def _not_utf8(path: Path) -> str:
    """Returns the error message with the line and position of the first bytes that are not UTF-8."""
    decoder, before, lines = codecs.getincrementaldecoder("utf-8")(), 0, 1
    with _unpacked(path) as file:
        block = b"."
        while block:
            block = file.read(_BLOCK)
            held = len(decoder.getstate()[0])  # bytes of a character that was cut off
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at, content = error.start, error.object
                return (
                    f"{path}:{lines + content.count(b'\n', 0, at)}: byte {before - held + at} is not UTF-8 "
                    f"({content[at : at + 4]!r}). Convert the file, for example with iconv -t UTF-8."
                )
            before, lines = before + len(block), lines + block.count(b"\n")
    return f"{path}: not UTF-8. Convert the file, for example with iconv -t UTF-8."


def _first(file: io.TextIOWrapper) -> str:
    """Returns the first character that is not white space, and rewinds the file."""
    first = ""
    while not first and (piece := file.read(_PEEKED)):
        first = piece.lstrip(SPACE)[:1]
    file.seek(0)
    return first


def _broken_row(place: Place, value: object) -> BrokenRow:
    if isinstance(value, BadValue):
        return BrokenRow(place, value.problem, value.ends_file)
    found = shorten(json.dumps(value, ensure_ascii=False))
    return BrokenRow(place, f'expected an object such as {{"prompt": "..."}}, found {found}')


def suggest_source(path: Path) -> str:
    """Returns the end of a message about a missing file: a file with a similar name, or how to write such a source."""
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    # The suffix is equal in most names, and half of a short name.
    if near := difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.85):
        return f". Did you mean {path.parent / near[0]}?"
    if str(path).startswith(("http:", "https:")):
        return ". Addresses are not fetched. Give a file, or hf://datasets/org/name for a data set on the Hub."
    if "," in str(path):
        return ". Give several files with weights: {a.jsonl: 1, b.jsonl: 1}."
    return "" if path.suffix else ". Give a data set on the Hub as hf://datasets/org/name."
