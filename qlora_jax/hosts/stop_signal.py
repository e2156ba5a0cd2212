"""Notices SIGINT and SIGTERM, and stops all processes after the same step when one of them has been asked to stop."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jax.sharding import Mesh

from qlora_jax.hosts.agreed_minimum import AgreedMinimum


@contextmanager
def stop_on_signals(report: Callable[[str], None]) -> Iterator[Callable[[], int]]:
    """Yields a function that returns the number of the first SIGINT or SIGTERM; 0: none. A second SIGINT interrupts."""
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
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignal:
    """Asks all processes which signal has asked one of them to stop; all get the same answer.

    All processes call it equally often.

    Args:
      asked: returns the number of the signal that has asked this process to stop; 0: none.
      mesh: of the run; it has devices of every process.
    """

    def __init__(self, asked: Callable[[], int], mesh: Mesh):
        self._asked, self._minimum = asked, AgreedMinimum(mesh)

    def __call__(self) -> int:
        """Returns the greatest number of the signals that have asked a process to stop; 0: none has."""
        (least,) = self._minimum(-self._asked())
        return -least
