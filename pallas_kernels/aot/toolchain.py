"""The packages that compile for absent cards: checks that they are installed and usable.

They are the extra `gpu-compile`: JAX's CUDA plugin without the CUDA libraries, NVIDIA's assembler and disassembler, and
a decompressor for XLA's serialized executables. Neither a driver nor a card is required.
"""

import ctypes
import functools
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from pallas_kernels.gpu_specs import CARDS, Card, target_config

PACKAGES = (
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
    "nvidia-cuda-nvcc",  # ptxas
    "nvidia-nvvm",
    "nvidia-cuda-cuobjdump",
    "nvidia-cuda-nvdisasm",
    "cramjam",
)
INSTALL = 'bash scripts/setup_gpu_compile.sh, or pip install "qlora-jax[gpu-compile]"'
SKIP_CHECK = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"  # JAX's switch to load the plugin without cuDNN and other libraries


class CompilerUnavailableError(RuntimeError):
    """This process cannot compile for an absent card; the message says why and how to fix it."""


def problem() -> str | None:
    """Returns why this process cannot compile for absent cards and how to fix it, or None if it can."""
    return _missing_packages() or _mismatched_plugin() or _unloadable_plugin()


def require() -> None:
    """Raises CompilerUnavailableError if there is a problem()."""
    if found := problem():
        raise CompilerUnavailableError(f"cannot compile for a card that this machine does not have: {found}")


def tool(package: str, name: str) -> Path:
    """Returns the path of an NVIDIA program in its wheel, in the version that the extra pins; ignores PATH."""
    for file in importlib.metadata.files(package) or ():
        if file.name == name and file.parent.name == "bin":
            return Path(str(file.locate()))
    raise CompilerUnavailableError(f"package {package} has no program {name}. Install it again: {INSTALL}")


def device_for(card: Card) -> Any:
    """Returns a compile-only jax.Device of this card, the same one each time. Call `require` first."""
    return devices_for(card, 1)[0]


@functools.cache
def devices_for(card: Card, count: int) -> tuple[Any, ...]:
    """Returns `count` compile-only devices of one host, the same ones each time. Call `require` first."""
    topology = f"1x1x{count}"  # slices x hosts x devices
    description = topologies.get_topology_desc(platform="cuda", target_config=target_config(card), topology=topology)
    return tuple(description.devices)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _missing_packages() -> str | None:
    missing = [package for package in PACKAGES if _version(package) is None]
    return f"packages missing: {', '.join(missing)}. Install them: {INSTALL}" if missing else None


def _mismatched_plugin() -> str | None:
    plugin, jaxlib = _version("jax-cuda13-plugin"), _version("jaxlib")
    if plugin == jaxlib:
        return None
    return f"jax-cuda13-plugin {plugin} requires jaxlib {plugin} (found {jaxlib}). Install the matching one: {INSTALL}"


def _unloadable_plugin() -> str | None:
    fix = f"Set JAX_PLATFORMS=cpu (or {SKIP_CHECK}=1) before the process's first use of jax"
    # Checked before the plugin is loaded: it would print a traceback, and cannot be loaded twice.
    if _cuda_is_wanted() and not os.environ.get(SKIP_CHECK) and not _has_driver():
        return f"no NVIDIA driver was found, so JAX does not load its CUDA plugin. {fix}"
    try:
        device_for(next(iter(CARDS.values())))
    except NotImplementedError:
        return f"JAX has not loaded its CUDA plugin in this process. {fix}"
    return None


def _cuda_is_wanted() -> bool:
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    return not platforms or not {"cuda", "gpu"}.isdisjoint(platforms.split(","))


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
