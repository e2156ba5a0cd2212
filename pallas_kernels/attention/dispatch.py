"""Chooses the implementation of causal attention, and of attention over pages, for a device.

The choice is a function of (device, dtype, sizes), so a report for an absent card uses the same code.
"""

import functools
from collections.abc import Callable

import jax
from jax.typing import DTypeLike

from pallas_kernels.attention import cpu, gpu, tiles
from pallas_kernels.attention.mosaic import capabilities
from pallas_kernels.devices import Device
from pallas_kernels.dispatch import Choice

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "cpu": cpu.attention,
    "wgmma": functools.partial(gpu.attention, kernels="wgmma"),
    "mma": functools.partial(gpu.attention, kernels="mma"),
    "tiles": tiles.attention,
}


def choose(device: Device, dtype: DTypeLike, head_dim: int, numbers: int = 0) -> Choice:
    """Returns the implementation that runs attention on a device, and why those of this device before it do not.

    Args:
      numbers: in the array of queries.
    """
    match device.platform:
        case "cpu":
            reasons = {"cpu": cpu.unsupported_reason(device.platform, dtype)}
        case "gpu":
            names = [name for name in ("wgmma", "mma") if device.names[0] in capabilities.DEVICES[name]] or ["mma"]
            reasons = {name: capabilities.unsupported_reason(name, device, dtype, head_dim, numbers) for name in names}
        case _:
            reasons = {}
    chosen = next((name for name, reason in reasons.items() if reason is None), "tiles")
    return Choice(chosen, {name: reason for name, reason in reasons.items() if reason is not None})


def choose_decoding(device: Device, dtype: DTypeLike, head_dim: int, cache_dtype: DTypeLike) -> Choice:
    """Returns what computes attention of one token per row over pages; if it is `reference`, why `mma` does not.

    Args:
      cache_dtype: that of keys and values in pages, or of their codes.
    """
    if device.platform != "gpu":
        return Choice("reference", {})
    reason = capabilities.undecodable_reason(device, dtype, head_dim, cache_dtype)
    return Choice("mma", {}) if reason is None else Choice("reference", {"mma": reason})
