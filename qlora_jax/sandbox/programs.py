"""A program with its tests, the limits on running it, and the outcome."""

from typing import Literal, NamedTuple

Reason = Literal["passed", "wrong", "error", "time", "memory", "ended"]


class Program(NamedTuple):
    """A program to test.

    Fields:
      source: the program, which defines `entry_point`. It is run where it cannot see the tests.
      entry_point: name of the function that is tested.
      setup: trusted code that the tests may use.
      test: trusted code that defines `check(candidate)`, which raises if the function is wrong.
    """

    source: str
    entry_point: str
    setup: str
    test: str


class Limits(NamedTuple):
    """Limits on a program, and on its tests.

    Fields:
      seconds: processor time.
      memory: bytes of the process, including Python itself.
      waiting_seconds: time that may pass; several times the processor time, because other processes run too.
    """

    seconds: int = 3
    memory: int = 512 << 20
    waiting_seconds: int = 20


class ProgramOutcome(NamedTuple):
    """The result of testing a program.

    Fields:
      reason: "passed"; "wrong" (a test failed); "error" (an exception, or a value that is not plain); "time" or
        "memory" (a limit was reached); or "ended" (the process of the program ended before the tests did).
      detail: one line for people.
    """

    reason: Reason
    detail: str = ""

    @property
    def passed(self) -> bool:
        """True if every test passed."""
        return self.reason == "passed"
