"""Pages of optimizer state on two tiers, device and host memory, and copies between them that lose nothing on failure.

A page is a tuple of arrays; the arrays themselves say where it is.
"""

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import ArrayLike

from qlora_jax.config.sizes import format_bytes
from qlora_jax.sharding import Device, part_bytes

Page = tuple[jax.Array | np.ndarray, ...]
Parts = Mapping[tuple[slice, ...], np.ndarray]  # an array in this process: NumPy parts by place after axis 0
HostKind = Literal["pinned_host", "numpy"]

# Errors of a failed copy: XLA's own, and NumPy's when the host has no memory left.
COPY_ERRORS = (jax.errors.JaxRuntimeError, MemoryError)


class PagingError(OSError):
    """A page fits neither the device nor the host. The message names the page and says how to continue."""


@dataclasses.dataclass(frozen=True)
class Transfers:
    """The bytes and pages copied to the device (in) and to the host (out), and a message per copy that failed."""

    bytes_in: int = 0
    bytes_out: int = 0
    pages_in: int = 0
    pages_out: int = 0
    problems: tuple[str, ...] = ()

    def __add__(self, other: "Transfers") -> "Transfers":
        return Transfers(
            self.bytes_in + other.bytes_in,
            self.bytes_out + other.bytes_out,
            self.pages_in + other.pages_in,
            self.pages_out + other.pages_out,
            self.problems + other.problems,
        )


def page_bytes(page: Page) -> int:
    """Returns the bytes of a page's arrays; on a mesh, those of one device."""
    return part_bytes(page)


def on_device(page: Page) -> bool:
    """True if the page is resident: one of its arrays takes device memory."""
    return any(isinstance(leaf, jax.Array) and leaf.sharding.memory_kind != "pinned_host" for leaf in page)


def host_kind(device: Device) -> HostKind:
    """Returns `pinned_host` if a round trip through that memory preserves the bits, else `numpy` (ordinary memory).

    Tries a copy, because backends announce memory kinds that do not work.
    """
    if "pinned_host" not in [memory.kind for memory in device.addressable_memories()]:
        return "numpy"
    sent = np.arange(8, dtype=np.float32)
    memory = Memory(device, "pinned_host")
    try:
        (on_host,) = memory.to_host(memory.to_device((sent,)))
        (back,) = memory.to_device((on_host,))
        intact = not on_device((on_host,)) and np.array_equal(np.asarray(back), sent)
    except COPY_ERRORS:
        return "numpy"
    return "pinned_host" if intact else "numpy"


@dataclasses.dataclass(frozen=True)
class Memory:
    """A device and the host memory to which its pages are evicted. Copies are asynchronous: `wait` waits for one.

    A copy never aliases or donates its source: XLA aborts the process if a buffer is donated across memory kinds.
    """

    device: Device
    kind: HostKind

    @classmethod
    def of(cls, device: Device) -> "Memory":
        """Returns the device's memory with the best host memory that works."""
        return cls(device, host_kind(device))

    @property
    def devices(self) -> Sequence[Device]:
        """The devices of this process that have the pages."""
        return (self.device,)

    def device_sharding(self, spec: P) -> jax.sharding.Sharding:
        """Returns the sharding of an array of device pages that is cut as `spec` says."""
        return self._sharding(spec, self.device.default_memory().kind)

    def host_sharding(self, spec: P) -> jax.sharding.Sharding | None:
        """Returns the sharding of an array of host pages; None if these are NumPy arrays."""
        return None if self.kind == "numpy" else self._sharding(spec, self.kind)

    def _sharding(self, spec: P, memory_kind: str) -> jax.sharding.Sharding:
        return jax.sharding.SingleDeviceSharding(self.device, memory_kind=memory_kind)

    def statistics(self) -> dict[str, int] | None:
        """Returns the memory statistics of the device (`bytes_limit`, `bytes_in_use`); None if it reports none."""
        return self.device.memory_stats() or None

    def parts(self, leaf: ArrayLike) -> Parts:
        """Returns what this process has of an array, each part once; may alias it."""
        return {(): np.asarray(leaf)}

    def joined(self, parts: Parts, shape: tuple[int, ...], spec: P) -> jax.Array | np.ndarray:
        """Returns the array of `parts`, in host memory; the inverse of `parts`."""
        return parts[()]

    def to_device(self, page: Page) -> Page:
        """Starts a copy to the device, and returns it."""
        return tuple(self.put(leaf) for leaf in page)

    def put(self, leaf: jax.Array | np.ndarray) -> jax.Array:
        """Starts a copy of one array to the device, and returns it."""
        return jax.device_put(leaf, self.device_sharding(P()), may_alias=False)

    def to_host(self, page: Page) -> Page:
        """Starts a copy to the host, and returns it."""
        sharding = self.host_sharding(P())
        if sharding is None:
            return tuple(np.array(leaf) for leaf in page)
        return tuple(jax.device_put(leaf, sharding, may_alias=False) for leaf in page)

    def wait(self, page: Page) -> None:
        """Waits until a copy is complete; raises one of COPY_ERRORS if it failed."""
        jax.block_until_ready(page)

    def free(self, page: Page) -> None:
        """Frees a page's memory now, even if it is still referenced."""
        for leaf in page:
            if isinstance(leaf, jax.Array):
                leaf.delete()


