"""Reads the file of a task: finds columns under the task's names, and reports the rows that do not fit."""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Int64

from qlora_jax.config import QUESTION_KINDS, ROW_COLUMNS
from qlora_jax.data.formats.columns import (
    PLACEHOLDER,
    SYNONYMS,
    check_names_exist,
    columns_setting,
    likely_column,
    list_columns,
    rename_columns,
)
from qlora_jax.data.readers.files import Problem, Row, raise_problems, read_rows, shorten
from qlora_jax.evaluation.shared_prefixes import ScoredIds

ROW_TASKS = ("rows", "pairs", "embeddings")  # tasks that read the columns of training data
ALTERNATIVES = {"question": "prompt"}  # another name that a column may have


def known_columns(task: str) -> Collection[str]:
    """The column names that a task knows."""
    return ROW_COLUMNS if task in ROW_TASKS else QUESTION_KINDS[task].columns


def read_task_rows(
    path: str,
    task: str,
    file_columns: Mapping[str, str] | None,
    max_rows: int | None = None,
    optional: Collection[str] = (),
) -> list[Row]:
    """Reads the first `max_rows` rows of a task's file, and renames columns to the task's names.

    Args:
      file_columns: the task's name of a column -> its name in the file. Names that the task does not know are ignored,
        because they are for other tasks.
      optional: the task's column names that a row may lack.

    Raises:
      ValueError: the file cannot be read, or rows lack a column of `file_columns`; the message lists the rows.
    """
    rows = read_rows(path)[:max_rows]
    names = {ours: theirs for ours, theirs in (file_columns or {}).items() if ours in known_columns(task)}
    renamed = read_each(path, rows, lambda row: rename_columns(row.data, names, "file_columns", optional))
    check_names_exist(path, names, {name for columns in renamed for name in columns}, "file_columns")
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
        likely = {name: likely_column(name, columns, SYNONYMS.get(name, ())) or PLACEHOLDER for name in missing}
        raise ValueError(
            f"no column {' or '.join(map(repr, missing))} (found {list_columns(columns)}, expected {expected}). Set "
            f"{columns_setting('file_columns', likely)} (--questions.file_columns in training)"
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


def groups_by(path: str, rows: Sequence[Row], by: str) -> dict[str, Int64[np.ndarray, "_"]]:
    """Returns the indices of the rows of each value of the column `by`, the largest group first."""
    values = read_each(path, rows, lambda row: _group_name(row.data, by))
    groups = {value: np.flatnonzero([one == value for one in values]) for value in dict.fromkeys(values)}
    largest_first = sorted(groups.items(), key=lambda group: -len(group[1]))
    return {f"{by} {value} ({len(members)} rows)": members for value, members in largest_first}


def _group_name(columns: Mapping[str, object], by: str) -> str:
    value = columns.get(by)
    if not isinstance(value, str | int):
        raise ValueError(
            f"by: found {shorten(repr(value))} in column {by!r}, expected a text or a whole number (the columns are "
            f"{list_columns(columns)})"
        )
    return str(value)


def check_reply_lengths(
    path: str, rows: Sequence[Row], prompts: Sequence[Sequence[int]], max_new_tokens: int, max_positions: int
) -> None:
    """Raises one ValueError that lists every row whose prompt leaves too few positions for the reply.

    Args:
      prompts: the ids of each row's prompt.
    """
    problems = [
        (
            row.place,
            f"too long (found {len(ids)} tokens and {max_new_tokens} of the reply; the model has {max_positions} "
            "positions)",
        )
        for row, ids in zip(rows, prompts, strict=True)
        if len(ids) + max_new_tokens > max_positions
    ]
    raise_problems(path, problems, len(rows))
