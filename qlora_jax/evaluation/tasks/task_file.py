"""Reads the file of a task: finds columns under the task's names, and reports the rows that do not fit."""

from collections.abc import Callable, Collection, Mapping, Sequence

from qlora_jax.config import QUESTION_KINDS
from qlora_jax.data.readers.files import Problem, Row, raise_problems, read_rows, shorten
from qlora_jax.evaluation.shared_prefixes import ScoredIds

ALTERNATIVES = {"question": "prompt"}  # another name that a column may have
# Names of these columns in other data sets.
_SYNONYMS = {
    "question": ("problem", "query", "question_stem", "instruction", "input", "goal", "ctx", "text"),
    "options": ("choices", "endings", "candidates", "alternatives"),
    "answer": ("solution", "answers", "answerKey", "answer_key", "target", "output", "response", "completion", "label"),
}
_MAX_SHOWN = 20


def known_columns(task: str) -> Collection[str]:
    """The column names that a task knows."""
    if task != "rows":
        return QUESTION_KINDS[task].columns
    from qlora_jax.data.formats.registry import FORMATS  # imported late, because reading settings should be fast

    return {name for form in FORMATS.values() for name in (*form.required, *form.optional)}


def read_task_rows(
    path: str, task: str, file_columns: Mapping[str, str] | None, max_rows: int | None = None
) -> list[Row]:
    """Reads the first `max_rows` rows of a task's file, and renames columns to the task's names.

    Args:
      file_columns: the task's name of a column -> its name in the file. Names that the task does not know are ignored,
        because they are for other tasks.

    Raises:
      ValueError: the file cannot be read, or rows lack a column of `file_columns`; the message lists the rows.
    """
    rows = read_rows(path)[:max_rows]
    names = {ours: theirs for ours, theirs in (file_columns or {}).items() if ours in known_columns(task)}
    renamed = read_each(path, rows, lambda row: _rename(row.data, names))
    return [Row(row.place, columns) for row, columns in zip(rows, renamed, strict=True)]


def read_each[T](path: str, rows: Sequence[Row], read: Callable[[Row], T]) -> list[T]:
    """Applies `read` to each row.

    Raises:
      ValueError: rows for which `read` raises ValueError; the message lists them.
    """
    results: list[T] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            results.append(read(row))
        except ValueError as error:
            problems.append((row.place, str(error)))
    raise_problems(path, problems, len(rows))
    return results


def values_of(columns: Mapping[str, object], names: Sequence[str]) -> list[object]:
    """The values of these columns.

    Raises:
      ValueError: columns are missing; the message lists those that exist, and suggests `file_columns`.
    """
    values = {name: columns.get(name, columns.get(ALTERNATIVES.get(name, name))) for name in names}
    if missing := [name for name, value in values.items() if value is None]:
        expected = ", ".join(f"{name} (or {ALTERNATIVES[name]})" if name in ALTERNATIVES else name for name in names)
        mapping = ", ".join(f"{name}: {_likely(name, columns)}" for name in missing)
        raise ValueError(
            f"no column {_or(missing)} (found {_list(columns)}, expected {expected}). Set "
            f"--file_columns '{{{mapping}}}' (--questions.file_columns in training)"
        )
    return [*values.values()]


def wrong_value(name: str, value: object, expected: str) -> ValueError:
    """The error for a column with an unexpected value."""
    return ValueError(f"{name}: found {shorten(repr(value))}, expected {expected}")


def check_lengths(path: str, rows: Sequence[Row], scored: Sequence[Sequence[ScoredIds]], max_positions: int) -> None:
    """Raises one ValueError that lists every row that is too long for the model or has no token to score.

    Args:
      scored: the token sequences of each row.
    """
    problems: list[Problem] = []
    for row, sequences in zip(rows, scored, strict=True):
        longest = max(len(ids) for ids, _ in sequences)
        if longest > max_positions:
            found = f"found {longest} tokens; the model has {max_positions} positions"
            problems.append((row.place, f"too long ({found}). Shorten it"))
        elif not all(supervised[1:].any() for _, supervised in sequences):
            problems.append((row.place, "no token to score"))
    raise_problems(path, problems, len(rows))


def _rename(columns: Mapping[str, object], names: Mapping[str, str]) -> dict[str, object]:
    if missing := [theirs for theirs in names.values() if theirs not in columns]:
        raise ValueError(f"file_columns: no column {_or(missing)} (found {_list(columns)})")
    others = {name: value for name, value in columns.items() if name not in names.values()}
    return others | {ours: columns[theirs] for ours, theirs in names.items()}


def _likely(name: str, columns: Collection[str]) -> str:
    """The column that most probably holds `name`, or a placeholder."""
    lower = {column.lower(): column for column in columns}
    return next((lower[word.lower()] for word in _SYNONYMS.get(name, ()) if word.lower() in lower), "COLUMN")


def _or(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))


def _list(columns: Collection[str]) -> str:
    shown = ", ".join(shorten(repr(name)) for name in [*columns][:_MAX_SHOWN])
    return f"{shown} and {len(columns) - _MAX_SHOWN} more" if len(columns) > _MAX_SHOWN else shown or "none"