class Pool:
    """The pages of one sweep, kept within a limit of device bytes. Copies under way count.

    An eviction frees the device's page once the host's copy is complete without error, and a copy to the device frees
    the host's page in the same way. If a copy fails, the page stays where it was, and `transfers.problems` says so.

    Evictions follow Belady's rule: the page whose next use is latest goes first. The next sweep runs in the opposite
    order, so that is the page updated first, or the page whose turn is last while none has been updated.

    Args:
      order: the order in which pages will be fetched.
      limit: device bytes.
    """

    def __init__(self, pages: Sequence[Page], memory: Memory, order: Sequence[int], limit: int):
        self.pages, self.memory, self.limit = list(pages), memory, limit
        self.transfers = Transfers()
        self._turn = {page: turn for turn, page in enumerate(order)}
        self._sizes = [page_bytes(page) for page in pages]
        self._resident = {i for i, page in enumerate(pages) if on_device(page)}
        self._updated: deque[int] = deque()
        self._arriving: dict[int, Page] = {}
        self._leaving: dict[int, tuple[Page, Page]] = {}  # (device, host), oldest first
        self._unevictable: set[int] = set()

    def used(self) -> int:
        """Returns the device bytes of the pages, copies under way included."""
        return sum(self._sizes[i] for i in (*self._resident, *self._arriving, *self._leaving))

    def fetch(self, i: int) -> Page:
        """Returns page i on the device, complete. Its host copy is freed, and the caller may donate the page.

        Raises:
          PagingError: the device has no room for the page, even with every other page evicted.
        """
        self._finish_eviction_of(i)
        if i not in self._resident:
            if i not in self._arriving:
                self._make_room(i)
            self._arrive(i)
        return self.pages[i]

    def put(self, i: int, page: Page) -> None:
        """Replaces page i by its updated version, which is on the device."""
        self.pages[i] = page
        self._updated.append(i)

    def prefetch(self, i: int) -> None:
        """Starts the copy of page i to the device if there is room; if the copy fails, `fetch` repeats it."""
        self._finish_eviction_of(i)
        if i not in self._resident and i not in self._arriving and self._make_room(i):
            try:
                self._arriving[i] = self.memory.to_device(self.pages[i])
            except COPY_ERRORS:
                return

    def evict_to(self, limit: int) -> None:
        """Evicts pages until they take at most `limit` device bytes, and returns when that memory is free."""
        while self.used() - sum(self._sizes[i] for i in self._leaving) > limit:
            victim = self._victim(len(self._turn))
            if victim is None:
                break
            self._evict(victim)
        while self._leaving:
            self._finish_eviction()

    def _make_room(self, i: int) -> bool:
        while self.used() + self._sizes[i] > self.limit:
            if self._leaving:
                self._finish_eviction()
            elif (victim := self._victim(self._turn[i])) is not None:
                self._evict(victim)
            else:
                return False
        return True

    def _victim(self, turn: int) -> int | None:
        """The page to evict for the page whose turn is `turn`, or for none if `turn` is past the last."""
        done = next((i for i in self._updated if i in self._resident and i not in self._unevictable), None)
        if done is not None:
            return done
        waiting = [i for i in self._resident - self._unevictable - set(self._updated) if self._may_give_way(i, turn)]
        return max(waiting, key=self._turn.__getitem__, default=None)

    def _may_give_way(self, i: int, turn: int) -> bool:
        return self._turn[i] > turn or turn == len(self._turn)

    def _evict(self, i: int) -> None:
        try:
            copy = self.memory.to_host(self.pages[i])
        except COPY_ERRORS as error:
            self._keep_resident(i, error)
            return
        self._resident.remove(i)
        self._leaving[i] = (self.pages[i], copy)

    def _finish_eviction(self) -> None:
        """Waits for the oldest copy to the host, then frees the device's page."""
        i, (page, copy) = next(iter(self._leaving.items()))
        del self._leaving[i]
        try:
            self.memory.wait(copy)
        except COPY_ERRORS as error:
            self._resident.add(i)
            self._keep_resident(i, error)
            return
        self.memory.free(page)
        self.pages[i] = copy
        self.transfers += Transfers(bytes_out=self._sizes[i], pages_out=1)

    def _finish_eviction_of(self, i: int) -> None:
        while i in self._leaving:
            self._finish_eviction()

    def _keep_resident(self, i: int, error: BaseException) -> None:
        self._unevictable.add(i)
        problem = (
            f"page {i} of {len(self.pages)} ({format_bytes(self._sizes[i])}) stays on the device, beyond its budget: "
            f"the copy to the host failed ({first_line(error)})"
        )
        self.transfers += Transfers(problems=(problem,))

    def _arrive(self, i: int) -> None:
        source = self.pages[i]
        try:
            copy = self._arriving.pop(i, None) or self.memory.to_device(source)
            self.memory.wait(copy)
        except COPY_ERRORS:
            copy = self._copy_alone(i)
        self._resident.add(i)
        self.pages[i] = copy
        self.memory.free(source)
        self.transfers += Transfers(bytes_in=self._sizes[i], pages_in=1)

    def _copy_alone(self, i: int) -> Page:
        """Repeats the copy to the device with all other pages evicted."""
        for page in self._arriving.values():
            self.memory.free(page)
        self._arriving.clear()
        self.evict_to(0)
        try:
            copy = self.memory.to_device(self.pages[i])
            self.memory.wait(copy)
        except COPY_ERRORS as error:
            raise PagingError(
                f"page {i} of {len(self.pages)} of the optimizer's state ({format_bytes(self._sizes[i])}): the device "
                f"has no room for it, even with all other pages evicted ({first_line(error)}); the step is incomplete. "
                "Free device memory or make batches smaller, then start again, with --resume if there is a checkpoint."
            ) from error
        return copy


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its class name if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclasses.dataclass(frozen=True)
class ShardedMemory(Memory):
    """Memory whose pages lie on all devices of a mesh, cut as their parameters are.

    Pages on the host are arrays in pinned memory that keep their sharding, so that each returns to its device.

    Attributes:
      device: one of the mesh, which stands for all: they are alike.
      mesh: the mesh.
    """

    mesh: Mesh

    @property
    def devices(self) -> Sequence[Device]:
        return self.mesh.local_devices

    def _sharding(self, spec: P, memory_kind: str) -> jax.sharding.Sharding:
        return NamedSharding(self.mesh, spec, memory_kind=memory_kind)

    def statistics(self) -> dict[str, int] | None:
        """Returns the least `bytes_limit` of the devices, and their largest other numbers; None if they report none."""
        reports = [report for device in self.devices if (report := device.memory_stats())]
        numbers = {name: max(report[name] for report in reports) for name in reports[0]} if reports else {}
        limits = [report["bytes_limit"] for report in reports if "bytes_limit" in report]
        return (numbers | {"bytes_limit": min(limits)} if limits else numbers) or None

    def parts(self, leaf: ArrayLike) -> Parts:
        assert isinstance(leaf, jax.Array)
        once = {_place(shard.index): shard for shard in leaf.addressable_shards}
        return {place: np.asarray(shard.data) for place, shard in once.items()}

    def joined(self, parts: Parts, shape: tuple[int, ...], spec: P) -> jax.Array | np.ndarray:
        # A copy, because JAX may alias what the callback returns, and `parts` may alias arrays that are freed.
        return jax.make_array_from_callback(
            shape, self._sharding(spec, self.kind), lambda index: np.array(parts[_place(index)])
        )

    def put(self, leaf: jax.Array | np.ndarray) -> jax.Array:
        return self._moved(leaf, self.device.default_memory().kind)

    def to_host(self, page: Page) -> Page:
        # An array that is on the host already was joined for this page.
        return tuple(self._moved(leaf, self.kind) if on_device((leaf,)) else leaf for leaf in page)

    def _moved(self, leaf: jax.Array | np.ndarray, memory_kind: str) -> jax.Array:
        assert isinstance(leaf, jax.Array)
        # Part by part, because one process of several moves only those of its devices.
        parts = [
            jax.device_put(part.data, SingleDeviceSharding(part.device, memory_kind=memory_kind), may_alias=False)
            for part in leaf.addressable_shards
        ]
        sharding = leaf.sharding.with_memory_kind(memory_kind)
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)


def _place(index: tuple[slice, ...] | None) -> tuple[slice, ...]:
    """Returns where a part lies after axis 0."""
    return tuple(index or ())[1:]


def memory_of(mesh: Mesh | None) -> Memory:
    """Returns the memory of a mesh, or of the first device, with the best host memory that works.

    Raises:
      ValueError: the devices of a mesh have no pinned host memory.
    """
    if mesh is None:
        return Memory.of(jax.local_devices()[0])
    memory = Memory.of(mesh.local_devices[0])
    if memory.kind != "pinned_host":
        raise ValueError(
            "optim.paging: this backend has no pinned host memory, which pages on several devices need (found "
            f"{memory.device.device_kind}). Set optim.paging=off."
        )
    return ShardedMemory(memory.device, memory.kind, mesh)
