"""Detects the format of a file's rows from their columns, and suggests the nearest format if none fits."""

from collections.abc import Mapping, Sequence

from qlora_jax.data.formats.columns import PLACEHOLDER, SYNONYMS, columns_setting, likely_column
from qlora_jax.data.formats.registry import FORMATS, RowFormat
from qlora_jax.data.readers.files import Row


def detect_format(
    path: str,
    rows: Sequence[Row],
    named: str = "auto",
    *,
    names: Mapping[str, str] | None = None,
    setting: str = "data.columns",
) -> RowFormat:
    """Returns the named format, or the first in FORMATS whose required columns exist and that matches a row.

    Args:
      path: file name for errors.
      named: a key of FORMATS, or "auto".
      names: our names of columns, which the rows have already -> their names in the file.
      setting: the setting of these names, for errors.

    Raises:
      ValueError: no format fits. The message has the columns found, the known formats, and the setting that may be
        missing.
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
        f"Formats (data.format):{known}\n{_advice(columns, named, names or {}, setting)}"
    )


def _matches_a_row(rows: Sequence[Row], row_format: RowFormat) -> bool:
    return any(set(row_format.required) <= set(row.data) and row_format.matches(row.data) for row in rows)


def _advice(columns: Sequence[str], named: str, names: Mapping[str, str], setting: str) -> str:
    """Returns a line with the format that needs the fewest changes, and the setting that names its columns."""
    nearest = _nearest(columns, named)
    if nearest is None:
        names = {"prompt": PLACEHOLDER, "completion": PLACEHOLDER}
        return (
            f"None of the columns resembles one of these. Name your columns, for example with "
            f"{columns_setting(setting, names)}."
        )
    pairs = {name: _partner(name, columns) or PLACEHOLDER for name in nearest.required}
    others = {ours: names.get(found, found) for ours, found in pairs.items() if found != ours}
    if not others:
        return f"Nearest: {nearest.name}: fits as it is; name it in data.format."
    where = f", where {PLACEHOLDER} is a column of the file" if PLACEHOLDER in others.values() else ""
    kept = {ours: theirs for ours, theirs in names.items() if ours not in pairs.values() or ours in pairs}
    return f"Nearest: {nearest.name}. Set {columns_setting(setting, {**kept, **others})}{where}."


def _nearest(columns: Sequence[str], named: str) -> RowFormat | None:
    """Returns the format with the largest share of columns that the file has, perhaps under other names."""

    def score(row_format: RowFormat) -> tuple[float, int]:
        partners = {_partner(name, columns) for name in row_format.required} - {None}
        exact = sum(name in columns for name in row_format.required)
        return len(partners) / len(row_format.required), exact

    if named != "auto" and score(FORMATS[named])[0] == 1:
        return FORMATS[named]
    best = max((row_format for row_format in FORMATS.values() if not row_format.explicit_only), key=score)
    return best if score(best)[0] else None


def _partner(required: str, columns: Sequence[str]) -> str | None:
    return likely_column(required, columns, SYNONYMS.get(required, ()))
