"""Reports the progress of long work: to nobody, or to a console."""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import Progress, TextColumn

from qlora_jax.io.loading.loader import Progress as LoadProgress
from qlora_jax.io.loading.progress import loading


class ProgressReporter:
    """Receives progress and ignores it; subclasses show it."""

    def message(self, text: str) -> None:
        """Receives one line for people."""

    def loading(self) -> AbstractContextManager[LoadProgress | None]:
        """Returns a context manager for the loading of a model; it gives a progress callback, or None."""
        return contextlib.nullcontext()

    def counting(self, label: str, total: int | None, stored: int = 0) -> AbstractContextManager[Callable[[int], None]]:
        """Returns a context manager for many results; it gives a callback that receives how many are done.

        Args:
          total: how many results there will be; None if unknown.
          stored: how many are done already.
        """
        return contextlib.nullcontext(lambda done: None)


class ConsoleReporter(ProgressReporter):
    """Prints messages, shows progress bars in a terminal, and prints how long the work took."""

    def __init__(self, console: Console):
        self._console = console

    def message(self, text: str) -> None:
        """Prints the text in a dim style."""
        self._console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def loading(self) -> AbstractContextManager[LoadProgress]:
        """Shows how much of a model is loaded."""
        return loading(self._console)

    @contextlib.contextmanager
    def counting(self, label: str, total: int | None, stored: int = 0) -> Iterator[Callable[[int], None]]:
        """Shows how many results are done; prints their number and the seconds at the end, after an error too."""
        started = time.perf_counter()
        columns = (TextColumn("{task.description}", markup=False), *Progress.get_default_columns()[1:])
        with Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as bar:
            line = bar.add_task(label, total=total, completed=stored)
            try:
                yield lambda done: bar.update(line, completed=done)
            finally:
                done = f"{int(bar.tasks[line].completed):,}" + (f" of {total:,}" if total is not None else "")
                before = f" ({stored:,} stored before)" if stored else ""
                self.message(f"{label}: {done} in {time.perf_counter() - started:.0f} s{before}")
