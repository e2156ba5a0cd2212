"""Prints the progress of loading: a bar in a terminal, a line per quarter elsewhere."""

import contextlib
from collections.abc import Iterator

from rich import progress as bars
from rich.console import Console

from qlora_jax.io.loading.loader import Progress


@contextlib.contextmanager
def loading(console: Console) -> Iterator[Progress]:
    """Yields a `progress` callback for `load_model`; the bar disappears when the block ends."""
    if not console.is_terminal:
        yield _print_quarters(console)
        return
    columns = (
        bars.TextColumn("loading"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[tensor]}", markup=False),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading", total=None, tensor="")
        yield lambda done, total, name: bar.update(task, completed=done, total=total, tensor=name)


def _print_quarters(console: Console) -> Progress:
    printed = 0

    def report(done: int, total: int, name: str) -> None:
        nonlocal printed
        if (quarter := 4 * done // total) > printed:
            printed = quarter
            console.print(f"loading: {25 * quarter}% of {total / 1e6:.0f} MB", markup=False, highlight=False)

    return report
