"""Detects the format of a file's rows from their columns, and suggests the nearest format if none fits."""

import json
from collections.abc import Mapping, Sequence

from qlora_jax.config.objectives import RowKind
from qlora_jax.data.formats.columns import PLACEHOLDER, SYNONYMS, columns_setting, likely_column
from qlora_jax.data.formats.registry import FORMATS, format_of
from qlora_jax.data.formats.row_format import RowFormat
from qlora_jax.data.readers.files import Row
from qlora_jax.data.row_kinds import DESCRIPTIONS, row_use

# Columns for the advice about a file whose columns resemble none of a format.
_EXAMPLE_COLUMNS: dict[RowKind, tuple[str, ...]] = {
    "text": ("prompt", "completion"),
    "pair": ("prompt", "chosen", "rejected"),
    "labelled": ("prompt", "completion", "label"),
    "class": ("text", "label"),
    "embedding": ("anchor", "positive"),
    "prompt": ("prompt",),
}


def detect_format(
    path: str,
    rows: Sequence[Row],
    named: str = "auto",
    *,
    names: Mapping[str, str] | None = None,
    setting: str = "data.columns",
    objective: str = "sft",
) -> RowFormat:
    """Returns the named format, or the first in FORMATS whose required columns exist and that matches a row.

    Only formats that the objective can use are considered.

    Args:
      path: file name for errors.
      named: a value of data.format; formats of other packages are used only if they are named.
      names: our column names, which the rows have already -> their names in the file.
      setting: the setting of these names, for errors.
      objective: a key of OBJECTIVES.

    Raises:
      ValueError: no format fits, or only one of another kind. The message has the columns found, the known formats, and
        the setting that may be missing.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row.data))
    formats = [row_format for row_format in FORMATS.values() if objective in row_format.objectives]
    if named != "auto" and objective not in format_of(named).objectives:
        raise ValueError(f"{path}: {_other_kind(format_of(named), objective, setting, 'data.format')}")
    detectable = [row_format for row_format in formats if not row_format.explicit_only]
    for row_format in detectable if named == "auto" else [format_of(named)]:
        if set(row_format.required) <= set(columns) and (named != "auto" or _matches_a_row(rows, row_format)):
            return row_format
    if named == "auto" and (other := _of_other_objectives(rows, columns, formats)) is not None:
        raise ValueError(f"{path}: {_other_kind(other, objective, setting, 'objective')}")
    wrong = "have no known format" if named == "auto" else f"do not have the format {named!r} that data.format names"
    known = "".join(f"\n  {row_format}" for row_format in formats)
    advice = _rows_in_an_object(rows) + _advice(columns, formats, named, names or {}, setting)
    raise ValueError(
        f"{path}: the rows {wrong}. Columns found: {', '.join(map(repr, columns)) or 'none'}.\n"
        f"Formats (data.format):{known}\n{advice}"
    )


def _of_other_objectives(rows: Sequence[Row], columns: Sequence[str], formats: Sequence[RowFormat]) -> RowFormat | None:
    """Returns the format of other objectives that fits, with the most required columns.

    None if one of `formats` has these columns and a label, which is then what the file lacks.
    """
    # Rows of any kind may have a prompt, so these columns alone say nothing.
    unlike = [form for form in FORMATS.values() if form not in formats and form.kind != "prompt"]
    others = [form for form in unlike if not form.explicit_only]
    fit = [form for form in others if set(form.required) <= set(columns) and _matches_a_row(rows, form)]
    found = max(fit, key=lambda form: len(form.required), default=None)
    if found is None or any({*found.required, "label"} == {*form.required} for form in formats):
        return None
    return found


def _other_kind(found: RowFormat, objective: str, setting: str, wrong: str) -> str:
    """Returns the problem of rows that another objective needs, and the settings that may be meant.

    Args:
      setting: as in `detect_format`. Only training has an objective to set.
      wrong: the setting of training that does not fit the rows.
    """
    expected, others = DESCRIPTIONS[row_use(objective).kind], found.objectives
    formats = [form.name for form in FORMATS.values() if objective in form.objectives]
    usable = f"the format{'s' if len(formats) > 1 else ''} {_one_of(formats)}"
    what = f"found {DESCRIPTIONS[found.kind]}: format {found.name!r}"
    if setting == "file_columns":
        return f"rows of another kind ({what}, expected {expected}). Use rows of {usable}."
    advice = f"Set objective to {_one_of(others)}, or use rows of {usable}."
    return f"{wrong}: {objective} trains on {expected} ({what}). {advice}"


def _one_of(names: Sequence[str]) -> str:
    *before, last = names
    return f"{', '.join(before)} or {last}" if before else last


def _matches_a_row(rows: Sequence[Row], row_format: RowFormat) -> bool:
    return any(set(row_format.required) <= set(row.data) and row_format.matches(row.data) for row in rows)


def _rows_in_an_object(rows: Sequence[Row]) -> str:
    """Returns a line about a file that is one object with a list of objects, which are probably its rows."""
    lists = [name for row in rows for name, value in row.data.items() if _is_list_of_objects(value)]
    if len(rows) > 1 or not lists:
        return ""
    return f"If the rows are its list {lists[0]!r}, write each on one line: jq -c '.[{json.dumps(lists[0])}][]' FILE.\n"


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _advice(
    columns: Sequence[str], formats: Sequence[RowFormat], named: str, names: Mapping[str, str], setting: str
) -> str:
    """Returns a line with the format that needs the fewest changes, and the setting that names its columns."""
    nearest = _nearest(columns, formats, named)
    if nearest is None:
        names = dict.fromkeys(_EXAMPLE_COLUMNS[formats[0].kind], PLACEHOLDER)
        return (
            f"None of the columns resembles one of these. Name your columns, for example with "
            f"{columns_setting(setting, names)}."
        )
    pairs = {name: _partner(name, columns) or PLACEHOLDER for name in nearest.required}
    optional = {name: found for name in nearest.optional if (found := _partner(name, columns))}
    pairs |= {name: found for name, found in optional.items() if found not in pairs.values()}
    others = {ours: names.get(found, found) for ours, found in pairs.items() if found != ours}
    if not others:
        return f"Nearest: {nearest.name}: fits as it is; name it in data.format."
    where = f", where {PLACEHOLDER} is a column of the file" if PLACEHOLDER in others.values() else ""
    kept = {ours: theirs for ours, theirs in names.items() if ours not in pairs.values() or ours in pairs}
    return f"Nearest: {nearest.name}. Set {columns_setting(setting, {**kept, **others})}{where}."


def _nearest(columns: Sequence[str], formats: Sequence[RowFormat], named: str) -> RowFormat | None:
    """Returns the format with the largest share of columns that the file has, perhaps under other names."""

    def score(row_format: RowFormat) -> tuple[float, int]:
        partners = {_partner(name, columns) for name in row_format.required} - {None}
        exact = sum(name in columns for name in row_format.required)
        return len(partners) / len(row_format.required), exact

    if named != "auto" and score(format_of(named))[0] == 1:
        return format_of(named)
    best = max((row_format for row_format in formats if not row_format.explicit_only), key=score)
    return best if score(best)[0] else None


def _partner(required: str, columns: Sequence[str]) -> str | None:
    return likely_column(required, columns, SYNONYMS.get(required, ()))
