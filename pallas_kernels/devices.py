"""The target device of a computation, which may be absent. Dispatch chooses implementations by it."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import jax


@runtime_checkable
class JaxDevice(Protocol):
    """The attributes of a `jax.Device` that are read here; JAX does not export the class as a type."""

    @property
    def platform(self) -> str:
        """The backend, such as `gpu`."""
        ...

    @property
    def device_kind(self) -> str:
        """The vendor's name."""
        ...


# A mesh's name of a platform -> JAX's name.
PLATFORMS = {"cuda": "gpu", "rocm": "gpu"}
FUSED_FROM = (8, 0)  # compute capability from which NVIDIA's cards run the fused kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """The properties of a device by which kernels are chosen.

    Attributes:
      platform: JAX's name: `cpu`, `gpu`, `tpu`.
      kind: the vendor's name, such as `NVIDIA H100 80GB HBM3`.
      compute_capability: (major, minor) of an NVIDIA GPU; None elsewhere, or if it is unknown.
    """

    platform: str
    kind: str
    compute_capability: tuple[int, int] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names under which tables list the device, the most specific first: `sm_90`, `gpu`."""
        if self.compute_capability is None:
            return (self.platform,)
        major, minor = self.compute_capability
        return (f"sm_{major}{minor}", self.platform)

    def __str__(self) -> str:
        special, *general = self.names
        return f"{self.kind} ({special})" if general else self.kind


def target_device() -> Device:
    """Returns the device of the current mesh, else `jax_default_device`, else the first device.

    Tracing for an absent card happens under one of the first two, so the choice made there is the card's.
    """
    mesh_device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if mesh_device is not None:
        return _of_mesh(mesh_device)
    return device_of(_default_device() or jax.local_devices()[0])


def device_of(device: JaxDevice) -> Device:
    """Returns the properties of a `jax.Device`, which may be compile-only."""
    return Device(platform=device.platform, kind=device.device_kind, compute_capability=_capability(device))


def _capability(device: JaxDevice) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return (int(found[1]), int(found[2])) if found else None


def _default_device() -> JaxDevice | None:
    """Returns `jax_default_device` as a device; the option may hold the name of a platform."""
    default = jax.config.jax_default_device
    return jax.local_devices(backend=default)[0] if isinstance(default, str) else default


def _of_mesh(abstract: jax.sharding.AbstractDevice) -> Device:
    """Reads a mesh's device; a mesh has no compute capability, so a known device of the same kind supplies it."""
    platform = str(PLATFORMS.get(abstract.platform, abstract.platform))
    alike = (device for device in _known_devices() if device.device_kind == abstract.device_kind)
    capability = next((_capability(device) for device in alike), None)
    return Device(platform=platform, kind=abstract.device_kind, compute_capability=capability)


def _known_devices() -> Iterator[JaxDevice]:
    default = _default_device()
    if default is not None:
        yield default
    yield from jax.local_devices()
