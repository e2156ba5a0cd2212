"""Numbers of layers in a setting: 3, [0, 2, 5], or ranges such as "0-3, 8"."""

import re

_PART = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")
_EXPECTED = "expected numbers from 0 or ranges, such as [0, 2] or 8-15,20"


def parse_layers(value: int | list[int] | str) -> tuple[int, ...]:
    """Returns the numbers in ascending order, each once; both ends of a range belong to it.

    Raises:
      ValueError: malformed, empty, or a number below 0.
    """
    if isinstance(value, str):
        numbers = [number for part in value.split(",") for number in _range_of(part, value)]
    else:
        numbers = value if isinstance(value, list) else [value]
    if not numbers or min(numbers) < 0:
        raise ValueError(f"found {value!r}, {_EXPECTED}")
    return tuple(sorted(set(numbers)))


def _range_of(part: str, whole: str) -> range:
    match = _PART.fullmatch(part)
    if match is None:
        raise ValueError(f"found {whole!r}, {_EXPECTED}")
    first = int(match[1])
    last = int(match[2] or first)
    if last < first:
        raise ValueError(f"found the range {part.strip()} in {whole!r}, expected its lower end first")
    return range(first, last + 1)
