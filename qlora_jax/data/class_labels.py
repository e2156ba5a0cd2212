"""Reads the labels of rows, margins included, and finds the names of classes in training data."""

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from qlora_jax.config.objectives import ValueKind
from qlora_jax.config.schema import DataArgs
from qlora_jax.data.formats.columns import list_columns, rename_columns
from qlora_jax.data.formats.detect import detect_format
from qlora_jax.data.formats.registry import OPTIONAL_COLUMNS, optional_columns
from qlora_jax.data.formats.row_format import Columns
from qlora_jax.data.readers.files import (
    BrokenRow,
    Place,
    Problem,
    Row,
    no_rows_message,
    raise_problems,
    stream_rows,
)
from qlora_jax.data.readers.json_rows import shorten
from qlora_jax.data.row_kinds import row_use

Values = Mapping[str, Sequence[float] | Sequence[Sequence[float]]]
ValueReader = Callable[[Columns], Values]

MAX_CLASSES = 1000
FIRST_ROWS = 64  # rows whose columns determine the kind of a file without labels
# Files of text, such as CSV, have no other way to write true and false.
_TRUTH = {"1": 1.0, "0": 0.0, "true": 1.0, "false": 0.0}
# A whole number as a column of numbers with gaps has it in text.
_WHOLE = re.compile(r"(-?\d+)\.0+")
TRUTH_NAMES = ("undesirable", "desirable")


def value_reader(kind: ValueKind, labels: Sequence[str], *, label_columns: bool = False) -> ValueReader:
    """Returns a function that reads a row's values. It raises ValueError for a row whose label does not fit.

    Args:
      labels: names of the classes, in order.
      label_columns: True if each class is a column, and False if the column `label` has their names.
    """
    indices = {_spelling(name): index for index, name in enumerate(labels)}
    readers: dict[ValueKind, ValueReader] = {
        "none": lambda row: {},
        "desirable": lambda row: {"labels": [_truth("label", row["label"])]},
        "margin": lambda row: {"margins": [_margin(row.get("margin"))] * 2},
        "class": lambda row: {"labels": [float(_index(label_name(row["label"]), indices))]},
        "classes": lambda row: {
            "labels": [_column_marks(row, labels) if label_columns else _listed_marks(row, indices)]
        },
        "number": lambda row: {"labels": [_number("label", row["label"])]},
    }
    return readers[kind]


def label_text(kind: ValueKind, values: Mapping[str, np.ndarray], labels: Sequence[str]) -> str:
    """Returns the label of a row's first sequence as a person writes it; empty if the kind has none.

    Args:
      values: the row's values by name, [sequences] or [sequences, C].
      labels: names of the classes, in order.
    """
    writers: dict[ValueKind, Callable[[np.ndarray], str]] = {
        "desirable": lambda value: TRUTH_NAMES[int(value)],
        "class": lambda value: labels[int(value)],
        "classes": lambda value: ", ".join(itertools.compress(labels, value)) or "none",
        "number": lambda value: f"{value:g}",
    }
    return writers[kind](values["labels"][0]) if kind in writers else ""


def _label_names(kind: ValueKind, row: Columns) -> list[str]:
    """Returns the names of a row's labels; raises ValueError if its label is not a name."""
    return [label_name(row["label"])] if kind == "class" else _listed(row["label"])


def find_labels(data: DataArgs, objective: str) -> tuple[str, ...]:
    """Returns the names of the classes in the training data: numbers by value, other names by code point.

    Rows that cannot be read are skipped; preparing them reports them.

    Raises:
      ValueError: there are too few classes, or too many; or the rows are of another objective.
    """
    kind = row_use(objective).values
    if kind not in ("class", "classes"):
        return ()
    paths, found = [data.train] if isinstance(data.train, str) else [*data.train], {}
    for path in paths:
        found |= dict.fromkeys(_names_in(path, data.columns_of(path), kind))
    for path in () if found else paths:
        check_format(data, path, objective)
    least = 2 if kind == "class" else 1
    if not least <= len(found) <= MAX_CLASSES:
        raise ValueError(
            f"{', '.join(paths)}: wrong number of classes in the column 'label' (found {len(found)}, expected at least "
            f"{least} and at most {MAX_CLASSES}). Name the "
            "column in data.columns, or the classes in head.labels."
        )
    return tuple(sorted(found, key=_order))


