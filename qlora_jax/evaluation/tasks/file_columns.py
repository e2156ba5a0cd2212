"""The columns of files of questions: what tasks call them, what a file does, what is told where one is missing."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from qlora_jax.config.question_settings import FILE_COLUMNS
from qlora_jax.data.readers.files import Problem, Row, raise_problems, read_rows, shorten

ALSO = {"question": "prompt"}  # the name that a column may have too
# What other data sets call them.
_SYNONYMS = {
    "question": ("problem", "query", "question_stem", "instruction", "input", "goal", "ctx", "text"),
    "options": ("choices", "endings", "candidates", "alternatives"),
    "answer": ("solution", "answers", "answerKey", "answer_key", "target", "output", "response", "completion", "label"),
}
_SHOWN = 20


def known_columns(task: str) -> Collection[str]:
    """The names that a task's file may have its columns under."""
    if task != "rows":
        return FILE_COLUMNS[task]
    from qlora_jax.data.formats.registry import FORMATS  # the settings are read without what it imports

    return {name for form in FORMATS.values() for name in (*form.required, *form.optional)}


def read_named(path: str, task: str, named: Mapping[str, str] | None, max_rows: int | None = None) -> list[Row]:
    """The first rows of a task's file, columns under the names that the task knows.

    Args:
      named: the task's name of a column -> the file's; names that the task does not know are other tasks'.

    Raises:
      ValueError: as `read_rows`; rows without a column that is named, all of them.
    """
    rows = read_rows(path)[:max_rows]
    here = {ours: theirs for ours, theirs in (named or {}).items() if ours in known_columns(task)}
    renamed = read_each(path, rows, lambda row: _renamed(row.data, here))
    return [Row(row.place, columns) for row, columns in zip(rows, renamed, strict=True)]


def _renamed(columns: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, Any]:
    if missing := [theirs for theirs in named.values() if theirs not in columns]:
        raise ValueError(f"no column {_or(missing)}, which file_columns names; it has {_list(columns)}")
    others = {name: value for name, value in columns.items() if name not in named.values()}
    return others | {ours: columns[theirs] for ours, theirs in named.items()}


def read_each[T](path: str, rows: Sequence[Row], read: Callable[[Row], T]) -> list[T]:
    """What `read` makes of each row.

    Raises:
      ValueError: every row that it refuses, by its place.
    """
    found: list[T] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            found.append(read(row))
        except ValueError as error:
            problems.append((row.place, str(error)))
    raise_problems(path, problems, len(rows))
    return found


def values_of(columns: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """The values of these columns.

    Raises:
      ValueError: some are missing; tells those that are there, and how to name the right ones.
    """
    held = {name: columns.get(name, columns.get(ALSO.get(name, name))) for name in names}
    if missing := [name for name, value in held.items() if value is None]:
        expected = ", ".join(f"{name} (or {ALSO[name]})" if name in ALSO else name for name in names)
        naming = ", ".join(f"{name}: {_likely(name, columns)}" for name in missing)
        raise ValueError(
            f"no column {_or(missing)}: it has {_list(columns)}, expected {expected}. Tell which they are: "
            f"--file_columns '{{{naming}}}' (--questions.file_columns in training)"
        )
    return [*held.values()]


def found(name: str, value: Any, expected: str) -> ValueError:
    """What to raise where a column holds something else."""
    return ValueError(f"{name}: expected {expected}; found {shorten(repr(value))}")


def _likely(name: str, columns: Collection[str]) -> str:
    lower = {column.lower(): column for column in columns}
    return next((lower[word.lower()] for word in _SYNONYMS.get(name, ()) if word.lower() in lower), "COLUMN")


def _or(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))


def _list(columns: Collection[str]) -> str:
    shown = ", ".join(shorten(repr(name)) for name in [*columns][:_SHOWN])
    return f"{shown} and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else shown or "none"
