"""Profiler traces of a few steps, for https://ui.perfetto.dev."""

import contextlib
import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from qlora_jax.atomic_files import staged_file

WARM_UP_STEPS = 2  # not traced: they compile
# The profiler ends its list of events with an empty event, which Perfetto reports as an error.
END, BETTER_END = b",{}]}", b"]}"
BLOCK = 1 << 20
TRACE_FILE = "perfetto_trace.json.gz"


@contextlib.contextmanager
def traced_steps(folder: Path, count: int) -> Iterator[Callable[[], None]]:
    """Yields a function to call before each step; traces `count` steps into `folder`, after 2 warm-up steps.

    Args:
      count: the number of steps to trace; 0 traces nothing.
    """
    seen, running = 0, False

    def before_step() -> None:
        nonlocal seen, running
        if count and seen == WARM_UP_STEPS:
            jax.profiler.start_trace(folder)
            running = True
        if running and seen == WARM_UP_STEPS + count:
            _stop(folder)
            running = False
        seen += 1

    try:
        yield before_step
    finally:
        if running:
            _stop(folder)


def _stop(folder: Path) -> None:
    """Ends the trace and writes Perfetto's file block by block.

    JAX can write that file too, but it holds all events in memory: gigabytes on a CPU.
    """
    jax.profiler.stop_trace()
    newest = max((folder / "plugins/profile").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    (events,) = newest.glob("*.trace.json.gz")
    with (
        gzip.open(events, "rb") as old,
        staged_file(newest / TRACE_FILE) as file,
        gzip.GzipFile(TRACE_FILE, "wb", compresslevel=4, fileobj=file) as new,
    ):
        block = b""
        while read := old.read(BLOCK):
            block += read
            new.write(block[: -len(END)])
            block = block[-len(END) :]
        new.write(block.replace(END, BETTER_END))
    events.unlink()