def _names_in(path: str, names: Mapping[str, str], kind: ValueKind) -> Iterable[str]:
    known: set[str] = set()
    for columns in _renamed_rows(path, names, OPTIONAL_COLUMNS, []):
        try:
            new = set(_label_names(kind, columns)) - known
        except (KeyError, ValueError):
            continue
        known |= new
        yield from new
        if len(known) > MAX_CLASSES:
            return


def _renamed_rows(
    path: str, names: Mapping[str, str], optional: Collection[str], problems: list[Problem]
) -> Iterator[Columns]:
    """Yields the rows that have the columns of `names`, under our names. The others are added to `problems`."""
    for row in stream_rows(path):
        try:
            if isinstance(row, BrokenRow):
                raise ValueError(row.problem)
            columns = rename_columns(row.data, names, "data.columns", optional)
        except ValueError as error:
            problems.append((row.place, str(error)))
        else:
            yield columns


def check_format(data: DataArgs, path: str, objective: str) -> None:
    """Raises ValueError if a file does not exist, has no usable row, or its first rows fit no format of the objective.

    A pipe is not checked, because it can be read once.
    """
    if Path(path).is_fifo():
        return
    names, optional, problems = data.columns_of(path), optional_columns(data.format_of(path)), []
    renamed = _renamed_rows(path, names, optional, problems)
    first = [Row(Place(1, 0), each) for each in itertools.islice(renamed, FIRST_ROWS)]
    if not first:
        raise_problems(path, problems, len(problems))
        raise ValueError(no_rows_message(path))
    detect_format(path, first, data.format_of(path), names=names, objective=objective)


def _order(name: str) -> tuple[bool, float, str]:
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    return (False, number, name) if math.isfinite(number) else (True, 0.0, name)


def label_name(value: object) -> str:
    """Returns the name of a class; raises ValueError if the value does not name one."""
    if isinstance(value, int | str) or (isinstance(value, float) and value.is_integer()):
        name = _spelling(value)
        if name == "-1":
            raise ValueError("label is -1, which means that the row has no label. Remove it")
        if name:
            return name
    raise ValueError(f"label is {shorten(repr(value))}, expected a name or a whole number")


def _spelling(value: float | str) -> str:
    """Returns the name of a value, which is the same in all kinds of files: 1, 1.0 and "1.0" are one class."""
    if isinstance(value, bool):
        return str(value).lower()  # as JSON and YAML write it
    if isinstance(value, float):
        return str(int(value))
    name = str(value).strip()
    whole = _WHOLE.fullmatch(name)
    return whole[1] if whole else name


def _index(name: str, indices: Mapping[str, int]) -> int:
    if name in indices:
        return indices[name]
    raise ValueError(f"unknown label (found {shorten(repr(name))}, expected {_known(indices)})")


def _known(labels: Collection[str]) -> str:
    return f"one of {list_columns(labels)}"


def _listed(value: object) -> list[str]:
    if not isinstance(value, list):
        raise ValueError(f"label is not a list of names (found {shorten(repr(value))})")
    return [label_name(one) for one in value]


def _listed_marks(row: Columns, indices: Mapping[str, int]) -> list[float]:
    """Returns 1 for each class in the row's list of names, else 0."""
    has = {_index(name, indices) for name in _listed(row["label"])}
    return [float(index in has) for index in range(len(indices))]


def _column_marks(row: Columns, labels: Sequence[str]) -> list[float]:
    """Returns 1 for each class whose column says so, else 0."""
    missing = [name for name in labels if name not in row]
    if missing:
        raise ValueError(
            f"no column for the labels {list_columns(missing)} of head.labels (found {list_columns(row)}). "
            "Name in head.labels the columns that are labels, or in data.columns the column that is the label"
        )
    return [_truth(name, row[name]) for name in labels]


def _truth(name: str, value: object) -> float:
    if isinstance(value, str) and value.strip().lower() in _TRUTH:
        return _TRUTH[value.strip().lower()]
    if isinstance(value, bool | int | float) and value in (0, 1):
        return float(value)
    raise ValueError(f"{name} is not binary (found {shorten(repr(value))}, expected true, false, 1 or 0)")


def _margin(value: object) -> float:
    """Returns the margin of a pair, 0 for one without a margin; text files have an empty text there."""
    return 0.0 if value is None or value == "" else _number("margin", value)


def _number(name: str, value: object) -> float:
    """Returns a number that f32 can hold, also from text."""
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if abs(number) <= float(np.finfo(np.float32).max):
        return number
    raise ValueError(f"{name} is not a finite number in f32 (found {shorten(repr(value))})")
