"""Ends work that takes too long, such as the report of a run that a signal stopped."""

import signal
import threading
from collections.abc import Callable
from types import FrameType

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
    working = True

    def end(number: int, frame: FrameType | None) -> None:
        if working:
            raise _OutOfTime

    handler = signal.signal(signal.SIGALRM, end)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        work()
        return True
    except _OutOfTime:
        return False
    finally:
        working = False
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
