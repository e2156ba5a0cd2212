"""Detects the format of a file's rows from their columns, and suggests the nearest format if none fits."""

import difflib
from collections.abc import Sequence

from qlora_jax.data.formats.registry import FORMATS, RowFormat
from qlora_jax.data.readers.files import Row


def detect_format(path: str, rows: Sequence[Row], named: str = "auto") -> RowFormat:
    """Returns the named format, or the first in FORMATS whose required columns exist and that matches a row.

    Args:
      path: file name for errors.
      named: a key of FORMATS, or "auto".

    Raises:
      ValueError: no format fits. The message has the columns found, the known formats, and the columns to rename.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row.data))
    detectable = [row_format for row_format in FORMATS.values() if not row_format.explicit_only]
    for row_format in detectable if named == "auto" else [FORMATS[named]]:
        if set(row_format.required) <= set(columns) and (named != "auto" or _matches_a_row(rows, row_format)):
            return row_format
    wrong = "have no known format" if named == "auto" else f"do not have the format {named!r} that data.format names"
    known = "".join(f"\n  {row_format}" for row_format in FORMATS.values())
    raise ValueError(
        f"{path}: the rows {wrong}. Columns found: {', '.join(map(repr, columns)) or 'none'}.\n"
        f"Formats (data.format):{known}\n{_nearest(columns)}"
    )


def _matches_a_row(rows: Sequence[Row], row_format: RowFormat) -> bool:
    return any(set(row_format.required) <= set(row.data) and row_format.matches(row.data) for row in rows)


# Our columns, and names that other tools and data sets use for the same.
_SYNONYMS = {
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat", "turns"),
    "prompt": ("question", "query", "input", "instruction", "problem", "user"),
    "completion": ("answer", "response", "output", "target", "solution", "assistant", "chosen"),
    "instruction": ("task", "request"),
    "output": ("response", "answer", "target"),
    "text": ("content", "body", "document", "passage"),
}


def _nearest(columns: Sequence[str]) -> str:
    """Returns a line with the format that needs the fewest changes, and the changes."""

    def partner(required: str) -> str | None:
        if required in columns:
            return required
        lower = {name.lower(): name for name in reversed(columns)}
        candidates = [required, *_SYNONYMS.get(required, ())]
        close = difflib.get_close_matches(required, lower, n=1, cutoff=0.8)
        return next((lower[name] for name in [*candidates, *close] if name in lower), None)

    def score(row_format: RowFormat) -> tuple[float, int]:
        partners = {partner(name) for name in row_format.required} - {None}
        exact = sum(name in columns for name in row_format.required)
        return len(partners) / len(row_format.required), exact

    best = max((row_format for row_format in FORMATS.values() if not row_format.explicit_only), key=score)
    if score(best)[0] == 0:
        return "None of the columns resembles one of these. Rename your columns to those of a format."
    pairs = {name: partner(name) for name in best.required}
    renames = [f"{found!r} to {name!r}" for name, found in pairs.items() if found not in (None, name)]
    missing = [repr(name) for name, found in pairs.items() if found is None]
    steps = [f"rename {', '.join(renames)}"] * bool(renames) + [f"add {', '.join(missing)}"] * bool(missing)
    return f"Nearest: {best.name}: {'; '.join(steps) or 'fits as it is; name it in data.format'}."
