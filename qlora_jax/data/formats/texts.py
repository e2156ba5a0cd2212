"""Checks the texts of a row: present, not blank, and whole Unicode characters."""

import re
from collections.abc import Sequence

from qlora_jax.metadata import JsonObject

_HALF_SURROGATE = re.compile("[\ud800-\udfff]")


def text_problems(row: JsonObject, *names: str, may_be_blank: Sequence[str] = ()) -> list[str]:
    """Returns the problems of these columns, which the row has."""
    problems = [text_problem(name, row[name], name in may_be_blank) for name in names]
    return [problem for problem in problems if problem]


def text_problem(name: str, value: object, may_be_blank: bool = False) -> str | None:
    """Returns the reason why `value` is not a text to learn from; None if it is one."""
    if not isinstance(value, str):
        return f"{name} is {'null' if value is None else type(value).__name__}, expected text"
    if not may_be_blank and not value.strip():
        return f"{name} is empty"
    half = _HALF_SURROGATE.search(value)
    if half:
        return f"{name} contains half of a surrogate pair (\\u{ord(half.group()):x})"
    return None
