"""A profiler's trace of some steps, which https://ui.perfetto.dev opens."""

import contextlib
import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

FIRST = 2  # steps of a start that compile and warm up
# The profiler ends its list of events with an empty one, which Perfetto calls an error.
END, BETTER_END = b",{}]}", b"]}"
BLOCK = 1 << 20


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
            jax.profiler.start_trace(folder)
            running = True
        if running and seen == FIRST + count:
            _stop(folder)
            running = False
        seen += 1

    try:
        yield before_step
    finally:
        if running:
            _stop(folder)


def _stop(folder: Path) -> None:
    """Ends the trace. jax's own making of Perfetto's file holds all events in memory: gigabytes on a CPU."""
    jax.profiler.stop_trace()
    newest = max((folder / "plugins/profile").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    (events,) = newest.glob("*.trace.json.gz")
    with gzip.open(events, "rb") as old, gzip.open(newest / "perfetto_trace.json.gz", "wb", compresslevel=4) as new:
        block = b""
        while read := old.read(BLOCK):
            block += read
            new.write(block[: -len(END)])
            block = block[-len(END) :]
        new.write(block.replace(END, BETTER_END))
    events.unlink()
