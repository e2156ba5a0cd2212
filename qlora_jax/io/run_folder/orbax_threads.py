"""Silences the tracebacks that orbax' threads print about a save or read that failed.

orbax raises the first error. Its threads log theirs as well, and it does not wait for its other reads and writes: they
fail because their event loop is closed, or are freed, which Python prints.
"""

import functools
import logging
import sys
from typing import Any

# Loggers, and a part of their messages about reads and writes that failed or were abandoned.
LOGGED = {"absl": "_SignalingThread.run()", "asyncio": "exception was never retrieved"}
FREED = ("Event loop is closed", "Encountered error while reading array index", "cannot schedule new futures")


@functools.cache
def silence_threads() -> None:
    """Drops these messages for the rest of the process; all other messages of orbax and of Python remain."""
    for name in LOGGED:
        logging.getLogger(name).addFilter(_is_not_of_a_thread)
    hook = sys.unraisablehook

    # The argument's type exists only for type checkers.
    def print_other_errors(unraisable: Any) -> None:
        if not str(unraisable.exc_value).startswith(FREED):
            hook(unraisable)

    sys.unraisablehook = print_other_errors


def _is_not_of_a_thread(record: logging.LogRecord) -> bool:
    return LOGGED[record.name] not in str(record.msg)
