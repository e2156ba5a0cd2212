"""Shows how far loading is: a bar in a terminal, a line for each quarter elsewhere."""

import contextlib
from collections.abc import Iterator

from rich import progress as bars
from rich.console import Console

from qlora_jax.io.loader import Progress


@contextlib.contextmanager
def loading(console: Console) -> Iterator[Progress]:
    """Yields a `progress` for `load_model`; the bar goes when the block ends."""
    if not console.is_terminal:
        yield _quarters(console)
        return
    columns = (
        bars.TextColumn("loading"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[tensor]}"),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading", total=None, tensor="")
        yield lambda done, total, name: bar.update(task, completed=done, total=total, tensor=name)


def _quarters(console: Console) -> Progress:
    shown = 0

    def report(done: int, total: int, name: str) -> None:
        nonlocal shown
        if (quarter := 4 * done // total) > shown:
            shown = quarter
            console.print(f"loading: {25 * quarter}% of {total / 1e6:.0f} MB", markup=False, highlight=False)

    return report
