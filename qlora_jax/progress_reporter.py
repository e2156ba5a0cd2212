"""Reports the progress of a tournament or study: to nobody, or to a console."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import Progress, TextColumn

from qlora_jax.io.loading.loader import Progress as LoadProgress
from qlora_jax.io.loading.progress import loading


class Reporter:
    """Receives progress and ignores it; subclasses show it."""

    def message(self, text: str) -> None:
        """Receives one line for people."""

    def loading(self, name: str) -> AbstractContextManager[LoadProgress | None]:
        """Returns a context manager for the loading of a model; it gives a progress callback, or None."""
        return contextlib.nullcontext()

    def counting(self, label: str, total: int, done: int) -> AbstractContextManager[Callable[[], None]]:
        """Returns a context manager for many small results; it gives a callback for each further one."""
        return contextlib.nullcontext(lambda: None)


class ConsoleReporter(Reporter):
    """Prints messages, and shows progress bars in a terminal."""

    def __init__(self, console: Console):
        self._console = console

    def message(self, text: str) -> None:
        """Prints the text in a dim style."""
        self._console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def loading(self, name: str) -> Iterator[LoadProgress]:
        """Shows how much of a model is loaded."""
        self.message(f"{name}: loading")
        with loading(self._console) as progress:
            yield progress

    @contextlib.contextmanager
    def counting(self, label: str, total: int, done: int) -> Iterator[Callable[[], None]]:
        """Shows how many results there are, and prints their number at the end."""
        columns = (TextColumn("{task.description}", markup=False), *Progress.get_default_columns()[1:])
        with Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as bar:
            line = bar.add_task(label, total=total, completed=done)
            try:
                yield lambda: bar.advance(line)
            finally:
                now = int(bar.tasks[line].completed)
                self.message(f"{label}: {now:,} of {total:,}" + (f" ({done:,} stored before)" if done else ""))
