"""Reports the progress of an evaluation: to nobody, or to a console."""

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import Progress, TextColumn

from qlora_jax.evaluation.tasks.task import AnyTask, ProgressCallback
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.io.loading.loader import Progress as LoadProgress
from qlora_jax.io.loading.progress import loading


class Reporter:
    """Receives the progress of an evaluation and ignores it; subclasses show it."""

    def message(self, text: str) -> None:
        """Receives one line for people."""

    def loading(self) -> AbstractContextManager[LoadProgress | None]:
        """Returns a context manager for the loading of a model; it gives a progress callback, or None."""
        return contextlib.nullcontext()

    def scoring(self, label: str, task: AnyTask, cache: ResultCache) -> AbstractContextManager[ProgressCallback]:
        """Returns a context manager for the scoring of a model on a task; it gives a progress callback.

        Args:
          label: description of the model.
          cache: counts the batches that were cached and computed.
        """
        return contextlib.nullcontext(lambda rows_done: None)


class ConsoleReporter(Reporter):
    """Prints messages, shows progress bars in a terminal, and prints how long each task took."""

    def __init__(self, console: Console):
        self._console = console

    def message(self, text: str) -> None:
        """Prints the text in a dim style."""
        self._console.print(text, style="dim", markup=False, highlight=False)

    def loading(self) -> AbstractContextManager[LoadProgress]:
        """Shows how much of a model is loaded."""
        return loading(self._console)

    @contextlib.contextmanager
    def scoring(self, label: str, task: AnyTask, cache: ResultCache) -> Iterator[ProgressCallback]:
        """Shows how many rows are scored, and prints the seconds at the end."""
        started, hits, misses = time.perf_counter(), cache.hits, cache.misses
        columns = (TextColumn("{task.description}", markup=False), *Progress.get_default_columns()[1:])
        with Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as bar:
            line = bar.add_task(f"{label}: {task.name}", total=task.size)
            yield lambda rows_done: bar.update(line, completed=rows_done)
        seconds = time.perf_counter() - started
        hits, misses = cache.hits - hits, cache.misses - misses  # both 0 without a cache
        cached = f", {hits} of {hits + misses} batches cached" if hits + misses else ""
        self.message(f"{label}: {task.name} scored in {seconds:.0f} s{cached}")
