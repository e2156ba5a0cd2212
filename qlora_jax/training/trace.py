"""A profiler's trace of some steps, which https://ui.perfetto.dev opens."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

FIRST = 2  # steps of a start that compile and warm up


@contextlib.contextmanager
def traced_steps(folder: Path, count: int) -> Iterator[Callable[[], None]]:
    """Yields what is to be called before each step: steps 3 to 2 + `count` of this start are traced into `folder`.

    Args:
      count: 0: nothing is traced.
    """
    seen, running = 0, False

    def before_step() -> None:
        nonlocal seen, running
        if count and seen == FIRST:
            jax.profiler.start_trace(folder, create_perfetto_trace=True)
            running = True
        if running and seen == FIRST + count:
            jax.profiler.stop_trace()
            running = False
        seen += 1

    try:
        yield before_step
    finally:
        if running:
            jax.profiler.stop_trace()
