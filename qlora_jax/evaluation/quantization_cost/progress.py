"""Prints how many layers have been measured."""

from rich.console import Console

LINES = 20  # per measurement


def print_progress(console: Console, done: int, total: int, name: str) -> None:
    """Prints a line for every twentieth part of the evaluations."""
    if LINES * done // total > LINES * (done - 1) // total:
        text = f"measured {done} of {total} layers, the last {name}"
        console.print(text, style="dim", markup=False, highlight=False)
