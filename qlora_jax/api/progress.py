"""Consoles and progress bars of functions that print only on request."""

import contextlib
from collections.abc import Iterator

from qlora_jax.io.loading.loader import Progress
from qlora_jax.io.loading.progress import loading
from qlora_jax.terminal.console import Console


def console_for(progress: bool) -> Console:
    """A console that prints, or one that discards everything."""
    return Console(quiet=not progress)


@contextlib.contextmanager
def loading_bar(progress: bool) -> Iterator[Progress]:
    """Yields a callback that shows how far loading is, or does nothing."""
    if not progress:
        yield lambda done, total, name: None
        return
    with loading(Console(stderr=True)) as report:
        yield report
