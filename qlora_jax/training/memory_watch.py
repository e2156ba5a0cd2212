"""Bytes that a run holds: now, for the record of a step, and at its fullest moment, to put beside its plan."""

import re
from collections.abc import Callable
from pathlib import Path

from qlora_jax.optim.page_pool import Device, Memory

_PROCESS = Path("/proc/self")
_OF_DEVICE = {"device_bytes": "bytes_in_use", "device_peak_bytes": "peak_bytes_in_use"}  # as JAX's allocators tell it


def watch_peak(memory: Memory) -> Callable[[], int | None]:
    """`peak()`: bytes held at most since this call; None where neither device nor system tells.

    A device tells of all that this process ever held there. On a CPU it is what the process has grown by: call before a
    weight is read.
    """
    if memory.device.platform == "cpu":
        return _watch_process()
    return lambda: (memory.statistics() or {}).get("peak_bytes_in_use")


def memory_in_use(device: Device) -> dict[str, int]:
    """Bytes held now, of what system and device tell.

    `host_bytes`: resident memory of this process; on Linux. `device_bytes`, `device_peak_bytes`: arrays on the device,
    now and at most since the process began; not on a CPU, whose arrays are the process's own.
    """
    told = device.memory_stats() or {}
    on_device = {name: told[key] for name, key in _OF_DEVICE.items() if key in told}
    try:
        return {"host_bytes": _resident("VmRSS"), **on_device}
    except OSError:
        return on_device


def _watch_process() -> Callable[[], int | None]:
    try:
        (_PROCESS / "clear_refs").write_text("5")  # Linux: the peak starts again from what is resident now
        before = _resident("VmRSS")
    except OSError:
        return lambda: None
    return lambda: _resident("VmHWM") - before


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", (_PROCESS / "status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_PROCESS / 'status'} has no {field}")
    return 1024 * int(found[1])
