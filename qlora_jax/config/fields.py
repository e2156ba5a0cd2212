"""Declares settings: a dataclass field with its help text, and a bound on its values."""

import dataclasses
import datetime
import re
from collections.abc import Callable
from typing import Any

# A value that a setting gives a chat template.
TemplateValue = bool | int | float | str | list[str]
TEMPLATE_CHOICES = "a jinja file, or chatml, gemma, llama3 or zephyr"  # values of each setting chat_template


@dataclasses.dataclass(frozen=True, slots=True)
class Bound:
    """A condition on one value, and its description for the error `expected {description}`."""

    description: str
    holds: Callable[[Any], bool]


POSITIVE = Bound("more than 0", lambda value: value > 0)
NON_NEGATIVE = Bound("0 or more", lambda value: value >= 0)
AT_LEAST_ONE = Bound("1 or more", lambda value: value >= 1)
AT_LEAST_TWO = Bound("2 or more", lambda value: value >= 2)
AT_LEAST_HUNDRED = Bound("100 or more", lambda value: value >= 100)
BELOW_ONE = Bound("at least 0 and below 1", lambda value: 0 <= value < 1)
BELOW_HALF = Bound("at least 0 and below 0.5", lambda value: 0 <= value < 0.5)
UP_TO_ONE = Bound("from 0 to 1", lambda value: 0 <= value <= 1)
WORD = Bound("from 0 to 4294967295", lambda value: 0 <= value < 1 << 32)
BLOCK_SIZE = Bound("a power of two from 32 to 4096", lambda value: value in [2**n for n in range(5, 13)])
NOT_EMPTY = Bound("not empty", lambda value: len(value) > 0)
_WEB = re.compile(r"https?://[^/\s]+")
WEB_ADDRESS = Bound("an address that begins with http:// or https://", lambda value: bool(_WEB.match(value)))


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


DATE = Bound("a date such as 2026-11-28", _is_date)


# Returns Any for the same reason as dataclasses.field: it stands where a value of the field's type is expected.
def setting(
    help: str,
    default: Any = dataclasses.MISSING,
    bound: Bound | None = None,
    *,
    common: str | None = None,
    later: bool = False,
    repeated: bool = False,
    command_line: bool = False,
) -> Any:
    """Declares a field with its help text and bound; without a default the setting is required.

    Lists and dicts are copied for each instance.

    Args:
      common: a help text of one line, for a setting that `--help` lists; `--help all` shows `help`.
      later: the setting is younger than runs whose records have its section's text; files and texts leave it out where
        it has its default.
      repeated: a list whose elements the command line gives one by one: `--run a --run b`.
      command_line: files neither set nor hold it, because it names code to run.
    """
    metadata = {"help": help, "bound": bound, "common": common, "later": later, "repeated": repeated}
    metadata["command_line"] = command_line
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def is_left_out(field: dataclasses.Field, value: object) -> bool:
    """Returns True for a later setting with its default, and for one of the command line alone."""
    made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return field.metadata.get("command_line", False) or (field.metadata.get("later", False) and value == made)


class WithoutLater:
    """A dataclass of settings whose text has its later settings only where they are set."""

    def __repr__(self) -> str:
        found = {field: getattr(self, field.name) for field in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]
        texts = (f"{field.name}={value!r}" for field, value in found.items() if not is_left_out(field, value))
        return f"{type(self).__name__}({', '.join(texts)})"
