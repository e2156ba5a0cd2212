"""Tables of the profile, as rich tables."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_jax.untrusted_json import JsonObject
from scripts.bench.profile.parts import DIRECTIONS

Row = JsonObject
Columns = dict[str, tuple[str, Callable[[Any], str]]]  # heading -> (key, formatter of the key's values)


def table(title: str, rows: list[Row], columns: Columns) -> Table:
    """Returns a table; missing values and zeros are empty cells."""
    made = Table(title=title, title_justify="left")
    for heading, (_, show) in columns.items():
        made.add_column(heading, justify="left" if show is str else "right", overflow="fold")
    for row in rows:
        made.add_row(*(show(row[key]) if row.get(key) else "" for key, show in columns.values()))
    return made


def number(digits: int, scale: float = 1.0) -> Callable[[float], str]:
    """Returns a formatter of numbers; a number that rounds to zero becomes an empty string."""

    def show(value: float) -> str:
        text = f"{value * scale:,.{digits}f}"
        return text if float(text.replace(",", "")) else ""

    return show


PART_COLUMNS = {
    "part": ("part", str),
    **{direction: (direction, number(1)) for direction in DIRECTIONS},
    "ms": ("ms", number(1)),
    "thunks": ("thunks_ms", number(1)),
    "share": ("share", lambda share: f"{share:.1%}"),
    "GFLOP": ("flop", lambda flop: f"{sum(flop.values()) / 1e9:,.1f}"),
    "GFLOP/s": ("gflop_per_second", number(0)),
}
OPERATION_COLUMNS = {
    "ms": ("ms", number(1)),
    "calls": ("calls", str),
    "thunks": ("thunks_ms", number(1)),
    "operation": ("operation", str),
    "shape": ("shape", str),
    "part": ("part", str),
    "direction": ("direction", str),
    "source": ("source", str),
}


def show_times(console: Console, profile: Row, top: int) -> None:
    """Prints the two tables, and one line that compares wall-clock time with the time of operations."""
    console.print(table("one step, milliseconds", profile["parts"], PART_COLUMNS))
    clocks = profile["untraced_ms"]["step"], profile["traced_ms"]["step"], profile["busy_ms"], profile["thunks_ms"]
    untraced, traced_ms, busy, thunks = (f"{ms:,.0f} ms" for ms in clocks)
    line = f"wall clock {traced_ms} traced, {untraced} untraced; operations ran in {busy} of it, {thunks} summed"
    console.print(line, highlight=False)
    console.print(table(f"the longest {top} operations", profile["operations"][:top], OPERATION_COLUMNS))
