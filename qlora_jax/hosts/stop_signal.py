"""Notices SIGINT and SIGTERM, and stops all processes after the same step when one of them has been asked to stop."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jax.sharding import Mesh

from qlora_jax.hosts.agreed_minimum import AgreedMinimum


@contextmanager
def stop_on_signals(report: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Yields `stop()`, which returns True after SIGINT or SIGTERM; a second SIGINT interrupts at once."""
    received: list[int] = []

    def handle(number: int, _: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        report(f"{signal.Signals(number).name}: saving after this step; press Ctrl-C again to exit without saving")

    # Python sets signal handlers in the main thread only; elsewhere, signals stay with the program's own handlers.
    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignal:
    """Asks all processes whether one of them has been asked to stop; all get the same answer.

    All processes call it equally often.

    Args:
      asked: returns True if this process has been asked to stop.
      mesh: of the run; it has devices of every process.
    """

    def __init__(self, asked: Callable[[], bool], mesh: Mesh):
        self._asked, self._minimum = asked, AgreedMinimum(mesh)

    def __call__(self) -> bool:
        """Returns True if any process has been asked to stop."""
        (goes_on,) = self._minimum(not self._asked())
        return goes_on == 0
