"""A simulated device under memory pressure: N bytes, a scripted load by other programs, and copies that fail.

A helper for tests. `SimulatedMemory` is a `Memory`: arrays and copies are real, and their bytes are counted.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax

from qlora_jax.optim.page_pool import Memory, Page, on_device, page_bytes

Direction = Literal["to_device", "to_host"]
CopyOutcome = Literal["works", "fails", "fails late"]  # late: the call returns, and waiting for the copy fails


def _no_faults(direction: Direction, number: int) -> CopyOutcome:
    return "works"


@dataclasses.dataclass
class Ledger:
    """The bytes on a simulated device and its host, and the copies made so far."""

    step: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    peak_bytes: int = 0
    copies: dict[Direction, int] = dataclasses.field(default_factory=lambda: {"to_device": 0, "to_host": 0})
    failing: list[Page] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedMemory(Memory):
    """Memory whose copies fail when its counted bytes exceed its size.

    Attributes:
      total_bytes: the size of the device.
      others: bytes that other programs take at each step; the last value repeats. `advance` begins the next step.
      host_bytes: the size of the host's pool; None: unlimited.
      faults: maps (direction, number of earlier copies in it) to the outcome of a copy.
    """

    total_bytes: int
    others: Sequence[int] = (0,)
    host_bytes: int | None = None
    faults: Callable[[Direction, int], CopyOutcome] = _no_faults
    ledger: Ledger = dataclasses.field(default_factory=Ledger)

    def statistics(self) -> dict[str, int]:
        """Returns memory statistics in the format of a GPU."""
        return {"bytes_limit": self.total_bytes, "bytes_in_use": self._others() + self.ledger.device_bytes}

    def advance(self) -> None:
        """Begins the next step of the scripted load."""
        self.ledger.step += 1

    def to_device(self, page: Page) -> Page:
        room = self.total_bytes - self._others() - self.ledger.device_bytes
        copy = self._copy("to_device", page, room, super().to_device)
        self.ledger.device_bytes += page_bytes(page)
        self.ledger.peak_bytes = max(self.ledger.peak_bytes, self.ledger.device_bytes)
        return copy

    def to_host(self, page: Page) -> Page:
        room = None if self.host_bytes is None else self.host_bytes - self.ledger.host_bytes
        copy = self._copy("to_host", page, room, super().to_host)
        self.ledger.host_bytes += page_bytes(page)
        return copy

    def wait(self, page: Page) -> None:
        if any(page is failing for failing in self.ledger.failing):
            self.free(page)
            raise jax.errors.JaxRuntimeError("INTERNAL: simulated copy that fails late")
        super().wait(page)

    def free(self, page: Page) -> None:
        if on_device(page):
            self.ledger.device_bytes -= page_bytes(page)
        else:
            self.ledger.host_bytes -= page_bytes(page)
        super().free(page)

    def _others(self) -> int:
        return self.others[min(self.ledger.step, len(self.others) - 1)]

    def _copy(self, direction: Direction, page: Page, room: int | None, copy: Callable[[Page], Page]) -> Page:
        number = self.ledger.copies[direction]
        self.ledger.copies[direction] += 1
        outcome = self.faults(direction, number)
        if outcome == "fails" or (room is not None and page_bytes(page) > room):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: simulated {direction}, {room} bytes are free")
        copied = copy(page)
        if outcome == "fails late":
            self.ledger.failing.append(copied)
        return copied
