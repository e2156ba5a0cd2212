"""Pages on two tiers, the device and the host, and copies between them that lose nothing when they fail.

Knows arrays and bytes alone. A page is a tuple of arrays; where it is, its arrays say.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from qlora_jax.config.sizes import format_bytes

Device = Any  # jax.Device
Page = tuple[jax.Array | np.ndarray, ...]
HostKind = Literal["pinned_host", "numpy"]

# What a copy fails with: XLA's own error, and NumPy's where the host has no memory left.
COPY_ERRORS = (jax.errors.JaxRuntimeError, MemoryError)


class PagingError(OSError):
    """A page could be placed nowhere; the message says which, and how to go on."""


@dataclasses.dataclass(frozen=True)
class Moved:
    """What was moved: bytes and pages to the device and from it, and what failed on the way, in words."""

    bytes_in: int = 0
    bytes_out: int = 0
    pages_in: int = 0
    pages_out: int = 0
    problems: tuple[str, ...] = ()

    def __add__(self, other: "Moved") -> "Moved":
        return Moved(
            self.bytes_in + other.bytes_in,
            self.bytes_out + other.bytes_out,
            self.pages_in + other.pages_in,
            self.pages_out + other.pages_out,
            self.problems + other.problems,
        )


def page_bytes(page: Page) -> int:
    """Bytes of a page's arrays."""
    return sum(leaf.nbytes for leaf in page)


def on_device(page: Page) -> bool:
    """Whether a page takes device memory: what its arrays say of themselves."""
    return any(isinstance(leaf, jax.Array) and leaf.sharding.memory_kind != "pinned_host" for leaf in page)


def host_kind(device: Device) -> HostKind:
    """`pinned_host` where a round trip through that memory gives the same bits; else `numpy`, ordinary host memory.

    Asked of the device and tried once, for backends differ in what they announce and in what works.
    """
    if "pinned_host" not in [memory.kind for memory in device.addressable_memories()]:
        return "numpy"
    sent = np.arange(8, dtype=np.float32)
    memory = Memory(device, "pinned_host")
    try:
        (there,) = memory.to_host(memory.to_device((sent,)))
        (back,) = memory.to_device((there,))
        same = not on_device((there,)) and np.array_equal(np.asarray(back), sent)
    except COPY_ERRORS:
        return "numpy"
    return "pinned_host" if same else "numpy"


@dataclasses.dataclass(frozen=True)
class Memory:
    """A device and the host memory that its pages go to. Copies return at once and run on; `wait` is for them.

    A copy never aliases its source, and never donates it: XLA ends the process where a buffer is donated across
    kinds of memory.
    """

    device: Device
    kind: HostKind

    @classmethod
    def of(cls, device: Device) -> "Memory":
        """With the best kind of host memory that works."""
        return cls(device, host_kind(device))

    @property
    def device_sharding(self) -> jax.sharding.Sharding:
        """Of pages on the device."""
        return jax.sharding.SingleDeviceSharding(self.device, memory_kind=self.device.default_memory().kind)

    @property
    def host_sharding(self) -> jax.sharding.Sharding | None:
        """Of pages on the host; None where they are NumPy arrays."""
        return None if self.kind == "numpy" else jax.sharding.SingleDeviceSharding(self.device, memory_kind=self.kind)

    def statistics(self) -> dict[str, int] | None:
        """What the device tells of its memory (`bytes_limit`, `bytes_in_use`); None where it tells nothing."""
        return self.device.memory_stats() or None

    def to_device(self, page: Page) -> Page:
        """A copy on the device."""
        return tuple(jax.device_put(leaf, self.device_sharding, may_alias=False) for leaf in page)

    def to_host(self, page: Page) -> Page:
        """A copy on the host."""
        if self.host_sharding is None:
            return tuple(np.array(leaf) for leaf in page)
        return tuple(jax.device_put(leaf, self.host_sharding, may_alias=False) for leaf in page)

    def wait(self, page: Page) -> None:
        """Returns when a copy is there; raises one of COPY_ERRORS where it failed."""
        jax.block_until_ready(page)

    def free(self, page: Page) -> None:
        """Gives a page's memory back now, whoever still refers to it."""
        for leaf in page:
            if isinstance(leaf, jax.Array):
                leaf.delete()


