"""The tables of train_step.py."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.bench.profile.parts import DIRECTIONS

Columns = dict[str, tuple[str, Callable[[Any], str]]]


def table(title: str, lines: list[dict[str, Any]], columns: Columns) -> Table:
    """One row a line; `columns`: heading -> (key, how a value reads). What a line lacks, or is zero, stays empty."""
    made = Table(title=title, title_justify="left")
    for heading, (_, show) in columns.items():
        made.add_column(heading, justify="left" if show is str else "right", overflow="fold")
    for line in lines:
        made.add_row(*(show(line[key]) if line.get(key) else "" for key, show in columns.values()))
    return made


def number(digits: int, scale: float = 1.0) -> Callable[[float], str]:
    """How a number reads; one that would read as zero is not shown."""

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


def show_times(console: Console, told: dict[str, Any], top: int) -> None:
    """The two tables, and how the wall clock, the operations and the tracing relate."""
    console.print(table("one step, milliseconds", told["parts"], PART_COLUMNS))
    clocks = told["untraced_ms"]["step"], told["traced_ms"]["step"], told["busy_ms"], told["thunks_ms"]
    untraced, traced_ms, busy, thunks = (f"{ms:,.0f} ms" for ms in clocks)
    line = f"wall clock {traced_ms} traced, {untraced} untraced; operations ran in {busy} of it, {thunks} summed"
    console.print(line, highlight=False)
    console.print(table(f"the longest {top} operations", told["operations"][:top], OPERATION_COLUMNS))
