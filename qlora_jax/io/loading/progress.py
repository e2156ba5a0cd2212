"""Prints the progress of loading and of later stages: a bar in a terminal, a line per quarter elsewhere."""

import contextlib
from collections.abc import Callable, Iterator

from rich import progress as bars
from rich.console import Console

StageProgress = Callable[..., None]  # (bytes, rows or modules done, those in all, name of the tensor, stage)
SCORING, WEIGHING, MERGING = "scoring held-out rows", "measuring importance", "merging adapters"
COUNTED = {SCORING: "rows", WEIGHING: "rows", MERGING: "modules"}  # other stages count bytes


@contextlib.contextmanager
def loading(console: Console) -> Iterator[StageProgress]:
    """Yields a `progress` callback for `load_model`; the bar disappears when the block ends.

    A fourth argument names a stage other than loading.
    """
    if not console.is_terminal:
        yield _print_quarters(console)
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TextColumn("{task.fields[size]}"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[tensor]}", markup=False),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading", total=None, tensor="", size="")

        def report(done: int, total: int, name: str, stage: str = "loading") -> None:
            if bar.tasks[task].description != stage:
                bar.reset(task, description=stage)
            size = f"{done}/{total} {COUNTED[stage]}" if stage in COUNTED else f"{done / 1e6:.1f}/{total / 1e6:.1f} MB"
            bar.update(task, completed=done, total=total, tensor=name, size=size)

        yield report


def _print_quarters(console: Console) -> StageProgress:
    printed: dict[str, int] = {}

    def report(done: int, total: int, name: str, stage: str = "loading") -> None:
        quarter, last = 4 * done // total, printed.get(stage, 0)
        printed[stage] = quarter
        if quarter not in (0, last):
            size = f"{total} {COUNTED[stage]}" if stage in COUNTED else f"{total / 1e6:.0f} MB"
            console.print(f"{stage}: {25 * quarter}% of {size}", markup=False, highlight=False)

    return report
