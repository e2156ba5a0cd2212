"""Prints the progress of a benchmark on standard error, so that standard output has its results alone."""

import atexit
import functools
import sys
import time
from collections.abc import Iterable, Iterator


def phase(words: str) -> None:
    """Prints the seconds since the first phase and what begins now; at the end of the process, that it ends."""
    began = _began()
    print(f"[{time.perf_counter() - began:6.1f} s] {words}", file=sys.stderr, flush=True)


def phases[T](words: str, items: Iterable[T]) -> Iterator[T]:
    """Yields the items, each of which is a phase. Those of a range are counted."""
    for number, item in enumerate(items, 1):
        phase(f"{words} {number} of {len(items)}" if isinstance(items, range) else f"{words} {item}")
        yield item


@functools.cache
def _began() -> float:
    atexit.register(phase, "end")
    return time.perf_counter()