class Pool:
    """The pages of one sweep, kept to a limit of device bytes, copies under way included.

    A page's device copy is freed when its host copy is there without error, and the reverse; a copy that fails leaves
    the page where it was and is told in `moved.problems`. Belady's rule says which page leaves: with the next sweep
    going the other way, that is the one updated first; before any is updated, the one whose turn is last.

    Args:
      order: in which pages will be taken.
      limit: device bytes.
    """

    def __init__(self, pages: Sequence[Page], memory: Memory, order: Sequence[int], limit: int):
        self.pages, self.memory, self.limit = list(pages), memory, limit
        self.moved = Moved()
        self._place = {page: place for place, page in enumerate(order)}
        self._sizes = [page_bytes(page) for page in pages]
        self._resident = {i for i, page in enumerate(pages) if on_device(page)}
        self._updated: deque[int] = deque()
        self._arriving: dict[int, Page] = {}
        self._leaving: dict[int, tuple[Page, Page]] = {}  # (device, host), oldest first
        self._stuck: set[int] = set()

    def used(self) -> int:
        """Device bytes of pages, those of copies under way included."""
        return sum(self._sizes[i] for i in (*self._resident, *self._arriving, *self._leaving))

    def take(self, i: int) -> Page:
        """Page i on the device, there without error; its host copy is freed, and the caller may donate it.

        Raises:
          PagingError: it can't be placed, also with every other page away.
        """
        self._let_leave(i)
        if i not in self._resident:
            if i not in self._arriving:
                self._make_room(i)
            self._arrive(i)
        return self.pages[i]

    def give(self, i: int, page: Page) -> None:
        """Page i as it is after its update."""
        self.pages[i] = page
        self._updated.append(i)

    def prefetch(self, i: int) -> None:
        """Starts the copy of page i to the device where there is room; `take` does it again where that fails."""
        self._let_leave(i)
        if i not in self._resident and i not in self._arriving and self._make_room(i):
            try:
                self._arriving[i] = self.memory.to_device(self.pages[i])
            except COPY_ERRORS:
                return

    def shrink(self, limit: int) -> None:
        """Sends pages away until they take `limit` bytes at most, and returns when the memory is free."""
        while self.used() - sum(self._sizes[i] for i in self._leaving) > limit:
            victim = self._victim(len(self._place))
            if victim is None:
                break
            self._send(victim)
        while self._leaving:
            self._settle()

    def _make_room(self, i: int) -> bool:
        while self.used() + self._sizes[i] > self.limit:
            if self._leaving:
                self._settle()
            elif (victim := self._victim(self._place[i])) is not None:
                self._send(victim)
            else:
                return False
        return True

    def _victim(self, place: int) -> int | None:
        """The page to send away for one whose turn is at `place` (past the last: for none)."""
        done = next((i for i in self._updated if i in self._resident and i not in self._stuck), None)
        if done is not None:
            return done
        waiting = [i for i in self._resident - self._stuck - set(self._updated) if self._may_give_way(i, place)]
        return max(waiting, key=self._place.__getitem__, default=None)

    def _may_give_way(self, i: int, place: int) -> bool:
        return self._place[i] > place or place == len(self._place)

    def _send(self, i: int) -> None:
        try:
            copy = self.memory.to_host(self.pages[i])
        except COPY_ERRORS as error:
            self._keep(i, error)
            return
        self._resident.remove(i)
        self._leaving[i] = (self.pages[i], copy)

    def _settle(self) -> None:
        """Waits for the oldest copy to the host, then frees the device's."""
        i, (page, copy) = next(iter(self._leaving.items()))
        del self._leaving[i]
        try:
            self.memory.wait(copy)
        except COPY_ERRORS as error:
            self._resident.add(i)
            self._keep(i, error)
            return
        self.memory.free(page)
        self.pages[i] = copy
        self.moved += Moved(bytes_out=self._sizes[i], pages_out=1)

    def _let_leave(self, i: int) -> None:
        while i in self._leaving:
            self._settle()

    def _keep(self, i: int, error: BaseException) -> None:
        self._stuck.add(i)
        problem = (
            f"page {i} of {len(self.pages)} ({format_bytes(self._sizes[i])}) stays on the device, beyond its budget: "
            f"no copy to the host could be made ({first_line(error)})"
        )
        self.moved += Moved(problems=(problem,))

    def _arrive(self, i: int) -> None:
        source = self.pages[i]
        try:
            copy = self._arriving.pop(i, None) or self.memory.to_device(source)
            self.memory.wait(copy)
        except COPY_ERRORS:
            copy = self._place_alone(i)
        self._resident.add(i)
        self.pages[i] = copy
        self.memory.free(source)
        self.moved += Moved(bytes_in=self._sizes[i], pages_in=1)

    def _place_alone(self, i: int) -> Page:
        """Once more, with all other pages away."""
        for page in self._arriving.values():
            self.memory.free(page)
        self._arriving.clear()
        self.shrink(0)
        try:
            copy = self.memory.to_device(self.pages[i])
            self.memory.wait(copy)
        except COPY_ERRORS as error:
            raise PagingError(
                f"page {i} of {len(self.pages)} of the optimizer's state ({format_bytes(self._sizes[i])}) can't be "
                f"placed on the device, also with all other pages away ({first_line(error)}); the step is not "
                "complete. Free memory there, or make batches smaller, and go on from the last checkpoint with --resume"
            ) from error
        return copy


def first_line(error: BaseException) -> str:
    """What an error says first; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
