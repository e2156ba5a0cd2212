"""Chooses the implementation of causal attention, and of attention over pages, for a device.

The choice is a function of (device, dtype, sizes), so a report for an absent card uses the same code.
"""

from types import ModuleType

from jax.typing import DTypeLike

from pallas_kernels.attention import cpu, mma, tiles
from pallas_kernels.attention.mosaic import capabilities
from pallas_kernels.devices import Device
from pallas_kernels.nf4_matmul.dispatch import Choice

IMPLEMENTATIONS: dict[str, ModuleType] = {"cpu": cpu, "mma": mma, "tiles": tiles}


def choose(device: Device, dtype: DTypeLike, head_dim: int, numbers: int = 0) -> Choice:
    """Returns the implementation that runs attention on a device; if it is `tiles`, why a faster one does not.

    Args:
      numbers: in the array of queries.
    """
    match device.platform:
        case "cpu":
            name, reason = "cpu", cpu.unsupported_reason(device.platform, dtype)
        case "gpu":
            name, reason = "mma", capabilities.unsupported_reason(device, dtype, head_dim, numbers)
        case _:
            return Choice("tiles", {})
    return Choice(name, {}) if reason is None else Choice("tiles", {name: reason})


def choose_decoding(device: Device, dtype: DTypeLike, head_dim: int, cache_dtype: DTypeLike) -> Choice:
    """Returns what computes attention of one token per row over pages; if it is `reference`, why `mma` does not.

    Args:
      cache_dtype: that of keys and values in pages, or of their codes.
    """
    if device.platform != "gpu":
        return Choice("reference", {})
    reason = capabilities.undecodable_reason(device, dtype, head_dim, cache_dtype)
    return Choice("mma", {}) if reason is None else Choice("reference", {"mma": reason})
