"""Parses and formats memory sizes such as 2GiB, and formats durations."""

import re

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)")


def parse_bytes(text: str) -> int:
    """The size in bytes of a number and a unit: `parse_bytes("1.5 GiB")` is 1610612736; GB is 10^9, GiB 2^30.

    Raises:
      ValueError: the text is not a non-negative number followed by a known unit.
    """
    found = _SIZE.fullmatch(text.strip())
    units = {name.lower(): factor for name, factor in UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise ValueError(f"found {text!r}, expected a number of 0 or more and a unit ({', '.join(UNITS)}), as in 2GiB")
    return int(float(found[1]) * units[found[2].lower()])


def format_bytes(size: int) -> str:
    """The size with a unit: `format_bytes(1610612736)` is '1.50 GiB'."""
    for name in ("GiB", "MiB", "KiB"):
        if size >= UNITS[name]:
            return f"{size / UNITS[name]:,.2f} {name}"
    return f"{size} B"


def format_duration(seconds: float) -> str:
    """Formats a duration: `75.2` -> `1:15`, `3675` -> `1:01:15`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
