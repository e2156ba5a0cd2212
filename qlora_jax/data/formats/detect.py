"""Which form the rows of a file have, told from their columns, and how near an unknown one is to a known one."""

import difflib
from collections.abc import Sequence

from qlora_jax.data.formats.registry import FORMATS, RowFormat
from qlora_jax.data.readers.files import Row


def detect_format(path: str, rows: Sequence[Row], named: str = "auto") -> RowFormat:
    """The form of a file: the one named, or the first in FORMATS whose required columns are there, if a row tells it.

    Raises:
      ValueError: no form fits; tells the columns found, the forms known, and the nearest one with what to rename.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row.data))
    told = [form for form in FORMATS.values() if not form.explicit_only]
    for form in told if named == "auto" else [FORMATS[named]]:
        if set(form.required) <= set(columns) and (named != "auto" or _tells(rows, form)):
            return form
    wrong = "are in no known form" if named == "auto" else f"are not in the form {named!r} that data.format names"
    known = "".join(f"\n  {form}" for form in FORMATS.values())
    raise ValueError(
        f"{path}: the rows {wrong}. Columns found: {', '.join(map(repr, columns)) or 'none'}.\n"
        f"Forms (data.format):{known}\n{_nearest(columns)}"
    )


def _tells(rows: Sequence[Row], form: RowFormat) -> bool:
    return any(set(form.required) <= set(row.data) and form.matches(row.data) for row in rows)


# Columns of other tools and data sets, and ours that mean the same.
_SYNONYMS = {
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat", "turns"),
    "prompt": ("question", "query", "input", "instruction", "problem", "user"),
    "completion": ("answer", "response", "output", "target", "solution", "assistant", "chosen"),
    "instruction": ("task", "request"),
    "output": ("response", "answer", "target"),
    "text": ("content", "body", "document", "passage"),
}


def _nearest(columns: Sequence[str]) -> str:
    """One line: the form that needs the fewest changes, and which."""

    def partner(required: str) -> str | None:
        if required in columns:
            return required
        lower = {name.lower(): name for name in reversed(columns)}
        candidates = [required, *_SYNONYMS.get(required, ())]
        close = difflib.get_close_matches(required, lower, n=1, cutoff=0.8)
        return next((lower[name] for name in [*candidates, *close] if name in lower), None)

    def score(form: RowFormat) -> tuple[float, int]:
        partners = {partner(name) for name in form.required} - {None}
        exact = sum(name in columns for name in form.required)
        return len(partners) / len(form.required), exact

    best = max((form for form in FORMATS.values() if not form.explicit_only), key=score)
    if score(best)[0] == 0:
        return "None of the columns looks like one of these."
    pairs = {name: partner(name) for name in best.required}
    renames = [f"{found!r} to {name!r}" for name, found in pairs.items() if found not in (None, name)]
    missing = [repr(name) for name, found in pairs.items() if found is None]
    steps = [f"rename {', '.join(renames)}"] * bool(renames) + [f"add {', '.join(missing)}"] * bool(missing)
    return f"Nearest: {best.name}: {'; '.join(steps) or 'fits as it is'}."
