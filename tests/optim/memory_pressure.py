"""A device under pressure, where there is none: N bytes, some of them held by others by a script, and copies that fail.

Pages go through it as through any other `Memory`; the arrays and the copies are real, the bytes are counted.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from qlora_jax.optim.page_pool import Memory, Page, on_device, page_bytes

Direction = Literal["to_device", "to_host"]
Outcome = Literal["works", "fails", "fails late"]  # late: the call returns, and waiting for the copy fails


def _no_faults(direction: Direction, number: int) -> Outcome:
    return "works"


@dataclasses.dataclass
class Ledger:
    """What a simulated device holds and has seen, in bytes and counts."""

    step: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    peak_bytes: int = 0
    copies: dict[Direction, int] = dataclasses.field(default_factory=lambda: {"to_device": 0, "to_host": 0})
    failing: list[Page] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedMemory(Memory):
    """Memory that is full when its numbers say so.

    Attributes:
      total_bytes: of the device.
      others: bytes that others hold on it at each step; the last goes on for ever. `advance` goes to the next step.
      host_bytes: of the host's pool; None: as much as wanted.
      faults: (direction, how many copies went that way before) to what happens to a copy.
    """

    total_bytes: int
    others: Sequence[int] = (0,)
    host_bytes: int | None = None
    faults: Callable[[Direction, int], Outcome] = _no_faults
    ledger: Ledger = dataclasses.field(default_factory=Ledger)

    def statistics(self) -> dict[str, int]:
        """As a GPU tells them."""
        return {"bytes_limit": self.total_bytes, "bytes_in_use": self._others() + self.ledger.device_bytes}

    def advance(self) -> None:
        """The script's next step."""
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

    def _copy(self, direction: Direction, page: Page, room: int | None, copy: Callable[[Page], Any]) -> Page:
        number = self.ledger.copies[direction]
        self.ledger.copies[direction] += 1
        outcome = self.faults(direction, number)
        if outcome == "fails" or (room is not None and page_bytes(page) > room):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: simulated {direction}, {room} bytes are free")
        copied = copy(page)
        if outcome == "fails late":
            self.ledger.failing.append(copied)
        return copied
