"""Memory in use by a run: now, for a step's record, and at its peak, to compare with the memory plan."""

import re
from collections.abc import Callable
from pathlib import Path

from qlora_jax.optim.page_pool import Device, Memory

_PROCESS = Path("/proc/self")
_DEVICE_KEYS = {
    "device_bytes": "bytes_in_use",
    "device_peak_bytes": "peak_bytes_in_use",
}  # keys of JAX's memory statistics


def watch_peak(memory: Memory) -> Callable[[], int | None]:
    """Returns `peak()`: the peak memory in bytes since this call, or None if neither device nor system reports it.

    A GPU reports the peak over the life of the process. On a CPU the result is the growth of the process since this
    call, so call it before the weights are read.
    """
    if memory.device.platform == "cpu":
        return _watch_process()
    return lambda: (memory.statistics() or {}).get("peak_bytes_in_use")


def memory_in_use(device: Device) -> dict[str, int]:
    """Returns the bytes in use now, as far as system and device report them.

    `host_bytes` is the resident memory of this process (Linux only). `device_bytes` and `device_peak_bytes` are the
    arrays on the device, now and at their peak; a CPU does not report them, because its arrays are in host memory.
    """
    statistics = device.memory_stats() or {}
    on_device = {name: statistics[key] for name, key in _DEVICE_KEYS.items() if key in statistics}
    try:
        return {"host_bytes": _resident("VmRSS"), **on_device}
    except OSError:
        return on_device


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
