"""Silences the tracebacks that orbax' threads print about a save that failed.

orbax raises the first error of a save. Its threads log theirs as well, and those that finish later fail because the
event loop of the save is closed, which Python prints.
"""

import functools
import logging
import sys
from typing import Any


@functools.cache
def silence_threads() -> None:
    """Drops these messages for the rest of the process; all other messages of orbax and of Python remain."""
    logging.getLogger("absl").addFilter(_is_not_of_a_thread)
    hook = sys.unraisablehook

    # The argument's type exists for type checkers alone.
    def print_other_errors(unraisable: Any) -> None:
        if not _is_of_a_closed_loop(unraisable.exc_value):
            hook(unraisable)

    sys.unraisablehook = print_other_errors


def _is_not_of_a_thread(record: logging.LogRecord) -> bool:
    return "_SignalingThread.run()" not in str(record.msg)


def _is_of_a_closed_loop(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
