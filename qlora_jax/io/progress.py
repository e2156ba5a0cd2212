"""Shows how far loading is: a bar in a terminal, a line for each quarter elsewhere."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[int, int, str], None]


@contextlib.contextmanager
def loading_progress(console: Console) -> Iterator[Report]:
    """Yields a `progress` for `load_model`: called with (bytes done, bytes in all, name of the tensor)."""
    if not console.is_terminal:
        yield _quarters(console)
        return
    columns = (
        TextColumn("loading"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tensor]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("loading", total=None, tensor="")
        yield lambda done, total, name: progress.update(task, completed=done, total=total, tensor=name)


def _quarters(console: Console) -> Report:
    shown = 0

    def report(done: int, total: int, name: str) -> None:
        nonlocal shown
        if (quarter := 4 * done // total) > shown:
            shown = quarter
            console.print(f"loading: {25 * quarter}% of {total / 1e6:.0f} MB", markup=False, highlight=False)

    return report
