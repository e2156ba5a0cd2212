"""The device that a computation is for, which need not be here: what dispatch asks before it chooses."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax

# What meshes call a platform -> jax's own name of it.
PLATFORMS = {"cuda": "gpu", "rocm": "gpu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """What tells devices apart for a kernel.

    Attributes:
      platform: as jax names it: `cpu`, `gpu`, `tpu`.
      kind: the maker's name, such as `NVIDIA H100 80GB HBM3`.
      compute_capability: (major, minor) of an NVIDIA GPU, None elsewhere or where nobody knows it.
    """

    platform: str
    kind: str
    compute_capability: tuple[int, int] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What a table may know it by, the most special first: `sm_90`, `gpu`."""
        if self.compute_capability is None:
            return (self.platform,)
        major, minor = self.compute_capability
        return (f"sm_{major}{minor}", self.platform)

    def __str__(self) -> str:
        special, *general = self.names
        return f"{self.kind} ({special})" if general else self.kind


def target_device() -> Device:
    """The device of the mesh in use, else `jax_default_device`, else the first device.

    Tracing for an absent card happens under one of the first two, so that what is chosen then is what the card runs.
    """
    mesh_device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if mesh_device is not None:
        return _of_mesh(mesh_device)
    return device_of(_default_device() or jax.local_devices()[0])


def device_of(device: Any) -> Device:
    """What a `jax.Device` is, one of a compile-only topology too."""
    return Device(platform=device.platform, kind=device.device_kind, compute_capability=_capability(device))


def _capability(device: Any) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return (int(found[1]), int(found[2])) if found else None


def _default_device() -> Any:
    """`jax_default_device` as a device: it may hold the name of a platform."""
    default = jax.config.jax_default_device
    return jax.local_devices(backend=default)[0] if isinstance(default, str) else default


def _of_mesh(abstract: Any) -> Device:
    """A mesh tells a kind and no compute capability: that of a device of the same kind is taken."""
    platform = str(PLATFORMS.get(abstract.platform, abstract.platform))
    alike = (device for device in _known_devices() if device.device_kind == abstract.device_kind)
    capability = next((_capability(device) for device in alike), None)
    return Device(platform=platform, kind=abstract.device_kind, compute_capability=capability)


def _known_devices() -> Iterator[Any]:
    default = _default_device()
    if default is not None:
        yield default
    yield from jax.local_devices()
