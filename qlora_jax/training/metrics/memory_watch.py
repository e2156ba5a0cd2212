"""Memory in use by a run: now, for a step's record, and at its peak, to compare with the memory plan."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

_PROCESS = Path("/proc/self")
_DEVICE_KEYS = {
    "device_bytes": "bytes_in_use",
    "device_peak_bytes": "peak_bytes_in_use",
}  # keys of JAX's memory statistics


@runtime_checkable
class MeasuredDevice(Protocol):
    """The part of a jax.Device that is read here."""

    @property
    def platform(self) -> str: ...

    def memory_stats(self) -> dict[str, int] | None: ...


def watch_peak(devices: Sequence[MeasuredDevice]) -> Callable[[], int | None]:
    """Returns `peak()`: the peak memory of a device in bytes since this call, or None if nothing reports it.

    GPUs report the peak over the life of the process; the result is that of the fullest. On a CPU the result is the
    growth of the process since this call, shared among its virtual devices, so call it before the weights are read.
    """
    if devices[0].platform == "cpu":
        grown = _watch_process()
        return lambda: None if (size := grown()) is None else size // len(devices)
    return lambda: _on_fullest(devices, "peak_bytes_in_use")


def memory_in_use(devices: Sequence[MeasuredDevice]) -> dict[str, int]:
    """Returns the bytes in use now, as far as system and devices report them.

    `host_bytes` is the resident memory of this process (Linux only). `device_bytes` and `device_peak_bytes` are the
    arrays on the fullest device, now and at their peak; a CPU does not report them, because its arrays are in host
    memory.
    """
    sizes = {name: _on_fullest(devices, key) for name, key in _DEVICE_KEYS.items()}
    on_device = {name: size for name, size in sizes.items() if size is not None}
    try:
        return {"host_bytes": _resident("VmRSS"), **on_device}
    except OSError:
        return on_device


def _on_fullest(devices: Sequence[MeasuredDevice], key: str) -> int | None:
    """Returns the largest of the devices' numbers; None if a device does not report it."""
    statistics = [device.memory_stats() or {} for device in devices]
    return max(each[key] for each in statistics) if all(key in each for each in statistics) else None


def _watch_process() -> Callable[[], int | None]:
    try:
        (_PROCESS / "clear_refs").write_text("5")  # Linux: resets the peak to the memory resident now
        before = _resident("VmRSS")
    except OSError:
        return lambda: None
    return lambda: _resident("VmHWM") - before


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", (_PROCESS / "status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_PROCESS / 'status'} has no {field}")
    return 1024 * int(found[1])
