"""Ends work that takes too long, such as the report of a run that a signal stopped."""

import contextlib
import inspect
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_AGAIN = 0.1  # seconds; code that swallowed the first alarm gets another


class _OutOfTime(BaseException):
    """Raised in the work by the alarm; not an Exception, so that `except Exception` in libraries does not catch it."""


def finishes_within(seconds: float, work: Callable[[], object]) -> bool:
    """Does the work for at most `seconds`; returns False if it was ended before it was done.

    The system's alarm interrupts the main thread only; in another thread the work has no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        work()
        return True
    try:
        with _alarms(seconds):
            _do(work)
    except _OutOfTime:
        return False
    return True


def _do(work: Callable[[], object]) -> None:
    work()


@contextlib.contextmanager
def _alarms(seconds: float) -> Iterator[None]:
    """Raises _OutOfTime within `_do` after `seconds`, and again until the block ends.

    Python prints and drops an exception that is raised in a finalizer or in a callback of the garbage collector. This
    one is dropped without a word, and the next alarm ends the work.
    """
    hook = sys.unraisablehook

    # The argument's type exists for type checkers alone.
    def print_other_errors(unraisable: Any) -> None:
        if unraisable.exc_type is not _OutOfTime:
            hook(unraisable)

    def end(number: int, frame: FrameType | None) -> None:
        if _is_within(frame, _do) and not _is_within(frame, print_other_errors):
            raise _OutOfTime

    handler = signal.signal(signal.SIGALRM, end)
    sys.unraisablehook = print_other_errors
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        sys.unraisablehook = hook
        signal.signal(signal.SIGALRM, handler)


def _is_within(frame: FrameType | None, function: Callable[..., object]) -> bool:
    """Returns True if a frame, or one of its callers, runs the function."""
    code = inspect.unwrap(function).__code__
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None
